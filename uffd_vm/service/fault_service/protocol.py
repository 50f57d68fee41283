"""What the owner and the fault-service process say to each other: one SOCK_SEQPACKET message, JSON,
with descriptors by SCM_RIGHTS; a list "fds" in the message names them in order.

A request carries an id, and its reply the same id and rc >= 0, or -errno with a text. A received
descriptor is owned by the receiver. Neither side trusts a message to be whole: a truncated one, or
one whose descriptors were cut off, is an error and its descriptors are closed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uffd_vm.service.python import RegionDescriptor

RANGE_OPS = frozenset({"load", "prefetch", "flush", "evict", "protect", "collect"})
MAX_MESSAGE = 64 << 10
MAX_FDS = 8

Message = dict[str, Any]


def attach_message(region: RegionDescriptor) -> Message:
    return {
        "op": "attach",
        "region": region.handle,
        "start": region.start,
        "nr_bytes": region.nr_bytes,
        "pgoff": region.pgoff,
        "backing": region.backing,
        "flags": region.flags,
        "writable": region.writable,
        "fault_around_pages": region.fault_around_pages,
        "readahead_pages": region.readahead_pages,
        "deadline_ns": region.deadline_ns,
        "cache": region.cache,
    }


def send(sock: socket.socket, message: Message, fds: dict[str, int]) -> None:
    data = json.dumps({**message, "fds": list(fds)}).encode()
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"message of {len(data)} bytes: at most {MAX_MESSAGE}")
    socket.send_fds(sock, [data], list(fds.values()))


def receive(sock: socket.socket) -> tuple[Message | None, dict[str, int]]:
    """One message and its descriptors; (None, {}) at end of file."""
    data, received, flags, _ = socket.recv_fds(sock, MAX_MESSAGE, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    try:
        if not data:
            return None, {}
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise OSError(errno.EMSGSIZE, "a message of the fault service was cut off")
        message: Message = json.loads(data)
        names = message.pop("fds")
        if len(names) != len(received):
            raise OSError(errno.EBADMSG, f"{len(names)} descriptors named, {len(received)} came")
    except BaseException:
        for fd in received:
            with contextlib.suppress(OSError):
                os.close(fd)
        raise
    return message, dict(zip(names, received, strict=True))


def raise_for(reply: Message) -> None:
    """The one place where a reply becomes an exception."""
    rc = int(reply["rc"])
    if rc >= 0:
        return
    error = OSError(-rc, reply.get("text") or os.strerror(-rc))
    error.failed_index = reply.get("failed_index")  # type: ignore[attr-defined]
    raise error
