"""The main loop: one thread polls the userfaultfd, the owner's sockets and what the workers completed.

    python -m uffd_vm.service.fault_service CONTROL_FD AGENT_FD

Faults first: up to 64 messages a read, then what the owner asks. Ends at end of file of the socket:
the owner is gone, or does not want us any more. Owns every descriptor it is handed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import pickle
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

from uffd_vm.fault.action import Truth
from uffd_vm.fault.fault import Access, FaultKind
from uffd_vm.kernel._lib import lib
from uffd_vm.kernel.msg import MSG_BYTES, Event, PagefaultFlag
from uffd_vm.page import PAGE_SHIFT
from uffd_vm.service.fault_service import protocol
from uffd_vm.service.fault_service.address_space import Region
from uffd_vm.service.fault_service.agent import Agent
from uffd_vm.service.fault_service.completion import Task, run_task
from uffd_vm.service.fault_service.filemap import PageCache
from uffd_vm.service.fault_service.mm import Mm
from uffd_vm.service.trace import ControlBlock

log = logging.getLogger("uffd_vm.service")

_MESSAGES = 64
_PAGEFAULT = int(Event.PAGEFAULT)
_MSG = struct.Struct("<B7xQQQ")
#: By the message's flags: the kind, the access.
_KIND = tuple(
    int(FaultKind.WP if f & PagefaultFlag.WP else FaultKind.MINOR if f & PagefaultFlag.MINOR else 0)
    for f in range(8)
)
_ACCESS = tuple(int(Access.WRITE if f & PagefaultFlag.WRITE else Access.READ) for f in range(8))


class FaultService:
    """What the process is: the mm, its caches, and the conversation with the owner."""

    def __init__(self, control: socket.socket, agent: socket.socket) -> None:
        self._control = control
        self._agent = Agent(agent)
        self._caches: dict[int, PageCache] = {}  # by inode of the control memfd
        self._mm: Mm | None = None
        self._uffd = self._pagemap = -1
        self._requests: dict[str, Callable[[protocol.Message, dict[str, int]], int]] = {
            "attach": self._attach,
            "detach": self._detach,
            "statistics": self._statistics,
        }

    def run(self) -> None:
        if not self._hello():
            return
        mm = self._mm
        assert mm is not None
        uffd, control, workers = self._uffd, self._control.fileno(), mm.workers.fd
        agent = self._agent.fileno()
        poll = select.poll()
        for fd in (control, workers, agent):
            poll.register(fd, select.POLLIN)
        begun = False
        while True:
            if not begun and self._agent.watches:
                # Not before: we have all regions of who served before us, and faults have an end if we die.
                begun = True
                poll.register(uffd, select.POLLIN)
            for fd, happened in poll.poll(mm.next_timeout_ms()):
                if fd == uffd:
                    self._read_faults(mm)
                elif fd == workers:
                    mm.workers.reap()
                elif fd == agent:
                    self._agent.answer_ask()
                    if happened & select.POLLHUP:  # stopped by the owner, who is about to say more
                        poll.unregister(agent)
                elif not self._serve_request():
                    return
            mm.run_timers()

    def _read_faults(self, mm: Mm) -> None:
        try:
            data = os.read(self._uffd, _MESSAGES * MSG_BYTES)
        except BlockingIOError:  # another reader, or the thread was killed meanwhile
            return
        for event, flags, address, tid in _MSG.iter_unpack(data):
            if event == _PAGEFAULT:
                mm.page_fault(address, _KIND[flags & 7], _ACCESS[flags & 7], tid & 0xFFFFFFFF)
            # Else p1: reading it was the acknowledgement. The owner moves only placeholders of its own.

    # --- requests -------------------------------------------------------------------------------

    def _hello(self) -> bool:
        message, fds = protocol.receive(self._control)
        if message is None:
            return False
        self._uffd, self._pagemap = fds["uffd"], fds["pagemap"]
        for path in message["path"]:
            if path not in sys.path:
                sys.path.append(path)
        self._mm = Mm(self._uffd, lib, self._agent, self._truth)
        self._reply(message, 0)
        return True

    def _serve_request(self) -> bool:
        """One request. False: the owner has gone."""
        try:
            message, fds = protocol.receive(self._control)
        except ConnectionResetError:
            return False
        if message is None:
            return False
        try:
            if message["op"] in protocol.RANGE_OPS:
                self._range_request(message)
            else:
                self._reply(message, self._requests[message["op"]](message, fds))
        except OSError as error:
            self._reply_error(message, error)
        except Exception as error:
            log.exception("request %s failed", message.get("op"))
            self._reply(message, -errno.EINVAL, text=f"{type(error).__name__}: {error}")
        finally:
            for fd in fds.values():
                os.close(fd)
        return True

    def _reply(self, message: protocol.Message, rc: int, **more: Any) -> None:
        more.update(message.get("reply", {}))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            protocol.send(self._control, {"id": message["id"], "rc": rc, **more}, {})

    def _reply_error(self, message: protocol.Message, error: OSError) -> None:
        self._reply(
            message,
            -(error.errno or errno.EIO),
            text=error.strerror,
            failed_index=getattr(error, "failed_index", None),
        )

    def _attach(self, message: protocol.Message, fds: dict[str, int]) -> int:
        """Takes the descriptors it keeps out of `fds`; what is left there is closed."""
        assert self._mm is not None
        nr_pages = message["nr_bytes"] >> PAGE_SHIFT
        memory = mmap.mmap(fds["region_ctl"], os.fstat(fds["region_ctl"]).st_size)
        region = Region(
            handle=message["region"],
            start=message["start"],
            nr_pages=nr_pages,
            pgoff=message["pgoff"],
            backing=message["backing"],
            flags=message["flags"],
            writable=message["writable"],
            fault_around_pages=max(1, message["fault_around_pages"]),
            readahead_pages=message["readahead_pages"],
            deadline_ns=message["deadline_ns"],
            control=ControlBlock(memoryview(memory)),
            cache=self._cache(fds) if "cache_ctl" in fds else None,
            page_mkwrite=_unpickle(fds["hook"]) if "hook" in fds else None,
        )
        self._mm.attach(region)
        return 0

    def _detach(self, message: protocol.Message, fds: dict[str, int]) -> int:
        assert self._mm is not None
        region = self._mm.space.get(message["region"])
        if region is None:
            return -errno.ESTALE
        cache = region.cache
        self._mm.detach(region)
        if cache is not None and not cache.regions:
            self._drop_cache(cache)
        return 0

    def _drop_cache(self, cache: PageCache) -> None:
        """At once, or when no worker uses it any more: a descriptor's number must not be another's."""
        assert self._mm is not None
        if cache.busy:
            self._mm.after(5_000_000).then(lambda: self._drop_cache(cache))
        elif not cache.regions and self._caches.pop(cache.key, None) is cache:
            cache.close()

    def _cache(self, fds: dict[str, int]) -> PageCache:
        """One PageCache for all regions that map it."""
        assert self._mm is not None
        stat = os.fstat(fds["cache_ctl"])
        cache = self._caches.get(stat.st_ino)
        if cache is None:
            cache = PageCache(
                fds.pop("cache_ctl"),
                fds.pop("cache_data"),
                fds.pop("file"),
                self._mm.workers,
                self._mm.buffers,
            )
            self._caches[cache.key] = cache
        return cache

    def _range_request(self, message: protocol.Message) -> None:
        mm = self._mm
        assert mm is not None
        region = mm.space.get(message["region"])
        if region is None:
            raise OSError(errno.ESTALE, "no such region here")
        index, nr_pages = message["index"], message["nr_pages"]
        if not 0 <= index <= index + nr_pages <= region.nr_pages:
            raise OSError(errno.EINVAL, "the range is not inside the region")
        op = message["op"]
        tasks: dict[str, Callable[[Region, int, int], Task]] = {
            "load": mm.load,
            "prefetch": mm.load,
            "flush": mm.flush,
            "evict": mm.evict,
            "protect": mm.protect_range,
            "collect": mm.collect_range,
        }
        if op == "prefetch":
            self._reply(message, 0)

        def finished(result: int, error: OSError | None) -> None:
            if op == "prefetch":
                return
            if error is not None:
                self._reply_error(message, error)
            else:
                self._reply(message, result)

        run_task(tasks[op](region, index, nr_pages), finished)

    def _statistics(self, message: protocol.Message, fds: dict[str, int]) -> int:
        mm = self._mm
        assert mm is not None
        message["reply"] = {
            "statistics": {
                "nr_regions": len(mm.space),
                "nr_caches": len(self._caches),
                "nr_parked": mm.nr_parked,
                "nr_jobs": mm.workers.nr_pending,
                "nr_strays": mm.nr_strays,
                "nr_fds": len(os.listdir("/proc/self/fd")) - 1,
            }
        }
        return 0

    # --- the owner's page table -----------------------------------------------------------------

    def _truth(self, address: int) -> int:
        """What the owner's page table says of one page, as a Truth."""
        (entry,) = _ENTRY.unpack(os.pread(self._pagemap, 8, (address >> PAGE_SHIFT) * 8))
        return _truth_of(entry)


