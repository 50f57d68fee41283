"""The fault path, function by function as mm/memory.c (6.12) has it, on a userfaultfd.

    handle_mm_fault -> handle_pte_fault -> do_pte_missing -> do_anonymous_page
                                                          -> do_fault -> do_read_fault
                                                                      -> do_cow_fault
                                                                      -> do_shared_fault
                                        -> do_wp_page     -> wp_page_reuse | wp_page_shared
                                        -> do_swap_page   -> folio_wait | do_poison | ...
    __do_fault brings a folio in, finish_fault commits it (mfill: userfaultfd.py)

What to do is not decided here: handle_pte_fault() asks uffd_vm.fault for the row, and every level below
follows its action through a table, to a function that does it; the row's commit leads to an ioctl the
same way, and how that ended to a settlement. There is no `if` on kind, backing or state.

Rules of the page locks (typestate.py says how they are proven): what can sleep is done with nothing
but the region's read lock; then the page's lock is taken, the entry compared with what was walked,
and committed with one ioctl or thrown away (VM_FAULT_NOPAGE, never an error). State is published
before the waiters are woken. After handle_mm_fault() the region must be looked up again.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic

from uffd_vm.errors import StaleRegionError
from uffd_vm.fault.action import Action, Counter, ErrnoClass, Settlement, Truth
from uffd_vm.fault.fault import VM_FAULT_ERROR, Access, FaultFlag, FaultKind, FaultResult
from uffd_vm.fault.pte import PteState
from uffd_vm.kernel._lib import lib
from uffd_vm.page import PAGE_SHIFT, PAGE_SIZE
from uffd_vm.service.fault_service import policy
from uffd_vm.service.fault_service.address_space import CACHED_SHIFT, Region
from uffd_vm.service.fault_service.completion import Event
from uffd_vm.service.fault_service.filemap import CHANGED, PageCache, Read, ZeroFolio
from uffd_vm.service.fault_service.typestate import (
    FolioLocked,
    Installed,
    P,
    PteLocked,
    VmaLocked,
    Walked,
    held,
    install,
    lock_folio,
    lock_pte,
    lock_vma,
    pte_same,
    pte_unmap_same,
    same_page,
    walk,
)
from uffd_vm.service.fault_service.userfaultfd import (
    BRINGS,
    DONTWAKE,
    TAKES_CONTENT,
    UNPROTECT,
    WP_DONTWAKE,
    mfill,
)

if TYPE_CHECKING:
    from uffd_vm.service.fault_service.mm import Mm

__all__ = ["VmFault", "handle_mm_fault"]

log = logging.getLogger("uffd_vm.service")

#: vm_fault_t: FaultResult bits, as a plain int on this path.
VmFaultT = int

_RETRY = int(FaultResult.RETRY)
_NOPAGE = int(FaultResult.NOPAGE)
_MAJOR = int(FaultResult.MAJOR)
_ERROR = int(VM_FAULT_ERROR)
_DEADLINE = int(FaultFlag.DEADLINE)
_WRITE = int(Access.WRITE)
_MISSING = int(FaultKind.MISSING)
_SCAN = int(Action.SCAN)
_BEYOND_SIZE = int(FaultFlag.BEYOND_SIZE)
_PTE_MASK = (1 << CACHED_SHIFT) - 1
_NONE_WP = int(PteState.NONE_WP)
_WRITE_DENIED = int(FaultFlag.WRITE_DENIED)
_POISONED = int(PteState.POISONED)
_MAPPED_WP = frozenset((int(PteState.WRITE_PROTECTED), int(PteState.ZERO_WP)))
_DONE = int(Settlement.DONE)
_OK = int(ErrnoClass.OK)

_PGFAULT, _PGMAJFAULT = int(Counter.pgfault), int(Counter.pgmajfault)
_PGMINFAULT, _PGFAULT_FAILED = int(Counter.pgminfault), int(Counter.pgfault_failed)
_MAP_AROUND, _BYTES_READ = int(Counter.map_around), int(Counter.bytes_read)

_EIO, _CHARGE, _TIMEDOUT = int(ErrnoClass.EIO), int(ErrnoClass.CHARGE), int(ErrnoClass.TIMEDOUT)
_DENIED, _RACE = int(ErrnoClass.DENIED), int(ErrnoClass.RACE)
_FLAG_CACHED = int(FaultFlag.CACHED)
_SIGBUS = int(FaultResult.SIGBUS)

_ROW_UNREACHABLE = policy.row_id("UNREACHABLE")
_FAILURE_KIND = {
    _ROW_UNREACHABLE: lib.UVM_FAILURE_BUG,
    policy.row_id("p7"): lib.UVM_FAILURE_TIMEOUT,
    policy.row_id("X-OOM"): lib.UVM_FAILURE_OOM,
}
_ERRNO_OF_KIND = {
    lib.UVM_FAILURE_TIMEOUT: errno.ETIMEDOUT,
    lib.UVM_FAILURE_OOM: errno.ENOMEM,
}


class VmFault(Generic[P]):
    """struct vm_fault. The fault's identity stays; what changes while it is served comes after it.

    Names its region by handle and generation and never holds the object: it lives across waiting.
    """

    __slots__ = (
        "access",
        "address",
        "deadline_ns",
        "err",
        "first_ns",
        "flags",
        "generation",
        "handle",
        "index",
        "interrupted",
        "kind",
        "nr_pages",
        "pte",
        "refaults",
        "row",
        "settlement",
        "t_ns",
        "tid",
        "tries",
    )

    def __init__(self, region: Region, address: int, kind: int, access: int, tid: int) -> None:
        self.handle = region.handle
        self.generation = region.generation
        self.address = address
        self.index = (address - region.start) >> PAGE_SHIFT
        self.kind = kind
        self.access = access
        self.tid = tid
        self.t_ns = self.first_ns = time.monotonic_ns()
        self.deadline_ns = self.t_ns + region.deadline_ns
        self.tries = 0
        self.refaults = 0  # of the same thread here before it, none of which brought a page
        self.interrupted = False  # Ctrl-C arrived while it waited
        self.begin()

    def begin(self) -> None:
        """Start from the top: nothing of the last try is believed."""
        self.flags = self.pte = self.row = 0
        self.nr_pages = 0
        self.err = 0
        self.settlement = _DONE


# ---- entry -----------------------------------------------------------------------------------------


def handle_mm_fault(mm: Mm, vmf: VmFault[P]) -> VmFaultT:
    """Resolves a fault, or fails it, or parks it (RETRY). Nothing of the region is kept afterwards."""
    vmf.begin()
    try:
        with lock_vma(mm.space, vmf) as vma:
            return __handle_mm_fault(mm, vmf, vma)
    except StaleRegionError:
        # Dropped while the fault waited: whoever touched it runs into what is there now.
        mm.wake(vmf.address, 1)
        return _NOPAGE


def __handle_mm_fault(mm: Mm, vmf: VmFault[P], vma: VmaLocked[P]) -> VmFaultT:
    """Page by page: huge pages are the native service's matter, so HUGE_OK is never set here."""
    return handle_pte_fault(mm, vmf, vma)


