"""What is said of a page whose content could not be had: enum uvm_failure_kind, in classes and words.

One text for one failure, whoever is told: the thread that touched the page (service/failure.py), the
caller of `load()` or `flush()`, or `check()` after a thread that nobody could tell.
"""

from __future__ import annotations

import errno
import os

from uffd_vm.errors import (
    BudgetExceeded,
    FailureDetails,
    PagerDied,
    SourceChanged,
    SourceError,
    SourceTimeout,
    UffdVmError,
)
from uffd_vm.kernel._lib import lib
from uffd_vm.page import PAGE_SIZE

__all__ = ["CLASSES", "details", "exception", "kind_of"]

CLASSES: dict[int, type[UffdVmError]] = {
    lib.UVM_FAILURE_SOURCE: SourceError,
    lib.UVM_FAILURE_TIMEOUT: SourceTimeout,
    lib.UVM_FAILURE_CHANGED: SourceChanged,
    lib.UVM_FAILURE_PAGER: PagerDied,
    lib.UVM_FAILURE_OOM: BudgetExceeded,
    lib.UVM_FAILURE_BUG: SourceError,
    lib.UVM_FAILURE_INTERRUPT: SourceError,
}

# What happened, and what to do.
_TEXTS: dict[int, tuple[str, str]] = {
    lib.UVM_FAILURE_SOURCE: ("the source could not be read", "the next touch tries again"),
    lib.UVM_FAILURE_TIMEOUT: (
        "the source did not answer before the region's deadline",
        "the next touch tries again; a longer deadline= gives it more time",
    ),
    lib.UVM_FAILURE_CHANGED: ("the source is not the version that was mapped", "map it again"),
    lib.UVM_FAILURE_PAGER: (
        "the process that serves this memory died",
        "call region.load(), which starts another",
    ),
    lib.UVM_FAILURE_OOM: (
        "there is no memory for the page",
        "free some: evict() gives back, and a smaller cap= takes less",
    ),
    lib.UVM_FAILURE_BUG: ("uffd_vm could not decide this fault", "please report this as a bug"),
    lib.UVM_FAILURE_INTERRUPT: ("interrupted", "the next touch tries again"),
}


def kind_of(err: int) -> int:
    """The kind of an errno, from a call that does the work of a fault (native/fault.c: failure_kind())."""
    return {
        errno.ENODATA: lib.UVM_FAILURE_CHANGED,
        errno.ESTALE: lib.UVM_FAILURE_CHANGED,
        errno.ETIMEDOUT: lib.UVM_FAILURE_TIMEOUT,
        errno.EPIPE: lib.UVM_FAILURE_PAGER,
        errno.ENOMEM: lib.UVM_FAILURE_OOM,
    }.get(err, lib.UVM_FAILURE_SOURCE)


def details(
    name: str,
    index: int | None,
    kind: int,
    err: int,
    *,
    what: str = "",
    cure: str = "",
    who: str = "",
) -> FailureDetails:
    """Of a failure at page `index` of the region `name` (None: somewhere in what was asked for); `err` 0:
    the errno of the class.

    `what` stands for the text of a source that failed, `cure` for what to do of any kind; `who` goes
    before them.
    """
    happened, to_do = _TEXTS.get(kind, _TEXTS[lib.UVM_FAILURE_SOURCE])
    if kind == lib.UVM_FAILURE_SOURCE and what:
        happened = what
    # errno says more only where it is not the text in other words
    if err and kind in (lib.UVM_FAILURE_SOURCE, lib.UVM_FAILURE_BUG):
        happened += f": {os.strerror(err)}"
    elif kind == lib.UVM_FAILURE_PAGER and err == errno.ETIMEDOUT:
        happened = "the process that serves this memory did not answer for too long, and was killed"
    elif kind == lib.UVM_FAILURE_CHANGED and err == errno.ENODATA:
        happened += ": it is shorter than it was"
    where = f"region {name!r}"
    if index is not None:
        offset = index * PAGE_SIZE
        where += f", bytes {offset} to {offset + PAGE_SIZE} (page {index})"
    return FailureDetails(
        message=f"{where}: {who}{happened}; {cure or to_do}",
        errno=err,
        region=name,
        index=index,
    )


def exception(kind: int, of: FailureDetails) -> UffdVmError:
    """The exception for those who can be told by raising it."""
    cls = CLASSES.get(kind, SourceError)
    if not issubclass(cls, SourceError):
        return cls(of.message)
    error = cls(of.message, errno=of.errno or None)
    error.region, error.index = of.region, of.index
    return error
