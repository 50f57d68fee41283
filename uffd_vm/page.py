"""Pages and addresses: the units that the whole library speaks in.

An `Addr` is an absolute address in bytes, a `Pgoff` a page's number in its cache or region. Ranges are
half-open, [start, end), as vm_start and vm_end.
"""

from __future__ import annotations

import mmap
from typing import NewType

__all__ = [
    "PAGE_SIZE",
    "PAGE_SHIFT",
    "Addr",
    "Pgoff",
    "is_page_aligned",
    "nr_pages",
    "round_down",
    "round_up",
]

Addr = NewType("Addr", int)
Pgoff = NewType("Pgoff", int)

PAGE_SIZE: int = mmap.PAGESIZE
PAGE_SHIFT: int = PAGE_SIZE.bit_length() - 1


def round_down(nr_bytes: int, unit: int = PAGE_SIZE) -> int:
    """The largest multiple of `unit` (a power of two) that is not above `nr_bytes`."""
    return nr_bytes & ~(unit - 1)


def round_up(nr_bytes: int, unit: int = PAGE_SIZE) -> int:
    """The smallest multiple of `unit` (a power of two) that is not below `nr_bytes`."""
    return (nr_bytes + unit - 1) & ~(unit - 1)


def nr_pages(nr_bytes: int) -> int:
    """How many pages `nr_bytes` take."""
    return (nr_bytes + PAGE_SIZE - 1) >> PAGE_SHIFT


def is_page_aligned(value: int) -> bool:
    return value & (PAGE_SIZE - 1) == 0
