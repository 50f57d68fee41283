"""What may be registered, what registering again does, and what crossing a mapping's edge does."""

from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os
from pathlib import Path

import pytest

from tests.support import BYTES, MADV_DONTNEED, MADV_NOHUGEPAGE, Pages, Touch, call, map_area, must
from uffd_vm.errors import UffdError
from uffd_vm.kernel.features import Feature
from uffd_vm.kernel.uffd import CopyMode, RangeIoctl, RegisterMode

pytestmark = pytest.mark.requires()

MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR
EVERY_MODE = [
    RegisterMode(sum(modes)) for n in range(4) for modes in itertools.combinations((1, 2, 4), n)
]


def refused(fn, *args) -> int:
    with pytest.raises(UffdError) as error:
        fn(*args)
    return error.value.errno


@pytest.mark.requires(Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS, Feature.WP_HUGETLBFS_SHMEM)
@pytest.mark.parametrize("mode", EVERY_MODE, ids=lambda m: m.name or str(int(m)))
@pytest.mark.memory("anon", "shmem", "shmem_private", "hugetlb")
def test_range_ioctls_of_each_kind_and_mode(memory, open_uffd, mode):
    uffd = open_uffd(Feature.MINOR_SHMEM | Feature.MINOR_HUGETLBFS | Feature.WP_HUGETLBFS_SHMEM)
    area = memory(1)
    if not mode or (mode & MINOR and memory.kind == "anon"):
        assert refused(uffd.register, area.addr, area.nr_bytes, mode) == errno.EINVAL
        return
    ioctls = uffd.register(area.addr, area.nr_bytes, mode)
    assert ioctls & RangeIoctl.WAKE and ioctls & RangeIoctl.COPY and ioctls & RangeIoctl.POISON
    assert bool(ioctls & RangeIoctl.WRITEPROTECT) == bool(mode & WP)
    assert bool(ioctls & RangeIoctl.CONTINUE) == bool(mode & MINOR)
    assert bool(ioctls & RangeIoctl.ZEROPAGE) == (memory.kind != "hugetlb")


@pytest.mark.parametrize("flags", [mmap.MAP_SHARED, mmap.MAP_PRIVATE], ids=["shared", "private"])
def test_file_of_a_disk_cannot_be_registered(open_uffd, tmp_path, flags):
    uffd = open_uffd()
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    if _fs_type(path) in ("tmpfs", "ramfs"):
        pytest.skip("the temporary directory is a tmpfs; set TMPDIR to a directory on a disk")
    with open(path, "r+b") as file:
        prot = mmap.PROT_READ | mmap.PROT_WRITE
        addr = must("mmap", None, 4096, prot, flags, file.fileno(), 0)
    error = refused(uffd.register, addr, 4096, MISSING)
    must("munmap", addr, 4096)
    assert error == errno.EINVAL


def _fs_type(path) -> str:
    best = ("", "")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        if str(path).startswith(mount) and len(mount) >= len(best[0]):
            best = (mount, kind)
    return best[1]


def test_shared_mapping_of_a_sealed_memfd_is_eperm(open_uffd):
    uffd = open_uffd()
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 4096)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        area = map_area("shmem", 1, fd=fd, prot=mmap.PROT_READ)
        assert refused(uffd.register, area.addr, 4096, MISSING) == errno.EPERM
        area.unmap()
    finally:
        os.close(fd)


@pytest.mark.parametrize("prot", [mmap.PROT_READ, 0], ids=["read-only", "none"])
def test_read_only_memory_can_be_filled(memory, open_uffd, prot):
    uffd, area = open_uffd(), memory(1, prot=prot)
    uffd.register(area.addr, area.page, MISSING)
    assert uffd.copy(area.addr, BYTES.addr, area.page) == (0, area.page)
    must("mprotect", area.addr, area.page, mmap.PROT_READ)
    assert area.get(0) == 1


def test_range_with_a_hole_is_fine_and_an_unmapped_one_is_einval(memory, open_uffd):
    uffd, area = open_uffd(), memory(3)
    must("munmap", area.at(1), area.page)
    uffd.register(area.addr, area.nr_bytes, MISSING)
    assert refused(uffd.register, area.at(1), area.page, MISSING) == errno.EINVAL


def test_range_of_another_uffd_is_ebusy(memory, open_uffd):
    first, second, area = open_uffd(), open_uffd(), memory(1)
    first.register(area.addr, area.page, MISSING)
    assert refused(second.register, area.addr, area.page, MISSING) == errno.EBUSY


@pytest.mark.requires(Feature.PAGEFAULT_FLAG_WP)
def test_registering_again_replaces_the_modes(memory, open_uffd):
    uffd, area = open_uffd(Feature.PAGEFAULT_FLAG_WP), memory(2)
    uffd.register(area.addr, area.nr_bytes, MISSING)
    uffd.register(area.addr, area.nr_bytes, WP)
    assert Touch(area.at(0)).finish() == 0  # missing, and nobody was asked
    assert uffd.read() == []


