"""The native service on real faults: who is woken, how often the file is read, what is left behind, how
much memory it takes. What pages show in each mode is in tests/contracts/ and tests/mm/."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import uffd_vm as uv
from tests.support import Touch, in_thread, run_in_child, wait_until
from uffd_vm.fault.action import Action
from uffd_vm.fault.fault import FaultFlag
from uffd_vm.fault.pte import FolioState, PteState
from uffd_vm.kernel._lib import ffi, lib
from uffd_vm.kernel.features import Feature
from uffd_vm.page import PAGE_SIZE
from uffd_vm.testing.inject import inject
from uffd_vm.testing.invariants import check_all
from uffd_vm.testing.strategies import pattern

pytestmark = pytest.mark.requires(Feature.MISSING_SHMEM, Feature.POISON)

MODES = ("r", "c", "r+")


@pytest.fixture
def make_file(tmp_path: Path) -> Callable[..., Path]:
    def make(nr_pages: int = 64, name: str = "data.bin") -> Path:
        path = tmp_path / name
        path.write_bytes(pattern(nr_pages * PAGE_SIZE))
        return path

    return make


@contextmanager
def data_file(nr_pages: int = 64) -> Iterator[Path]:
    """For functions that run in a child."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.bin"
        path.write_bytes(pattern(nr_pages * PAGE_SIZE))
        yield path


@contextmanager
def slow_reads(delay: float, count: int = 1, skip: int = 0) -> Iterator[None]:
    """Reads of the file that have to wait: the kernel's page cache never has it, the disk is slow."""
    lib.uvm_inject(lib.UVM_OP_PREAD_NOWAIT, 0, 1 << 40, errno.EAGAIN, 0)
    try:
        with inject("PREAD", delay=delay, count=count, skip=skip):
            yield
    finally:
        lib.uvm_inject_clear()


def process_stats() -> dict[str, int]:
    stats = ffi.new("struct uvm_process_stats *")
    lib.uvm_process_stats(stats)
    return {name: getattr(stats, name) for name, _ in ffi.typeof("struct uvm_process_stats").fields}


def thread_names() -> list[str]:
    return sorted((t / "comm").read_text().strip() for t in Path("/proc/self/task").iterdir())


# --- the GIL ----------------------------------------------------------------------------------------


def in_child_subscript_with_the_gil_held(mode: str) -> int:
    with data_file() as path:
        region = (
            uv.anonymous(64 * PAGE_SIZE, service="native", track=mode == "anonymous tracked")
            if mode.startswith("anonymous")
            else uv.map(path, mode[:2].strip(), service="native", track=mode == "c tracked")
        )
        with region:
            a = region.array()
            for page in range(64):
                got = int(a[page * PAGE_SIZE])
                assert got == (
                    0 if mode.startswith("anon") else path.read_bytes()[page * PAGE_SIZE]
                )
                if mode != "r":
                    a[page * PAGE_SIZE + 1] = 77
                    assert a[page * PAGE_SIZE + 1] == 77
            del a
            return int(region.stats()["pgfault"])


@pytest.mark.parametrize("mode", ["anonymous", "anonymous tracked", "r", "c", "c tracked", "r+"])
def test_a_subscript_that_holds_the_gil_is_served(mode: str) -> None:
    assert run_in_child(in_child_subscript_with_the_gil_held, mode, timeout=20).value > 0


def in_child_slow_read_with_the_gil_held() -> int:
    with (
        data_file() as path,
        uv.map(path, service="native", fault_around_bytes=PAGE_SIZE) as region,
    ):
        with slow_reads(0.2):
            value = int(region.array()[5 * PAGE_SIZE])
        assert value == path.read_bytes()[5 * PAGE_SIZE]
        return int(region.stats()["pgmajfault"])


def test_a_slow_read_is_waited_for_with_the_gil_held() -> None:
    assert run_in_child(in_child_slow_read_with_the_gil_held, timeout=20).value == 1