def handle_pte_fault(mm: Mm, vmf: VmFault[P], vma: VmaLocked[P]) -> VmFaultT:
    """Reads the entry without its lock, asks the policy, and follows the row's action."""
    region = vma.region
    if vmf.kind == _MISSING and region.cache is not None and not region.private_pages:
        region.cache.disown(region.pgoff + vmf.index)
    with walk(vma, vmf.kind) as walked:
        flags = region.flags | walked.orig_pte >> CACHED_SHIFT
        if region.cache is not None and region.pgoff + vmf.index >= region.cache.nr_pages:
            flags |= _BEYOND_SIZE
        if vmf.access == _WRITE and not region.writable:
            flags |= _WRITE_DENIED
        if (vmf.tries or vmf.refaults) and time.monotonic_ns() >= vmf.deadline_ns:
            flags |= _DEADLINE
        vmf.flags = flags
        vmf.pte = walked.orig_pte & _PTE_MASK
        vmf.row = policy.decide(vmf.kind, vmf.access, region.backing, vmf.pte, flags)
        return _HANDLE_PTE_FAULT[policy.ACTION[vmf.row]](mm, vmf, walked)


def do_pte_missing(mm: Mm, vmf: VmFault[P], walked: Walked[P]) -> VmFaultT:
    return _DO_PTE_MISSING[policy.ACTION[vmf.row]](mm, vmf, walked)


