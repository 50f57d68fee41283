"""pin(): a device stores into pages of a region behind every page table, and nothing of it is lost.

The device is a file opened with O_DIRECT: the kernel pins the pages of the buffer and has the disk write to
them. Write protection does not see that: a page that is written back, taken for clean and evicted meanwhile
goes on being written to where nobody reads."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import threading
import time
from pathlib import Path

import pytest

import uffd_vm as uv
from tests.mm.test_processes import in_fork
from tests.support import in_thread, wait_until
from uffd_vm.fault.pte import FolioState
from uffd_vm.kernel._lib import lib
from uffd_vm.page import PAGE_SIZE
from uffd_vm.service.python import python_service
from uffd_vm.testing.inject import inject
from uffd_vm.testing.invariants import check_all
from uffd_vm.testing.strategies import pattern

pytestmark = pytest.mark.usefixtures("uffd")

SERVICES = ("native", "python", "inline")
CAP_PAGES = 64


def pages(first: int, end: int) -> tuple[int, int]:
    return first * PAGE_SIZE, end * PAGE_SIZE


def states(region: uv.Region, first: int, end: int) -> set[FolioState]:
    words = region._ops.cache.folios(first, end - first)
    return {FolioState(word & 0xFF) for word in words}


def nr_in_memfd(region: uv.Region, first: int, end: int) -> int:
    fd, n = region._ops.cache.data_fd, 0
    for index in range(first, end):
        with contextlib.suppress(OSError):
            n += os.lseek(fd, index * PAGE_SIZE, os.SEEK_DATA) == index * PAGE_SIZE
    return n


def read_all(region: uv.Region) -> bytes:
    got = ctypes.create_string_buffer(region.nbytes)
    ctypes.memmove(got, region.address, region.nbytes)
    return got.raw


def touch_all(region: uv.Region, first: int, end: int, *, write: bool = False) -> None:
    """One page after another, with the GIL given up."""
    byte = ctypes.create_string_buffer(1)
    for index in range(first, end):
        at = region.address + index * PAGE_SIZE
        ctypes.memmove(byte, at, 1)
        if write:
            ctypes.memmove(at, byte, 1)


@pytest.fixture
def direct(tmp_path):
    """direct(data): a descriptor of a file that holds it, whose reads are the device's."""
    fds = []

    def make(data: bytes) -> int:
        path = tmp_path / f"source{len(fds)}.bin"
        path.write_bytes(data)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        try:
            fds.append(os.open(path, os.O_RDONLY | os.O_DIRECT))
        except OSError as error:
            pytest.skip(f"the file system of {tmp_path} has no O_DIRECT: {error}")
        return fds[-1]

    yield make
    for fd in fds:
        os.close(fd)


# --- nothing is lost ------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [8, CAP_PAGES // 2])
@pytest.mark.parametrize("service", [*SERVICES, "kernel"])
def test_direct_reads_through_a_small_cap(make_file, direct, service, piece):
    """While other threads evict, flush, and fill the cache with other pages."""
    nr_pages = 1024
    path, data = make_file(nr_pages * PAGE_SIZE), pattern(nr_pages * PAGE_SIZE, seed=7)
    fd, stop = direct(data), threading.Event()
    options = {} if service == "kernel" else {"cap": CAP_PAGES * PAGE_SIZE}
    with uv.map(path, "r+", service=service, **options) as region:

        def evict_and_flush() -> None:
            for n in itertools.count():
                if stop.is_set():
                    break
                region.evict()
                if n % 8 == 0:
                    region.flush()

        def reclaim() -> None:
            for index in itertools.cycle(range(0, nr_pages, 5)):
                if stop.is_set():
                    break
                touch_all(region, index, index + 1)

        others = [in_thread(evict_and_flush), in_thread(reclaim)]
        try:
            for first in range(0, nr_pages, piece):
                start, end = pages(first, first + piece)
                with region.pin((start, end)) as view:
                    assert os.preadv(fd, [view], start) == end - start
        finally:
            stop.set()
            for other in others:
                other(60)
        assert read_all(region) == data
        if service != "kernel":
            check_all(region)
            region.flush()
            clean = {FolioState.ABSENT, FolioState.UPTODATE}  # once read-ahead has ended
            wait_until(lambda: states(region, 0, nr_pages) <= clean)
    assert path.read_bytes() == data


