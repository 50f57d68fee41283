"""service="python" on real faults: what it shows is the file, what it counts is what happened, and its
process comes, dies and goes without taking anything along."""

from __future__ import annotations

import errno
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import uffd_vm as uv
from tests.support import ROOT, program, run_program
from uffd_vm.fault.action import Action
from uffd_vm.fault.fault import FaultResult
from uffd_vm.kernel._lib import ffi, lib
from uffd_vm.kernel.features import Feature
from uffd_vm.page import PAGE_SIZE
from uffd_vm.service import python as service_module
from uffd_vm.service.fault_service import agent, filemap, protocol
from uffd_vm.service.python import python_service

pytestmark = pytest.mark.requires(Feature.MISSING_SHMEM, Feature.POISON)

NR_PAGES = 100


@pytest.fixture(autouse=True)
def _python_service() -> Iterator[None]:
    yield
    if service_module._service is not None:
        service_module._service.close()
        service_module._service = None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "data.bin"
    file.write_bytes(random.Random(1).randbytes(NR_PAGES * PAGE_SIZE - 100))
    return file


# --- the structs that both sides know --------------------------------------------------------------


def test_layouts_are_the_compilers() -> None:
    assert ffi.offsetof("struct uvm_region_ctl", "trace") == 0
    assert agent._REQUEST.size == ffi.sizeof("struct uvm_agent_request")
    assert agent._REPLY.size == ffi.sizeof("struct uvm_agent_reply")
    words = ["nr_pages", "size", "mtime_ns", "cap_pages", "nr_used", "nr_dirty", "nr_peak"]
    for number, word in enumerate(words):
        assert ffi.offsetof("struct uvm_cache_ctl", word) == 8 * number
    assert ffi.offsetof("struct uvm_cache_ctl", "wb_err_seq") == 8 * filemap._WB_ERR_SEQ


# --- what memory shows ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
@pytest.mark.parametrize("fault_around", ["4KiB", "64KiB"])
def test_memory_is_the_file(path: Path, mode: str, fault_around: str) -> None:
    with uv.map(path, mode=mode, service="python", fault_around_bytes=fault_around) as region:
        data = path.read_bytes()
        memory = region.buffer
        for index in random.Random(2).sample(range(NR_PAGES), 20):
            start = index * PAGE_SIZE
            assert memory[start : start + 64] == data[start : start + 64]
        assert bytes(memory) == data
        memory.release()
        stats = region.stats()
        assert stats["pgfault"] == stats["pgmajfault"] + stats["pgminfault"]
        assert stats["pgfault_failed"] == 0


@pytest.mark.parametrize("track", [False, True])
def test_private_store_never_reaches_the_file(path: Path, track: bool) -> None:
    before = path.read_bytes()
    with uv.map(path, mode="c", service="python", track=track) as region:
        memory = region.buffer
        memory[10:14] = b"mine"
        memory[50 * PAGE_SIZE] = 1
        assert bytes(memory[0:20]) == before[:10] + b"mine" + before[14:20]
        memory.release()
    assert path.read_bytes() == before


def test_shared_store_is_home_after_flush(path: Path) -> None:
    before = path.read_bytes()
    with uv.map(path, mode="r+", service="python") as region:
        memory = region.buffer
        assert memory[3 * PAGE_SIZE] == before[3 * PAGE_SIZE]
        memory[3 * PAGE_SIZE] ^= 0xFF  # a write-protect fault
        memory[90 * PAGE_SIZE] ^= 0xFF  # a missing one
        region.flush()
        after = path.read_bytes()
        assert [n for n in range(len(before)) if before[n] != after[n]] == [
            3 * PAGE_SIZE,
            90 * PAGE_SIZE,
        ]
        memory[3 * PAGE_SIZE] ^= 0xFF  # clean again, so it is seen again
        region.flush()
        assert path.read_bytes()[3 * PAGE_SIZE] == before[3 * PAGE_SIZE]
        assert region.stats()["mkwrite"] == 3
        memory.release()


