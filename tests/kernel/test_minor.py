"""Memfds: the page cache that several mappings share. MISSING, MINOR and CONTINUE."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from tests.support import BYTES, MADV_DONTNEED, Touch
from uffd_vm.kernel import msg
from uffd_vm.kernel.features import Feature
from uffd_vm.kernel.msg import PagefaultFlag
from uffd_vm.kernel.uffd import CopyMode, RegisterMode, WpMode

MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
FEATURES = (
    Feature.MISSING_SHMEM
    | Feature.MINOR_SHMEM
    | Feature.PAGEFAULT_FLAG_WP
    | Feature.WP_HUGETLBFS_SHMEM
)
pytestmark = [pytest.mark.requires(FEATURES), pytest.mark.memory("shmem")]


def one_fault(uffd) -> msg.Pagefault:
    assert uffd.wait_readable(10)
    (fault,) = uffd.read()
    assert isinstance(fault, msg.Pagefault)
    return fault


@pytest.fixture
def shared(memory, open_uffd):
    """A uffd, a memfd mapping with all three modes, and a second, unregistered mapping of it."""
    uffd, area = open_uffd(FEATURES), memory(4)
    uffd.register(area.addr, area.nr_bytes, MISSING | MINOR | WP)
    return uffd, area, memory(4, fd=area.fd)


def test_hole_is_missing_and_cached_page_is_minor(shared):
    uffd, area, alias = shared
    toucher = Touch(area.at(0))
    assert not one_fault(uffd).flags & PagefaultFlag.MINOR
    assert uffd.copy(area.at(0), BYTES.at(0), area.page).err == 0
    assert toucher.finish() == 1
    alias.set(1, 7)
    toucher = Touch(area.at(1))
    assert one_fault(uffd).flags & PagefaultFlag.MINOR
    assert uffd.continue_(area.at(1), area.page) == (0, area.page)
    assert toucher.finish() == 7


def test_continue_on_a_hole_is_efault_and_on_a_mapped_page_eexist(shared):
    uffd, area, alias = shared
    assert uffd.continue_(area.addr, area.page) == (errno.EFAULT, -errno.EFAULT)
    alias.set(0, 1)
    assert uffd.continue_(area.addr, area.page).err == 0
    assert uffd.continue_(area.addr, area.page) == (errno.EEXIST, -errno.EEXIST)


def test_copy_onto_a_cached_page_is_eexist(shared):
    uffd, area, alias = shared
    alias.set(0, 1)
    assert uffd.copy(area.addr, BYTES.addr, area.page) == (errno.EEXIST, -errno.EEXIST)


def test_pwrite_then_continue_fills_at_once(shared):
    uffd, area, _ = shared
    toucher = Touch(area.at(2))
    one_fault(uffd)
    os.pwrite(area.fd, b"\x2a" * area.page, 2 * area.page)
    assert toucher.waits()
    assert uffd.continue_(area.at(2), area.page) == (0, area.page)
    assert toucher.finish() == 0x2A


def test_dontneed_keeps_the_page_cached_and_punching_a_hole_does_not(shared):
    uffd, area, _ = shared
    uffd.copy(area.addr, BYTES.addr, area.page)
    assert area.madvise(0, 1, MADV_DONTNEED) == 0
    toucher = Touch(area.addr)
    assert one_fault(uffd).flags & PagefaultFlag.MINOR
    uffd.continue_(area.addr, area.page)
    assert toucher.finish() == 1
    area.punch(0, 1)
    toucher = Touch(area.addr)
    assert not one_fault(uffd).flags & PagefaultFlag.MINOR
    uffd.copy(area.addr, BYTES.at(4), area.page)
    assert toucher.finish() == 5


def test_continue_with_mode_wp_protects_the_page(shared):
    uffd, area, alias = shared
    alias.set(0, 3)
    reader = Touch(area.addr)
    one_fault(uffd)
    assert uffd.continue_(area.addr, area.page, CopyMode.WP) == (0, area.page)
    assert reader.finish() == 3
    writer = Touch(area.addr, 4)
    fault = one_fault(uffd)
    assert fault.flags & PagefaultFlag.WP and fault.flags & PagefaultFlag.WRITE
    assert writer.waits() and alias.get(0) == 3
    assert uffd.writeprotect(area.addr, area.page, WpMode(0)) == 0
    writer.finish()
    assert alias.get(0) == 4


def test_filling_through_one_mapping_is_a_minor_fault_in_the_other(shared, memory, open_uffd):
    uffd, area, _ = shared
    other_uffd, other = open_uffd(FEATURES), memory(4, fd=area.fd)
    other_uffd.register(other.addr, other.nr_bytes, MISSING | MINOR | WP)
    assert uffd.copy(area.addr, BYTES.addr, area.page, CopyMode.WP).err == 0
    reader = Touch(other.addr)
    assert one_fault(other_uffd).flags & PagefaultFlag.MINOR
    assert other_uffd.continue_(other.addr, other.page, CopyMode.WP) == (0, other.page)
    assert reader.finish() == 1
    assert uffd.read() == []
    # Write-protection is each mapping's own.
    uffd.writeprotect(area.addr, area.page, WpMode(0))
    writer = Touch(other.addr, 9)
    assert one_fault(other_uffd).flags & PagefaultFlag.WP
    other_uffd.writeprotect(other.addr, other.page, WpMode(0))
    writer.finish()
    assert area.get(0) == 9


def test_wp_and_minor_registration_tell_missing_only_without_minor(memory, open_uffd):
    # Registered MISSING only, a page that is cached maps at the kernel's own speed.
    uffd, area = open_uffd(FEATURES), memory(2)
    alias = memory(2, fd=area.fd)
    uffd.register(area.addr, area.nr_bytes, MISSING)
    alias.set(0, 6)
    assert Touch(area.addr).finish() == 6
    assert uffd.read() == []


@pytest.mark.memory("shmem_private")
def test_private_mapping_maps_cached_pages_without_an_event(memory, open_uffd):
    uffd, area = open_uffd(FEATURES), memory(2)
    uffd.register(area.addr, area.nr_bytes, MISSING)
    os.pwrite(area.fd, b"\x0b", 0)
    assert Touch(area.addr).finish() == 11
    Touch(area.addr, 12).finish()  # copied on write by the kernel
    assert os.pread(area.fd, 1, 0) == b"\x0b"
    assert uffd.read() == []


def test_copy_into_a_private_mapping_leaves_the_file_a_hole(memory, open_uffd):
    uffd, area = open_uffd(FEATURES), memory(1, kind="shmem_private")
    uffd.register(area.addr, area.page, MISSING)
    assert uffd.copy(area.addr, BYTES.addr, area.page).err == 0
    assert area.get(0) == 1
    assert os.fstat(area.fd).st_blocks == 0


def test_filling_the_shared_alias_does_not_wake_the_private_mapping(memory, open_uffd):
    uffd, alias = open_uffd(FEATURES), memory(1)
    private = memory(1, kind="shmem_private", fd=alias.fd)
    uffd.register(alias.addr, alias.page, MISSING)
    uffd.register(private.addr, private.page, MISSING)
    toucher = Touch(private.addr)
    one_fault(uffd)
    assert uffd.copy(alias.addr, BYTES.addr, alias.page) == (0, alias.page)
    assert toucher.waits()
    uffd.wake(private.addr, private.page)
    assert toucher.finish() == 1


def test_punching_a_hole_leaves_privately_copied_pages(memory, open_uffd):
    uffd, alias = open_uffd(FEATURES), memory(2)
    private = memory(2, kind="shmem_private", fd=alias.fd)
    alias.set(0, 1)
    alias.set(1, 1)
    uffd.register(private.addr, private.nr_bytes, MISSING)
    Touch(private.at(0), 2).finish()
    assert Touch(private.at(1)).finish() == 1
    alias.punch(0, 2)
    assert private.get(0) == 2
    toucher = Touch(private.at(1))
    one_fault(uffd)  # the page that was only mapped is missing again
    os.pwrite(alias.fd, b"\x05", alias.page)
    uffd.wake(private.at(1), alias.page)
    assert toucher.finish() == 5
    # But DONTNEED destroys private copies.
    assert private.madvise(0, 1, MADV_DONTNEED) == 0
    os.pwrite(alias.fd, b"\x06", 0)
    assert Touch(private.at(0)).finish() == 6


def test_transform_before_continue_is_what_the_reader_sees(shared):
    """The kernel's uffd-minor: the producer's bytes, complemented by the handler, one fault a page."""
    uffd, area, alias = shared
    for i in range(area.nr_pages):
        alias.view(i)[: area.page] = bytes([i + 1]) * area.page
    for i in range(area.nr_pages):
        toucher = Touch(area.at(i))
        assert one_fault(uffd).flags & PagefaultFlag.MINOR
        alias.view(i)[: area.page] = bytes([(i + 1) ^ 0xFF]) * area.page
        uffd.continue_(area.at(i), area.page)
        assert toucher.finish() == (i + 1) ^ 0xFF
        assert ctypes.string_at(area.at(i), area.page) == bytes([(i + 1) ^ 0xFF]) * area.page
    assert uffd.read() == []
