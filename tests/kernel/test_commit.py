"""COPY, ZEROPAGE, POISON and MOVE: what each answers on each kind of page, and whom it wakes."""

from __future__ import annotations

import ctypes
import errno
import os
import signal

import pytest

from tests.support import (
    BYTES,
    MADV_DONTNEED,
    MADV_GUARD_INSTALL,
    MADV_GUARD_REMOVE,
    MADV_POPULATE_READ,
    Touch,
    call,
    map_area,
    must,
)
from uffd_vm.kernel import mapping, msg
from uffd_vm.kernel.features import Feature
from uffd_vm.kernel.mapping import PageCategory
from uffd_vm.kernel.uffd import CopyMode, MoveMode, RegisterMode, Uffd, WpMode

pytestmark = pytest.mark.requires()

MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
WP_FEATURES = Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM
EHWPOISON = 133  # not in every Python's errno
EVERY_KIND = pytest.mark.memory("anon", "shmem", "shmem_private")


@pytest.fixture
def lazy(memory, open_uffd):
    """lazy(nr_pages, mode, features): a uffd and fresh memory registered with it."""

    def make(nr_pages: int = 4, mode: RegisterMode = MISSING, features: Feature = Feature(0)):
        uffd, area = open_uffd(features), memory(nr_pages)
        uffd.register(area.addr, area.nr_bytes, mode)
        return uffd, area

    return make


# --- COPY


@EVERY_KIND
def test_copy_stops_at_a_present_page_with_eagain_and_bytes_done(lazy):
    uffd, area = lazy(4)
    page = area.page
    assert uffd.copy(area.at(2), BYTES.at(2), page) == (0, page)
    assert uffd.copy(area.addr, BYTES.addr, 4 * page) == (errno.EAGAIN, 2 * page)
    assert uffd.copy(area.at(2), BYTES.at(2), 2 * page) == (errno.EEXIST, -errno.EEXIST)
    assert uffd.copy(area.at(3), BYTES.at(3), page) == (0, page)
    assert [area.get(i) for i in range(4)] == [1, 2, 3, 4]


@EVERY_KIND
def test_copy_onto_a_present_page_is_eexist_and_never_wakes(lazy):
    uffd, area = lazy(1)
    toucher = Touch(area.addr)
    assert uffd.wait_readable(10)
    assert uffd.copy(area.addr, BYTES.addr, area.page, CopyMode.DONTWAKE) == (0, area.page)
    assert toucher.waits()
    assert uffd.copy(area.addr, BYTES.addr, area.page) == (errno.EEXIST, -errno.EEXIST)
    assert toucher.waits()
    uffd.wake(area.addr, area.page)
    assert toucher.finish() == 1


def test_copy_from_an_unmapped_source_is_efault_after_partial_progress(lazy):
    uffd, area = lazy(2)
    src = map_area("anon", 2)
    src.set(0, 7)
    must("munmap", src.at(1), src.page)
    assert uffd.copy(area.addr, src.addr, 2 * area.page) == (errno.EAGAIN, area.page)
    assert uffd.copy(area.at(1), src.at(1), area.page) == (errno.EFAULT, -errno.EFAULT)
    src.nr_pages = 1
    src.unmap()


def test_copy_source_need_not_be_aligned(lazy):
    uffd, area = lazy(1)
    assert uffd.copy(area.addr, BYTES.addr + 4095, area.page).err == 0
    assert list(area.view()[:2]) == [1, 2]


@pytest.mark.parametrize(
    "offset, nr_bytes", [(1, 4096), (0, 0), (0, 100)], ids=["unaligned", "empty", "part"]
)
def test_bad_arguments_are_einval_and_out_is_untouched(lazy, offset, nr_bytes):
    uffd, area = lazy(2)
    assert uffd.copy(area.addr + offset, BYTES.addr, nr_bytes) == (errno.EINVAL, None) or (
        uffd.copy(area.addr + offset, BYTES.addr, nr_bytes) == (errno.EINVAL, -errno.EINVAL)
    )


