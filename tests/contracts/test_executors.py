"""The executor contract: the same stream of touches gives the same bytes, page states, counters and
decisions, whoever serves it.

A stream is a function that touches one region in one thread, so that the order of faults is given. It
runs with each service over each kind of region, as this user and as an unprivileged one, in a child of
its own; what it saw is compared with what a plain model says and with the native service.

The documented differences are data: `ALLOWED`, each with its reason. Read-ahead is off here, because
when it comes is not part of the contract.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import mmap
import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support import run_in_child, wait_until
from uffd_vm.kernel import features
from uffd_vm.page import PAGE_SIZE

pytestmark = pytest.mark.requires()

NR_PAGES = 96
FILE_BYTES = NR_PAGES * PAGE_SIZE - 1000  # a partial last page
NOBODY = 65534
SERVICES = ("native", "python", "inline")

#: kind -> (mode or None for anonymous memory, track)
KINDS: dict[str, tuple[str | None, bool]] = {
    "anonymous": (None, False),
    "anonymous tracked": (None, True),
    "r": ("r", False),
    "c": ("c", False),
    "c tracked": ("c", True),
    "r+": ("r+", True),
}


@dataclass(frozen=True)
class Difference:
    """What a service may do otherwise: in which part of a Seen, in which streams, and why."""

    service: str
    part: str
    what: frozenset[str]
    why: str
    streams: frozenset[str] = frozenset()
    """Empty: in all."""


_EVICTING = frozenset({"evict_then_read", "write_evict_then_read"})

_BY_TURNS = (
    "which page has to go at the cap, and how far a window shrinks below it, is the executor's affair: "
    "the native one halves windows at small caps and writes back ahead. Bytes and the cap itself are not"
)

ALLOWED: tuple[Difference, ...] = (
    Difference(
        "python",
        "entries",
        frozenset({"*"}),
        "a page that left the cache is NONE by its folio; the native service leaves the stale entry "
        "behind (other processes' tables are out of its reach too), this one clears it. What a fault "
        "would find, `states`, is the same",
        _EVICTING,
    ),
    Difference(
        "python",
        "counters",
        frozenset({"writeback", "bytes_written"}),
        "natively the region that asks for write-back counts it, here the first one of the cache",
        frozenset({"two_regions"}),
    ),
    *(
        Difference(service, part, frozenset({"*"}), _BY_TURNS, frozenset({"under_a_cap"}))
        for service in ("python", "inline")
        for part in ("states", "entries", "resident", "counters", "decisions")
    ),
)


# --- streams ----------------------------------------------------------------------------------------


class Touched:
    """A region, what it should hold (`model`), and touches that check it."""

    def __init__(
        self,
        region: Any,
        path: Path | None,
        mode: str | None,
        track: bool,
        again: Callable[[], Any],
    ) -> None:
        self.region, self.path, self.mode, self.track = region, path, mode, track
        self.again = again  # makes another region like it
        self.model = bytearray(path.read_bytes() if path else bytes(region.nbytes))
        self.buffer = region.buffer

    @property
    def writable(self) -> bool:
        return self.mode != "r"

    def rest(self) -> None:
        """The ioctl that wakes us comes before the executor's own book-keeping: waits for that."""
        _settled(self.region)

    def read(self, page: int, offset: int = 0) -> None:
        at = page * PAGE_SIZE + offset
        assert self.buffer[at] == self.model[at], f"page {page}: {self.buffer[at]:#x}"

    def write(self, page: int, offset: int = 8, value: int | None = None) -> None:
        at = page * PAGE_SIZE + offset
        value = (page * 7 + offset + 1) & 0xFF if value is None else value
        self.model[at] = value
        self.buffer[at] = value


PAGES = range(NR_PAGES)
SHUFFLED = random.Random(5).sample(PAGES, NR_PAGES)


def read_in_order(t: Touched) -> None:
    for page in PAGES:
        t.read(page)


def read_in_any_order(t: Touched) -> None:
    for page in SHUFFLED[:40]:
        t.read(page, 5)


def read_backwards(t: Touched) -> None:
    for page in reversed(PAGES):
        t.read(page)


def write_in_order(t: Touched) -> None:
    for page in PAGES:
        t.write(page)


def write_in_any_order(t: Touched) -> None:
    for page in SHUFFLED[:40]:
        t.write(page)


