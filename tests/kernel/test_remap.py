"""mremap() of registered memory: with EVENT_REMAP the registration moves along, without it is lost.

The library moves filled pages into place this way, so every row here is load-bearing.
"""

from __future__ import annotations

import errno
import os

import pytest

from tests.support import (
    BYTES,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    Pages,
    Touch,
    in_thread,
    must,
)
from uffd_vm.kernel import mapping, msg
from uffd_vm.kernel.features import Feature
from uffd_vm.kernel.uffd import CopyMode, RegisterMode, WpMode

pytestmark = pytest.mark.requires(Feature.EVENT_REMAP)

MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR


def move_page(src: int, dst: int, page: int) -> int:
    return must("mremap", src, page, page, MREMAP_FIXED | MREMAP_MAYMOVE, dst)


def modes_at(addr: int) -> frozenset[str]:
    for vma in mapping.vmas():
        if vma.start <= addr < vma.end:
            return vma.flags & {"um", "uw", "ui"}
    raise AssertionError(f"{addr:#x} is not mapped")


def move_and_read(uffd, src: int, dst: int, page: int) -> list[msg.UffdMsg]:
    """Moves a page in another thread: the mover waits until its message is read."""
    moved = in_thread(move_page, src, dst, page)
    assert uffd.wait_readable(10)
    messages = uffd.read()
    assert moved() == dst
    return messages + uffd.read()


@pytest.mark.memory("anon", "shmem", "shmem_private")
def test_moved_page_keeps_its_registration(memory, open_uffd):
    uffd = open_uffd(Feature.EVENT_REMAP)
    here, there = memory(1), memory(3)
    uffd.register(here.addr, here.page, MISSING)
    messages = move_and_read(uffd, here.addr, there.at(1), here.page)
    here.nr_pages = 0  # it is gone from there
    assert messages == [msg.Remap(here.addr, there.at(1), here.page)]
    assert modes_at(there.at(1)) == {"um"}
    assert modes_at(there.at(0)) == modes_at(there.at(2)) == frozenset()

    toucher = Touch(there.at(1))
    assert uffd.wait_readable(10)
    (fault,) = uffd.read()
    assert isinstance(fault, msg.Pagefault) and fault.address == there.at(1)
    assert uffd.copy(there.at(1), BYTES.addr, here.page) == (0, here.page)
    assert toucher.finish() == 1


@pytest.mark.memory("anon", "shmem", "shmem_private")
def test_mover_waits_until_the_event_is_read(memory, open_uffd):
    uffd = open_uffd(Feature.EVENT_REMAP)
    here, there = memory(1), memory(1)
    uffd.register(here.addr, here.page, MISSING)
    moved = in_thread(move_page, here.addr, there.addr, here.page)
    assert uffd.wait_readable(10)
    assert moved.alive()
    # Meanwhile commits are refused, also at the new place.
    src = Pages(1)
    assert uffd.copy(there.addr, src.addr, here.page) == (errno.EAGAIN, -errno.EAGAIN)
    assert len(uffd.read()) == 1
    moved()
    here.nr_pages = 0
    assert uffd.copy(there.addr, src.addr, here.page) == (0, here.page)


@pytest.mark.memory("anon", "shmem", "shmem_private")
def test_moved_page_without_the_event_loses_its_registration(memory, open_uffd):
    uffd = open_uffd()
    here, there = memory(1), memory(1)
    uffd.register(here.addr, here.page, MISSING)
    move_page(here.addr, there.addr, here.page)
    here.nr_pages = 0
    assert modes_at(there.addr) == frozenset()
    assert Touch(there.addr).finish() == 0
    assert uffd.read() == []


@pytest.mark.requires(Feature.EVENT_UNMAP)
@pytest.mark.memory("anon", "shmem")
def test_with_event_unmap_the_old_range_is_told_too(memory, open_uffd):
    uffd = open_uffd(Feature.EVENT_REMAP | Feature.EVENT_UNMAP)
    here, there = memory(1), memory(1)
    uffd.register(here.addr, here.page, MISSING)
    moved = in_thread(move_page, here.addr, there.addr, here.page)
    messages = []
    while moved.alive() or uffd.wait_readable(0.01):
        messages += uffd.read()
    moved()
    here.nr_pages = 0
    assert messages == [
        msg.Remap(here.addr, there.addr, here.page),
        msg.Unmap(here.addr, here.addr + here.page),
    ]


@pytest.mark.requires("PAGEMAP_SCAN", Feature.PAGEFAULT_FLAG_WP, Feature.WP_HUGETLBFS_SHMEM)
@pytest.mark.memory("anon", "shmem", "shmem_private")
def test_moved_page_keeps_content_and_write_protection(memory, open_uffd):
    uffd = open_uffd(Feature.EVENT_REMAP | Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM)
    here, there = memory(1), memory(1)
    uffd.register(here.addr, here.page, MISSING | WP)
    assert uffd.copy(here.addr, BYTES.addr, here.page, CopyMode.WP).err == 0
    move_and_read(uffd, here.addr, there.addr, here.page)
    here.nr_pages = 0
    assert modes_at(there.addr) == {"um", "uw"}
    assert there.get(0) == 1
    (found,) = mapping.scan(there.addr, there.addr + there.page)
    assert found.categories & mapping.PageCategory.PRESENT
    assert not found.categories & mapping.PageCategory.WRITTEN
    writer = Touch(there.addr, 9)
    assert uffd.wait_readable(10)
    (fault,) = uffd.read()
    assert fault.flags & msg.PagefaultFlag.WP
    assert uffd.writeprotect(there.addr, there.page, WpMode(0)) == 0
    writer.finish()
    assert there.get(0) == 9


@pytest.mark.memory("shmem")
def test_moved_page_of_the_same_file_and_uffd_merges_with_its_neighbours(memory, open_uffd):
    # So filling page by page through moved mappings costs no mappings (vm.max_map_count) in the end.
    uffd = open_uffd(Feature.EVENT_REMAP)
    there = memory(3)
    uffd.register(there.addr, there.nr_bytes, MISSING)
    here = memory(3, fd=there.fd)
    uffd.register(here.at(1), here.page, MISSING)
    move_and_read(uffd, here.at(1), there.at(1), here.page)
    (vma,) = [v for v in mapping.vmas() if v.start <= there.at(1) < v.end]
    assert (vma.start, vma.end) == (there.addr, there.addr + there.nr_bytes)


@pytest.mark.requires(Feature.MINOR_SHMEM, Feature.WP_HUGETLBFS_SHMEM)
@pytest.mark.memory("shmem")
def test_cached_page_moved_over_a_private_placeholder_faults_minor(memory, open_uffd):
    """The undoing of a placeholder: the page's own mapping comes back over it, still registered."""
    uffd = open_uffd(Feature.EVENT_REMAP | Feature.MINOR_SHMEM | Feature.WP_HUGETLBFS_SHMEM)
    here, placeholder = memory(1), memory(1, kind="anon")
    uffd.register(here.addr, here.page, MISSING | MINOR | WP)
    placeholder.set(0, 0xFF)
    os.pwrite(here.fd, b"\x07", 0)
    move_and_read(uffd, here.addr, placeholder.addr, here.page)
    here.nr_pages = 0
    assert modes_at(placeholder.addr) == {"um", "uw", "ui"}
    toucher = Touch(placeholder.addr)
    assert uffd.wait_readable(10)
    (fault,) = uffd.read()
    assert fault.flags & msg.PagefaultFlag.MINOR
    assert uffd.continue_(placeholder.addr, here.page) == (0, here.page)
    assert toucher.finish() == 7