# ---- anonymous memory ------------------------------------------------------------------------------


def do_anonymous_page(mm: Mm, vmf: VmFault[P], walked: Walked[P]) -> VmFaultT:
    """The zero page, or a page of fresh zeros."""
    with lock_folio(walked, mm.zero_folio) as folio:
        return finish_fault(mm, vmf, walked, folio)


# ---- file-backed memory ----------------------------------------------------------------------------


def do_fault(mm: Mm, vmf: VmFault[P], walked: Walked[P]) -> VmFaultT:
    return _DO_FAULT[policy.ACTION[vmf.row]](mm, vmf, walked)


def do_read_fault(mm: Mm, vmf: VmFault[P], walked: Walked[P]) -> VmFaultT:
    read = __do_fault(mm, vmf, walked)
    if isinstance(read, int):
        return read
    with lock_folio(walked, read) as folio:
        ret = finish_fault(mm, vmf, walked, folio)
    mm.read_ahead(walked.region, walked.index, vmf.nr_pages)
    return ret


def do_cow_fault(mm: Mm, vmf: VmFault[P], walked: Walked[P]) -> VmFaultT:
    """A private copy: made by our COPY, or by the kernel once the page cache has the folio."""
    read = __do_fault(mm, vmf, walked)
    if isinstance(read, int):
        return read
    with lock_folio(walked, read) as folio:
        return finish_fault(mm, vmf, walked, folio)


def do_shared_fault(mm: Mm, vmf: VmFault[P], walked: Walked[P]) -> VmFaultT:
    read = __do_fault(mm, vmf, walked)
    if isinstance(read, int):
        return read
    with lock_folio(walked, read) as folio:
        if ret := do_page_mkwrite(mm, vmf, walked):
            return ret
        return finish_fault(mm, vmf, walked, folio)


def do_fault_around(mm: Mm, vmf: VmFault[P], walked: Walked[P]) -> VmFaultT:
    """map_pages(): what is cached, no I/O. Where the kernel maps it by itself, only a wake."""
    region, index = walked.region, walked.index
    cache = region.cache
    assert cache is not None
    content: Read | ZeroFolio = mm.zero_folio
    if policy.COMMIT[vmf.row] in TAKES_CONTENT:
        content = cache.read_cached(region.pgoff + index, 1)
    with lock_folio(walked, content) as folio:
        return finish_fault(mm, vmf, walked, folio)


def __do_fault(mm: Mm, vmf: VmFault[P], walked: Walked[P]) -> Read | VmFaultT:
    """filemap_fault(): the folio, complete and not yet locked; or bits that say why not.

    RETRY: the read has been started, or joined, and the fault is parked on it.
    """
    region, index = walked.region, walked.index
    cache = region.cache
    assert cache is not None
    folio = region.pgoff + index
    read = cache.reads.get(folio)
    if read is None:
        if vmf.flags & _FLAG_CACHED:
            return cache.read_cached(folio, 1)
        around = 1 if region.control.advice == lib.UVM_ADVICE_RANDOM else region.fault_around_pages
        first, end = region.absent_run(index, cache.window(around))
        if not cache.make_room(end - first):
            first, end = index, index + 1
            if not cache.make_room(1):
                return mem_cgroup_charge_failed(mm, vmf, walked, cache)
        read = cache.start_read(region.pgoff + first, end - first)
        region.control.counters[_BYTES_READ] += (end - first) << PAGE_SHIFT
    if not read.happened:
        return retry(mm, vmf, walked, read)
    if read.err:
        err = read.err
        read.pins += 1
        read.unpin()
        return settle_errno(mm, vmf, walked, _EIO, err)
    return read