def read_then_write(t: Touched) -> None:
    for page in SHUFFLED[:40]:
        t.read(page)
        t.write(page)
        t.read(page, 9)


def read_all_then_write(t: Touched) -> None:
    for page in PAGES:
        t.read(page)
    for page in SHUFFLED[:40]:
        t.write(page)


def write_then_read_all(t: Touched) -> None:
    for page in SHUFFLED[:30]:
        t.write(page)
    for page in PAGES:
        t.read(page)


def last_page(t: Touched) -> None:
    t.read(NR_PAGES - 1)
    tail = ctypes.string_at(
        t.region.address + t.region.nbytes, PAGE_SIZE - t.region.nbytes % PAGE_SIZE
    )
    assert not any(tail), "behind the end there are zeros"
    if t.writable:
        t.write(NR_PAGES - 1)


def load_then_touch(t: Touched) -> None:
    t.region.load((10 * PAGE_SIZE, 50 * PAGE_SIZE))
    for page in range(5, 55):
        t.read(page)
    if t.writable:
        for page in range(5, 55, 3):
            t.write(page)


def prefetch_then_touch(t: Touched) -> None:
    t.region.prefetch((16 * PAGE_SIZE, 48 * PAGE_SIZE))
    wait_until(lambda: t.region.residency().resident_bytes >= 32 * PAGE_SIZE, "prefetched")
    for page in range(16, 48):
        t.read(page)


def evict_then_read(t: Touched) -> None:
    for page in range(40):
        t.read(page)
    t.rest()
    t.region.evict()
    for page in range(20, 60):
        t.read(page)


def write_evict_then_read(t: Touched) -> None:
    for page in range(40):
        t.write(page)
    t.rest()
    t.region.flush()
    t.region.evict()
    for page in range(20, 60):
        t.read(page)
    for page in range(0, 40, 5):
        t.write(page, 100)


def flush_then_write_again(t: Touched) -> None:
    for page in range(0, 40, 2):
        t.write(page)
    t.rest()
    t.region.flush()
    if t.mode == "r+":
        assert t.path and t.path.read_bytes() == t.model
    for page in range(0, 40, 3):
        t.write(page, 50)


def protect_then_write(t: Touched) -> None:
    for page in range(20):
        t.read(page)
    for page in range(20, 40):
        t.write(page)
    t.rest()
    if t.track:
        t.region.protect()
        assert t.region.dirty() == []
    for page in range(10, 30):
        t.write(page, 60)
    if t.track:
        assert t.region.dirty() == [(10 * PAGE_SIZE, 30 * PAGE_SIZE)]


def two_regions(t: Touched) -> None:
    """The second region maps the same file: what one fills the other finds, in "r+" also what it stores."""
    if t.path is None:
        return
    with t.again() as other, other.buffer as beside:
        for page in range(0, 60, 2):
            t.read(page)
        for page in range(30):
            before = beside[page * PAGE_SIZE]
            assert before == t.model[page * PAGE_SIZE] or t.mode == "c"
        if t.writable:
            for page in range(0, 60, 3):
                t.write(page, 70)
            for page in range(0, 60, 3):
                assert (beside[page * PAGE_SIZE + 70] == t.model[page * PAGE_SIZE + 70]) == (
                    t.mode == "r+"
                )
        t.rest()


def under_a_cap(t: Touched) -> None:
    for page in PAGES:
        t.read(page)
        if t.writable and page % 5 == 0:
            t.write(page, 80)
    for page in SHUFFLED[:50]:
        t.read(page, 80)
    if t.path:
        residency = t.region.residency()
        assert residency.cache_bytes <= residency.cache_cap_bytes == 32 * PAGE_SIZE


#: Of uv.map(), for regions of files.
OPTIONS: dict[str, dict[str, Any]] = {"under_a_cap": {"cap": 32 * PAGE_SIZE}}

READING: tuple[Callable[[Touched], None], ...] = (
    read_in_order,
    read_in_any_order,
    read_backwards,
    last_page,
    load_then_touch,
    prefetch_then_touch,
    evict_then_read,
    two_regions,
    under_a_cap,
)
WRITING: tuple[Callable[[Touched], None], ...] = (
    write_in_order,
    write_in_any_order,
    read_then_write,
    read_all_then_write,
    write_then_read_all,
    write_evict_then_read,
    flush_then_write_again,
    protect_then_write,
)