# --- start ------------------------------------------------------------------------------------------


def in_child_no_memory_to_start_with(service: str) -> int:
    """Every mmap of a create fails in turn, those for the threads' buffers too."""
    with data_file() as path:
        with uv.map(path, service=service):
            pass
        before, threads = process_stats(), thread_names()
        for skip in range(100):
            with inject("MMAP", errno.ENOMEM, skip=skip) as injection:
                try:
                    region = uv.map(path, service=service)
                except (OSError, MemoryError) as error:
                    assert isinstance(error, MemoryError) or error.errno == errno.ENOMEM
                    assert process_stats() == before and thread_names() == threads
                    continue
                fired = injection.fired
            with region:
                assert bytes(region.buffer) == path.read_bytes()
            if not fired:
                return skip
        raise AssertionError("each of 100 calls failed")


@pytest.mark.parametrize("service", ["native", "inline"])
def test_a_service_that_has_no_memory_for_its_threads_does_not_start(service: str) -> None:
    # region, page table, a buffer for each thread that reads
    assert run_in_child(in_child_no_memory_to_start_with, service).value >= 5


# --- who fills, who waits ---------------------------------------------------------------------------


def test_many_threads_on_one_page_fill_it_once(make_file) -> None:
    path = make_file()
    with uv.map(path, service="native", fault_around_bytes=PAGE_SIZE, readahead_bytes=0) as region:
        with slow_reads(0.1, count=1000):
            touches = [Touch(region.address + 7 * PAGE_SIZE + i) for i in range(16)]
            data = path.read_bytes()
            for i, touch in enumerate(touches):
                assert touch.finish() == data[7 * PAGE_SIZE + i]
        wait_until(lambda: region.stats()["pgfault"] == 16)
        assert region.stats()["bytes_read"] == PAGE_SIZE
        assert region.stats()["pgmajfault"] == 16
        check_all(region)


def test_a_fault_joins_the_fill_of_its_neighbour(make_file) -> None:
    path = make_file()
    with uv.map(path, service="native", fault_around_bytes="64KiB", readahead_bytes=0) as region:
        with slow_reads(0.2, count=1000):
            first = Touch(region.address)
            folios = region._ops.cache.folios
            wait_until(lambda: folios(3, 1)[0] & 0xFF == FolioState.FILLING)
            joined = Touch(region.address + 3 * PAGE_SIZE)
            assert first.finish() == path.read_bytes()[0]
            assert joined.finish() == path.read_bytes()[3 * PAGE_SIZE]
        assert region.stats()["bytes_read"] == 16 * PAGE_SIZE
        joins = [r for r in region.trace() if r.action is Action.JOIN]
        assert any(r.index == 3 and r.pte is PteState.BUSY for r in joins)


def test_a_fault_that_needs_no_read_does_not_wait_for_one_that_does(make_file) -> None:
    with uv.map(make_file(), service="native", fault_around_bytes=PAGE_SIZE) as region:
        with uv.anonymous(PAGE_SIZE, service="native") as quick, slow_reads(1.0, count=2):
            waiting = Touch(region.address)
            wait_until(lambda: region._ops.cache.folios(0, 1)[0] & 0xFF == FolioState.FILLING)
            before = time.monotonic()
            assert Touch(quick.address).finish() == 0
            assert time.monotonic() - before < 0.5
            assert waiting.waits(0)
            waiting.finish()


def in_child_deadline(on_error: str) -> str:
    with data_file() as path:
        region = uv.map(
            path, service="native", deadline=0.3, on_error=on_error, fault_around_bytes=PAGE_SIZE
        )
        a = region.array()
        start = time.monotonic()
        with slow_reads(2.0):
            try:
                value = int(a[0])
            except uv.SourceTimeout as error:
                assert 0.25 < time.monotonic() - start < 1.5
                said = str(error)
            else:
                return f"read {value}"
        wait_until(lambda: region.stats()["pgfault_failed"] >= 1)
        records = [r for r in region.trace() if FaultFlag.DEADLINE in r.flags]
        assert records and records[0].action is Action.POISON

        def reads() -> bool:
            try:
                return bool(a[0] == path.read_bytes()[0])
            except uv.SourceTimeout:
                return False

        wait_until(reads, "the page can be read again")
        return said


