"""What the kernel says of memory that it serves alone: mincore(2), msync(2), and counts by PAGEMAP_SCAN."""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
from collections.abc import Callable

from uffd_vm.errors import UffdError
from uffd_vm.kernel import features
from uffd_vm.kernel._lib import ffi, lib
from uffd_vm.kernel.mapping import PageCategory, scan
from uffd_vm.page import PAGE_SIZE, nr_pages

__all__ = ["can_populate", "mincore", "msync", "nr_pages_with"]

_MADV_POPULATE_READ = 22


def nr_pages_with(
    start: int,
    end: int,
    *,
    need: PageCategory,
    without: PageCategory = PageCategory(0),
    count: Callable[[int, int], int] = lambda a, b: (b - a) // PAGE_SIZE,
) -> int | None:
    """Pages in [start, end) that are of all categories `need` and of none of `without`, by `count` of each
    run; None where the kernel cannot tell (no PAGEMAP_SCAN before 6.7), or not to a process that changed
    its uid."""
    if not features.probe().pagemap_scan:
        return None
    try:
        found = scan(start, end, need=need, tell=need | without)
        return sum(count(r.start, r.end) for r in found if not r.categories & without)
    except UffdError as error:
        if error.errno in (errno.ENOTTY, errno.ENOSYS):
            return None
        raise
    except PermissionError:  # of /proc/self/pagemap: the uid was changed after the probe
        return None


@functools.cache
def can_populate() -> bool:
    """MADV_POPULATE_READ and _WRITE (Linux 5.14). Without them EINVAL says nothing of the pages."""
    with mmap.mmap(-1, PAGE_SIZE) as page, ffi.from_buffer(page) as pointer:
        address = int(ffi.cast("uintptr_t", pointer))
        return int(lib.uvm_madvise(address, PAGE_SIZE, _MADV_POPULATE_READ)) == 0


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    libc.msync.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


_LOW_BIT = bytes(i & 1 for i in range(256))
_MS_SYNC = 4


def mincore(start: int, nr_bytes: int) -> bytes:
    """One byte a page: 1 where touching it needs no disk (of a file: it is in the page cache)."""
    vec = ctypes.create_string_buffer(nr_pages(nr_bytes))
    if _libc().mincore(start, nr_bytes, vec) < 0:
        code = ctypes.get_errno()
        raise UffdError(code, f"mincore: {os.strerror(code)}", "mincore")
    return vec.raw.translate(_LOW_BIT)


def msync(start: int, nr_bytes: int) -> None:
    """Writes the changes of a shared mapping to its file, and waits."""
    if _libc().msync(start, nr_bytes, _MS_SYNC) < 0:
        code = ctypes.get_errno()
        raise UffdError(code, f"msync: {os.strerror(code)}", "msync")