UNPRIVILEGED = (read_in_any_order, load_then_touch, write_evict_then_read, protect_then_write)


def streams_of(kind: str, *, unprivileged: bool = False) -> tuple[Callable[[Touched], None], ...]:
    if unprivileged:
        return UNPRIVILEGED
    return READING if kind == "r" else READING + WRITING


# --- what was seen ----------------------------------------------------------------------------------


@dataclass
class Seen:
    """What one stream did to one region, in plain data."""

    content: str = ""  # hash of all bytes afterwards
    file: str = ""
    states: list[str] = field(default_factory=list)
    entries: list[str] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    decisions: list[tuple[Any, ...]] = field(default_factory=list)
    resident: int = 0
    error: str = ""


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _settled(region: Any) -> dict[str, int]:
    """Counters at rest: the ioctl that wakes the toucher comes before the counting."""
    from uffd_vm.testing.invariants import check_all

    def at_rest() -> bool:
        first = dict(region.stats())
        return (
            first["pgfault"] == first["pgmajfault"] + first["pgminfault"] + first["pgfault_failed"]
            and len([r for r in region.trace() if not _is_retry(r)]) == first["pgfault"]
            and first == dict(region.stats())
        )

    wait_until(at_rest, f"counters at rest: {dict(region.stats())}")
    check_all(region)
    return {name: n for name, n in region.stats().items() if n}


def _is_retry(record: Any) -> bool:
    from uffd_vm.fault.fault import FaultResult

    return bool(record.result & FaultResult.RETRY)


def _decision(record: Any) -> tuple[Any, ...]:
    from uffd_vm.fault.fault import FaultFlag

    return (
        record.index,
        record.kind.name,
        record.access.name,
        record.backing.name,
        record.pte.name,
        str(record.flags & ~FaultFlag(0)),
        record.row,
        record.action.name,
        record.commit.name,
        record.next_pte and record.next_pte.name,
        str(record.result),
        record.err,
        record.nr_pages,
    )


def _inside_one_page_table(make: Callable[[], Any]) -> Any:
    """Windows end where 2 MiB of address space do, so a region that crosses such a border would show
    where it happens to lie. Pushed away from it by plain mappings, which stay."""
    while True:
        region = make()
        behind = (region.address + NR_PAGES * PAGE_SIZE) % (2 << 20)
        if behind == 0 or behind >= NR_PAGES * PAGE_SIZE:
            return region
        region.close()
        _fillers.append(mmap.mmap(-1, behind, prot=mmap.PROT_READ))


_fillers: list[mmap.mmap] = []


def _run_stream(
    stream: Callable[[Touched], None], service: str, kind: str, around: int, directory: Path
) -> Seen:
    import uffd_vm as uv
    from uffd_vm.fault.pte import PteState
    from uffd_vm.testing.invariants import check_all
    from uffd_vm.testing.strategies import pattern

    mode, track = KINDS[kind]
    path = directory / f"{stream.__name__}-{around}.bin" if mode else None
    options: dict[str, Any] = {
        "service": service,
        "fault_around_bytes": around * PAGE_SIZE,
        "track": track,
    }
    if path:
        options |= OPTIONS.get(stream.__name__, {})
        path.write_bytes(pattern(FILE_BYTES, 3))
        path.read_bytes()  # in the kernel's page cache: nobody has to wait for a disk

    def make() -> Any:
        if path:
            return uv.map(path, mode, readahead_bytes=0, **options)
        return uv.anonymous(FILE_BYTES, **options)

    seen = Seen()
    with _inside_one_page_table(make) as region:
        t = Touched(region, path, mode, track, make)
        stream(t)
        seen.counters = _settled(region)
        ops = region._ops
        seen.states = [PteState(b).name for b in ops.walk(0, NR_PAGES)]
        seen.entries = [PteState(b).name for b in ops.ptes(0, NR_PAGES)]
        seen.decisions = [_decision(r) for r in region.trace() if not _is_retry(r)]
        seen.resident = region.residency().resident_bytes // PAGE_SIZE
        content = bytes(t.buffer)
        assert content == t.model, "memory is not what was stored"
        seen.content = _hash(content)
        check_all(region)
        t.buffer.release()
    if path:
        seen.file = _hash(path.read_bytes())
        original = pattern(FILE_BYTES, 3)
        expected = t.model if mode == "r+" else original
        assert path.read_bytes() == expected, "the file is not what it should be"
    return seen


