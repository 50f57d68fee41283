"""A commit that fails for ever: the thread faults again and again, each fault is young, and all of them
together have one deadline. The process of service="python" is told by a hook to fail its kernel calls."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from tests.service.test_silence import PRELUDE
from uffd_vm.kernel.features import Feature

pytestmark = pytest.mark.requires(Feature.MISSING_SHMEM, Feature.POISON)


def run(code: str, returncode: int = 0) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        env=dict(os.environ),
        check=False,
    )
    assert done.returncode == returncode, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("err", ["EEXIST", "ENOENT", "EAGAIN"])
@pytest.mark.parametrize("touch", ["bytes(b[PAGE : 2 * PAGE])", "b.__setitem__(PAGE, 1)"])
def test_copy_that_fails_for_ever_is_a_timeout(err: str, touch: str) -> None:
    run(
        f"""
        with uv.map(file.name, "r+", service="python", deadline=1, fault_around_bytes=PAGE,
                    page_mkwrite=hooks.Fail("COPY", errno.{err})) as region:
            b = region.buffer
            with within(3, least=0.9):
                error = raises(uv.SourceTimeout, lambda: {touch})
            assert error.index == 1 and error.errno == errno.ETIMEDOUT
            stats = region.stats()
            assert stats["timeout"] == 1 and stats["pgfault_failed"] == 1, stats
            b.release()
            region.discard()
        assert open(file.name, "rb").read() == data
        """
    )


def test_copy_that_fails_a_thousand_times_is_no_timeout() -> None:
    run(
        """
        with uv.map(file.name, "r+", service="python", deadline=30, fault_around_bytes=PAGE,
                    page_mkwrite=hooks.Fail("COPY", errno.EEXIST, count=1000)) as region:
            assert bytes(region.buffer[PAGE : 2 * PAGE]) == data[PAGE : 2 * PAGE]
            assert region.stats()["timeout"] == 0
        """
    )


def test_store_whose_protection_cannot_be_lifted_dies_by_the_deadline_and_loses_nothing() -> None:
    """A page is there, that poison would destroy: docs/failure.md, "Stores"."""
    run(
        """
        faulthandler.cancel_dump_traceback_later()
        region = uv.map(file.name, "r+", service="python", deadline=1, fault_around_bytes=PAGE,
                        page_mkwrite=hooks.Fail("WRITEPROTECT", errno.ENOENT))
        assert region.buffer[PAGE] == data[PAGE]
        outside(f"sleep 5; kill -KILL {os.getpid()}")
        region.buffer[PAGE] = 1
        """,
        returncode=-signal.SIGSEGV,
    )


def test_ctrl_c_ends_a_chain_within_a_second() -> None:
    run(
        """
        region = uv.map(file.name, "r+", service="python", deadline=30, fault_around_bytes=PAGE,
                        page_mkwrite=hooks.Fail("COPY", errno.EEXIST))
        b = region.buffer
        child = outside(f"sleep 1; kill -INT {os.getpid()}")
        with within(2, least=0.9):
            raises(KeyboardInterrupt, lambda: bytes(b[PAGE : 2 * PAGE]))
        child.wait()
        # And is Python's own again afterwards.
        time.sleep(2)
        child = outside(f"sleep 0.3; kill -INT {os.getpid()}")
        with within(1):
            raises(KeyboardInterrupt, time.sleep, 5)
        child.wait()
        b.release()
        region.discard()
        """
    )


def test_page_that_is_lost_again_and_again_is_no_chain() -> None:
    """Each fault brings its page: a thread that works below a tiny cap has no deadline in common."""
    run(
        """
        from uffd_vm.kernel._lib import lib
        with uv.map(file.name, service="python", deadline=1, fault_around_bytes=PAGE) as region:
            b = region.buffer
            end = time.monotonic() + 2.5
            while time.monotonic() < end:
                assert b[PAGE] == data[PAGE]
                region.evict()
            b.release()
            assert region.stats()["timeout"] == 0
        """
    )


# --- the native and the inline service: they run here, and so does the injector -------------------------


IN_PROCESS = pytest.mark.parametrize("service", ["native", "inline"])


@IN_PROCESS
@pytest.mark.parametrize("err", ["EEXIST", "ENOENT"])
def test_in_process_copy_that_fails_for_ever_is_a_timeout(service: str, err: str) -> None:
    run(
        f"""
        from uffd_vm.testing.inject import inject
        with uv.map(file.name, service="{service}", deadline=1, fault_around_bytes=PAGE) as region:
            b = region.buffer
            with inject("COPY", errno.{err}, count=10**9):
                with within(3, least=0.9):
                    error = raises(uv.SourceTimeout, lambda: bytes(b[PAGE : 2 * PAGE]))
            assert error.index == 1 and error.errno == errno.ETIMEDOUT
            stats = region.stats()
            assert stats["timeout"] == 1 and stats["pgfault_failed"] == 1, stats
            assert bytes(b[PAGE : 2 * PAGE]) == data[PAGE : 2 * PAGE]
            b.release()
        """
    )


@IN_PROCESS
def test_in_process_copy_that_fails_a_thousand_times_is_no_timeout(service: str) -> None:
    run(
        f"""
        from uffd_vm.testing.inject import inject
        with uv.map(file.name, service="{service}", deadline=30, fault_around_bytes=PAGE) as region:
            with inject("COPY", errno.EEXIST, count=1000), region.buffer as b:
                assert bytes(b[PAGE : 2 * PAGE]) == data[PAGE : 2 * PAGE]
            assert region.stats()["timeout"] == 0
        """
    )


@IN_PROCESS
def test_in_process_store_whose_protection_cannot_be_lifted_dies_by_the_deadline(
    service: str,
) -> None:
    run(
        f"""
        from uffd_vm.testing.inject import inject
        faulthandler.cancel_dump_traceback_later()
        region = uv.map(file.name, "r+", service="{service}", deadline=1, fault_around_bytes=PAGE)
        assert region.buffer[PAGE] == data[PAGE]
        outside(f"sleep 5; kill -KILL {{os.getpid()}}")
        with inject("WRITEPROTECT", errno.ENOENT, count=10**9):
            region.buffer[PAGE] = 1
        """,
        returncode=-signal.SIGSEGV,
    )


@IN_PROCESS
def test_in_process_ctrl_c_ends_a_chain_within_a_second(service: str) -> None:
    run(
        f"""
        from uffd_vm.testing.inject import inject
        region = uv.map(file.name, service="{service}", deadline=30, fault_around_bytes=PAGE)
        b = region.buffer
        child = outside(f"sleep 1; kill -INT {{os.getpid()}}")
        with inject("COPY", errno.EEXIST, count=10**9), within(2, least=0.9):
            raises(KeyboardInterrupt, lambda: bytes(b[PAGE : 2 * PAGE]))
        child.wait()
        # And is Python's own again afterwards.
        time.sleep(2)
        child = outside(f"sleep 0.3; kill -INT {{os.getpid()}}")
        with within(1):
            raises(KeyboardInterrupt, time.sleep, 5)
        child.wait()
        b.release()
        region.close()
        """
    )


def test_in_process_page_that_is_lost_again_and_again_is_no_chain() -> None:
    run(
        """
        for service in ("native", "inline"):
            with uv.map(file.name, service=service, deadline=1, fault_around_bytes=PAGE) as region:
                b = region.buffer
                end = time.monotonic() + 2.5
                while time.monotonic() < end:
                    assert b[PAGE] == data[PAGE]
                    region.evict()
                b.release()
                assert region.stats()["timeout"] == 0
        """
    )


def test_ctrl_c_reaches_an_inline_toucher_that_waits_for_another_threads_read() -> None:
    run(
        """
        from uffd_vm.testing.inject import inject
        region = uv.map(file.name, service="inline", deadline=30, fault_around_bytes=PAGE)
        b = region.buffer
        with inject("PREAD", 0, delay=4.0):
            loader = threading.Thread(target=region.load, args=((PAGE, 2 * PAGE),))
            loader.start()
            time.sleep(0.3)
            child = outside(f"sleep 1; kill -INT {os.getpid()}")
            with within(2.5, least=0.9):
                raises(KeyboardInterrupt, lambda: bytes(b[PAGE : 2 * PAGE]))
            loader.join()
        child.wait()
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
        import ctypes, mmap
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