# Documentation/admin-guide/mm/pagemap.rst. Markers (write protection, poison, guard) count as swapped.
_ENTRY = struct.Struct("=Q")
_PM_UFFD_WP, _PM_GUARD, _PM_SWAP, _PM_PRESENT = 1 << 57, 1 << 58, 1 << 62, 1 << 63


def _truth_of(entry: int) -> int:
    if entry & _PM_PRESENT:
        return int(Truth.PRESENT_WP if entry & _PM_UFFD_WP else Truth.PRESENT)
    if entry & _PM_GUARD:
        return int(Truth.GUARDED)
    if entry & _PM_SWAP:
        return int(Truth.MARKER if entry & _PM_UFFD_WP else Truth.POISONED)
    return int(Truth.ABSENT)


def _unpickle(fd: int) -> Callable[[int, int], str]:
    """The hook comes from the process that owns the memory, which could do anything to it anyway."""
    with open(fd, "rb", closefd=False) as file:
        file.seek(0)
        hook: Callable[[int, int], str] = pickle.load(file)
    return hook


def main(control_fd: int, agent_fd: int) -> None:
    logging.basicConfig(format="uffd_vm fault service: %(levelname)s: %(message)s")
    # Ctrl-C is for the owner: whoever waits for a page there is told by the owner.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=control_fd) as control, socket.socket(fileno=agent_fd) as agent:
        FaultService(control, agent).run()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
    # Not through the interpreter's end: a worker may be stuck in a file system.
    logging.shutdown()
    os._exit(0)
