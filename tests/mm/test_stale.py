"""Regions that went while somebody was at work on them: by a handle kept over close(), in load(), or
in a fault that waited. Never another region's pages, never zeros, never a wait for ever."""

from __future__ import annotations

import errno
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import uffd_vm as uv
from tests.support import Touch, in_thread, run_in_child, wait_until
from uffd_vm.fault.pte import FolioState
from uffd_vm.kernel._lib import check, lib
from uffd_vm.mm.userfault_ops import UserfaultOps
from uffd_vm.page import PAGE_SIZE
from uffd_vm.testing.inject import inject
from uffd_vm.testing.strategies import pattern

pytestmark = pytest.mark.usefixtures("uffd")
SERVICES = ("native", "python", "inline")


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("mode", ["r", "c", "r+", "anonymous"])
def test_a_handle_kept_over_close_is_not_the_new_region_in_its_slot(make_file, service, mode):
    def make(seed: int) -> uv.Region:
        if mode == "anonymous":
            return uv.anonymous(8 * PAGE_SIZE, service=service, track=True)
        path = make_file(8 * PAGE_SIZE, seed, f"{seed}.bin")
        return uv.map(path, mode, service=service, track=mode != "r")

    old = make(1)
    handle, ops = old.handle, old._ops
    assert isinstance(ops, UserfaultOps)
    old.close()
    with make(2) as new:
        assert new.handle & 0xFFFFFFFF == handle & 0xFFFFFFFF, "the slot is used again"
        assert new.generation > handle >> 32
        ops.closed = False  # somebody who has not heard of the close
        calls: list[Callable[[], object]] = [
            ops.check_open,
            ops.check,
            lambda: ops.advise("random"),
            lambda: ops.prefetch(0, 8),
            lambda: ops.load(0, 8),
            lambda: ops.ensure(0, 8, "read"),
            lambda: ops.evict(0, 8),
            lambda: ops.protect(0, 8),
            lambda: ops.flush(0, 8),
            lambda: ops.walk(0, 8),
            lambda: ops.ptes(0, 8),
            ops.resident_pages,
            ops.mapped_pages,
            ops.stats,
            ops.trace,
            ops.close_begin,
            ops.close_abort,
        ]
        for number, call in enumerate(calls):
            with pytest.raises(uv.StaleRegionError):
                call()
                pytest.fail(f"call {number} went to somebody else's region")
        ops.closed = True
        assert new.residency().resident_bytes == 0 and new.stats()["pgfault"] == 0
        with new.buffer as buffer:
            want = bytes(8 * PAGE_SIZE) if mode == "anonymous" else pattern(8 * PAGE_SIZE, 2)
            assert bytes(buffer) == want


def test_a_stale_handle_says_what_to_do():
    with uv.anonymous(PAGE_SIZE) as region:
        handle = region.handle
    with pytest.raises(uv.StaleRegionError, match="get it again") as raised:
        check(lib.uvm_region_check(handle), "load", region="mine")
    assert "region=mine" in str(raised.value) and isinstance(raised.value, ReferenceError)


@pytest.mark.parametrize("op", ["load", "ensure"])
def test_a_region_that_is_closed_during_load_is_stale(make_file, op):
    """load() lets go of the region while it reads: what it finds afterwards is checked."""
    region = uv.map(make_file(), service="native")
    outcome: list[BaseException | None] = []

    def work() -> None:
        try:
            getattr(region, op)()
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    with inject("PREAD", delay=0.3):
        thread = threading.Thread(target=work)
        thread.start()
        wait_until(lambda: FolioState.FILLING in {w & 0xFF for w in region._ops.cache.folios(0, 8)})
        start = time.monotonic()
        region.close()
        took = time.monotonic() - start
        thread.join(10)
    (error,) = outcome
    assert isinstance(error, uv.StaleRegionError), error
    assert took < 0.25, "close() does not wait for the read"