def test_evicted_pages_come_back(path: Path) -> None:
    data = path.read_bytes()
    with uv.map(path, mode="r+", service="python") as region:
        memory = region.buffer
        memory[0] = data[0] ^ 1  # dirty: goes home first
        assert region.load() is None
        assert region.evict() == NR_PAGES * PAGE_SIZE or region.evict() == 0
        assert region.residency().resident_bytes == 0
        assert bytes(memory) == bytes([data[0] ^ 1]) + data[1:]
        memory.release()


def test_cache_stays_under_its_cap(path: Path) -> None:
    data = path.read_bytes()
    cap = 16 * PAGE_SIZE
    with uv.map(path, mode="r+", service="python", cap=cap, fault_around_bytes=4096) as region:
        memory = region.buffer
        for index in range(NR_PAGES):  # all dirty: there is nothing clean to take
            memory[index * PAGE_SIZE] ^= 0xFF
            assert region.residency().cache_bytes <= cap
        assert region.residency().resident_bytes <= cap
        assert region.stats()["writeback"] > 0
        memory.release()
    after = path.read_bytes()
    assert all(after[n * PAGE_SIZE] == data[n * PAGE_SIZE] ^ 0xFF for n in range(NR_PAGES))


@pytest.mark.parametrize("cap_pages", [1, 2, 7, 16, 33])
def test_window_above_the_cap_is_no_lack_of_memory(path: Path, cap_pages: int) -> None:
    data = path.read_bytes()
    with uv.map(path, mode="r", service="python", cap=cap_pages * PAGE_SIZE) as region:
        memory = region.buffer
        for index in random.Random(3).sample(range(NR_PAGES), 50):
            assert memory[index * PAGE_SIZE] == data[index * PAGE_SIZE]
            assert region.residency().cache_bytes <= max(cap_pages, 8) * PAGE_SIZE
        region.load()
        assert bytes(memory) == data
        assert region.stats()["oom"] == 0
        memory.release()


def test_load_is_no_fault(path: Path) -> None:
    data = path.read_bytes()
    with uv.map(path, mode="r", service="python") as region:
        region.load()
        memory = region.buffer
        assert bytes(memory) == data
        memory.release()
        assert region.stats()["pgfault"] == 0


