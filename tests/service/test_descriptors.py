"""A program that closes descriptors which it did not open (a daemon; a forked child or itself) closes ours.

What it finds at a missing page is a crash that says why, or StaleRegionError: never zeros, never another
file's bytes, never a wait for ever. Others who share the cache notice nothing, and no descriptor of the
program's, which has one of our numbers by then, is read, written, moved or closed.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

import uffd_vm as uv
from tests.conftest import missing_requirement
from tests.support import fork_and_ask, run_in_child, wait_until
from uffd_vm.kernel.features import Feature
from uffd_vm.page import PAGE_SIZE
from uffd_vm.testing.strategies import pattern

NR_PAGES = 64
DATA = pattern(NR_PAGES * PAGE_SIZE)
SERVICES = ("native", "inline", "python")
MODES = ("r", "c", "r+")
WORDS = "closed the descriptors of uffd_vm"


@pytest.fixture(autouse=True)
def _userfaultfd() -> None:
    if reason := missing_requirement(Feature.MISSING_SHMEM, Feature.POISON):
        pytest.skip(reason)


def mapped(directory: Path, service: str, mode: str) -> tuple[uv.Region, Path]:
    path = directory / "data.bin"
    path.write_bytes(DATA)
    region = uv.map(
        path, mode, service=service, fault_around_bytes=PAGE_SIZE, readahead_bytes=0, deadline=5
    )
    assert region.buffer[0:PAGE_SIZE] == DATA[:PAGE_SIZE]
    return region, path


def sweep() -> None:
    """As a daemon does it."""
    os.closerange(3, 1000)


class Numbers:
    """Files of the program's, on the numbers that were ours: pipes with something in them, which nobody waits
    for, and a file. `check()`: nobody but the program has touched them."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "other"
        self.path.write_bytes(bytes(NR_PAGES * PAGE_SIZE))
        self.pipes = []
        self.files = []
        for _ in range(12):
            self.pipes.append(os.pipe())
            os.write(self.pipes[-1][1], b"mine")
            self.files.append(os.open(self.path, os.O_RDWR))

    def check(self, *, region_closed: bool = False) -> None:
        if region_closed and sys.version_info < (3, 13):
            return  # an mmap object keeps a duplicate of its descriptor, and closes that number
        for reading, writing in self.pipes:
            os.set_blocking(reading, False)
            os.fstat(writing)
            assert os.read(reading, 100) == b"mine"
            os.write(writing, b"mine")
        for fd in self.files:
            assert os.lseek(fd, 0, os.SEEK_CUR) == 0
        assert self.path.read_bytes() == bytes(NR_PAGES * PAGE_SIZE)


