"""What an executor publishes of a region (struct uvm_region_ctl), written in shared memory: counters,
latency histogram and the ring of fault records; the page-table bytes lie behind them.

There is one writer, the service process, and any number of readers (uffd_vm.stats), who take no
lock: a record's seq is cleared, the body written, and seq written last, so that a reader skips a
torn record.
"""

from __future__ import annotations

import struct

from uffd_vm.kernel._lib import ffi, lib
from uffd_vm.page import PAGE_SIZE
from uffd_vm.stats import LATENCY_BUCKETS, RECORD, TRACE_RECORDS, bucket

__all__ = ["ControlBlock"]

COUNTERS_OFFSET = ffi.offsetof("struct uvm_region_ctl", "counters")
NR_PRESENT_OFFSET = ffi.offsetof("struct uvm_region_ctl", "nr_present")
TRACE_HEAD_OFFSET = ffi.offsetof("struct uvm_region_ctl", "trace_head")
ADVICE_OFFSET = ffi.offsetof("struct uvm_region_ctl", "advice")
LATENCY_OFFSET = ffi.offsetof("struct uvm_region_ctl", "latency")
PTES_OFFSET = lib.UVM_REGION_CTL_BYTES
_BODY = struct.Struct("<QQIIIiIH10B")  # a record without its seq


class ControlBlock:
    """A region's struct uvm_region_ctl as its one writer sees it. `memory` is the mapped memfd."""

    __slots__ = (
        "_advice",
        "_head",
        "_latency",
        "_memory",
        "_nr_present",
        "_seq",
        "_written",
        "counters",
        "ptes",
    )

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._seq = memory[: TRACE_RECORDS * RECORD.size].cast("Q")

        def words(offset: int, number: int = 1) -> memoryview:
            return memory[offset : offset + 8 * number].cast("Q")

        self.counters = words(COUNTERS_OFFSET, lib.UVM_MAX_COUNTERS)
        self._nr_present = words(NR_PRESENT_OFFSET)
        self._head = words(TRACE_HEAD_OFFSET)
        self._advice = words(ADVICE_OFFSET)
        self._latency = memory[LATENCY_OFFSET : LATENCY_OFFSET + 4 * LATENCY_BUCKETS].cast("I")
        self.ptes = memory[PTES_OFFSET:]
        self._written = memory[:0]

    @property
    def advice(self) -> int:
        """What the owner was told by advise(): enum uvm_advice."""
        return self._advice[0]

    def written(self, nr_pages: int) -> memoryview:
        """A byte a page, behind the entries: what was written when it was armed, until the owner takes it
        (uvm_region_written())."""
        if not self._written:
            self._written = self._memory[PTES_OFFSET + -(-nr_pages // PAGE_SIZE) * PAGE_SIZE :]
        return self._written

    def add_present(self, nr_pages: int) -> None:
        """Pages that became present; negative: that went."""
        self._nr_present[0] = max(0, self._nr_present[0] + nr_pages)

    def record(self, *body: int) -> None:
        """Appends a record: the fields of struct uvm_trace_record after seq, in their order."""
        head = self._head[0]
        slot = head % TRACE_RECORDS
        word = slot * (RECORD.size // 8)
        self._seq[word] = 0
        _BODY.pack_into(self._memory, slot * RECORD.size + 8, *body)
        self._seq[word] = head + 1
        self._head[0] = head + 1

    def note_latency(self, ns: int) -> None:
        self._latency[bucket(ns)] += 1

    def close(self) -> None:
        views = (
            self.counters,
            self._nr_present,
            self._head,
            self._latency,
            self._seq,
            self._advice,
            self.ptes,
            self._written,
        )
        for view in views:
            view.release()
        self._memory.release()