def test_threads_that_touch_the_same_pages_all_run_on(path: Path) -> None:
    data = np.fromfile(path, dtype="uint8")
    with uv.map(path, mode="r", service="python", fault_around_bytes=4096) as region:
        sums: list[int] = []

        def touch() -> None:
            sums.append(int(region.array("uint8").sum()))  # releases the GIL while it faults

        threads = [threading.Thread(target=touch) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sums == [int(data.sum())] * 8
        assert region.stats()["bytes_read"] == NR_PAGES * PAGE_SIZE  # each page once


def test_tracked_store_is_seen_once_until_armed_again() -> None:
    with uv.anonymous(8 * PAGE_SIZE, service="python", track=True) as region:
        memory = region.buffer
        memory[0] = 1
        memory[1] = 2
        assert len(region.trace()) == 1
        assert python_service().request("protect", region.handle, 0, 8) == 1
        memory[0] = 3
        memory.release()
        assert [r.action for r in region.trace()] == [Action.ZERO_FILL, Action.REUSE]


def test_page_dropped_behind_our_back_is_filled_again() -> None:
    with uv.anonymous(4 * PAGE_SIZE, service="python") as region:
        memory = region.buffer
        memory[0] = 1
        assert lib.uvm_madvise(region.address, PAGE_SIZE, mmap.MADV_DONTNEED) == 0
        assert memory[0] == 0
        memory.release()
        assert region.stats()["lost_page"] == 1
        # Written, missing but believed present (RETRY), then as new.
        assert [r.action for r in region.trace()] == [
            Action.ZERO_FILL,
            Action.SCAN,
            Action.ZERO_FILL,
        ]


# --- hooks ------------------------------------------------------------------------------------------

# A bound method that ignores what it is asked: pickles without cloudpickle.
ALLOW, WAIT = "ok".format, "wait".format


def test_hook_that_agrees_lets_the_store_through(path: Path) -> None:
    with uv.map(path, mode="r+", service="python", page_mkwrite=ALLOW) as region:
        memory = region.buffer
        memory[0] = 1
        memory.release()
        assert region.trace()[-1].steps[-2:] == ("do_page_mkwrite", "finish_fault")


@pytest.mark.parametrize(("answer", "deadline"), [("deny", 30), ("wait", 0.3)])
def test_store_into_a_present_page_that_is_denied_or_waits_too_long_fails(
    path: Path, answer: str, deadline: float
) -> None:
    """Its page is there: poison would be refused for ever, and the store would fault again without end."""
    before = path.read_bytes()
    code = f"""
        region = uv.map({str(path)!r}, "r+", service="python", page_mkwrite={answer!r}.format,
                        deadline={deadline})
        memory = region.buffer
        assert memory[0] == {before[0]}
        memory[0] ^= 0xFF
        print("not reached")
    """
    assert run_program(code, status=-signal.SIGSEGV).stdout == ""
    assert path.read_bytes() == before


# --- failure, death and the end ---------------------------------------------------------------------


def test_changed_file_raises_and_shows_no_byte(path: Path) -> None:
    with uv.map(path, mode="r", service="python") as region:
        memory = region.buffer
        assert memory[0] == path.read_bytes()[0]
        path.write_bytes(b"another version")
        with pytest.raises(uv.SourceChanged):
            bytes(memory[50 * PAGE_SIZE : 51 * PAGE_SIZE])
        memory.release()
        assert region.trace()[-1].result == FaultResult.SIGBUS
        with pytest.raises((uv.SourceChanged, OSError)):
            region.load()


def test_store_that_waits_past_its_deadline_raises_and_is_not_made(path: Path) -> None:
    before = path.read_bytes()
    with uv.map(path, "r+", service="python", page_mkwrite=WAIT, deadline=0.3) as region:
        memory = region.buffer
        began = time.monotonic()
        with pytest.raises(uv.SourceTimeout) as raised:
            memory[5 * PAGE_SIZE] = before[5 * PAGE_SIZE] ^ 0xFF
            for _ in range(20):
                len("a call")
        assert 0.3 <= time.monotonic() - began < 2
        assert (raised.value.errno, raised.value.index) == (errno.ETIMEDOUT, 5)
        assert memory[5 * PAGE_SIZE] == before[5 * PAGE_SIZE]
        memory.release()
    assert path.read_bytes() == before


def test_error_of_write_back_is_kept_and_raised_and_nothing_is_lost(path: Path) -> None:
    want = bytearray(path.read_bytes())
    region = uv.map(path, mode="r+", service="python")
    with region.buffer as memory:
        memory[70 * PAGE_SIZE] = want[70 * PAGE_SIZE] = want[70 * PAGE_SIZE] ^ 0xFF
    # What a full disk does: the service's write fails, with EFBIG.
    pid, limit = python_service().pid, resource.RLIMIT_FSIZE
    before = resource.prlimit(pid, limit, (60 * PAGE_SIZE, resource.RLIM_INFINITY))
    for _ in range(2):
        with pytest.raises(uv.SourceError) as raised:
            region.flush()
        assert raised.value.errno == errno.EFBIG
    with pytest.raises(uv.SourceError):
        region.close()
    assert not region.closed and region.residency().dirty_bytes == PAGE_SIZE
    resource.prlimit(pid, limit, before)
    try:
        region.flush()  # may still tell of the one that close() made
    except uv.SourceError:
        region.flush()
    assert region.residency().dirty_bytes == 0
    region.close()
    assert path.read_bytes() == want


def test_ctrl_c_reaches_a_thread_that_waits_for_the_service(path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(f"""
            import uffd_vm as uv
            region = uv.map({str(path)!r}, "r+", service="python", page_mkwrite="wait".format)
            memory = region.buffer
            print("waiting", flush=True)
            try:
                memory[0] = 1
                for _ in range(100):
                    len("a call")
            except KeyboardInterrupt:
                print("KeyboardInterrupt", flush=True)
            memory.release()
            region.discard()
        """)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == "waiting\n"
    time.sleep(0.6)  # it sleeps in the page fault, with the GIL held
    child.send_signal(signal.SIGINT)
    began = time.monotonic()
    line = child.stdout.readline()
    took = time.monotonic() - began
    _, errors = child.communicate(timeout=20)
    assert line == "KeyboardInterrupt\n", errors
    assert took < 1.0 and child.returncode == 0, errors


def test_dead_service_fails_faults_and_is_reaped(path: Path) -> None:
    with uv.map(path, mode="r", service="python") as region:
        memory = region.buffer
        assert bytes(memory[0:1])
        service = python_service()
        os.kill(service.pid, signal.SIGKILL)
        with pytest.raises(uv.PagerDied):
            bytes(memory[60 * PAGE_SIZE : 61 * PAGE_SIZE])
        assert service.wait(10) == -signal.SIGKILL
        with pytest.raises(ChildProcessError):
            os.waitpid(service.pid, os.WNOHANG)
        memory.release()


def test_new_service_takes_over_what_the_dead_one_served(path: Path) -> None:
    data = path.read_bytes()
    with uv.map(path, mode="r+", service="python") as region:
        memory = region.buffer
        memory[0] = data[0] ^ 0xFF
        dead = python_service()
        os.kill(dead.pid, signal.SIGKILL)
        dead.wait(10)
        alive = python_service()
        assert alive.pid != dead.pid
        assert bytes(memory[1:]) == data[1:]
        region.flush()
        assert path.read_bytes()[0] == data[0] ^ 0xFF  # the dirty page was not forgotten
        memory.release()


def test_close_ends_the_process_and_leaks_nothing(path: Path) -> None:
    fds = lambda: {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if  # noqa: E731
                   os.path.exists(f"/proc/self/fd/{fd}")}  # fmt: skip
    with uv.map(path, mode="r", service="python") as region:
        memory = region.buffer
        assert memory[0] is not None
        memory.release()
        service = python_service()
    before = fds()
    service.close()
    service.close()  # idempotent
    assert service.poll() is not None
    assert not [fd for fd in fds() - before if "socket" in fd or "pidfd" in fd]
    with pytest.raises(uv.PagerDied):
        service.statistics()


def test_detach_leaves_nothing_in_the_service(path: Path) -> None:
    with uv.anonymous(PAGE_SIZE, service="python"):  # keeps the process
        service = python_service()
        before = service.statistics()
        for _ in range(5):
            with uv.map(path, mode="r+", service="python") as region:
                memory = region.buffer
                memory[0] ^= 1
                memory.release()
                assert service.statistics()["nr_regions"] == before["nr_regions"] + 1
        assert service.statistics() == before


def test_service_ends_with_its_owner(path: Path) -> None:
    # Not by run_in_child, which would end the service itself.
    code = f"""
        region = uv.map({str(path)!r}, mode="r", service="python")
        from uffd_vm.service.python import python_service
        print(python_service().pid, flush=True)
        os._exit(0)
    """
    owner = (sys.executable, "-c", program(code))
    pid = int(subprocess.check_output(owner, cwd=ROOT, timeout=100))
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/status").exists() and time.monotonic() < deadline:
        if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
            break
        time.sleep(0.01)
    else:
        assert not Path(f"/proc/{pid}/status").exists()


def test_interrupt_of_the_terminal_is_for_the_owner(path: Path) -> None:
    with uv.map(path, mode="r", service="python") as region:
        os.kill(python_service().pid, signal.SIGINT)
        memory = region.buffer
        assert bytes(memory) == path.read_bytes()
        memory.release()


# --- the protocol -----------------------------------------------------------------------------------


def test_unknown_region_and_bad_range_are_refused() -> None:
    with uv.anonymous(4 * PAGE_SIZE, service="python") as region:
        service = python_service()
        for handle, index, nr_pages in ((region.handle + 1, 0, 1), (region.handle, 3, 2)):
            with pytest.raises(OSError):
                service.request("load", handle, index, nr_pages)
        with pytest.raises(ValueError, match="unknown request"):
            service.request("explode", region.handle)


def test_message_that_is_cut_off_is_an_error_and_closes_what_came() -> None:
    import socket

    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with a, b:
        nr_fds = len(os.listdir("/proc/self/fd"))
        socket.send_fds(a, [b'{"fds": ["one", "two"]}'], [a.fileno()])
        with pytest.raises(OSError, match="2 descriptors named, 1 came"):
            protocol.receive(b)
        a.send(b"x" * (protocol.MAX_MESSAGE + 1))
        with pytest.raises(OSError, match="cut off"):
            protocol.receive(b)
        assert len(os.listdir("/proc/self/fd")) == nr_fds
