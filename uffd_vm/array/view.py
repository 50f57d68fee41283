"""`Region.array()`: an ndarray over part of a region, without copying and without touching a page."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from uffd_vm.errors import InvalidArgument

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["array_view"]


def array_view(
    buffer: memoryview,
    dtype: npt.DTypeLike,
    shape: int | Sequence[int],
    *,
    offset: int,
    order: Literal["C", "F"],
) -> np.ndarray[Any, Any]:
    """An array over `buffer` from `offset` (bytes). One -1 in `shape` means: as many as there are.

    The array holds `buffer`, whose export is counted: so the mapping cannot be closed below it.
    Raises InvalidArgument.
    """
    import numpy as np

    try:
        dt = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError) as error:
        raise InvalidArgument(
            f"array: {dtype!r} is no dtype ({error}); give one that NumPy knows, as 'float32' or '<i8'"
        ) from None
    if dt.hasobject:
        raise InvalidArgument(
            f"array: dtype {dt} holds Python objects; their pointers mean nothing in mapped bytes"
        )
    if dt.itemsize == 0:
        raise InvalidArgument(
            f"array: items of dtype {dt} have no bytes; give a length, as in 'S8'"
        )
    if order not in ("C", "F"):
        raise InvalidArgument(f"array: order {order!r} is neither 'C' nor 'F'")
    try:
        offset = operator.index(offset)
    except TypeError:
        raise InvalidArgument(f"array: offset {offset!r} is no whole number of bytes") from None
    if not 0 <= offset <= buffer.nbytes:
        raise InvalidArgument(
            f"array: offset {offset} is outside the region's {buffer.nbytes} bytes"
        )
    try:
        dims = [operator.index(n) for n in (shape if isinstance(shape, Sequence) else (shape,))]
    except TypeError:
        raise InvalidArgument(f"array: shape {shape!r} is no tuple of integers") from None
    if any(n < -1 for n in dims) or dims.count(-1) > 1:
        raise InvalidArgument(
            f"array: shape {shape!r}: lengths are >= 0, and one of them may be -1"
        )
    available = buffer.nbytes - offset
    if -1 in dims:
        row = dt.itemsize * math.prod(n for n in dims if n != -1)
        if row == 0 or available % row:
            raise InvalidArgument(
                f"array: {available} bytes from offset {offset} are not a whole number of items of {row} "
                f"bytes (dtype {dt}, shape {tuple(dims)}); give the length in place of -1, or another "
                "offset"
            )
        dims[dims.index(-1)] = available // row
    elif (wanted := dt.itemsize * math.prod(dims)) > available:
        raise InvalidArgument(
            f"array: shape {tuple(dims)} of {dt} is {wanted} bytes, and {available} are there from offset "
            f"{offset}"
        )
    # frombuffer() keeps the memoryview; ndarray(buffer=...) would keep the mapping below it instead.
    raw = np.frombuffer(buffer, np.uint8)[offset : offset + dt.itemsize * math.prod(dims)]
    array: np.ndarray[Any, Any] = raw.view(dt).reshape(dims, order=order)
    return array
