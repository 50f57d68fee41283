"""The n-th kernel call fails: for every call, every plausible errno, n = 1, 2, 3 ... until a run is clean.

As SQLite tests malloc. One workload goes through every path that the call is on. Whatever fails, an
operation ends in one of these ways, and each is checked:

- the right bytes;
- a typed error of the library (UffdVmError), an OSError or a MemoryError;
- in a child only: death by SIGBUS, after our message or where on_error="sigbus" asked for it; and by
  SIGSEGV of a store that write protection is never lifted for (docs/failure.md, "Stores").

Never wrong bytes, never a hang, and afterwards nothing is left: regions, caches, threads, descriptors.
Transient failures hit one call, persistent ones all calls from the n-th on. Runs are grouped by call in
children with a time limit, since a hang may hold the GIL.
"""

from __future__ import annotations

import errno
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import uffd_vm as uv
from tests.support import ChildTimeout, run_in_child, wait_until
from uffd_vm.kernel._lib import ffi, lib
from uffd_vm.kernel.features import Feature
from uffd_vm.page import PAGE_SIZE
from uffd_vm.testing.inject import OPS, inject
from uffd_vm.testing.strategies import pattern

pytestmark = pytest.mark.requires(Feature.MISSING_SHMEM, Feature.POISON)

NR_PAGES = 24
DATA = pattern(NR_PAGES * PAGE_SIZE - 700)
CAP = 12 * PAGE_SIZE
ALWAYS = 1 << 40

#: Call -> what it may plausibly say. COPY and its kin answer EAGAIN and EEXIST in ordinary life.
PLAUSIBLE: dict[str, tuple[int, ...]] = {
    "USERFAULTFD": (errno.ENOMEM, errno.EMFILE, errno.EPERM),
    "API": (errno.EINVAL, errno.EPERM),
    "REGISTER": (errno.ENOMEM, errno.EBUSY, errno.EINVAL),
    "UNREGISTER": (errno.ENOMEM, errno.EINVAL),
    "WRITEPROTECT": (errno.ENOENT, errno.EAGAIN, errno.ENOMEM),
    "COPY": (
        errno.EAGAIN,
        errno.EEXIST,
        errno.ENOENT,
        errno.ENOMEM,
        errno.EFAULT,
        errno.EINVAL,
        errno.ESRCH,
    ),
    "ZEROPAGE": (errno.EAGAIN, errno.EEXIST, errno.ENOENT, errno.ENOMEM, errno.EINVAL),
    "CONTINUE": (errno.EAGAIN, errno.EEXIST, errno.ENOENT, errno.ENOMEM, errno.EFAULT),
    "POISON": (errno.EAGAIN, errno.EEXIST, errno.ENOENT, errno.ENOMEM),
    "PAGEMAP_SCAN": (errno.ENOMEM, errno.EINVAL),
    "PREAD": (errno.EIO, errno.EINTR, errno.EAGAIN, errno.ENOMEM, errno.ESTALE),
    "PREAD_NOWAIT": (errno.EAGAIN, errno.EOPNOTSUPP, errno.EIO, errno.EINTR),
    "PWRITE": (errno.EIO, errno.ENOSPC, errno.EINTR, errno.EDQUOT),
    "FSYNC": (errno.EIO, errno.ENOSPC),
    "PUNCH": (errno.ENOMEM, errno.EINTR, errno.EPERM),
    "MADVISE": (errno.EINVAL, errno.ENOMEM, errno.EAGAIN),
    "MMAP": (errno.ENOMEM,),
    "MEMFD": (errno.EMFILE, errno.ENOMEM),
    "FSTAT": (errno.EIO, errno.ESTALE),
}
MAX_FAILED = 4
KINDS = ("anonymous", "anonymous tracked", "r", "c", "c tracked", "r+")

