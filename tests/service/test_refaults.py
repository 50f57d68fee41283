"""A commit that fails for ever: the thread faults again and again, each fault is young, and all of them
together have one deadline. The process of service="python" is told by a hook to fail its kernel calls."""

from __future__ import annotations

import functools
import signal

import pytest

from tests.support import run_program
from uffd_vm.kernel.features import Feature

pytestmark = pytest.mark.requires(Feature.MISSING_SHMEM, Feature.POISON)


PRELUDE = """
from tests.service import service_hooks as hooks
from uffd_vm.testing.inject import inject

@contextlib.contextmanager
def mapped(service, mode, deadline, op, err, count=10**9):
    '''A region for which the kernel call `op` fails, in the process that serves it. Pages come one by one.'''
    options = dict(service=service, deadline=deadline, fault_around_bytes=PAGE)
    if service == "python":  # its hooks are for this mode only
        with uv.map(file.name, "r+", page_mkwrite=hooks.Fail(op, err, count), **options) as region:
            yield region
    else:
        with uv.map(file.name, mode, **options) as region, inject(op, err, count=count):
            yield region
"""

run = functools.partial(run_program, prelude=PRELUDE)

SERVICES = pytest.mark.parametrize("service", ["python", "native", "inline"])


@SERVICES
@pytest.mark.parametrize("err", ["EEXIST", "ENOENT", "EAGAIN"])
@pytest.mark.parametrize(
    ("mode", "touch"), [("r", "bytes(b[PAGE : 2 * PAGE])"), ("r+", "b.__setitem__(PAGE, 1)")]
)
def test_copy_that_fails_for_ever_is_a_timeout(
    service: str, err: str, mode: str, touch: str
) -> None:
    run(
        f"""
        with mapped("{service}", "{mode}", 1, "COPY", errno.{err}) as region:
            b = region.buffer
            with within(3, least=0.9):
                error = raises(uv.SourceTimeout, lambda: {touch})
            assert error.index == 1 and error.errno == errno.ETIMEDOUT
            stats = region.stats()
            # Once; again only where the thread did not run while its poison stood (50 ms).
            assert 1 <= stats["timeout"] == stats["pgfault_failed"] <= 3, stats
            if "{service}" != "python":
                lib.uvm_inject_clear()
                assert bytes(b[PAGE : 2 * PAGE]) == data[PAGE : 2 * PAGE]
            b.release()
            region.discard()
        assert open(file.name, "rb").read() == data
        """
    )


@SERVICES
def test_copy_that_fails_a_thousand_times_is_no_timeout(service: str) -> None:
    run(
        f"""
        with mapped("{service}", "r", 30, "COPY", errno.EEXIST, count=1000) as region:
            with region.buffer as b:
                assert bytes(b[PAGE : 2 * PAGE]) == data[PAGE : 2 * PAGE]
            assert region.stats()["timeout"] == 0
        """
    )


@SERVICES
def test_store_whose_protection_cannot_be_lifted_dies_by_the_deadline_and_loses_nothing(
    service: str,
) -> None:
    """A page is there, that poison would destroy: docs/failure.md, "Stores"."""
    run(
        f"""
        faulthandler.cancel_dump_traceback_later()
        with mapped("{service}", "r+", 1, "WRITEPROTECT", errno.ENOENT) as region:
            assert region.buffer[PAGE] == data[PAGE]
            outside(f"sleep 5; kill -KILL {{os.getpid()}}")
            region.buffer[PAGE] = 1
        """,
        status=-signal.SIGSEGV,
    )


@SERVICES
def test_ctrl_c_ends_a_chain_within_a_second(service: str) -> None:
    run(
        f"""
        with mapped("{service}", "r", 30, "COPY", errno.EEXIST) as region:
            b = region.buffer
            with ctrl_c(1, most=2):
                raises(KeyboardInterrupt, lambda: bytes(b[PAGE : 2 * PAGE]))
            # And is Python's own again afterwards.
            time.sleep(2)
            with ctrl_c(0.3, most=1):
                raises(KeyboardInterrupt, time.sleep, 5)
            b.release()
            region.discard()
        """
    )


@SERVICES
def test_page_that_is_lost_again_and_again_is_no_chain(service: str) -> None:
    """Each fault brings its page: a thread that works below a tiny cap has no deadline in common."""
    run(
        f"""
        with uv.map(file.name, service="{service}", deadline=1, fault_around_bytes=PAGE) as region:
            b = region.buffer
            end = time.monotonic() + 2.5
            while time.monotonic() < end:
                assert b[PAGE] == data[PAGE]
                region.evict()
            b.release()
            assert region.stats()["timeout"] == 0
        """
    )


