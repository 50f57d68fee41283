"""Numbers a region publishes, decoded: counters, fault latency, residency, and the trace ring.

The executor (a native thread, or the service process) writes `struct uvm_region_ctl` and never waits;
readers copy it without a lock. So numbers may be of slightly different instants, a trace record that
was torn by its writer is left out, and everything handed to users is frozen.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING

from uffd_vm.fault.action import Action, Commit, Counter, Settlement
from uffd_vm.fault.fault import (
    VM_FAULT_ERROR,
    Access,
    Backing,
    FaultFlag,
    FaultKind,
    FaultResult,
    describe,
)
from uffd_vm.fault.pte import MAPPED, PteState
from uffd_vm.page import nr_pages

if TYPE_CHECKING:
    from uffd_vm.fault.explain import Walk
    from uffd_vm.mm.ranges import RangeArgument

__all__ = ["Latency", "Residency", "Stats", "TraceRecord", "bucket", "bucket_bounds"]

LATENCY_BUCKETS = 512


def bucket(ns: int) -> int:
    """Histogram bucket of a latency in nanoseconds: exact below 8, then eight buckets an octave.

    The twin of uvm_latency_bucket() in native/: a test compares the two.
    """
    if ns < 8:
        return ns
    e = ns.bit_length() - 1
    return min((e - 2) * 8 + ((ns >> (e - 3)) & 7), LATENCY_BUCKETS - 1)


def bucket_bounds(index: int) -> tuple[int, int]:
    """Half-open [low, high) nanoseconds that fall into bucket `index`."""
    if index < 8:
        return index, index + 1
    e, sub = index // 8 + 2, index % 8
    return (8 + sub) << (e - 3), (9 + sub) << (e - 3)


@dataclasses.dataclass(frozen=True)
class Latency:
    """Distribution of fault latencies (message read until the thread was woken), nanoseconds."""

    counts: tuple[int, ...] = (0,) * LATENCY_BUCKETS

    @property
    def count(self) -> int:
        return sum(self.counts)

    def quantile(self, q: float) -> int:
        """Upper bound (ns) of the bucket that holds the q-quantile, so never flattering by more than
        an eighth; 0 when nothing was measured."""
        total = self.count
        if total == 0:
            return 0
        rank, seen = max(1, -int(-q * total // 1)), 0
        for index, n in enumerate(self.counts):
            seen += n
            if seen >= rank:
                return bucket_bounds(index)[1] - 1
        raise AssertionError("ranks end at the total")

    @property
    def p50(self) -> int:
        return self.quantile(0.5)

    @property
    def p99(self) -> int:
        return self.quantile(0.99)

    @property
    def max(self) -> int:
        return self.quantile(1.0)

    def __repr__(self) -> str:
        return f"Latency(count={self.count}, p50={self.p50}, p99={self.p99}, max={self.max})  # ns"


@dataclasses.dataclass(frozen=True)
class Stats(Mapping[str, int]):
    """Counters of one region since it was made, by /proc/vmstat-like names: ``stats["pgfault"]``.

    `latency` is of the faults counted. Counters of a region served by the kernel itself
    (`service == "kernel"`) are not visible to us, and are left out rather than shown as 0.
    """

    counters: Mapping[str, int]
    latency: Latency = Latency()

    def __getitem__(self, name: str) -> int:
        return self.counters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.counters)

    def __len__(self) -> int:
        return len(self.counters)

    def __str__(self) -> str:
        lines = [f"{name:<24} {value}" for name, value in self.counters.items() if value]
        lat = self.latency
        lines.append(
            f"fault latency            p50 {lat.p50 / 1e3:.1f} us, p99 {lat.p99 / 1e3:.1f} us, "
            f"max {lat.max / 1e3:.1f} us ({lat.count} faults)"
        )
        return "\n".join(lines)


def decode_counters(values: list[int]) -> Mapping[str, int]:
    """Names for the counter words of struct uvm_region_ctl, in the order of `Counter`."""
    return MappingProxyType({c.name: values[c.value] for c in Counter})


@dataclasses.dataclass(frozen=True, slots=True)
class TraceRecord:
    """One fault, resolved or failed, in the kernel's words. Times in nanoseconds (CLOCK_MONOTONIC).

    `index` is the page in the region, `nr_pages` what was committed for this fault (fault-around
    included), `latency_ns` from reading the message until the thread was woken, `next_pte` None where
    the decision leaves the page to another handler.
    """

    seq: int
    t_ns: int
    index: int
    tid: int
    latency_ns: int
    result: FaultResult
    err: int
    nr_pages: int
    flags: FaultFlag
    kind: FaultKind
    access: Access
    backing: Backing
    pte: PteState
    row: int
    action: Action
    commit: Commit
    next_pte: PteState | None
    settlement: Settlement
    tries: int

    @property
    def walk(self) -> Walk:
        """The decision, explained: functions, conditions, row and order of work. `print()` it."""
        from uffd_vm.fault import explain

        return explain.walk(self)

    @property
    def steps(self) -> tuple[str, ...]:
        """The functions of mm/memory.c that this fault went through, in order. One that waits (RETRY), or
        failed, did not come to finish_fault()."""
        from uffd_vm.fault import explain

        steps = explain.explain(self)
        if self.result & (FaultResult.RETRY | VM_FAULT_ERROR) and steps[-1] == "finish_fault":
            return steps[:-1]
        return steps

    def __str__(self) -> str:
        return (
            f"#{self.seq} page {self.index} tid {self.tid}: {self.kind.name} {self.access.name} of "
            f"{self.backing.name} {self.pte.name} -> {self._after} [{describe(self.result)}] "
            f"{self.latency_ns / 1e3:.1f} us, {self.nr_pages} page{'' if self.nr_pages == 1 else 's'}: "
            f"{' > '.join(self.steps)}"
        )

    @property
    def _after(self) -> str:
        """What the page was when this ended, which is what was decided unless that could not be done."""
        if self.settlement is Settlement.POISON:
            return PteState.POISONED.name
        if (
            self.next_pte is None
            or self.result & FaultResult.RETRY
            or self.settlement is Settlement.DENY
        ):
            return "as it was"
        return self.next_pte.name


RECORD = struct.Struct("<QQQIIIiIH10B")  # struct uvm_trace_record
TRACE_RECORDS = 1024
_IN_FLIGHT = 64  # records that executors may be writing while we copy


def decode_trace(ring: bytes, head_before: int, head_after: int) -> list[TraceRecord]:
    """The whole records of a copied ring, oldest first.

    `head_before` and `head_after` are trace_head read before and after the copy: what was, or may
    have been, written meanwhile is left out, as are torn records (their seq is 0 while written).
    """
    records = []
    oldest = head_after + _IN_FLIGHT - TRACE_RECORDS if head_after > head_before else 0
    for fields in RECORD.iter_unpack(ring):
        (seq, t_ns, index, tid, latency_ns, result, err, nr_pages, flags) = fields[:9]
        (kind, access, backing, pte, row, action, commit, next_pte, settlement, tries) = fields[9:]
        if seq == 0 or seq > head_before or seq <= oldest:
            continue
        records.append(
            TraceRecord(
                seq=seq,
                t_ns=t_ns,
                index=index,
                tid=tid,
                latency_ns=latency_ns,
                result=FaultResult(result),
                err=err,
                nr_pages=nr_pages,
                flags=FaultFlag(flags),
                kind=FaultKind(kind),
                access=Access(access),
                backing=Backing(backing),
                pte=PteState(pte),
                row=row,
                action=Action(action),
                commit=Commit(commit),
                next_pte=None if next_pte == 0xFF else PteState(next_pte),
                settlement=Settlement(settlement),
                tries=tries,
            )
        )
    records.sort(key=lambda record: record.seq)
    return records


#: By PteState, 1: the kernel maps something there, or will without a fault of ours.
_PRESENT = bytes(state in {*MAPPED, PteState.CACHED} for state in range(256))


@dataclasses.dataclass(frozen=True)
class Residency:
    """Where the bytes of a region are, at one instant. Sizes in bytes, rounded up to whole pages.

    mapped_bytes    in this process's page table, so that touching them costs nothing
    resident_bytes  that take memory for this region's range: cached in the memfd, and private pages
    dirty_bytes     changed and not yet written back ("r+"), or private and so only here ("c")
    cache_bytes     held by the whole page cache, which other regions may share; 0 if there is none
    cache_cap_bytes most it may hold
    """

    nbytes: int
    page_size: int
    mapped_bytes: int
    resident_bytes: int
    dirty_bytes: int
    cache_bytes: int
    cache_cap_bytes: int
    _walk: Callable[[int, int], bytes] = dataclasses.field(repr=False, compare=False)

    @property
    def fraction(self) -> float:
        """Resident part of the region, 0.0 to 1.0."""
        return min(1.0, self.resident_bytes / self.nbytes)

    def pages(self, range: RangeArgument = None) -> bytes:
        """One `PteState` byte a page, as the next fault would find it. Asked for now, not frozen.

        Raises RegionClosedError once the region is closed.
        """
        from uffd_vm.mm.ranges import page_span

        return self._walk(*page_span(range, self.nbytes))

    def heatmap(self, bins: int = 64) -> tuple[float, ...]:
        """Present fraction (0.0 to 1.0) of `bins` equal parts of the region; fewer bins if it has fewer
        pages. Reads one byte a page of the shadow page table, a part at a time."""
        pages = nr_pages(self.nbytes)
        bins = max(1, min(bins, pages))
        edges = [pages * i // bins for i in range(bins + 1)]
        return tuple(self._fraction(a, b) for a, b in pairwise(edges))

    def _fraction(self, start: int, end: int) -> float:
        step, present = 1 << 20, 0
        for index in range(start, end, step):
            present += self._walk(index, min(step, end - index)).translate(_PRESENT).count(1)
        return present / (end - start)

    def __str__(self) -> str:
        text = (
            f"{human_size(self.resident_bytes)} of {human_size(self.nbytes)} resident, "
            f"{human_size(self.mapped_bytes)} mapped, {human_size(self.dirty_bytes)} dirty"
        )
        if self.cache_cap_bytes:
            text += f"; cache {human_size(self.cache_bytes)} of at most {human_size(self.cache_cap_bytes)}"
        return text


def human_size(nbytes: float) -> str:
    """Bytes for people: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
