"""REMOVE and UNMAP events, the last close, and what fork() makes of registered memory."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from tests.support import (
    BYTES,
    MADV_DONTFORK,
    MADV_DONTNEED,
    Touch,
    call,
    fork_and_ask,
    in_thread,
    map_area,
    must,
)
from uffd_vm.kernel import msg
from uffd_vm.kernel.features import Feature
from uffd_vm.kernel.uffd import RegisterMode, Uffd

pytestmark = pytest.mark.requires()
MISSING = RegisterMode.MISSING


# --- events


@pytest.mark.requires(Feature.EVENT_REMOVE)
@pytest.mark.memory("anon", "shmem")
def test_while_a_remove_event_is_unread_commits_are_eagain_and_wake_works(memory, open_uffd):
    uffd, area = open_uffd(Feature.EVENT_REMOVE), memory(2)
    uffd.register(area.addr, area.nr_bytes, MISSING)
    removed = in_thread(area.madvise, 0, 1, MADV_DONTNEED)
    assert uffd.wait_readable(10)
    assert removed.alive()
    again = (errno.EAGAIN, -errno.EAGAIN)
    assert uffd.copy(area.at(1), BYTES.addr, area.page) == again
    assert uffd.zeropage(area.at(1), area.page) == again
    uffd.wake(area.addr, area.nr_bytes)
    assert uffd.read() == [msg.Remove(area.addr, area.addr + area.page)]
    assert removed() == 0
    assert uffd.copy(area.at(1), BYTES.addr, area.page) == (0, area.page)


@pytest.mark.requires(Feature.EVENT_REMOVE)
def test_closing_lets_the_remover_go(memory, open_uffd):
    uffd, area = open_uffd(Feature.EVENT_REMOVE), memory(1)
    uffd.register(area.addr, area.page, MISSING)
    removed = in_thread(area.madvise, 0, 1, MADV_DONTNEED)
    assert uffd.wait_readable(10)
    uffd.close()
    assert removed() == 0


@pytest.mark.requires(Feature.EVENT_UNMAP)
def test_unmapping_is_told_with_the_event(memory, open_uffd):
    uffd, area = open_uffd(Feature.EVENT_UNMAP), memory(2)
    uffd.register(area.addr, area.nr_bytes, MISSING)
    unmapped = in_thread(call, "munmap", area.addr, area.nr_bytes)
    assert uffd.wait_readable(10)
    assert uffd.read() == [msg.Unmap(area.addr, area.addr + area.nr_bytes)]
    assert unmapped() == 0
    area.nr_pages = 0


@pytest.mark.memory("anon", "shmem")
def test_without_events_nobody_waits(memory, open_uffd):
    uffd, area = open_uffd(), memory(2)
    uffd.register(area.addr, area.nr_bytes, MISSING)
    assert area.madvise(0, 1, MADV_DONTNEED) == 0
    must("mprotect", area.at(1), area.page, 1)
    assert uffd.read() == []


@pytest.mark.memory("anon")
def test_dropped_page_faults_again(memory, open_uffd):
    uffd, area = open_uffd(), memory(1)
    uffd.register(area.addr, area.page, MISSING)
    for value in (1, 2):
        toucher = Touch(area.addr)
        assert uffd.wait_readable(10)
        uffd.read()
        uffd.copy(area.addr, BYTES.at(value - 1), area.page)
        assert toucher.finish() == value
        area.madvise(0, 1, MADV_DONTNEED)


# --- the last close


@pytest.mark.memory("anon", "shmem", "shmem_private")
def test_last_close_lets_waiters_read_zeros(memory, open_uffd):
    # The reason why the memory's owner keeps the descriptor for the region's whole life.
    uffd, area = open_uffd(), memory(2)
    uffd.register(area.addr, area.nr_bytes, MISSING)
    toucher = Touch(area.addr)
    assert uffd.wait_readable(10)
    kept = os.dup(uffd.fileno())
    uffd.close()
    assert toucher.waits()
    os.close(kept)
    assert toucher.finish() == 0
    assert Touch(area.at(1)).finish() == 0


# --- fork


def fork_reads(kind: str, advice: int = 0) -> tuple[int, bytes]:
    uffd, area = Uffd.open(), map_area(kind, 2)
    uffd.register(area.addr, area.nr_bytes, MISSING)
    uffd.copy(area.addr, BYTES.addr, area.page)
    if advice:
        assert area.madvise(0, 2, advice) == 0
    answer = fork_and_ask(lambda: bytes([area.get(0), area.get(1)]))
    uffd.close()
    return answer


@pytest.mark.parametrize("kind", ["anon", "shmem", "shmem_private"])
def test_forked_child_reads_zeros_where_pages_are_missing(run_in_child, kind):
    # Filled pages are right, missing ones silently zero: the child must serve itself.
    assert run_in_child(fork_reads, kind).value == (0, bytes([1, 0]))


@pytest.mark.parametrize("kind", ["anon", "shmem"])
def test_dontfork_memory_is_sigsegv_in_the_child(run_in_child, kind):
    assert run_in_child(fork_reads, kind, MADV_DONTFORK).value == (-signal.SIGSEGV, b"")


def fork_serves_itself(kind: str) -> tuple[tuple[int, bytes], list[object]]:
    uffd, area = Uffd.open(), map_area(kind, 3)
    uffd.register(area.addr, area.nr_bytes, MISSING)
    uffd.copy(area.addr, BYTES.addr, area.page)

    def in_the_child() -> bytes:
        uffd.close()
        with Uffd.open() as own:
            own.register(area.addr, area.nr_bytes, MISSING)
            toucher = Touch(area.at(1))
            assert own.wait_readable(10)
            own.read()
            own.copy(area.at(1), BYTES.at(5), area.page)
            return bytes([area.get(0), toucher.finish()])

    answer = fork_and_ask(in_the_child)
    messages = uffd.read()
    toucher = Touch(area.at(2))  # the parent is served as before
    assert uffd.wait_readable(10)
    uffd.copy(area.at(2), BYTES.at(2), area.page)
    assert toucher.finish() == 3
    uffd.close()
    return answer, messages


@pytest.mark.parametrize("kind", ["anon", "shmem_private"])
def test_forked_child_can_serve_itself(run_in_child, kind):
    assert run_in_child(fork_serves_itself, kind).value == ((0, bytes([1, 6])), [])


def child_keeps_the_descriptor() -> bool:
    uffd, area = Uffd.open(), map_area("anon", 1)
    uffd.register(area.addr, area.page, MISSING)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)  # until the parent says so
        os._exit(0)
    toucher = Touch(area.addr)
    assert uffd.wait_readable(10)
    uffd.close()
    waits = toucher.waits(0.2)
    os.close(writer)
    os.waitpid(pid, 0)
    assert toucher.finish() == 0
    return waits


def test_descriptor_inherited_by_a_child_keeps_faults_waiting(run_in_child):
    assert run_in_child(child_keeps_the_descriptor).value is True


def subprocess_runs() -> bytes:
    import subprocess

    uffd, area = Uffd.open(), map_area("anon", 1)
    uffd.register(area.addr, area.page, MISSING)
    out = subprocess.run(["echo", "hi"], capture_output=True, check=True).stdout
    uffd.close()
    return out


def test_subprocess_needs_no_care(run_in_child):
    assert run_in_child(subprocess_runs).value == b"hi\n"