#: An answer that the kernel cannot give for good: asked again, it says something else. EEXIST for ever of a
#: page that is not there, or ENOENT of a range that is registered, would be another kernel's.
ENDS_BY_ITSELF = {
    ("PREAD", errno.EINTR),
    ("PREAD_NOWAIT", errno.EINTR),
    ("PWRITE", errno.EINTR),
    ("COPY", errno.EEXIST),
    ("COPY", errno.ENOENT),
    ("ZEROPAGE", errno.EEXIST),
    ("ZEROPAGE", errno.ENOENT),
    ("CONTINUE", errno.EEXIST),
    ("CONTINUE", errno.ENOENT),
    ("WRITEPROTECT", errno.ENOENT),
}


def test_every_call_has_plausible_failures() -> None:
    """MOVE comes with swap. WAKE checks its range and nothing else: it has nothing plausible to say."""
    assert set(PLAUSIBLE) | {"MOVE", "WAKE"} == set(OPS)


# --- one run ----------------------------------------------------------------------------------------


class WrongBytes(AssertionError):
    pass


def _nothing() -> None:
    pass


def _let_exceptions_in() -> None:
    """An exception that native code sets in this thread is raised a few calls after the touch."""
    for _ in range(20):
        _nothing()


class Run:
    """One workload over one region; `outcomes` counts how its steps ended."""

    def __init__(self, kind: str, path: Path, outcomes: Counter[str]) -> None:
        self.kind, self.path, self.outcomes = kind, path, outcomes
        self.nr_failed = 0
        self.may: list[set[int]] = []
        """First byte of each page: what it may read as. More than one where a store failed half way."""

    def attempt(self, step: Callable[[], object], *, touch: bool = False) -> bool:
        if touch and self.nr_failed >= MAX_FAILED:
            return False  # each may wait for the deadline
        try:
            step()
            _let_exceptions_in()
        except (uv.UffdVmError, OSError, MemoryError) as error:
            self.outcomes[type(error).__name__] += 1
            self.nr_failed += 1
            return False
        self.outcomes["ok"] += 1
        return True

    def open(self) -> uv.Region:
        options: dict[str, Any] = {"deadline": 0.15, "fault_around_bytes": 4 * PAGE_SIZE}
        if self.kind.startswith("anonymous"):
            return uv.anonymous(
                len(DATA), track="tracked" in self.kind, service="native", **options
            )
        options |= {"cap": CAP, "readahead_bytes": 8 * PAGE_SIZE, "service": "native"}
        return uv.map(self.path, self.kind.split()[0], track="tracked" in self.kind, **options)

    def read(self, region: uv.Region, page: int) -> None:
        buffer = region.buffer

        def step() -> None:
            got = buffer[page * PAGE_SIZE]
            _let_exceptions_in()
            if got not in self.may[page]:
                raise WrongBytes(f"page {page} reads {got:#x}, may be {self.may[page]}")

        self.attempt(step, touch=True)

    def write(self, region: uv.Region, page: int, value: int) -> None:
        buffer = region.buffer
        self.may[page].add(value)

        def step() -> None:
            buffer[page * PAGE_SIZE] = value

        if self.attempt(step, touch=True):
            self.may[page] = {value}

    def read_beside(self, region: uv.Region) -> None:
        """Mode "r+": what another region of the cache has filled is mapped by CONTINUE."""
        beside: list[uv.Region] = []
        if self.kind == "r+" and self.attempt(lambda: beside.append(self.open())):
            for page in range(16, 20):
                self.read(beside[0], page)
                self.read(region, page)
            self.attempt(beside[0].close)
            if not beside[0].closed:
                lib.uvm_inject_clear()
                beside[0].discard()

    def everything(self) -> None:
        opened: list[uv.Region] = []
        if not self.attempt(lambda: opened.append(self.open())):
            return
        region = opened[0]
        first = b"" if self.kind.startswith("anonymous") else DATA[::PAGE_SIZE]
        self.may = [{first[p] if first else 0} for p in range(NR_PAGES)]
        try:
            for page in range(8):
                self.read(region, page)
            if self.kind != "r":
                for page in (0, 5, 9, 14):
                    self.write(region, page, 0xA0 + page)
            self.attempt(lambda: region.load((10 * PAGE_SIZE, 16 * PAGE_SIZE)))
            self.attempt(region.flush)
            self.attempt(region.evict)
            if region._tracked:
                self.attempt(region.protect)
            for page in range(0, NR_PAGES, 3):
                self.read(region, page)
                if self.kind != "r":
                    self.write(region, page, 0xC0 + page)
            self.read_beside(region)
            self.attempt(region.prefetch)
            self.attempt(region.flush)
            for page in range(NR_PAGES):
                self.read(region, page)
        finally:
            self.finish(region)

    def finish(self, region: uv.Region) -> None:
        """With the injector still armed, then without: a region can always be got rid of."""
        flushed = self.attempt(region.close)
        if not region.closed:
            self.attempt(region.discard)
        lib.uvm_inject_clear()
        if not region.closed:
            region.discard()
        if self.kind == "r+" and flushed:
            content = self.path.read_bytes()
            for page, may in enumerate(self.may):
                if content[page * PAGE_SIZE] not in may:
                    raise WrongBytes(f"page {page} of the file is {content[page * PAGE_SIZE]:#x}")
                if (
                    content[page * PAGE_SIZE + 1 : (page + 1) * PAGE_SIZE]
                    != (DATA[page * PAGE_SIZE + 1 : (page + 1) * PAGE_SIZE])
                ):
                    raise WrongBytes(f"page {page} of the file holds what nobody stored")


