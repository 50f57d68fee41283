"""What `range` means everywhere: bytes of the region, half-open, rounded out to whole pages.

    None           all of the region
    slice(a, b)    as in bytes[a:b]: negative counts from the end, too large is cut off; no step
    (start, stop)  0 <= start <= stop <= nbytes, anything else is an error

An empty range is no pages: the call does nothing.
"""

from __future__ import annotations

import operator
from typing import TypeAlias

from uffd_vm.errors import InvalidArgument
from uffd_vm.page import PAGE_SIZE, nr_pages

__all__ = ["RangeArgument", "byte_range", "page_span"]

RangeArgument: TypeAlias = "slice | tuple[int, int] | range | None"


def byte_range(where: RangeArgument, nbytes: int) -> tuple[int, int]:
    """[start, stop) in bytes of a region of `nbytes`. Raises InvalidArgument (a ValueError)."""
    if where is None:
        return 0, nbytes
    if isinstance(where, slice):
        start, stop, step = where.indices(nbytes)
        if step != 1:
            raise InvalidArgument(f"range: a slice with step {where.step} is no contiguous range")
        return start, max(start, stop)
    if isinstance(where, range):
        if where.step != 1:
            raise InvalidArgument(f"range: {where} has a step and is no contiguous range")
        where = (where.start, where.stop)
    try:
        start, stop = map(operator.index, where)
    except (TypeError, ValueError):
        raise InvalidArgument(
            f"range: {where!r} is neither None, a slice nor a pair (start, stop) of bytes"
        ) from None
    if not 0 <= start <= stop <= nbytes:
        raise InvalidArgument(f"range: ({start}, {stop}) is not inside the region's {nbytes} bytes")
    return start, stop


def page_span(where: RangeArgument, nbytes: int) -> tuple[int, int]:
    """(index of the first page, number of pages) that a range touches."""
    start, stop = byte_range(where, nbytes)
    if start == stop:
        return start // PAGE_SIZE, 0
    index = start // PAGE_SIZE
    return index, nr_pages(stop) - index