@pytest.mark.memory("shmem", "shmem_private")
def test_copy_beyond_the_end_of_the_memfd_is_efault(lazy):
    uffd, area = lazy(2)
    os.ftruncate(area.fd, area.page)
    assert uffd.copy(area.at(1), BYTES.addr, area.page).err == errno.EFAULT


def test_copy_into_unregistered_memory_is_enoent(memory, open_uffd):
    uffd, area = open_uffd(), memory(1)
    assert uffd.copy(area.addr, BYTES.addr, area.page) == (errno.ENOENT, -errno.ENOENT)


def exec_and_copy() -> tuple[int, int]:
    """A uffd whose memory is gone: the fork child opens it, sends it, and exits."""
    import socket

    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        uffd = Uffd.open()
        area = map_area("anon", 1)
        uffd.register(area.addr, area.page, MISSING)
        socket.send_fds(theirs, [area.addr.to_bytes(8, "little")], [uffd.fileno()])
        os._exit(0)
    data, (fd,), _, _ = socket.recv_fds(ours, 8, 1)
    os.waitpid(pid, 0)
    with Uffd(fd) as uffd:
        addr = int.from_bytes(data, "little")
        readable = uffd.wait_readable(0)
        assert not readable and uffd.read() == []
        return tuple(uffd.copy(addr, BYTES.addr, 4096))  # type: ignore[return-value]


def test_copy_into_a_dead_process_is_esrch_untouched_and_nothing_is_readable(run_in_child):
    assert run_in_child(exec_and_copy).value == (errno.ESRCH, None)


# --- ZEROPAGE


@EVERY_KIND
def test_zeropage_twice_is_eexist(lazy):
    uffd, area = lazy(1)
    assert uffd.zeropage(area.addr, area.page) == (0, area.page)
    assert uffd.zeropage(area.addr, area.page) == (errno.EEXIST, -errno.EEXIST)
    assert bytes(area.view()) == bytes(area.page)


@pytest.mark.requires(WP_FEATURES)
def test_write_to_a_zeropage_is_told_to_nobody(lazy):
    uffd, area = lazy(1, MISSING | WP, WP_FEATURES)
    assert uffd.zeropage(area.addr, area.page).err == 0
    Touch(area.addr, 5).finish()
    assert uffd.read() == []


@pytest.mark.requires(WP_FEATURES)
def test_protected_zeropage_tells_of_a_write(lazy):
    uffd, area = lazy(1, MISSING | WP, WP_FEATURES)
    uffd.zeropage(area.addr, area.page)
    assert uffd.writeprotect(area.addr, area.page) == 0
    writer = Touch(area.addr, 5)
    assert uffd.wait_readable(10)
    (fault,) = uffd.read()
    assert fault.flags == msg.PagefaultFlag.WRITE | msg.PagefaultFlag.WP
    uffd.writeprotect(area.addr, area.page, WpMode(0))
    writer.finish()


# --- the write-protect marker on a hole


@pytest.mark.requires(WP_FEATURES, Feature.POISON)
@pytest.mark.memory("anon", "shmem_private")
def test_marker_on_a_hole_makes_zeropage_and_poison_eexist_while_a_reader_waits(lazy):
    uffd, area = lazy(1, MISSING | WP, WP_FEATURES)
    assert uffd.writeprotect(area.addr, area.page) == 0
    reader = Touch(area.addr)
    assert uffd.wait_readable(10)
    (fault,) = uffd.read()
    assert not fault.flags & msg.PagefaultFlag.WP  # said to be missing
    assert uffd.zeropage(area.addr, area.page).err == errno.EEXIST
    assert uffd.poison(area.addr, area.page).err == errno.EEXIST
    assert reader.waits()  # so "EEXIST means it is there" would wait for ever
    assert uffd.copy(area.addr, BYTES.addr, area.page, CopyMode.WP) == (0, area.page)
    assert reader.finish() == 1


