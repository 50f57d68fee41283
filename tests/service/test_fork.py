"""fork(): what a child finds, by every way there is to make one, and what its parent keeps.

Each test forks in a child of the test process, so that a hang or a crash of a forked process is this
child's, and its exit status says what happened. Children report by exit status and by a pipe.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import multiprocessing
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import uffd_vm as uv
from tests.support import Touch, fork_and_ask, in_thread, run_in_child, wait_until
from uffd_vm.fault.pte import FolioState
from uffd_vm.kernel._lib import ffi, lib
from uffd_vm.kernel.features import Feature, probe
from uffd_vm.page import PAGE_SIZE
from uffd_vm.testing.inject import inject
from uffd_vm.testing.invariants import check_all
from uffd_vm.testing.strategies import pattern

pytestmark = pytest.mark.requires(Feature.MISSING_SHMEM, Feature.POISON)

NR_PAGES = 64
DATA = pattern(NR_PAGES * PAGE_SIZE)
KINDS = ("anonymous", "anonymous tracked", "r", "c", "c tracked", "r+")
SOME = ("anonymous tracked", "c", "r+")  # one of each mapping


@contextmanager
def mapped(kind: str, **options: Any) -> Iterator[tuple[uv.Region, Path]]:
    """A region of the kind, its first half touched; anonymous ones are filled with the same bytes."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.bin"
        path.write_bytes(DATA)
        track = kind.endswith("tracked") or kind == "r+"
        options.setdefault("service", "native")
        if kind.startswith("anonymous"):
            region = uv.anonymous(len(DATA), track=track, **options)
            with region.buffer as buffer:
                buffer[: len(DATA) // 2] = DATA[: len(DATA) // 2]
        else:
            options.setdefault("readahead_bytes", 0)  # the second half stays missing
            region = uv.map(path, kind.split()[0], track=track, **options)
            with region.buffer as buffer:
                assert bytes(buffer[: len(DATA) // 2]) == DATA[: len(DATA) // 2]
        with region:
            yield region, path


def expected(kind: str) -> bytes:
    half = len(DATA) // 2
    return DATA[:half] + bytes(half) if kind.startswith("anonymous") else DATA


def content_is_right(region: uv.Region, kind: str) -> bytes:
    with region.buffer as buffer:
        got = bytes(buffer)
    want = expected(kind)
    if got == want:
        return b"right"
    wrong = next(i for i in range(len(want)) if got[i] != want[i])
    return f"byte {wrong} (page {wrong // PAGE_SIZE}) is {got[wrong]:#x}".encode()


def work_in_child(region: uv.Region, kind: str) -> bytes:
    """Reads all, writes where it may, reads that back."""
    answer = content_is_right(region, kind)
    if kind != "r":
        with region.buffer as buffer:
            for page in range(0, NR_PAGES, 5):
                buffer[page * PAGE_SIZE] = 0xEE
            assert all(buffer[p * PAGE_SIZE] == 0xEE for p in range(0, NR_PAGES, 5))
    return answer


def parents_view_is_right(region: uv.Region, kind: str) -> None:
    want = bytearray(expected(kind))
    if kind == "r+":
        for page in range(0, NR_PAGES, 5):
            want[page * PAGE_SIZE] = 0xEE
    with region.buffer as buffer:
        assert bytes(buffer) == want
    check_all(region)


# --- every way to fork ------------------------------------------------------------------------------


def in_child_os_fork(kind: str, service: str) -> None:
    with mapped(kind, service=service) as (region, path):
        status, answer = fork_and_ask(lambda: work_in_child(region, kind))
        assert (status, answer) == (0, b"right")
        parents_view_is_right(region, kind)
        region.flush()
        if kind == "r+":
            assert path.read_bytes()[0] == 0xEE
        else:
            assert path.read_bytes() == DATA


def inherited(service: str) -> tuple[str, ...]:
    """A file that the parent's Python service writes back is not."""
    return tuple(kind for kind in KINDS if (service, kind) != ("python", "r+"))


@pytest.mark.parametrize(
    ("service", "kind"),
    [(s, kind) for s in ("native", "python", "inline") for kind in inherited(s)],
)
def test_os_fork(kind: str, service: str) -> None:
    run_in_child(in_child_os_fork, kind, service)


def in_child_fork_with_many(service: str) -> None:
    """Tables, aliases and stacks that the child maps must not land where a region is to come back."""
    kinds = inherited(service) * 4
    with ExitStack() as stack:
        many = [stack.enter_context(mapped(kind, service=service)) for kind in kinds]

        def work() -> bytes:
            answers = [
                content_is_right(region, kind)
                for (region, _), kind in zip(many, kinds, strict=True)
            ]
            return b" ".join(sorted(set(answers)))

        assert fork_and_ask(work) == (0, b"right")


@pytest.mark.parametrize("service", ["native", "python", "inline"])
def test_fork_with_regions_of_every_kind(service: str) -> None:
    run_in_child(in_child_fork_with_many, service)


def in_child_libc_fork(kind: str) -> None:
    with mapped(kind) as (region, _path):
        libc = ctypes.PyDLL(None)  # keeps the GIL, as os.fork() does
        reader, writer = os.pipe()
        pid = libc.fork()
        if pid == 0:
            try:
                os.write(writer, work_in_child(region, kind))
                os._exit(0)
            except BaseException as error:
                os.write(2, repr(error).encode())
                os._exit(1)
        os.close(writer)
        assert os.read(reader, 100) == b"right"
        os.close(reader)
        assert os.waitpid(pid, 0)[1] == 0
        parents_view_is_right(region, kind)


@pytest.mark.parametrize("kind", SOME)
def test_libc_fork(kind: str) -> None:
    run_in_child(in_child_libc_fork, kind)


_region: Any = None


def _pool_work(page: int) -> int:
    return _region.buffer[page * PAGE_SIZE]


def in_child_pool(kind: str) -> None:
    global _region
    with mapped(kind) as (region, _path):
        _region = region
        with multiprocessing.get_context("fork").Pool(3) as pool:
            got = pool.map(_pool_work, range(NR_PAGES))
            pool.close()
            pool.join()
        assert bytes(got) == expected(kind)[::PAGE_SIZE]
        _region = None


@pytest.mark.parametrize("kind", SOME)
def test_a_multiprocessing_pool(kind: str) -> None:
    run_in_child(in_child_pool, kind)


def in_child_fork_from_a_thread(kind: str) -> None:
    with mapped(kind) as (region, _path):
        status, answer = in_thread(fork_and_ask, lambda: work_in_child(region, kind))(20)
        assert (status, answer) == (0, b"right")
        parents_view_is_right(region, kind)


@pytest.mark.parametrize("kind", SOME)
def test_a_fork_from_a_worker_thread(kind: str) -> None:
    run_in_child(in_child_fork_from_a_thread, kind)


def in_child_nested(kind: str) -> None:
    def child() -> bytes:
        first = content_is_right(region, kind)
        status, second = fork_and_ask(grandchild)
        assert status == 0
        return first + second

    def grandchild() -> bytes:
        status, third = fork_and_ask(lambda: work_in_child(region, kind))
        assert status == 0
        return content_is_right(region, kind) + third if kind != "r+" else b"right" + third

    with mapped(kind) as (region, _path):
        assert fork_and_ask(child) == (0, b"right" * 3)
        parents_view_is_right(region, kind)


@pytest.mark.parametrize("kind", SOME)
def test_nested_forks(kind: str) -> None:
    run_in_child(in_child_nested, kind)


def in_child_subprocess() -> None:
    with ExitStack() as stack:
        regions = [stack.enter_context(mapped(kind))[0] for kind in KINDS]
        assert subprocess.run(["true"], check=True).returncode == 0
        assert subprocess.check_output([sys.executable, "-c", "print(7)"]).strip() == b"7"
        pid = os.posix_spawn("/bin/true", ["true"], {})
        assert os.waitpid(pid, 0)[1] == 0
        subprocess.run(["true"], check=True, preexec_fn=lambda: None)  # a real fork
        for region, kind in zip(regions, KINDS, strict=True):
            assert content_is_right(region, kind) == b"right"


def test_subprocess_and_posix_spawn_are_not_disturbed() -> None:
    run_in_child(in_child_subprocess)


# --- what the parent's Python service serves --------------------------------------------------------


def _scan(region: uv.Region, nr_bytes: int, want: bytes, seconds: float) -> int:
    rng, end, nr = random.Random(7), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        at = rng.randrange(len(want) - nr_bytes)
        with region.buffer as buffer:
            assert buffer[at : at + nr_bytes] == want[at : at + nr_bytes]
        nr += 1
        if nr % 3 == 0:
            region.evict()
    return nr


def in_child_python_scan(mode: str) -> tuple[int, int]:
    """Parent and child read beside each other, each much more than fits under the cap."""
    data, cap = pattern(8 << 20), 512 << 10
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.bin"
        path.write_bytes(data)
        with uv.map(path, mode, service="python", cap=cap, deadline=5.0) as region:

            def child() -> bytes:
                nr = _scan(region, 300_001, data, 1.5)
                assert region.residency().cache_bytes <= cap
                return str(nr).encode()

            finish = in_thread(_scan, region, 300_001, data, 1.5)
            status, answer = fork_and_ask(child)
            assert status == 0
            return int(answer), finish()


@pytest.mark.parametrize("mode", ["r", "c"])
def test_a_child_reads_beside_a_parent_whose_service_is_python(mode: str) -> None:
    child, parent = run_in_child(in_child_python_scan, mode, timeout=25).value
    assert child > 3 and parent > 3


def in_child_python_cap() -> None:
    data, cap = pattern(4 << 20), 256 << 10
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.bin"
        path.write_bytes(data)
        with uv.map(path, "r", service="python", cap=cap) as region:
            native = lib.uvm_cache_ctl(region._ops.cache.id)

            def child() -> bytes:
                with region.buffer as buffer:
                    assert bytes(buffer) == data
                return b"right"

            for _ in range(2):
                assert fork_and_ask(child) == (0, b"right")
                assert native.nr_attached == 1
                with region.buffer as buffer:
                    assert bytes(buffer) == data
                assert region.residency().cache_bytes <= cap
                assert region.evict() > 0
                check_all(region)


def test_children_leave_the_cap_and_evict_of_a_python_region_as_they_are() -> None:
    run_in_child(in_child_python_cap)


def in_child_python_private(nested: bool) -> None:
    """Mode "c", untracked: stores of the parent's before the fork are the child's too, and none after."""
    with mapped("c", service="python") as (region, path):
        want = bytearray(DATA)
        written = [0, 1, 2, 7, NR_PAGES // 2 - 1, NR_PAGES // 2 + 5, NR_PAGES - 1]

        def store(value: int, pages: list[int]) -> None:
            with region.buffer as buffer:
                for page in pages:
                    want[page * PAGE_SIZE + 11] = value
                    buffer[page * PAGE_SIZE + 11] = value

        store(0xA1, written)
        region.evict()
        (start, go), (reader, writer) = os.pipe(), os.pipe()

        def child() -> bytes:
            os.write(writer, b".")
            os.read(start, 1)
            with region.buffer as buffer:
                assert bytes(buffer) == want
            store(0xC1, [2, 3, NR_PAGES - 2])
            region.evict()
            region.load()
            with region.buffer as buffer:
                assert bytes(buffer) == want
            return b"right"

        def grandchild() -> bytes:
            status, answer = fork_and_ask(child)
            assert status == 0
            return answer

        answer = in_thread(fork_and_ask, grandchild if nested else child)
        os.read(reader, 1)
        mine = bytes(want)
        store(0xB1, [1, 4, NR_PAGES - 3])
        region.evict()
        os.write(go, b"x")
        assert answer() == (0, b"right")
        with region.buffer as buffer:
            assert bytes(buffer) == want != mine
        assert path.read_bytes() == DATA


@pytest.mark.parametrize("nested", [False, True])
def test_private_pages_of_a_python_region_are_the_childs(nested: bool) -> None:
    run_in_child(in_child_python_private, nested)


def _page_fails(buffer: memoryview, page: int) -> bool:
    try:
        for _ in range(2):  # the exception comes between two instructions
            buffer[page * PAGE_SIZE]
    except uv.SourceChanged:
        return True
    return False


def in_child_python_poisoned() -> None:
    """What failed in the parent, and is poison there, is neither a private page nor failed in the child."""
    with mapped("c", service="python", fault_around_bytes=PAGE_SIZE) as (region, path):
        last = NR_PAGES - 1
        sink = os.memfd_create("sink")
        with region.buffer as buffer:
            buffer[3 * PAGE_SIZE] = 0xA1
            stat = os.stat(path)
            os.utime(path, ns=(0, 0))
            with pytest.raises(OSError), buffer[(last - 2) * PAGE_SIZE :] as there:
                os.pwrite(sink, there[:PAGE_SIZE], 0)  # EFAULT
            assert _page_fails(buffer, last)

        def child() -> bytes:
            with region.buffer as buffer:
                assert buffer[3 * PAGE_SIZE] == 0xA1
                assert _page_fails(buffer, last - 2)
                os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
                for page in (last, 5):
                    assert buffer[page * PAGE_SIZE] == DATA[page * PAGE_SIZE]
            return b"right"

        assert fork_and_ask(child) == (0, b"right")


def test_pages_that_failed_in_the_parent_are_tried_anew_in_the_child() -> None:
    run_in_child(in_child_python_poisoned)


WHY = "mode \"r+\" of service='python' stays with the parent; map it with service='native'"


def in_child_python_writable(do: str, on_error: str) -> tuple[int, bytes, str]:
    with mapped("r+", service="python", on_error=on_error) as (region, path):
        with region.buffer as buffer:
            buffer[PAGE_SIZE] = 0xA1
        byte = ctypes.c_ubyte.from_address(region.address + 5)

        def touch() -> bytes:
            if do == "write":
                byte.value = 1
            return bytes([byte.value])

        def child() -> bytes:
            if do == "nothing":
                return b"untouched"
            if do in ("read", "write"):
                return touch()
            if do == "grandchild":
                status, answer = fork_and_ask(touch)
                return f"{status} {answer!r}".encode()
            assert do == "call"
            said = set()
            for call in (
                region.flush,
                region.load,
                region.evict,
                region.prefetch,
                region.check,
                region.dirty,
                region.protect,
                region.residency,
                region.stats,
            ):
                with pytest.raises(uv.StaleRegionError) as raised:
                    call()
                said.add(str(raised.value))
            with pytest.raises(uv.RegionBusyError):
                uv.map(path, "r+", service="native")
            with uv.map(path, "r", service="python") as own:
                assert own.buffer[5] == DATA[5]
            region.close()
            (message,) = said
            return message.encode()

        status, answer = fork_and_ask(child)
        assert lib.uvm_cache_ctl(region._ops.cache.id).nr_attached == 1
        with region.buffer as buffer:
            buffer[2 * PAGE_SIZE] = 0xA2
        region.flush()
        want = bytearray(DATA)
        want[PAGE_SIZE], want[2 * PAGE_SIZE] = 0xA1, 0xA2
        assert path.read_bytes() == want
        assert region.residency().dirty_bytes == 0
        region.evict()
        with region.buffer as buffer:
            assert bytes(buffer) == want
        check_all(region)
        return status, answer, hex(region.address)


@pytest.mark.parametrize("on_error", ["raise", "sigbus"])
@pytest.mark.parametrize("do", ["read", "write", "grandchild"])
def test_a_writable_python_region_is_not_inherited(do: str, on_error: str) -> None:
    result = run_in_child(in_child_python_writable, do, on_error)
    status, answer, address = result.value
    if do == "grandchild":
        assert (status, answer) == (0, f"{-signal.SIGSEGV} b''".encode())
    else:
        assert (status, answer) == (-signal.SIGSEGV, b"")
    (said,) = (line for line in result.stderr.splitlines() if "inaccessible" in line)
    assert f"region at {address} " in said and WHY in said


def test_calls_on_a_writable_python_region_of_the_parent_say_why() -> None:
    result = run_in_child(in_child_python_writable, "call", "raise")
    status, answer, _ = result.value
    assert status == 0, result.stderr
    assert "could not be served in the forked child" in answer.decode() and WHY in answer.decode()


def test_a_child_that_does_not_touch_it_hears_nothing_of_it() -> None:
    result = run_in_child(in_child_python_writable, "nothing", "raise")
    assert result.value[:2] == (0, b"untouched")
    assert "inaccessible" not in result.stderr


def in_child_python_again() -> None:
    """What a service of the child's own fills is not what its native threads took over."""
    with mapped("r", service="python") as (region, path):

        def child() -> bytes:
            with uv.map(path, "r", service="python") as own:
                assert own._ops.cache.id != region._ops.cache.id
                assert content_is_right(own, "r") == b"right"
                answer = content_is_right(region, "r")
                check_all(own)
            region.close()
            wait_until(lambda: _counts()[2]["nr_caches"] == 0, f"caches freed: {_counts()}")
            return answer

        assert fork_and_ask(child) == (0, b"right")
        assert content_is_right(region, "r") == b"right"


def test_a_child_maps_the_file_by_a_python_service_of_its_own() -> None:
    run_in_child(in_child_python_again)


# --- ways that run no handlers ----------------------------------------------------------------------


def in_child_raw_fork(kind: str, how: str) -> int:
    with mapped(kind) as (region, _path):
        libc = ctypes.PyDLL(None)
        buffer = region.buffer
        reader, writer = os.pipe()
        if how == "_Fork":
            pid = libc._Fork()
        else:
            pid = libc.syscall(
                57 if sys.platform == "linux" and os.uname().machine == "x86_64" else -1
            )
        if pid == 0:
            os.write(writer, bytes([buffer[len(DATA) - 5], buffer[5]]))
            os._exit(0)
        os.close(writer)
        got = os.read(reader, 2)
        os.close(reader)
        _, status = os.waitpid(pid, 0)
        buffer.release()
        assert content_is_right(region, kind) == b"right", "the parent is not disturbed"
        if got:
            assert got[1] == expected(kind)[5], "what was there is there"
            return got[0]
        return -os.WTERMSIG(status)


@pytest.mark.parametrize(
    ("kind", "how"), [*((kind, "_Fork") for kind in KINDS), ("c", "syscall"), ("r+", "syscall")]
)
def test_a_fork_without_handlers_has_no_regions(kind: str, how: str) -> None:
    """SIGSEGV, never zeros: and a hole of the page cache that a child reads would be zeros for all."""
    if how == "_Fork" and not hasattr(ctypes.CDLL(None), "_Fork"):
        pytest.skip("no _Fork() in this C library; glibc 2.34 has it")
    if how == "syscall" and os.uname().machine != "x86_64":
        pytest.skip("no fork system call on this machine; x86_64 has it")
    assert run_in_child(in_child_raw_fork, kind, how).value == -signal.SIGSEGV


def in_child_raw_fork_of_a_child(kind: str) -> int:
    with mapped(kind) as (region, _path):

        def child() -> bytes:
            buffer = region.buffer
            pid = ctypes.PyDLL(None).syscall(57)
            if pid == 0:
                os._exit(buffer[len(DATA) - 5])
            return repr(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode()

        status, answer = fork_and_ask(child)
        assert status == 0
        return int(answer)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="no fork system call; x86_64 has it")
@pytest.mark.parametrize("kind", SOME)
def test_nor_has_one_of_a_child_that_was_forked_before(kind: str) -> None:
    assert run_in_child(in_child_raw_fork_of_a_child, kind).value == -signal.SIGSEGV


# --- forks while things happen ----------------------------------------------------------------------


def in_child_fork_while_threads_fault(kind: str, seconds: float) -> int:
    stop = threading.Event()
    with mapped(kind, fault_around_bytes=PAGE_SIZE) as (region, _path):
        want = expected(kind)
        address = region.address

        def touch(offset: int) -> None:
            buffer = ctypes.create_string_buffer(1)
            while not stop.is_set():
                for page in range(NR_PAGES):
                    ctypes.memmove(buffer, address + page * PAGE_SIZE + offset, 1)
                    assert buffer.raw[0] == want[page * PAGE_SIZE + offset]

        def churn() -> None:
            while not stop.is_set():
                region.evict()
                region.flush()
                if region._tracked:
                    region.protect()

        workers = [in_thread(touch, 8 + i) for i in range(3)] + [in_thread(churn)]
        nr_forks, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            status, answer = fork_and_ask(lambda: content_is_right(region, kind))
            assert (status, answer) == (0, b"right"), (nr_forks, status, answer)
            nr_forks += 1
        stop.set()
        for finish in workers:
            finish()
        check_all(region)
        return nr_forks


@pytest.mark.parametrize("kind", KINDS)
def test_forks_while_threads_fault_evict_flush_and_protect(kind: str) -> None:
    assert run_in_child(in_child_fork_while_threads_fault, kind, 1.0, timeout=40).value > 3


def in_child_all_write(cap_pages: int) -> None:
    """Parent and child store into different pages, both flush, under a cap smaller than what is dirty."""
    with mapped("r+", cap=cap_pages * PAGE_SIZE, fault_around_bytes=PAGE_SIZE) as (region, path):

        def store(first: int, value: int) -> bytes:
            with region.buffer as buffer:
                for page in range(first, NR_PAGES, 2):
                    buffer[page * PAGE_SIZE + 9] = value
            region.flush()
            return b"stored"

        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(writer, store(1, 0xC1))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        store(0, 0xA1)
        os.close(writer)
        assert os.read(reader, 10) == b"stored"
        os.close(reader)
        assert os.waitpid(pid, 0)[1] == 0
        want = bytearray(DATA)
        want[9 :: 2 * PAGE_SIZE] = b"\xa1" * (NR_PAGES // 2)
        want[PAGE_SIZE + 9 :: 2 * PAGE_SIZE] = b"\xc1" * (NR_PAGES // 2)
        with region.buffer as buffer:
            assert bytes(buffer) == want
        assert path.read_bytes() == want, "both flushed before they said so"
        region.flush()
        wait_until(
            lambda: region.residency().dirty_bytes == 0, "all is clean once the child is gone"
        )
        region.evict()
        with region.buffer as buffer:
            assert bytes(buffer) == want
        check_all(region)


@pytest.mark.parametrize("cap_pages", [8, 1024], ids=["tight cap", "no pressure"])
def test_parent_and_child_write_one_file_and_nothing_is_lost(cap_pages: int) -> None:
    run_in_child(in_child_all_write, cap_pages)


def in_child_tracking(kind: str) -> None:
    with mapped(kind) as (region, _path):
        region.protect()

        def child() -> bytes:
            assert region.dirty() == [] or kind == "r+"
            with region.buffer as buffer:
                buffer[3 * PAGE_SIZE] = 1
                buffer[(NR_PAGES - 1) * PAGE_SIZE] = 1
            found = region.dirty()
            last = ((NR_PAGES - 1) * PAGE_SIZE, NR_PAGES * PAGE_SIZE)
            return (
                b"seen" if found == [(3 * PAGE_SIZE, 4 * PAGE_SIZE), last] else repr(found).encode()
            )

        assert fork_and_ask(child) == (0, b"seen")
        assert region.dirty() == [], "the child's stores are its own"
        with region.buffer as buffer:
            buffer[5 * PAGE_SIZE] = 1
        assert region.dirty() == [(5 * PAGE_SIZE, 6 * PAGE_SIZE)]


@pytest.mark.parametrize("kind", ["anonymous tracked", "c tracked", "r+"])
def test_tracking_goes_on_in_the_child(kind: str) -> None:
    run_in_child(in_child_tracking, kind)


def in_child_not_published(kind: str) -> None:
    """The parent's service has filled the page and not said so yet, when the memory is copied."""
    with mapped(kind, service="python") as (region, _path):
        region.protect()
        ptes = lib.uvm_region_ptes(region.handle)
        ffi.memmove(ptes, bytes(NR_PAGES), NR_PAGES)

        def child() -> bytes:
            return repr(region.dirty()).encode()

        assert fork_and_ask(child) == (0, repr([(0, NR_PAGES // 2 * PAGE_SIZE)]).encode())


@pytest.mark.parametrize("kind", ["anonymous tracked", "c tracked"])
def test_page_that_is_not_published_counts_as_written_in_the_child(kind: str) -> None:
    run_in_child(in_child_not_published, kind)


def in_child_dead_filler() -> None:
    """The parent is killed in the middle of a fill; the child that shares its cache needs the page."""
    with mapped("r", fault_around_bytes=PAGE_SIZE, deadline=20.0) as (region, _path):
        page = NR_PAGES - 3
        reader, writer = os.pipe()
        parent = os.fork()
        if parent == 0:  # the one that will be killed, and its child
            os.close(reader)
            child = os.fork()
            if child == 0:
                try:
                    folios = region._ops.cache.folios
                    wait_until(lambda: folios(page, 1)[0] & 0xFF == FolioState.FILLING)
                    os.kill(os.getppid(), signal.SIGKILL)
                    with region.buffer as buffer:
                        got = buffer[page * PAGE_SIZE]
                    os.write(writer, b"right" if got == DATA[page * PAGE_SIZE] else b"wrong")
                except BaseException as error:
                    os.write(writer, repr(error).encode())
                os._exit(0)
            lib.uvm_inject(lib.UVM_OP_PREAD_NOWAIT, 0, 1 << 40, errno.EAGAIN, 0)
            lib.uvm_inject(lib.UVM_OP_PREAD, 0, 1, 0, 60 * 10**9)
            region.buffer[page * PAGE_SIZE]
            os._exit(3)
        os.close(writer)
        answer = b""
        while chunk := os.read(reader, 1000):
            answer += chunk
        os.close(reader)
        assert answer == b"right", answer
        assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == -signal.SIGKILL
        with region.buffer as buffer:
            assert bytes(buffer) == DATA
        check_all(region)


def test_a_child_takes_over_from_a_filler_that_was_killed() -> None:
    run_in_child(in_child_dead_filler)


def in_child_dead_writer() -> None:
    """Killed behind its write, ahead of the fstat() that tells the others which version is ours now."""
    with mapped("r+") as (region, path):
        pid = os.fork()
        if pid == 0:
            try:
                region.buffer[PAGE_SIZE] = 0x5A
                lib.uvm_inject(lib.UVM_OP_FSTAT, 1, 1, 0, 60 * 10**9)
                region.flush()
            finally:
                os._exit(3)
        wait_until(lambda: path.read_bytes()[PAGE_SIZE] == 0x5A, "written")
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        want = bytearray(DATA)
        want[PAGE_SIZE] = 0x5A
        with region.buffer as buffer:
            assert bytes(buffer) == want  # the second half is read from the file only now
            buffer[0] = want[0] = 0xA5
        region.flush()
        assert path.read_bytes() == want
        check_all(region)


def test_a_writer_that_was_killed_leaves_the_file_ours() -> None:
    run_in_child(in_child_dead_writer)


def in_child_crowd(nr_children: int) -> bytes:
    """All of them live at a time, and fill one cache."""
    with mapped("r", fault_around_bytes=PAGE_SIZE) as (region, _path):
        (start, go), (reader, writer) = os.pipe(), os.pipe()
        pids = []
        for i in range(nr_children):
            pid = os.fork()
            if pid == 0:
                os.close(go)
                page = i % NR_PAGES
                with region.buffer as buffer:
                    right = buffer[page * PAGE_SIZE] == DATA[page * PAGE_SIZE]
                os.write(writer, b"." if right else b"x")
                os.read(start, 1)
                os._exit(0)
            pids.append(pid)
        os.close(writer)
        answers = b""
        while len(answers) < nr_children and (chunk := os.read(reader, 4096)):
            answers += chunk
        os.close(go)
        for pid in pids:
            assert os.waitpid(pid, 0)[1] == 0
        check_all(region)
        return answers


def test_more_children_than_fit_in_a_byte_share_a_cache() -> None:
    result = run_in_child(in_child_crowd, 280, timeout=90)
    assert result.value == b"." * 280, result.stderr


def in_child_no_slot_left() -> tuple[int, str]:
    """All places of the cache are taken by living processes: here, by this one again and again."""
    nr_slots, slot = 4096, struct.pack("<iIQ", os.getpid(), 1, 0)
    with mapped("r") as (region, path), mapped("anonymous tracked") as (other, _other):
        cache = region._ops.cache
        with mmap.mmap(lib.uvm_cache_ctl_fd(cache.id), nr_slots * len(slot)) as slots:
            slots[:] = slot * nr_slots
        byte = ctypes.c_ubyte.from_address(region.address)

        def child() -> bytes:
            assert content_is_right(other, "anonymous tracked") == b"right", "not of that cache"
            with pytest.raises(uv.UffdError) as refused:
                uv.map(path, service="native")
            os.write(2, b"refused: %d\n" % (refused.value.errno or 0))
            with pytest.raises(uv.StaleRegionError, match="4096 living processes"):
                region.buffer  # noqa: B018
            return bytes([byte.value])

        status, answer = fork_and_ask(child)
        assert answer == b""
        assert content_is_right(region, "r") == b"right", "the parent goes on"
        return status, hex(region.address)


def test_a_child_too_many_says_why_and_never_reads_zeros() -> None:
    result = run_in_child(in_child_no_slot_left)
    status, address = result.value
    assert status == -signal.SIGSEGV
    said = next(line for line in result.stderr.splitlines() if "made inaccessible" in line)
    assert f"region at {address} " in said
    assert "4096 living processes share its file's cache" in said
    assert f"(errno {errno.EUSERS})" in said
    assert f"refused: {errno.EUSERS}" in result.stderr


# --- the end of a child -----------------------------------------------------------------------------


def in_child_forking_thread_ends(kind: str, how: str) -> bytes:
    """os.fork() in a thread: that thread is all there is of the program in the child, and our threads
    must not outlive it. Without them the C library would call exit(0), which flushes stdio."""
    libc = ctypes.CDLL(None)
    libc.fdopen.restype = ctypes.c_void_p
    with mapped(kind) as (region, _path):
        reader, writer = os.pipe()

        def late() -> None:
            time.sleep(0.3)
            os.write(writer, content_is_right(region, kind))

        def in_forking_thread() -> int:
            if pid := os.fork():
                return pid
            libc.fputs(b" flushed", ctypes.c_void_p(libc.fdopen(writer, b"w")))
            if how == "another goes on":
                threading.Thread(target=late).start()
            else:
                os.write(writer, content_is_right(region, kind))
            if how == "raises":
                raise SystemExit(3)
            return 0

        pid = in_thread(in_forking_thread)()
        os.close(writer)
        answer = b""
        while chunk := os.read(reader, 100):
            answer += chunk
        os.close(reader)
        assert os.waitpid(pid, 0)[1] == 0
        assert content_is_right(region, kind) == b"right"
        return answer


@pytest.mark.parametrize("how", ["returns", "raises", "another goes on"])
@pytest.mark.parametrize("kind", ["anonymous", "r+"])
def test_a_child_ends_when_the_thread_that_forked_it_and_all_others_have(
    kind: str, how: str
) -> None:
    assert run_in_child(in_child_forking_thread_ends, kind, how, timeout=15).value == (
        b"right flushed"
    )


def _ask(to: int, from_: int, word: bytes) -> None:
    os.write(to, word)
    assert os.read(from_, 1) == word


def in_child_zombie_leader_writes() -> None:
    """A child whose first thread has ended is a zombie to ps, and its other threads write on: what it may
    write to must not be taken for clean."""
    with mapped("r+", fault_around_bytes=PAGE_SIZE) as (region, path):
        (in_, to), (from_, out) = os.pipe(), os.pipe()

        def obey() -> None:
            address = region.address + 5 * PAGE_SIZE
            while word := os.read(in_, 1):
                ctypes.memmove(address, word, 1)
                os.write(out, word)

        def in_forking_thread() -> int:
            if pid := os.fork():
                return pid
            os.close(to)
            threading.Thread(target=obey).start()
            return 0

        pid = in_thread(in_forking_thread)()
        state = Path(f"/proc/{pid}/stat")
        wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "Z")
        _ask(to, from_, b"1")
        region.flush()
        assert path.read_bytes()[5 * PAGE_SIZE] == ord("1")
        assert region.residency().dirty_bytes, "nobody can take the right to write from the child"
        _ask(to, from_, b"2")
        region.flush()
        assert path.read_bytes()[5 * PAGE_SIZE] == ord("2")
        os.close(to)
        assert os.waitpid(pid, 0)[1] == 0
        region.flush()
        assert region.residency().dirty_bytes == 0


def test_a_child_whose_first_thread_has_ended_is_no_dead_process() -> None:
    run_in_child(in_child_zombie_leader_writes, timeout=15)


def in_child_no_descriptor_left() -> None:
    """/proc cannot be opened then: that says nothing about who lives."""
    with mapped("r+", fault_around_bytes=PAGE_SIZE) as (region, path):
        (in_, to), (from_, out) = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(to)
            while word := os.read(in_, 1):
                ctypes.memmove(region.address + 5 * PAGE_SIZE, word, 1)
                os.write(out, word)
            os._exit(0)
        _ask(to, from_, b"1")
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
        region.flush()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        _ask(to, from_, b"2")
        region.flush()
        assert path.read_bytes()[5 * PAGE_SIZE] == ord("2")
        os.close(to)
        assert os.waitpid(pid, 0)[1] == 0


def test_a_child_is_not_taken_for_dead_when_descriptors_run_out() -> None:
    run_in_child(in_child_no_descriptor_left, timeout=15)


# --- what is left -----------------------------------------------------------------------------------


def _counts() -> tuple[int, int, dict[str, int]]:
    stats = ffi.new("struct uvm_process_stats *")
    lib.uvm_process_stats(stats)
    names = [name for name, _ in ffi.typeof("struct uvm_process_stats").fields]
    return (
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
        {name: getattr(stats, name) for name in names if name != "nr_forked"},
    )


def in_child_leaks(kind: str) -> None:
    """The child closes what it inherited; then it holds what it held before there was a region."""
    before = _counts()
    with mapped(kind) as (region, _path):
        open_counts = _counts()

        def child() -> bytes:
            work_in_child(region, kind)
            assert _counts()[2]["nr_regions"] == open_counts[2]["nr_regions"]
            region.close()
            wait_until(lambda: _counts()[2]["nr_caches"] == 0, f"caches freed: {_counts()}")
            stats = _counts()[2]
            fds = sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in _fds())
            ours = [
                name
                for name in fds
                if "userfaultfd" in name or "uffd_vm" in name or "data.bin" in name
            ]
            return repr((stats["nr_regions"], stats["nr_threads"], stats["nr_fds"], ours)).encode()

        for _ in range(3):
            assert fork_and_ask(child) == (0, b"(0, 0, 0, [])")
        wait_until(lambda: _counts() == open_counts, f"{_counts()} as {open_counts}")
        parents_view_is_right(region, kind)
    wait_until(lambda: _counts() == before, f"{_counts()} as {before}")


def _fds() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


@pytest.mark.parametrize("kind", KINDS)
def test_children_leave_nothing_behind_and_inherit_no_leak(kind: str) -> None:
    run_in_child(in_child_leaks, kind)


def in_child_fork_with_many_regions() -> float:
    with ExitStack() as stack:
        regions = [stack.enter_context(uv.anonymous(2 * PAGE_SIZE)) for _ in range(1000)]
        for i, region in enumerate(regions):
            region.buffer[0] = i % 251
        start = time.monotonic()

        def child() -> bytes:
            for i, region in enumerate(regions):
                assert region.buffer[0] == i % 251 and region.buffer[PAGE_SIZE] == 0
            return b"right"

        assert fork_and_ask(child) == (0, b"right")
        return time.monotonic() - start


def test_a_fork_with_a_thousand_regions() -> None:
    assert run_in_child(in_child_fork_with_many_regions).value < 5


def in_child_fork_while_closing() -> int:
    """Another thread maps and closes all the time; plain memory that lands in the same places is the
    program's, in the child too."""
    stop = threading.Event()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.bin"
        path.write_bytes(DATA)

        def churn() -> None:
            while not stop.is_set():
                for mode in ("r", "r+", "c"):
                    try:
                        with uv.map(path, mode, service="native") as region:
                            assert region.buffer[0] == DATA[0]
                    except uv.RegionBusyError:
                        pass  # a child that was forked meanwhile lives, and shares the file's lock
                plain = bytearray(len(DATA) * 8)  # mmapped by malloc
                plain[::PAGE_SIZE] = b"p" * (NR_PAGES * 8)

        def child() -> bytes:
            plain = bytearray(len(DATA) * 8)
            plain[::PAGE_SIZE] = b"q" * (NR_PAGES * 8)
            with uv.map(path, "c", service="native") as own:
                return b"right" if bytes(own.buffer) == DATA and plain.count(b"q") else b"wrong"

        worker = in_thread(churn)
        nr_forks, end = 0, time.monotonic() + 1.5
        while time.monotonic() < end:
            assert fork_and_ask(child) == (0, b"right")
            nr_forks += 1
        stop.set()
        worker()
        return nr_forks


def test_forks_while_another_thread_maps_and_closes() -> None:
    result = run_in_child(in_child_fork_while_closing, timeout=40)
    assert result.value > 3
    assert "made inaccessible" not in result.stderr


def in_child_fork_during_the_first_map() -> None:
    """The lock that the other thread holds is nobody's in the child."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.bin"
        path.write_bytes(DATA)
        inside, forked = threading.Event(), threading.Event()

        def on_mmap(event: str, _args: tuple[Any, ...]) -> None:
            if event == "mmap.__new__" and not inside.is_set():
                inside.set()
                forked.wait(10)

        sys.addaudithook(on_mmap)

        def first() -> None:
            with uv.map(path, "r", service="native") as region:
                assert content_is_right(region, "r") == b"right"

        def child() -> bytes:
            with uv.map(path, "c", service="native") as own:
                return content_is_right(own, "r")

        finish = in_thread(first)
        assert inside.wait(10)
        answer = fork_and_ask(child)
        forked.set()
        finish()
        assert answer == (0, b"right")


def test_a_fork_while_another_thread_maps_the_first_region() -> None:
    run_in_child(in_child_fork_during_the_first_map, timeout=15)


def in_child_bytes_in_flight() -> None:
    """A slow read is under way in the parent while it forks: the child waits for it, or reads itself."""
    with mapped("r", fault_around_bytes=PAGE_SIZE) as (region, _path):
        page = NR_PAGES - 1
        lib.uvm_inject(lib.UVM_OP_PREAD_NOWAIT, 0, 1 << 40, errno.EAGAIN, 0)
        with inject("PREAD", delay=0.5):
            touch = Touch(region.address + page * PAGE_SIZE)
            folios = region._ops.cache.folios
            wait_until(lambda: folios(page, 1)[0] & 0xFF == FolioState.FILLING)
            answer = fork_and_ask(lambda: content_is_right(region, "r"))
            assert answer == (0, b"right")
            assert touch.finish() == DATA[page * PAGE_SIZE]
        assert content_is_right(region, "r") == b"right"


def test_a_fork_while_a_read_is_under_way() -> None:
    run_in_child(in_child_bytes_in_flight)


# --- Python's own opinion ---------------------------------------------------------------------------


def in_child_warning() -> list[str]:
    with mapped("r"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
    return [str(w.message) for w in caught if issubclass(w.category, DeprecationWarning)]


@pytest.mark.skipif(
    sys.version_info < (3, 12), reason="Python warns of forks with threads from 3.12 on"
)
def test_python_warns_of_a_fork_with_our_threads_and_goes_on() -> None:
    """It counts the threads of the process, ours too, in the parent after the fork. Ours are handled by
    fork handlers, so the warning says nothing about lazy memory; programs may filter it."""
    said = run_in_child(in_child_warning).value
    assert len(said) == 1 and "multi-threaded" in said[0]


def in_child_fork_after_close_beside_a_read(path: str) -> None:
    """The cache of the closed region is still in a worker's hands; its mappings are not the child's."""
    closed = uv.map(path, "c", service="native")
    with mapped("c") as (region, other), mapped("c") as (more, _):
        data = other.read_bytes()
        with inject("PREAD", 0, delay=0.7):
            closed.prefetch((0, PAGE_SIZE))
            time.sleep(0.1)
            closed.close()

            def work() -> bytes:
                lib.uvm_inject_clear()
                same = all(
                    which.buffer[at] == data[at]
                    for which in (region, more)
                    for at in range(0, len(data), PAGE_SIZE)
                )
                return b"right" if same else b"wrong"

            assert fork_and_ask(work) == (0, b"right")
            time.sleep(0.7)  # until the read has ended


def test_a_fork_after_close_while_the_read_goes_on(tmp_path):
    path = tmp_path / "closed.bin"
    path.write_bytes(DATA)
    run_in_child(in_child_fork_after_close_beside_a_read, str(path))


def in_child_huge_private() -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(1 << 40)
        with uv.map(file.name, "c", service="python") as region, region.buffer as b:
            b[5], b[1 << 39] = 3, 4

            def child() -> bytes:
                assert time.process_time() < 0.5  # its own, from the fork on
                return bytes((b[5], b[1 << 39], b[1 << 38]))

            assert fork_and_ask(child) == (0, bytes((3, 4, 0)))


@pytest.mark.skipif(not probe().pagemap_scan, reason="no PAGEMAP_SCAN")
def test_a_fork_costs_what_was_touched_not_what_is_mapped() -> None:
    """The pagemap of a terabyte takes more than a second to read."""
    run_in_child(in_child_huge_private)


def in_child_without_pagemap_scan() -> None:
    with mapped("c", service="python") as (region, _):
        with inject("PAGEMAP_SCAN", errno.ENOTTY, count=1 << 30):
            answer = fork_and_ask(lambda: work_in_child(region, "c"))
        assert answer == (0, b"right")


def test_private_pages_of_a_python_region_where_the_kernel_cannot_scan() -> None:
    run_in_child(in_child_without_pagemap_scan)
