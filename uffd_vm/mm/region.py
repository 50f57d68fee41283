"""`Region`: a range of lazy memory, the object users hold. The kernel's vm_area_struct.

It forwards to a `Mapping` (the memory, and its life) and a `VmOps` (who serves its faults). A Region
may die before its views: the Mapping lives on. Ranges are bytes of the region: see `mm.ranges`.
"""

from __future__ import annotations

import logging
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from uffd_vm.errors import InvalidArgument, RegionBusyError
from uffd_vm.mm.mapping import Mapping
from uffd_vm.mm.page_cache import FileVersion
from uffd_vm.mm.ranges import RangeArgument, byte_range, page_span
from uffd_vm.mm.vm_ops import Advice, VmOps
from uffd_vm.page import PAGE_SIZE, nr_pages
from uffd_vm.stats import Residency, Stats, TraceRecord, human_size

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Region", "RegionSpec"]

log = logging.getLogger("uffd_vm")
_WALK_PAGES = 1 << 20
_HTML_PAGES = 1 << 22
_RUNS = re.compile(rb"\x01+")


@dataclass(frozen=True)
class RegionSpec:
    """How to map it again: what a region pickles as. `version` is None for anonymous memory."""

    path: str | None
    mode: str
    version: FileVersion | None
    arguments: dict[str, Any] = field(default_factory=dict)


