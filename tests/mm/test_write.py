"""Mode "r+": write-back, its errors, the lock; and write tracking in every mode that has it."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import random
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest

import uffd_vm as uv
from tests.support import run_in_child
from uffd_vm.page import PAGE_SIZE
from uffd_vm.service.python import python_service
from uffd_vm.testing.inject import inject
from uffd_vm.testing.invariants import check_all

pytestmark = pytest.mark.usefixtures("uffd")


@pytest.mark.parametrize("service", ["native", "python", "inline", "kernel"])
def test_changes_to_a_file_that_was_replaced_are_not_lost_in_silence(make_file, service):
    path, new = make_file(3 * PAGE_SIZE), make_file(3 * PAGE_SIZE, seed=1, name="new")
    region = uv.map(path, "r+", service=service)
    a = region.array()
    a[PAGE_SIZE] = 0xAA
    with open(path, "rb") as old:
        os.replace(new, path)
        replaced = path.read_bytes()
        a[0] = 0xAB
        for end in (region.flush, region.close):
            with pytest.raises(uv.SourceChanged, match=r"was replaced.*discard") as caught:
                end()
            assert str(path) in str(caught.value)
        assert not region.closed and (a[0], a[PAGE_SIZE]) == (0xAB, 0xAA)
        assert old.read(1) == b"\xab", "it is in the file that was mapped"
    assert path.read_bytes() == replaced, "and not in the other"
    del a
    region.discard()


@pytest.mark.parametrize("service", ["native", "kernel"])
@pytest.mark.parametrize("how", ["removed", "moved", "read only"])
def test_a_file_that_was_not_replaced_closes_as_ever(make_file, service, how):
    path = make_file(3 * PAGE_SIZE)
    with uv.map(path, "r" if how == "read only" else "r+", service=service) as region:
        if how == "removed":
            path.unlink()
        elif how == "moved":
            path.rename(path.with_name("moved"))
        else:
            os.replace(make_file(PAGE_SIZE, name="new"), path)
        if how != "read only":
            region.buffer[0] = 0xAA
        region.flush()
    if how == "moved":
        assert path.with_name("moved").read_bytes()[0] == 0xAA


@pytest.mark.parametrize("service", ["native", "python"])
@pytest.mark.parametrize("how", ["cut", "changed"])
def test_a_write_back_that_may_not_write_says_how_to_keep_the_changes(make_file, service, how):
    path = make_file(4 * PAGE_SIZE)
    region = uv.map(path, "r+", service=service)
    a = region.array()
    a[0] = 0xAA
    os.truncate(path, PAGE_SIZE) if how == "cut" else os.utime(path, ns=(1, 1))
    with pytest.raises(uv.SourceChanged, match=r"still in memory: copy it out.*discard") as raised:
        region.close()
    assert raised.value.region == "data.bin" and raised.value.index is None  # any of them
    assert a[0] == 0xAA
    del a
    region.discard()


def test_flush_makes_changes_durable_and_close_flushes(make_file):
    path = make_file(300 * PAGE_SIZE + 9)
    model = bytearray(path.read_bytes())
    with uv.map(path, "r+", service="native") as region:
        a = region.array()
        a[5] = model[5] = 1
        a[100 * PAGE_SIZE : 200 * PAGE_SIZE] = 2
        model[100 * PAGE_SIZE : 200 * PAGE_SIZE] = b"\2" * (100 * PAGE_SIZE)
        assert path.read_bytes() != model  # nothing went yet
        assert region.residency().dirty_bytes >= 101 * PAGE_SIZE
        check_all(region)
        region.flush()
        assert path.read_bytes() == model
        assert region.residency().dirty_bytes == 0
        check_all(region)
        a[-1] = model[-1] = 77
        a[5] = model[5] = 3  # a page that was clean again
        check_all(region)
        del a
    assert path.read_bytes() == model and len(model) == path.stat().st_size


def test_flush_of_a_range(make_file):
    path = make_file(10 * PAGE_SIZE)
    before = path.read_bytes()
    with uv.map(path, "r+", service="native") as region:
        mv = region.buffer
        mv[0] = 0
        mv[9 * PAGE_SIZE] = 0
        region.flush((0, 1))
        assert path.read_bytes()[0] == 0
        assert path.read_bytes()[9 * PAGE_SIZE] == before[9 * PAGE_SIZE]
        mv.release()
    assert path.read_bytes()[9 * PAGE_SIZE] == 0


def test_a_forgotten_region_loses_nothing(make_file):
    path = make_file()
    region = uv.map(path, "r+", service="native")
    region.buffer[3] = 42
    with pytest.warns(ResourceWarning):
        del region
        gc.collect()
    assert path.read_bytes()[3] == 42


def _exit_without_close(path: str) -> None:
    import uffd_vm

    global kept
    kept = uffd_vm.map(path, "r+", service="native")
    kept.buffer[3] = 42


def test_a_program_that_ends_without_close_loses_nothing(make_file, run_in_child):
    path = make_file()
    run_in_child(_exit_without_close, str(path))
    assert path.read_bytes()[3] == 42


def test_discard_writes_nothing_back(make_file):
    path = make_file()
    before = path.read_bytes()
    region = uv.map(path, "r+", service="native")
    region.buffer[0] = 0
    region.discard()
    assert path.read_bytes() == before


@pytest.mark.parametrize("op, code", [("PWRITE", errno.ENOSPC), ("FSYNC", errno.EIO)])
def test_an_error_of_write_back_is_raised_and_nothing_is_lost(make_file, op, code):
    path = make_file()
    region = uv.map(path, "r+", service="native")
    region.buffer[0] = 42
    with inject(op, code, count=100):
        with pytest.raises(uv.SourceError) as raised:
            region.flush()
        assert raised.value.errno == code
        with pytest.raises(OSError, match=r"region 'data\.bin'"):
            region.close()
    assert not region.closed and region.buffer[0] == 42
    check_all(region)
    try:
        region.flush()  # may still tell of the write-back that failed in close()
    except uv.SourceError:
        region.flush()
    region.close()
    assert path.read_bytes()[0] == 42


def test_eviction_keeps_dirty_pages(make_file):
    path = make_file(64 * PAGE_SIZE)
    model = bytearray(path.read_bytes())
    with uv.map(path, "r+", service="native") as region:
        a = region.array()
        a[::PAGE_SIZE] = 7
        model[::PAGE_SIZE] = b"\7" * 64
        region.evict()
        check_all(region)
        np.testing.assert_array_equal(a, np.frombuffer(bytes(model), "u1"))
        region.flush()
        assert region.evict() == 64 * PAGE_SIZE
        np.testing.assert_array_equal(a, np.frombuffer(bytes(model), "u1"))
        check_all(region)
        del a
    assert path.read_bytes() == model


def test_writing_more_than_the_cap(make_file):
    path = make_file(1024 * PAGE_SIZE)
    with uv.map(path, "r+", cap=128 * PAGE_SIZE) as region:
        a = region.array("u4")
        a += 1
        assert region.residency().cache_bytes <= 128 * 1.01 * PAGE_SIZE
        check_all(region)
        expected = a.copy()
        del a
    np.testing.assert_array_equal(np.fromfile(path, "u4"), expected)


# --- the lock

_TRY = """
import sys, uffd_vm as uv
try:
    uv.map(sys.argv[1], sys.argv[2], service="native").close()