def wait_for(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- a touch


def in_child_child_sweeps(service: str, mode: str, reuse: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        region, path = mapped(Path(name), service, mode)
        expected = bytearray(DATA)
        view = region.buffer
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            if mode == "r+" and service != "python":
                view[PAGE_SIZE] = 99
            sweep()
            _numbers = Numbers(Path(name)) if reuse else None
            _ = bytes(view[2 * PAGE_SIZE : 40 * PAGE_SIZE])
            os._exit(0)
        if mode == "r+" and service != "python":
            expected[PAGE_SIZE] = 99
        assert wait_for(pid) == -signal.SIGSEGV
        assert view == expected
        view.release()
        region.close()
        assert path.read_bytes() == expected if mode == "r+" else DATA


@pytest.mark.parametrize("reuse", [False, True], ids=["closed", "reused"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("service", SERVICES)
def test_a_child_that_closes_all_dies_at_a_missing_page_and_its_parent_loses_nothing(
    service: str, mode: str, reuse: bool
) -> None:
    result = run_in_child(in_child_child_sweeps, service, mode, reuse, timeout=40)
    if (service, mode) != ("python", "r+"):  # which no child inherits
        assert WORDS in result.stderr, result.stderr


def in_child_sweeps(service: str, mode: str, reuse: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        region, _ = mapped(Path(name), service, mode)
        view = region.buffer
        sweep()
        _numbers = Numbers(Path(name)) if reuse else None
        signal.alarm(20)
        _ = bytes(view[PAGE_SIZE:])


@pytest.mark.parametrize("reuse", [False, True], ids=["closed", "reused"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("service", SERVICES)
def test_a_process_that_closes_all_dies_at_a_missing_page(
    service: str, mode: str, reuse: bool
) -> None:
    result = run_in_child(in_child_sweeps, service, mode, reuse, timeout=40, check=False)
    assert result.returncode == -signal.SIGSEGV, result
    assert WORDS in result.stderr, result.stderr


# --- a call, and what the program has opened since


def in_child_calls(service: str, mode: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        region, path = mapped(Path(name), service, mode)
        if mode == "r+":
            region.buffer[0] = 99  # not written back, and never will be
        sweep()
        numbers = Numbers(Path(name))
        for call in (
            region.check,
            region.load,
            region.residency,
            region.stats,
            region.flush,
            region.evict,
        ):
            with pytest.raises(uv.StaleRegionError, match=WORDS):
                call()
        numbers.check()
        if mode == "r+":
            with pytest.raises(uv.StaleRegionError, match="since the last flush"):
                region.close()
            region.discard()
        else:
            region.close()
        numbers.check(region_closed=True)
        assert path.read_bytes() == DATA
    os._exit(0)  # the result of run_in_child() has no descriptor any more


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("service", SERVICES)
def test_calls_say_what_happened_and_leave_the_programs_files_alone(
    service: str, mode: str
) -> None:
    run_in_child(in_child_calls, service, mode, timeout=40)


def in_child_maps_again(service: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        old, path = mapped(Path(name), service, "r")
        sweep()
        numbers = Numbers(Path(name))
        with uv.map(path, "r", service=service) as region:
            assert region.buffer[:] == DATA
            status, said = fork_and_ask(lambda: bytes(region.buffer[:]))
            assert status == 0 and said == DATA
            with pytest.raises(uv.StaleRegionError, match=WORDS):
                old.check()
        numbers.check()
        old.close()
        numbers.check(region_closed=True)
        assert not [name for name in thread_names() if name.startswith("uvm-")]
    os._exit(0)


@pytest.mark.parametrize("service", SERVICES)
def test_what_is_mapped_afterwards_is_served(service: str) -> None:
    run_in_child(in_child_maps_again, service, timeout=40)


def in_child_forks_again(service: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        region, path = mapped(Path(name), service, "r")
        view = region.buffer
        sweep()
        numbers = Numbers(Path(name))
        pid = os.fork()
        if pid == 0:
            with uv.map(path, "r", service=service) as other:
                assert other.buffer[:] == DATA
            signal.alarm(20)
            _ = view[PAGE_SIZE]
            os._exit(0)
        assert wait_for(pid) == -signal.SIGSEGV
        numbers.check()
        view.release()
        region.close()
        numbers.check(region_closed=True)
    os._exit(0)


@pytest.mark.parametrize("service", SERVICES)
def test_a_child_forked_afterwards_finds_the_region_inaccessible(service: str) -> None:
    result = run_in_child(in_child_forks_again, service, timeout=40)
    assert WORDS in result.stderr, result.stderr


# --- the keeper


def thread_names() -> list[str]:
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


@pytest.mark.parametrize("service", SERVICES)
def test_the_keeper_holds_the_userfaultfd_and_nothing_else(service: str, tmp_path: Path) -> None:
    region, _ = mapped(tmp_path, service, "r")
    keepers = [
        task
        for task in Path("/proc/self/task").iterdir()
        if (task / "comm").read_text().strip() == "uvm-keeper"
    ]
    assert len(keepers) == 1

    def held() -> list[str]:
        return [os.readlink(fd) for fd in (keepers[0] / "fd").iterdir()]

    wait_until(lambda: held() == ["anon_inode:[userfaultfd]"], f"{held()}")
    region.close()
    wait_until(lambda: "uvm-keeper" not in thread_names())
