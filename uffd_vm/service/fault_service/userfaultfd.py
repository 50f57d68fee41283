"""The ioctls that make a decision true, as mm/userfaultfd.c: one for each Commit, over a range of pages.

None of them wakes: what went in is published first, and the guard of the fault wakes (typestate.py).
What an errno means is not said here: the fault's own page gets its ErrnoClass, for settle().
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from uffd_vm.fault.action import Commit, ErrnoClass
from uffd_vm.fault.pte import PteState
from uffd_vm.fault.settle import classify_errno
from uffd_vm.kernel.uffd import CopyMode, WpMode
from uffd_vm.page import PAGE_SHIFT
from uffd_vm.service.fault_service.address_space import Region
from uffd_vm.service.fault_service.filemap import Read, ZeroFolio

if TYPE_CHECKING:
    from uffd_vm.service.fault_service.memory import VmFault
    from uffd_vm.service.fault_service.mm import Mm

__all__ = ["BRINGS", "DONTWAKE", "TAKES_CONTENT", "UNPROTECT", "WP_DONTWAKE", "mfill", "publish"]

DONTWAKE, _COPY_WP = int(CopyMode.DONTWAKE), int(CopyMode.WP)
WP_DONTWAKE = int(WpMode.DONTWAKE)
_OK = int(ErrnoClass.OK)


def mfill(
    mm: Mm,
    region: Region,
    first: int,
    end: int,
    commit: int,
    read: Read | ZeroFolio,
    vmf: VmFault[Any] | None,
) -> int:
    """Commits [first, end) and publishes what went in; returns the ErrnoClass of the fault's own page.

    ADVANCE is here: the pages that are done are settled, the rest is committed after them. A page that
    was there already (EEXIST) is somebody's success; for vmf's own page that is for settle() to say.
    """
    ioctl = _COMMITS[commit]
    own = vmf.index if vmf is not None else -1
    own_class = _OK
    at = first
    if not region.shared:
        region.announce(first, end - first)
    while at < end:
        err, done = ioctl(mm, region, at, end - at, read)
        nr_done = end - at if not err else max(done, 0) >> PAGE_SHIFT
        if nr_done:
            if commit in _INSTALLS:
                publish(region, at, nr_done, commit)
            at += nr_done
            continue
        if at == own and vmf is not None:
            vmf.err = err
            own_class = int(classify_errno(err, done))
        elif err == errno.ENOENT and own >= 0 and end - first > 1:
            # The range is not one mapping any more: the fault's own page alone.
            return mfill(mm, region, own, own + 1, commit, read, vmf)
        elif err != errno.EEXIST:
            if at < own < end:
                at = own
                continue
            break
        at += 1
    return own_class


def publish(region: Region, index: int, nr_pages: int, commit: int) -> None:
    """The kernel has them: page-table bytes, and folio words where the page cache was filled."""
    fills = TAKES_CONTENT if region.shared else _FILLS_CACHE
    if region.cache is not None and commit in fills:
        region.cache.mark_uptodate(region.pgoff + index, nr_pages)
    region.set_ptes(index, nr_pages, _PTE_OF_COMMIT[commit])


# ---- one ioctl each --------------------------------------------------------------------------------

_CommitResult = tuple[int, int]  # errno, bytes done


def _commit_none(mm: Mm, region: Region, index: int, nr_pages: int, read: Any) -> _CommitResult:
    return 0, 0


def _copy(
    mm: Mm, region: Region, index: int, nr_pages: int, read: Any, wp: int = 0
) -> _CommitResult:
    done = mm.kernel.uvm_uffd_copy(
        mm.uffd,
        region.address(index),
        read.address_of(region.pgoff + index),
        nr_pages << PAGE_SHIFT,
        DONTWAKE | wp,
    )
    return done.err, done.done


def _copy_wp(mm: Mm, region: Region, index: int, nr_pages: int, read: Any) -> _CommitResult:
    return _copy(mm, region, index, nr_pages, read, _COPY_WP)


def _copy_cache(mm: Mm, region: Region, index: int, nr_pages: int, read: Any) -> _CommitResult:
    """The owner's own mapping of the cache is out of reach: whole pages go in by pwrite()."""
    assert region.cache is not None
    try:
        return 0, region.cache.fill_cache(read, region.pgoff + index, nr_pages)
    except OSError as error:
        return error.errno or errno.EIO, 0


def _zeropage(mm: Mm, region: Region, index: int, nr_pages: int, read: Any) -> _CommitResult:
    done = mm.kernel.uvm_uffd_zeropage(
        mm.uffd, region.address(index), nr_pages << PAGE_SHIFT, DONTWAKE
    )
    return done.err, done.done


def _continue(
    mm: Mm, region: Region, index: int, nr_pages: int, read: Any, wp: int = 0
) -> _CommitResult:
    done = mm.kernel.uvm_uffd_continue(
        mm.uffd, region.address(index), nr_pages << PAGE_SHIFT, DONTWAKE | wp
    )
    return done.err, done.done


def _continue_wp(mm: Mm, region: Region, index: int, nr_pages: int, read: Any) -> _CommitResult:
    return _continue(mm, region, index, nr_pages, read, _COPY_WP)


def _unprotect(mm: Mm, region: Region, index: int, nr_pages: int, read: Any) -> _CommitResult:
    rc = mm.kernel.uvm_uffd_writeprotect(
        mm.uffd, region.address(index), nr_pages << PAGE_SHIFT, WP_DONTWAKE
    )
    return -rc, 0


_COMMITS: tuple[Callable[[Mm, Region, int, int, Any], _CommitResult], ...] = tuple(
    {
        Commit.ZEROPAGE: _zeropage,
        Commit.COPY: _copy,
        Commit.COPY_WP: _copy_wp,
        Commit.COPY_CACHE: _copy_cache,
        Commit.COPY_CACHE_WP: _copy_cache,
        Commit.CONTINUE: _continue,
        Commit.CONTINUE_WP: _continue_wp,
        Commit.UNPROTECT: _unprotect,
    }.get(commit, _commit_none)
    for commit in Commit
)
UNPROTECT = int(Commit.UNPROTECT)
#: Bring content along; into a shared mapping, that is into the page cache.
TAKES_CONTENT = frozenset(
    int(c) for c in (Commit.COPY, Commit.COPY_WP, Commit.COPY_CACHE, Commit.COPY_CACHE_WP)
)
_FILLS_CACHE = frozenset((int(Commit.COPY_CACHE), int(Commit.COPY_CACHE_WP)))
_INSTALLS = frozenset(
    int(commit)
    for commit in (
        Commit.ZEROPAGE,
        Commit.COPY,
        Commit.COPY_WP,
        Commit.COPY_CACHE,
        Commit.COPY_CACHE_WP,
        Commit.CONTINUE,
        Commit.CONTINUE_WP,
    )
)
#: After these the thread has what it faulted for.
BRINGS = _INSTALLS | {UNPROTECT}
#: What a page is after a commit: the state of the neighbours that came with a fault's own page.
_PTE_OF_COMMIT = {
    int(Commit.ZEROPAGE): int(PteState.ZERO),
    int(Commit.COPY): int(PteState.PRESENT),
    int(Commit.COPY_WP): int(PteState.WRITE_PROTECTED),
    int(Commit.COPY_CACHE): int(PteState.CACHED),
    int(Commit.COPY_CACHE_WP): int(PteState.CACHED),
    int(Commit.CONTINUE): int(PteState.PRESENT),
    int(Commit.CONTINUE_WP): int(PteState.WRITE_PROTECTED),
}
