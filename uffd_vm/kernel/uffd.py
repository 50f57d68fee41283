"""One userfaultfd: owns the file descriptor, and has one method for each of its ioctls.

A userfaultfd belongs for ever to the memory of the process that opened it. Facts to know before use:

- When the last copy of the descriptor closes, every waiting thread wakes up and missing pages read as
  zeros, without an error. The owner of the memory keeps it open as long as the memory lives.
- COPY, ZEROPAGE, CONTINUE, POISON and MOVE may do a part; they answer a `Commit`, never an exception,
  since what an errno of theirs means is policy (fault/settle.py).
- EEXIST never wakes anybody: call `wake()`.
"""

from __future__ import annotations

import enum
import os
import select
import warnings
from types import TracebackType
from typing import Any, NamedTuple

from uffd_vm.kernel import features as _features
from uffd_vm.kernel import msg
from uffd_vm.kernel._lib import Done, check, ffi, lib
from uffd_vm.kernel.callbacks import finalized
from uffd_vm.kernel.features import Feature, Way

__all__ = ["Commit", "CopyMode", "MoveMode", "RangeIoctl", "RegisterMode", "Uffd", "WpMode"]


class RegisterMode(enum.IntFlag):
    """UFFDIO_REGISTER_MODE_*. Registering again replaces the set: ask for the union always."""

    MISSING = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2


class RangeIoctl(enum.IntFlag):
    """What REGISTER says can be done to the range: 1 << _UFFDIO_*."""

    REGISTER = 1 << 0x00
    UNREGISTER = 1 << 0x01
    WAKE = 1 << 0x02
    COPY = 1 << 0x03
    ZEROPAGE = 1 << 0x04
    MOVE = 1 << 0x05
    WRITEPROTECT = 1 << 0x06
    CONTINUE = 1 << 0x07
    POISON = 1 << 0x08


class CopyMode(enum.IntFlag):
    """Modes of COPY and CONTINUE; ZEROPAGE and POISON know DONTWAKE only."""

    DONTWAKE = 1 << 0
    WP = 1 << 1


class WpMode(enum.IntFlag):
    """Modes of WRITEPROTECT: with WP protect, without unprotect (and wake, but for DONTWAKE)."""

    WP = 1 << 0
    DONTWAKE = 1 << 1


class MoveMode(enum.IntFlag):
    DONTWAKE = 1 << 0
    ALLOW_SRC_HOLES = 1 << 1


class Commit(NamedTuple):
    """What a commit did. `err` is 0 or the errno of the call.

    `done` is the kernel's out field: bytes done if >= 0, -errno if < 0, None if the kernel did not write it
    (the call was refused before any work). EAGAIN with done > 0 is partial progress; with done ==
    -EAGAIN the mapping is changing: read events, then try again.
    """

    err: int
    done: int | None

    @classmethod
    def of(cls, raw: Done) -> Commit:
        return cls(raw.err, None if raw.done == lib.UVM_DONE_UNTOUCHED else raw.done)