def mem_cgroup_charge_failed(
    mm: Mm, vmf: VmFault[P], walked: Walked[P], cache: PageCache
) -> VmFaultT:
    """The cap is reached and nothing clean is left: write dirty pages back and start again."""
    event = mm.start_write_back(cache)
    if event is not None:
        return retry(mm, vmf, walked, event)
    if cache.shrink(1, last_resort=True):
        return retry(mm, vmf, walked, mm.after(0))
    return settle_errno(mm, vmf, walked, _CHARGE, errno.ENOMEM)


def do_page_mkwrite(mm: Mm, vmf: VmFault[P], walked: Walked[P]) -> VmFaultT:
    """Asks the hook, where there is one, with no page lock held. 0: the write may go on."""
    held(walked)
    region, index = walked.region, walked.index
    hook = region.page_mkwrite
    if hook is None:
        return 0
    try:
        answer = hook((region.pgoff + index) << PAGE_SHIFT, PAGE_SIZE)
    except Exception:
        log.exception("page_mkwrite of page %d failed: the write is denied", index)
        answer = "deny"
    return _MKWRITE_ANSWERS.get(answer, mkwrite_deny)(mm, vmf, walked)


def mkwrite_ok(mm: Mm, vmf: VmFault[P], walked: Walked[P]) -> VmFaultT:
    return 0


def mkwrite_wait(mm: Mm, vmf: VmFault[P], walked: Walked[P]) -> VmFaultT:
    if time.monotonic_ns() >= vmf.deadline_ns:
        return settle_errno(mm, vmf, walked, _TIMEDOUT, errno.ETIMEDOUT)
    return retry(mm, vmf, walked, mm.after(min(1 << vmf.tries, 32) * 1_000_000))


def mkwrite_deny(mm: Mm, vmf: VmFault[P], walked: Walked[P]) -> VmFaultT:
    return settle_errno(mm, vmf, walked, _DENIED, errno.EACCES)


# ---- write protection ------------------------------------------------------------------------------


def do_wp_page(mm: Mm, vmf: VmFault[P], walked: Walked[P]) -> VmFaultT:
    return _DO_WP_PAGE[policy.ACTION[vmf.row]](mm, vmf, walked)


def wp_page_shared(mm: Mm, vmf: VmFault[P], walked: Walked[P]) -> VmFaultT:
    if ret := do_page_mkwrite(mm, vmf, walked):
        return ret
    return wp_page_reuse(mm, vmf, walked)


def wp_page_reuse(mm: Mm, vmf: VmFault[P], walked: Walked[P]) -> VmFaultT:
    """The page stays where it is, writable. Nothing is copied, so no folio is locked."""
    with lock_folio(walked, mm.zero_folio) as folio:
        return finish_fault(mm, vmf, walked, folio)


# ---- not present, and not empty; and what comes before the walk -------------------------------------


def do_swap_page(mm: Mm, vmf: VmFault[P], walked: Walked[P]) -> VmFaultT:
    if not pte_unmap_same(walked):
        return settle_errno(mm, vmf, walked, _RACE, 0)
    return _DO_SWAP_PAGE[policy.ACTION[vmf.row]](mm, vmf, walked)


def folio_wait(mm: Mm, vmf: VmFault[P], walked: Walked[P]) -> VmFaultT:
    """migration_entry_wait(): another handler owns the page."""
    if vmf.flags & _DEADLINE:  # the row does not know how long we have waited already
        return settle_errno(mm, vmf, walked, _TIMEDOUT, errno.ETIMEDOUT)
    region = walked.region
    read = region.cache.reads.get(region.pgoff + walked.index) if region.cache else None
    count(region, vmf.row)
    return retry(mm, vmf, walked, read if read is not None else mm.after(1_000_000))


