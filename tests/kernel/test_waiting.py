"""Who waits, who wakes whom, and which accesses cannot wait at all."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading

import pytest

from tests.support import (
    BYTES,
    MADV_POPULATE_READ,
    MADV_POPULATE_WRITE,
    ChildTimeout,
    Touch,
    call,
    in_thread,
    map_area,
    wait_until,
)
from uffd_vm.kernel import msg
from uffd_vm.kernel._lib import lib
from uffd_vm.kernel.features import Feature, Way
from uffd_vm.kernel.msg import PagefaultFlag
from uffd_vm.kernel.uffd import CopyMode, RegisterMode, Uffd

pytestmark = pytest.mark.requires()
MISSING, WP = RegisterMode.MISSING, RegisterMode.WP


def read_messages(uffd: Uffd, count: int) -> list[msg.UffdMsg]:
    messages: list[msg.UffdMsg] = []

    def enough() -> bool:
        messages.extend(uffd.read())
        return len(messages) >= count

    wait_until(enough, f"{count} messages")
    return messages


@pytest.mark.requires(Feature.THREAD_ID)
@pytest.mark.memory("anon", "shmem")
def test_each_waiting_thread_sends_a_message_and_one_copy_wakes_all(memory, open_uffd):
    uffd, area = open_uffd(Feature.THREAD_ID), memory(1)
    uffd.register(area.addr, area.page, MISSING)
    touchers = [Touch(area.addr) for _ in range(4)]
    messages = read_messages(uffd, 4)
    assert {m.tid for m in messages} == {t.tid for t in touchers}
    assert {m.address for m in messages} == {area.addr}
    assert uffd.copy(area.addr, BYTES.addr, area.page).err == 0
    assert [t.finish() for t in touchers] == [1] * 4


def test_copy_wakes_also_those_whose_messages_are_unread(memory, open_uffd):
    uffd, area = open_uffd(), memory(1)
    uffd.register(area.addr, area.page, MISSING)
    touchers = [Touch(area.addr) for _ in range(2)]
    assert uffd.wait_readable(10)
    assert all(t.waits() for t in touchers)
    uffd.copy(area.addr, BYTES.addr, area.page)
    assert [t.finish() for t in touchers] == [1, 1]
    assert uffd.read() == []


def test_one_read_gives_as_many_messages_as_fit(memory, open_uffd):
    uffd, area = open_uffd(), memory(6)
    uffd.register(area.addr, area.nr_bytes, MISSING)
    touchers = [Touch(area.at(i)) for i in range(6)]
    assert all(t.waits() for t in touchers)
    assert len(os.read(uffd.fileno(), 6 * 32 + 31)) == 6 * 32
    uffd.zeropage(area.addr, area.nr_bytes)
    for toucher in touchers:
        toucher.finish()


def test_dontwake_leaves_all_asleep_until_wake(memory, open_uffd):
    uffd, area = open_uffd(), memory(2)
    uffd.register(area.addr, area.nr_bytes, MISSING)
    touchers = [Touch(area.at(i)) for i in range(2)]
    read_messages(uffd, 2)
    assert uffd.copy(area.addr, BYTES.addr, area.nr_bytes, CopyMode.DONTWAKE).err == 0
    assert all(t.waits() for t in touchers)
    uffd.wake(area.addr, area.nr_bytes)
    assert [t.finish() for t in touchers] == [1, 2]


def test_message_that_was_read_is_sent_again_only_after_wake(memory, open_uffd):
    """A reader dies after read(): its successor sees nothing until it wakes the range."""
    uffd, area = open_uffd(), memory(1)
    uffd.register(area.addr, area.page, MISSING)
    toucher = Touch(area.addr)
    read_messages(uffd, 1)
    assert toucher.waits()
    assert uffd.read() == []
    uffd.wake(area.addr, area.page)
    read_messages(uffd, 1)
    uffd.copy(area.addr, BYTES.addr, area.page)
    assert toucher.finish() == 1


def test_signal_handler_runs_while_waiting_and_the_access_faults_again(run_in_child):
    assert run_in_child(signals_while_waiting).value >= 3


def signals_while_waiting() -> int:
    handled: list[int] = []
    libc = ctypes.CDLL(None)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handled.append)
    # A native handler, installed by signal(3): Python's own only sets a flag.
    libc.signal(signal.SIGUSR1, handler)
    uffd, area = Uffd.open(), map_area("anon", 1)
    uffd.register(area.addr, area.page, MISSING)
    toucher = Touch(area.addr)
    nr_messages = len(read_messages(uffd, 1))
    for i in range(2):
        signal.pthread_kill(toucher.ident, signal.SIGUSR1)
        nr_messages += len(read_messages(uffd, 1))
        assert len(handled) == i + 1
    uffd.copy(area.addr, BYTES.addr, area.page)
    assert toucher.finish() == 1
    uffd.close()
    return nr_messages


# --- accesses by the kernel


@pytest.mark.memory("anon", "shmem", "shmem_private")
def test_system_call_on_a_missing_page_waits(memory, open_uffd):
    uffd, area = open_uffd(), memory(1)
    uffd.register(area.addr, area.page, MISSING)
    reader, writer = os.pipe()
    done = in_thread(call, "write", writer, area.addr, 4)
    read_messages(uffd, 1)
    uffd.copy(area.addr, BYTES.addr, area.page)
    assert done() == 4
    assert os.read(reader, 4) == b"\1\1\1\1"
    os.close(reader)
    os.close(writer)


def test_populate_write_waits_and_is_a_write(memory, open_uffd):
    uffd, area = open_uffd(), memory(1)
    uffd.register(area.addr, area.page, MISSING)
    done = in_thread(area.madvise, 0, 1, MADV_POPULATE_WRITE)
    (fault,) = read_messages(uffd, 1)
    assert fault.flags & PagefaultFlag.WRITE
    uffd.copy(area.addr, BYTES.addr, area.page)
    assert done() == 0


def test_proc_mem_is_eio_at_once(memory, open_uffd):
    uffd, area = open_uffd(), memory(1)
    uffd.register(area.addr, area.page, MISSING)
    fd = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        with pytest.raises(OSError) as error:
            os.pread(fd, 1, area.addr)
    finally:
        os.close(fd)
    assert error.value.errno == errno.EIO
    assert uffd.read() == []


# --- user-mode-only and SIGBUS mode: a system call fails instead


def fails_in_user_mode(features: Feature, way: Way | None) -> dict[str, int]:
    uffd, area = Uffd.open(features, way=way), map_area("anon", 2)
    uffd.register(area.addr, area.nr_bytes, MISSING)
    uffd.copy(area.addr, BYTES.addr, area.page)
    reader, writer = os.pipe()
    sink = os.memfd_create("sink")
    answer = {
        "write missing": call("write", writer, area.at(1), 4096),
        "write present and missing": call("write", writer, area.addr, 8192),
        "to a memfd": call("write", sink, area.addr, 8192),
        "populate": area.madvise(1, 1, MADV_POPULATE_READ),
        "mlock": call("mlock", area.at(1), 4096),
        "messages": len(uffd.read()),
    }
    os.write(writer, b"x")
    assert len(os.read(reader, 8192)) >= 4096
    uffd.close()
    return answer


@pytest.mark.parametrize(
    "features, way",
    [(Feature(0), Way.USER_MODE_ONLY), (Feature.SIGBUS, None)],
    ids=["user-mode-only", "sigbus"],
)
def test_system_calls_fail_or_are_cut_short_where_faults_cannot_wait(run_in_child, features, way):
    assert run_in_child(fails_in_user_mode, features, way).value == {
        "write missing": -errno.EFAULT,
        "write present and missing": 4096,
        "to a memfd": 4096,
        "populate": -errno.EFAULT,
        "mlock": -errno.ENOMEM,
        "messages": 0,
    }


def sigbus_mode() -> None:
    uffd, area = Uffd.open(Feature.SIGBUS), map_area("anon", 1)
    uffd.register(area.addr, area.page, MISSING)
    area.get(0)


@pytest.mark.requires(Feature.SIGBUS)
def test_in_sigbus_mode_a_touch_is_sigbus(run_in_child):
    assert run_in_child(sigbus_mode, check=False).returncode == -signal.SIGBUS


def user_mode_touch_waits() -> int:
    uffd, area = Uffd.open(way=Way.USER_MODE_ONLY), map_area("anon", 1)
    uffd.register(area.addr, area.page, MISSING)
    toucher = Touch(area.addr)
    read_messages(uffd, 1)
    uffd.copy(area.addr, BYTES.addr, area.page)
    uffd_value = toucher.finish()
    uffd.close()
    return uffd_value


def test_in_user_mode_only_a_touch_waits_as_usual(run_in_child):
    assert run_in_child(user_mode_touch_waits).value == 1


# --- other processes


def process_madvise_elsewhere(advice: int) -> int:
    """process_madvise() on the parent's memory, from a forked child."""
    area = map_area("anon", 1)
    area.set(0, 9)
    pidfd = os.pidfd_open(os.getpid())

    class Iovec(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("len", ctypes.c_size_t)]

    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        iov = Iovec(area.addr, area.page)
        rc = libc.syscall(440, pidfd, ctypes.byref(iov), 1, advice, 0)
        os.write(writer, b"%d" % (ctypes.get_errno() if rc < 0 else 0))
        os._exit(0)
    os.waitpid(pid, 0)
    return int(os.read(reader, 16))


