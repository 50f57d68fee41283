"""A region that is an ordinary mmap of a file: the kernel serves its faults, we pass requests on."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator

from uffd_vm.errors import FeatureUnavailable, SourceChanged
from uffd_vm.fault.pte import PteState
from uffd_vm.kernel._lib import check
from uffd_vm.kernel.mapping import PageCategory
from uffd_vm.mm import pagemap
from uffd_vm.mm.page_cache import FileVersion
from uffd_vm.mm.vm_ops import POPULATE, Advice, Hold, Memory
from uffd_vm.page import PAGE_SIZE
from uffd_vm.stats import Stats, TraceRecord

__all__ = ["KernelOps"]

_MADV_PAGEOUT = 21


class KernelOps(Memory):
    """Owns a descriptor of the file."""

    def __init__(
        self,
        name: str,
        start: int,
        nbytes: int,
        *,
        fd: int,
        offset: int,
        version: FileVersion,
        mode: str,
    ) -> None:
        super().__init__(name, start, nbytes)
        self._fd = os.dup(fd)
        self._offset = offset
        self._version = version
        self._mode = mode

    @property
    def handle(self) -> int:
        return 0

    def in_forked_child(self) -> None:
        pass  # the kernel serves it there too

    def close_begin(self) -> None:
        pass

    def close_abort(self) -> None:
        pass

    def close_end(self) -> None:
        self.closed = True
        os.close(self._fd)

    def check(self) -> None:
        """Raises SourceChanged when the file is shorter than what is mapped: touching the end would
        be SIGBUS."""
        self.check_open()
        size = os.fstat(self._fd).st_size
        if size < self._offset + self.nbytes:
            raise SourceChanged(
                f"region {self.name!r}: the file had {self._version.size} bytes when it was mapped and "
                f"has {size} now; memory past its end gives SIGBUS. Map it again"
            )

    def advise(self, advice: str) -> None:
        self.check_open()
        check(self._madvise(0, self.nr_pages, Advice[advice][1]), "madvise", region=self.name)

    def prefetch(self, index: int, nr_pages: int) -> None:
        self.check_open()
        check(self._madvise(index, nr_pages, mmap.MADV_WILLNEED), "MADV_WILLNEED", region=self.name)

    def load(self, index: int, nr_pages: int) -> None:
        self.ensure(index, nr_pages, "read")

    def ensure(
        self, index: int, nr_pages: int, access: str, hold: Hold = contextlib.nullcontext
    ) -> None:
        self.check()
        with hold():
            rc = self._madvise(index, nr_pages, POPULATE[access])
        if rc == -errno.EFAULT:
            self.check()
        check(rc, "MADVPOPULATE", region=self.name)

    @contextlib.contextmanager
    def pin(self, index: int, nr_pages: int, access: str) -> Iterator[None]:
        self.ensure(index, nr_pages, access)  # the kernel knows what it has pinned
        yield

    def evict(self, index: int, nr_pages: int) -> int:
        """Drops pages from this process and, where nobody else maps them, from the page cache.

        Private copies (mode "c") are never thrown away: there the kernel is asked to reclaim
        (MADV_PAGEOUT), which it does for unchanged pages and, with swap, for changed ones.
        """
        self.check_open()
        before = self._cached(index, nr_pages)
        if self._mode == "c":
            self._madvise(index, nr_pages, _MADV_PAGEOUT)
        else:
            self.flush(index, nr_pages)
            rc = self._madvise(index, nr_pages, mmap.MADV_DONTNEED)
            check(rc, "MADV_DONTNEED", region=self.name)
            start = self._offset + index * PAGE_SIZE
            os.posix_fadvise(self._fd, start, nr_pages * PAGE_SIZE, os.POSIX_FADV_DONTNEED)
        return max(0, before - self._cached(index, nr_pages))

    def _cached(self, index: int, nr_pages: int) -> int:
        return self.walk(index, nr_pages).count(PteState.PRESENT)

    def flush(self, index: int, nr_pages: int) -> None:
        self.check_open()
        if self._mode == "r+":
            pagemap.msync(self._address(index), nr_pages * PAGE_SIZE)
            os.fsync(self._fd)
            self._check_home()

    def protect(self, index: int, nr_pages: int, written: mmap.mmap | None = None) -> int:
        self.check_open()
        raise FeatureUnavailable(
            f"region {self.name!r} is served by the kernel, which tells us of no write; map it with "
            "track=True"
        )

    def written(self, index: int, nr_pages: int) -> bytes:
        return bytes(self.protect(index, nr_pages))

    def walk(self, index: int, nr_pages: int) -> bytes:
        self.check_open()
        cached = pagemap.mincore(self._address(index), nr_pages * PAGE_SIZE)
        return cached.replace(b"\1", bytes([PteState.PRESENT]))

    def ptes(self, index: int, nr_pages: int) -> bytes:
        return self.walk(index, nr_pages)

    def mapped_pages(self) -> int:
        self.check_open()
        n = pagemap.nr_pages_with(self.start, self.end, need=PageCategory.PRESENT)
        return self.resident_pages() if n is None else n

    def resident_pages(self) -> int:
        step = 1 << 20
        return sum(
            self._cached(i, min(step, self.nr_pages - i)) for i in range(0, self.nr_pages, step)
        )

    def dirty_pages(self) -> int:
        self.check_open()
        return self._private_pages() if self._mode == "c" else 0

    def cache_sizes(self) -> tuple[int, int]:
        self.check_open()
        return 0, 0

    def stats(self) -> Stats:
        self.check_open()
        return Stats({})

    def trace(self) -> list[TraceRecord]:
        self.check_open()
        raise FeatureUnavailable(
            f"region {self.name!r} is served by the kernel, so its faults are not seen by us; map it with "
            "trace=True"
        )
