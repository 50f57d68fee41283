"""An address space of the Python fault service on a fake userfaultfd: no fault is taken, no thread runs.

Reads of the file never come back by themselves: `complete_io()` lets them, so that a test decides what
happens while a fault waits.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from uffd_vm.fault.action import Counter
from uffd_vm.fault.fault import Backing, FaultFlag
from uffd_vm.page import PAGE_SIZE
from uffd_vm.service import trace
from uffd_vm.service.fault_service.address_space import Region
from uffd_vm.service.fault_service.filemap import CTL_BYTES, CTL_OFFSET, PageCache, Read
from uffd_vm.service.fault_service.mm import Mm
from uffd_vm.stats import RECORD, TRACE_RECORDS, TraceRecord, decode_trace
from uffd_vm.testing.fake_uffd import FakeUffd

START = 0x7000_0000_0000
SECOND_NS = 1_000_000_000


@dataclass
class FakeAgent:
    """Keeps what it was told, in order with the fake kernel's calls."""

    fake: FakeUffd
    failures: list[tuple[int, int, int, int]] = field(default_factory=list)

    def interrupted(self, tid: int) -> bool:
        return False

    def not_waiting(self) -> None:
        pass

    def failed(self, region: int, index: int, kind: int, err: int) -> int:
        self.failures.append((region, index, kind, err))
        self.fake.calls.append(("agent.failed", index, kind, err))
        return 0

    def protect_read(self, region: int, index: int, nr_pages: int) -> int:
        self.fake.calls.append(("agent.protect_read", index, nr_pages, 0))
        return 0


class World:
    """An Mm and one region of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Read, "read_nowait", lambda read: False)
        self.fake = FakeUffd()
        self.agent = FakeAgent(self.fake)
        self.truth = 0
        self.mm = Mm(-1, self.fake, self.agent, lambda address: self.truth, nr_workers=0)
        self._caches: list[PageCache] = []

    def anon(self, nr_pages: int = 8, flags: FaultFlag = FaultFlag(0)) -> Region:
        return self._attach(nr_pages, Backing.ANON, flags, None, None, True)

    def file(
        self,
        path: Path,
        *,
        backing: Backing = Backing.SHARED_FILE,
        flags: FaultFlag = FaultFlag(0),
        hook: Callable[[int, int], str] | None = None,
        cap_pages: int | None = None,
    ) -> Region:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        stat = os.fstat(fd)
        nr_pages = -(-stat.st_size // PAGE_SIZE)
        data = os.memfd_create("data", os.MFD_CLOEXEC)
        os.write(data, bytes(nr_pages * PAGE_SIZE))  # the fake's COPY puts nothing there
        ctl = os.memfd_create("ctl", os.MFD_CLOEXEC)
        os.truncate(ctl, CTL_BYTES + 4 * nr_pages)
        head = struct.pack("<QQqQ", nr_pages, stat.st_size, stat.st_mtime_ns, cap_pages or nr_pages)
        os.pwrite(ctl, head, CTL_OFFSET)
        cache = PageCache(ctl, data, fd, self.mm.workers, self.mm.buffers)
        self._caches.append(cache)
        if hook is not None:
            flags |= FaultFlag.HOOK
        return self._attach(nr_pages, backing, flags, cache, hook, True)

    def _attach(
        self,
        nr_pages: int,
        backing: Backing,
        flags: FaultFlag,
        cache: PageCache | None,
        hook: Callable[[int, int], str] | None,
        writable: bool,
    ) -> Region:
        table = -(-nr_pages // PAGE_SIZE) * PAGE_SIZE
        self.memory = mmap.mmap(-1, trace.PTES_OFFSET + 2 * table)
        region = Region(
            handle=1,
            start=START,
            nr_pages=nr_pages,
            pgoff=0,
            backing=int(backing),
            flags=int(flags),
            writable=writable,
            fault_around_pages=4,
            readahead_pages=0,
            deadline_ns=60 * SECOND_NS,
            control=trace.ControlBlock(memoryview(self.memory)),
            cache=cache,
            page_mkwrite=hook,
        )
        self.fake.register(START, nr_pages * PAGE_SIZE)
        self.mm.attach(region)
        self.fake.calls.clear()
        return region

    def fault(self, index: int, *, kind: int = 0, access: int = 0, tid: int = 1) -> None:
        self.mm.page_fault(START + index * PAGE_SIZE, kind, access, tid)

    def complete_io(self) -> int:
        """Lets the reads and writes that were asked for happen now. Returns how many."""
        workers, n = self.mm.workers, 0
        while not workers._queue.empty():
            job = workers._queue.get()
            assert job is not None
            try:
                job.result = job.work()
            except OSError as error:
                job.result = -(error.errno or 5)
            workers._complete.append(job)
            n += 1
        workers.reap()
        return n

    def trace(self) -> list[TraceRecord]:
        memory = bytes(self.memory)
        (head,) = struct.unpack_from("<Q", memory, trace.TRACE_HEAD_OFFSET)
        return decode_trace(memory[: RECORD.size * TRACE_RECORDS], head, head)

    def counter(self, counter: Counter) -> int:
        (value,) = struct.unpack_from("<Q", self.memory, trace.COUNTERS_OFFSET + 8 * counter)
        return int(value)

    def close(self) -> None:
        self.complete_io()
        for region in self.mm.space:
            self.mm.detach(region)
        for cache in self._caches:
            cache.close()
        self.mm.close()
