"""What each kernel gives: a column of the feature table is masked as a whole, and every mode is mapped by
every service. Each ends as documented: right bytes, the documented fallback, or the typed refusal that
says which feature is missing, which Linux has it, and what to do instead.

A column is a child of its own, since a process opens its userfaultfds one way. PAGEMAP_SCAN is masked
and made to fail, as ENOTTY of an older kernel: no executor may need it.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.support import run_in_child
from uffd_vm.cli.doctor import FALLBACK, REFUSED, WORKS
from uffd_vm.kernel import features
from uffd_vm.kernel.features import ALL_FEATURES, KERNELS, LIBRARY_FEATURES, Feature
from uffd_vm.page import PAGE_SIZE
from uffd_vm.testing.strategies import pattern

pytestmark = pytest.mark.requires(ALL_FEATURES, "PAGEMAP_SCAN")

COLUMNS = [f"{major}.{minor}" for major, minor in KERNELS]
SERVICES = ("auto", "native", "python", "inline", "kernel")
#: kind -> (mode, None: anonymous; track)
KINDS: dict[str, tuple[str | None, bool]] = {
    "anonymous": (None, False),
    "anonymous tracked": (None, True),
    "r": ("r", False),
    "c": ("c", False),
    "c tracked": ("c", True),
    "r+": ("r+", False),
    "r+ tracked": ("r+", True),
}
NR_PAGES = 40
DATA = pattern(NR_PAGES * PAGE_SIZE - 100, 9)
WRITTEN = (0, 7, 8, NR_PAGES - 1)


def masked(column: str) -> str:
    """UFFD_VM_MASK_FEATURES for a kernel of the table."""
    major, minor = map(int, column.split("."))
    lacks = ALL_FEATURES & ~features.kernel_features((major, minor))
    names = [f.name or "" for f in Feature if f & lacks]
    if (major, minor) < features.PAGEMAP_SCAN_KERNEL:
        names.append("PAGEMAP_SCAN")
    return ",".join(names)


# --- in the child -----------------------------------------------------------------------------------


def in_child_map_everything() -> dict[tuple[str, str], dict[str, Any]]:
    """How each combination ended: what raised, or what was seen."""
    import uffd_vm as uv
    from uffd_vm.kernel._lib import lib
    from uffd_vm.testing.inject import OPS

    scans = "PAGEMAP_SCAN" not in features.probe().masked
    if not scans:
        lib.uvm_inject(OPS["PAGEMAP_SCAN"], 0, 1 << 40, errno.ENOTTY, 0)
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for number, (kind, service) in enumerate((k, s) for k in KINDS for s in SERVICES):
            path = Path(directory) / f"{number}.bin"
            path.write_bytes(DATA)
            try:
                seen[kind, service] = _use(uv, path, kind, service)
            except Exception as error:
                seen[kind, service] = {"error": type(error).__name__, "text": str(error)}
    return seen


def _use(uv: Any, path: Path, kind: str, service: str) -> dict[str, Any]:
    mode, track = KINDS[kind]
    options: dict[str, Any] = {"service": service, "track": track}
    options |= {"fault_around_bytes": PAGE_SIZE}
    region = (
        uv.map(path, mode, readahead_bytes=0, **options)
        if mode
        else uv.anonymous(len(DATA), **options)
    )
    seen: dict[str, Any] = {"service": region.service}
    want = bytearray(DATA if mode else bytes(len(DATA)))
    with region:
        buffer = region.buffer
        touched = range(0, NR_PAGES, 2)
        for page in touched:
            assert buffer[page * PAGE_SIZE] == want[page * PAGE_SIZE]
        if track:
            region.protect()
            assert region.dirty() == []
        if mode != "r":
            for page in WRITTEN:
                buffer[page * PAGE_SIZE] = want[page * PAGE_SIZE] = 0xA5
        if track:  # the store to a hole too
            told = [a // PAGE_SIZE for a, b in region.dirty() for a in range(a, b, PAGE_SIZE)]
            assert told == sorted(WRITTEN), told
        residency = region.residency()
        seen["mapped"] = residency.mapped_bytes // PAGE_SIZE
        seen["dirty"] = residency.dirty_bytes // PAGE_SIZE
        assert bytes(buffer) == want
        region.flush()
        region.evict()
        assert bytes(buffer) == want
        region.ensure()
        with open(path.with_suffix(".out"), "wb", buffering=0) as sink:
            assert sink.write(buffer) == len(want)
        pid = os.fork()
        if pid == 0:
            os._exit(0 if bytes(buffer) == want else 3)
        seen["child"] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        seen["pgfault"] = region.stats().get("pgfault", 0)
        buffer.release()
    if mode:
        assert path.read_bytes() == (bytes(want) if mode == "r+" else DATA)
    return seen


@functools.cache
def column_seen(column: str) -> dict[tuple[str, str], dict[str, Any]]:
    env = {"UFFD_VM_MASK_FEATURES": masked(column)}
    value = run_in_child(in_child_map_everything, timeout=100, env=env).value
    assert isinstance(value, dict)
    return value


# --- what is documented -----------------------------------------------------------------------------


def expected(column: str, kind: str, service: str) -> tuple[str, str]:
    """("served by", service) or (the exception's name, a part of its text): the README's table of kernels."""
    mode, track = KINDS[kind]
    if mode is None:
        if service == "kernel":
            return "InvalidArgument", "np.zeros()"
        return "served by", "native" if service == "auto" else service
    if service == "kernel" and track:
        return "InvalidArgument", "use service='native'"
    if service == "kernel" or (service == "auto" and not track):
        return "served by", "kernel"
    if tuple(map(int, column.split("."))) < (6, 6):
        return "FeatureUnavailable", "POISON"
    return "served by", "native" if service == "auto" else service


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", COLUMNS)
def test_a_kernel_gives_what_is_documented(column: str, kind: str, service: str) -> None:
    seen = column_seen(column)[kind, service]
    how, what = expected(column, kind, service)
    if how != "served by":
        assert seen.get("error") == how and what in seen["text"], seen
        if how == "FeatureUnavailable":  # what, since when, what instead
            assert "Linux 6.6 or later" in seen["text"]
            assert "Instead: map with service='kernel'" in seen["text"]
        return
    assert seen.get("service") == what, seen
    mode = KINDS[kind][0]
    not_inherited = what == "python" and mode == "r+"
    assert seen["child"] == (-signal.SIGSEGV if not_inherited else 0), "a forked child"
    nr_written = 0 if mode == "r" else len(WRITTEN)
    nr_touched = len({*range(0, NR_PAGES, 2), *(WRITTEN if nr_written else ())})
    if what == "kernel":
        return  # mapped around by the kernel as it likes
    assert seen["pgfault"] >= nr_touched
    assert seen["mapped"] == nr_touched, "every page that was touched, no other"
    scans = "PAGEMAP_SCAN" not in masked(column)
    if mode is None and not KINDS[kind][1]:
        assert seen["dirty"] == (nr_written if scans else 0)


@pytest.mark.parametrize("column", COLUMNS)
def test_the_doctor_says_the_same_of_a_kernel(column: str) -> None:
    """`uffd-vm doctor` on such a kernel: its columns are what was found by mapping."""
    from uffd_vm.cli.doctor import _row

    seen = column_seen(column)

    def works(kind: str) -> bool:
        return all("service" in seen[kind, s] for s in ("native", "python", "inline"))

    said = {f.name: _row(f, features.probe()).kernels[column] for f in LIBRARY_FEATURES}
    found = {
        "lazy files": works("r") and works("c"),
        "writable files": works("r+"),
        "anonymous memory": works("anonymous"),
        "write tracking": works("anonymous tracked"),
    }
    for name, found_to_work in found.items():
        (status,) = [s for full, s in said.items() if full.startswith(name)]
        assert status == (WORKS if found_to_work else REFUSED), name
    (counts,) = [s for full, s in said.items() if full.startswith("counts of private")]
    assert counts == (FALLBACK if "PAGEMAP_SCAN" in masked(column) else WORKS)


def in_child_fail_a_page(service: str) -> str:
    """Zeros that the kernel has no memory for, where a failed page cannot be marked."""
    import uffd_vm as uv
    from uffd_vm.kernel._lib import lib
    from uffd_vm.testing.inject import OPS

    with uv.anonymous(4 * PAGE_SIZE, service=service, deadline=0.3) as region:
        buffer = region.buffer
        for op in ("ZEROPAGE", "COPY"):
            lib.uvm_inject(OPS[op], 0, 1 << 40, errno.ENOMEM, 0)
        lib.uvm_inject(OPS["POISON"], 0, 1 << 40, errno.EINVAL, 0)
        try:
            region.load()
            outcome = "loaded"
        except (uv.UffdVmError, MemoryError) as error:
            outcome = type(error).__name__
        finally:
            lib.uvm_inject_clear()
        assert buffer[0] == 0
        buffer.release()
    return outcome


def test_without_poison_a_load_of_anonymous_memory_still_fails_in_words() -> None:
    env = {"UFFD_VM_MASK_FEATURES": masked("6.1")}
    assert run_in_child(in_child_fail_a_page, "native", env=env).value == "BudgetExceeded"