@pytest.mark.parametrize("service", ["native", "inline"])
def test_a_write_back_that_began_before_the_pin(make_file, direct, service):
    """It has protected the pages and takes its copy; the device comes behind the copy."""
    path, data = make_file(16 * PAGE_SIZE), pattern(16 * PAGE_SIZE, seed=3)
    fd = direct(data)
    with uv.map(path, "r+", service=service) as region:
        touch_all(region, 0, 16, write=True)
        with inject("PWRITE", delay=0.5) as writing:
            flush = in_thread(region.flush)
            wait_until(lambda: writing.calls > 0)  # protected, copied, and on its way to the file
            with region.pin() as view:
                assert os.preadv(fd, [view], 0) == len(data)
            flush()
        assert states(region, 0, 16) == {FolioState.DIRTY}
        region.flush()
        region.evict()
        assert read_all(region) == data
    assert path.read_bytes() == data


@pytest.mark.parametrize("service", SERVICES)
def test_a_device_that_stores_behind_protect_is_told_of(make_file, direct, service):
    path, data = make_file(8 * PAGE_SIZE), pattern(8 * PAGE_SIZE, seed=3)
    fd = direct(data)
    with uv.map(path, "r+", service=service, track=True) as region:
        touch_all(region, 0, 8, write=True)
        with region.pin(pages(2, 5)) as view:
            assert region.protect() == 5 * PAGE_SIZE  # the others
            os.preadv(fd, [view], 2 * PAGE_SIZE)
            assert region.dirty() == [pages(2, 5)]
        assert region.dirty() == [pages(2, 5)]
        check_all(region)
        assert region.protect() == 3 * PAGE_SIZE and region.dirty() == []


@pytest.mark.parametrize("mode", ["c", None])
def test_private_pages_that_were_protected_meanwhile_are_told_of(make_file, direct, mode):
    data = pattern(8 * PAGE_SIZE, seed=3)
    fd = direct(data)
    if mode is None:
        region = uv.anonymous(8 * PAGE_SIZE, track=True)
    else:
        region = uv.map(make_file(8 * PAGE_SIZE), mode, track=True)
    with region:
        with region.pin(pages(2, 5)) as view:
            region.protect()
            os.preadv(fd, [view], 2 * PAGE_SIZE)
            region.protect()
        assert region.dirty() == [pages(2, 5)]


# --- what a pin keeps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", SERVICES)
def test_pinned_pages_stay_dirty_and_writable_and_others_go(make_file, service):
    path = make_file(256 * PAGE_SIZE)
    data = bytearray(path.read_bytes())
    with uv.map(path, "r+", service=service, cap=CAP_PAGES * PAGE_SIZE) as region:
        with region.pin(pages(8, 40)) as view:
            assert states(region, 8, 40) == {FolioState.DIRTY}
            view[5] = data[8 * PAGE_SIZE + 5] = 1
            region.flush()
            assert path.read_bytes() == data  # flush() means what it says
            region.evict()
            touch_all(region, 0, 256, write=True)  # through what the cap has left
            touch_all(region, 0, 256)
            region.evict()
            assert states(region, 8, 40) == {FolioState.DIRTY}
            assert nr_in_memfd(region, 8, 40) == 32
            before = region.stats()["pgfault"]
            view[7] = data[8 * PAGE_SIZE + 7] = 2
            assert region.stats()["pgfault"] == before
            assert region._ops.cache.used_bytes <= CAP_PAGES * PAGE_SIZE
            check_all(region)
        assert states(region, 8, 40) == {FolioState.DIRTY}
        region.flush()
        assert states(region, 8, 40) == {FolioState.UPTODATE}
        region.evict()
        assert nr_in_memfd(region, 8, 40) == 0
        assert read_all(region) == data
        check_all(region)
    assert path.read_bytes() == data


@pytest.mark.parametrize("service", SERVICES)
def test_reclaim_does_not_write_pinned_pages_again_and_again(make_file, service):
    with uv.map(
        make_file(512 * PAGE_SIZE), "r+", service=service, cap=CAP_PAGES * PAGE_SIZE
    ) as region:
        with region.pin(pages(0, 32)):
            touch_all(region, 32, 512, write=True)
            assert region.stats()["writeback"] <= 480
            check_all(region)


