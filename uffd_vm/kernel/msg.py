"""The messages that a userfaultfd sends: 32 bytes each, as frozen dataclasses.

`UffdMsg` is the union of them; consume it with `match` and `assert_never`.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from uffd_vm.errors import InvalidArgument
from uffd_vm.page import Addr

__all__ = [
    "MSG_BYTES",
    "Event",
    "Fork",
    "PagefaultFlag",
    "Pagefault",
    "Remap",
    "Remove",
    "UffdMsg",
    "Unmap",
    "parse",
]

MSG_BYTES = 32
# struct uffd_msg: event, 7 reserved bytes, then three u64 whose meaning is the event's.
_MSG = struct.Struct("<B7xQQQ")
assert _MSG.size == MSG_BYTES


class Event(enum.IntEnum):
    """UFFD_EVENT_*"""

    PAGEFAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


class PagefaultFlag(enum.IntFlag):
    """UFFD_PAGEFAULT_FLAG_*: none of WP and MINOR means that the page is missing."""

    WRITE = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2


@dataclass(frozen=True)
class Pagefault:
    """A thread waits at `address` (of the page; of the byte with EXACT_ADDRESS)."""

    address: Addr
    flags: PagefaultFlag
    tid: int
    """With THREAD_ID the waiting thread; for process_vm_readv() the remote reader; else 0."""


@dataclass(frozen=True)
class Fork:
    """The process forked; `fd` is a new userfaultfd of the child's memory, owned by the receiver."""

    fd: int


@dataclass(frozen=True)
class Remap:
    """mremap() moved memory. A message Unmap of the old range follows."""

    old: Addr
    new: Addr
    nr_bytes: int


@dataclass(frozen=True)
class Remove:
    """madvise(MADV_DONTNEED, MADV_FREE, MADV_REMOVE) of [start, end), before the pages go."""

    start: Addr
    end: Addr


@dataclass(frozen=True)
class Unmap:
    """[start, end) was unmapped, or mapped over."""

    start: Addr
    end: Addr


UffdMsg = Pagefault | Fork | Remap | Remove | Unmap


def _one(event: int, a: int, b: int, c: int) -> UffdMsg:
    if event == Event.PAGEFAULT:
        return Pagefault(Addr(b), PagefaultFlag(a), c & 0xFFFFFFFF)
    if event == Event.FORK:
        return Fork(a & 0xFFFFFFFF)
    if event == Event.REMAP:
        return Remap(Addr(a), Addr(b), c)
    if event == Event.REMOVE:
        return Remove(Addr(a), Addr(b))
    if event == Event.UNMAP:
        return Unmap(Addr(a), Addr(b))
    raise InvalidArgument(f"userfaultfd sent an event that this library does not know: {event:#x}")


def parse(data: bytes | memoryview) -> list[UffdMsg]:
    """The messages in what one read() of a userfaultfd gave: always whole ones."""
    return [_one(*fields) for fields in _MSG.iter_unpack(data)]
