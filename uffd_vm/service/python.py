"""service="python", the owner's side: starts the fault-service process and hands regions over.

The service runs in another interpreter, because a thread that touches lazy memory may hold this
one's GIL. It is spawned (vfork and exec: never a fork of this threaded process) and given a dup of
the userfaultfd, and for each region a descriptor and the memfds of its page table and page cache.

Owns the process, its two sockets (control; agent) and the pidfd. Keeps two invariants: `attach`
returns only once the service has answered for the region, and `detach` only once it has let it go,
so that no handle of it is stale there; and whoever outlives the process hears of its death (the
agent, a native thread, fails every fault with PagerDied once the pidfd is readable).

Nobody waits for a process that says nothing, in a fault or for a reply: the agent asks it for a sign of
life meanwhile, and kills it when it is silent for too long (see native/agent.c). So a reply that never
comes is end of file here, and PagerDied; the next call starts another process, which takes over.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uffd_vm.errors import InvalidArgument, PagerDied
from uffd_vm.kernel._lib import lib
from uffd_vm.kernel.callbacks import at_exit, in_forked_child
from uffd_vm.service.fault_service import protocol

__all__ = [
    "PageMkwrite",
    "PythonService",
    "RegionDescriptor",
    "python_service",
    "running_service",
]

#: Asked before a store into a clean page is let through: (offset, nr_bytes) -> "ok", "wait", "deny".
PageMkwrite = Callable[[int, int], str]

log = logging.getLogger("uffd_vm")

_EXIT_TIMEOUT_S = 5.0
_START_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionDescriptor:
    """What the service process must know of a region. Bytes for start and nr_bytes, else pages."""

    handle: int  # slot and generation, as uvm_region_create() gave it
    start: int
    nr_bytes: int
    pgoff: int
    backing: int
    flags: int  # FaultFlag of every fault here
    writable: bool
    fault_around_pages: int
    readahead_pages: int
    deadline_ns: int
    cache: int  # cache id, -1 for anonymous memory
    page_mkwrite: PageMkwrite | None = None


class PythonService:
    """One fault-service process and the way to talk to it. Thread-safe; `close()` is idempotent."""

    def __init__(self, dead: PythonService | None = None) -> None:
        """Serves what the dead one did: it has all regions before it reads the first fault, since it would
        only wake a thread that touches another, again and again, and that thread may hold the GIL that
        we need to go on. Until then the agent of the dead one fails every fault; so it does on, and the
        regions stay there, if this one does not come up."""
        self._lock = threading.Lock()
        self._next_id = 0
        self._closed = False
        self._ended = False  # seen from our end of the socket
        self._watched = False  # by the agent
        self._regions: dict[int, RegionDescriptor] = {}
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(ours.close)
            agent_ours, agent_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(agent_ours.close)
            with theirs, agent_theirs:
                self._process = _spawn(theirs, agent_theirs)
            undo.callback(_end, self._process)
            undo.callback(self._process.kill)
            self._pidfd = os.pidfd_open(self._process.pid)
            undo.callback(os.close, self._pidfd)
            self._socket = ours
            self._agent_socket = agent_ours
            self._identity = _identity(ours.fileno())
            # Opened here: a pagemap is of the memory of whoever opened it.
            pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            try:
                fds = {"uffd": _check(lib.uvm_python_uffd()), "pagemap": pagemap}
                self._call({"op": "hello", "path": sys.path}, fds)
            finally:
                os.close(pagemap)
            for region in dead.regions() if dead is not None else ():
                self._hand_over(region)
                self._regions[region.handle] = region
            # From here on it reads faults: the agent tells it to, not we.
            _check(lib.uvm_agent_start(agent_ours.fileno(), self._pidfd))
            self._watched = True
            undo.pop_all()
        if dead is not None:
            dead._watched = False  # the agent is ours now
            dead.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    # --- regions --------------------------------------------------------------------------------

    def attach(self, region: RegionDescriptor) -> None:
        """Hands the region over; on return the service answers its faults."""
        self._regions[region.handle] = region  # now: another may take over at any time
        try:
            self._hand_over(region)
        except BaseException:
            del self._regions[region.handle]
            self._detach_elsewhere(region.handle)
            raise

    def _hand_over(self, region: RegionDescriptor) -> None:
        fds = {"region_ctl": _check(lib.uvm_region_ctl_fd(region.handle))}
        if region.cache >= 0:
            fds["cache_ctl"] = _check(lib.uvm_cache_ctl_fd(region.cache))
            fds["cache_data"] = _check(lib.uvm_cache_data_fd(region.cache))
            fds["file"] = _check(lib.uvm_cache_file_fd(region.cache))
        with _hook_memfd(region.page_mkwrite) as hook_fd:
            if hook_fd is not None:
                fds["hook"] = hook_fd
            self._call(protocol.attach_message(region), fds)

    def detach(self, handle: int) -> None:
        """On return the service holds nothing of the region, and its parked faults were woken."""
        if self._regions.pop(handle, None) is None:
            return
        with contextlib.suppress(PagerDied):  # a dead process holds nothing
            self._call({"op": "detach", "region": handle})
        self._detach_elsewhere(handle)

    def _detach_elsewhere(self, handle: int) -> None:
        """Another may have taken over meanwhile, with this region."""
        service = running_service()
        if service is not None and service is not self:
            service.detach(handle)

    def request(self, op: str, handle: int, index: int = 0, nr_pages: int = 0) -> int:
        """One of "load", "prefetch", "flush", "evict", "protect", "collect" on pages
        [index, index + nr_pages).

        Returns a count (pages given back, pages armed) or raises OSError with the errno of what
        failed. `failed_index` of the exception tells which page, where one is to blame.
        """
        if op not in protocol.RANGE_OPS:
            raise ValueError(f"unknown request {op!r}; one of {sorted(protocol.RANGE_OPS)}")
        reply = self._call({"op": op, "region": handle, "index": index, "nr_pages": nr_pages})
        return int(reply["rc"])

    def statistics(self) -> dict[str, int]:
        """What the process holds at this moment: regions, caches, fds, parked faults, in-flight reads."""
        return {k: int(v) for k, v in self._call({"op": "statistics"})["statistics"].items()}

    # --- life of the process ---------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        if self._closed or self._ended or (self._watched and lib.uvm_agent_ended()):
            return False
        return self.poll() is None

    def poll(self) -> int | None:
        """The exit status if the process has ended (which reaps it), else None."""
        return self._process.poll()

    def wait(self, timeout_s: float | None = None) -> int:
        """Waits for the end of the process and reaps it."""
        return self._process.wait(timeout_s)

    def close(self) -> None:
        """Ends this process (by its id, no other) and gives back every descriptor."""
        if self._closed:
            return
        self._closed = True
        if self._watched:
            lib.uvm_agent_stop()
        with contextlib.suppress(OSError):
            # End of file for the service, which leaves its main loop, and for a thread of ours in _call.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        _end(self._process)
        self._agent_socket.close()
        os.close(self._pidfd)

    def kill(self) -> None:
        """Ends this process at once: it must not go on where it was when it wakes up late. Its agent
        fails every fault from there on. Raises PagerDied if it does not end."""
        self._ended = True
        self._process.kill()
        try:
            self._process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise PagerDied(
                f"the Python fault service (pid {self.pid}) was killed and does not end: it hangs in a "
                "system call, probably of a file system; no other may take over before it has ended"
            ) from None

    def __enter__(self) -> PythonService:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def regions(self) -> tuple[RegionDescriptor, ...]:
        return tuple(self._regions.values())

    def _forget(self) -> None:
        """In a forked child: drops our copies of the sockets; the process is the parent's."""
        if self._closed:
            return
        if not self.has_descriptors:
            self._abandon()
            return
        self._closed = True
        self._socket.close()
        self._agent_socket.close()
        os.close(self._pidfd)
        self._process.returncode = 0  # not our child: nothing to reap, nothing to warn of

    @property
    def has_descriptors(self) -> bool:
        """False once the program has closed numbers that are not its own: ours may be other files now."""
        return self._closed or _identity(self._socket.fileno()) == self._identity

    def _abandon(self) -> None:
        """Without its descriptors: the process has seen its end of them closed, and ends. None is closed
        here, where the number may be another file's."""
        if self._closed:
            return
        self._closed = True
        lib.uvm_agent_stop()
        self._socket.detach()
        self._agent_socket.detach()
        if self._process.poll() is None:
            self._process.returncode = 0  # nothing to warn of

    # --- requests ---------------------------------------------------------------------------------

    def _call(self, message: dict[str, Any], fds: dict[str, int] | None = None) -> dict[str, Any]:
        with self._lock:
            if self._closed:
                raise PagerDied("the Python fault service is closed")
            self._next_id += 1
            message["id"] = self._next_id
            try:
                reply, received = self._converse(message, fds or {})
            except TimeoutError:  # only before the agent watches
                self._ended = True
                raise PagerDied(
                    f"the Python fault service (pid {self.pid}) did not start within "
                    f"{_START_TIMEOUT_S:.0f} s; try again, or use service='native'",
                    errno=errno.ETIMEDOUT,
                ) from None
            except (BrokenPipeError, ConnectionResetError):
                reply, received = None, {}
        for fd in received.values():
            os.close(fd)
        if reply is None:
            self._ended = True
            silent = lib.uvm_agent_ended() == errno.ETIMEDOUT
            what = "did not answer for too long, and was killed" if silent else "has ended"
            raise PagerDied(
                f"the Python fault service (pid {self.pid}) {what}; nothing is lost: call region.load() "
                "(or try again what you did), which starts another",
                errno=errno.ETIMEDOUT if silent else errno.EPIPE,
            )
        protocol.raise_for(reply)
        return reply

    def _converse(
        self, message: dict[str, Any], fds: dict[str, int]
    ) -> tuple[dict[str, Any] | None, dict[str, int]]:
        # A load may take what it takes; a process that is dead, or silent, is end of file.
        self._socket.settimeout(None if self._watched else _START_TIMEOUT_S)
        lib.uvm_agent_await(1)
        try:
            protocol.send(self._socket, message, fds)
            while True:
                reply, received = protocol.receive(self._socket)
                if reply is None or reply["id"] == message["id"]:
                    return reply, received
                # Else of a call that was interrupted.
        finally:
            lib.uvm_agent_await(-1)


