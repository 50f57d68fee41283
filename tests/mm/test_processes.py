"""Regions in other processes: forked children, workers, pickles."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker

import pytest

import uffd_vm as uv
from uffd_vm.page import PAGE_SIZE
from uffd_vm.testing.invariants import check_all

resource_tracker.ensure_running()  # of "spawn": it and its pipe stay, so they start before any test

pytestmark = pytest.mark.usefixtures("uffd")


def in_fork(work: Callable[[], object], timeout: float = 20) -> bytes:
    """repr of what `work` returns in a forked child, or of what it raised."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            threading.Thread(target=lambda: None).start()  # the child is alive as Python
            answer = repr(work())
        except BaseException as error:
            answer = f"raised {error!r}"
        finally:
            os.write(write, answer.encode())
            os._exit(0)
    os.close(write)
    watch = threading.Timer(timeout, os.kill, (pid, 9))
    watch.start()
    with open(read, "rb") as pipe:
        answer = pipe.read()
    watch.cancel()
    watch.join()
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child ended with {status}, said {answer!r}"
    return answer


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_a_forked_child_reads_bytes_never_zeros(make_file, mode):
    path = make_file(64 * PAGE_SIZE)
    with uv.map(path, mode, service="native") as region:
        half = region.nbytes // 2
        bytes(region.buffer[:half])  # filled before; the rest is missing
        assert in_fork(lambda: bytes(region.buffer) == path.read_bytes()) == b"True"
        assert bytes(region.buffer) == path.read_bytes()
        check_all(region)


def test_private_memory_is_private_to_each_side(make_file):
    with uv.anonymous(16 * PAGE_SIZE, track=True) as region:
        region.buffer[0] = 1

        def child() -> object:
            before = region.buffer[0], region.buffer[PAGE_SIZE]
            region.buffer[0] = 2
            region.buffer[8 * PAGE_SIZE] = 3
            return before, region.buffer[0], region.dirty()

        answer = in_fork(child)
        assert answer == repr(((1, 0), 2, [(0, 4096), (8 * PAGE_SIZE, 9 * PAGE_SIZE)])).encode()
        assert region.buffer[0] == 1 and region.buffer[8 * PAGE_SIZE] == 0
        check_all(region)


def test_a_childs_changes_of_a_writable_file_are_the_files(make_file):
    path = make_file(16 * PAGE_SIZE)
    with uv.map(path, "r+", service="native") as region:
        region.buffer[0] = 1

        def child() -> object:
            region.buffer[5 * PAGE_SIZE] = 5
            region.flush()
            return region.buffer[0]

        assert in_fork(child) == b"1"
        assert region.buffer[5 * PAGE_SIZE] == 5
        region.flush()
        assert path.read_bytes()[0] == 1 and path.read_bytes()[5 * PAGE_SIZE] == 5


def test_a_child_closes_and_maps_for_itself(make_file):
    path = make_file()
    with uv.map(path, service="native") as region:

        def child() -> object:
            region.close()
            with uv.map(path, "c", service="native") as own:
                return bytes(own.buffer) == path.read_bytes(), region.closed

        assert in_fork(child) == b"(True, True)"
        assert not region.closed and bytes(region.buffer) == path.read_bytes()


def test_a_fork_while_another_thread_maps(make_file):
    path = make_file(4 * PAGE_SIZE)
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            with uv.map(path, service="native") as region:
                assert region.buffer[0]

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(10):
            assert in_fork(lambda: uv.map(path, service="native").buffer[0] != 0) == b"True"
    finally:
        stop.set()
        thread.join()


# --- pickles


def _sum(region: uv.Region) -> int:
    with region:
        return sum(region.buffer)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("mode", ["r", "c"])
def test_a_region_is_sent_to_workers(make_file, method, mode):
    path = make_file(32 * PAGE_SIZE)
    with uv.map(path, mode, service="native", offset=PAGE_SIZE, length=10_000) as region:
        with multiprocessing.get_context(method).Pool(2) as pool:
            total = sum(path.read_bytes()[PAGE_SIZE : PAGE_SIZE + 10_000])
            assert pool.map(_sum, [region] * 4) == [total] * 4


def test_a_pickle_carries_all_options(make_file):
    options = {"fault_around_bytes": PAGE_SIZE, "deadline": 7.0, "cap": "1MiB", "name": "mine"}
    with uv.map(make_file(), "c", track=True, **options) as region:
        with pickle.loads(pickle.dumps(region)) as twin:
            assert (twin.name, twin.mode, twin.service) == ("mine", "c", "native")
            assert twin.residency().cache_cap_bytes == 1 << 20
            twin.buffer[0] = 0
            assert twin.dirty() == [(0, PAGE_SIZE)] and region.buffer[0] != 0
        with copy.copy(region) as other:
            assert other.address != region.address


def test_a_pickle_of_another_version_of_the_file_is_refused(make_file):
    path = make_file()
    with uv.map(path, service="native") as region:
        blob = pickle.dumps(region)
    os.utime(path, ns=(0, 0))
    with pytest.raises(uv.SourceChanged, match="pickled"):
        pickle.loads(blob)


def test_what_cannot_travel_says_why(make_file):
    with uv.map(make_file(), "r+", service="native") as region:
        with pytest.raises(uv.InvalidArgument, match="locked by this process"):
            pickle.dumps(region)
    with uv.anonymous(PAGE_SIZE) as region:
        with pytest.raises(uv.InvalidArgument, match="anonymous"):
            pickle.dumps(region)