CAP_DAC_READ_SEARCH = 2


def become_nobody() -> None:
    """An unprivileged user, who may do nothing but read files: the interpreter may be in somebody's home."""
    libc = ctypes.CDLL(None, use_errno=True)

    def must(rc: int, what: str) -> None:
        assert rc == 0, f"{what}: {os.strerror(ctypes.get_errno())}"

    os.setgroups([])
    os.setgid(NOBODY)
    must(libc.prctl(8, 1, 0, 0, 0), "PR_SET_KEEPCAPS")
    os.setuid(NOBODY)
    cap = 1 << CAP_DAC_READ_SEARCH
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)(cap, cap, cap, 0, 0, 0)
    must(libc.capset(header, data), "capset")
    must(libc.prctl(47, 2, CAP_DAC_READ_SEARCH, 0, 0), "PR_CAP_AMBIENT_RAISE")
    # As after exec by that user: else /proc/self/pagemap belongs to root.
    must(libc.prctl(4, 1, 0, 0, 0), "PR_SET_DUMPABLE")
    assert os.geteuid() == NOBODY


def in_child_run_streams(service: str, kind: str, unprivileged: bool) -> dict[str, Seen] | str:
    if unprivileged:
        become_nobody()
        if not features.probe().way:
            return "USER_MODE_ONLY is refused here"
    found: dict[str, Seen] = {}
    with tempfile.TemporaryDirectory() as directory:
        for stream in streams_of(kind, unprivileged=unprivileged):
            for around in (1, 16):
                name = f"{stream.__name__}/{around}"
                try:
                    found[name] = _run_stream(stream, service, kind, around, Path(directory))
                except Exception as error:
                    found[name] = Seen(error=f"{type(error).__name__}: {error}")
    return {name: vars(seen) for name, seen in found.items()}  # type: ignore[misc]


@functools.cache
def seen_by(service: str, kind: str, unprivileged: bool) -> dict[str, Seen] | str:
    env = {"UFFD_VM_USER_MODE_ONLY": "1"} if unprivileged else {}
    value = run_in_child(
        in_child_run_streams, service, kind, unprivileged, timeout=60, env=env
    ).value
    return value if isinstance(value, str) else {name: Seen(**raw) for name, raw in value.items()}


def _all_streams() -> list[Any]:
    return [
        pytest.param(kind, f"{stream.__name__}/{around}", id=f"{kind}-{stream.__name__}-{around}")
        for kind in KINDS
        for stream in streams_of(kind)
        for around in (1, 16)
    ]


def compare(service: str, stream: str, seen: Seen, native: Seen) -> None:
    """Equal, but for what ALLOWED says."""
    for part in ("content", "file", "states", "entries", "resident", "counters", "decisions"):
        mine, theirs = getattr(seen, part), getattr(native, part)
        excused = [
            d
            for d in ALLOWED
            if d.service == service
            and d.part == part
            and (not d.streams or stream.split("/")[0] in d.streams)
        ]
        names = frozenset().union(*(d.what for d in excused))
        if "*" in names:
            continue
        if isinstance(mine, dict):
            mine = {k: v for k, v in mine.items() if k not in names}
            theirs = {k: v for k, v in theirs.items() if k not in names}
        assert mine == theirs, f"{part}: {service} is not as native"


def _check(service: str, kind: str, stream: str, unprivileged: bool) -> None:
    mine = seen_by(service, kind, unprivileged)
    native = seen_by("native", kind, False)
    if isinstance(mine, str):
        pytest.skip(mine)
    assert isinstance(native, dict)
    assert not mine[stream].error, mine[stream].error
    assert not native[stream].error, native[stream].error
    compare(service, stream, mine[stream], native[stream])


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize(("kind", "stream"), _all_streams())
def test_executors_agree(service: str, kind: str, stream: str) -> None:
    _check(service, kind, stream, unprivileged=False)