@pytest.mark.requires(WP_FEATURES, Feature.POISON)
@pytest.mark.memory("shmem")
def test_zeropage_of_shared_memory_is_a_copy_of_zeros_and_erases_a_marker(lazy):
    uffd, area = lazy(1, MISSING | WP, WP_FEATURES)
    uffd.writeprotect(area.addr, area.page)
    assert uffd.poison(area.addr, area.page).err == errno.EEXIST
    assert uffd.zeropage(area.addr, area.page) == (0, area.page)
    Touch(area.addr, 9).finish()
    assert uffd.read() == []


@pytest.mark.requires(WP_FEATURES)
@pytest.mark.parametrize("mode", [CopyMode(0), CopyMode.WP], ids=["plain", "wp"])
@EVERY_KIND
def test_copy_over_a_marker_keeps_it_with_mode_wp_only(lazy, mode):
    uffd, area = lazy(1, MISSING | WP, WP_FEATURES)
    uffd.writeprotect(area.addr, area.page)
    assert uffd.copy(area.addr, BYTES.addr, area.page, mode).err == 0
    writer = Touch(area.addr, 9)
    if mode & CopyMode.WP:
        assert uffd.wait_readable(10)
        (fault,) = uffd.read()
        assert fault.flags & msg.PagefaultFlag.WP
        uffd.writeprotect(area.addr, area.page, WpMode(0))
    writer.finish()
    assert uffd.read() == []


@pytest.mark.requires(WP_FEATURES)
def test_write_on_a_marked_hole_tells_missing_first_and_protected_after(lazy):
    uffd, area = lazy(1, MISSING | WP, WP_FEATURES)
    uffd.writeprotect(area.addr, area.page)
    writer = Touch(area.addr, 9)
    assert uffd.wait_readable(10)
    (fault,) = uffd.read()
    assert fault.flags == msg.PagefaultFlag.WRITE
    uffd.copy(area.addr, BYTES.addr, area.page, CopyMode.WP)
    assert uffd.wait_readable(10)
    (fault,) = uffd.read()
    assert fault.flags == msg.PagefaultFlag.WRITE | msg.PagefaultFlag.WP
    uffd.writeprotect(area.addr, area.page, WpMode(0))
    writer.finish()


# --- POISON and guards


@pytest.mark.requires(Feature.POISON)
@EVERY_KIND
def test_poisoned_page_is_efault_for_a_system_call(lazy):
    uffd, area = lazy(1)
    assert uffd.poison(area.addr, area.page) == (0, area.page)
    reader, writer = os.pipe()
    try:
        assert call("write", writer, area.addr, 10) == -errno.EFAULT
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.requires(Feature.POISON)
def test_populating_a_poisoned_page_is_ehwpoison(lazy):
    uffd, area = lazy(1)
    uffd.poison(area.addr, area.page)
    assert area.madvise(0, 1, MADV_POPULATE_READ) == -EHWPOISON


@pytest.mark.requires(Feature.POISON)
@EVERY_KIND
def test_copy_overwrites_poison(lazy):
    # So a fill that comes late makes a failed page good: the state is checked before every COPY.
    uffd, area = lazy(1)
    uffd.poison(area.addr, area.page)
    assert uffd.poison(area.addr, area.page).err == errno.EEXIST
    assert uffd.copy(area.addr, BYTES.addr, area.page) == (0, area.page)
    assert area.get(0) == 1


@pytest.mark.requires(Feature.POISON)
@EVERY_KIND
def test_poison_onto_a_present_page_is_eexist_and_dontneed_clears_poison(lazy):
    uffd, area = lazy(1)
    uffd.copy(area.addr, BYTES.addr, area.page)
    assert uffd.poison(area.addr, area.page) == (errno.EEXIST, -errno.EEXIST)
    area.madvise(0, 1, MADV_DONTNEED)
    if area.fd >= 0:
        area.punch(0, 1)
    assert uffd.poison(area.addr, area.page).err == 0
    area.madvise(0, 1, MADV_DONTNEED)
    toucher = Touch(area.addr)
    assert uffd.wait_readable(10)
    uffd.copy(area.addr, BYTES.addr, area.page)
    assert toucher.finish() == 1


