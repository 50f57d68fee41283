"""residency() where the kernel tells nothing of private pages: before Linux 6.7, or after a change of uid."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

import uffd_vm as uv
from tests.support import MADV_DONTNEED, Touch, must, run_in_child
from uffd_vm.kernel.features import Feature
from uffd_vm.page import PAGE_SIZE


@pytest.mark.requires(Feature.MISSING_SHMEM, Feature.POISON, "PAGEMAP_SCAN")
def test_without_pagemap_scan_private_pages_are_not_told(make_file, monkeypatch):
    with uv.map(make_file(), "c", service="native", fault_around_bytes=PAGE_SIZE) as region:
        memory = region.buffer
        memory[0] = 1
        assert region.residency().dirty_bytes == PAGE_SIZE
        monkeypatch.setenv("UFFD_VM_MASK_FEATURES", "PAGEMAP_SCAN")
        residency = region.residency()
        assert (residency.dirty_bytes, residency.resident_bytes) == (0, PAGE_SIZE)
        memory.release()


def ask_as_nobody(path: str) -> list[tuple[int, int]]:
    os.environ["UFFD_VM_USER_MODE_ONLY"] = "1"
    told = []
    with uv.map(path, service="native") as file, uv.anonymous(8 * PAGE_SIZE) as anonymous:
        with uv.map(path) as plain:
            regions = (file, anonymous, plain)
            for region in regions:
                region.load((0, PAGE_SIZE))
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            for region in regions:
                residency = region.residency()
                told.append((residency.mapped_bytes, residency.dirty_bytes))
    return told


@pytest.mark.root
@pytest.mark.requires(Feature.MISSING_SHMEM, Feature.POISON)
def test_a_changed_uid_is_no_error(tmp_path: Path):
    tmp_path.chmod(0o755)
    path = tmp_path / "f"
    path.write_bytes(bytes(8 * PAGE_SIZE))
    told = run_in_child(ask_as_nobody, str(path)).value
    assert [dirty for _, dirty in told] == [0, 0, 0]
    assert all(mapped >= PAGE_SIZE for mapped, _ in told), told


def in_child_no_descriptor_is_left(service: str) -> int:
    deadline = 5.0
    with uv.anonymous(8 * PAGE_SIZE, service=service, track=True, deadline=deadline) as region:
        region.residency()  # imports, and what the kernel can
        Touch(region.address, 1).finish()
        region.protect()
        must("madvise", region.address, PAGE_SIZE, MADV_DONTNEED)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        hold = []
        with pytest.raises(OSError):
            while True:
                hold.append(os.dup(0))
        with pytest.raises(uv.UffdError, match=r"pagemap.*ulimit -n") as told:
            region.residency()
        assert told.value.errno == errno.EMFILE
        Touch(region.address, 2).finish(timeout=deadline - 1)
        assert region.buffer[0] == 2 and region.dirty() == [(0, PAGE_SIZE)]
        for fd in hold:
            os.close(fd)
        return region.residency().dirty_bytes // PAGE_SIZE


@pytest.mark.requires(Feature.MISSING_SHMEM, Feature.POISON, Feature.WP_UNPOPULATED, "PAGEMAP_SCAN")
@pytest.mark.parametrize("service", ["native", "inline", "python"])
def test_without_descriptors_faults_are_served_and_residency_says_the_cure(service):
    assert run_in_child(in_child_no_descriptor_is_left, service).value == 1
