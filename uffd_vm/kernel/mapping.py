"""Reading the kernel's own truth back: mappings (/proc/self/smaps) and page tables (PAGEMAP_SCAN).

This is the audit: the library's page-table bytes say what it believes, these functions say what is.
"""

from __future__ import annotations

import enum
import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from uffd_vm.errors import UffdError
from uffd_vm.kernel._lib import check, ffi, lib
from uffd_vm.page import Addr

__all__ = ["PageCategory", "PageRange", "ScanFlag", "Vma", "registered_vmas", "scan", "vmas"]


class PageCategory(enum.IntFlag):
    """PAGE_IS_*: what PAGEMAP_SCAN says of a page.

    WRITTEN means "no userfaultfd write-protect bit". Poison, guard and write-protect markers all look
    SWAPPED. WPALLOWED is said only of ranges under an asynchronous (WP_ASYNC) userfaultfd.
    """

    WPALLOWED = 1 << 0
    WRITTEN = 1 << 1
    FILE = 1 << 2
    PRESENT = 1 << 3
    SWAPPED = 1 << 4
    PFNZERO = 1 << 5
    HUGE = 1 << 6
    SOFT_DIRTY = 1 << 7
    GUARD = 1 << 8


class ScanFlag(enum.IntFlag):
    """PM_SCAN_*"""

    WP_MATCHING = 1 << 0
    CHECK_WPASYNC = 1 << 1


ALL_CATEGORIES = PageCategory(0xFF)


@dataclass(frozen=True)
class PageRange:
    """Pages of [start, end) that are of the same categories."""

    start: Addr
    end: Addr
    categories: PageCategory


def scan(
    start: int,
    end: int,
    *,
    need: PageCategory = PageCategory(0),
    tell: PageCategory = ALL_CATEGORIES,
    flags: ScanFlag = ScanFlag(0),
    batch: int = 512,
) -> Iterator[PageRange]:
    """Walks this process's page tables over [start, end) (page-aligned) by PAGEMAP_SCAN (Linux 6.7).

    Yields the ranges whose pages are of all categories `need`, with those of `tell`.
    Neighbouring ranges of equal categories may come apart where one batch ended. Raises UffdError.
    """
    vec = ffi.new("struct uvm_pm_region[]", batch)
    walk_end = ffi.new("uint64_t *")
    fd = _open_pagemap()
    try:
        while start < end:
            nr = check(
                lib.uvm_pagemap_scan(fd, start, end, flags, need, 0, tell, 0, vec, batch, walk_end),
                "PAGEMAP_SCAN",
                start=start,
                end=end,
            )
            for i in range(nr):
                yield PageRange(
                    Addr(vec[i].start), Addr(vec[i].end), PageCategory(vec[i].categories)
                )
            if walk_end[0] <= start:
                return
            start = walk_end[0]
    finally:
        os.close(fd)


def _open_pagemap() -> int:
    try:
        return os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        cure = {errno.EMFILE: "`ulimit -n`", errno.ENFILE: "/proc/sys/fs/file-max"}.get(
            error.errno or 0
        )
        if cure is None:
            raise
        raise UffdError(
            error.errno or 0,
            f"/proc/self/pagemap: {error.strerror}: raise {cure}, or close files",
            "open",
        ) from error


@dataclass(frozen=True)
class Vma:
    """One mapping of this process, as a paragraph of /proc/self/smaps."""

    start: Addr
    end: Addr
    perms: str
    """As in /proc/self/maps: "rw-p"."""
    offset: int
    path: str
    flags: frozenset[str]
    """VmFlags: "um", "uw", "ui" say registered for missing, write-protect and minor faults."""

    @property
    def registered(self) -> bool:
        return bool(self.flags & {"um", "uw", "ui"})


_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) \S+ \d+ *(.*)")


def vmas() -> list[Vma]:
    """Every mapping of this process. Slow: the kernel walks all page tables for it."""
    found: list[Vma] = []
    head: re.Match[str] | None = None
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as smaps:
        for line in smaps:
            if line.startswith("VmFlags:") and head:
                start, end, perms, offset, path = head.groups()
                found.append(
                    Vma(
                        Addr(int(start, 16)),
                        Addr(int(end, 16)),
                        perms,
                        int(offset, 16),
                        path,
                        frozenset(line.split()[1:]),
                    )
                )
            elif match := _HEAD.match(line):
                head = match
    return found


def registered_vmas() -> list[Vma]:
    """The mappings of this process that a userfaultfd is registered with."""
    return [vma for vma in vmas() if vma.registered]


def pagemap_scan_available() -> bool:
    """Whether this process can use PAGEMAP_SCAN (6.7). Not after a change of uid, for example."""
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        rc = lib.uvm_pagemap_scan(fd, 0, 0, 0, 0, 0, 0, 0, ffi.NULL, 0, ffi.NULL)
    finally:
        os.close(fd)
    return rc not in (-errno.ENOTTY, -errno.ENOSYS)
