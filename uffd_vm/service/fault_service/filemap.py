"""The page cache of file regions, as mm/filemap.c: folio words, reads, write-back, reclaim.

The content lies in a memfd that the owner maps, and no forked child of it; the folio words lie in its
control memfd. A Read is a run of locked folios being brought in: it has a buffer, and it is what faults
wait for and join. Only one is ever in flight for a folio. The file is the version that was mapped (size
and mtime), else every read of it fails with CHANGED: bytes of two versions never meet.

Never held across I/O: any lock. Runs in the fault-service thread, but for Read.read_blocking() and
the write and fsync of write-back, which run in a worker and touch only their own buffer.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import time
from array import array
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator
from typing import TYPE_CHECKING

from uffd_vm.fault.pte import FolioState
from uffd_vm.kernel._lib import lib
from uffd_vm.page import PAGE_SHIFT, PAGE_SIZE
from uffd_vm.service.fault_service.completion import Event, Job, Task, Workers

if TYPE_CHECKING:
    from uffd_vm.service.fault_service.address_space import Region

__all__ = ["BUFFER_PAGES", "CHANGED", "BufferPool", "PageCache", "Read", "ZeroFolio"]

BUFFER_PAGES = 512  # largest run that a load, prefetch or read-ahead brings in one read: 2 MiB
WRITEBACK_PAGES = 64
_READ_RETRIES_S = (0.01, 0.02)
_TRANSIENT = frozenset((errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ENOMEM, errno.ENOBUFS))
CTL_OFFSET, CTL_BYTES = lib.UVM_CACHE_CTL_OFFSET, lib.UVM_CACHE_CTL_BYTES
NR_PINS = 1024  # UVM_CACHE_PINS
SLOT_BITS, NR_EPOCHS = 12, 1 << 12  # UVM_CACHE_SLOT_BITS, UVM_CACHE_EPOCHS: of an owner
_CTL_WORDS = 13  # struct uvm_cache_ctl
_NR_PAGES, _SIZE, _MTIME_NS, _CAP, _NR_USED, _NR_DIRTY, _NR_PEAK = range(7)
_WB_ERR_SEQ, _WB_ERR, _NR_WRITING, _NR_PINS, _PINS_AT = 8, 9, 10, 11, 12

#: What says that the file is not the version that was mapped: it is shorter; it was changed.
CHANGED = frozenset((errno.ENODATA, errno.ESTALE))

_ABSENT, _FILLING, _UPTODATE, _DIRTY, _WRITEBACK, _ERROR, _EVICTING = (int(s) for s in FolioState)
_NOT_CHARGED = frozenset((_ABSENT, _ERROR))
_NOT_HOME = frozenset((_DIRTY, _WRITEBACK))
_QUIET = frozenset((_ABSENT, _ERROR, _UPTODATE, _DIRTY))  # nobody was at it
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2

_RECENT = lib.UVM_MIN_CAP_PAGES // 2  # as native/cache.c
_TOKEN_NS = 100_000_000

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def punch_hole(fd: int, offset: int, nr_bytes: int) -> None:
    if _fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, nr_bytes):
        err = ctypes.get_errno()
        raise OSError(err, os.strerror(err))


class Buffer:
    """Resident memory that a read goes into and a COPY takes from: never part of a region."""

    __slots__ = ("address", "memory", "nr_pages", "view")

    def __init__(self, nr_pages: int) -> None:
        self.nr_pages = nr_pages
        self.memory = mmap.mmap(-1, nr_pages * PAGE_SIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.view = memoryview(self.memory)


class BufferPool:
    """Buffers of one size class each (a power of two pages), given back and used again."""

    def __init__(self) -> None:
        self._free: dict[int, list[Buffer]] = {}

    def get(self, nr_pages: int) -> Buffer:
        size = 1 << (nr_pages - 1).bit_length()
        free = self._free.setdefault(size, [])
        return free.pop() if free else Buffer(size)

    def put(self, buffer: Buffer) -> None:
        self._free[buffer.nr_pages].append(buffer)


class Read(Event):
    """Folios [index, index + nr_pages) of a cache, locked while their content comes in."""

    __slots__ = (
        "_got",
        "_wanted",
        "address",
        "buffer",
        "cache",
        "err",
        "index",
        "nr_pages",
        "pins",
    )

    def __init__(self, cache: PageCache, index: int, nr_pages: int) -> None:
        super().__init__()
        self.cache = cache
        self.index = index
        self.nr_pages = nr_pages
        self.err = 0  # errno
        self.pins = 0
        self.buffer = cache.buffers.get(nr_pages)
        self.address = self.buffer.address
        self._got = 0
        self._wanted = min(nr_pages << PAGE_SHIFT, cache.size - (index << PAGE_SHIFT))

    def holds(self, index: int) -> bool:
        """The content of that folio is here, complete."""
        return self.happened and not self.err and self.index <= index < self.index + self.nr_pages

    def address_of(self, index: int) -> int:
        return self.address + ((index - self.index) << PAGE_SHIFT)

    def unpin(self) -> None:
        """The last one out unlocks the folios that nobody has installed, and returns the buffer."""
        self.pins -= 1
        if not self.pins:
            self.cache.end_read(self)

    def read_nowait(self) -> bool:
        """Takes what the kernel has cached of the file. True: all is here, no disk was waited for."""
        try:
            self._got = os.preadv(
                self.cache.file_fd,
                [self.buffer.view[: self._wanted]],
                self.index << PAGE_SHIFT,
                os.RWF_NOWAIT,
            )
        except OSError:  # it would block, or the file system cannot tell; an error comes again
            return False
        return self._got == self._wanted

    def read_blocking(self) -> int:
        """Reads what is missing yet; a transient failure is tried again. In a worker."""
        for delay_s in _READ_RETRIES_S:
            try:
                return self._read_rest()
            except OSError as error:
                if error.errno not in _TRANSIENT:
                    raise
            time.sleep(delay_s)
        return self._read_rest()

    def _read_rest(self) -> int:
        offset = self.index << PAGE_SHIFT
        while self._got < self._wanted:
            view = self.buffer.view[self._got : self._wanted]
            n = os.preadv(self.cache.file_fd, [view], offset + self._got)
            if n == 0:
                return -errno.ENODATA  # it ends before the size that was mapped
            self._got += n
        return 0

    def complete(self, err: int) -> None:
        """All bytes are here, or err says why not: zero-fills the tail and asks whether the file still
        is the version that was mapped, after the last byte was read."""
        err = err or self.cache.version_check()
        if not err and self._wanted < self.nr_pages << PAGE_SHIFT:
            tail = self.nr_pages * PAGE_SIZE - self._wanted
            self.buffer.view[self._wanted : self.nr_pages * PAGE_SIZE] = bytes(tail)
        self.err = err


class ZeroFolio:
    """The content of a fresh anonymous page: at hand for every index, nobody's to lock."""

    __slots__ = ("address", "buffer", "index", "nr_pages", "pins")

    def __init__(self) -> None:
        self.buffer = Buffer(1)
        self.address = self.buffer.address
        self.index = 0
        self.nr_pages = 0  # no neighbours
        self.pins = 0

    def holds(self, index: int) -> bool:
        return True

    def address_of(self, index: int) -> int:
        return self.address

    def unpin(self) -> None:
        self.pins -= 1


