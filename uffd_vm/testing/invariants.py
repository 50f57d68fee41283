"""Invariants with a name: state-machine and stress tests call all of them after every step.

Each takes an open region at rest (no fault of it in flight) and raises AssertionError, saying the page.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from uffd_vm.fault.pte import MAPPED, MARKERS, FolioState, PteState
from uffd_vm.kernel._lib import ffi, lib
from uffd_vm.kernel.mapping import PageCategory, registered_vmas, scan
from uffd_vm.mm.region import Region
from uffd_vm.mm.userfault_ops import UserfaultOps
from uffd_vm.page import PAGE_SIZE

__all__ = [
    "INVARIANTS",
    "charged_iff_resident",
    "check_all",
    "covered_by_a_userfaultfd",
    "shadow_is_the_kernels_truth",
]

_P = PteState
_PRESENT = PageCategory.PRESENT
_WRITTEN = PageCategory.WRITTEN
_KEEP = _PRESENT | _WRITTEN | PageCategory.SWAPPED | PageCategory.PFNZERO | PageCategory.FILE


def kernel_pages(region: Region) -> list[PageCategory]:
    """What PAGEMAP_SCAN says of each page of a region."""
    pages = [PageCategory(0)] * region.nr_pages
    start = region.address
    end = start + region.nr_pages * PAGE_SIZE
    for found in scan(start, end, tell=_KEEP):
        for address in range(found.start, found.end, PAGE_SIZE):
            pages[(address - start) // PAGE_SIZE] = found.categories
    return pages


def shadow_is_the_kernels_truth(region: Region) -> None:
    """Shadow page table == PAGEMAP_SCAN, as far as the region's registration lets us see.

    Where only MISSING is registered over a file ("r", untracked "c") the kernel maps pages of the cache,
    and copies them on a write, without telling: there is nothing to compare. Where WP is registered
    it must be exact: a page that the shadow holds for write-protected, or for not there, and the kernel
    for writable, is a write that nobody sees.
    """
    ops = region._ops
    if not isinstance(ops, UserfaultOps):
        return
    shadow = ops.ptes(0, region.nr_pages)
    tracked = region._tracked or region.mode == "r+"
    for index, (state, categories) in enumerate(zip(shadow, kernel_pages(region), strict=True)):
        pte = PteState(state)
        where = f"page {index} of {region!r}: shadow {pte.name}, kernel {categories!r}"
        present = bool(categories & _PRESENT)
        writable = present and bool(categories & _WRITTEN) and not categories & PageCategory.PFNZERO
        if ops.cache is None:
            swapped = bool(categories & PageCategory.SWAPPED) and pte not in MARKERS
            assert (present or swapped) == (pte in MAPPED), where
        if tracked:
            assert not writable or pte is _P.PRESENT, f"{where}: a write is unseen"
            if present and pte in (_P.WRITE_PROTECTED, _P.ZERO_WP):
                assert not categories & _WRITTEN, f"{where}: a write is unseen"
            if present:
                assert pte not in (_P.NONE, _P.POISONED), where


def charged_iff_resident(region: Region) -> None:
    """The pages a cache is charged for are those whose folio is in it; dirty ones likewise."""
    ops = region._ops
    if not isinstance(ops, UserfaultOps) or ops.cache is None:
        return
    cache = ops.cache
    ctl = lib.uvm_cache_ctl(cache.id)
    words = ffi.unpack(lib.uvm_cache_folios(cache.id), ctl.nr_pages)
    states = [word & 0xFF for word in words]
    absent = states.count(FolioState.ABSENT) + states.count(FolioState.ERROR)
    used = len(states) - absent
    assert ctl.nr_used == used, f"{region!r}: charged {ctl.nr_used}, in the cache {used}"
    dirty = states.count(FolioState.DIRTY) + states.count(FolioState.WRITEBACK)
    assert ctl.nr_dirty == dirty, f"{region!r}: nr_dirty {ctl.nr_dirty}, dirty {dirty}"


def covered_by_a_userfaultfd(region: Region) -> None:
    """Every byte of an open region is registered: an unregistered hole would read as zeros."""
    if not isinstance(region._ops, UserfaultOps):
        return
    at, end = region.address, region.address + region.nr_pages * PAGE_SIZE
    for vma in registered_vmas():
        if vma.start <= at < vma.end:
            at = vma.end
    assert at >= end, f"{region!r}: not registered at {at:#x}"


INVARIANTS: tuple[Callable[[Region], None], ...] = (
    shadow_is_the_kernels_truth,
    charged_iff_resident,
    covered_by_a_userfaultfd,
)


def check_all(*regions: Region, timeout: float = 1.0) -> None:
    """Every invariant of every open region, once they are at rest.

    The ioctl that fills a page wakes its toucher, and the executor publishes the page after that; so
    what is seen right after a touch is looked at again, for at most `timeout` seconds.
    """
    for region in regions:
        end = time.monotonic() + timeout
        while not region.closed:
            try:
                for invariant in INVARIANTS:
                    invariant(region)
                break
            except AssertionError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.001)
