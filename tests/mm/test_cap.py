"""The cap of a file's cache: a pass over four times as much never holds more than the cap and one per cent,
by our own count and by the memfd's blocks."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

import uffd_vm as uv
from tests.support import in_thread, run_in_child
from uffd_vm.kernel._lib import lib
from uffd_vm.page import PAGE_SIZE
from uffd_vm.testing.invariants import check_all
from uffd_vm.testing.strategies import pattern

pytestmark = pytest.mark.usefixtures("uffd")


class Watched:
    """A region, and the most that its memfd was seen to hold."""

    def __init__(self, region: uv.Region, cap_pages: int) -> None:
        self.region, self.cap_pages = region, cap_pages
        self.cache = region._ops.cache
        self.most = 0

    def look(self) -> None:
        blocks = os.fstat(self.cache.data_fd).st_blocks * 512 // PAGE_SIZE
        self.most = max(self.most, blocks)

    def check(self) -> None:
        limit = self.cap_pages * 1.01
        assert lib.uvm_cache_ctl(self.cache.id).nr_peak <= limit, "by our own count"
        assert self.most <= limit, "by the memfd's blocks"
        assert self.most >= self.cap_pages * 0.5, "the cap is used"


@pytest.mark.parametrize(
    ("service", "cap_pages"),
    [(service, pages) for service in ("native", "python", "inline") for pages in (64, 256, 1024)]
    + [("native", 4096)],
)
@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_a_pass_over_four_caps_peaks_at_the_cap(make_file, service, mode, cap_pages):
    path = make_file(4 * cap_pages * PAGE_SIZE)
    model = bytearray(path.read_bytes())
    with uv.map(path, mode, service=service, cap=cap_pages * PAGE_SIZE) as region:
        watched = Watched(region, cap_pages)
        with region.buffer as buffer:
            for page in range(4 * cap_pages):
                assert buffer[page * PAGE_SIZE] == model[page * PAGE_SIZE]
                if page % 8 == 0:
                    watched.look()
            watched.check()
            if mode == "r+":  # dirty ones are written back first
                for page in range(4 * cap_pages):
                    buffer[page * PAGE_SIZE + 3] = model[page * PAGE_SIZE + 3] = page & 0xFF
                    if page % 8 == 0:
                        watched.look()
                watched.check()
            assert region.residency().cache_cap_bytes == cap_pages * PAGE_SIZE
        check_all(region)
    assert path.read_bytes() == model


@pytest.mark.parametrize("service", ["native", "inline"])
def test_threads_in_many_places_stay_under_the_cap_too(make_file, service):
    cap_pages = 1024
    path = make_file(4 * cap_pages * PAGE_SIZE)
    model = path.read_bytes()
    with uv.map(path, service=service, cap=cap_pages * PAGE_SIZE) as region:
        watched = Watched(region, cap_pages)

        def quarter(number: int) -> int:
            with region.buffer as buffer:
                part = memoryview(buffer)[number * cap_pages * PAGE_SIZE :][: cap_pages * PAGE_SIZE]
                same = bytes(part) == model[number * cap_pages * PAGE_SIZE :][: len(part)]
                part.release()
            watched.look()
            return int(same)

        workers = [in_thread(quarter, n) for n in range(4)]
        while any(worker.alive() for worker in workers):  # type: ignore[attr-defined]
            watched.look()
        assert all(worker() for worker in workers)
        watched.check()
        check_all(region)


@pytest.mark.parametrize("service", ["native", "python", "inline"])
def test_room_is_found_behind_pages_that_were_evicted_out_of_turn(make_file, service):
    path = make_file(400 * PAGE_SIZE)
    data = path.read_bytes()
    with uv.map(path, service=service, cap=128 * PAGE_SIZE) as region:
        region.load((0, 128 * PAGE_SIZE))
        assert region.evict((0, 96 * PAGE_SIZE)) == 96 * PAGE_SIZE
        region.load((128 * PAGE_SIZE, 224 * PAGE_SIZE))  # full again, and all in one run
        for at in range(250 * PAGE_SIZE, 400 * PAGE_SIZE, 40 * PAGE_SIZE):
            assert ctypes.string_at(region.address + at, 8) == data[at : at + 8]
        check_all(region)


def in_child_read_across_a_border(service: str) -> bytes:
    """All but one page of the cap are dirty, and one instruction needs two more."""
    cap_pages = 32
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.bin"
        path.write_bytes(pattern(100 * PAGE_SIZE))
        with uv.map(
            path,
            "r+",
            service=service,
            cap=cap_pages * PAGE_SIZE,
            fault_around_bytes=PAGE_SIZE,
            readahead_bytes=0,
        ) as region:
            address = region.address
            for page in range(cap_pages - 1):
                ctypes.memset(address + page * PAGE_SIZE, page, 1)
            word = ctypes.create_string_buffer(8)
            got = b""
            for page in (50, 60, 70):
                ctypes.memmove(word, address + page * PAGE_SIZE - 4, 8)
                got += word.raw
            assert lib.uvm_cache_ctl(region._ops.cache.id).nr_peak <= cap_pages
        return got


@pytest.mark.parametrize("service", ["native", "python", "inline"])
def test_an_instruction_that_needs_two_pages_gets_both(service):
    """The page that came for its first half must not be what makes room for the second."""
    data = pattern(100 * PAGE_SIZE)
    want = b"".join(data[p * PAGE_SIZE - 4 :][:8] for p in (50, 60, 70))
    assert run_in_child(in_child_read_across_a_border, service, timeout=15).value == want


def in_child_read_across_a_border_at_the_smallest_cap(service: str, mode: str) -> bytes:
    """The smallest cap still holds what one instruction may need."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.bin"
        path.write_bytes(pattern(40 * PAGE_SIZE))
        with uv.map(path, mode, service=service, cap=PAGE_SIZE, deadline=10) as region:
            at = region.address + PAGE_SIZE - 4
            got = ctypes.c_uint64.from_address(at).value.to_bytes(8, "little")
            ctypes.memmove(at + 20 * PAGE_SIZE, at, 8) if mode != "r" else None
            region.discard() if mode == "r+" else None
        return got


