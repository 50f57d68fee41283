"""The mapping: what keeps a region's memory alive, and the only way that it goes away.

    ndarray -> memoryview -> Mapping -> VmOps (native region, page cache)

A `Mapping` is an `mmap.mmap`, so each buffer export is counted and unmapping while one lives is refused
(BufferError). It owns the region below it: as long as any view lives, faults are answered, even when
the `Region` object is long garbage. When the last reference goes, the region is torn down in the one
right order: service stopped, memory unmapped, region freed (never the other way round: userfaultfd
hands zeros to whoever waits on memory that is no longer served).
"""

from __future__ import annotations

import _thread
import logging
import mmap
import sys
import threading
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, Protocol

from uffd_vm.errors import FeatureUnavailable, PagerDied, RegionBusyError
from uffd_vm.kernel._lib import check, ffi, lib
from uffd_vm.kernel.callbacks import finalized, no_fork

__all__ = ["Mapping", "Teardown", "refuse_populated", "retry_orphans"]

log = logging.getLogger("uffd_vm")

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # in the module from Python 3.11 on

_VIEWS_LIVE = (
    "region {name!r} cannot be closed: arrays or memoryviews of it still live. Drop them first (`del a`, "
    "leave the function that holds them, or copy what you keep), or let the garbage collector close "
    "it with the last view; the region stays open and usable"
)


def refuse_populated(name: str) -> None:
    """Raises FeatureUnavailable while mmap() fills what it maps: with zeros, before anybody is asked for the
    pages, and those of a file's cache for all who share it."""
    if check(lib.uvm_mmap_populates(), "mmap"):
        raise FeatureUnavailable(
            f"region {name!r}: this process has called mlockall(MCL_FUTURE), so new memory is filled with "
            "zeros as it is mapped. Lock with MCL_FUTURE | MCL_ONFAULT (pages stay in memory once they are "
            "there), or call mlockall() after uv.map()"
        )


class Teardown(Protocol):
    """What has to happen around the unmapping. Each call may raise; `abort` undoes `begin`."""

    name: str

    @property
    def asks_process(self) -> bool:
        """Whether the calls below talk to another process, over a socket with a lock."""
        ...

    def in_forked_child(self) -> None:
        """The process is a forked child now: what only the parent has is let go."""
        ...

    def flush_all(self) -> None:
        """Writes back what would be lost."""
        ...

    def close_begin(self) -> None: ...
    def close_abort(self) -> None: ...
    def close_end(self) -> None: ...


class Space(Protocol):
    """What a mapping asks of its address space."""

    @property
    def lock(self) -> AbstractContextManager[object]:
        """Held while regions are made. Taken after `no_fork` and the mapping's own."""
        ...

    def is_locked_here(self) -> bool: ...


@finalized
class Mapping(mmap.mmap):
    """Memory of one region. Made by `Mapping.of_fd()` or `Mapping.anonymous()`; users get it only as
    the `.obj` of their memoryviews."""

    _teardown: Teardown | None = None
    _forgotten = True  # close() was never asked for: worth a ResourceWarning
    _closing: Any  # a threading.RLock
    _space: Space

    @classmethod
    def of_fd(cls, fd: int, nbytes: int, *, offset: int, flags: int, prot: int) -> Mapping:
        """Maps `nbytes` (rounded up to pages by the kernel) of `fd` from `offset` (bytes, page-aligned).

        `fd` stays the caller's; before Python 3.13 mmap keeps a duplicate of it for itself.
        """
        extra: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
        if flags & mmap.MAP_PRIVATE:  # copies of pages are not charged before they are made
            flags |= MAP_NORESERVE
        return cls(fd, nbytes, flags=flags, prot=prot, offset=offset, **extra)

    @classmethod
    def anonymous(cls, nbytes: int) -> Mapping:
        """Maps private anonymous memory that is not counted against overcommit before it is used."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        return cls(-1, nbytes, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    def own(self, teardown: Teardown, space: Space) -> None:
        """From here on the mapping owns what lies below it. `teardown` must not refer to the mapping."""
        self._closing = threading.RLock()
        self._space = space
        self._teardown = teardown

    @property
    def address(self) -> int:
        """First byte. No buffer export is left behind, which would block close()."""
        with ffi.from_buffer(self) as pointer:
            return int(ffi.cast("uintptr_t", pointer))

    def close(self) -> None:
        """Stops the service, unmaps, frees. Raises BufferError while views live, and then everything
        is as before. A second call does nothing."""
        if self._teardown is None:
            super().close()
            return
        with no_fork, self._closing:
            if self.closed:
                return
            self._forgotten = False
            self._teardown.close_begin()
            # The end takes this lock to detach from the process. Whoever is given the address that is
            # free now, and maps there, has it too, and waits for the end.
            with self._space.lock if self._teardown.asks_process else nullcontext():
                try:
                    super().close()
                except BufferError:
                    self._teardown.close_abort()
                    raise RegionBusyError(_VIEWS_LIVE.format(name=self._teardown.name)) from None
                self._teardown.close_end()

    def resize(self, newsize: int) -> NoReturn:
        """Not possible: mremap() drops the registration, and missing pages would read as zeros."""
        raise TypeError("a region cannot be resized; map it again with another length")

    def in_forked_child(self) -> None:
        self._closing = threading.RLock()
        if self._teardown is not None:
            self._teardown.in_forked_child()

    def flush_quietly(self) -> None:
        """Writes back what would be lost; a failure is logged, there is nobody to raise it to."""
        if self._teardown is None or self.closed:
            return
        try:
            try:
                self._teardown.flush_all()
            except PagerDied:  # another process takes over, and has all that was not written yet
                self._teardown.flush_all()
        except Exception as error:
            log.error("region %r: changes were lost: %s", self._teardown.name, error)

    def __del__(self) -> None:
        if self._teardown is None or self.closed:
            return
        if sys.is_finalizing():
            _orphans.append(self)  # the process takes it along; its changes were flushed at exit
            return
        forgotten = self._forgotten
        # The collector may run in a thread that is inside the address space or waits for the fault
        # service: there the end has to wait. Likewise where one cycle held the mapping and a view of
        # it: unmapping must not happen behind the service's back.
        _orphans.append(self)
        if self._teardown.asks_process:
            _thread.start_new_thread(retry_orphans, ())
        elif not self._space.is_locked_here():
            retry_orphans()
        if forgotten:  # last: a warning may be an error
            warnings.warn(
                f"region {self._teardown.name!r} was never closed; use `with` or close()",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )


_orphans: list[Mapping] = []


def retry_orphans() -> None:
    """Closes mappings that could not be closed when they were collected (see `Mapping.__del__`)."""
    waiting, _orphans[:] = _orphans[:], []
    for mapping in waiting:
        mapping.flush_quietly()
        try:
            mapping.close()
        except BufferError:
            _orphans.append(mapping)