@pytest.mark.parametrize("advice", [4, 8, 9, 22], ids=["DONTNEED", "FREE", "REMOVE", "POPULATE"])
def test_another_process_cannot_drop_our_pages(run_in_child, advice):
    # So eviction of private memory is done by an agent in its owner.
    assert run_in_child(process_madvise_elsewhere, advice).value == errno.EINVAL


# --- the GIL


def python_handler_in_this_process(touch: str) -> str:
    uffd, area = Uffd.open(), map_area("anon", 1)
    uffd.register(area.addr, area.page, MISSING)

    def serve() -> None:
        uffd.wait_readable(20)
        uffd.copy(area.addr, BYTES.addr, area.page)

    threading.Thread(target=serve, daemon=True).start()
    view = memoryview(area.view()).cast("B")
    buffer = ctypes.create_string_buffer(1)
    if touch == "memmove":
        ctypes.memmove(buffer, area.addr, 1)
    else:
        buffer[0] = view[0]
    os._exit(0)


def test_python_handler_thread_deadlocks_when_the_toucher_holds_the_gil(run_in_child):
    # The reason why nothing that runs while a fault is pending may need this process's GIL.
    with pytest.raises(ChildTimeout):
        run_in_child(python_handler_in_this_process, "subscript", timeout=4)


def test_python_handler_thread_serves_a_toucher_without_the_gil(run_in_child):
    run_in_child(python_handler_in_this_process, "memmove")


def test_injected_errno_reaches_the_caller(memory, open_uffd):
    uffd, area = open_uffd(), memory(2)
    uffd.register(area.addr, area.nr_bytes, MISSING)
    op = 6  # UVM_OP_COPY
    try:
        assert lib.uvm_inject(op, 1, 2, errno.ENOMEM, 0) == 0
        got = [uffd.copy(area.addr, BYTES.addr, area.page) for _ in range(4)]
        assert lib.uvm_inject_calls(op) == 4
    finally:
        lib.uvm_inject_clear()
    assert got == [(0, 4096), (errno.ENOMEM, None), (errno.ENOMEM, None), (errno.EEXIST, -17)]
    assert uffd.copy(area.at(1), BYTES.addr, area.page).err == 0
