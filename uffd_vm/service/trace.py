"""What an executor publishes of a region (struct uvm_region_ctl), written in shared memory: counters,
latency histogram and the ring of fault records; the page-table bytes lie behind them.

There is one writer, the service process, and any number of readers (uffd_vm.stats), who take no
lock: a record's seq is cleared, the body written, and seq written last, so that a reader skips a
torn record.
"""

from __future__ import annotations

import struct

from uffd_vm.stats import bucket

__all__ = ["ControlBlock"]

# struct uvm_region_ctl and struct uvm_trace_record; tests/service compares both with the compiler's.
NR_COUNTERS = 64
NR_BUCKETS = 512
NR_RECORDS = 1024
RECORD = struct.Struct("<QQQIIIiIH10B")
COUNTERS_OFFSET = RECORD.size * NR_RECORDS
NR_PRESENT_OFFSET = COUNTERS_OFFSET + 8 * NR_COUNTERS
TRACE_HEAD_OFFSET = NR_PRESENT_OFFSET + 8
ADVICE_OFFSET = TRACE_HEAD_OFFSET + 8
LATENCY_OFFSET = ADVICE_OFFSET + 8
PTES_OFFSET = 59968  # UVM_REGION_CTL_BYTES
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
        "counters",
        "ptes",
    )

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._seq = memory[:COUNTERS_OFFSET].cast("Q")
        self.counters = memory[COUNTERS_OFFSET:NR_PRESENT_OFFSET].cast("Q")
        self._nr_present = memory[NR_PRESENT_OFFSET:TRACE_HEAD_OFFSET].cast("Q")
        self._head = memory[TRACE_HEAD_OFFSET:ADVICE_OFFSET].cast("Q")
        self._advice = memory[ADVICE_OFFSET:LATENCY_OFFSET].cast("Q")
        self._latency = memory[LATENCY_OFFSET : LATENCY_OFFSET + 4 * NR_BUCKETS].cast("I")
        self.ptes = memory[PTES_OFFSET:]

    @property
    def advice(self) -> int:
        """What the owner was told by advise(): enum uvm_advice."""
        return self._advice[0]

    def add_present(self, nr_pages: int) -> None:
        """Pages that became present; negative: that went."""
        self._nr_present[0] = max(0, self._nr_present[0] + nr_pages)

    def record(self, *body: int) -> None:
        """Appends a record: the fields of struct uvm_trace_record after seq, in their order."""
        head = self._head[0]
        slot = head % NR_RECORDS
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
        )
        for view in views:
            view.release()
        self._memory.release()