def do_poison(mm: Mm, vmf: VmFault[P], walked: Walked[P]) -> VmFaultT:
    return poison_page(mm, vmf, walked, vmf.row, policy.RESULT[vmf.row])


def wake_up(mm: Mm, vmf: VmFault[P], walked: Walked[P]) -> VmFaultT:
    """Nothing to bring: the thread runs its instruction again."""
    return wp_page_reuse(mm, vmf, walked)


def deny_write(mm: Mm, vmf: VmFault[P], walked: Walked[P]) -> VmFaultT:
    """The owner takes the write permission away; then the kernel tells the writer."""
    vmf.err = errno.ETIMEDOUT if vmf.flags & _DEADLINE else errno.EACCES
    mm.agent.protect_read(walked.region.handle, walked.index, 1)
    return end(mm, vmf, walked, vmf.row, policy.RESULT[vmf.row])


def scan(mm: Mm, vmf: VmFault[P], walked: Walked[P]) -> VmFaultT:
    """The page is missing, and we believed it present: the kernel knows."""
    return verify(mm, vmf, walked, _NOPAGE, vmf.row)


def bug(mm: Mm, vmf: VmFault[P], walked: Walked[P]) -> VmFaultT:
    """An action that this executor does not have: loud, and never a loop."""
    log.error("no executor for %s of page %d", Action(policy.ACTION[vmf.row]).name, vmf.index)
    return poison_page(mm, vmf, walked, _ROW_UNREACHABLE, _SIGBUS)


# ---- the commit ------------------------------------------------------------------------------------


def finish_fault(mm: Mm, vmf: VmFault[P], walked: Walked[P], folio: FolioLocked[P]) -> VmFaultT:
    """Everything that can sleep is behind us: take the page's lock, compare, commit or throw away."""
    same_page(walked, folio)
    with lock_pte(walked) as pte:
        if not pte_same(pte, walked):
            errno_class = _RACE
        else:
            errno_class = set_pte_range(mm, vmf, pte, folio)
    if errno_class == _OK:
        return policy.RESULT[vmf.row]
    return settle_errno(mm, vmf, walked, errno_class, vmf.err)


def set_pte_range(mm: Mm, vmf: VmFault[P], pte: PteLocked[P], folio: FolioLocked[P]) -> int:
    """The ioctls, and the stores that publish them; returns an ErrnoClass.

    The page the fault is about goes by its row; the others that came with it (fault-around) go by what
    the policy would do for a reader of one, and each may fail without anybody minding.
    """
    same_page(pte, folio)
    region, index, row = pte.region, pte.index, vmf.row
    commit = policy.COMMIT[row]
    if _MARKS_DIRTY[policy.ACTION[row]] and region.shared:
        cache = region.cache
        if cache is not None and commit == UNPROTECT:
            cache.mark_dirty(region.pgoff + index)  # before the store can happen
    first, end = index, index + 1
    read = folio.read
    if read.nr_pages > 1:
        lowest = max(read.index - region.pgoff, 0)
        highest = min(read.index - region.pgoff + read.nr_pages, region.nr_pages)
        first, end = region.empty_run(index, lowest, highest)
    if commit != region.neighbour_commit:
        around = region.neighbour_commit
        errno_class = mfill(mm, region, index, index + 1, commit, read, vmf)
        if errno_class == _OK and first < index:
            mfill(mm, region, first, index, around, read, None)
        if errno_class == _OK and end > index + 1:
            mfill(mm, region, index + 1, end, around, read, None)
    else:
        errno_class = mfill(mm, region, first, end, commit, read, vmf)
    if errno_class != _OK:
        return errno_class
    next_pte = policy.NEXT_PTE[row]
    if next_pte != policy.KEEP and next_pte != region.ptes[index]:
        region.set_ptes(index, 1, next_pte)
    if _MARKS_DIRTY[policy.ACTION[row]] and region.shared and region.cache is not None:
        region.cache.mark_dirty(region.pgoff + index)
    vmf.nr_pages = end - first
    if region.cache is not None:
        region.cache.note_recent(region.pgoff + index)
    if commit not in BRINGS:  # only a wake: the kernel should have the page, and may not
        mm.note_refault(vmf)
    with install(pte, first, end - first, mm.wake_region) as installed:
        update_mmu_cache(mm, vmf, installed)
    return _OK


