"""A userfaultfd that exists only in this process: the ioctls the fault services use, on a dict of pages.

It stands in for the `lib` of uffd_vm.kernel._lib wherever an executor takes one, so that a test can
decide what the kernel answers, and in which order, without a fault being taken. Results are those of
the real ioctls (EEXIST on a present page with the pages before it done, ENOENT outside of what is
registered, EFAULT for CONTINUE without a cached page); tests/kernel asks the same of the real ones.

    fake = FakeUffd()
    fake.register(0x10000, 4 * PAGE_SIZE)
    fake.fail("copy", errno.EAGAIN)                  # the next UFFDIO_COPY, once
    fake.before("copy", lambda: ...)                 # runs ahead of the next one: to lose a race
    ...
    assert fake.names() == ["copy", "wake"]
"""

from __future__ import annotations

import ctypes
import errno
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["FakeDone", "FakeUffd", "Page"]

PAGE_SIZE = 4096
UNTOUCHED = -4611686018427387904  # the out field when the kernel never wrote it
_COPY_WP = 2
_CONTINUE_WP = 2
_WP = 1


@dataclass(frozen=True, slots=True)
class FakeDone:
    """struct uvm_done."""

    err: int
    done: int


@dataclass(slots=True)
class Page:
    """What a page-table entry of the fake points to. `data` None: poisoned."""

    data: bytes | None
    write_protected: bool = False


@dataclass(slots=True)
class FakeUffd:
    """Keeps `pages` (by address) and `calls` (name, start, len, mode), oldest first."""

    pages: dict[int, Page] = field(default_factory=dict)
    calls: list[tuple[str, int, int, int]] = field(default_factory=list)
    cached: dict[int, bytes] = field(default_factory=dict)  # what CONTINUE would map
    _ranges: list[tuple[int, int]] = field(default_factory=list)
    _failures: dict[str, deque[tuple[int, int]]] = field(default_factory=lambda: defaultdict(deque))
    _before: dict[str, deque[Callable[[], None]]] = field(
        default_factory=lambda: defaultdict(deque)
    )

    def register(self, start: int, nr_bytes: int) -> None:
        self._ranges.append((start, start + nr_bytes))

    def fail(self, name: str, err: int, out: int = UNTOUCHED) -> None:
        """The next call of that name answers err (and `out` in its out field) and does nothing."""
        self._failures[name].append((err, out))

    def before(self, name: str, run: Callable[[], None]) -> None:
        """Runs that ahead of the next call of that name, as somebody who is faster would."""
        self._before[name].append(run)

    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]

    # --- the kernel face ------------------------------------------------------------------------

    def uvm_uffd_copy(self, fd: int, dst: int, src: int, len: int, mode: int) -> FakeDone:
        def fill(address: int) -> int:
            if self._present(address):
                return errno.EEXIST
            data = ctypes.string_at(src + address - dst, PAGE_SIZE)
            self.pages[address] = Page(data, bool(mode & _COPY_WP))
            return 0

        return self._each("copy", dst, len, mode, fill)

    def uvm_uffd_zeropage(self, fd: int, start: int, len: int, mode: int) -> FakeDone:
        def fill(address: int) -> int:
            if address in self.pages:
                return errno.EEXIST
            self.pages[address] = Page(bytes(PAGE_SIZE))
            return 0

        return self._each("zeropage", start, len, mode, fill)

    def uvm_uffd_continue(self, fd: int, start: int, len: int, mode: int) -> FakeDone:
        def fill(address: int) -> int:
            if address in self.pages:
                return errno.EEXIST
            if address not in self.cached:
                return errno.EFAULT
            self.pages[address] = Page(self.cached[address], bool(mode & _CONTINUE_WP))
            return 0

        return self._each("continue", start, len, mode, fill)

    def uvm_uffd_poison(self, fd: int, start: int, len: int, mode: int) -> FakeDone:
        def fill(address: int) -> int:
            if address in self.pages:
                return errno.EEXIST
            self.pages[address] = Page(None)
            return 0

        return self._each("poison", start, len, mode, fill)

    def uvm_uffd_writeprotect(self, fd: int, start: int, len: int, mode: int) -> int:
        def protect(address: int) -> int:
            if address in self.pages:
                self.pages[address].write_protected = bool(mode & _WP)
            return 0

        return -self._each("writeprotect", start, len, mode, protect).err

    def uvm_uffd_wake(self, fd: int, start: int, len: int) -> int:
        return -self._each("wake", start, len, 0, lambda _: 0).err

    # --- how -------------------------------------------------------------------------------------

    def _present(self, address: int) -> bool:
        page = self.pages.get(address)
        return page is not None and page.data is not None  # COPY replaces a poison marker

    def _each(
        self, name: str, start: int, nr_bytes: int, mode: int, act: Callable[[int], int]
    ) -> FakeDone:
        if self._before[name]:
            self._before[name].popleft()()
        self.calls.append((name, start, nr_bytes, mode))
        if self._failures[name]:
            err, out = self._failures[name].popleft()
            return FakeDone(err, out)
        if start % PAGE_SIZE or nr_bytes % PAGE_SIZE or nr_bytes <= 0:
            return FakeDone(errno.EINVAL, UNTOUCHED)
        if not any(a <= start and start + nr_bytes <= b for a, b in self._ranges):
            return FakeDone(errno.ENOENT, -errno.ENOENT)
        for address in range(start, start + nr_bytes, PAGE_SIZE):
            err = act(address)
            if err and address > start:
                return FakeDone(errno.EAGAIN, address - start)
            if err:
                return FakeDone(err, -err)
        return FakeDone(0, nr_bytes)