def test_a_region_that_is_closed_during_prefetch_is_forgotten(make_file):
    region = uv.map(make_file(), service="native")
    with uv.map(make_file(name="other.bin"), service="native") as other:
        with inject("PREAD", delay=0.2, count=4):
            lib.uvm_inject(lib.UVM_OP_PREAD_NOWAIT, 0, 1 << 40, errno.EAGAIN, 0)
            region.prefetch()
            region.close()
            assert other.buffer[0] == pattern(1)[0]


# --- a fault that waits: in a child, for its thread ends with a signal ----------------------------------


ALWAYS_WAIT = "wait".format  # pickles, and ignores what it is asked


def in_child_close_under_a_fault_that_waits(service: str) -> str:
    """The toucher has a bare address, and nothing else that keeps the region open."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.bin"
        path.write_bytes(pattern(8 * PAGE_SIZE))
        options: dict[str, Any] = {"service": service, "fault_around_bytes": PAGE_SIZE}
        if service == "python":  # VM_FAULT_RETRY: page_mkwrite asks for patience
            region = uv.map(path, "r+", page_mkwrite=ALWAYS_WAIT, **options)
            touch = Touch(region.address, 1)
            wait_until(lambda: any(r.tries for r in region.trace()))
            region.discard()
        else:
            region = uv.map(path, **options)
            lib.uvm_inject(lib.UVM_OP_PREAD_NOWAIT, 0, 1 << 40, errno.EAGAIN, 0)
            lib.uvm_inject(lib.UVM_OP_PREAD, 0, 1, 0, 500_000_000)
            touch = Touch(region.address)
            wait_until(lambda: region._ops.cache.folios(0, 1)[0] & 0xFF == FolioState.FILLING)
            region.close()
        touch.join(10)
        return "it waits for ever" if touch.is_alive() else f"it read {touch.finish()}"


@pytest.mark.parametrize("service", SERVICES)
def test_a_region_dropped_during_retry_lets_its_toucher_go(service):
    """The memory is gone: SIGSEGV. Inline the toucher itself reads, and close() waits for it."""
    result = run_in_child(in_child_close_under_a_fault_that_waits, service, timeout=25, check=False)
    if service == "inline" and result.returncode == 0:
        assert result.value == f"it read {pattern(1)[0]}"
    else:
        assert result.returncode == -signal.SIGSEGV, (result.value, result.stderr)


@pytest.mark.parametrize("what", ["requests", "numbers"])
def test_closing_while_others_use_old_handles(make_file, what):
    """Handles of regions that come and go, used by other threads all the time: stale or right, no more.
    Who asks for numbers waits for executors that are inside, close() for who asks: never for ever."""
    path = make_file(4 * PAGE_SIZE)
    handles: list[int] = [0]
    stop = threading.Event()
    calls: dict[str, list[Callable[[int], int]]] = {
        "requests": [
            lib.uvm_region_check,
            lambda handle: lib.uvm_region_evict(handle, 0, 4),
            lambda handle: lib.uvm_region_advise(handle, 2),
        ],
        "numbers": [lib.uvm_region_settle],
    }

    def use() -> int:
        n = 0
        while not stop.is_set():
            for call in calls[what]:
                rc = call(handles[0])
                assert rc >= 0 or rc == -errno.ESTALE, rc
            n += 1
        return n

    users = [in_thread(use) for _ in range(2)]
    end, slowest = time.monotonic() + 1, 0.0
    try:
        while time.monotonic() < end:
            with uv.map(path, service="native") as region:
                handles[0] = region.handle
                with region.buffer as buffer:
                    assert bytes(buffer) == pattern(4 * PAGE_SIZE)
                start = time.monotonic()
            slowest = max(slowest, time.monotonic() - start)
    finally:
        stop.set()
        assert all(finish() > 10 for finish in users)
    assert slowest < 1.0, f"close() took {slowest:.1f} s"