except uv.RegionBusyError as error:
    print("busy", error)
else:
    print("mapped")
"""


def _try_in_another_process(path, mode: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", _TRY, str(path), mode], capture_output=True, text=True, check=True
    ).stdout


def test_one_process_at_a_time_writes_a_file(make_file):
    path = make_file()
    with uv.map(path, "r+", service="native"):
        told = _try_in_another_process(path, "r+")
        assert told.startswith("busy") and f"process {os.getpid()}" in told and "'c'" in told
        assert _try_in_another_process(path, "r") == "mapped\n"
        assert _try_in_another_process(path, "c") == "mapped\n"
    assert _try_in_another_process(path, "r+") == "mapped\n"


def test_a_second_writer_of_this_process_shares_the_cache(make_file):
    path = make_file()
    with uv.map(path, "r+", service="native") as one:
        one.buffer[0] = 1
        one.flush()
        with uv.map(path, "r+", service="native", offset=PAGE_SIZE) as two:
            with uv.map(path, "r+", service="native") as three:
                one.buffer[PAGE_SIZE] = 9
                assert two.buffer[0] == 9 == three.buffer[PAGE_SIZE]
                three.buffer[PAGE_SIZE + 1] = 8
                assert one.buffer[PAGE_SIZE + 1] == 8
                check_all(one, two, three)
                three.flush()
                check_all(one, two, three)
        assert _try_in_another_process(path, "r+").startswith("busy")
    assert path.read_bytes()[PAGE_SIZE : PAGE_SIZE + 2] == b"\x09\x08"


def test_a_lock_of_somebody_else_is_respected(make_file):
    import fcntl

    path = make_file()
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(uv.RegionBusyError, match="locked by this process"):
            uv.map(path, "r+", service="native")
    uv.map(path, "r+", service="native").close()


def test_a_writable_file_that_changed_its_size_is_not_joined(make_file):
    path = make_file(8 * PAGE_SIZE)
    with uv.map(path, "r+", service="native"):
        os.truncate(path, 16 * PAGE_SIZE)
        with pytest.raises(uv.SourceChanged, match="had 32768 bytes"):
            uv.map(path, "r+", service="native")


# --- tracking


def map_tracked(path, kind: str, service: str):
    if kind == "anonymous":
        return uv.anonymous(40 * PAGE_SIZE, track=True, service=service)
    return uv.map(path, kind, track=True, service=service)


@pytest.fixture(params=["anonymous", "c", "r+"])
def tracked(request, make_file):
    with map_tracked(make_file(40 * PAGE_SIZE), request.param, "auto") as region:
        assert region.service == "native"
        yield region


@pytest.fixture(params=["anonymous", "c", "r+"])
def tracked_by_python(request, make_file):
    with map_tracked(make_file(40 * PAGE_SIZE), request.param, "python") as region:
        yield region


@pytest.fixture(params=["native", "inline", "python"])
def service(request):
    return request.param


@pytest.fixture(params=["anonymous", "c", "r+"])
def tracked_by_all(request, make_file, service):
    with map_tracked(make_file(40 * PAGE_SIZE), request.param, service) as region:
        yield region


def P(*pages: int) -> list[tuple[int, int]]:
    """Ranges of whole pages."""
    return [(page * PAGE_SIZE, (page + 1) * PAGE_SIZE) for page in pages]


def test_dirty_tells_what_was_written_since_protect(tracked):
    mv = tracked.buffer
    mv[0], mv[5 * PAGE_SIZE] = 1, 1
    assert tracked.dirty() == P(0, 5)
    check_all(tracked)
    tracked.protect()
    assert tracked.dirty() == []
    check_all(tracked)
    bytes(mv)  # reading is not writing
    assert tracked.dirty() == []
    check_all(tracked)
    mv[5 * PAGE_SIZE + 7] = 2  # present, armed
    mv[39 * PAGE_SIZE] = 3
    assert tracked.dirty() == P(5, 39)
    assert tracked.dirty((6 * PAGE_SIZE, 40 * PAGE_SIZE)) == P(39)
    mv[6 * PAGE_SIZE] = 4
    assert tracked.dirty()[0] == (5 * PAGE_SIZE, 7 * PAGE_SIZE)
    check_all(tracked)
    tracked.protect((0, 6 * PAGE_SIZE))
    assert tracked.dirty() == P(6, 39)
    check_all(tracked)
    mv.release()


def test_dirty_with_reset_tells_and_starts_anew(tracked_by_all):
    tracked = tracked_by_all
    mv = tracked.buffer
    for page in range(1, 39):
        mv[page * PAGE_SIZE] = 1
    assert tracked.dirty() == tracked.dirty(reset=True) == [(PAGE_SIZE, 39 * PAGE_SIZE)]
    assert tracked.dirty(reset=True) == tracked.dirty() == []
    check_all(tracked)
    mv[0] = mv[7 * PAGE_SIZE] = mv[8 * PAGE_SIZE] = 2
    mv[30 * PAGE_SIZE] = 2
    assert tracked.dirty((0, 8 * PAGE_SIZE), reset=True) == P(0, 7)
    assert tracked.dirty(reset=True) == P(8, 30)
    bytes(mv)
    assert tracked.dirty((0, 0), reset=True) == tracked.dirty(reset=True) == []
    mv.release()


def test_dirty_with_reset_that_fails_loses_nothing(tracked):
    mv = tracked.buffer
    written = [1, 2, 5, 9, 10, 11, 30]
    for page in written:
        mv[page * PAGE_SIZE] = 1
    before = tracked.dirty()
    for skip in range(4):  # each run of pages is a call of its own
        with inject("WRITEPROTECT", errno.ENOMEM, skip=skip):
            with pytest.raises(uv.UffdVmError, match="protect"):
                tracked.dirty(reset=True)
        assert tracked.dirty() == before
        check_all(tracked)
    assert tracked.dirty(reset=True) == before
    mv.release()


def in_child_checkpoint_while_it_is_written(service: str, kind: str) -> int:
    """Threads store into pages while this one copies what `dirty(reset=True)` tells; the copy is the
    memory in the end. How many pages were copied."""
    nr_pages, copied = 64, 0
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(nr_pages * PAGE_SIZE)
        region = (
            uv.anonymous(nr_pages * PAGE_SIZE, track=True, service=service)
            if kind == "anonymous"
            else uv.map(file.name, "c", track=True, service=service)
        )
        with region:
            buffer, stop = region.buffer, threading.Event()
            view = buffer.cast("Q")
            copy = bytearray(len(buffer))

            def store(seed: int) -> None:
                draw = random.Random(seed)
                while not stop.is_set():
                    view[draw.randrange(len(view))] = draw.getrandbits(64)

            def checkpoint() -> int:
                pages = 0
                for a, b in region.dirty(reset=True):
                    copy[a:b] = buffer[a:b]
                    pages += (b - a) // PAGE_SIZE
                return pages

            threads = [threading.Thread(target=store, args=(i,)) for i in range(3)]
            for thread in threads:
                thread.start()
            end = time.monotonic() + 2
            while time.monotonic() < end:
                copied += checkpoint()
            stop.set()
            for thread in threads:
                thread.join()
            copied += checkpoint()
            assert copy == bytes(buffer)
            assert region.dirty() == []
            view.release()
            buffer.release()
    return copied


@pytest.mark.parametrize("kind", ["anonymous", "c"])
def test_a_checkpoint_of_memory_that_is_written_loses_no_store(service, kind):
    assert run_in_child(in_child_checkpoint_while_it_is_written, service, kind).value > 64


def test_what_a_process_armed_and_nobody_took_is_told_later(tracked_by_python):
    """The request was answered, or its process ended half way, and its caller is gone."""
    tracked = tracked_by_python
    with tracked.buffer as mv:
        for page in (1, 2, 5, 30):
            mv[page * PAGE_SIZE] = 1
        before = tracked.dirty()
        assert python_service().request("collect", tracked._ops.handle, 0, 8) == 3
        assert tracked.dirty() == before, "armed or not"
        mv[5 * PAGE_SIZE] = mv[6 * PAGE_SIZE] = 2
        python_service().kill()
        tracked.load()
        told = [(PAGE_SIZE, 3 * PAGE_SIZE), (5 * PAGE_SIZE, 7 * PAGE_SIZE), *P(30)]
        assert tracked.dirty() == tracked.dirty(reset=True) == told
        assert tracked.dirty() == tracked.dirty(reset=True) == []
        mv[7 * PAGE_SIZE] = 3
        assert python_service().request("collect", tracked._ops.handle, 0, 40) == 1
        tracked.protect((0, 7 * PAGE_SIZE))
        assert tracked.dirty() == P(7)
        tracked.protect()
        assert tracked.dirty() == []


@pytest.mark.parametrize("kind", ["anonymous", "c"])
def test_a_forked_child_tells_what_nobody_took(make_file, kind):
    with (
        map_tracked(make_file(40 * PAGE_SIZE), kind, "python") as tracked,
        tracked.buffer as mv,
    ):
        mv[3 * PAGE_SIZE] = mv[9 * PAGE_SIZE] = 1
        tracked.protect((9 * PAGE_SIZE, 10 * PAGE_SIZE))
        python_service().request("collect", tracked._ops.handle, 0, 8)
        pid = os.fork()
        if pid == 0:
            ok = tracked.dirty() == P(3)
            mv[9 * PAGE_SIZE] = 2
            ok = ok and tracked.dirty(reset=True) == P(3, 9) and tracked.dirty() == []
            mv[3 * PAGE_SIZE] = 3
            os._exit(0 if ok and tracked.dirty(reset=True) == P(3) else 3)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert tracked.dirty(reset=True) == P(3)


def test_writes_to_pages_never_touched_are_seen(tracked):
    tracked.protect()
    mv = tracked.buffer
    mv[20 * PAGE_SIZE] = 1
    assert tracked.dirty() == P(20)
    mv.release()


def test_loaded_pages_are_clean_until_written(tracked):
    tracked.load()
    check_all(tracked)
    assert tracked.dirty() == []
    mv = tracked.buffer
    mv[3 * PAGE_SIZE] = 1
    assert tracked.dirty() == P(3)
    check_all(tracked)
    mv.release()


def test_a_write_by_a_system_call_is_seen(tracked):
    tracked.protect()
    read, write = os.pipe()
    os.write(write, b"x" * 10)
    assert os.readv(read, [tracked.buffer[7 * PAGE_SIZE : 8 * PAGE_SIZE]]) == 10
    os.close(read)
    os.close(write)
    assert tracked.dirty() == P(7)


def test_mprotect_away_and_back_neither_loses_a_write_nor_makes_one_up(tracked):
    """The user's own mprotect(), as a checkpointing library does it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    with tracked.buffer as mv:
        for page in range(10):
            mv[page * PAGE_SIZE] = 1
        tracked.protect()
        mv[2 * PAGE_SIZE] = 2
        for prot in (mmap.PROT_READ, 0, mmap.PROT_READ | mmap.PROT_WRITE):
            assert libc.mprotect(tracked.address, 10 * PAGE_SIZE, prot) == 0
        assert tracked.dirty() == P(2)
        assert [mv[page * PAGE_SIZE] for page in range(4)] == [1, 1, 2, 1]
        assert tracked.dirty() == P(2)
        mv[7 * PAGE_SIZE] = 3
        assert tracked.dirty() == P(2, 7)
    check_all(tracked)


def test_the_last_range_ends_with_the_region(make_file):
    with uv.map(make_file(PAGE_SIZE + 3), "c", track=True) as region:
        region.buffer[PAGE_SIZE] = 1
        assert region.dirty() == [(PAGE_SIZE, PAGE_SIZE + 3)]