@pytest.mark.root
@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("kind", ["anonymous tracked", "c", "r+"])
def test_executors_agree_without_privilege(service: str, kind: str) -> None:
    for stream in streams_of(kind, unprivileged=True):
        for around in (1, 16):
            _check(service, kind, f"{stream.__name__}/{around}", unprivileged=True)


# --- failures ---------------------------------------------------------------------------------------

#: What becomes of the file -> the error that every executor raises of a page that it has not read yet.
CAUSES: dict[str, tuple[Callable[[Path], None], str, int]] = {
    "cut short": (lambda path: os.truncate(path, 5 * PAGE_SIZE), "SourceChanged", errno.ENODATA),
    "cut to nothing": (lambda path: os.truncate(path, 0), "SourceChanged", errno.ENODATA),
    "grown": (lambda path: os.truncate(path, 2 * FILE_BYTES), "SourceChanged", errno.ESTALE),
    "written to": (lambda path: os.utime(path, ns=(1, 1)), "SourceChanged", errno.ESTALE),
}


def _failure(call: Callable[[], object]) -> dict[str, Any]:
    """What a call raised; the exception of a touch comes a few calls behind it."""
    import uffd_vm as uv

    try:
        call()
        for _ in range(20):
            _nothing()
    except uv.UffdVmError as error:
        found = {"type": type(error).__name__, "errno": getattr(error, "errno", None)}
        return found | {"index": getattr(error, "index", None), "region": str(error.region)}
    return {"type": "nothing was raised"}


def _nothing() -> None:
    pass


def in_child_fail(service: str, kind: str) -> dict[str, list[Any]]:
    """For each cause: what load(), a read and (where it is possible) a store of a missing page raise,
    and how their faults were decided."""
    import uffd_vm as uv
    from uffd_vm.fault.pte import PteState
    from uffd_vm.testing.invariants import check_all
    from uffd_vm.testing.strategies import pattern

    mode, track = KINDS[kind]
    data = pattern(FILE_BYTES, 4)
    found: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for cause, (spoil, _, _) in CAUSES.items():
            path = Path(directory) / f"{cause}.bin"
            path.write_bytes(data)
            mtime = path.stat().st_mtime_ns
            region = uv.map(
                path,
                mode,
                service=service,
                track=track,
                fault_around_bytes=PAGE_SIZE,
                readahead_bytes=0,
            )
            with region:
                buffer = region.buffer
                assert buffer[0] == data[0]
                spoil(path)
                seen = found[cause] = []
                seen.append(_failure(lambda r=region: r.load((20 * PAGE_SIZE, 21 * PAGE_SIZE))))
                seen.append(_failure(lambda b=buffer: b[30 * PAGE_SIZE]))
                if mode != "r":
                    seen.append(_failure(lambda b=buffer: b.__setitem__(31 * PAGE_SIZE, 1)))
                assert buffer[0] == data[0], "what had come stays"
                path.write_bytes(data)
                os.utime(path, ns=(mtime, mtime))
                assert bytes(buffer) == data, "the next touch tries again"
                check_all(region)
                failed = [r for r in region.trace() if r.err and not _is_retry(r)]
                # The kernel takes a poisoned page for a missing one once more before it lets the thread
                # sleep: natively, where another thread poisons meanwhile, such a fault is seen.
                twice = [r for r in failed if r.pte is PteState.POISONED]
                seen.append([_decision(r) for r in failed if r not in twice])
                seen.append(region.stats()["pgfault_failed"] - len(twice))
                buffer.release()
            assert path.read_bytes() == data
    return found


@functools.cache
def failures_of(service: str, kind: str) -> dict[str, list[Any]]:
    value = run_in_child(in_child_fail, service, kind, timeout=60).value
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("kind", ["r", "c", "c tracked", "r+"])
def test_executors_fail_alike(service: str, kind: str, cause: str) -> None:
    *raised, decisions, nr_failed = failures_of(service, kind)[cause]
    _, name, code = CAUSES[cause]
    where = {"region": f"{cause}.bin"}
    for number, seen in enumerate(raised):
        index = (20, 30, 31)[number]
        assert seen == {"type": name, "errno": code, "index": index} | where
    nr_touches = len(raised) - 1  # load() is no fault
    assert nr_failed == nr_touches
    assert decisions == failures_of("native", kind)[cause][-2]
    assert [d[0] for d in decisions] == [30, 31][:nr_touches]