class PageCache:
    """One address_space: `nr_pages` folios over one file. Takes ownership of the descriptors."""

    def __init__(
        self, ctl_fd: int, data_fd: int, file_fd: int, workers: Workers, buffers: BufferPool
    ) -> None:
        self.ctl_fd, self.data_fd, self.file_fd = ctl_fd, data_fd, file_fd
        self.key = os.fstat(ctl_fd).st_ino
        self.workers = workers
        self.buffers = buffers
        self._map = mmap.mmap(ctl_fd, os.fstat(ctl_fd).st_size)
        view = memoryview(self._map)
        self._ctl = view[CTL_OFFSET : CTL_OFFSET + 8 * _CTL_WORDS].cast("Q")
        self.nr_pages = self._ctl[_NR_PAGES]
        self.size = self._ctl[_SIZE]
        self.folios = view[CTL_BYTES : CTL_BYTES + 4 * self.nr_pages].cast("I")
        self._slots = view[:CTL_OFFSET].cast("I")  # pid, epoch, start_time (8 bytes) each
        pins_at = self._ctl[_PINS_AT]
        self._pins = view[pins_at : pins_at + 24 * NR_PINS].cast("Q")  # index, nr_pages, owner
        self.regions: list[Region] = []
        self.reads: dict[int, Read] = {}  # in flight, or complete and not yet taken, by folio
        self._nr_jobs = 0
        self.writing: Event | None = None  # happens when the write-back that is under way has ended
        self._seen_wb_err = self._ctl[_WB_ERR_SEQ]
        self._extents: deque[tuple[int, int]] = deque()  # in the order they were filled
        self._recent: deque[int] = deque(maxlen=_RECENT)  # the last folios that faults asked for
        self._token: frozenset[int] = frozenset()  # folios of a thread that thrashes
        self._token_tid, self._token_until_ns = 0, 0
        self.nr_reclaimed = 0
        self._take_over()

    def _take_over(self) -> None:
        """What an earlier process left half done: what it was filling or evicting is absent, or there,
        what it was writing back is dirty still, and the mtime that its last write made is ours."""
        if self._ctl[_NR_WRITING]:
            self._ctl[_MTIME_NS] = os.fstat(self.file_fd).st_mtime_ns
            self._ctl[_NR_WRITING] = 0
        for first, n in self.touched(0, self.nr_pages):
            end = first + n
            words = self.folios[first:end]
            if words[0] & 0xFF in _QUIET and words.tobytes() == words[:1].tobytes() * len(words):
                # All alike, as they mostly are: a cache of 100 GiB is taken over in a second.
                if words[0] & 0xFF not in _NOT_CHARGED:
                    self._note_extent(first, end - first)
                continue
            for index in range(first, end):
                self._take_over_folio(index)

    def _take_over_folio(self, index: int) -> None:
        state = self.state(index)
        if state in (_FILLING, _EVICTING):  # unless it died between commit, or punch, and word
            self.set_state(index, 1, self._state_of_what_is_there(index))
        elif state == _WRITEBACK:
            self.set_state(index, 1, _DIRTY)
        elif state not in _NOT_CHARGED:
            self._note_extent(index, 1)

    def touched(self, index: int, nr_pages: int) -> Iterator[tuple[int, int]]:
        """(index, number of pages) of the parts of a range whose words were ever written, a page of words
        at a time: a huge sparse file costs nothing. Each is looked for when it is asked for."""
        at, end = CTL_BYTES + 4 * index, CTL_BYTES + 4 * (index + nr_pages)
        while at < end:
            try:
                at = os.lseek(self.ctl_fd, at, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing from here to the end
                return
            stop = min((at // PAGE_SIZE + 1) * PAGE_SIZE, end)
            if at < stop:
                yield (at - CTL_BYTES) // 4, (stop - at) // 4
            at = stop

    def _state_of_what_is_there(self, index: int) -> int:
        """A page that is in the memfd was complete: COPY and pwrite never show half of one. It may
        have been written to since, so where that is possible it counts as dirty."""
        try:
            there = os.lseek(self.data_fd, index << PAGE_SHIFT, os.SEEK_DATA) == index << PAGE_SHIFT
        except OSError:  # ENXIO: nothing from here to the end
            there = False
        if not there:
            return _ABSENT
        writable = fcntl.fcntl(self.file_fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        return _DIRTY if writable else _UPTODATE

    def adopt(self, index: int) -> int:
        """The kernel says that it has a page where our word says absent: its truth wins, if it still is
        there (the message may be older than an eviction). Returns the state."""
        if not self.is_being_read(index):
            state = self._state_of_what_is_there(index)
            if state != _ABSENT:
                self.set_state(index, 1, state)
                self._note_extent(index, 1)
        return self.state(index)

    def disown(self, index: int) -> None:
        """The other way round: our word says that the page is there, and the kernel that it is not. What was
        stored to is lost then, and is not read again as if it were not."""
        if self.state(index) == _UPTODATE and self._state_of_what_is_there(index) == _ABSENT:
            for region in self.regions:
                region.unmap_folios(index, 1)
            self.set_state(index, 1, _ABSENT)

    # --- folio words ----------------------------------------------------------------------------

    def state(self, index: int) -> int:
        return self.folios[index] & 0xFF

    def absent(self, index: int) -> bool:
        return self.folios[index] & 0xFF in _NOT_CHARGED and index not in self.reads

    def is_being_read(self, index: int) -> bool:
        """Locked by a read that is not complete."""
        read = self.reads.get(index)
        return read is not None and not read.happened

    def set_state(self, index: int, nr_pages: int, to: int) -> None:
        """Moves the words; nr_used and nr_dirty follow."""
        folios = self.folios
        used = dirty = 0
        for word in folios[index : index + nr_pages]:
            state = word & 0xFF
            used += state not in _NOT_CHARGED
            dirty += state in _NOT_HOME
        folios[index : index + nr_pages] = memoryview(array("I", (to,)) * nr_pages)
        ctl = self._ctl
        now = 0 if to in _NOT_CHARGED else nr_pages
        if now != used:
            ctl[_NR_USED] += now - used
            if ctl[_NR_USED] > ctl[_NR_PEAK]:
                ctl[_NR_PEAK] = ctl[_NR_USED]
        now = nr_pages if to in _NOT_HOME else 0
        if now != dirty:
            ctl[_NR_DIRTY] += now - dirty

    def version_check(self) -> int:
        """Is the file the version that was mapped? 0, ENODATA: it is shorter, ESTALE: it was changed. Our
        own write-back moves mtime on, and while one is under way mtime says nothing. XXX another
        writer, who ignores our lock, goes unseen then."""
        stat = os.fstat(self.file_fd)
        if stat.st_size < self.size:
            return errno.ENODATA
        same = stat.st_mtime_ns == self._ctl[_MTIME_NS] or self._ctl[_NR_WRITING] > 0
        return 0 if same and stat.st_size == self.size else errno.ESTALE

    def _note_extent(self, index: int, nr_pages: int) -> None:
        extents = self._extents
        if extents and extents[-1][0] + extents[-1][1] == index:
            first, n = extents.pop()
            index, nr_pages = first, n + nr_pages
        extents.append((index, nr_pages))

    # --- reads ----------------------------------------------------------------------------------

    def start_read(self, index: int, nr_pages: int) -> Read:
        """Locks the folios and starts to bring them in. Complete already if no disk is waited for."""
        read = Read(self, index, nr_pages)
        self.set_state(index, nr_pages, _FILLING)
        for folio in range(index, index + nr_pages):
            self.reads[folio] = read
        if read.read_nowait():
            read.complete(0)
            read.happened = True
            return read
        job = Job(read.read_blocking)
        job.then(lambda: self._read_completed(read, job))
        self.workers.submit(job)
        return read

    def _read_completed(self, read: Read, job: Job) -> None:
        read.complete(-job.result)
        read.pins += 1
        try:
            read.happen()  # restarts the faults that are parked here; each pins it for itself
        finally:
            read.unpin()

    def end_read(self, read: Read) -> None:
        """Nobody wants it any more: what was not installed is absent again."""
        folios = self.folios
        for folio in range(read.index, read.index + read.nr_pages):
            if self.reads.get(folio) is read:
                del self.reads[folio]
                if folios[folio] & 0xFF == _FILLING:
                    self.set_state(folio, 1, _ABSENT)
        self.buffers.put(read.buffer)

    def mark_uptodate(self, index: int, nr_pages: int) -> None:
        """folio_mark_uptodate(): the content is in the memfd now. Nobody need lock it to have it."""
        self.set_state(index, nr_pages, _UPTODATE)
        self._note_extent(index, nr_pages)
        for folio in range(index, index + nr_pages):
            self.reads.pop(folio, None)

    def mark_dirty(self, index: int) -> None:
        """folio_mark_dirty(): somebody may store into it from now on."""
        self.set_state(index, 1, _DIRTY)

    def read_cached(self, index: int, nr_pages: int) -> Read:
        """A copy of folios that the memfd has: complete at once, and it locks nothing."""
        read = Read(self, index, nr_pages)
        view = read.buffer.view[: nr_pages << PAGE_SHIFT]
        os.preadv(self.data_fd, [view], index << PAGE_SHIFT)
        read.happened = True
        return read

    def fill_cache(self, read: Read, index: int, nr_pages: int) -> int:
        """Puts whole pages of a complete read into the memfd. Returns the bytes put there."""
        offset = (index - read.index) << PAGE_SHIFT
        view = read.buffer.view[offset : offset + (nr_pages << PAGE_SHIFT)]
        return os.pwrite(self.data_fd, view, index << PAGE_SHIFT)

    # --- pins -----------------------------------------------------------------------------------

    def pins(self) -> list[range]:
        """The folios that are pinned for devices: dirty from then on, whatever is written back."""
        found = []
        for at in range(0, 3 * self._ctl[_NR_PINS], 3):
            index, nr_pages, owner = self._pins[at : at + 3]
            slot = 4 * (owner % (1 << SLOT_BITS))
            pid, epoch = self._slots[slot : slot + 2]
            alive = pid and epoch % NR_EPOCHS == owner >> SLOT_BITS
            if nr_pages and alive:
                found.append(range(index, index + nr_pages))
        return found

    # --- reclaim --------------------------------------------------------------------------------

    @property
    def cap_pages(self) -> int:
        return self._ctl[_CAP]

    def room_for(self, nr_pages: int) -> bool:
        return self._ctl[_NR_USED] + nr_pages <= self._ctl[_CAP]

    def window(self, nr_pages: int) -> int:
        """A power of two of pages to bring at a time, at most `nr_pages`: a small part of the cap, since
        several are under way at a time, where not all fits."""
        if self.nr_pages <= self.cap_pages:
            return nr_pages
        return min(nr_pages, 1 << (max(1, self.cap_pages // 16).bit_length() - 1))

    def note_recent(self, index: int) -> None:
        """A fault has its folio. One instruction may need four pages at once (a move from one page border
        to another). If each of them were taken for the next, none would ever be there together: so the
        last ones that were asked for stay."""
        if index in self._recent:
            self._recent.remove(index)
        self._recent.append(index)

    def take_token(self, tid: int, folios: frozenset[int]) -> None:
        """As the swap token of the kernel was: of the threads that take each other's pages away, one
        at a time keeps its own, and so gets on. Lost soon after its last fault."""
        now = time.monotonic_ns()
        if tid == self._token_tid or now > self._token_until_ns:
            self._token, self._token_tid, self._token_until_ns = folios, tid, now + _TOKEN_NS

    def make_room(self, nr_pages: int) -> bool:
        """Whether nr_pages more fit now, clean ones given back for them."""
        if not self.room_for(nr_pages):
            self.shrink(nr_pages)
        return self.room_for(nr_pages)

    def shrink(self, nr_pages: int, last_resort: bool = False) -> int:
        """Gives back clean folios, the oldest first, until nr_pages more fit or a dirty one is older: an
        instruction that needs two pages would have one of them taken for the other, and the other for
        the one, for ever. The last resort: also recent ones. Returns how many."""
        freed = 0
        spared = set() if last_resort else set(self._recent)
        if time.monotonic_ns() <= self._token_until_ns:
            spared |= self._token
        pins = self.pins()  # passed over: those are never given back
        left = len(self._extents)  # each once, however many pieces it is taken in
        while left and not self.room_for(nr_pages):
            index, n = self._extents.popleft()
            take = min(n, max(nr_pages, 16))
            if take < n:
                self._extents.appendleft((index + take, n - take))
            else:
                left -= 1
            freed += self.evict_clean(index, take, requeue=True, spared=spared)
            if any(
                self.state(folio) in _NOT_HOME and not _in(pins, folio)
                for folio in range(index, index + take)
            ):
                break
        self.nr_reclaimed += freed
        return freed

    def evict_clean(
        self,
        index: int,
        nr_pages: int,
        requeue: bool = False,
        spared: Collection[int] = (),
    ) -> int:
        """Punches the clean folios of [index, index + nr_pages) out of the memfd: gone from every page
        table at once, private copies excepted. Returns how many."""
        freed = 0
        folio, end = index, index + nr_pages
        while folio < end:
            first = folio
            while folio < end and self.state(folio) == _UPTODATE and folio not in spared:
                folio += 1
            if folio > first:
                freed += folio - first
                self._punch(first, folio - first)
                continue
            if requeue and self.state(folio) not in _NOT_CHARGED:
                self._note_extent(folio, 1)
            folio += 1
        return freed

    def _punch(self, index: int, nr_pages: int) -> None:
        self.set_state(index, nr_pages, _EVICTING)
        try:
            punch_hole(self.data_fd, index << PAGE_SHIFT, nr_pages << PAGE_SHIFT)
        except OSError:
            self.set_state(index, nr_pages, _UPTODATE)
            raise
        for region in self.regions:
            region.unmap_folios(index, nr_pages)
        self.set_state(index, nr_pages, _ABSENT)

    # --- write-back -----------------------------------------------------------------------------

    def write_back(
        self, index: int, nr_pages: int, protect: Callable[[PageCache, int, int], None]
    ) -> Task:
        """Brings the dirty folios of [index, index + nr_pages) home. Each is write-protected in every
        page table before it is copied out, so that a store meanwhile makes it dirty again. Those that are
        pinned are written, and stay dirty and writable."""
        written = 0
        folio, end = index, index + nr_pages
        while folio < end:
            # One write at a time: an older copy must never land over a newer one, and what another
            # task is writing is on the disk before we say so.
            while self.writing is not None:
                yield self.writing
            first = folio
            pins = self.pins()
            pinned = _in(pins, first)
            while folio < end and folio - first < WRITEBACK_PAGES and self.state(folio) == _DIRTY:
                if _in(pins, folio) != pinned:
                    break
                folio += 1
            if folio == first:
                folio += 1
                continue
            written += folio - first
            done = self.writing = Event()
            try:
                yield from self._write_back_run(first, folio - first, protect, pinned)
            finally:
                self.writing = None
                done.happen()
        return written

    def _write_back_run(
        self,
        index: int,
        nr_pages: int,
        protect: Callable[[PageCache, int, int], None],
        pinned: bool,
    ) -> Task:
        buffer = self.buffers.get(nr_pages)
        try:
            if err := self.version_check():
                raise OSError(err, "the file changed since it was mapped")
            if not pinned:
                self.set_state(index, nr_pages, _WRITEBACK)
                protect(self, index, nr_pages)
            offset = index << PAGE_SHIFT
            nr_bytes = min(nr_pages << PAGE_SHIFT, self.size - offset)
            os.preadv(self.data_fd, [buffer.view[:nr_bytes]], offset)
            job = Job(lambda: _write_all(self.file_fd, buffer.view[:nr_bytes], offset))
            self._ctl[_NR_WRITING] += 1
            try:
                yield from self.run_job(job)
                self._ctl[_MTIME_NS] = os.fstat(self.file_fd).st_mtime_ns
            finally:
                self._ctl[_NR_WRITING] -= 1
            err = -min(job.result, 0)
            pins = self.pins()  # since then
            for folio in range(index, index + nr_pages):
                if self.state(folio) == _WRITEBACK:  # else a store made it dirty meanwhile
                    self.set_state(folio, 1, _DIRTY if err or _in(pins, folio) else _UPTODATE)
            if err:
                self._ctl[_WB_ERR_SEQ] += 1
                self._ctl[_WB_ERR] = err
                raise OSError(err, os.strerror(err))
        finally:
            self.buffers.put(buffer)
        return nr_pages

    def run_job(self, job: Job) -> Generator[Event, None, None]:
        """Has a worker do what needs our descriptors: they stay open until it is done."""
        self._nr_jobs += 1
        self.workers.submit(job)
        yield job
        self._nr_jobs -= 1

    def fsync(self) -> Generator[Event, None, None]:
        job = Job(lambda: _fsync(self.file_fd))
        yield from self.run_job(job)
        if job.result < 0:
            raise OSError(-job.result, os.strerror(-job.result))

    @property
    def busy(self) -> bool:
        """A worker is using the descriptors."""
        return self._nr_jobs > 0 or any(not read.happened for read in self.reads.values())

    def oldest_dirty(self) -> tuple[int, int] | None:
        """The first run of dirty folios in the order they were filled; at most WRITEBACK_PAGES. None that
        is pinned: it would not be clean afterwards."""
        pins = self.pins()
        for index, nr_pages in self._extents:
            for folio in range(index, index + nr_pages):
                if self.state(folio) == _DIRTY and not _in(pins, folio):
                    end = min(folio + WRITEBACK_PAGES, index + nr_pages)
                    stop = next((at for at in range(folio, end) if _in(pins, at)), end)
                    return folio, stop - folio
        return None

    def take_write_back_error(self) -> int:
        """errno of a write-back that failed since the last one who asked, or 0."""
        if self._ctl[_WB_ERR_SEQ] == self._seen_wb_err:
            return 0
        self._seen_wb_err = self._ctl[_WB_ERR_SEQ]
        return self._ctl[_WB_ERR]

    def close(self) -> None:
        for view in (self._ctl, self.folios, self._slots, self._pins):
            view.release()
        self._map.close()
        for fd in (self.ctl_fd, self.data_fd, self.file_fd):
            os.close(fd)


def _in(pins: list[range], folio: int) -> bool:
    return any(folio in pin for pin in pins)


def _fsync(fd: int) -> int:
    os.fsync(fd)
    return 0


def _write_all(fd: int, view: memoryview, offset: int) -> int:
    done = 0
    while done < len(view):
        n = os.pwrite(fd, view[done:], offset + done)
        if n == 0:
            return -errno.EIO
        done += n
    return done
