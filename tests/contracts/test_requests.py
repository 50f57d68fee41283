"""What a region can be asked for, whoever serves it: every request of every service, by what it does."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import uffd_vm as uv
from tests.support import wait_until
from uffd_vm.fault.pte import PteState
from uffd_vm.kernel.features import Feature
from uffd_vm.page import PAGE_SIZE
from uffd_vm.testing.invariants import check_all
from uffd_vm.testing.strategies import pattern

pytestmark = pytest.mark.requires(Feature.MISSING_SHMEM, Feature.POISON)

NR_PAGES = 64
DATA = pattern(NR_PAGES * PAGE_SIZE, 6)
OURS = ("native", "python", "inline")
SERVICES = (*OURS, "kernel")
MODES = ("r", "c", "r+")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "data.bin"
    file.write_bytes(DATA)
    return file


def one_page(service: str) -> dict[str, object]:
    return {"service": service, "fault_around_bytes": PAGE_SIZE, "readahead_bytes": 0}


def page_states(region: uv.Region) -> list[PteState]:
    return [PteState(state) for state in region.residency().pages()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("service", SERVICES)
def test_advise(path: Path, service: str, mode: str) -> None:
    with uv.map(path, mode, service=service) as region:
        with region.buffer as buffer:
            region.advise("random")
            assert buffer[40 * PAGE_SIZE] == DATA[40 * PAGE_SIZE]
            if service != "kernel":  # what was touched, and nothing else
                assert region.residency().resident_bytes == PAGE_SIZE
            region.advise("sequential")
            assert buffer[0] == DATA[0]
            if service != "kernel":  # far ahead, by workers
                wait_until(lambda: region.residency().resident_bytes > 30 * PAGE_SIZE)
            region.advise("normal")
            region.advise("willneed")
            wait_until(lambda: region.residency().resident_bytes == len(DATA))
            assert bytes(buffer) == DATA
        with pytest.raises(uv.InvalidArgument, match="evict"):
            region.advise("dontneed")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("service", SERVICES)
def test_prefetch_and_load(path: Path, service: str, mode: str) -> None:
    with uv.map(path, mode, **one_page(service)) as region:
        region.prefetch((8 * PAGE_SIZE, 16 * PAGE_SIZE))
        wait_until(lambda: region.residency().resident_bytes >= 8 * PAGE_SIZE)
        region.load((30 * PAGE_SIZE, 34 * PAGE_SIZE))
        states = page_states(region)
        assert all(state not in (PteState.NONE, PteState.BUSY) for state in states[30:34])
        if service != "kernel":
            assert region.stats()["pgfault"] == 0, "no fault is taken for it"
            assert region.residency().resident_bytes == 12 * PAGE_SIZE
            check_all(region)
        with region.buffer as buffer:
            assert bytes(buffer) == DATA


@pytest.mark.parametrize("mode", [*MODES, "anonymous"])
@pytest.mark.parametrize("service", SERVICES)
def test_ensure(path: Path, tmp_path: Path, service: str, mode: str) -> None:
    """A system call on the range afterwards takes no fault of ours."""
    if mode == "anonymous":
        if service == "kernel":
            with pytest.raises(uv.InvalidArgument, match=r"np\.zeros"):
                uv.anonymous(PAGE_SIZE, service="kernel")
            return
        region, want = uv.anonymous(len(DATA), service=service), bytes(len(DATA))
    else:
        region, want = uv.map(path, mode, service=service), DATA
    with region:
        region.ensure((PAGE_SIZE, 20 * PAGE_SIZE))
        before = region.stats().get("pgfault", 0)
        with open(tmp_path / "out", "wb", buffering=0) as out, region.buffer as buffer:
            assert out.write(buffer[PAGE_SIZE : 20 * PAGE_SIZE]) == 19 * PAGE_SIZE
        assert (tmp_path / "out").read_bytes() == want[PAGE_SIZE : 20 * PAGE_SIZE]
        assert region.stats().get("pgfault", 0) == before
        if mode == "r":
            with pytest.raises(uv.InvalidArgument, match="mapped 'r'"):
                region.ensure(access="write")
            return
        region.ensure((30 * PAGE_SIZE, 33 * PAGE_SIZE), access="write")
        before = region.stats().get("pgfault", 0)
        source = tmp_path / "source"
        source.write_bytes(b"\x5a" * (3 * PAGE_SIZE))
        with open(source, "rb", buffering=0) as file, region.buffer as buffer:
            assert file.readinto(buffer[30 * PAGE_SIZE : 33 * PAGE_SIZE]) == 3 * PAGE_SIZE
            assert bytes(buffer[30 * PAGE_SIZE : 33 * PAGE_SIZE]) == source.read_bytes()
            assert bytes(buffer[33 * PAGE_SIZE :]) == want[33 * PAGE_SIZE :]
        assert region.stats().get("pgfault", 0) >= before
        region.flush()
        assert (path.read_bytes() == DATA) is (mode != "r+")
        check_all(region)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("service", SERVICES)
def test_evict(path: Path, service: str, mode: str) -> None:
    want = bytearray(DATA)
    with uv.map(path, mode, **one_page(service)) as region:
        region.load()
        with region.buffer as buffer:
            if mode != "r":
                buffer[3 * PAGE_SIZE] = want[3 * PAGE_SIZE] = 0x77
            given_back = region.evict((0, 8 * PAGE_SIZE))
            if service != "kernel":
                assert given_back in (7 * PAGE_SIZE, 8 * PAGE_SIZE)  # a private copy stays
            assert bytes(buffer) == want
        if service != "kernel":
            check_all(region)
    assert path.read_bytes() == (want if mode == "r+" else DATA)


@pytest.mark.parametrize("service", SERVICES)
def test_check_of_a_region_that_is_well(path: Path, service: str) -> None:
    with uv.map(path, service=service) as region:
        region.check()
        with region.buffer as buffer:
            assert bytes(buffer) == DATA
        region.check()


@pytest.mark.parametrize("service", SERVICES)
def test_residency_adds_up(path: Path, service: str) -> None:
    with uv.map(path, "c", **one_page(service)) as region:
        with region.buffer as buffer:
            for page in range(10):
                assert buffer[page * PAGE_SIZE] == DATA[page * PAGE_SIZE]
            buffer[5 * PAGE_SIZE] = 1
        residency = region.residency()
        assert (residency.nbytes, residency.page_size) == (len(DATA), PAGE_SIZE)
        assert residency.dirty_bytes == PAGE_SIZE
        assert residency.mapped_bytes >= 10 * PAGE_SIZE
        assert residency.cache_bytes <= max(residency.cache_cap_bytes, 0)
        if service != "kernel":
            assert residency.mapped_bytes == 10 * PAGE_SIZE
            # The page under the private copy stays in the cache: other regions may have it.
            assert residency.resident_bytes in (10 * PAGE_SIZE, 11 * PAGE_SIZE)
            assert residency.heatmap(NR_PAGES)[:10] == (1.0,) * 10
            assert sum(residency.heatmap(NR_PAGES)) == 10
        assert len(residency.pages()) == NR_PAGES


@pytest.mark.parametrize("service", SERVICES)
def test_stats_and_trace(path: Path, service: str) -> None:
    with uv.map(path, **one_page(service)) as region:
        with region.buffer as buffer:
            for page in (3, 9):
                assert buffer[page * PAGE_SIZE] == DATA[page * PAGE_SIZE]
        if service == "kernel":
            assert dict(region.stats()) == {}
            with pytest.raises(uv.FeatureUnavailable, match="trace=True"):
                region.trace()
            return
        wait_until(lambda: region.stats()["pgfault"] == 2)
        assert region.stats()["bytes_read"] == 2 * PAGE_SIZE
        assert region.stats().latency.count == 2
        records = [r for r in region.trace() if not r.result & r.result.RETRY]
        assert [r.index for r in records] == [3, 9]
        assert records[0].tid == os.getpid()
        assert records[0].steps[-2:] == ("__do_fault", "finish_fault")
        assert "finish_fault" in str(records[0]) and "finish_fault" in str(records[0].walk)


@pytest.mark.parametrize("service", OURS)
@pytest.mark.parametrize("kind", ["c", "r+", "anonymous"])
def test_protect_and_dirty(path: Path, service: str, kind: str) -> None:
    region = (
        uv.anonymous(len(DATA), service=service, track=True)
        if kind == "anonymous"
        else uv.map(path, kind, service=service, track=True)
    )
    with region:
        with region.buffer as buffer:
            buffer[0] = 1
            assert region.dirty() == [(0, PAGE_SIZE)]
            assert region.protect() >= PAGE_SIZE
            assert region.dirty() == []
            buffer[PAGE_SIZE - 1 : PAGE_SIZE + 1] = b"xy"
            buffer[50 * PAGE_SIZE] = 1  # a hole, until now
            assert region.dirty() == [(0, 2 * PAGE_SIZE), (50 * PAGE_SIZE, 51 * PAGE_SIZE)]
            assert region.dirty((0, PAGE_SIZE)) == [(0, PAGE_SIZE)]
        check_all(region)
        region.discard()


@pytest.mark.parametrize("service", SERVICES)
def test_flush_and_the_lock(path: Path, service: str) -> None:
    want = bytearray(DATA)
    with uv.map(path, "r+", service=service) as region:
        with region.buffer as buffer:
            buffer[7] = want[7] = 0x5A
        region.flush()
        assert path.read_bytes() == want
        other = "native" if service == "kernel" else "kernel"
        with pytest.raises(uv.RegionBusyError, match="locked by this process"):
            uv.map(path, "r+", service=other)  # type: ignore[arg-type]
    with uv.map(path, "r+", service=service):
        pass  # the lock went with the region


def test_a_cache_of_the_python_service_and_one_of_ours_exclude_each_other(path: Path) -> None:
    with uv.map(path, "r+", service="python"):
        with pytest.raises(uv.RegionBusyError, match="locked by this process"):
            uv.map(path, "r+", service="native")
    with uv.map(path, "r+", service="native"), uv.map(path, "r+", service="inline") as region:
        assert region.service == "inline"  # one cache, as both are this process's


@pytest.mark.parametrize("service", SERVICES)
def test_arrays_are_views_without_a_copy(path: Path, service: str) -> None:
    with uv.map(path, "c", service=service) as region:
        a = region.array("u4")
        assert a.__array_interface__["data"] == (region.address, False)
        assert np.asarray(a) is a
        a[0] = 0
        assert region.buffer[0] == 0
        with pytest.raises(uv.RegionBusyError):
            region.close()
        del a


@pytest.mark.parametrize("service", SERVICES)
def test_where_the_region_is_and_what_it_is_called(path: Path, service: str) -> None:
    with uv.map(path, service=service, name="mine") as region:
        assert region.name == "mine" and region.service == service
        assert region.service_reason == "asked for"
        assert region.address % PAGE_SIZE == 0 and len(region) == len(DATA)
        assert "mine" in repr(region) and service in repr(region)
        assert (region.generation > 0) is (service != "kernel")
