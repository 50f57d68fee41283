"""Pages that are swapped out: whose affair they are, and what becomes of their protection."""

from __future__ import annotations

import pytest

from tests.support import Touch, page_out, pagemap
from uffd_vm.kernel import mapping
from uffd_vm.kernel.features import Feature
from uffd_vm.kernel.mapping import PageCategory
from uffd_vm.kernel.msg import PagefaultFlag
from uffd_vm.kernel.uffd import RegisterMode, WpMode

MISSING, WP = RegisterMode.MISSING, RegisterMode.WP
SHMEM = Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM
pytestmark = [
    pytest.mark.root,
    pytest.mark.usefixtures("swap"),
    pytest.mark.requires(SHMEM, Feature.MISSING_SHMEM),
    pytest.mark.memory("anon", "shmem", "shmem_private"),
]


@pytest.fixture
def filled(memory, open_uffd):
    """Two pages with 1 and 2 in them, then registered."""
    uffd, area = open_uffd(SHMEM), memory(2)
    area.set(0, 1)
    area.set(1, 2)
    uffd.register(area.addr, area.nr_bytes, MISSING | WP)
    return uffd, area


def test_swapped_page_is_not_missing(filled):
    uffd, area = filled
    page_out(area.addr, area.nr_bytes)
    assert [Touch(area.at(i)).finish() for i in range(2)] == [1, 2]
    Touch(area.addr, 9).finish()
    assert uffd.read() == []


def test_protection_survives(filled):
    uffd, area = filled
    uffd.writeprotect(area.addr, area.page)
    page_out(area.addr, area.nr_bytes)
    first, second = pagemap(area.addr, area.nr_bytes)
    assert first >> 62 & 1 and first >> 57 & 1 and not second >> 57 & 1
    assert Touch(area.addr).finish() == 1
    assert pagemap(area.addr, area.page)[0] >> 57 & 1
    page_out(area.addr, area.nr_bytes)
    Touch(area.at(1), 9).finish()
    writer = Touch(area.addr, 9)
    assert uffd.wait_readable(10)
    (fault,) = uffd.read()
    assert fault.flags == PagefaultFlag.WRITE | PagefaultFlag.WP and writer.waits()
    uffd.writeprotect(area.addr, area.page, WpMode(0))
    writer.finish()
    assert [area.get(i) for i in range(2)] == [9, 9]


def test_swapped_page_is_protected_and_let_go(filled):
    uffd, area = filled
    page_out(area.addr, area.nr_bytes)
    uffd.writeprotect(area.addr, area.nr_bytes)
    assert all(entry >> 57 & 1 for entry in pagemap(area.addr, area.nr_bytes))
    uffd.writeprotect(area.addr, area.nr_bytes, WpMode(0))
    assert not any(entry >> 57 & 1 for entry in pagemap(area.addr, area.nr_bytes))
    Touch(area.addr, 9).finish()
    assert uffd.read() == [] and [area.get(i) for i in range(2)] == [9, 2]


@pytest.mark.requires("PAGEMAP_SCAN")
def test_scan_tells_swapped_and_whether_it_was_written(filled):
    uffd, area = filled
    uffd.writeprotect(area.addr, area.page)
    page_out(area.addr, area.nr_bytes)
    known = PageCategory.WRITTEN | PageCategory.PRESENT | PageCategory.SWAPPED
    found = {
        (at - area.addr) // area.page: r.categories & known
        for r in mapping.scan(area.addr, area.addr + area.nr_bytes)
        for at in range(r.start, r.end, area.page)
    }
    assert found[0] == PageCategory.SWAPPED
    shared = area.kind == "shmem"  # its page table has nothing of a page that is out
    assert found[1] & ~PageCategory.WRITTEN == (PageCategory(0) if shared else PageCategory.SWAPPED)
