"""Write-protection: on holes and on pages, through DONTNEED, fork and mremap."""

from __future__ import annotations

import os

import pytest

from tests.support import (
    BYTES,
    MADV_DONTNEED,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    Touch,
    fork_and_ask,
    map_area,
    must,
)
from uffd_vm.kernel import mapping, msg
from uffd_vm.kernel.features import Feature
from uffd_vm.kernel.msg import PagefaultFlag
from uffd_vm.kernel.uffd import CopyMode, RegisterMode, Uffd, WpMode

MISSING, WP = RegisterMode.MISSING, RegisterMode.WP
UNPOPULATED = Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED
SHMEM = UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM
pytestmark = pytest.mark.requires(Feature.PAGEFAULT_FLAG_WP)


def uffd_wp(addr: int) -> bool:
    """Bit 57 of the page's word in /proc/self/pagemap: write-protected by userfaultfd."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        return bool(int.from_bytes(os.pread(fd, 8, addr // 4096 * 8), "little") >> 57 & 1)
    finally:
        os.close(fd)


def unprotect(uffd: Uffd, addr: int) -> None:
    assert uffd.writeprotect(addr, 4096, WpMode(0)) == 0


@pytest.mark.requires(UNPOPULATED)
def test_protecting_a_hole_leaves_a_marker_and_unprotecting_removes_it(memory, open_uffd):
    uffd, area = open_uffd(UNPOPULATED), memory(1)
    uffd.register(area.addr, area.page, WP)
    uffd.writeprotect(area.addr, area.page)
    assert uffd_wp(area.addr)
    unprotect(uffd, area.addr)
    assert not uffd_wp(area.addr)


@pytest.mark.requires(UNPOPULATED)
def test_dontneed_of_anonymous_memory_drops_the_protection(memory, open_uffd):
    uffd, area = open_uffd(UNPOPULATED), memory(1)
    uffd.register(area.addr, area.page, WP)
    area.set(0, 1)
    uffd.writeprotect(area.addr, area.page)
    assert uffd_wp(area.addr)
    area.madvise(0, 1, MADV_DONTNEED)
    assert not uffd_wp(area.addr)
    Touch(area.addr, 1).finish()  # nobody is told
    assert uffd.read() == []


@pytest.mark.requires(SHMEM)
@pytest.mark.memory("shmem")
@pytest.mark.parametrize("how", ["dontneed", "punch"])
def test_dropping_a_page_of_shared_memory_keeps_the_protection(memory, open_uffd, how):
    uffd, area = open_uffd(SHMEM), memory(1)
    uffd.register(area.addr, area.page, MISSING | WP)
    uffd.copy(area.addr, BYTES.addr, area.page, CopyMode.WP)
    if how == "dontneed":
        area.madvise(0, 1, MADV_DONTNEED)
    else:
        area.punch(0, 1)
    assert uffd_wp(area.addr)


@pytest.mark.requires(UNPOPULATED)
def test_reading_a_marked_hole_maps_the_zero_page_protected(memory, open_uffd):
    uffd, area = open_uffd(UNPOPULATED), memory(1)
    uffd.register(area.addr, area.page, WP)
    uffd.writeprotect(area.addr, area.page)
    assert Touch(area.addr).finish() == 0
    assert uffd_wp(area.addr)
    writer = Touch(area.addr, 3)
    assert uffd.wait_readable(10)
    (fault,) = uffd.read()
    assert fault.flags == PagefaultFlag.WRITE | PagefaultFlag.WP
    unprotect(uffd, area.addr)
    writer.finish()


def test_without_wp_unpopulated_a_write_to_a_protected_hole_is_unseen(memory, open_uffd):
    uffd, area = open_uffd(Feature.PAGEFAULT_FLAG_WP), memory(1)
    uffd.register(area.addr, area.page, WP)
    assert uffd.writeprotect(area.addr, area.page) == 0
    Touch(area.addr, 1).finish()
    assert uffd.read() == []


@pytest.mark.requires(SHMEM)
@pytest.mark.memory("anon", "shmem", "shmem_private")
def test_write_waits_until_unprotected_and_old_bytes_can_be_read_meanwhile(memory, open_uffd):
    uffd, area = open_uffd(SHMEM), memory(1)
    uffd.register(area.addr, area.page, MISSING | WP)
    uffd.copy(area.addr, BYTES.addr, area.page, CopyMode.WP)
    writer = Touch(area.addr, 77)
    assert uffd.wait_readable(10)
    (fault,) = uffd.read()
    assert fault.flags == PagefaultFlag.WRITE | PagefaultFlag.WP
    assert area.get(0) == 1 and writer.waits()
    unprotect(uffd, area.addr)
    writer.finish()
    assert area.get(0) == 77


def test_dontneed_does_not_wake_who_waits_to_write(memory, open_uffd):
    uffd, area = open_uffd(Feature.PAGEFAULT_FLAG_WP), memory(1)
    uffd.register(area.addr, area.page, MISSING | WP)
    uffd.copy(area.addr, BYTES.addr, area.page, CopyMode.WP)
    writer = Touch(area.addr, 5)
    assert uffd.wait_readable(10)
    uffd.read()
    area.madvise(0, 1, MADV_DONTNEED)
    assert writer.waits()
    uffd.wake(area.addr, area.page)
    assert uffd.wait_readable(10)
    (fault,) = uffd.read()  # now it is missing
    assert fault.flags == PagefaultFlag.WRITE
    uffd.copy(area.addr, BYTES.addr, area.page)
    writer.finish()


@pytest.mark.requires(SHMEM)
@pytest.mark.memory("anon", "shmem")
def test_mremap_without_the_event_drops_the_protection(memory, open_uffd):
    uffd, here, there = open_uffd(SHMEM), memory(1), memory(1)
    uffd.register(here.addr, here.page, WP)
    here.set(0, 1)
    uffd.writeprotect(here.addr, here.page)
    assert uffd_wp(here.addr)
    must("mremap", here.addr, 4096, 4096, MREMAP_FIXED | MREMAP_MAYMOVE, there.addr)
    here.nr_pages = 0
    assert not uffd_wp(there.addr)


def fork_wp(kind: str) -> tuple[bool, bytes, bool]:
    uffd, area = Uffd.open(SHMEM), map_area(kind, 1)
    uffd.register(area.addr, area.page, MISSING | WP)
    uffd.copy(area.addr, BYTES.addr, area.page, CopyMode.WP)
    before = uffd_wp(area.addr)
    _, child = fork_and_ask(lambda: b"%d" % uffd_wp(area.addr))
    after = uffd_wp(area.addr)
    uffd.close()
    return before, child, after


@pytest.mark.requires(SHMEM)
@pytest.mark.parametrize("kind", ["anon", "shmem", "shmem_private"])
def test_fork_drops_the_protection_in_the_child_only(run_in_child, kind):
    assert run_in_child(fork_wp, kind).value == (True, b"0", True)


def fork_with_event() -> tuple[bytes, int]:
    uffd, area = Uffd.open(SHMEM | Feature.EVENT_FORK), map_area("anon", 2)
    # The reader is another process: os.fork() holds the GIL while it waits for the event to be read.
    server = os.fork()
    if server == 0:
        assert uffd.wait_readable(10)
        (event,) = uffd.read()
        assert isinstance(event, msg.Fork)
        with Uffd(event.fd, uffd.features) as child:
            assert child.wait_readable(10)
            (fault,) = child.read()
            assert isinstance(fault, msg.Pagefault) and fault.address == area.at(1)
            assert child.copy(area.at(1), BYTES.at(4), area.page).err == 0
        os._exit(0)
    uffd.register(area.addr, area.nr_bytes, MISSING | WP)
    uffd.copy(area.addr, BYTES.addr, area.page, CopyMode.WP)
    _, answer = fork_and_ask(lambda: bytes([uffd_wp(area.addr), area.get(1)]))
    _, status = os.waitpid(server, 0)
    uffd.close()
    return answer, status


@pytest.mark.requires(SHMEM, Feature.EVENT_FORK)
@pytest.mark.root
def test_fork_with_the_event_keeps_the_protection_and_hands_over_the_child(run_in_child):
    assert run_in_child(fork_with_event).value == (bytes([1, 5]), 0)


@pytest.mark.requires("PAGEMAP_SCAN", UNPOPULATED)
def test_protecting_twice_and_other_protections_keep_the_bit(memory, open_uffd):
    import mmap

    uffd, area = open_uffd(UNPOPULATED), memory(1)
    uffd.register(area.addr, area.page, WP)
    area.set(0, 1)
    for _ in range(2):
        assert uffd.writeprotect(area.addr, area.page) == 0
    must("mprotect", area.addr, area.page, mmap.PROT_READ)
    must("mprotect", area.addr, area.page, mmap.PROT_READ | mmap.PROT_WRITE)
    assert uffd_wp(area.addr)
    (found,) = mapping.scan(area.addr, area.addr + area.page)
    assert not found.categories & mapping.PageCategory.WRITTEN
