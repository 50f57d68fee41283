"""The way to the agent: the owner's native thread that does what only the owner of the memory can.

A request is one message and has one reply; the fault-service thread waits for it, so the agent answers
without the owner's GIL. An agent that is gone means that the owner is going: its memory with it.

The other way round the agent asks for a sign of life now and then, while somebody waits for us. Any
request is one; where there is none to make, answer_ask() is.
"""

from __future__ import annotations

import errno
import socket
import struct

from uffd_vm.kernel._lib import lib

__all__ = ["Agent"]

# struct uvm_agent_request, struct uvm_agent_reply
_REQUEST = struct.Struct("<IiqQQiI")
_REPLY = struct.Struct("<Ii")
_TIMEOUT_S = 10.0


class Agent:
    """Takes ownership of the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._socket.settimeout(_TIMEOUT_S)
        self._seq = 0
        self.watches = False  # it has asked: from here on it is there if we die

    def fileno(self) -> int:
        """Readable when the agent asks for a sign of life."""
        return self._socket.fileno()

    def answer_ask(self) -> None:
        """Reads what there is, without waiting. Not while a request is under way."""
        try:
            message = self._socket.recv(_REPLY.size, socket.MSG_DONTWAIT)
            # Else the late reply to a request that we gave up, or the end: the owner's socket says so.
            if len(message) == _REPLY.size and _REPLY.unpack(message)[0] == lib.UVM_AGENT_ASK:
                self.watches = True
                self._socket.send(
                    _REQUEST.pack(lib.UVM_AGENT_ALIVE, 0, 0, 0, 0, 0, lib.UVM_AGENT_ASK)
                )
        except OSError:
            pass

    def failed(self, region: int, index: int, kind: int, err: int) -> int:
        """Records why the page failed, before it does. Returns >= 0 or -errno."""
        return self._call(lib.UVM_AGENT_FAILED, kind, region, index, 1, err)

    def protect_read(self, region: int, index: int, nr_pages: int) -> int:
        """mprotect(PROT_READ) of the pages: a store there is SIGSEGV from now on."""
        return self._call(lib.UVM_AGENT_PROTECT_READ, 0, region, index, nr_pages, 0)

    def interrupted(self, tid: int) -> bool:
        """Whether Ctrl-C arrived while the owner's main thread, `tid`, waits. Keeps looking from now on."""
        return self._call(lib.UVM_AGENT_INTERRUPTED, 0, 0, tid, 1, 0) == 1

    def not_waiting(self) -> None:
        """No thread waits for long any more: the owner's SIGINT handler is its own again."""
        self._call(lib.UVM_AGENT_INTERRUPTED, 0, 0, 0, 0, 0)

    def _call(self, op: int, kind: int, region: int, index: int, nr_pages: int, err: int) -> int:
        self._seq = self._seq % 0xFFFFFFFF + 1
        try:
            self._socket.send(_REQUEST.pack(op, kind, region, index, nr_pages, err, self._seq))
            while True:
                reply = self._socket.recv(_REPLY.size)
                if len(reply) < _REPLY.size:
                    return -errno.EPIPE
                seq, rc = _REPLY.unpack(reply)
                if seq == self._seq:
                    return int(rc)
                self.watches = True  # it asked for a sign of life, and has one
        except OSError as error:
            return -(error.errno or errno.ETIMEDOUT)

    def close(self) -> None:
        self._socket.close()