@finalized
class Uffd:
    """A userfaultfd after its handshake. A context manager; `close()` may be called again."""

    def __init__(self, fd: int, features: Feature = Feature(0)) -> None:
        """Takes ownership of `fd`, on which UFFDIO_API was done with `features`."""
        self._fd = fd
        self.features = features

    @classmethod
    def open(
        cls,
        features: Feature = Feature(0),
        *,
        way: Way | None = None,
        flags: int = os.O_CLOEXEC | os.O_NONBLOCK,
    ) -> Uffd:
        """Opens one for this process's memory and enables exactly `features`.

        Without `way`, the first that this process may use (see `features.probe`). Raises
        PermissionUnavailable, FeatureUnavailable, UffdError.
        """
        if way is None:
            way = _features.require_open()
        _features.require(features)
        fd = check(_features.open_raw(way, flags), "userfaultfd", way=way.value)
        asked = ffi.new("uint64_t *", int(features))
        try:
            check(lib.uvm_uffd_api(fd, asked, ffi.new("uint64_t *")), "UFFDIO_API")
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, features)

    def __enter__(self) -> Uffd:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self, _warn: Any = warnings.warn) -> None:
        if getattr(self, "_fd", -1) >= 0:
            _warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"<Uffd fd={self._fd}>"

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        """Closes the descriptor. If it was the last: waiters wake up, missing pages read as zeros."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def detach(self) -> int:
        """Gives the descriptor away: the caller owns it now."""
        fd, self._fd = self._fd, -1
        return fd

    # --- messages

    def read(self, nr_msgs: int = 64) -> list[msg.UffdMsg]:
        """The messages that wait, at most `nr_msgs`; [] if there is none (and O_NONBLOCK is set)."""
        try:
            return msg.parse(os.read(self._fd, nr_msgs * msg.MSG_BYTES))
        except BlockingIOError:
            return []

    def wait_readable(self, timeout: float | None = None) -> bool:
        """Waits until a message is there, at most `timeout` seconds; the GIL is free meanwhile."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        events = poll.poll(None if timeout is None else timeout * 1000)
        return bool(events and events[0][1] & select.POLLIN)

    # --- ranges: addresses and lengths are bytes, page-aligned

    def register(self, start: int, nr_bytes: int, mode: RegisterMode) -> RangeIoctl:
        """Faults of [start, start + nr_bytes) come here from now on. Replaces an earlier mode set."""
        ioctls = ffi.new("uint64_t *")
        rc = lib.uvm_uffd_register(self._fd, start, nr_bytes, mode, ioctls)
        check(rc, "UFFDIO_REGISTER", start=start, nr_bytes=nr_bytes, mode=mode)
        return RangeIoctl(ioctls[0])

    def unregister(self, start: int, nr_bytes: int) -> None:
        """Waiters wake up; missing pages read as zeros, write-protection is gone."""
        rc = lib.uvm_uffd_unregister(self._fd, start, nr_bytes)
        check(rc, "UFFDIO_UNREGISTER", start=start, nr_bytes=nr_bytes)

    def wake(self, start: int, nr_bytes: int) -> None:
        """Whoever waits in the range tries its access again, and may fault again."""
        rc = lib.uvm_uffd_wake(self._fd, start, nr_bytes)
        check(rc, "UFFDIO_WAKE", start=start, nr_bytes=nr_bytes)

    def writeprotect(self, start: int, nr_bytes: int, mode: WpMode = WpMode.WP) -> int:
        """Protects (or with mode 0 unprotects and wakes): 0 or an errno.

        Not a transaction: ENOENT at the range's tail comes after its head was done.
        """
        return -lib.uvm_uffd_writeprotect(self._fd, start, nr_bytes, mode)

    # --- commits

    def copy(self, dst: int, src: int, nr_bytes: int, mode: CopyMode = CopyMode(0)) -> Commit:
        """Installs copies of the bytes at `src`, which must be resident, at missing pages of `dst`."""
        return Commit.of(lib.uvm_uffd_copy(self._fd, dst, src, nr_bytes, mode))

    def zeropage(self, start: int, nr_bytes: int, mode: CopyMode = CopyMode(0)) -> Commit:
        """Maps zeros. A later write replaces the zero page without telling anybody."""
        return Commit.of(lib.uvm_uffd_zeropage(self._fd, start, nr_bytes, mode))

    def continue_(self, start: int, nr_bytes: int, mode: CopyMode = CopyMode(0)) -> Commit:
        """Maps what the memfd's page cache already holds: the answer to a MINOR fault."""
        return Commit.of(lib.uvm_uffd_continue(self._fd, start, nr_bytes, mode))

    def poison(self, start: int, nr_bytes: int, mode: CopyMode = CopyMode(0)) -> Commit:
        """From now on touching a page gives SIGBUS, a system call on it EFAULT."""
        return Commit.of(lib.uvm_uffd_poison(self._fd, start, nr_bytes, mode))

    def move(self, dst: int, src: int, nr_bytes: int, mode: MoveMode = MoveMode(0)) -> Commit:
        """Moves private anonymous pages of this process from `src` to missing pages of `dst`."""
        return Commit.of(lib.uvm_uffd_move(self._fd, dst, src, nr_bytes, mode))
