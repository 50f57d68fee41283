"""The regions this process serves: a sorted table from address to region, and each region's entries.

A region's page-table bytes lie in a memfd that the owner maps too: they outlive this process, and
whoever takes over finds them. Beside each byte we keep a version, which every change moves on: what
pte_same() compares. A region is dropped by moving its generation on, so that a handle kept across a
blocking step raises StaleRegionError instead of touching what is no longer ours.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from uffd_vm.fault.fault import Access, Backing, FaultFlag, FaultKind
from uffd_vm.fault.pte import MAPPED, FolioState, PteState
from uffd_vm.page import PAGE_SHIFT, PAGE_SIZE
from uffd_vm.service.fault_service import policy
from uffd_vm.service.fault_service.filemap import PageCache
from uffd_vm.service.trace import ControlBlock

__all__ = ["CACHED", "CACHED_SHIFT", "AddressSpace", "Region"]

_MISSING, _READ = int(FaultKind.MISSING), int(Access.READ)
_MINOR = int(FaultKind.MINOR)
_NONE = int(PteState.NONE)
_NONE_WP = int(PteState.NONE_WP)
_CACHED = int(PteState.CACHED)
_WRITE_PROTECTED = int(PteState.WRITE_PROTECTED)
_EMPTY = frozenset((_NONE, _NONE_WP, _CACHED))
_MAPPED = frozenset(int(state) for state in MAPPED)
_PRESENT, _BUSY = int(PteState.PRESENT), int(PteState.BUSY)
_EVICTING = int(PteState.EVICTING)
_STICKY = frozenset((int(PteState.POISONED), int(PteState.GUARD)))
_ABSENT = frozenset((int(FolioState.ABSENT), int(FolioState.ERROR)))
_FILLING, _DIRTY = int(FolioState.FILLING), int(FolioState.DIRTY)
_WRITEBACK, _EVICTING_FOLIO = int(FolioState.WRITEBACK), int(FolioState.EVICTING)

#: Region.walk() puts FaultFlag.CACHED here, above the PteState.
CACHED_SHIFT = 8
CACHED = int(FaultFlag.CACHED) << CACHED_SHIFT


@dataclass(slots=True, eq=False)
class Region:
    """A vm_area_struct: [start, end) bytes, `pgoff` the page of the cache that its first page is."""

    handle: int
    start: int
    nr_pages: int
    pgoff: int
    backing: int
    flags: int  # FaultFlag of every fault here
    writable: bool
    fault_around_pages: int
    readahead_pages: int
    deadline_ns: int
    control: ControlBlock
    cache: PageCache | None = None
    page_mkwrite: Callable[[int, int], str] | None = None

    generation: int = 0
    closing: bool = False
    readers: int = 0  # VmaLocked tokens alive
    locked: set[int] = field(default_factory=set)  # pages whose PteLocked token is alive
    readahead_next: int = -1  # where a sequential reader would fault next
    readahead_window: int = 0
    neighbour_commit: int = field(init=False)  # what the policy would do for a reader of one
    shared: bool = field(init=False)  # COPY into this mapping fills the page cache
    private_pages: bool = field(init=False)  # content lives in private copies, not in the cache
    announced: set[int] = field(default_factory=set)  # pages of the table that were written to
    ptes: memoryview = field(init=False)
    versions: memoryview = field(init=False)

    def __post_init__(self) -> None:
        self.ptes = self.control.ptes
        self.shared = self.backing == Backing.SHARED_FILE
        self.private_pages = self.backing == Backing.PRIVATE_FILE and bool(
            self.flags & FaultFlag.TRACKED
        )
        around = policy.decide(_MISSING, _READ, self.backing, _NONE, self.flags)
        self.neighbour_commit = policy.COMMIT[around]
        # Anonymous memory: takes room only for pages that were touched.
        self.versions = memoryview(mmap.mmap(-1, 4 * self.nr_pages)).cast("I")

    @property
    def end(self) -> int:
        return self.start + (self.nr_pages << PAGE_SHIFT)

    def address(self, index: int) -> int:
        return self.start + (index << PAGE_SHIFT)

    def walk(self, index: int, kind: int) -> int:
        """The page's state as this kind of fault proves it, and FaultFlag.CACHED, shifted by CACHED_SHIFT.

        The kernel's truth wins over our byte: MISSING proves that nothing is mapped here and, over a
        memfd, that nothing was in the cache; MINOR that the entry is empty and the cache has the page;
        WP that the page is mapped write-protected. So the entry is joined with the folio.
        """
        pte = self.ptes[index]
        cache = self.cache
        if cache is None or pte in _STICKY:
            return pte
        if self.private_pages:
            return _BUSY if cache.is_being_read(self.pgoff + index) else pte
        folio = cache.state(self.pgoff + index)
        if kind == _MINOR and (folio in _ABSENT or folio == _FILLING):
            folio = cache.adopt(self.pgoff + index)
        if folio in _ABSENT:
            return _NONE
        if folio == _FILLING:
            return _BUSY if cache.is_being_read(self.pgoff + index) else _NONE
        if folio == _EVICTING_FOLIO:
            return _BUSY
        if kind == _MISSING:
            return _NONE | CACHED
        if kind == _MINOR:
            return _CACHED | CACHED
        if folio == _WRITEBACK:
            return _EVICTING | CACHED
        if folio == _DIRTY and pte == _PRESENT:
            return _PRESENT | CACHED
        return _WRITE_PROTECTED | CACHED

    def set_ptes(self, index: int, nr_pages: int, to: int) -> None:
        """Publishes [index, index + nr_pages). What was claimed by somebody else stays as it is."""
        ptes, versions = self.ptes, self.versions
        gained = 0
        for i in range(index, index + nr_pages):
            gained += (to in _MAPPED) - (ptes[i] in _MAPPED)
            ptes[i] = to
            versions[i] = (versions[i] + 1) & 0xFFFFFFFF
        if gained:
            self.control.add_present(gained)

    def announce(self, index: int, nr_pages: int) -> None:
        """Pages are about to come in. A forked child finds what came, and was not published yet, by the
        parts of the table that were ever written: so they are, before the memory is."""
        for part in range(index // PAGE_SIZE, (index + nr_pages - 1) // PAGE_SIZE + 1):
            if part not in self.announced:
                self.announced.add(part)
                self.ptes[part * PAGE_SIZE] = self.ptes[part * PAGE_SIZE]

    def unmap_folios(self, index: int, nr_pages: int) -> None:
        """The memfd has lost these folios, and the kernel every mapping of them. Write protection
        stays behind as a marker."""
        first = max(index - self.pgoff, 0)
        end = min(index + nr_pages - self.pgoff, self.nr_pages)
        for i in range(first, end):
            pte = self.ptes[i]
            if pte in _MAPPED or pte == _CACHED:
                self.set_ptes(i, 1, _NONE_WP if pte == _WRITE_PROTECTED else _NONE)

    def empty_run(self, index: int, first: int, end: int) -> tuple[int, int]:
        """The widest [a, b) around index within [first, end) of pages that are in nobody's way."""
        ptes, empty = self.ptes, _EMPTY
        a = index
        while a > first and ptes[a - 1] in empty:
            a -= 1
        b = index + 1
        while b < end and ptes[b] in empty:
            b += 1
        return a, b

    def absent_run(self, index: int, limit: int) -> tuple[int, int]:
        """[first, end) around index, within its aligned block of `limit` pages, of pages that are in
        nobody's table and whose folios are absent: what one read may bring and one COPY install."""
        cache = self.cache
        assert cache is not None
        block = index - index % limit
        lowest = max(block, 0)
        highest = min(block + limit, self.nr_pages, cache.nr_pages - self.pgoff)
        ptes, pgoff = self.ptes, self.pgoff
        first = end = index
        while first > lowest and ptes[first - 1] in _EMPTY and cache.absent(pgoff + first - 1):
            first -= 1
        end = index + 1
        while end < highest and ptes[end] in _EMPTY and cache.absent(pgoff + end):
            end += 1
        return first, end

    def close(self) -> None:
        self.control.close()
        self.versions.release()


