"""Histogram buckets, quantiles, and the ring of fault records as it is copied."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uffd_vm import stats
from uffd_vm.kernel._lib import ffi, lib


@given(st.integers(0, 2**64 - 1))
def test_a_latency_lies_in_its_bucket(ns):
    low, high = stats.bucket_bounds(stats.bucket(ns))
    assert low <= ns < high
    assert high - low <= max(1, low // 8)


def test_buckets_are_contiguous():
    bounds = [stats.bucket_bounds(i) for i in range(stats.LATENCY_BUCKETS)]
    assert bounds[0][0] == 0
    assert all(a[1] == b[0] for a, b in pairwise(bounds))


@given(st.lists(st.integers(0, 10**10), min_size=1), st.floats(0.01, 1.0))
def test_a_quantile_is_never_flattering(latencies, q):
    counts = [0] * stats.LATENCY_BUCKETS
    for ns in latencies:
        counts[stats.bucket(ns)] += 1
    latency = stats.Latency(tuple(counts))
    exact = sorted(latencies)[max(1, -int(-q * len(latencies) // 1)) - 1]
    assert exact <= latency.quantile(q) <= exact * 9 / 8 + 1
    assert latency.max >= max(latencies)


def _record(seq: int, index: int = 0) -> bytes:
    return struct.pack("<QQQIIIiIH10B", seq, 5, index, 1, 100, 0, 0, 1, 0, *([0] * 8), 0, 0)


def test_the_layout_is_the_compilers():
    assert stats.RECORD.size == ffi.sizeof("struct uvm_trace_record")
    fields = [name for name, _ in ffi.typeof("struct uvm_trace_record").fields]
    assert fields[-1] == "tries" and len(fields) == 19
    assert stats.TRACE_RECORDS == lib.UVM_TRACE_RECORDS
    assert stats.LATENCY_BUCKETS == lib.UVM_LATENCY_BUCKETS


def test_torn_and_overwritten_records_are_left_out():
    ring = b"".join(_record(seq) for seq in (5, 0, 3, 9, 4))
    assert [r.seq for r in stats.decode_trace(ring, 5, 5)] == [3, 4, 5]
    # While we copied, the writer came round: what it may have touched is not believed.
    ring = b"".join(_record(seq) for seq in range(1001, 2025))
    seqs = [r.seq for r in stats.decode_trace(ring, 2024, 2030)]
    assert seqs[0] > 2030 - 1024 and seqs[-1] == 2024


def test_sizes_for_people():
    assert [stats.human_size(n) for n in (0, 1023, 1024, 5 << 30, 1 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 GiB",
        "1.0 TiB",
    ]


def test_kernel_regions_have_no_counters():
    with pytest.raises(KeyError):
        stats.Stats({})["pgfault"]
