"""The kernel swaps pages of a region out: they are as before when they come back, and no store is missed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import uffd_vm as uv
from tests.support import page_out, pagemap
from uffd_vm.page import PAGE_SIZE
from uffd_vm.testing.invariants import check_all

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("uffd", "swap")]

NR_PAGES = 64
NR_BYTES = NR_PAGES * PAGE_SIZE
SERVICES = ("native", "inline", "python")
KINDS = ("anonymous", "anonymous tracked", "r", "c", "c tracked", "r+", "r+ tracked")
TRACKED = [kind for kind in KINDS if "tracked" in kind]


@pytest.fixture
def path(make_file: Callable[..., Path]) -> Path:
    return make_file(NR_BYTES)


def map_kind(path: Path, kind: str, service: str) -> uv.Region:
    options = {"service": service, "track": "tracked" in kind, "fault_around_bytes": PAGE_SIZE}
    if kind.startswith("anonymous"):
        return uv.anonymous(NR_BYTES, **options)
    return uv.map(path, kind.split()[0], readahead_bytes=0, **options)


def first_content(path: Path, kind: str) -> bytearray:
    return bytearray(NR_BYTES if kind.startswith("anonymous") else path.read_bytes())


def store(buffer: memoryview, want: bytearray, pages: range, value: int) -> None:
    for page in pages:
        buffer[page * PAGE_SIZE + 7] = want[page * PAGE_SIZE + 7] = value


def dirty_pages(region: uv.Region) -> list[int]:
    return [at // PAGE_SIZE for start, end in region.dirty() for at in range(start, end, PAGE_SIZE)]


def swap_out(region: uv.Region, kind: str) -> None:
    page_out(region.address, NR_BYTES)
    if not kind.startswith("r"):  # of shared pages the page table forgets everything
        assert all(entry >> 62 & 1 for entry in pagemap(region.address, NR_BYTES))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("service", SERVICES)
def test_pages_that_were_swapped_out_are_as_before(path: Path, service: str, kind: str) -> None:
    want = first_content(path, kind)
    with map_kind(path, kind, service) as region:
        with region.buffer as buffer:
            assert bytes(buffer) == want
            if kind != "r":
                store(buffer, want, range(NR_PAGES), 0xA5)
            before = region.stats()["pgfault"]
            swap_out(region, kind)
            assert bytes(buffer) == want
            check_all(region)
            if not kind.startswith("r"):
                assert region.stats()["pgfault"] == before, "to swap in is the kernel's affair"
            swap_out(region, kind)
            if kind != "r":
                store(buffer, want, range(0, NR_PAGES, 3), 0x5A)
            assert bytes(buffer) == want
            check_all(region)
        region.flush()
        assert (path.read_bytes() == want) == kind.startswith("r")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("r")])
@pytest.mark.parametrize("service", SERVICES)
def test_changes_that_are_swapped_out_count_as_dirty(path: Path, service: str, kind: str) -> None:
    want = first_content(path, kind)
    with map_kind(path, kind, service) as region, region.buffer as buffer:
        store(buffer, want, range(NR_PAGES), 0xA5)
        before = region.residency()
        assert before.dirty_bytes == NR_BYTES
        swap_out(region, kind)
        after = region.residency()
        assert (after.dirty_bytes, after.mapped_bytes) == (NR_BYTES, 0)
        assert after.resident_bytes == before.resident_bytes
        check_all(region)
        assert bytes(buffer) == want


@pytest.mark.parametrize("kind", TRACKED)
@pytest.mark.parametrize("service", SERVICES)
def test_protection_survives_and_no_store_is_missed(path: Path, service: str, kind: str) -> None:
    want = first_content(path, kind)
    with map_kind(path, kind, service) as region, region.buffer as buffer:
        store(buffer, want, range(NR_PAGES), 0xA5)
        region.protect()
        swap_out(region, kind)
        assert dirty_pages(region) == []
        assert bytes(buffer) == want and dirty_pages(region) == [], "a read is no store"
        swap_out(region, kind)
        store(buffer, want, range(0, NR_PAGES, 3), 0x5A)
        assert dirty_pages(region) == list(range(0, NR_PAGES, 3))
        # Protected while they are out, some of them written before.
        swap_out(region, kind)
        assert dirty_pages(region) == list(range(0, NR_PAGES, 3))
        region.protect()
        assert dirty_pages(region) == []
        store(buffer, want, range(5, NR_PAGES, 7), 0x3C)
        assert dirty_pages(region) == list(range(5, NR_PAGES, 7))
        assert bytes(buffer) == want
        check_all(region)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("r")])
@pytest.mark.parametrize("service", SERVICES)
def test_a_forked_child_finds_them_too(path: Path, service: str, kind: str) -> None:
    want = first_content(path, kind)
    with map_kind(path, kind, service) as region, region.buffer as buffer:
        store(buffer, want, range(NR_PAGES), 0xA5)
        if "tracked" in kind:
            region.protect()
        swap_out(region, kind)
        pid = os.fork()
        if pid == 0:
            ok = bytes(buffer) == want
            if "tracked" in kind:
                buffer[9 * PAGE_SIZE] = 1
                ok = ok and dirty_pages(region) == [9]
            os._exit(0 if ok else 3)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert bytes(buffer) == want
        check_all(region)