@pytest.mark.parametrize("service", ["native", "python", "inline"])
@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_the_smallest_cap_holds_what_one_instruction_needs(service, mode):
    got = run_in_child(in_child_read_across_a_border_at_the_smallest_cap, service, mode).value
    assert got == pattern(2 * PAGE_SIZE)[PAGE_SIZE - 4 : PAGE_SIZE + 4]


def test_dirty_pages_that_a_child_may_write_to_do_not_keep_clean_ones_in(make_file):
    cap_pages = 256
    path = make_file(8 * cap_pages * PAGE_SIZE)
    data = path.read_bytes()
    options = {"cap": cap_pages * PAGE_SIZE, "fault_around_bytes": PAGE_SIZE, "readahead_bytes": 0}
    with uv.map(path, "r+", service="native", **options) as region:
        watched = Watched(region, cap_pages)
        with region.buffer as buffer:
            for page in range(cap_pages // 2):
                buffer[page * PAGE_SIZE] = 7
            ready, go = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(go)
                os.read(ready, 1)
                os._exit(0)
            for page in range(cap_pages // 2, 8 * cap_pages):
                assert buffer[page * PAGE_SIZE] == data[page * PAGE_SIZE]
            watched.look()
            watched.check()
            os.close(go)
            os.close(ready)
            assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("service", ["native", "python", "inline"])
def test_what_evict_has_emptied_does_not_hide_what_is_there(make_file, service):
    cap = 128 * PAGE_SIZE
    path = make_file(16 * cap)
    want = path.read_bytes()
    with uv.map(path, service=service, cap=cap) as region:
        for i in range(24):
            at = i * 7 % 12 * cap
            with region.buffer as buffer:
                assert buffer[at : at + 3 * cap] == want[at : at + 3 * cap]
            if i % 3 == 0:
                region.evict()
        check_all(region)


CAP_PAGES = 40


def in_child_kill_children(path: str, mode: str) -> tuple[float, int, int]:
    """Children die in the middle of filling or writing back; then the file is read through the cap that
    they leave. The seconds it took, pages charged, pages in the memfd."""
    options = {"service": "native", "cap": CAP_PAGES * PAGE_SIZE, "readahead_bytes": 0}
    want = Path(path).read_bytes()
    with uv.map(path, mode, fault_around_bytes=PAGE_SIZE, **options) as region:
        buffer = region.buffer
        for number in range(30):
            pid = os.fork()
            if pid == 0:
                ours = range(number * 8, number * 8 + 8)
                if mode == "r+":
                    for page in ours:
                        buffer[page * PAGE_SIZE] = want[page * PAGE_SIZE]
                    lib.uvm_inject(lib.UVM_OP_PWRITE, 0, 1 << 40, 0, 60 * 10**9)
                    region.flush()
                else:
                    lib.uvm_inject(lib.UVM_OP_PREAD_NOWAIT, 0, 1 << 40, errno.EAGAIN, 0)
                    lib.uvm_inject(lib.UVM_OP_PREAD, 0, 1 << 40, 0, 60 * 10**9)
                    for page in ours:
                        address = region.address + page * PAGE_SIZE
                        in_thread(ctypes.memmove, ctypes.create_string_buffer(1), address, 1)
                    time.sleep(60)
                os._exit(0)
            time.sleep(0.1)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        began = time.monotonic()
        for _ in range(3):
            assert bytes(buffer) == want
        took = time.monotonic() - began
        cache = region._ops.cache
        blocks = os.fstat(cache.data_fd).st_blocks * 512 // PAGE_SIZE
        charged = lib.uvm_cache_ctl(cache.id).nr_used
        buffer.release()
    assert Path(path).read_bytes() == want
    return took, charged, blocks


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_what_killed_children_leave_does_not_fill_the_cap(make_file, mode):
    path = make_file(10 * CAP_PAGES * PAGE_SIZE)
    took, charged, blocks = run_in_child(in_child_kill_children, str(path), mode, timeout=60).value
    assert took < 10, "each fault waited for room"
    assert blocks <= charged + 1 <= CAP_PAGES + 1
