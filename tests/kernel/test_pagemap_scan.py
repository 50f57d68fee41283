"""PAGEMAP_SCAN: the audit oracle, and asynchronous write-protection with it."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from tests.support import BYTES, MADV_GUARD_INSTALL, map_area
from uffd_vm.errors import UffdError
from uffd_vm.kernel import mapping
from uffd_vm.kernel._lib import ffi, lib
from uffd_vm.kernel.features import Feature
from uffd_vm.kernel.mapping import PageCategory, ScanFlag
from uffd_vm.kernel.uffd import CopyMode, RegisterMode

MISSING, WP = RegisterMode.MISSING, RegisterMode.WP
SYNC = Feature.PAGEFAULT_FLAG_WP | Feature.WP_UNPOPULATED
ASYNC = SYNC | Feature.WP_ASYNC | Feature.WP_HUGETLBFS_SHMEM
WRITTEN, PRESENT, SWAPPED = PageCategory.WRITTEN, PageCategory.PRESENT, PageCategory.SWAPPED
PFNZERO = PageCategory.PFNZERO
KNOWN = PageCategory(0x7F) | PageCategory.GUARD
pytestmark = pytest.mark.requires("PAGEMAP_SCAN", Feature.PAGEFAULT_FLAG_WP)


def categories(area, index: int) -> PageCategory:
    ranges = list(mapping.scan(area.at(index), area.at(index + 1)))
    return (ranges[0].categories if ranges else PageCategory(0)) & KNOWN


@pytest.mark.requires(SYNC, Feature.POISON)
def test_what_each_state_of_a_page_looks_like(memory, open_uffd):
    uffd, area = open_uffd(SYNC), memory(8)
    uffd.register(area.addr, area.nr_bytes, MISSING | WP)
    page = area.page
    uffd.zeropage(area.at(1), page)
    uffd.copy(area.at(2), BYTES.addr, page)
    uffd.copy(area.at(3), BYTES.addr, page, CopyMode.WP)
    uffd.writeprotect(area.at(4), page)
    uffd.poison(area.at(5), page)
    uffd.zeropage(area.at(6), page)
    uffd.writeprotect(area.at(6), page)
    assert [categories(area, i) for i in range(7)] == [
        WRITTEN,
        WRITTEN | PRESENT | PFNZERO,
        WRITTEN | PRESENT,
        PRESENT,
        SWAPPED,
        WRITTEN | SWAPPED,
        PRESENT | PFNZERO,
    ]
    if area.madvise(7, 1, MADV_GUARD_INSTALL) == 0:
        assert categories(area, 7) & SWAPPED


@pytest.mark.memory("shmem", "shmem_private")
def test_pages_of_a_memfd_are_file(memory):
    area = memory(2)
    os.pwrite(area.fd, b"x" * 8192, 0)
    assert area.get(0) == ord("x")
    assert categories(area, 0) & (PageCategory.FILE | PRESENT) == PageCategory.FILE | PRESENT
    if area.kind == "shmem_private":
        area.set(0, 1)  # now it is a private copy
        assert not categories(area, 0) & PageCategory.FILE


# --- asynchronous write-protection: selftests' pagemap_ioctl


@pytest.fixture
def tracked(memory, open_uffd):
    uffd, area = open_uffd(ASYNC), memory(64)
    uffd.register(area.addr, area.nr_bytes, WP)
    uffd.writeprotect(area.addr, area.nr_bytes)
    return area


def dirty(area, *, reset: bool = False, batch: int = 512) -> list[tuple[int, int]]:
    """[first, end) indices of the written runs; `reset` protects them again in the same step."""
    flags = ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC if reset else ScanFlag(0)
    found = mapping.scan(
        area.addr, area.addr + area.nr_bytes, need=WRITTEN, tell=WRITTEN, flags=flags, batch=batch
    )
    return [((r.start - area.addr) // area.page, (r.end - area.addr) // area.page) for r in found]


everywhere = [pytest.mark.requires(ASYNC), pytest.mark.memory("anon", "shmem", "shmem_private")]


def on_every_kind(fn):
    for mark in everywhere:
        fn = mark(fn)
    return fn


@on_every_kind
def test_fresh_range_is_clean(tracked):
    assert dirty(tracked) == []


@on_every_kind
def test_written_pages_are_told_once(tracked):
    for i in range(1, 63):
        tracked.set(i, 1)
    assert dirty(tracked, reset=True) == [(1, 63)]
    assert dirty(tracked) == []
    tracked.set(32, 2)
    assert dirty(tracked) == [(32, 33)]


@on_every_kind
def test_alternating_pages_come_in_small_batches_without_loss(tracked):
    for i in range(0, 64, 2):
        tracked.set(i, 1)
    expected = [(i, i + 1) for i in range(0, 64, 2)]
    for batch in (1, 3, 512):
        assert dirty(tracked, batch=batch) == expected


@on_every_kind
def test_reading_is_no_write(tracked):
    assert [tracked.get(i) for i in range(4)] == [0] * 4
    assert dirty(tracked) == []


@pytest.mark.requires(ASYNC)
@pytest.mark.parametrize("max_pages, expected_end", [(1, 1), (2, 2), (32, 32), (0, 64)])
def test_max_pages_ends_the_walk_exactly(tracked, max_pages, expected_end):
    for i in range(64):
        tracked.set(i, 1)
    vec, walk_end = ffi.new("struct uvm_pm_region[]", 4), ffi.new("uint64_t *")
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    end = tracked.addr + tracked.nr_bytes
    nr = lib.uvm_pagemap_scan(
        fd, tracked.addr, end, 0, WRITTEN, 0, WRITTEN, max_pages, vec, 4, walk_end
    )
    os.close(fd)
    assert nr == 1
    assert (vec[0].end - vec[0].start) // tracked.page == expected_end
    assert (walk_end[0] - tracked.addr) // tracked.page == expected_end


@pytest.mark.parametrize(
    "flags, tell, error", [(8, WRITTEN, errno.EINVAL), (0, 1 << 40, errno.EINVAL)]
)
def test_bad_arguments_are_einval(memory, flags, tell, error):
    area = memory(1)
    with pytest.raises(UffdError) as caught:
        list(mapping.scan(area.addr, area.at(1), tell=tell, flags=flags))
    assert caught.value.errno == error


def test_empty_and_unmapped_ranges_have_nothing(memory):
    area = memory(2)
    assert list(mapping.scan(area.addr, area.addr)) == []
    area.unmap()
    assert list(mapping.scan(area.addr, area.addr + 8192, need=PRESENT)) == []


def test_asking_for_async_protection_of_plain_memory_is_eperm(memory):
    area = memory(1)
    area.set(0, 1)
    with pytest.raises(UffdError) as caught:
        dirty(area, reset=True)
    assert caught.value.errno == errno.EPERM


@pytest.mark.requires(ASYNC)
def test_async_protection_sends_no_message(memory, open_uffd):
    uffd, area = open_uffd(ASYNC), memory(2)
    uffd.register(area.addr, area.nr_bytes, WP)
    uffd.writeprotect(area.addr, area.nr_bytes)
    area.set(0, 1)
    assert uffd.read() == []


@pytest.mark.requires(ASYNC)
@pytest.mark.parametrize("nr_rounds", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_no_write_is_lost_under_concurrent_get_and_reset(memory, open_uffd, nr_rounds):
    """Two threads write every page once a round while a third collects: the sum may exceed, never fall
    short of, the pages written (selftests' transact)."""
    uffd = open_uffd(ASYNC)
    area = memory(256)
    uffd.register(area.addr, area.nr_bytes, WP)
    uffd.writeprotect(area.addr, area.nr_bytes)
    for number in range(nr_rounds):
        seen: set[int] = set()

        def write(first: int, value: int) -> None:
            for i in range(first, area.nr_pages, 2):
                area.set(i, value)

        writers = [threading.Thread(target=write, args=(k, number + 1 & 0xFF)) for k in (0, 1)]
        for writer in writers:
            writer.start()
        while any(writer.is_alive() for writer in writers):
            for first, end in dirty(area, reset=True, batch=16):
                seen.update(range(first, end))
        for writer in writers:
            writer.join()
        for first, end in dirty(area, reset=True):
            seen.update(range(first, end))
        assert seen == set(range(area.nr_pages))


def test_smaps_tells_what_is_registered(memory, open_uffd):
    uffd, area = open_uffd(SYNC), map_area("anon", 1)
    before = mapping.registered_vmas()
    uffd.register(area.addr, area.page, MISSING | WP)
    (vma,) = [v for v in mapping.registered_vmas() if v not in before]
    assert vma.start <= area.addr < vma.end and vma.flags >= {"um", "uw"}
    area.unmap()