def _spawn(control: socket.socket, agent: socket.socket) -> subprocess.Popen[bytes]:
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (package_root, os.environ.get("PYTHONPATH")) if p)
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "uffd_vm.service.fault_service",
            str(control.fileno()),
            str(agent.fileno()),
        ],
        pass_fds=(control.fileno(), agent.fileno()),
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and reaps it: it leaves at end of file, else it is killed."""
    for _ in range(2):
        try:
            process.wait(_EXIT_TIMEOUT_S)
            return
        except subprocess.TimeoutExpired:
            process.kill()
    log.error("the Python fault service (pid %d) was killed and does not end", process.pid)


@contextlib.contextmanager
def _hook_memfd(hook: PageMkwrite | None) -> Iterator[int | None]:
    """The hook, pickled into a memfd: it may be larger than a message."""
    if hook is None:
        yield None
        return
    fd = os.memfd_create("uffd_vm-hook", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(_pickle(hook))
        yield fd
    finally:
        os.close(fd)


def _pickle(hook: PageMkwrite) -> bytes:
    dumps: Callable[[object], bytes] = pickle.dumps
    with contextlib.suppress(ImportError):
        from cloudpickle import dumps  # type: ignore[import-untyped,unused-ignore,no-redef]
    try:
        return dumps(hook)
    except Exception as error:  # whatever __reduce__ raises
        raise InvalidArgument(
            f"page_mkwrite: {hook!r} cannot be pickled, and it has to run in another process ({error}); "
            "define it at the top of a module, or install cloudpickle"
        ) from error


def _check(rc: int) -> int:
    if rc < 0:
        raise OSError(-rc, os.strerror(-rc))
    return rc


def _identity(fd: int) -> tuple[int, int] | None:
    """Of the file that a number stands for; None: of none."""
    try:
        found = os.fstat(fd)
    except OSError:
        return None
    return found.st_dev, found.st_ino


# --- the one service of this process ------------------------------------------------------------

_service: PythonService | None = None
_service_lock = threading.Lock()


def python_service() -> PythonService:
    """The service of this process, started at first use.

    Where the earlier one has died, a new one takes over its regions: it finds their state in shared
    memory, asks again for what was in flight, and wakes every thread that the dead one had parked.
    """
    global _service
    with _service_lock:
        dead = _running()
        if dead is not None and dead.alive:
            return dead
        if dead is not None and not dead._closed:
            dead.kill()
        _service = PythonService(dead)
        return _service


def running_service() -> PythonService | None:
    """The service of this process as it is, dead or alive; None where there is none."""
    with _service_lock:
        return _running()


def _running() -> PythonService | None:
    """The lock is held."""
    global _service
    if _service is not None and not _service.has_descriptors:
        _service._abandon()
        _service = None
    return _service


def _close_at_exit() -> None:
    lib.uvm_janitor_stop()  # it takes placeholders away, which waits for the process
    service = running_service()
    if service is not None:
        service.close()


def _after_fork_in_child() -> None:
    global _service, _service_lock
    _service_lock = threading.Lock()
    if _service is not None:
        _service._forget()
        _service = None


at_exit(_close_at_exit)
in_forked_child(_after_fork_in_child)
