"""uv.map() and uv.anonymous() on real faults: content, modes, arrays, sharing, life."""

from __future__ import annotations

import errno
import gc
import os
import resource
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

import uffd_vm as uv
from tests.support import HUGE_PAGE_SIZE, MADV_COLLAPSE, call, run_in_child, wait_until
from uffd_vm.kernel._lib import lib
from uffd_vm.page import PAGE_SIZE
from uffd_vm.testing.invariants import check_all
from uffd_vm.testing.strategies import pattern

pytestmark = pytest.mark.usefixtures("uffd")
SIZES = [1, 100, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 17 * PAGE_SIZE + 5, 600 * PAGE_SIZE]


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
@pytest.mark.parametrize("nbytes", SIZES)
def test_every_byte_of_the_file_arrives(make_file, mode, nbytes):
    path = make_file(nbytes)
    with uv.map(path, mode, service="native") as region:
        assert (region.nbytes, region.mode, region.service) == (nbytes, mode, "native")
        assert region.nr_pages == -(-nbytes // PAGE_SIZE)
        assert bytes(region.buffer) == path.read_bytes()
        check_all(region)


@pytest.mark.parametrize("offset, length", [(0, 10), (PAGE_SIZE, None), (2 * PAGE_SIZE, 5000)])
def test_part_of_a_file(make_file, offset, length):
    path = make_file(10 * PAGE_SIZE + 7)
    end = None if length is None else offset + length
    with uv.map(path, service="native", offset=offset, length=length) as region:
        assert bytes(region.buffer) == path.read_bytes()[offset:end]


def test_what_lies_behind_the_end_of_the_file_is_zero_and_out_of_reach(make_file):
    with uv.map(make_file(PAGE_SIZE + 1), service="native") as region:
        a = region.array()
        assert a.nbytes == PAGE_SIZE + 1
        with pytest.raises(IndexError):
            a[PAGE_SIZE + 1]
        del a


@pytest.mark.parametrize("service", ["native", "inline", "python"])
@pytest.mark.parametrize("mode", ["anonymous", "r", "c", "r+"])
def test_the_kernel_makes_no_huge_pages_of_a_region(make_file, mode, service):
    """It would fill what is missing with zeros, and nobody would be told of the rest."""
    nbytes = 3 * HUGE_PAGE_SIZE
    if mode == "anonymous":
        region, want = uv.anonymous(nbytes, service=service), bytes(nbytes)
    else:
        path = make_file(nbytes)
        region, want = uv.map(path, mode, service=service), path.read_bytes()
    with region:
        region.load((0, HUGE_PAGE_SIZE))
        first = -(-region.address // HUGE_PAGE_SIZE) * HUGE_PAGE_SIZE
        for address in (first, first + HUGE_PAGE_SIZE):
            assert call("madvise", address, HUGE_PAGE_SIZE, MADV_COLLAPSE) == -errno.EINVAL
        assert bytes(region.buffer) == want
        check_all(region)


def in_child_file_size_limit(path: str, mode: str) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    with pytest.raises(uv.UffdError) as told:
        uv.map(path, mode, service="native")  # type: ignore[arg-type]
    assert told.value.errno == errno.EFBIG
    return str(told.value)


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_a_limit_of_file_sizes_is_named(make_file, mode):
    path = make_file(1 << 17)
    text = run_in_child(in_child_file_size_limit, str(path), mode).value
    assert "ulimit -f" in text and str(1 << 16) in text and str(path) in text


def in_child_no_descriptors(service: str) -> tuple[int, int]:
    """With 0, 1, 2 ... descriptors left; how many it takes, and how many a further file takes."""
    path, other = "/etc/passwd", "/etc/group"
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    uv.map(path, service=service).close()  # imports
    open_before = len(os.listdir("/proc/self/fd"))

    def is_enough(nr_left: int, file: str) -> bool:
        hold: list[int] = []
        with pytest.raises(OSError):
            while True:
                hold.append(os.dup(0))
        for _ in range(nr_left):
            os.close(hold.pop())
        try:
            with uv.map(file, service=service) as region:
                assert bytes(region.buffer) == Path(file).read_bytes()
            return True
        except uv.UffdError as error:
            assert error.errno == errno.EMFILE
            assert file in str(error) and "ulimit -n" in str(error) and " 64 " in str(error)
            return False
        finally:
            for fd in hold:
                os.close(fd)

    first = next(n for n in range(30) if is_enough(n, path))
    assert len(os.listdir("/proc/self/fd")) == open_before
    with uv.map(path, service=service):
        further = next(n for n in range(30) if is_enough(n, other))
    return first, further


@pytest.mark.parametrize(
    ("service", "most"),
    [("kernel", (3, 3)), ("native", (8, 5)), ("inline", (8, 5)), ("python", (16, 6))],
)
def test_running_out_of_descriptors_says_what_to_do(service, most):
    """docs/guide.md tells these numbers, less the one that map() holds while it works."""
    first, further = run_in_child(in_child_no_descriptors, service, timeout=60).value
    assert further <= most[1]
    assert first <= most[0]


def test_mapping_a_sparse_tebibyte_is_cheap(tmp_path):
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    uv.map(path, service="native").close()  # brings the service up
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(5):
        start = time.perf_counter()
        region = uv.map(path, service="native")
        times.append(time.perf_counter() - start)
        assert region.nbytes == 1 << 40
        repr(region)
        region.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024
    assert min(times) < 0.005, times
    with uv.map(path, service="native") as region:
        a = region.array("u8")
        assert a[-1] == 0 and a[1 << 36] == 0
        del a


@pytest.mark.parametrize(("mode", "service"), [("r", "native"), ("c", "native"), ("r+", "python")])
def test_looking_at_a_sparse_region_takes_no_memory(tmp_path, mode, service):
    nr_pages = 4 << 20
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(nr_pages * PAGE_SIZE)
    with uv.map(path, mode, service=service, fault_around_bytes=PAGE_SIZE) as region:
        touched = (0, 5000, nr_pages // 2 + 17, nr_pages - 1)
        for page in touched:
            assert region.buffer[page * PAGE_SIZE] == 0

        def held() -> int:
            return os.fstat(lib.uvm_cache_ctl_fd(region._ops.cache.id)).st_blocks

        before = held()
        residency = region.residency()
        assert sum(part > 0 for part in residency.heatmap(64)) == 3
        pages = residency.pages()
        assert [i for i, state in enumerate(pages) if state] == list(touched)
        for page in touched:
            assert residency.pages((page * PAGE_SIZE, (page + 1) * PAGE_SIZE))[0] == pages[page]
        assert held() == before


@pytest.mark.parametrize("service", ["native", "python"])
def test_giving_back_a_sparse_tebibyte_costs_what_was_touched(tmp_path, service):
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with uv.map(path, "r+", service=service, fault_around_bytes=PAGE_SIZE) as region:
        touched = (5, 1 << 33, (1 << 40) - 1)
        for at in touched:
            region.buffer[at] = 7
        start = time.perf_counter()
        region.flush()
        assert region.evict() == 3 * PAGE_SIZE
        assert region.evict((1 << 33, (1 << 33) + PAGE_SIZE)) == 0
        assert [region.buffer[at] for at in touched] == [7, 7, 7]
        region.buffer[1 << 30] = 8
        region.close()
        assert time.perf_counter() - start < 5  # a look at each page takes minutes
    with open(path, "rb") as file:
        for at in (*touched, 1 << 30):
            assert os.pread(file.fileno(), 1, at) == (b"\7" if at in touched else b"\10")


def test_anonymous_memory_is_zero_and_keeps_what_is_written():
    with uv.anonymous(100 * PAGE_SIZE + 3) as region:
        a = region.array()
        assert len(a) == 100 * PAGE_SIZE + 3
        assert not a[::1000].any()
        a[:] = 7
        assert (a == 7).all()
        check_all(region)
        del a


def test_private_changes_stay_private(make_file):
    path = make_file(8 * PAGE_SIZE)
    content = path.read_bytes()
    with uv.map(path, "c", service="native") as one, uv.map(path, service="native") as other:
        a = one.array()
        a[:PAGE_SIZE] = 0
        a[5 * PAGE_SIZE] ^= 0xFF
        one.flush()  # nothing goes home
        assert bytes(other.buffer) == content == path.read_bytes()
        assert not a[:PAGE_SIZE].any()
        del a


# --- arrays


def test_array_shapes_and_dtypes(make_file):
    path = make_file(64 * PAGE_SIZE)
    raw = path.read_bytes()
    with uv.map(path, service="native") as region:
        whole = np.frombuffer(raw, "<f4")
        np.testing.assert_array_equal(region.array("<f4").view("u4"), whole.view("u4"))
        a = region.array("<i2", shape=(-1, 128))
        assert a.shape == (64 * PAGE_SIZE // 256, 128)
        np.testing.assert_array_equal(a, np.frombuffer(raw, "<i2").reshape(-1, 128))
        f = region.array("<i2", shape=(128, -1), order="F")
        np.testing.assert_array_equal(f, np.frombuffer(raw, "<i2").reshape(128, -1, order="F"))
        b = region.array("<u8", shape=3, offset=8)
        np.testing.assert_array_equal(b, np.frombuffer(raw, "<u8", 3, 8))
        assert region.array("u1", shape=(0,)).size == 0
        point = region.array([("x", "<u4"), ("y", "<u4")], shape=(2,))
        assert point["y"][1] == np.frombuffer(raw, "<u4")[3]
        del a, b, f, point


@pytest.mark.parametrize("kwargs", [{}, {"service": "kernel"}])
def test_a_read_only_array_refuses_stores(make_file, kwargs):
    with uv.map(make_file(), "r", **({"service": "native"} | kwargs)) as region:
        a = region.array()
        assert not a.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            a[0] = 1
        with pytest.raises(ValueError):
            a.flags.writeable = True
        with pytest.raises(TypeError):
            region.buffer[0] = 1
        del a


@pytest.mark.parametrize(
    "args, kwargs, match",
    [
        (("f8",), {}, "whole number"),
        (("u1", (-1, 7)), {}, "whole number"),
        (("u1", (-1, -1)), {}, "one of them may be -1"),
        (("u1", (-2,)), {}, "lengths are >= 0"),
        (("u1", (10**9,)), {}, "are there"),
        (("u1",), {"offset": -1}, "outside"),
        (("u1",), {"offset": 10**9}, "outside"),
        (("O",), {}, "Python objects"),
        (("S0", (1,)), {}, "no bytes"),
        (("u1", (1.5,)), {}, "tuple of integers"),
        (("u1", (0, -1)), {}, "whole number"),
        (("u1",), {"order": "K"}, "neither"),
    ],
)
def test_bad_arrays_are_refused(make_file, args, kwargs, match):
    with uv.map(make_file(PAGE_SIZE + 1), service="native") as region:
        with pytest.raises(uv.InvalidArgument, match=match):
            region.array(*args, **kwargs)


# --- life


def test_close_is_refused_while_views_live_and_the_region_goes_on(make_file):
    path = make_file()
    region = uv.map(path, service="native")
    a = region.array()
    assert a[0] == path.read_bytes()[0]
    with pytest.raises(BufferError, match=r"del a"):
        region.close()
    assert not region.closed
    assert bytes(a) == path.read_bytes()  # still served
    sliced = a[10:].view()
    del a
    with pytest.raises(uv.RegionBusyError):
        region.close()
    del sliced
    region.close()
    region.close()
    assert region.closed


def test_views_keep_the_memory_alive_without_the_region(make_file):
    path = make_file()
    region = uv.map(path, service="native")
    a = region.array()
    mapping = weakref.ref(region._mapping)
    del region
    gc.collect()
    np.testing.assert_array_equal(a, np.frombuffer(path.read_bytes(), "u1"))
    with pytest.warns(ResourceWarning, match="never closed"):
        del a
        gc.collect()
    assert mapping() is None


def test_a_cycle_with_a_view_is_collected(make_file):
    class Holder:
        pass

    with pytest.warns(ResourceWarning):
        holder = Holder()
        holder.self = holder
        holder.region = uv.map(make_file(), service="native")
        holder.array = holder.region.array()
        del holder
        gc.collect()
        uv.anonymous(PAGE_SIZE).close()  # whatever had to wait is closed with the next call
    assert not uv.address_space().regions()


def test_use_after_close_is_a_typed_error(make_file):
    region = uv.map(make_file(), service="native")
    handle = region.handle
    residency = region.residency()
    region.close()
    calls = [
        region.array,
        lambda: region.buffer,
        lambda: region.address,
        region.load,
        region.prefetch,
        region.ensure,
        region.evict,
        region.flush,
        region.check,
        region.residency,
        region.stats,
        region.trace,
        lambda: region.advise("random"),
        residency.pages,
        region.__enter__,
    ]
    for use in calls:
        with pytest.raises(uv.RegionClosedError, match="closed"):
            use()
        with pytest.raises(ValueError):  # as mmap
            use()
    assert "closed" in repr(region) and "closed" in region._repr_html_()
    # The slot is used again, and the old handle is not the new region.
    with uv.map(make_file(), service="native") as again:
        assert again.handle != handle
        assert lib.uvm_region_check(handle) == -116  # ESTALE
        assert again.generation != handle >> 32 or again.handle & 0xFFFF != handle & 0xFFFF


def test_with_closes_and_does_not_hide_the_bodys_exception(make_file):
    with pytest.raises(ZeroDivisionError):
        with uv.map(make_file(), service="native") as region:
            a = region.array()
            a[0] // (a[0] - a[0] + 0 * (1 // 0))
    del a
    region.close()
    with pytest.raises(BufferError):
        with uv.map(make_file(), service="native") as region:
            a = region.array()
    assert a[0] == pattern(1)[0]
    del a
    region.close()


def test_a_region_cannot_be_resized(make_file):
    with uv.map(make_file(), service="native") as region:
        with pytest.raises(TypeError, match="resized"):
            region.buffer.obj.resize(PAGE_SIZE)


def test_many_regions_come_and_go(make_file):
    path = make_file(4 * PAGE_SIZE)
    first = path.read_bytes()[0]
    for _ in range(300):
        with uv.map(path, service="native") as region, uv.anonymous(PAGE_SIZE) as other:
            assert region.buffer[0] == first and other.buffer[0] == 0


# --- caches


def test_regions_of_one_file_version_share_a_cache(make_file):
    path = make_file(256 * PAGE_SIZE)
    with uv.map(path, service="native") as one, uv.map(path, "c", service="native") as two:
        one.load()
        read = one.stats()["bytes_read"]
        assert read == 256 * PAGE_SIZE
        assert bytes(two.buffer) == path.read_bytes()
        assert two.stats()["bytes_read"] == 0
        assert one.residency().cache_bytes == two.residency().cache_bytes == 256 * PAGE_SIZE
        assert len(uv.address_space()._caches) == 1
    assert len(uv.address_space()._caches) == 0


def test_another_version_of_the_file_is_another_cache(make_file):
    path = make_file(4 * PAGE_SIZE)
    old = path.read_bytes()
    with uv.map(path, service="native") as one:
        one.load()
        path.unlink()
        make_file(4 * PAGE_SIZE, seed=1)
        with uv.map(path, service="native") as two:
            assert bytes(one.buffer) == old != path.read_bytes() == bytes(two.buffer)


def test_the_cap_holds(make_file):
    path = make_file(2048 * PAGE_SIZE)
    with uv.map(path, cap=256 * PAGE_SIZE) as region:
        assert region.service == "native"  # "auto" with a cap
        assert bytes(region.buffer) == path.read_bytes()
        residency = region.residency()
        assert residency.cache_cap_bytes == 256 * PAGE_SIZE
        assert residency.cache_bytes <= 256 * PAGE_SIZE
        assert lib.uvm_cache_ctl(region._ops.cache.id).nr_peak <= 256 * 1.01
        assert bytes(region.buffer) == path.read_bytes()
        check_all(region)


def test_the_smallest_cap_that_was_asked_for_holds(make_file):
    path = make_file(64 * PAGE_SIZE)
    with uv.map(path, cap="1MiB") as one:
        assert one.residency().cache_cap_bytes == 1 << 20
        with uv.map(path, cap="64KiB") as two:
            assert one.residency().cache_cap_bytes == two.residency().cache_cap_bytes == 1 << 16
            with uv.map(path, service="native") as three:  # says nothing about a cap
                assert three.residency().cache_cap_bytes == 1 << 16
                assert bytes(three.buffer) == path.read_bytes()


# --- requests


def test_load_prefetch_and_evict(make_file):
    path = make_file(512 * PAGE_SIZE)
    with uv.map(path, service="native", fault_around_bytes=PAGE_SIZE, readahead_bytes=0) as region:
        assert region.residency().resident_bytes == 0
        region.load((10 * PAGE_SIZE, 20 * PAGE_SIZE))
        assert region.residency().resident_bytes == 10 * PAGE_SIZE
        faults = region.stats()["pgfault"]
        assert bytes(region.buffer[10 * PAGE_SIZE : 20 * PAGE_SIZE])
        assert region.stats()["pgfault"] == faults  # loaded: no fault is left
        assert region.evict((12 * PAGE_SIZE, 14 * PAGE_SIZE)) == 2 * PAGE_SIZE
        assert region.residency().resident_bytes == 8 * PAGE_SIZE
        assert region.evict() == 8 * PAGE_SIZE
        assert region.residency().resident_bytes == 0
        region.prefetch((0, 5))
        wait_until(lambda: region.residency().resident_bytes)
        assert region.residency().resident_bytes == PAGE_SIZE
        assert bytes(region.buffer) == path.read_bytes()
        check_all(region)


def test_ranges_are_bytes_rounded_out_to_pages(make_file):
    with uv.map(
        make_file(10 * PAGE_SIZE), service="native", fault_around_bytes=PAGE_SIZE, readahead_bytes=0
    ) as region:
        for where, pages in [
            (slice(5, 6), 1),
            ((PAGE_SIZE - 1, PAGE_SIZE + 1), 2),
            (slice(-1, None), 1),
            ((7, 7), 0),
            (slice(9, 3), 0),
            (range(3 * PAGE_SIZE), 3),
            (None, 10),
        ]:
            region.evict()
            region.load(where)
            assert region.residency().resident_bytes == pages * PAGE_SIZE, where


@pytest.mark.parametrize(
    "where",
    [(0,), (-1, 5), (5, 4), (0, 10**9), slice(0, 10, 2), "all", 5, (0.5, 2), range(0, 10, 2)],
)
def test_bad_ranges_are_refused(make_file, where):
    with uv.map(make_file(), service="native") as region:
        for call in (region.load, region.evict, region.flush, region.prefetch, region.ensure):
            with pytest.raises(uv.InvalidArgument, match="range"):
                call(where)


def test_ensure_lets_system_calls_through(make_file, tmp_path):
    path = make_file(300 * PAGE_SIZE)
    with uv.map(path, service="native") as region:
        region.ensure()
        assert region.residency().mapped_bytes == 300 * PAGE_SIZE
        faults = region.stats()["pgfault"]
        fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
        assert os.write(fd, region.buffer) == region.nbytes
        os.close(fd)
        assert region.stats()["pgfault"] == faults
    assert (tmp_path / "out").read_bytes() == path.read_bytes()
    with uv.anonymous(8 * PAGE_SIZE) as region:
        region.ensure(access="write")
        with open(path, "rb", buffering=0) as file:
            assert file.readinto(region.buffer) == 8 * PAGE_SIZE
        assert bytes(region.buffer) == path.read_bytes()[: 8 * PAGE_SIZE]


@pytest.mark.parametrize("advice", ["normal", "sequential", "random", "willneed"])
def test_advice_changes_no_byte(make_file, advice):
    path = make_file(300 * PAGE_SIZE)
    with uv.map(path, service="native") as region:
        region.advise(advice)
        assert bytes(region.buffer) == path.read_bytes()


def test_random_advice_reads_only_what_is_touched(make_file):
    with uv.map(make_file(300 * PAGE_SIZE), service="native") as region:
        region.advise("random")
        assert region.buffer[100 * PAGE_SIZE]
        wait_until(lambda: region.stats()["pgfault"])
        assert region.residency().resident_bytes == PAGE_SIZE


def test_unknown_advice_is_refused(make_file):
    for service in ("native", "kernel"):
        with uv.map(make_file(), service=service) as region:
            with pytest.raises(uv.InvalidArgument, match="evict"):
                region.advise("dontneed")


# --- numbers


def test_stats_count_faults_and_latencies(make_file):
    with uv.map(make_file(256 * PAGE_SIZE), service="native") as region:
        assert region.stats()["pgfault"] == 0 and region.stats().latency.p99 == 0
        bytes(region.buffer)
        wait_until(lambda: region.stats()["bytes_read"] == region.nbytes)
        time.sleep(0.02)  # told after the toucher runs on
        stats = region.stats()
        assert stats["pgfault"] == stats["pgmajfault"] + stats["pgminfault"] > 0
        assert stats["bytes_read"] == 256 * PAGE_SIZE
        assert 0 < stats.latency.count <= stats["pgfault"]
        assert 0 < stats.latency.p50 <= stats.latency.p99 <= stats.latency.max < 10e9
        assert "pgfault" in str(stats) and len(stats) == len(stats.counters)
        with pytest.raises(AttributeError):
            stats.latency = None


def test_trace_tells_each_fault_in_the_kernels_words(make_file):
    with uv.map(
        make_file(8 * PAGE_SIZE), fault_around_bytes=PAGE_SIZE, readahead_bytes=0, trace=True
    ) as region:
        assert region.service == "native" and region.trace() == []
        assert region.buffer[3 * PAGE_SIZE]
        assert region.buffer[5 * PAGE_SIZE]
        wait_until(lambda: region.stats()["pgfault"] == 2)  # told after the toucher runs on
        trace = [r for r in region.trace() if not r.result & r.result.RETRY]
        assert [record.index for record in trace] == [3, 5]
        record = trace[0]
        assert record.kind.name == "MISSING" and record.access.name == "READ"
        assert record.backing.name == "SHARED_FILE" and record.nr_pages == 1
        assert record.tid == os.getpid() and record.latency_ns > 0
        assert record.steps[0] == "handle_mm_fault" and "do_read_fault" in record.steps
        assert "page 3" in str(record) and "do_read_fault" in str(record)
        assert "do_read_fault" in str(record.walk)


def test_the_trace_keeps_the_last_faults(make_file):
    nr_pages = 3000
    with uv.anonymous(nr_pages * PAGE_SIZE, trace=True) as region:
        region.buffer[::PAGE_SIZE].tobytes()
        time.sleep(0.05)  # the last record is written after the toucher runs on
        trace = region.trace()
        assert 900 < len(trace) <= 1024
        assert [r.seq for r in trace] == sorted(r.seq for r in trace)
        assert trace[-1].index == nr_pages - 1


def test_residency_pages_and_heatmap(make_file):
    with uv.map(
        make_file(100 * PAGE_SIZE),
        service="native",
        fault_around_bytes=PAGE_SIZE,
        readahead_bytes=0,
    ) as region:
        region.load((0, 50 * PAGE_SIZE))
        residency = region.residency()
        assert residency.fraction == 0.5
        assert residency.heatmap(10) == (1.0,) * 5 + (0.0,) * 5
        assert len(residency.heatmap(1000)) == 100
        pages = residency.pages()
        assert len(pages) == 100 and pages[0] != pages[99]
        assert len(residency.pages((0, 1))) == 1
        assert "200.0 KiB of 400.0 KiB resident" in str(residency)
        with pytest.raises(AttributeError):
            residency.mapped_bytes = 0
        assert "200.0 KiB resident" in repr(region)
        assert "<table>" in region._repr_html_()


def test_residency_counts_private_pages(make_file):
    with uv.map(make_file(10 * PAGE_SIZE), "c", service="native") as region:
        region.buffer[0] = 1
        region.buffer[5 * PAGE_SIZE] = 1
        assert region.residency().dirty_bytes == 2 * PAGE_SIZE
    with uv.anonymous(10 * PAGE_SIZE) as region:
        region.buffer[0] = 1
        assert region.residency().dirty_bytes == PAGE_SIZE