class Region:
    """Lazy memory. Made by `uv.map()` and `uv.anonymous()`; a context manager.

    Attributes: `name`, `mode` ("r", "c", "r+", or "anonymous"), `service` (who answers faults: "native",
    "python", "inline" or "kernel") and `service_reason` (why that one), `nbytes`.

    Methods may be called from any thread. After `close()` all but `close()` and the attributes raise
    RegionClosedError; a region that failed in a thread nobody could tell (see `check()`) raises that.
    """

    def __init__(
        self,
        mapping: Mapping,
        ops: VmOps,
        spec: RegionSpec,
        *,
        name: str,
        service: str,
        service_reason: str,
        tracked: bool,
    ) -> None:
        self._mapping = mapping
        self._ops = ops
        self._spec = spec
        self._tracked = tracked
        self._address = mapping.address
        self.name = name
        self.mode = spec.mode
        self.service = service
        self.service_reason = service_reason
        self.nbytes = len(mapping)

    # --- the memory ---------------------------------------------------------------------------------

    @property
    def address(self) -> int:
        """Address of the first byte; valid until the region is closed."""
        self._ops.check_open()
        return self._address

    @property
    def nr_pages(self) -> int:
        """Pages that it takes, the last of which may be filled in part."""
        return nr_pages(self.nbytes)

    @property
    def handle(self) -> int:
        """Slot and generation in the native region table; 0 if the kernel serves the region."""
        return self._ops.handle

    @property
    def generation(self) -> int:
        """Which use of its slot in the region table this is: a handle of an older one is stale."""
        return self._ops.handle >> 32

    @property
    def closed(self) -> bool:
        """Whether its memory is gone. False while a view keeps a forgotten region alive."""
        return self._mapping.closed

    @property
    def buffer(self) -> memoryview:
        """A new memoryview of all bytes (read-only in mode "r"). It keeps the memory alive and served,
        and close() refused, until it is released."""
        self._ops.check_open()
        return memoryview(self._mapping)

    def array(
        self,
        dtype: npt.DTypeLike = "uint8",
        shape: int | Sequence[int] = -1,
        *,
        offset: int = 0,
        order: Literal["C", "F"] = "C",
    ) -> np.ndarray[Any, Any]:
        """An ndarray over the bytes from `offset`; one length of `shape` may be -1. No page is touched.

        In mode "r" it is not writeable, as with np.memmap. It keeps the memory alive and served, and
        close() refused, until it and all arrays made of it are gone. Raises InvalidArgument.
        """
        from uffd_vm.array.view import array_view

        return array_view(self.buffer, dtype, shape, offset=offset, order=order)

    def __len__(self) -> int:
        return self.nbytes

    # --- requests -----------------------------------------------------------------------------------

    def _span(self, where: RangeArgument) -> tuple[int, int]:
        self._ops.check_open()
        return page_span(where, self.nbytes)

    def advise(self, advice: Literal["normal", "sequential", "random", "willneed"]) -> None:
        """How it will be read: steers read-ahead and fault-around. Follows madvise(2).

        "sequential" reads far ahead, "random" reads what is touched and nothing else, "willneed" is
        `prefetch()` of everything. Raises InvalidArgument.
        """
        if advice == "willneed":
            self.prefetch()
        elif isinstance(advice, str) and advice in Advice:
            self._ops.advise(advice)
        else:
            known = [*Advice, "willneed"]
            raise InvalidArgument(
                f"advise: {advice!r} is none of {known}; to drop pages use evict()"
            )

    def prefetch(self, range: RangeArgument = None) -> None:
        """Asks for pages in the background and returns at once. Only advice: where the queue is full, or
        the source fails, the later touch does it, or says so. Follows MADV_WILLNEED."""
        index, nr_pages = self._span(range)
        if nr_pages:
            self._ops.prefetch(index, nr_pages)

    def load(self, range: RangeArgument = None) -> None:
        """Makes pages present now, in this thread, and says what went wrong as an ordinary exception.

        Raises SourceError, SourceTimeout, SourceChanged or PagerDied, with `index` (the page); pages
        before that one are present. A page may be evicted again later. Where the process of
        service="python" has died, it starts another, which takes over all regions.
        """
        index, nr_pages = self._span(range)
        if nr_pages:
            self._ops.load(index, nr_pages)

    def ensure(
        self, range: RangeArgument = None, *, access: Literal["read", "write"] = "read"
    ) -> None:
        """Makes pages present and mapped, so that a system call on them (read(2), send(2), O_DIRECT)
        neither waits nor fails with EFAULT. `access="write"` is for calls that store into them; it makes
        them dirty. Follows MADV_POPULATE_READ and _WRITE. Raises what `load()` raises.
        """
        if access not in ("read", "write"):
            raise InvalidArgument(f"ensure: access {access!r} is neither 'read' nor 'write'")
        if access == "write" and self.mode == "r":
            raise InvalidArgument(
                f"ensure: region {self.name!r} is mapped 'r': nothing may write to it"
            )
        index, nr_pages = self._span(range)
        if nr_pages:
            self._ops.ensure(index, nr_pages, access, lambda: self.buffer)

    @contextmanager
    def pin(self, range: RangeArgument = None) -> Iterator[memoryview]:
        """For O_DIRECT reads, io_uring, RDMA and other devices that store INTO the region: while `with` lasts
        its pages are present, writable and dirty, and are neither evicted nor taken for written back.

            with region.pin((start, stop)) as view:
                os.preadv(fd, [view], offset)

        Yields a memoryview of the bytes of the range, which is released at the end; close() is refused
        until then. All transfers must have ended by then, too: the pages count as written, and may go.
        flush() meanwhile writes what is there and leaves them dirty. Pins may overlap; one belongs to
        the process that made it, and ends with it.

        Only pages of mode "r+" are ever taken away while a device writes to them; elsewhere this is
        `ensure(access="write")`, and in mode "r", which a device can only read, `ensure()`. Raises
        what `ensure()` raises, and BudgetExceeded where more than half of the cap would be pinned
        (and the file is larger than the cap).
        """
        index, nr_pages = self._span(range)
        start, stop = byte_range(range, self.nbytes)
        with self.buffer as memory:
            view = memory[start:stop]
            try:
                if not nr_pages:
                    yield view
                    return
                with self._ops.pin(index, nr_pages, "read" if self.mode == "r" else "write"):
                    yield view
            finally:
                with suppress(BufferError):  # an array was made of it, and lives on as any other
                    view.release()

    def evict(self, range: RangeArgument = None) -> int:
        """Gives memory back: the number of bytes that were. What was read can be read again; what is
        dirty in mode "r+" is written back first or stays; private changes ("c", anonymous) stay."""
        index, nr_pages = self._span(range)
        return self._ops.evict(index, nr_pages) * PAGE_SIZE if nr_pages else 0

    def flush(self, range: RangeArgument = None) -> None:
        """Writes changes back to the file (mode "r+") and waits until they are durable. In other modes
        there is nothing to write. Follows msync(MS_SYNC) and fsync(2), also in that an error of an
        earlier write-back is told once. Raises SourceError, SourceChanged."""
        index, nr_pages = self._span(range)
        if nr_pages:
            self._ops.flush(index, nr_pages)

    def check(self) -> None:
        """Raises, once, the failure of a touch whose thread could not be told (a thread unknown to
        Python). Until then every other call on the region raises it, and `with` does at its end.

        With service="inline" also raises HandlerReplaced, once, where somebody put a signal handler over
        ours, and puts ours back in front of it."""
        self._ops.check()

    # --- write tracking -----------------------------------------------------------------------------

    def _need_tracking(self, what: str) -> None:
        self._ops.check_open()
        if not self._tracked:
            raise InvalidArgument(
                f"{what}: region {self.name!r} does not track writes; make it with track=True"
            )

    def protect(self, range: RangeArgument = None) -> int:
        """Starts a new period of write tracking: from here on `dirty()` tells what is written.

        Arms the pages that are present (UFFDIO_WRITEPROTECT), and returns how many bytes; the others
        are armed when they come. Raises InvalidArgument without track=True.
        """
        self._need_tracking("protect")
        index, nr_pages = self._span(range)
        return self._ops.protect(index, nr_pages) * PAGE_SIZE if nr_pages else 0

    def dirty(self, range: RangeArgument = None, *, reset: bool = False) -> list[tuple[int, int]]:
        """Half-open ranges of bytes, by whole pages, written since the region was made or `protect()`
        was last called on them; in mode "r+" also: since they were last written back.

        reset=True also starts a new period, as `protect()` does, and in one step: a store that another
        thread makes meanwhile is in this answer or in the next, never in neither. The order for a
        checkpoint is therefore reset first, then copy: what is stored while you copy comes again. Where
        it fails nothing of what it would have told is lost. Follows PAGEMAP_SCAN with
        PM_SCAN_WP_MATCHING.

        Raises InvalidArgument without track=True.
        """
        self._need_tracking("dirty")
        index, nr_pages = self._span(range)
        if not nr_pages:
            return []
        found: list[tuple[int, int]] = []

        def add(start: int, written: bytes | mmap.mmap) -> None:
            for run in _RUNS.finditer(written):
                a, b = (start + run.start()) * PAGE_SIZE, (start + run.end()) * PAGE_SIZE
                if found and found[-1][1] == a:
                    a = found.pop()[0]
                found.append((a, min(b, self.nbytes)))

        if reset:
            written = mmap.mmap(-1, nr_pages, mmap.MAP_PRIVATE)  # takes what was written of it
            self._ops.protect(index, nr_pages, written)
            add(index, written)
        else:
            for start in _steps(index, index + nr_pages):
                add(start, self._ops.written(start, min(_WALK_PAGES, index + nr_pages - start)))
        return found

    # --- what is known ------------------------------------------------------------------------------

    def residency(self) -> Residency:
        """Where the bytes are now: a frozen object of sizes in bytes, with `.pages()` and `.heatmap()`."""
        ops = self._ops
        cache_bytes, cap_bytes = ops.cache_sizes()
        return Residency(
            nbytes=self.nbytes,
            page_size=PAGE_SIZE,
            mapped_bytes=ops.mapped_pages() * PAGE_SIZE,
            resident_bytes=ops.resident_pages() * PAGE_SIZE,
            dirty_bytes=ops.dirty_pages() * PAGE_SIZE,
            cache_bytes=cache_bytes,
            cache_cap_bytes=cap_bytes,
            _walk=ops.walk,
        )

    def stats(self) -> Stats:
        """Counters by /proc/vmstat-like names and the latency of faults, since the region was made.

        "Touched" has the grain of fault-around (64 KiB by default): neighbours of a touched page are
        mapped with it, and their first touch is no fault.
        """
        return self._ops.stats()

    def trace(self) -> list[TraceRecord]:
        """The last faults (at most 1024), oldest first. Raises FeatureUnavailable for a region that the
        kernel serves."""
        return self._ops.trace()

    # --- life ---------------------------------------------------------------------------------------

    def close(self) -> None:
        """Writes back (mode "r+"), stops the service for it, unmaps. A second call does nothing.

        Raises RegionBusyError (a BufferError) while arrays or memoryviews of it live, and what `flush()`
        raises; in both cases the region stays open and usable.
        """
        if not self._mapping.closed:
            if self._ops.lost:  # then there is nothing to write, or it is told
                self._ops.flush_all()
            else:
                self._ops.flush(0, self.nr_pages)
                self._ops.flush_late = True
            self._mapping.close()

    def discard(self) -> None:
        """As `close()`, without writing back: for a region whose `flush()` fails for good."""
        self._ops.flush_late = False
        self._mapping.close()

    def __enter__(self) -> Region:
        self._ops.check_open()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """`check()`, then `close()`. While another exception passes through, what they raise is logged
        and not raised; views that live in its traceback then put the end off until they go."""
        if self.closed:
            return
        try:
            try:
                self.check()
            finally:
                self.close()
        except Exception as error:
            if exc_type is None:
                raise
            level = logging.DEBUG if isinstance(error, RegionBusyError) else logging.ERROR
            log.log(
                level, "region %r, leaving `with` after %s: %s", self.name, exc_type.__name__, error
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as (path, mode, file version, arguments): the copy maps the same version of the file,
        or raises SourceChanged. Private changes of mode "c" do not travel. Raises InvalidArgument for
        mode "r+" and for anonymous memory."""
        spec = self._spec
        if spec.mode == "r+":
            raise InvalidArgument(
                f"region {self.name!r} is mapped 'r+': its file is locked by this process, so no other one "
                "could map it writable. Pickle a region of mode 'r' or 'c', or send the path"
            )
        if spec.path is None:
            raise InvalidArgument(
                f"region {self.name!r} is anonymous: its bytes are nowhere else. Send the bytes, or fork()"
            )
        from uffd_vm.mm.address_space import map_again

        return map_again, (spec,)

    def __repr__(self) -> str:
        head = f"<Region {self.name!r} {self.mode} {human_size(self.nbytes)}"
        if self.closed:
            return f"{head}, closed>"
        try:
            resident = human_size(self._ops.resident_pages() * PAGE_SIZE)
        except Exception as error:
            return f"{head}, {self.service}, {error}>"
        return f"{head} at {self._address:#x}, {self.service}, {resident} resident>"

    def _repr_html_(self) -> str:
        title = f"<b>Region</b> {_escape(self.name)} ({self.mode}, {human_size(self.nbytes)})"
        if self.closed:
            return f"<div>{title}: closed</div>"
        residency = self.residency()
        rows = "".join(
            f"<tr><th style='text-align:left'>{what}</th><td>{_escape(value)}</td></tr>"
            for what, value in (
                ("service", f"{self.service}: {self.service_reason}"),
                ("address", hex(self._address)),
                ("residency", str(residency)),
            )
        )
        bins = residency.heatmap() if self.nr_pages <= _HTML_PAGES else (residency.fraction,)
        cells = "".join(
            f"<span title='{part:.0%}' style='display:inline-block;height:12px;"
            f"width:{100 / len(bins):.3f}%;background:rgba(31,119,180,{0.08 + 0.92 * part:.2f})'></span>"
            for part in bins
        )
        return f"<div>{title}<table>{rows}</table><div style='width:32em'>{cells}</div></div>"


def _steps(start: int, stop: int) -> Sequence[int]:
    return range(start, stop, _WALK_PAGES)


def _escape(text: object) -> str:
    from html import escape

    return escape(os.fspath(text) if isinstance(text, os.PathLike) else str(text))