class AddressSpace:
    """The mm: regions by address and by handle. Its owner is another process; `uffd` reaches it."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._by_start: dict[int, Region] = {}
        self._by_handle: dict[int, Region] = {}
        self._last: Region | None = None

    def __len__(self) -> int:
        return len(self._by_handle)

    def __iter__(self) -> Iterator[Region]:
        return iter(list(self._by_handle.values()))

    def insert(self, region: Region) -> None:
        if region.start % PAGE_SIZE or region.nr_pages <= 0:
            raise ValueError(f"region {region.handle:#x}: not a range of pages")
        if region.handle in self._by_handle or any(
            r.start < region.end and region.start < r.end for r in self
        ):
            raise ValueError(f"region {region.handle:#x}: the range is taken")
        insort(self._starts, region.start)
        self._by_start[region.start] = region
        self._by_handle[region.handle] = region

    def find(self, address: int) -> Region | None:
        """The region that covers the address. The last one found is looked at first."""
        region = self._last
        if region is not None and region.start <= address < region.end:
            return region
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        region = self._by_start[self._starts[at]]
        if address >= region.end:
            return None
        self._last = region
        return region

    def get(self, handle: int) -> Region | None:
        return self._by_handle.get(handle)

    def drop(self, region: Region) -> None:
        """Takes the region out of the table and makes every handle of it stale."""
        region.closing = True
        region.generation += 1
        self._starts.remove(region.start)
        del self._by_start[region.start]
        del self._by_handle[region.handle]
        self._last = None