def update_mmu_cache(mm: Mm, vmf: VmFault[P], installed: Installed[P]) -> None:
    """Last thing before the waiters run: count and trace, so that nobody is ahead of the record."""
    held(installed)
    control = installed.region.control
    count(installed.region, vmf.row)
    if installed.nr_pages > 1:
        control.counters[_MAP_AROUND] += installed.nr_pages - 1
    mm_account_fault(installed.region, vmf, policy.RESULT[vmf.row])


# ---- how it ended, when not well -------------------------------------------------------------------


def retry(mm: Mm, vmf: VmFault[P], walked: Walked[P], event: Event) -> VmFaultT:
    """VM_FAULT_RETRY: parked. When the event has happened the fault starts from the top, TRIED."""
    held(walked)
    vmf.settlement = _SETTLED_RETRY
    trace(walked.region, vmf, _RETRY, time.monotonic_ns())
    mm.park(vmf, event)
    return _RETRY


def settle_errno(
    mm: Mm, vmf: VmFault[P], walked: Walked[P], errno_class: int, err: int
) -> VmFaultT:
    """The action or the commit failed: what follows is settle()'s to say."""
    settlement, result, row = policy.settle(policy.COMMIT[vmf.row], errno_class)
    vmf.settlement = settlement
    vmf.err = err
    return _SETTLEMENTS[settlement](mm, vmf, walked, result, row)


def settled_retry(
    mm: Mm, vmf: VmFault[P], walked: Walked[P], result: VmFaultT, row: int
) -> VmFaultT:
    if time.monotonic_ns() >= vmf.deadline_ns:
        return settle_errno(mm, vmf, walked, _TIMEDOUT, errno.ETIMEDOUT)
    count(walked.region, row)
    return retry(mm, vmf, walked, mm.after(min(vmf.tries, 10) * 100_000))


def verify(mm: Mm, vmf: VmFault[P], walked: Walked[P], result: VmFaultT, row: int) -> VmFaultT:
    """WAKE, ask the kernel, and believe it: the entry becomes what the kernel says."""
    region, index = walked.region, walked.index
    mm.wake(vmf.address, 1)
    truth = mm.pagemap_scan(region.address(index))
    # The kernel's swap entries look like poison, or like a marker: what we know tells them apart.
    if truth == Truth.POISONED and region.ptes[index] != _POISONED:
        truth = Truth.PRESENT
    elif (
        truth == Truth.MARKER
        and region.ptes[index] in _MAPPED_WP
        # But a page that is swapped out does not fault as missing.
        and (vmf.kind != _MISSING or policy.ACTION[vmf.row] != _SCAN)
    ):
        truth = Truth.PRESENT_WP
    settlement, result, row = policy.settle_truth(policy.COMMIT[vmf.row], truth, region.backing)
    vmf.settlement = settlement
    with lock_pte(walked) as pte:
        if row != policy.KEEP and policy.NEXT_PTE[row] != policy.KEEP:
            pte.region.set_ptes(index, 1, policy.NEXT_PTE[row])
    return _SETTLEMENTS[settlement](mm, vmf, walked, result, row)


def drop(mm: Mm, vmf: VmFault[P], walked: Walked[P], result: VmFaultT, row: int) -> VmFaultT:
    """A lost race, or nobody to serve: what was prepared goes back with its guard; never an error."""
    return end(mm, vmf, walked, row, result)


