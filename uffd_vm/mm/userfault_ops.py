"""A region whose faults userfaultfd sends to us: what it is asked, and who does it.

That is the native library, or for service "python" the fault-service process, whose answers come as
OSError. Owns the native region; the page cache is shared with other regions and counted by its registry.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NoReturn

from uffd_vm.errors import BudgetExceeded, StaleRegionError, UffdVmError
from uffd_vm.fault.pte import MARKERS, PteState
from uffd_vm.fault.settle import EHWPOISON
from uffd_vm.kernel._lib import CData, check, ffi, lib
from uffd_vm.kernel.mapping import PageCategory
from uffd_vm.mm import failure, pagemap
from uffd_vm.mm.page_cache import PageCache
from uffd_vm.mm.vm_ops import POPULATE, Advice, Hold, Memory
from uffd_vm.page import PAGE_SIZE
from uffd_vm.stats import Latency, Stats, TraceRecord, decode_counters, decode_trace

if TYPE_CHECKING:
    from uffd_vm.service.failure import InlineHandlers

__all__ = ["UserfaultOps"]

_ENSURE_TRIES = 8
_WRITTEN = bytes(state == PteState.PRESENT for state in range(256))
_KEEP_CHANGES = (
    "what was not written is still in memory: copy it out of the region, then discard() it"
)


class UserfaultOps(Memory):
    """A region whose faults userfaultfd sends to us."""

    def __init__(
        self,
        name: str,
        start: int,
        nbytes: int,
        *,
        handle: int,
        cache: PageCache | None,
        shared: bool,
        writable: bool,
        tracked: bool,
        before_end: Callable[[], None] | None,
        release: Callable[[], None],
        request: Callable[[str, int, int, int], int] | None = None,
        handlers: InlineHandlers | None = None,
        user_mode_only: bool = False,
    ) -> None:
        super().__init__(name, start, nbytes)
        self._before_end = before_end  # service="python": the process lets it go
        self._handle = handle
        self.cache = cache
        self._shared = shared
        self._writable = writable
        self._tracked = tracked
        self._release = release
        self._request = request  # service="python": the process does it
        self._handlers = handlers  # service="inline": who serves it
        self._user_mode_only = user_mode_only  # faults of system calls are not served
        self._lost = False
        self._forked = False

    @property
    def handle(self) -> int:
        return self._handle

    @property
    def asks_process(self) -> bool:
        return self._request is not None

    # --- life -------------------------------------------------------------------------------------

    @property
    def lost(self) -> bool:
        if not self._lost and not self.closed:
            self._lost = lib.uvm_region_check(self.handle) not in (0, -errno.ESTALE)
        return self._lost

    def in_forked_child(self) -> None:
        # The fault-service process is the parent's; here native code serves.
        self._request = None
        self._before_end = None
        self._forked = True

    def close_begin(self) -> None:
        self._check(lib.uvm_region_close_begin(self.handle), "close")

    def close_abort(self) -> None:
        self._check(lib.uvm_region_close_abort(self.handle), "close")

    def close_end(self) -> None:
        try:
            # A store that another thread made between the flush and the unmapping; now nobody can.
            if self.flush_late and self._writable and self.cache and self.cache.dirty_bytes:
                self.flush_all()
        finally:
            self._end()

    def _end(self) -> None:
        self.closed = True
        try:
            if self._before_end is not None:
                self._before_end()
        finally:
            rc = lib.uvm_region_close_end(self.handle)
            self._release()
        check(rc, f"close of region {self.name!r}")

    def _check_registered(self) -> None:
        super().check_open()
        if self.lost:
            raise StaleRegionError(self._why_lost())
        self._check(lib.uvm_region_check(self.handle), "check")

    def _why_lost(self) -> str:
        rc = lib.uvm_region_check(self.handle)
        what = "could not be served in the forked child"
        if rc == lib.UVM_LOST_TO_CLOSE:
            what = "can no longer be served in process"
        why = bytes(ffi.string(lib.uvm_lost_reason(-rc))).decode()
        return f"region {self.name!r} {what} {os.getpid()} and was made inaccessible there: {why}"

    def check_open(self) -> None:
        self._check_registered()
        if self._handlers is not None:
            self._handlers.require()

    def _check(self, rc: int, what: str) -> int:
        return check(rc, what, region=self.name)

    def check(self) -> None:
        self._check_registered()
        if self._handlers is not None:
            self._handlers.check()
        self._check_failed(clear=True)

    def _check_sticky(self) -> None:
        """Raises a failure that nobody could be told of, and leaves it for check() to clear."""
        self.check_open()
        self._check_failed(clear=False)

    def _check_failed(self, *, clear: bool) -> None:
        found = ffi.new("struct uvm_failure *")
        if self._check(lib.uvm_region_failed(self.handle, found, clear), "check"):
            who = "a touch in a thread that could not be told failed: "
            self._raise(int(found.index), int(found.kind), int(found.err), who=who)

    def _raise(self, index: int | None, kind: int, err: int, **words: str) -> NoReturn:
        raise failure.exception(kind, failure.details(self.name, index, kind, err, **words))

    def _raise_errno(self, rc: int, what: str, index: int | None, *, cure: str = "") -> NoReturn:
        """For calls that do the work of a fault: -errno tells what became of the source; where it tells
        nothing, `what` does."""
        self.check_open()  # -ESTALE of a closed region
        self._raise(index, failure.kind_of(-rc), -rc, what=what, cure=cure)

    def _ask(self, op: str, index: int, nr_pages: int) -> int:
        """service="python": the fault-service process does it."""
        assert self._request is not None
        try:
            return self._request(op, self.handle, index, nr_pages)
        except UffdVmError:
            raise
        except OSError as error:
            failed: int | None = getattr(error, "failed_index", None)
            rc = -(error.errno or errno.EIO)
            if op == "flush":
                self._raise_errno(rc, "write-back failed", failed, cure=_KEEP_CHANGES)
            self._raise_errno(rc, "" if op in ("load", "prefetch") else f"{op} failed", failed)

    # --- pages --------------------------------------------------------------------------------------

    def advise(self, advice: str) -> None:
        self._check_sticky()
        self._check(lib.uvm_region_advise(self.handle, Advice[advice][0]), "advise")

    def prefetch(self, index: int, nr_pages: int) -> None:
        self._check_sticky()
        if self._request:
            self._ask("prefetch", index, nr_pages)
            return
        rc = lib.uvm_region_prefetch(self.handle, index, nr_pages)
        if rc != -errno.EAGAIN:  # the queue is full: prefetch is advice, the fault will do it
            self._check(rc, "prefetch")

    def load(self, index: int, nr_pages: int) -> None:
        self._check_sticky()
        if self._request:
            self._check(lib.uvm_region_unpoison(self.handle, index, nr_pages), "load")
            self._ask("load", index, nr_pages)
            return
        failed = ffi.new("uint64_t *")
        rc = lib.uvm_region_load(self.handle, index, nr_pages, failed)
        if rc < 0:
            self._raise_errno(rc, "", failed[0])

    def ensure(
        self, index: int, nr_pages: int, access: str, hold: Hold = contextlib.nullcontext
    ) -> None:
        for _ in range(_ENSURE_TRIES):
            self.load(index, nr_pages)  # says which page failed, and why
            with hold():
                rc = self._madvise(index, nr_pages, POPULATE[access])
                if rc == 0 or (rc == -errno.EINVAL and not pagemap.can_populate()):
                    return  # before Linux 5.14: loaded is what we can do
                if rc not in (-errno.EFAULT, -EHWPOISON):
                    break
                if self._user_mode_only:  # a missing or protected page is EFAULT to system calls
                    lib.uvm_touch(self._address(index), nr_pages, access == "write")
                    return
            # Taken away again, or failed, since it was loaded.
        with hold():
            bad = index + self._nr_populated(index, nr_pages, POPULATE[access])
        what = "the page could not be made present and mapped, by the kernel's word"
        if rc == -errno.EINVAL:
            what = "nothing may store here any more, since page_mkwrite, or an error, denied it"
            rc = -errno.EACCES
        self._raise(bad, lib.UVM_FAILURE_SOURCE, -rc, what=what, cure="map it again")

    def _nr_populated(self, index: int, nr_pages: int, advice: int) -> int:
        """How many pages from `index` on can be populated, of which the last of `nr_pages` can not."""
        good, bad = 0, nr_pages
        while bad - good > 1:
            middle = (good + bad) // 2
            if self._madvise(index + good, middle - good, advice) == 0:
                good = middle
            else:
                bad = middle
        return good

    @contextlib.contextmanager
    def pin(self, index: int, nr_pages: int, access: str) -> Iterator[None]:
        if access == "read":  # what a device reads stays right, also where reclaim takes the page
            self.ensure(index, nr_pages, access)
            yield
            return
        number = None
        if self._shared:  # private pages are never taken away
            number = self._pin(index, nr_pages)
        try:
            self.ensure(index, nr_pages, access)
            try:
                yield
            finally:
                self._set_dirty(index, nr_pages)
        finally:
            if number is not None:
                self._check(lib.uvm_region_unpin(self.handle, number), "pin")

    def _pin(self, index: int, nr_pages: int) -> int:
        self.check_open()
        number = int(lib.uvm_region_pin(self.handle, index, nr_pages))
        if number == -errno.ENOBUFS:
            _, cap = self.cache_sizes()
            raise BudgetExceeded(
                f"pin: region {self.name!r}: with these {nr_pages} pages more than half of the cap of the "
                f"file's page cache ({cap // PAGE_SIZE} pages) would be pinned, and what is pinned cannot be "
                "evicted. Pin smaller ranges one after another, end other pins first, or map it with a "
                "larger cap="
            )
        if number == -errno.EMFILE:
            raise BudgetExceeded(
                f"pin: region {self.name!r}: too many ranges of its file are pinned at a time; end some of "
                "them first, or pin fewer and larger ones"
            )
        return self._check(number, "pin")

    def _set_dirty(self, index: int, nr_pages: int) -> None:
        """As unpin_user_pages_dirty_lock(): no page table has seen what a device stored after a protect(),
        or while a write-back that was under way when it began took its copy."""
        rc = self._madvise(index, nr_pages, POPULATE["write"])
        if rc == -errno.EFAULT:  # in user mode only, a protected page
            lib.uvm_touch(self._address(index), nr_pages, 1)
        elif rc < 0:
            self._raise_errno(rc, "what was pinned could not be marked dirty", None)

    def evict(self, index: int, nr_pages: int) -> int:
        self._check_sticky()
        if self._request:
            return self._ask("evict", index, nr_pages)
        return self._check(lib.uvm_region_evict(self.handle, index, nr_pages), "evict")

    def flush(self, index: int, nr_pages: int) -> None:
        self._check_sticky()
        self._write_back(index, nr_pages)

    def flush_all(self) -> None:
        # The last chance: what else is to be told of the region does not keep changes from going home.
        super().check_open()
        if not self.lost:
            self._write_back(0, self.nr_pages)
        elif (
            not self._forked
            and self._shared
            and self._writable
            and self.cache
            and self.cache.dirty_bytes
        ):
            raise StaleRegionError(
                f"{self._why_lost()}. What was written to it since the last flush() is lost; discard() it"
            )  # in a forked child it goes home from the parent

    def _write_back(self, index: int, nr_pages: int) -> None:
        if not (self._shared and self._writable):
            return  # nothing here ever goes home
        if self._request:
            self._ask("flush", index, nr_pages)
        elif (rc := lib.uvm_region_flush(self.handle, index, nr_pages)) < 0:
            self._raise_errno(rc, "write-back failed", None, cure=_KEEP_CHANGES)
        self._check_home()

    def protect(self, index: int, nr_pages: int, written: mmap.mmap | None = None) -> int:
        self._check_sticky()
        into = ffi.NULL if written is None else ffi.from_buffer("uint8_t[]", written)
        if self._request:
            # What was written stays noted beside the page table until it is taken here.
            armed = self._ask("protect" if written is None else "collect", index, nr_pages)
            rc = lib.uvm_region_written(self.handle, index, nr_pages, into, 1)
            self._check(rc, "protect")
            return armed
        return self._check(lib.uvm_region_protect(self.handle, index, nr_pages, into), "protect")

    def _wait_published(self) -> None:
        """The ioctl that grants a store wakes the storing thread; that the page is dirty is published
        after it, under a page-table lock. Protecting nothing takes all of these once: then it is."""
        if self._tracked:
            self.protect(0, 0)

    def walk(self, index: int, nr_pages: int) -> bytes:
        self._settle()
        states = ffi.new("uint8_t[]", nr_pages)
        self._check(lib.uvm_region_walk(self.handle, index, nr_pages, states), "walk")
        return bytes(ffi.buffer(states))

    def ptes(self, index: int, nr_pages: int) -> bytes:
        self._wait_published()
        ptes = lib.uvm_region_ptes(self.handle)
        if ptes == ffi.NULL:
            self._check(-errno.ESTALE, "walk")
        return bytes(ffi.buffer(ptes + index, nr_pages))

    def written(self, index: int, nr_pages: int) -> bytes:
        # The entries first: what is armed was noted before.
        found = bytearray(self.ptes(index, nr_pages).translate(_WRITTEN))
        into = ffi.from_buffer("uint8_t[]", found)
        self._check(lib.uvm_region_written(self.handle, index, nr_pages, into, 0), "walk")
        return bytes(found)

    # --- numbers ------------------------------------------------------------------------------------

    def mapped_pages(self) -> int:
        self.check_open()
        n = pagemap.nr_pages_with(self.start, self.end, need=PageCategory.PRESENT)
        return int(self._ctl().nr_present) if n is None else n

    def resident_pages(self) -> int:
        self._settle()
        return self._check(lib.uvm_region_resident(self.handle), "residency")

    def dirty_pages(self) -> int:
        self._settle()
        if not self._writable:
            return 0
        if self._shared and self.cache is not None:
            return self.cache.dirty_bytes // PAGE_SIZE
        return self._private_pages()

    def _nr_swapped(self, start: int, end: int) -> int:
        index, nr_pages = (start - self.start) // PAGE_SIZE, (end - start) // PAGE_SIZE
        ptes = self.ptes(index, nr_pages)
        return nr_pages - sum(ptes.count(state) for state in MARKERS)

    def cache_sizes(self) -> tuple[int, int]:
        self.check_open()
        return (self.cache.used_bytes, self.cache.cap_bytes) if self.cache else (0, 0)

    def _settle(self) -> None:
        """A toucher runs on before its fault is counted: afterwards its own faults are."""
        self.check_open()
        self._check(lib.uvm_region_settle(self.handle), "stats")

    def _ctl(self) -> CData:
        self._settle()
        ctl = lib.uvm_region_ctl(self.handle)
        if ctl == ffi.NULL:
            self._check(-errno.ESTALE, "stats")
        return ctl

    def stats(self) -> Stats:
        ctl = self._ctl()
        return Stats(
            decode_counters(ffi.unpack(ctl.counters, len(ctl.counters))),
            Latency(tuple(ffi.unpack(ctl.latency, len(ctl.latency)))),
        )

    def trace(self) -> list[TraceRecord]:
        ctl = self._ctl()
        before = ctl.trace_head
        ring = bytes(ffi.buffer(ctl.trace))
        return decode_trace(ring, before, ctl.trace_head)
