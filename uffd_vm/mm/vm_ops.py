"""What a region can be asked to do, by who serves its faults: struct vm_operations_struct.

`UserfaultOps` (userfault_ops.py) asks the native library, for service "native" and "inline", or the
fault-service process ("python"); `KernelOps` (kernel_ops.py) asks the kernel, for regions that are an
ordinary mmap of a file. Each object owns what is below a Mapping (native region, page cache, descriptor)
and gives it back in `close_end()`; none refers to the Mapping, which would keep itself alive.

Pages are counted from the first page of the region. Every method raises RegionClosedError after
`close_end()`, and StaleRegionError where the native library knows the handle no more.
"""

from __future__ import annotations

import abc
import contextlib
import mmap
from collections.abc import Callable
from typing import Protocol, TypeAlias

from uffd_vm.errors import RegionClosedError, SourceChanged
from uffd_vm.kernel._lib import lib
from uffd_vm.kernel.mapping import PageCategory
from uffd_vm.mm import pagemap
from uffd_vm.mm.page_cache import FileVersion
from uffd_vm.page import PAGE_SIZE, nr_pages
from uffd_vm.stats import Stats, TraceRecord

__all__ = ["POPULATE", "Advice", "Hold", "Memory", "VmOps"]

#: Advice by name: (enum uvm_advice, madvise constant).
Advice = {
    "normal": (lib.UVM_ADVICE_NORMAL, mmap.MADV_NORMAL),
    "sequential": (lib.UVM_ADVICE_SEQUENTIAL, mmap.MADV_SEQUENTIAL),
    "random": (lib.UVM_ADVICE_RANDOM, mmap.MADV_RANDOM),
}
POPULATE = {"read": 22, "write": 23}  # MADV_POPULATE_READ, _WRITE (Linux 5.14)

#: Makes what keeps the memory mapped while a `with` on it lasts.
Hold: TypeAlias = Callable[[], contextlib.AbstractContextManager[object]]


class VmOps(Protocol):
    """See the module. Counts are pages; a negative errno never leaves these methods."""

    name: str
    flush_late: bool
    home: tuple[str, FileVersion] | None

    @property
    def lost(self) -> bool:
        """It was made inaccessible in this process; the calls below say why."""
        ...

    @property
    def handle(self) -> int:
        """Slot and generation of the native region; 0 where the kernel serves."""
        ...

    @property
    def nr_pages(self) -> int: ...

    @property
    def asks_process(self) -> bool: ...
    def in_forked_child(self) -> None: ...
    def flush_all(self) -> None: ...
    def close_begin(self) -> None: ...
    def close_abort(self) -> None: ...
    def close_end(self) -> None: ...
    def check_open(self) -> None: ...
    def check(self) -> None: ...
    def advise(self, advice: str) -> None: ...
    def prefetch(self, index: int, nr_pages: int) -> None: ...
    def load(self, index: int, nr_pages: int) -> None: ...
    def ensure(self, index: int, nr_pages: int, access: str, hold: Hold = ...) -> None: ...
    def pin(
        self, index: int, nr_pages: int, access: str
    ) -> contextlib.AbstractContextManager[None]: ...
    def evict(self, index: int, nr_pages: int) -> int: ...
    def flush(self, index: int, nr_pages: int) -> None: ...
    def protect(self, index: int, nr_pages: int, written: mmap.mmap | None = None) -> int:
        """Arms what is present; pages armed. `written`, all zeros, a byte a page: 1 where a store had
        been made since the page was armed before."""
        ...

    def walk(self, index: int, nr_pages: int) -> bytes: ...
    def written(self, index: int, nr_pages: int) -> bytes:
        """A byte a page: 1 where a store has been made since the page was armed, or told of, before."""
        ...

    def ptes(self, index: int, nr_pages: int) -> bytes:
        """The page-table entries of this address space alone, without what the folio adds.

        Where writes are tracked, every store that was made before the call is in them.
        """
        ...

    def mapped_pages(self) -> int: ...
    def resident_pages(self) -> int: ...
    def dirty_pages(self) -> int: ...
    def cache_sizes(self) -> tuple[int, int]:
        """(bytes held, most bytes) of the page cache; (0, 0) without one."""
        ...

    def stats(self) -> Stats: ...
    def trace(self) -> list[TraceRecord]: ...


class Memory(abc.ABC):
    """What both kinds share: where the memory is, whether it is still there."""

    def __init__(self, name: str, start: int, nbytes: int) -> None:
        self.name = name
        self.start = start
        self.nbytes = nbytes
        self.nr_pages = nr_pages(nbytes)
        self.closed = False
        self.flush_late = False  #: close() writes back what came after its flush()
        self.home: tuple[str, FileVersion] | None = None  #: mode "r+": where changes go

    @property
    def asks_process(self) -> bool:
        return False

    @property
    def lost(self) -> bool:
        return False

    @property
    def end(self) -> int:
        return self.start + self.nr_pages * PAGE_SIZE

    def check_open(self) -> None:
        if self.closed:
            raise RegionClosedError(f"region {self.name!r} is closed; map it again to use it")

    @abc.abstractmethod
    def in_forked_child(self) -> None:
        """The process is a forked child now."""

    @abc.abstractmethod
    def flush(self, index: int, nr_pages: int) -> None:
        """Writes the dirty pages of the range back; durable on return."""

    def flush_all(self) -> None:
        self.flush(0, self.nr_pages)

    def _check_home(self) -> None:
        """Written is written: but it must not be lost in silence that the path leads elsewhere now. A
        file that was removed, or moved and not replaced, is what the program wanted."""
        if self.home is None:
            return
        path, version = self.home
        try:
            found = FileVersion.of(path)
        except OSError:
            return
        if (found.device, found.inode) != (version.device, version.inode):
            raise SourceChanged(
                f"region {self.name!r}: {path!r} was replaced and is another file now. The changes are in "
                "the file that was mapped, which may have no name any more: copy them out of the region's "
                "memory, then discard() it"
            )

    def _address(self, index: int) -> int:
        return self.start + index * PAGE_SIZE

    def _madvise(self, index: int, nr_pages: int, advice: int) -> int:
        return int(lib.uvm_madvise(self._address(index), nr_pages * PAGE_SIZE, advice))

    def _private_pages(self) -> int:
        """Pages that are this process's own copies, in memory or in the swap area."""
        without = PageCategory.FILE | PageCategory.PFNZERO
        n = pagemap.nr_pages_with(self.start, self.end, need=PageCategory.PRESENT, without=without)
        out = pagemap.nr_pages_with(
            self.start, self.end, need=PageCategory.SWAPPED, without=without, count=self._nr_swapped
        )
        return (n or 0) + (out or 0)

    def _nr_swapped(self, start: int, end: int) -> int:
        """Of a run that the kernel says is swapped out."""
        return (end - start) // PAGE_SIZE
