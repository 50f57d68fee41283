"""The mm: everything the fault path needs at hand, the faults that wait, and work done without a fault.

One object per process of ours, one owner's memory. A parked fault is known by who faulted and where,
so that the copies of its message that a signal makes (thousands a second) cost one look-up; each is
restarted from the top when its event has happened, or when its deadline has passed.

A fault that brought no page wakes its thread, which faults again, and most often finds the page then.
Where it never does, each of these faults is young. So they are one chain, with the deadline of the first.
And so are faults that did bring their pages, where these were taken away again before the instruction that
needs several of them had all.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from uffd_vm.fault.action import Counter, Truth
from uffd_vm.fault.fault import FaultKind
from uffd_vm.fault.pte import PteState
from uffd_vm.fault.settle import EHWPOISON
from uffd_vm.kernel._lib import lib
from uffd_vm.kernel.uffd import WpMode
from uffd_vm.page import PAGE_SHIFT, PAGE_SIZE
from uffd_vm.service.fault_service.address_space import CACHED, AddressSpace, Region
from uffd_vm.service.fault_service.completion import Event, Task, Workers, run_task
from uffd_vm.service.fault_service.filemap import (
    BUFFER_PAGES,
    BufferPool,
    PageCache,
    Read,
    ZeroFolio,
)
from uffd_vm.service.fault_service.memory import VmFault, handle_mm_fault
from uffd_vm.service.fault_service.userfaultfd import mfill

__all__ = ["Failures", "Kernel", "Mm"]

_WP = int(WpMode.WP)
_PRESENT, _WRITE_PROTECTED = int(PteState.PRESENT), int(PteState.WRITE_PROTECTED)
_ZERO, _ZERO_WP = int(PteState.ZERO), int(PteState.ZERO_WP)
_NONE, _NONE_WP, _CACHED = int(PteState.NONE), int(PteState.NONE_WP), int(PteState.CACHED)
_POISONED, _BUSY = int(PteState.POISONED), int(PteState.BUSY)
_EMPTY = frozenset((_NONE, _NONE_WP, _CACHED))
_MISSING = int(FaultKind.MISSING)

_READAHEAD, _BYTES_READ = int(Counter.readahead), int(Counter.bytes_read)
_PGSTEAL = int(Counter.pgsteal)
_WRITEBACK, _BYTES_WRITTEN = int(Counter.writeback), int(Counter.bytes_written)

_ROOM_TRIES = 10_000  # of a millisecond
_INTERRUPT_AFTER_NS = 200_000_000
_INTERRUPT_LOOK_MS = 100
_CHAIN_GAP_NS = 1_000_000_000  # a thread that comes back later had the page meanwhile
_MAX_CHAINS = 4096
_INSTRUCTION_PAGES = 4  # that one instruction may need
_NR_TURNS = 16
_RESCHED_NS = 10_000_000  # a task that only computes lets others in after this
_CHUNK_PAGES = 16 << 10  # of a range that is walked: 64 MiB


class Kernel(Protocol):
    """What the fault path asks of the kernel face; uffd_vm.testing.FakeUffd answers it too."""

    def uvm_uffd_copy(self, fd: int, dst: int, src: int, nr_bytes: int, mode: int, /) -> Any: ...
    def uvm_uffd_zeropage(self, fd: int, start: int, nr_bytes: int, mode: int, /) -> Any: ...
    def uvm_uffd_continue(self, fd: int, start: int, nr_bytes: int, mode: int, /) -> Any: ...
    def uvm_uffd_poison(self, fd: int, start: int, nr_bytes: int, mode: int, /) -> Any: ...
    def uvm_uffd_writeprotect(self, fd: int, start: int, nr_bytes: int, mode: int, /) -> int: ...
    def uvm_uffd_wake(self, fd: int, start: int, nr_bytes: int, /) -> int: ...


class Failures(Protocol):
    """What the fault path asks of the owner."""

    def failed(self, region: int, index: int, kind: int, err: int) -> int: ...
    def protect_read(self, region: int, index: int, nr_pages: int) -> int: ...
    def interrupted(self, tid: int) -> bool: ...
    def not_waiting(self) -> None: ...


@dataclass(slots=True)
class _Chain:
    """Faults of one thread at one page that brought nothing, one after the other."""

    address: int
    kind: int
    first_ns: int
    last_ns: int
    count: int


@dataclass(slots=True)
class _Turns:
    """Faults of one thread at no more pages than one instruction needs, taken away by reclaim in turn."""

    pages: list[int]  # addresses
    first_ns: int
    last_ns: int
    nr_reclaimed: int  # of the cache, at the last one
    count: int = 0


class Mm:
    """Not thread-safe: everything here runs in the fault-service thread."""

    def __init__(
        self,
        uffd: int,
        kernel: Kernel,
        agent: Failures,
        scan: Callable[[int], int],
        nr_workers: int = 4,
    ) -> None:
        self.uffd = uffd
        self.kernel = kernel
        self.agent = agent
        self.space = AddressSpace()
        self.workers = Workers(nr_workers)
        self.buffers = BufferPool()
        self.zero_folio = ZeroFolio()
        self.nr_strays = 0
        self._scan = scan
        self._parked: dict[tuple[int, int], VmFault[Any]] = {}
        self._chains: dict[int, _Chain] = {}  # by thread: its last fault, if that brought nothing
        self._turns: dict[int, _Turns] = {}  # by thread
        self._timers: list[tuple[int, int, Event]] = []
        self._timer_ids = itertools.count()
        self._write_backs: dict[PageCache, Event] = {}
        self._watching = False  # Ctrl-C, for a thread that waits long

    # --- faults -----------------------------------------------------------------------------------

    def page_fault(self, address: int, kind: int, access: int, tid: int) -> None:
        """One message of the userfaultfd."""
        address &= -PAGE_SIZE
        region = self.space.find(address)
        if region is None:  # p2: unregistering would let it read zeros; it may only run again
            self.nr_strays += 1
            self.wake(address, 1)
            return
        if (tid, address) in self._parked:
            return
        vmf: VmFault[Any] = VmFault(region, address, kind, access, tid)
        if self._chains:
            self._continue_chain(vmf, region)
        if kind == _MISSING and region.cache is not None and not region.private_pages:
            self._take_turn(vmf, region, region.cache)
        handle_mm_fault(self, vmf)

    def _continue_chain(self, vmf: VmFault[Any], region: Region) -> None:
        """The deadline of a refault is that of the first of its chain. Also if it ends otherwise, this
        fault ends the chain, or note_refault() goes on with it."""
        chain = self._chains.pop(vmf.tid, None)
        if (
            chain is None
            or (chain.address, chain.kind) != (vmf.address, vmf.kind)
            or vmf.t_ns - chain.last_ns > _CHAIN_GAP_NS
        ):
            return
        self._is_refault(vmf, region, chain.count, chain.first_ns)

    def _is_refault(self, vmf: VmFault[Any], region: Region, count: int, first_ns: int) -> None:
        vmf.refaults = count
        vmf.first_ns = first_ns
        vmf.deadline_ns = first_ns + region.deadline_ns
        if vmf.t_ns - first_ns > _INTERRUPT_AFTER_NS:
            self._watching = True
            if self.agent.interrupted(vmf.tid):
                vmf.interrupted, vmf.deadline_ns = True, vmf.t_ns

    def _take_turn(self, vmf: VmFault[Any], region: Region, cache: PageCache) -> None:
        """Does the thread get on? Not if it comes to the same few pages again and again because reclaim
        took them since: then they are kept for it, and if that does not help, its deadline counts."""
        turns = self._turns.get(vmf.tid)
        if turns is None or vmf.t_ns - turns.last_ns > _CHAIN_GAP_NS:
            turns = None
        elif vmf.address not in turns.pages:
            turns.pages.append(vmf.address)
            if len(turns.pages) > _INSTRUCTION_PAGES:
                turns = None
        elif cache.nr_reclaimed == turns.nr_reclaimed:
            turns = None
        else:
            turns.count += 1
        if turns is None:
            if len(self._turns) >= _MAX_CHAINS:
                self._turns.clear()
            turns = self._turns[vmf.tid] = _Turns([vmf.address], vmf.t_ns, vmf.t_ns, 0)
        turns.last_ns, turns.nr_reclaimed = vmf.t_ns, cache.nr_reclaimed
        if turns.count < _NR_TURNS:
            return
        mine = (page for page in turns.pages if region.start <= page < region.end)
        folios = (region.pgoff + ((page - region.start) >> PAGE_SHIFT) for page in mine)
        cache.take_token(vmf.tid, frozenset(folios))
        if not vmf.refaults:
            self._is_refault(vmf, region, turns.count, turns.first_ns)

    def note_refault(self, vmf: VmFault[Any]) -> None:
        """A fault has ended, and brought nothing."""
        if len(self._chains) >= _MAX_CHAINS:  # of threads that are long gone
            self._chains.clear()
        self._chains[vmf.tid] = _Chain(
            vmf.address, vmf.kind, vmf.first_ns, time.monotonic_ns(), vmf.refaults + 1
        )

    def park(self, vmf: VmFault[Any], event: Event) -> None:
        key = (vmf.tid, vmf.address)
        self._parked[key] = vmf

        def restart() -> None:
            if self._parked.get(key) is vmf:
                self.restart(vmf)

        event.then(restart)

    def restart(self, vmf: VmFault[Any]) -> None:
        """From the top: the region is looked up, the entry read again."""
        del self._parked[vmf.tid, vmf.address]
        if vmf.tid in self._turns:  # it waited, and was not somewhere else
            self._turns[vmf.tid].last_ns = time.monotonic_ns()
        vmf.tries += 1
        handle_mm_fault(self, vmf)

    def after(self, delay_ns: int) -> Event:
        event = Event()
        due = time.monotonic_ns() + delay_ns
        heapq.heappush(self._timers, (due, next(self._timer_ids), event))
        return event

    def run_timers(self) -> None:
        """What is due, and the faults whose deadline has passed."""
        if not self._timers and not self._parked and not self._watching:
            return
        now = time.monotonic_ns()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2].happen()
        self._look_for_interrupts(now)
        for vmf in [v for v in self._parked.values() if v.deadline_ns <= now]:
            if self._parked.get((vmf.tid, vmf.address)) is vmf:
                self.restart(vmf)

    def _look_for_interrupts(self, now: int) -> None:
        """Ctrl-C ends a long wait as its deadline would, but by Python's own KeyboardInterrupt."""
        waiting = [v for v in self._parked.values() if now - v.t_ns > _INTERRUPT_AFTER_NS]
        for vmf in waiting:
            if self.agent.interrupted(vmf.tid):
                vmf.interrupted, vmf.deadline_ns = True, now
        in_chain = self._watching and any(
            now - chain.last_ns < _CHAIN_GAP_NS and now - chain.first_ns > _INTERRUPT_AFTER_NS
            for chain in self._chains.values()
        )
        if self._watching and not waiting and not in_chain:
            self.agent.not_waiting()
        self._watching = bool(waiting) or in_chain

    def next_timeout_ms(self) -> int | None:
        """How long poll() may sleep; None: until something comes."""
        if not self._timers and not self._parked:
            return _INTERRUPT_LOOK_MS if self._watching else None
        due = min(
            itertools.chain(
                (when for when, _, _ in self._timers[:1]),
                (vmf.deadline_ns for vmf in self._parked.values()),
            )
        )
        ms = max(0, -((time.monotonic_ns() - due) // 1_000_000))
        return min(ms, _INTERRUPT_LOOK_MS) if self._parked else ms

    @property
    def nr_parked(self) -> int:
        return len(self._parked)

    # --- the owner's memory -----------------------------------------------------------------------

    def wake(self, address: int, nr_pages: int) -> None:
        self.kernel.uvm_uffd_wake(self.uffd, address, nr_pages << PAGE_SHIFT)

    def wake_region(self, region: Region, index: int, nr_pages: int) -> None:
        self.kernel.uvm_uffd_wake(self.uffd, region.address(index), nr_pages << PAGE_SHIFT)

    def pagemap_scan(self, address: int) -> Truth:
        return Truth(self._scan(address))

    def attach(self, region: Region) -> None:
        """From here on its faults are answered; what an earlier service left asleep comes again."""
        self.space.insert(region)
        if region.cache is not None:
            region.cache.regions.append(region)
        self.wake_region(region, 0, region.nr_pages)

    def detach(self, region: Region) -> None:
        """Nobody uses the region after this; its parked faults find it gone, and wake."""
        self.space.drop(region)
        if region.cache is not None:
            region.cache.regions.remove(region)
        for vmf in [v for v in self._parked.values() if v.handle == region.handle]:
            if self._parked.get((vmf.tid, vmf.address)) is vmf:
                self.restart(vmf)
        assert not region.readers and not region.locked
        region.close()

    # --- work without a fault -----------------------------------------------------------------------

    def live(self, handle: int, generation: int) -> Region:
        """The region again, after a wait. OSError(ESTALE) if it was dropped meanwhile."""
        region = self.space.get(handle)
        if region is None or region.closing or region.generation != generation:
            raise OSError(errno.ESTALE, "the region was dropped")
        return region

    def cond_resched(self) -> Event:
        """For a task that has not waited for long: faults, and who asks whether we live, come first."""
        return self.after(0)

    def load(self, region: Region, index: int, nr_pages: int, counter: int | None = None) -> Task:
        """Makes [index, index + nr_pages) present. The OSError of a failure has `failed_index`."""
        handle, generation = region.handle, region.generation
        at, end, loaded = index, min(index + nr_pages, region.nr_pages), 0
        tries = 0
        resched_ns = time.monotonic_ns() + _RESCHED_NS
        while at < end:
            if time.monotonic_ns() > resched_ns:
                yield self.cond_resched()
                resched_ns = time.monotonic_ns() + _RESCHED_NS
            region = self.live(handle, generation)
            state = region.walk(at, _MISSING)
            if state == _POISONED:
                raise _failed(EHWPOISON, at)
            if state & CACHED or (state not in (_NONE, _NONE_WP) and state != _BUSY):
                at += 1
                continue
            if region.cache is None:
                loaded += self._populate_zero(region, at)
                at += 1
                continue
            cache = region.cache
            read = cache.reads.get(region.pgoff + at)
            if read is None:
                limit = min(BUFFER_PAGES, max(region.fault_around_pages, end - at))
                _, last = region.absent_run(at, cache.window(1 << (limit - 1).bit_length()))
                last = min(last, end) if end - at >= region.fault_around_pages else last
                nr = last - at
                if not cache.make_room(nr):
                    nr = 1
                waited = False
                while not cache.room_for(nr):
                    event = self.start_write_back(cache)
                    if event is None and cache.shrink(nr, last_resort=True):
                        continue
                    if event is None:  # what is charged is on its way in or out
                        tries += 1
                        if tries > _ROOM_TRIES:
                            raise _failed(errno.ENOMEM, at)
                        event = self.after(1_000_000)
                    yield event
                    waited = True
                    region = self.live(handle, generation)
                    cache.shrink(nr)
                if waited:
                    continue  # everything may be different now
                if not cache.absent(region.pgoff + at):
                    continue
                read = cache.start_read(region.pgoff + at, nr)
                region.control.counters[_BYTES_READ] += nr << PAGE_SHIFT
            read.pins += 1
            try:
                if not read.happened:
                    yield read
                    region = self.live(handle, generation)
                if read.err:
                    raise _failed(read.err, at)
                if (
                    region.ptes[at] in (_NONE, _NONE_WP)
                    and cache.reads.get(region.pgoff + at) is read
                ):
                    nr = self._populate(region, at, read)
                    loaded += nr
                    if counter is not None:
                        region.control.counters[counter] += nr
            finally:
                read.unpin()
            at += 1
        return loaded

    def _populate(self, region: Region, index: int, read: Read) -> int:
        """Commits the folios of a complete read as fault-around would."""
        assert not region.locked, "no fault is between walk and commit while a task runs"
        first = max(read.index - region.pgoff, 0)
        end = min(read.index - region.pgoff + read.nr_pages, region.nr_pages)
        first, end = region.empty_run(index, first, end)
        mfill(self, region, first, end, region.neighbour_commit, read, None)
        self.wake_region(region, first, end - first)
        return end - first

    def _populate_zero(self, region: Region, index: int) -> int:
        mfill(self, region, index, index + 1, region.neighbour_commit, self.zero_folio, None)
        self.wake_region(region, index, 1)
        return 1

    def read_ahead(self, region: Region, index: int, nr_pages: int) -> None:
        """page_cache_async_ra(): a reader who comes to where the last one ended gets more, ahead."""
        largest, advice = region.readahead_pages, region.control.advice
        if not largest or advice == lib.UVM_ADVICE_RANDOM:
            return
        assert region.cache is not None
        largest = region.cache.window(largest)
        around = region.cache.window(region.fault_around_pages)
        end = index - index % around + around
        if index != region.readahead_next and advice != lib.UVM_ADVICE_SEQUENTIAL:
            region.readahead_next, region.readahead_window = end, 0
            return
        window = min(max(2 * region.readahead_window, 2 * around), largest)
        region.readahead_next, region.readahead_window = end + window, window
        run_task(self.load(region, end, window, _READAHEAD), _ignore)

    def start_write_back(self, cache: PageCache) -> Event | None:
        """Room must be made and nothing is clean: an event after which there may be some, or None."""
        event = self._write_backs.get(cache)
        if event is not None:
            return event
        if cache.writing is not None:
            return cache.writing
        dirty = cache.oldest_dirty()
        if dirty is None:
            return next((read for read in cache.reads.values() if not read.happened), None)
        event = self._write_backs[cache] = Event()

        def finished(written: int, error: OSError | None) -> None:
            del self._write_backs[cache]
            if error is not None:  # not at once again
                self.after(50_000_000).then(event.happen)
                return
            cache.shrink(written)
            event.happen()

        run_task(self.write_back(cache, *dirty), finished)
        return event

    def write_back(self, cache: PageCache, index: int, nr_pages: int) -> Task:
        written = yield from cache.write_back(index, nr_pages, self.protect_folios)
        for region in cache.regions[:1]:
            region.control.counters[_WRITEBACK] += written
            region.control.counters[_BYTES_WRITTEN] += written << PAGE_SHIFT
        return written

    def protect_folios(self, cache: PageCache, index: int, nr_pages: int) -> None:
        """page_mkclean(): in every page table, so that the next store is seen."""
        for region in cache.regions:
            first = max(index - region.pgoff, 0)
            end = min(index - region.pgoff + nr_pages, region.nr_pages)
            if region.writable and region.shared and first < end:
                self.protect(region, first, end - first)

    def protect(
        self, region: Region, index: int, nr_pages: int, written: memoryview | None = None
    ) -> int:
        """Write-protects what is writable in [index, index + nr_pages). Returns how many pages. `written`,
        a byte a page: what may have been stored to. It is noted before a page is armed, for we may end
        between the two; and after it, for the owner may have taken the first note before the last store."""
        armed = 0
        at, end = index, min(index + nr_pages, region.nr_pages)
        ptes = region.ptes
        while at < end:
            pte = ptes[at]
            if pte != _PRESENT and pte != _ZERO:
                at += 1
                continue
            first = at
            while at < end and ptes[at] == pte:
                at += 1
            note = b"\1" * (at - first) if written is not None and pte == _PRESENT else b""
            if written is not None and note:
                written[first:at] = note
            rc = self.kernel.uvm_uffd_writeprotect(
                self.uffd, region.address(first), (at - first) << PAGE_SHIFT, _WP
            )
            if rc < 0:
                raise OSError(-rc, os.strerror(-rc))
            if written is not None and note:
                written[first:at] = note
            region.set_ptes(first, at - first, _ZERO_WP if pte == _ZERO else _WRITE_PROTECTED)
            armed += at - first
        return armed

    def collect_range(self, region: Region, index: int, nr_pages: int) -> Task:
        """As protect_range(), and notes for the owner which pages were written."""
        return self.protect_range(region, index, nr_pages, region.control.written(region.nr_pages))

    def protect_range(
        self, region: Region, index: int, nr_pages: int, written: memoryview | None = None
    ) -> Task:
        """Starts a new period of write tracking. Returns how many pages were armed: not those that are
        pinned, which a device may store to unseen, and which go on counting as written."""
        handle, generation = region.handle, region.generation
        armed = 0
        for first, n in _chunks(index, nr_pages):
            region = self.live(handle, generation)
            done = first
            for at, end in _unpinned_runs(region, first, first + n):
                _note_present(region, done, at, written)
                armed += self.protect(region, at, end - at, written)
                done = end
            _note_present(region, done, first + n, written)
            yield self.cond_resched()
        return armed

    def flush(self, region: Region, index: int, nr_pages: int) -> Task:
        """Dirty folios of the range go home, and are durable on return. An earlier write-back that
        failed in the background is told here, once."""
        cache = region.cache
        if cache is None:
            return 0
        written = 0
        for first, n in cache.touched(region.pgoff + index, nr_pages):
            written += yield from self.write_back(cache, first, n)
            yield self.cond_resched()
        yield from cache.fsync()
        if err := cache.take_write_back_error():
            raise OSError(err, os.strerror(err))
        return written

    def evict(self, region: Region, index: int, nr_pages: int) -> Task:
        """Gives the range's folios back, dirty ones after they went home. Returns how many."""
        cache = region.cache
        if cache is None:
            return 0
        self._turns.clear()  # what goes by request says nothing of reclaim
        handle, generation = region.handle, region.generation
        freed = 0
        for first, n in cache.touched(region.pgoff + index, nr_pages):
            yield from self.write_back(cache, first, n)
            region = self.live(handle, generation)
            evicted = cache.evict_clean(first, n)
            region.control.counters[_PGSTEAL] += evicted
            freed += evicted
            yield self.cond_resched()
        return freed

    def close(self) -> None:
        self.workers.close()


def _chunks(index: int, nr_pages: int) -> Iterator[tuple[int, int]]:
    """(index, number of pages) of the pieces of a range; one piece of nothing where that is empty."""
    for first in range(index, index + max(nr_pages, 1), _CHUNK_PAGES):
        yield first, min(_CHUNK_PAGES, index + nr_pages - first)


def _unpinned_runs(region: Region, first: int, end: int) -> Iterator[tuple[int, int]]:
    """[first, end) of the region without what is pinned for devices."""
    cache = region.cache
    pins = cache.pins() if cache is not None and region.shared else []
    for pin in sorted(pins, key=lambda pin: pin.start):
        if first < min(pin.start - region.pgoff, end):
            yield first, min(pin.start - region.pgoff, end)
        first = max(first, pin.stop - region.pgoff)
    if first < end:
        yield first, end


def _note_present(region: Region, first: int, end: int, written: memoryview | None) -> None:
    """Pages that are pinned, and so not armed."""
    if written is not None:
        for index in range(first, end):
            if region.ptes[index] == _PRESENT:
                written[index] = 1


def _failed(err: int, index: int) -> OSError:
    error = OSError(err, os.strerror(err))
    error.failed_index = index  # type: ignore[attr-defined]
    return error


def _ignore(result: int, error: OSError | None) -> None:
    """Read-ahead and prefetch: the fault will say what went wrong."""