def test_a_deadline_raises_and_the_next_touch_tries_again() -> None:
    said = run_in_child(in_child_deadline, "raise", timeout=30).value
    assert "deadline" in said


def test_a_deadline_is_sigbus_where_asked_for() -> None:
    result = run_in_child(in_child_deadline, "sigbus", timeout=30, check=False)
    assert result.returncode == -signal.SIGBUS


def test_a_read_error_of_the_disk_that_passes_is_not_seen(make_file) -> None:
    path = make_file()
    with uv.map(path, service="native") as region:
        lib.uvm_inject(lib.UVM_OP_PREAD_NOWAIT, 0, 1 << 40, errno.EAGAIN, 0)
        with inject("PREAD", errno.EIO, count=2):
            assert bytes(region.buffer[:PAGE_SIZE]) == path.read_bytes()[:PAGE_SIZE]
        assert region.stats()["pgfault_failed"] == 0


# --- read-ahead -------------------------------------------------------------------------------------


def test_read_ahead_finds_sequential_access_and_is_bounded(make_file) -> None:
    nr_pages = 2048
    path = make_file(nr_pages)
    data = path.read_bytes()
    with uv.map(path, service="native", readahead_bytes="256KiB") as region:
        buffer = region.buffer
        for page in range(nr_pages // 2):
            assert buffer[page * PAGE_SIZE] == data[page * PAGE_SIZE]
        buffer.release()
        stats = region.stats()
        assert stats["readahead"] > 0
        assert stats["pgfault"] < nr_pages // 2 // 16, "fewer faults than fault-around alone"
        # In flight ahead of the reader: one window that it is in, one that is on its way.
        limit = nr_pages // 2 + 3 * 64
        wait_until(lambda: region.stats()["bytes_read"] % PAGE_SIZE == 0)
        assert region.residency().resident_bytes <= limit * PAGE_SIZE


@pytest.mark.parametrize("service", ["native", "inline"])
def test_read_ahead_goes_down_too_and_is_bounded(make_file, service: str) -> None:
    """memmove() copies from the end where source and target lie so, as they do in array.copy()."""
    nr_pages = 2048
    path = make_file(nr_pages)
    data = path.read_bytes()
    with uv.map(path, service=service, readahead_bytes="256KiB") as region:
        buffer = region.buffer
        for page in range(nr_pages - 1, nr_pages // 2, -1):
            assert buffer[page * PAGE_SIZE] == data[page * PAGE_SIZE]
        buffer.release()
        stats = region.stats()
        assert stats["readahead"] > nr_pages // 4
        assert stats["pgfault"] < nr_pages // 2 // 16, "fewer faults than fault-around alone"
        assert region.residency().resident_bytes <= (nr_pages // 2 + 3 * 64) * PAGE_SIZE


@pytest.mark.parametrize("how", ["random order", "advice", "off"])
def test_read_ahead_stays_away(make_file, how: str) -> None:
    path = make_file(1024)
    around = PAGE_SIZE if how != "random order" else 4 * PAGE_SIZE
    options = {"readahead_bytes": 0} if how == "off" else {}
    with uv.map(path, service="native", fault_around_bytes=around, **options) as region:
        if how == "advice":
            region.advise("random")
        pages = list(range(256))
        if how == "random order":
            pages = list(range(1020, 0, -8))
        buffer = region.buffer
        data = path.read_bytes()
        for page in pages:
            assert buffer[page * PAGE_SIZE] == data[page * PAGE_SIZE]
        buffer.release()
        assert region.stats()["readahead"] == 0
        assert region.residency().resident_bytes == len(pages) * around


# --- memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_pass_over_a_file_of_four_caps_stays_under_the_cap(make_file, mode: str) -> None:
    cap_pages = 2048
    path = make_file(4 * cap_pages)
    data = path.read_bytes()
    with uv.map(path, mode, service="native", cap=cap_pages * PAGE_SIZE) as region:
        assert bytes(region.buffer) == data
        ctl = lib.uvm_cache_ctl(region._ops.cache.id)
        assert ctl.nr_peak <= cap_pages * 1.01
        if mode == "r+":
            with region.buffer as buffer:
                for page in range(4 * cap_pages):
                    buffer[page * PAGE_SIZE] ^= 0xFF
            assert ctl.nr_peak <= cap_pages * 1.01
        check_all(region)
    after = path.read_bytes()
    want = bytearray(data)
    if mode == "r+":
        want[::PAGE_SIZE] = bytes(b ^ 0xFF for b in data[::PAGE_SIZE])
    assert after == want


def in_child_many_entries_of_one_page() -> None:
    """Each fill leaves an entry in the queue that reclaim takes pages from; when all name one page, and
    that is dirty, none of them can make room."""
    with data_file(8) as path:
        with uv.map(path, "r+", service="native", fault_around_bytes=PAGE_SIZE) as region:
            buffer = region.buffer
            for _ in range(500):
                assert buffer[0] is not None
                region.evict()
            buffer[0] ^= 1
            for page in range(1, 8):
                assert buffer[page * PAGE_SIZE] == path.read_bytes()[page * PAGE_SIZE]
            buffer.release()
            region.flush()
            assert region.evict() == 8 * PAGE_SIZE
            check_all(region)


def test_a_queue_full_of_entries_of_one_dirty_page_is_written_anew() -> None:
    run_in_child(in_child_many_entries_of_one_page, timeout=15)


def in_child_map_a_sparse_tebibyte(mode: str) -> int:
    def rss() -> int:
        status = Path("/proc/self/status").read_text()
        line = next(x for x in status.splitlines() if x.startswith("VmRSS"))
        return int(line.split()[1]) * 1024

    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        path = Path(directory) / "sparse.bin"
        with open(path, "wb") as file:
            try:
                file.truncate(1 << 40)
            except OSError as error:  # ext4 has 16 TiB, others less
                return -(error.errno or 1)
        with uv.map(path, "r", service="native"):
            pass  # imports are not the file's
        # Nor is the fault thread, which makes its buffer of 1 MiB resident some time after it was started.
        other = stack.enter_context(uv.anonymous(PAGE_SIZE, service="native"))
        assert other.buffer[0] == 0
        before = rss()
        with uv.map(
            path, mode, service="native", cap="1GiB", fault_around_bytes=PAGE_SIZE
        ) as region:
            taken = rss() - before
            assert region.buffer[(1 << 39) + 5] == 0
            assert region.stats()["pgfault"] == 1
            assert region.residency().resident_bytes == PAGE_SIZE
            assert region.evict() == PAGE_SIZE
            region.flush()
        return taken


@pytest.mark.parametrize("mode", MODES)
def test_a_sparse_tebibyte_maps_in_less_than_a_mebibyte(mode: str) -> None:
    taken = run_in_child(in_child_map_a_sparse_tebibyte, mode, timeout=30).value
    if taken < 0:
        pytest.skip(f"no file of 1 TiB in the temporary directory: {os.strerror(-taken)}")
    assert taken < 1 << 20


def test_a_tracked_copy_sees_its_stores_beside_other_regions_of_the_file(make_file) -> None:
    path = make_file()
    with uv.map(path, "r", service="native") as other, uv.map(path, "c", track=True) as region:
        bytes(other.buffer)
        with region.buffer as buffer:
            assert buffer[0] == path.read_bytes()[0]
            buffer[0] ^= 1
            buffer[3 * PAGE_SIZE] ^= 1
        assert region.dirty() == [(0, PAGE_SIZE), (3 * PAGE_SIZE, 4 * PAGE_SIZE)]


def test_the_kernel_agrees_with_the_page_table_after_random_operations(make_file) -> None:
    rng = random.Random(11)
    path = make_file(128)
    regions = [
        uv.anonymous(128 * PAGE_SIZE, track=True),
        uv.anonymous(128 * PAGE_SIZE),
        uv.map(path, "c", track=True),
        uv.map(make_file(128, "other.bin"), "r+", track=True, cap=64 * PAGE_SIZE),
        uv.map(path, "r", cap=64 * PAGE_SIZE),
    ]
    with ExitStack() as stack:
        for region in regions:
            stack.enter_context(region)
        random_operations(rng, regions)


def random_operations(rng: random.Random, regions: list[uv.Region]) -> None:
    for step in range(400):
        region = rng.choice(regions)
        page = rng.randrange(128)
        part = (page * PAGE_SIZE, min(128, page + rng.randrange(1, 40)) * PAGE_SIZE)
        match = rng.randrange(7)
        with region.buffer as buffer:
            if match == 0:
                region.load(part)
            elif match == 1:
                region.evict(part)
            elif match == 2:
                region.flush(part)
            elif match == 3 and region._tracked:
                region.protect(part)
            elif match in (4, 5) and region.mode != "r":
                buffer[part[0]] = step & 0xFF
            else:
                bytes(buffer[part[0] : part[1] : PAGE_SIZE])
        check_all(region)


# --- life -------------------------------------------------------------------------------------------


def test_a_thousand_regions(make_file) -> None:
    path = make_file(4)
    data = path.read_bytes()
    regions = [
        uv.anonymous(2 * PAGE_SIZE, service="native")
        if i % 2
        else uv.map(path, MODES[i // 2 % 2], service="native")
        for i in range(1000)
    ]
    assert process_stats()["nr_regions"] == 1000 == len(regions)
    order = list(range(1000))
    random.Random(3).shuffle(order)
    for i in order:
        with regions[i].buffer as buffer:
            assert buffer[PAGE_SIZE] == (0 if i % 2 else data[PAGE_SIZE])
            if i % 2:
                buffer[PAGE_SIZE] = 1 + i % 200
    for i in order[::-1]:
        if i % 2:
            assert regions[i].buffer[PAGE_SIZE] == 1 + i % 200
        regions[i].close()
    assert process_stats()["nr_regions"] == 0


def test_the_service_ends_with_the_last_region(make_file) -> None:
    assert not [name for name in thread_names() if name.startswith("uvm-")]
    one = uv.map(make_file(), service="native")
    two = uv.anonymous(PAGE_SIZE)
    wait_until(lambda: "uvm-fault" in thread_names())
    assert one.buffer[0]
    one.close()
    assert two.buffer[0] == 0 and "uvm-fault" in thread_names()
    two.close()
    assert not [name for name in thread_names() if name.startswith("uvm-")]
    assert set(process_stats().values()) <= {0, process_stats()["nr_forked"]}


def test_close_is_refused_while_views_live(make_file) -> None:
    path = make_file()
    region = uv.map(path, service="native")
    a = region.array()
    with pytest.raises(BufferError):
        region.close()
    assert a[3 * PAGE_SIZE] == path.read_bytes()[3 * PAGE_SIZE], "still served"
    del a
    region.close()


def test_a_stale_handle_is_told(make_file) -> None:
    region = uv.map(make_file(), service="native")
    handle = region.handle
    region.close()
    with pytest.raises(uv.StaleRegionError):
        region.load()
    with uv.map(make_file(), service="native") as again:
        assert again.handle != handle
        out = ffi.new("uint64_t *")
        assert lib.uvm_region_check(handle) == -errno.ESTALE
        assert lib.uvm_region_load(handle, 0, 1, out) == -errno.ESTALE
        assert lib.uvm_region_evict(handle, 0, 1) == -errno.ESTALE
        assert lib.uvm_region_close_begin(handle) == -errno.ESTALE


def in_child_close_while_a_fault_waits(others: bool) -> str:
    """The toucher has a bare address: nothing keeps the region open. It must not sleep for ever: its
    memory is gone, which is SIGSEGV."""
    with data_file() as path:
        other = uv.anonymous(PAGE_SIZE, service="native") if others else None
        region = uv.map(path, service="native", fault_around_bytes=PAGE_SIZE)
        with slow_reads(1.0):
            touch = Touch(region.address)
            wait_until(lambda: region._ops.cache.folios(0, 1)[0] & 0xFF == FolioState.FILLING)
            region.close()
        touch.join(10)
        state = "alive" if touch.is_alive() else "ended"
        del other
        return state


@pytest.mark.parametrize("others", [False, True], ids=["last region", "other regions live on"])
def test_close_lets_go_of_a_fault_that_waits(others: bool) -> None:
    result = run_in_child(in_child_close_while_a_fault_waits, others, timeout=25, check=False)
    assert result.returncode == -signal.SIGSEGV, (result.value, result.stderr)


def in_child_refused_close_while_a_fault_waits() -> int:
    with (
        data_file() as path,
        uv.map(path, service="native", fault_around_bytes=PAGE_SIZE) as region,
    ):
        with region.buffer as view, slow_reads(0.3):
            touch = Touch(region.address)
            wait_until(lambda: region._ops.cache.folios(0, 1)[0] & 0xFF == FolioState.FILLING)
            for _ in range(20):
                try:
                    region.close()
                except BufferError:
                    pass
            assert touch.finish() == view[0] == path.read_bytes()[0]
        return 1


def test_a_refused_close_disturbs_no_fault() -> None:
    assert run_in_child(in_child_refused_close_while_a_fault_waits, timeout=20).value == 1


def test_closing_and_mapping_while_others_fault(make_file) -> None:
    path = make_file(256)
    data = path.read_bytes()
    stop = threading.Event()

    def touch() -> int:
        n = 0
        while not stop.is_set():
            with uv.map(path, service="native", fault_around_bytes=PAGE_SIZE) as region:
                with region.buffer as buffer:
                    for page in range(0, 256, 17):
                        assert buffer[page * PAGE_SIZE] == data[page * PAGE_SIZE]
            n += 1
        return n

    workers = [in_thread(touch) for _ in range(4)]
    time.sleep(1.0)
    stop.set()
    assert all(finish() > 3 for finish in workers)


# --- follow the toucher -----------------------------------------------------------------------------


def in_child_follow() -> list[set[int]]:
    def service_cpus() -> set[int]:
        for task in Path("/proc/self/task").iterdir():
            if (task / "comm").read_text().strip() == "uvm-fault":
                return os.sched_getaffinity(int(task.name))
        return set()

    def touch(pages: range, cpus: set[int]) -> None:
        os.sched_setaffinity(0, cpus)  # of this thread
        for page in pages:
            ctypes.memset(region.address + page * PAGE_SIZE, 1, 1)

    home = os.sched_getaffinity(0)
    one = {min(home)}
    seen = []
    with uv.anonymous(4000 * PAGE_SIZE, service="native") as region:
        in_thread(touch, range(1000), one)()
        seen.append(service_cpus())
        in_thread(touch, range(1000, 3000), home)()
        seen.append(service_cpus())
    return [home, one, *seen]


def test_the_service_follows_a_bound_toucher_and_comes_back() -> None:
    home, one, during, after = run_in_child(in_child_follow, timeout=20).value
    if len(home) < 2:
        pytest.skip("one CPU only")
    assert during == one
    assert after == home, "left pinned"