def poison(mm: Mm, vmf: VmFault[P], walked: Walked[P], result: VmFaultT, row: int) -> VmFaultT:
    return poison_page(mm, vmf, walked, row, result)


def reclaim(mm: Mm, vmf: VmFault[P], walked: Walked[P], result: VmFaultT, row: int) -> VmFaultT:
    """No memory: progress is a retry; without any the row says how it ends (its action)."""
    cache = walked.region.cache
    if cache is not None and time.monotonic_ns() < vmf.deadline_ns and cache.shrink(1):
        return retry(mm, vmf, walked, mm.after(0))
    vmf.row = row
    return _HANDLE_PTE_FAULT[policy.ACTION[row]](mm, vmf, walked)


def deny(mm: Mm, vmf: VmFault[P], walked: Walked[P], result: VmFaultT, row: int) -> VmFaultT:
    """The page must stay as it is: the owner takes the permission away, and the access fails."""
    mm.agent.protect_read(walked.region.handle, walked.index, 1)
    return end(mm, vmf, walked, row, result)


def end(mm: Mm, vmf: VmFault[P], walked: Walked[P], row: int, result: VmFaultT) -> VmFaultT:
    """Counts, traces, wakes; nothing was installed, so the thread may fault here again."""
    held(walked)
    region = walked.region
    count(region, row)
    mm_account_fault(region, vmf, result)
    mm.note_refault(vmf)
    mm.wake(vmf.address, 1)
    return result


def poison_page(mm: Mm, vmf: VmFault[P], walked: Walked[P], row: int, result: VmFaultT) -> VmFaultT:
    """The content cannot be had: the page fails from now on. Why is told first: the thread that gets
    the signal asks at once. COPY would take a poison away again, so the entry says POISONED."""
    region, index = walked.region, walked.index
    kind = _FAILURE_KIND.get(row, lib.UVM_FAILURE_SOURCE)
    if vmf.err in CHANGED:
        kind = lib.UVM_FAILURE_CHANGED
    if kind == lib.UVM_FAILURE_TIMEOUT and vmf.interrupted:
        kind, vmf.err = lib.UVM_FAILURE_INTERRUPT, errno.EINTR
    mm.agent.failed(region.handle, index, kind, vmf.err or _ERRNO_OF_KIND.get(kind, errno.EIO))
    count(region, row)
    with lock_pte(walked) as pte:
        address = region.address(index)
        if region.ptes[index] == _NONE_WP:  # POISON refuses a marker with EEXIST
            mm.kernel.uvm_uffd_writeprotect(mm.uffd, address, PAGE_SIZE, WP_DONTWAKE)
        done = mm.kernel.uvm_uffd_poison(mm.uffd, address, PAGE_SIZE, DONTWAKE)
        if not done.err:
            region.set_ptes(index, 1, _POISONED)
        elif done.err != errno.EEXIST:  # EEXIST: a page came after all; nothing to fail
            log.error("UFFDIO_POISON of page %d: %s", index, os.strerror(done.err))
            mm.agent.protect_read(region.handle, index, 1)
        with install(pte, index, 1, mm.wake_region) as installed:
            mm_account_fault(installed.region, vmf, result)
    return result


# ---- the end ---------------------------------------------------------------------------------------


def count(region: Region, row: int) -> None:
    """The counters of a row, one each."""
    counters = region.control.counters
    for counter in policy.COUNTERS[row] if row != policy.KEEP else ():
        counters[counter] += 1


def mm_account_fault(region: Region, vmf: VmFault[P], result: VmFaultT) -> None:
    """One pgfault for every fault, however it ended; RETRY is not the end (and does not come here)."""
    counters = region.control.counters
    counters[_PGFAULT] += 1
    if result & _ERROR:
        counters[_PGFAULT_FAILED] += 1
    elif result & _MAJOR or vmf.tries:
        counters[_PGMAJFAULT] += 1
    else:
        counters[_PGMINFAULT] += 1
    now = time.monotonic_ns()
    region.control.note_latency(now - vmf.t_ns)
    trace(region, vmf, result, now)