@pytest.mark.requires(Feature.POISON)
@EVERY_KIND
def test_zeropage_overwrites_poison_of_shared_memory_only(lazy):
    uffd, area = lazy(1)
    uffd.poison(area.addr, area.page)
    expected = 0 if area.kind == "shmem" else errno.EEXIST
    assert uffd.zeropage(area.addr, area.page).err == expected


def touch_poison() -> None:
    uffd, area = Uffd.open(), map_area("anon", 1)
    uffd.register(area.addr, area.page, MISSING)
    uffd.poison(area.addr, area.page)
    ctypes.string_at(area.addr, 1)


@pytest.mark.requires(Feature.POISON)
def test_touching_a_poisoned_page_is_sigbus(run_in_child):
    assert run_in_child(touch_poison, check=False).returncode == -signal.SIGBUS


def test_copy_pierces_a_guard_page(lazy):
    uffd, area = lazy(1)
    if area.madvise(0, 1, MADV_GUARD_INSTALL) == -errno.EINVAL:
        pytest.skip("no MADV_GUARD_INSTALL; use Linux 6.13 or later")
    assert uffd.zeropage(area.addr, area.page).err == errno.EEXIST
    assert uffd.copy(area.addr, BYTES.addr, area.page) == (0, area.page)
    assert area.get(0) == 1
    area.madvise(0, 1, MADV_GUARD_REMOVE)


# --- MOVE


@pytest.mark.requires(Feature.MOVE)
def test_move_takes_the_page_away(lazy, memory):
    uffd, area = lazy(2)
    src = memory(2)
    src.set(0, 42)
    toucher = Touch(area.addr)
    assert uffd.wait_readable(10)
    assert uffd.move(area.addr, src.addr, area.page) == (0, area.page)
    assert toucher.finish() == 42
    assert src.get(0) == 0  # missing there
    src.set(0, 1)
    assert uffd.move(area.addr, src.addr, area.page) == (errno.EEXIST, -errno.EEXIST)
    assert uffd.move(area.at(1), src.at(1), area.page).err == errno.ENOENT
    holes = uffd.move(area.at(1), src.at(1), area.page, MoveMode.ALLOW_SRC_HOLES)
    assert holes == (0, area.page)


@pytest.mark.requires(Feature.MOVE, WP_FEATURES, "PAGEMAP_SCAN")
def test_move_drops_write_protection(lazy, memory):
    uffd, area = lazy(1, MISSING | WP, WP_FEATURES)
    uffd.copy(area.addr, BYTES.addr, area.page, CopyMode.WP)
    stage = memory(1)
    uffd.register(stage.addr, stage.page, MISSING | WP)
    assert uffd.move(stage.addr, area.addr, area.page).err == 0
    (found,) = mapping.scan(stage.addr, stage.addr + stage.page)
    assert found.categories & PageCategory.WRITTEN
    assert stage.get(0) == 1


@pytest.mark.requires(Feature.MOVE)
@pytest.mark.memory("shmem")
def test_move_of_shared_memory_fails_though_it_is_offered(lazy, memory):
    uffd, area = lazy(1)
    src = memory(1)
    src.set(0, 1)
    assert uffd.move(area.addr, src.addr, area.page).err == errno.EINVAL


@pytest.mark.requires(Feature.MOVE)
def test_move_of_a_page_shared_by_fork_is_ebusy(run_in_child):
    assert run_in_child(move_after_fork).value == (errno.EBUSY, 0)


def move_after_fork() -> tuple[int, int]:
    uffd, area, src = Uffd.open(), map_area("anon", 1), map_area("anon", 1)
    uffd.register(area.addr, area.page, MISSING)
    src.set(0, 1)
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    first = uffd.move(area.addr, src.addr, area.page).err  # though the child is gone
    src.set(0, 2)
    second = uffd.move(area.addr, src.addr, area.page).err
    uffd.close()
    return first, second