def held() -> dict[str, int]:
    stats = ffi.new("struct uvm_process_stats *")
    lib.uvm_process_stats(stats)
    return {
        "regions": stats.nr_regions,
        "caches": stats.nr_caches,
        "threads": stats.nr_threads,
        "fds": len(os.listdir("/proc/self/fd")),
        "tasks": len(os.listdir("/proc/self/task")),
    }


def in_child_fail_each_call(op: str, code: int, persistent: bool, kind: str) -> dict[str, int]:
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.bin"

        def once(skip: int, count: int) -> bool:
            path.write_bytes(DATA)
            with inject(op, code, skip=skip, count=count) as injection:
                Run(kind, path, outcomes).everything()
                return injection.fired or _fired_before_clear(op, skip)

        once(0, 0)  # warm: imports, the first service
        before = held()
        failed, skip, step = 0, 0, 1
        while True:
            # Stated first, for the parent to know where it was when this child is killed.
            print(f"{op} {errno.errorcode[code]} {kind} from call {skip}", flush=True)
            if not once(skip, ALWAYS if persistent else 1):
                break
            failed += 1
            skip += step
            step = max(1, skip if persistent else skip // 8)
        wait_until(lambda: held() == before, f"nothing left: {held()} as {before}", timeout=5)
    return {"failed": failed, **outcomes}


def _fired_before_clear(op: str, skip: int) -> bool:
    # finish() disarms, which keeps the count of calls seen.
    return int(lib.uvm_inject_calls(OPS[op])) > skip


#: By call: which kinds of region make it at all. Left out: all.
USED_BY = {
    "UNREGISTER": ("r",),  # of stray ranges only
    "ZEROPAGE": ("anonymous",),
    "COPY": ("anonymous tracked", "r", "c", "c tracked", "r+"),
    "CONTINUE": ("r+",),
    "WRITEPROTECT": ("anonymous tracked", "c tracked", "r+"),
    "PREAD": ("r", "c tracked", "r+"),
    "PREAD_NOWAIT": ("r", "c", "c tracked", "r+"),
    "FSTAT": ("r", "r+"),
    "PWRITE": ("r+",),
    "FSYNC": ("r+",),
    "PUNCH": ("r", "c", "r+"),
    "POISON": ("r",),  # where something else failed before
    "PAGEMAP_SCAN": ("anonymous tracked",),
    "MEMFD": ("r", "r+"),
}
#: Calls on which every fault depends: more of them in the quick part.
HOT = frozenset({"COPY", "CONTINUE", "WRITEPROTECT"})
#: Calls that this workload must have made.
MADE = frozenset(OPS) - {"POISON", "UNREGISTER", "PAGEMAP_SCAN", "PREAD"}


def _cases() -> list[Any]:
    cases = []
    for op, codes in PLAUSIBLE.items():
        for kind in USED_BY.get(op, KINDS):
            for number, code in enumerate(codes):
                for persistent in (False, True):
                    if persistent and (op, code) in ENDS_BY_ITSELF:
                        continue
                    # The quick part: each call, with its first answer, on some kinds.
                    quick = number < (2 if op in HOT else 1) and (
                        kind in ("anonymous tracked", "c", "r+") or op in ("ZEROPAGE", "POISON")
                    )
                    if op not in HOT:
                        quick = quick and not persistent
                    if (op, code, kind) == ("COPY", errno.ESRCH, "c"):
                        quick = True  # the one answer after which nobody should be waiting
                    how = "for good" if persistent else "once"
                    cases.append(
                        pytest.param(
                            op,
                            code,
                            persistent,
                            kind,
                            id=f"{op}-{errno.errorcode[code]}-{how}-{kind}",
                            marks=() if quick else (pytest.mark.slow,),
                        )
                    )
    return cases


@pytest.mark.parametrize(("op", "code", "persistent", "kind"), _cases())
def test_right_bytes_or_a_typed_error(op: str, code: int, persistent: bool, kind: str) -> None:
    start = time.monotonic()
    try:
        result = run_in_child(
            in_child_fail_each_call, op, code, persistent, kind, timeout=60, check=False
        )
    except ChildTimeout as error:
        raise AssertionError(f"a hang: {error}") from None
    last = (result.stdout.strip().splitlines() or ["nothing"])[-1]
    where = f"{last} (after {time.monotonic() - start:.1f} s)\n{result.stderr[-3000:]}"
    if result.returncode == -signal.SIGBUS:
        assert "uffd_vm" in result.stderr, f"death without a word: {where}"
        return
    if (op, persistent, result.returncode) == ("WRITEPROTECT", True, -signal.SIGSEGV):
        return
    assert result.returncode == 0, where
    assert result.value["failed"] > 0 or op not in MADE, where


# --- the serving process dies -----------------------------------------------------------------------


def in_child_kill_the_python_service(step: int) -> str:
    """kill -9 after `step` operations: right bytes from a new process, or PagerDied; never a hang."""
    from uffd_vm.service.python import python_service

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.bin"
        path.write_bytes(DATA)
        outcome = "right"
        with uv.map(path, "r+", service="python", fault_around_bytes=PAGE_SIZE) as region:
            buffer = region.buffer
            content = bytearray(DATA)

            def touch(page: int) -> None:
                got = buffer[page * PAGE_SIZE]
                _let_exceptions_in()
                assert got == content[page * PAGE_SIZE]
                buffer[page * PAGE_SIZE + 1] = 0xEE
                _let_exceptions_in()
                content[page * PAGE_SIZE + 1] = 0xEE

            operations: list[Callable[[], object]] = [
                lambda: touch(0),
                lambda: region.load((PAGE_SIZE, 4 * PAGE_SIZE)),
                lambda: touch(2),
                region.flush,
                region.evict,
                lambda: touch(0),
                lambda: touch(7),
                region.flush,
            ]
            for number, operation in enumerate(operations):
                if number == step:
                    os.kill(python_service().pid, signal.SIGKILL)
                for _ in range(50):
                    try:
                        operation()
                        break
                    except uv.PagerDied:
                        outcome = "PagerDied, then right"
                        python_service()  # a new one, which takes over the regions
                        time.sleep(0.05)
                else:
                    raise AssertionError("never served again")
            region.load()
            got = bytes(buffer)
            assert got == content, next(i for i in range(len(DATA)) if got[i] != content[i])
            buffer.release()
        assert path.read_bytes() == content
        return outcome


@pytest.mark.parametrize("step", range(8))
def test_kill_9_of_the_python_service(step: int) -> None:
    value = run_in_child(in_child_kill_the_python_service, step, timeout=40).value
    assert value in ("right", "PagerDied, then right"), value
