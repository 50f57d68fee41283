"""ensure(): pages are present and mapped for a system call that follows, in every mode, by every service.

A system call on a page that is missing, or write-protected, waits for the service; with service="inline" it
fails with EFAULT: nobody sends a fault of the kernel's own. So there a system call proves that ensure() did
its work; elsewhere the fault counter does."""

from __future__ import annotations

import os
import tempfile

import pytest

import uffd_vm as uv
from tests.contracts.test_executors import become_nobody
from uffd_vm.kernel import features
from uffd_vm.page import PAGE_SIZE
from uffd_vm.testing.inject import inject
from uffd_vm.testing.invariants import check_all
from uffd_vm.testing.strategies import pattern

pytestmark = pytest.mark.usefixtures("uffd")

NR_PAGES = 40
SERVICES = ("native", "python", "inline", "kernel")
#: mode (None: anonymous memory), track
KINDS = (
    ("r", False),
    ("c", False),
    ("c", True),
    ("r+", False),
    ("r+", True),
    (None, False),
    (None, True),
)
#: The kernel's own mmap tracks nothing, and anonymous memory of the kernel's is np.zeros().
ALL = [
    (service, mode, track)
    for service in SERVICES
    for mode, track in KINDS
    if service != "kernel" or (mode is not None and not track)
]


def make(make_file, mode, track, service, **kwargs):
    """The region, and the bytes that it must show."""
    if mode is None:
        nbytes = NR_PAGES * PAGE_SIZE - 5
        return uv.anonymous(nbytes, service=service, track=track, **kwargs), bytes(nbytes)
    path = make_file(NR_PAGES * PAGE_SIZE - 5)
    return uv.map(path, mode, service=service, track=track, **kwargs), path.read_bytes()


def read_by_system_call(region, start, stop):
    reader, writer = os.pipe()
    try:
        got = b""
        for at in range(start, stop, PAGE_SIZE):
            with region.buffer as memory, memory[at : min(at + PAGE_SIZE, stop)] as part:
                assert os.write(writer, part) == len(part)
            got += os.read(reader, PAGE_SIZE)
        return got
    finally:
        os.close(reader)
        os.close(writer)


def store_by_system_call(region, at, data):
    reader, writer = os.pipe()
    try:
        assert os.write(writer, data) == len(data)
        with region.buffer as memory, memory[at : at + len(data)] as part:
            assert os.readv(reader, [part]) == len(data)
    finally:
        os.close(reader)
        os.close(writer)


def nr_faults(region):
    return region.stats()["pgfault"] if region.service != "kernel" else 0


@pytest.mark.parametrize("service, mode, track", ALL)
class TestEveryModeByEveryService:
    def test_missing_pages_are_readable_by_system_calls(self, make_file, mode, track, service):
        region, data = make(make_file, mode, track, service)
        with region:
            region.ensure()
            before = nr_faults(region)
            assert read_by_system_call(region, 0, region.nbytes) == data
            assert nr_faults(region) == before
            check_all(region)

    def test_missing_pages_can_be_stored_to_by_system_calls(self, make_file, mode, track, service):
        self.store(make_file, mode, track, service, lambda region: None)

    def test_pages_that_were_read_can_be_stored_to(self, make_file, mode, track, service):
        self.store(make_file, mode, track, service, lambda region: bytes(region.buffer))

    def test_clean_pages_can_be_stored_to(self, make_file, mode, track, service):
        def clean(region):
            if mode == "r":
                return
            with region.buffer as memory:
                memory[7] = memory[7]
            region.flush()
            if track:
                region.protect()

        self.store(make_file, mode, track, service, clean)

    def test_pages_that_were_evicted_can_be_stored_to(self, make_file, mode, track, service):
        def evict(region):
            region.load()
            region.evict()

        self.store(make_file, mode, track, service, evict)

    def store(self, make_file, mode, track, service, prepare):
        region, data = make(make_file, mode, track, service)
        with region:
            prepare(region)
            if mode == "r":
                with pytest.raises(uv.InvalidArgument, match="mapped 'r'"):
                    region.ensure(access="write")
                return
            region.ensure((PAGE_SIZE, 30 * PAGE_SIZE), access="write")
            assert bytes(region.buffer) == data  # it stores what is there
            before = nr_faults(region)
            for index in range(1, 30):
                store_by_system_call(region, index * PAGE_SIZE + index, b"mine")
            assert nr_faults(region) == before
            expected = bytearray(data)
            for index in range(1, 30):
                at = index * PAGE_SIZE + index
                expected[at : at + 4] = b"mine"
            assert bytes(region.buffer) == bytes(expected)
            if track:
                assert (PAGE_SIZE, 30 * PAGE_SIZE) in [
                    (max(a, PAGE_SIZE), min(b, 30 * PAGE_SIZE)) for a, b in region.dirty()
                ]
            if service != "kernel":
                check_all(region)


