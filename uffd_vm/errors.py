"""Every exception of the library, under UffdVmError. Each also is the builtin that callers expect.

The exceptions about a failed fault (SourceError and those under it) can be made without arguments:
native code raises them in the touching thread by class alone (PyThreadState_SetAsyncExc takes a class).
Their __init__ then asks `failure_details` what happened; the failure service sets that hook.
"""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Callable
from dataclasses import dataclass

__all__ = [
    "UffdVmError",
    "UffdError",
    "PermissionUnavailable",
    "FeatureUnavailable",
    "SourceError",
    "SourceTimeout",
    "SourceChanged",
    "PagerDied",
    "BudgetExceeded",
    "StaleRegionError",
    "RegionBusyError",
    "RegionClosedError",
    "InvalidArgument",
    "HandlerReplaced",
    "FailureDetails",
]


class UffdVmError(Exception):
    """Anything that goes wrong in uffd_vm."""


class UffdError(UffdVmError, OSError):
    """A kernel call failed: `errno` is the kernel's, `call` names the call ("UFFDIO_COPY")."""

    def __init__(self, errno: int, strerror: str = "", call: str = "") -> None:
        super().__init__(errno, strerror or os.strerror(errno))
        self.call = call


class PermissionUnavailable(UffdVmError, PermissionError):
    """This process may not use userfaultfd. The message says what to do; `uffd-vm doctor` says more."""

    def __init__(self, *args: object) -> None:
        # (message) or, as a pickled OSError comes back, (errno, message).
        super().__init__(*(args if len(args) > 1 else (_errno.EPERM, *args)))


class FeatureUnavailable(UffdVmError, NotImplementedError):
    """The running kernel lacks a feature that this call needs, and nothing may stand in for it."""


class BudgetExceeded(UffdVmError, MemoryError):
    """A memory budget's max would be passed, and reclaim found nothing to take back."""


class StaleRegionError(UffdVmError, ReferenceError):
    """A handle was kept past an operation after which its region is another one, or gone."""


class RegionClosedError(StaleRegionError, ValueError):
    """The region was closed."""


class RegionBusyError(UffdVmError, BufferError):
    """The region cannot be closed or moved: arrays or memoryviews of it still live."""


class HandlerReplaced(UffdVmError, RuntimeError):
    """Somebody put a handler of their own over ours for SIGBUS (SIGSEGV, SIGTRAP). With service="inline"
    that handler is who serves the region."""


class InvalidArgument(UffdVmError, ValueError):
    """An argument is outside what the call accepts."""


@dataclass(frozen=True)
class FailureDetails:
    """What is known of a fault that failed."""

    message: str
    errno: int = 0
    """0: that of the exception's class."""
    region: str | None = None
    """Its name."""
    index: int | None = None
    """Page of the region."""


def _no_details() -> FailureDetails | None:
    return None


failure_details: Callable[[], FailureDetails | None] = _no_details
"""Details of the failure that the calling thread is being told; None if there is none."""


class SourceError(UffdVmError, OSError):
    """A page's content could not be had. The page stays missing: the next touch tries again.

    A Source raises `SourceError("what happened", errno=errno.EIO)`. `region` (its name) and `index`
    (the page) are set where the content of one page failed.
    """

    default_errno = _errno.EIO
    default_message = "the source of this memory failed"

    def __init__(self, *args: object, errno: int | None = None) -> None:
        # (), (message) or, as a pickled OSError comes back, (errno, message).
        details = failure_details() if not args else None
        code = errno or (details.errno if details else 0) or self.default_errno
        message = details.message if details else self.default_message
        if len(args) == 1:
            message = str(args[0])
        elif len(args) > 1:
            code, message = int(str(args[0])), str(args[1])
        super().__init__(code, message)
        self.region = details.region if details else None
        self.index = details.index if details else None

    def __str__(self) -> str:
        return f"{self.strerror} ({_errno.errorcode.get(self.errno or 0, self.errno)})"


class SourceTimeout(SourceError, TimeoutError):
    """The region's deadline passed before the source answered."""

    default_errno = _errno.ETIMEDOUT
    default_message = "the source of this memory did not answer before the region's deadline"


class SourceChanged(SourceError):
    """The file or object is no longer the version that was mapped."""

    default_errno = _errno.ESTALE
    default_message = "the source is not the version that was mapped; map it again"


class PagerDied(SourceError):
    """The process that serves this memory died (EPIPE), or said nothing for too long and was killed
    (ETIMEDOUT). What it served is as it was: `region.load()` starts another, which takes over."""

    default_errno = _errno.EPIPE
    default_message = (
        "the process that serves this memory died; call region.load(), which starts another"
    )