@pytest.mark.parametrize("service", SERVICES)
def test_pins_are_counted(make_file, service):
    with uv.map(make_file(32 * PAGE_SIZE), "r+", service=service) as region:
        with contextlib.ExitStack() as outer:
            outer.enter_context(region.pin(pages(0, 8)))
            with region.pin(pages(4, 12)):
                pass
            region.flush()
            assert states(region, 0, 8) == {FolioState.DIRTY}
            assert states(region, 8, 12) == {FolioState.UPTODATE}
        region.flush()
        assert states(region, 0, 12) == {FolioState.UPTODATE}


def test_another_region_of_the_file_respects_it(make_file):
    path = make_file(32 * PAGE_SIZE)
    with uv.map(path, "r+", service="native") as one:
        with uv.map(path, "r+", service="native", offset=4 * PAGE_SIZE) as two:
            with two.pin(pages(0, 4)):
                one.flush()
                one.evict()
                assert states(one, 4, 8) == {FolioState.DIRTY}
                check_all(one, two)


# --- typed errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", SERVICES)
def test_no_more_than_half_of_the_cap(make_file, service):
    path = make_file(256 * PAGE_SIZE)
    with uv.map(path, "r+", service=service, cap=CAP_PAGES * PAGE_SIZE) as region:
        with pytest.raises(uv.BudgetExceeded, match=r"33 pages .*half of the cap .*\(64 pages\)"):
            with region.pin(pages(0, 33)):
                pass
        with region.pin(pages(0, 32)):
            with pytest.raises(uv.BudgetExceeded, match="smaller ranges"):
                with region.pin(pages(100, 101)):
                    pass
        with region.pin(pages(100, 132)):
            touch_all(region, 0, 256)
        assert read_all(region) == path.read_bytes()


@pytest.mark.parametrize("service", SERVICES)
def test_the_smallest_cap_serves_beside_a_pin(make_file, service):
    path = make_file(256 * PAGE_SIZE)
    with uv.map(path, "r+", service=service, cap=8 * PAGE_SIZE) as region:
        with region.pin(pages(0, 3)):
            began = time.monotonic()
            touch_all(region, 3, 256, write=True)
            assert time.monotonic() - began < 20  # no page waits for room in vain
            with pytest.raises(uv.BudgetExceeded), region.pin(pages(10, 11)):
                pass
        assert read_all(region) == path.read_bytes()
        check_all(region)


@pytest.mark.parametrize("service", SERVICES)
def test_all_of_a_file_that_fits(make_file, service):
    with uv.map(
        make_file(64 * PAGE_SIZE), "r+", service=service, cap=CAP_PAGES * PAGE_SIZE
    ) as region:
        with region.pin():
            region.flush()
            assert states(region, 0, 64) == {FolioState.DIRTY}


def test_too_many_pins_are_a_typed_error(make_file):
    with uv.map(make_file(4 * PAGE_SIZE), "r+", service="native") as region:
        with contextlib.ExitStack() as stack:
            for _ in range(1024):
                stack.enter_context(region.pin((0, 1)))
            with pytest.raises(uv.BudgetExceeded, match="too many ranges"):
                stack.enter_context(region.pin((0, 1)))
        with region.pin():
            pass


@pytest.mark.parametrize("service", [*SERVICES, "kernel"])
def test_the_view_and_the_end_of_it(make_file, service):
    path = make_file(8 * PAGE_SIZE - 5)
    region = uv.map(path, "r+", service=service)
    with region.pin((10, 20)) as view:
        assert bytes(view) == path.read_bytes()[10:20] and not view.readonly
        with pytest.raises(uv.RegionBusyError):
            region.close()
    with pytest.raises(ValueError, match="released"):
        view[0]
    with region.pin((8, 8)) as view:
        assert len(view) == 0
    with pytest.raises(uv.InvalidArgument):
        with region.pin((0, 1 << 40)):
            pass
    with pytest.raises(ZeroDivisionError), region.pin():
        raise ZeroDivisionError
    with region.pin() as view:
        kept = memoryview(view)  # it outlives the pin, as any view
    kept.release()
    region.close()
    with pytest.raises(uv.RegionClosedError), region.pin():
        pass