@SERVICES
@pytest.mark.parametrize("mode", ["r", "r+"])
@pytest.mark.parametrize(
    ("cap", "around", "ahead"), [(8, 1, 512), (8, 16, 64), (24, 4, 128), (40, 16, 64)]
)
def test_instructions_that_need_more_pages_than_a_window_leaves_get_on(
    service: str, mode: str, cap: int, around: int, ahead: int
) -> None:
    """What is brought for one page of an instruction, or read ahead, does not take its other pages away."""
    run(
        f"""
        with tempfile.NamedTemporaryFile() as file:
            data = data * 4
            file.write(data)
            file.flush()
            with uv.map(file.name, {mode!r}, service="{service}", cap={cap} * PAGE, deadline=10,
                        fault_around_bytes={around} * PAGE, readahead_bytes={ahead} * PAGE) as region:
                a, b = region.array("uint8"), region.buffer
                for advice in ("sequential", "normal", "random"):
                    region.advise(advice)
                    assert bytes(b) == data
                    right = []
                    def move(at):  # without the GIL
                        right.append(np.array_equal(a[at:].copy(), np.frombuffer(data, "uint8")[at:]))
                    threads = [threading.Thread(target=move, args=(at,)) for at in (1, 77, 4001, 8189)]
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.join()
                    assert right == 4 * [True]
                del a, b
        """,
        timeout=40,
    )


def test_ctrl_c_reaches_an_inline_toucher_that_waits_for_another_threads_read() -> None:
    run(
        """
        region = uv.map(file.name, service="inline", deadline=30, fault_around_bytes=PAGE)
        b = region.buffer
        with inject("PREAD", 0, delay=4.0):
            loader = threading.Thread(target=region.load, args=((PAGE, 2 * PAGE),))
            loader.start()
            time.sleep(0.3)
            with ctrl_c(1, most=2.5):
                raises(KeyboardInterrupt, lambda: bytes(b[PAGE : 2 * PAGE]))
            loader.join()
        assert bytes(b[PAGE : 2 * PAGE]) == data[PAGE : 2 * PAGE]
        b.release()
        region.close()
        """
    )


@pytest.mark.parametrize("service", ["native", "inline", "python"])
@pytest.mark.parametrize("kind", ["anonymous", "c"])
def test_page_that_was_dropped_and_then_protected_is_found_missing(service: str, kind: str) -> None:
    """Protection of a hole plants a marker, which looks like a page that is swapped out."""
    run(
        f"""
        if {kind!r} == "c":
            region = uv.map(file.name, "c", track=True, service="{service}", deadline=5)
        else:
            region = uv.anonymous(64 * PAGE, track=True, service="{service}", deadline=5)
        first = data[5 * PAGE] if {kind!r} == "c" else 0
        with region, region.buffer as b:
            for at in range(0, 64 * PAGE, PAGE):
                b[at] = 1
            libc = ctypes.CDLL(None, use_errno=True)
            libc.madvise.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
            assert libc.madvise(region.address, 64 * PAGE, mmap.MADV_DONTNEED) == 0
            assert region.protect() == 64 * PAGE
            with within(4):
                assert b[5 * PAGE] == first
                b[6 * PAGE] = 2
                assert b[6 * PAGE] == 2
        """
    )


@pytest.mark.parametrize("service", ["python", "native", "inline"])
def test_page_that_was_removed_by_hand_comes_back_or_is_a_timeout(service: str) -> None:
    """MADV_REMOVE of our memfd: a clean page is read again; what was stored is lost, and not made up."""
    run(
        f"""
        with uv.map(file.name, "r+", service="{service}", deadline=1, fault_around_bytes=PAGE) as region:
            b = region.buffer
            b[PAGE] = data[PAGE] ^ 1
            assert b[9 * PAGE] == data[9 * PAGE]
            libc = ctypes.CDLL(None, use_errno=True)
            libc.madvise.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
            for page in (1, 9):
                assert libc.madvise(region.address + page * PAGE, PAGE, mmap.MADV_REMOVE) == 0
            with within(0.8):
                assert bytes(b[9 * PAGE : 10 * PAGE]) == data[9 * PAGE : 10 * PAGE]
            with within(3, least=0.9):
                error = raises(uv.SourceTimeout, lambda: bytes(b[PAGE : 2 * PAGE]))
            assert error.index == 1
            b.release()
            region.discard()
        """
    )