@pytest.mark.requires(Feature.PAGEFAULT_FLAG_WP)
def test_registering_a_subset_again_changes_nothing(memory, open_uffd):
    uffd, area = open_uffd(Feature.PAGEFAULT_FLAG_WP), memory(1)
    uffd.register(area.addr, area.nr_bytes, MISSING | WP)
    uffd.register(area.addr, area.nr_bytes, WP)
    toucher = Touch(area.addr)
    assert uffd.wait_readable(10)
    assert uffd.copy(area.addr, BYTES.addr, area.page) == (0, area.page)
    assert toucher.finish() == 1


@pytest.mark.memory("anon", "shmem")
def test_copy_through_another_uffd_fills_and_wakes_nobody(memory, open_uffd):
    owner, other, area = open_uffd(), open_uffd(), memory(1)
    owner.register(area.addr, area.page, MISSING)
    toucher = Touch(area.addr)
    assert owner.wait_readable(10)
    assert other.copy(area.addr, BYTES.addr, area.page) == (0, area.page)
    assert toucher.waits()
    owner.wake(area.addr, area.page)
    assert toucher.finish() == 1


@pytest.mark.memory("anon", "shmem")
def test_unregister_lets_missing_pages_read_as_zeros(memory, open_uffd):
    uffd, area = open_uffd(), memory(1)
    uffd.register(area.addr, area.page, MISSING)
    toucher = Touch(area.addr)
    assert uffd.wait_readable(10)
    uffd.unregister(area.addr, area.page)
    assert toucher.finish() == 0


def test_copy_across_two_mappings_is_enoent(memory, open_uffd):
    uffd, area, src = open_uffd(), memory(2), Pages(2)
    uffd.register(area.addr, area.nr_bytes, MISSING)
    must("mprotect", area.at(1), area.page, mmap.PROT_READ)  # splits the mapping
    assert uffd.copy(area.addr, src.addr, area.nr_bytes) == (errno.ENOENT, -errno.ENOENT)
    assert uffd.zeropage(area.addr, area.nr_bytes).err == errno.ENOENT
    for i in range(2):
        assert uffd.copy(area.at(i), src.at(i), area.page).err == 0
    uffd.wake(area.addr, area.nr_bytes)  # may cross


@pytest.mark.requires(Feature.PAGEFAULT_FLAG_WP)
def test_writeprotect_over_an_unregistered_tail_has_done_the_head(memory, open_uffd):
    uffd, area = open_uffd(Feature.PAGEFAULT_FLAG_WP), memory(2)
    area.set(0, 1)
    uffd.register(area.addr, area.page, MISSING | WP)
    assert uffd.writeprotect(area.addr, area.nr_bytes) == errno.ENOENT
    writer = Touch(area.addr, 2)
    assert uffd.wait_readable(10)  # so the head is protected
    uffd.unregister(area.addr, area.page)
    writer.finish()


@pytest.mark.memory("hugetlb")
def test_hugetlb_takes_whole_huge_pages_only(memory, open_uffd):
    uffd, area, src = open_uffd(), memory(1), Pages(1)
    assert refused(uffd.register, area.addr, 4096, MISSING) == errno.EINVAL
    uffd.register(area.addr, area.page, MISSING)
    assert uffd.copy(area.addr, src.addr, 4096).err == errno.EINVAL
    assert uffd.zeropage(area.addr, area.page).err == errno.EINVAL
    whole = Pages(1, area.page)
    assert uffd.copy(area.addr, whole.addr, area.page) == (0, area.page)
    assert area.get(0) == 1
    # A part of a huge page is not dropped, and no error says so.
    assert call("madvise", area.addr, 4096, MADV_DONTNEED) in (0, -errno.EINVAL)
    assert area.get(0) == 1


@pytest.mark.requires(Feature.PAGEFAULT_FLAG_WP)
def test_copy_wp_into_a_range_without_wp_is_einval_untouched(memory, open_uffd):
    uffd, area = open_uffd(Feature.PAGEFAULT_FLAG_WP), memory(1)
    uffd.register(area.addr, area.page, MISSING)
    assert uffd.copy(area.addr, BYTES.addr, area.page, CopyMode.WP) == (
        errno.EINVAL,
        -errno.EINVAL,
    )


def test_madvise_flags_split_a_mapping(memory, open_uffd):
    uffd, area = open_uffd(), memory(3)
    uffd.register(area.addr, area.nr_bytes, MISSING)
    assert area.madvise(1, 1, MADV_NOHUGEPAGE) == 0  # already so: no split
    assert uffd.zeropage(area.addr, area.nr_bytes).err == 0