@pytest.mark.parametrize("service", ["native", "inline"])
def test_a_pin_that_fails_keeps_nothing(make_file, service):
    with uv.map(make_file(8 * PAGE_SIZE), "r+", service=service) as region:
        with inject("PREAD", 5, count=100), inject("PREAD_NOWAIT", 11, count=100):
            with pytest.raises(uv.SourceError), region.pin():
                pass
        touch_all(region, 0, 8, write=True)
        region.flush()
        assert states(region, 0, 8) == {FolioState.UPTODATE}


# --- where nothing is taken away ---------------------------------------------------------------------------


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("mode, track", [("r", False), ("c", False), ("c", True), (None, True)])
def test_other_modes(make_file, direct, mode, track, service):
    path, data = make_file(256 * PAGE_SIZE), pattern(256 * PAGE_SIZE, seed=5)
    if mode is None:
        region = uv.anonymous(256 * PAGE_SIZE, service=service, track=track)
    else:
        cap = CAP_PAGES * PAGE_SIZE
        region = uv.map(path, mode, service=service, track=track, cap=cap)
    fd = direct(data)
    with region:
        for first in range(0, 256, 48):
            start, end = first * PAGE_SIZE, min((first + 48) * PAGE_SIZE, region.nbytes)
            with region.pin((start, end)) as view:
                if mode == "r":
                    assert view.readonly and view == path.read_bytes()[start:end]
                    continue
                assert os.preadv(fd, [view], start) == end - start
        region.evict()
        assert read_all(region) == (path.read_bytes() if mode == "r" else data)
        if track:
            assert region.dirty() == [(0, region.nbytes)]
        if mode is not None:
            assert lib.uvm_cache_ctl(region._ops.cache.id).nr_pins == 0
        check_all(region)


# --- other processes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", ["native", "inline"])  # no child inherits "r+" of "python"
def test_a_forked_child_ends_no_pin_of_its_parent(make_file, service):
    with uv.map(make_file(32 * PAGE_SIZE), "r+", service=service) as region:
        with region.pin(pages(0, 8)) as view:

            def leave() -> int:
                lib.uvm_region_unpin(region.handle, 0)
                with region.pin(pages(8, 16)) as mine:
                    return len(mine)

            assert in_fork(leave) == str(8 * PAGE_SIZE).encode()
            view[3] = 9
            region.flush()
            assert states(region, 0, 8) == {FolioState.DIRTY}
        region.flush()
        assert lib.uvm_cache_ctl(region._ops.cache.id).nr_attached == 1
        assert states(region, 0, 8) == {FolioState.UPTODATE}


def test_pins_of_a_dead_child_are_gone(make_file):
    path = make_file(256 * PAGE_SIZE)
    with uv.map(path, "r+", service="native", cap=CAP_PAGES * PAGE_SIZE) as region:

        def pin_and_die() -> None:
            region.pin(pages(0, 32)).__enter__()
            touch_all(region, 32, 40)  # it is alive, and its pins do not stand in its way

        assert in_fork(pin_and_die) == b"None"
        with region.pin(pages(100, 132)):  # half of the cap is ours again
            region.flush()
            assert states(region, 100, 132) == {FolioState.DIRTY}
            assert FolioState.DIRTY not in states(region, 0, 32)
        assert read_all(region) == path.read_bytes()
        check_all(region)


def test_another_service_process_respects_them(make_file, direct):
    path, data = make_file(256 * PAGE_SIZE), pattern(256 * PAGE_SIZE, seed=3)
    fd = direct(data)
    with uv.map(path, "r+", service="python", cap=CAP_PAGES * PAGE_SIZE, deadline=5) as region:
        with region.pin(pages(0, 32)) as view:
            python_service().kill()
            region.load(pages(200, 201))
            touch_all(region, 32, 256, write=True)
            region.flush()
            assert states(region, 0, 32) == {FolioState.DIRTY}
            assert os.preadv(fd, [view], 0) == len(view)
        assert read_all(region)[: 32 * PAGE_SIZE] == data[: 32 * PAGE_SIZE]
    assert Path(path).read_bytes()[: 32 * PAGE_SIZE] == data[: 32 * PAGE_SIZE]
