"""At the limit of a memory cgroup, a real one: what may go makes room before the kernel has to kill, and
where nothing may go the process is killed: it neither hangs nor reads zeros."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import uffd_vm as uv
from tests.support import ChildResult, memory_cgroup, nr_oom_kills, run_in_child
from uffd_vm.page import PAGE_SIZE
from uffd_vm.testing.strategies import pattern

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("uffd")]

MIB = 1 << 20
LIMIT = 96 * MIB  # an interpreter with NumPy takes a third of it
NR_BYTES = 2 * LIMIT
SERVICES = ("native", "inline", "python")


def limited(job, *args: object) -> tuple[ChildResult, int]:
    """The end of job(group, *args) in a child that joins a group with LIMIT; the kernel's kills there."""
    with memory_cgroup(LIMIT) as group:
        if not group:
            pytest.skip("no memory cgroup can be made here; as root, mount one (cgroup v2 or v1)")
        done = run_in_child(job, str(group), *args, timeout=100, check=False)
        return done, nr_oom_kills(group)


def join(group: str) -> None:
    Path(group, "cgroup.procs").write_text(str(os.getpid()))
    Path("/proc/self/oom_score_adj").write_text("1000")


def in_child_file(group: str, path: str, mode: str, service: str, cap: int | None) -> int:
    join(group)
    with uv.map(path, mode, service=service, **({"cap": cap} if cap else {})) as region:
        with open(path, "rb") as file, region.buffer as buffer:
            for at in range(0, NR_BYTES, MIB):
                assert buffer[at : at + MIB] == file.read(MIB)
                if mode == "r+":
                    buffer[at + 5] ^= 0xFF
        region.flush()
        residency = region.residency()
        assert residency.cache_bytes <= residency.cache_cap_bytes
        assert region.stats()["pgfault_failed"] == 0
        return residency.cache_cap_bytes


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memcg") / "large.bin"
    path.write_bytes(pattern(NR_BYTES, 5))
    return path


@pytest.mark.parametrize("cap", [None, 16 * MIB], ids=["default cap", "cap"])
@pytest.mark.parametrize("mode", ["r", "c", "r+"])
@pytest.mark.parametrize("service", SERVICES)
def test_a_file_twice_the_limit_is_read_and_written(
    large_file: Path, service: str, mode: str, cap: int | None
) -> None:
    before = large_file.read_bytes()
    done, nr_kills = limited(in_child_file, str(large_file), mode, service, cap)
    assert (done.returncode, nr_kills) == (0, 0), done.stderr
    assert done.value == (cap or LIMIT // 2)
    after = large_file.read_bytes()
    if mode == "r+":
        assert all(after[at + 5] == before[at + 5] ^ 0xFF for at in range(0, NR_BYTES, MIB))
    else:
        assert after == before


def in_child_private(group: str, path: str, service: str) -> None:
    """Private pages, which nothing but swap could take."""
    join(group)
    region = uv.map(path, "c", service=service) if path else uv.anonymous(NR_BYTES, service=service)
    for at in range(0, NR_BYTES, PAGE_SIZE):
        region.buffer[at] = 1


@pytest.mark.parametrize("kind", ["c", "anonymous"])
@pytest.mark.parametrize("service", SERVICES)
def test_private_pages_beyond_the_limit_end_the_process(
    large_file: Path, service: str, kind: str
) -> None:
    done, nr_kills = limited(in_child_private, str(large_file) if kind == "c" else "", service)
    assert done.returncode == -signal.SIGKILL, (done.returncode, done.stderr)
    assert nr_kills >= 1