def trace(region: Region, vmf: VmFault[P], result: VmFaultT, now_ns: int) -> None:
    row = vmf.row
    region.control.record(
        vmf.t_ns,
        vmf.index,
        vmf.tid,
        min(now_ns - vmf.t_ns, 0xFFFFFFFF),
        result,
        vmf.err,
        vmf.nr_pages,
        vmf.flags,
        vmf.kind,
        vmf.access,
        region.backing,
        vmf.pte,
        row,
        policy.ACTION[row],
        policy.COMMIT[row],
        policy.NEXT_PTE[row],
        vmf.settlement,
        min(vmf.tries, 255),
    )


# ---- the tables that lead from a row to the function that does it -----------------------------------

_Level = Callable[["Mm", VmFault[Any], Walked[Any]], VmFaultT]
_Settle = Callable[["Mm", VmFault[Any], Walked[Any], VmFaultT, int], VmFaultT]


def _by_action(levels: dict[Action, _Level]) -> tuple[_Level, ...]:
    return tuple(levels.get(action, bug) for action in Action)


_HANDLE_PTE_FAULT = _by_action(
    {
        Action.ZERO_FILL: do_pte_missing,
        Action.MAP_CACHED: do_pte_missing,
        Action.READ_FOLIO: do_pte_missing,
        Action.COW_FOLIO: do_pte_missing,
        Action.MKWRITE_FOLIO: do_pte_missing,
        Action.REUSE: do_wp_page,
        Action.MKWRITE: do_wp_page,
        Action.CANCEL_EVICT: do_wp_page,
        Action.UNPROTECT_AGAIN: do_wp_page,
        Action.JOIN: do_swap_page,
        Action.POISON: do_swap_page,
        Action.WAKE: wake_up,
        Action.DENY_WRITE: deny_write,
        Action.SCAN: scan,
    }
)
_DO_PTE_MISSING = _by_action(
    {
        Action.ZERO_FILL: do_anonymous_page,
        Action.MAP_CACHED: do_fault,
        Action.READ_FOLIO: do_fault,
        Action.COW_FOLIO: do_fault,
        Action.MKWRITE_FOLIO: do_fault,
    }
)
_DO_FAULT = _by_action(
    {
        Action.MAP_CACHED: do_fault_around,
        Action.READ_FOLIO: do_read_fault,
        Action.COW_FOLIO: do_cow_fault,
        Action.MKWRITE_FOLIO: do_shared_fault,
    }
)
_DO_WP_PAGE = _by_action(
    {
        Action.REUSE: wp_page_reuse,
        Action.CANCEL_EVICT: wp_page_reuse,
        Action.UNPROTECT_AGAIN: wp_page_reuse,
        Action.MKWRITE: wp_page_shared,
    }
)
_DO_SWAP_PAGE = _by_action({Action.JOIN: folio_wait, Action.POISON: do_poison})

_MARKS_DIRTY = tuple(
    action in (Action.MKWRITE_FOLIO, Action.MKWRITE, Action.REUSE, Action.CANCEL_EVICT)
    for action in Action
)

_SETTLEMENTS: tuple[_Settle, ...] = tuple(
    {
        Settlement.DONE: drop,
        Settlement.RETRY: settled_retry,
        Settlement.ADVANCE: settled_retry,
        Settlement.VERIFY: verify,
        Settlement.ORDER0: drop,
        Settlement.POISON: poison,
        Settlement.DROP: drop,
        Settlement.DETACH: drop,
        Settlement.RECLAIM: reclaim,
        Settlement.SKIP: drop,
        Settlement.DENY: deny,
    }[settlement]
    for settlement in Settlement
)
_SETTLED_RETRY = int(Settlement.RETRY)
_MKWRITE_ANSWERS: dict[str, _Level] = {"ok": mkwrite_ok, "wait": mkwrite_wait, "deny": mkwrite_deny}