@pytest.mark.parametrize("service", ["native", "python", "inline"])
@pytest.mark.parametrize("access", ["read", "write"])
def test_a_range_above_the_cap_is_no_endless_loop(make_file, service, access):
    path = make_file(NR_PAGES * PAGE_SIZE)
    with uv.map(path, "r+", service=service, cap=8 * PAGE_SIZE, deadline=5) as region:
        region.ensure(access=access)
        assert bytes(region.buffer) == path.read_bytes()


@pytest.mark.parametrize("service", ["native", "inline"])
def test_what_failed_is_said_and_the_next_try_works(make_file, service):
    path = make_file(8 * PAGE_SIZE)
    with uv.map(path, "r+", service=service) as region:
        with inject("PREAD", 5, count=100), inject("PREAD_NOWAIT", 11, count=100):
            with pytest.raises(uv.SourceError) as caught:
                region.ensure(access="write")
        assert caught.value.index == 0
        region.ensure(access="write")
        assert bytes(region.buffer) == path.read_bytes()


def test_a_store_that_the_hook_denies_is_a_typed_error(make_file):
    path = make_file(8 * PAGE_SIZE)
    with uv.map(path, "r+", service="python", page_mkwrite="deny".format) as region:
        region.ensure()
        with pytest.raises(uv.SourceError, match="denied") as caught:
            region.ensure((3 * PAGE_SIZE, 6 * PAGE_SIZE), access="write")
        assert caught.value.index == 3
        assert bytes(region.buffer) == path.read_bytes()


@pytest.mark.parametrize("service", SERVICES)
def test_nobody_unmaps_while_pages_are_mapped(make_file, service):
    region = uv.map(make_file(8 * PAGE_SIZE), service=service)
    madvise, tried = region._ops._madvise, []

    def close_meanwhile(*args):
        with pytest.raises(uv.RegionBusyError):
            region.close()
        tried.append(args)
        return madvise(*args)

    region._ops._madvise = close_meanwhile
    region.ensure()
    assert tried
    region.close()


def _page_that_fails_at_the_touch(path: str) -> None:
    region = uv.map(path, "r+", service="inline")
    region._ops.load = lambda *args: None  # type: ignore[method-assign]  # it was good when it was loaded
    for access in ("read", "write"):
        with inject("PREAD", 5, count=1 << 40), inject("PREAD_NOWAIT", 11, count=1 << 40):
            try:
                region.ensure(access=access)  # type: ignore[arg-type]
            except uv.SourceError as error:
                assert error.index == 0 and error.errno == 5, error
            else:
                raise AssertionError("no error")
        assert (
            region.stats()["pgfault_failed"] <= 2
        )  # it ends at the first, does not go through all
        region.check()
    region.ensure(access="write")
    with open(path, "rb") as file:
        assert bytes(region.buffer) == file.read()
    region.close()


def test_a_page_that_fails_at_the_touch_is_a_typed_error(make_file, run_in_child):
    run_in_child(_page_that_fails_at_the_touch, str(make_file(40 * PAGE_SIZE)))


def _in_user_mode_only(service: str) -> str:
    if service == "python":
        become_nobody()  # who may run our interpreter
    else:  # and here not even its own /proc/self/pagemap is readable
        os.setgroups([])
        os.setresuid(65534, 65534, 65534)
    if features.probe().way is not features.Way.USER_MODE_ONLY:
        return "anybody may do all here"  # vm.unprivileged_userfaultfd=1
    data = pattern(8 * PAGE_SIZE, 0)
    for mode in ("r", "c", "r+"):
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            with uv.map(file.name, mode, service=service) as region:  # type: ignore[arg-type]
                region.ensure()
                assert read_by_system_call(region, 0, region.nbytes) == data
                if mode == "r":
                    continue
                region.ensure(access="write")
                store_by_system_call(region, PAGE_SIZE + 5, b"mine")
                assert region.buffer[PAGE_SIZE + 5 : PAGE_SIZE + 9] == b"mine"
    return "done"


@pytest.mark.root
@pytest.mark.parametrize("service", ["native", "python", "inline"])
def test_in_user_mode_only(run_in_child, service):
    """There the kernel sends no fault of its own to any service."""
    env = {"UFFD_VM_USER_MODE_ONLY": "1", "TMPDIR": "/tmp"}
    assert run_in_child(_in_user_mode_only, service, env=env).value == "done"
