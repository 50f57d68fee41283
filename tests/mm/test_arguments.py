"""Bad input: each is a typed error that says what, where and what to do; and nothing is left behind."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest

import uffd_vm as uv
from uffd_vm.fault import Backing, FaultFlag
from uffd_vm.kernel import features
from uffd_vm.mm import address_space as address_space_module
from uffd_vm.page import PAGE_SIZE
from uffd_vm.testing.inject import inject


@pytest.mark.parametrize("service", ["kernel", "native"])
@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"offset": -1}, "negative"),
        ({"offset": 1}, "array\\(offset"),
        ({"offset": -PAGE_SIZE}, "negative"),
        ({"offset": 1 << 40}, "past the end"),
        ({"offset": 1.0}, "no int"),
        ({"length": 0}, "not above 0"),
        ({"length": -5}, "not above 0"),
        ({"length": 1 << 40}, "never extends"),
        ({"length": True}, "no int"),
        ({"mode": "w"}, "mode"),
        ({"mode": "w+"}, "mode"),
        ({"mode": "rb"}, "mode"),
        ({"on_error": "ignore"}, "on_error"),
        ({"deadline": 0}, "deadline"),
        ({"deadline": -1}, "deadline"),
        ({"deadline": float("inf")}, "deadline"),
        ({"deadline": float("nan")}, "deadline"),
        ({"deadline": "soon"}, "deadline"),
        ({"fault_around_bytes": 0}, "fault_around_bytes"),
        ({"fault_around_bytes": 3 * PAGE_SIZE}, "power of two"),
        ({"fault_around_bytes": 4 << 20}, "power of two"),
        ({"readahead_bytes": 1}, "readahead_bytes"),
        ({"readahead_bytes": 1 << 30}, "readahead_bytes"),
        ({"cap": 0}, "less than one page"),
        ({"cap": -1}, "negative"),
        ({"cap": "lots"}, "cannot read"),
        ({"cap": 1.5}, "neither"),
        ({"track": True}, "track"),
        ({"track": 1}, "track: 1 is neither True nor False"),
        ({"track": "no"}, "track: 'no' is neither"),
        ({"trace": "x"}, "trace: 'x' is neither"),
        ({"trace": None}, "trace: None is neither"),
        ({"name": 5}, "name: 5 is no str"),
        ({"name": b"bytes"}, "name: b'bytes' is no str"),
        ({"mode": ["r"]}, "mode"),
        ({"service": 5}, "service"),
        ({"on_error": ["raise"]}, "on_error"),
        ({"offset": "0"}, "no int"),
        ({"deadline": True}, "deadline"),
        ({"deadline": 10**400}, "deadline"),
    ],
)
def test_bad_arguments_are_refused(make_file, service, kwargs, match):
    with pytest.raises(uv.InvalidArgument, match=match):
        uv.map(make_file(), **({"service": service} | kwargs))


def test_an_unknown_service_is_refused(make_file):
    with pytest.raises(uv.InvalidArgument, match="'auto', 'native'"):
        uv.map(make_file(), service="magic")


@pytest.mark.parametrize("nbytes", [0, -1, "none", 1.5, None])
def test_bad_sizes_of_anonymous_memory_are_refused(nbytes):
    with pytest.raises(uv.InvalidArgument, match="nbytes"):
        uv.anonymous(nbytes)


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"track": "x"}, "track: 'x' is neither"),
        ({"trace": 0}, "trace: 0 is neither"),
        ({"name": 5}, "name: 5 is no str"),
        ({"service": None, "deadline": "soon"}, "deadline"),
    ],
)
def test_bad_arguments_of_anonymous_memory_are_refused(kwargs, match):
    with pytest.raises(uv.InvalidArgument, match=match):
        uv.anonymous(PAGE_SIZE, **kwargs)


def test_more_than_the_address_space_is_a_memory_error():
    for nbytes in (1 << 60, 1 << 70):
        with pytest.raises(MemoryError, match="nbytes: no address space") as caught:
            uv.anonymous(nbytes)
        assert isinstance(caught.value, uv.UffdVmError)


def test_integers_of_numpy_are_integers(make_file):
    n = np.int64(PAGE_SIZE)
    with uv.map(make_file(), offset=n, length=n) as region:
        assert region.nbytes == PAGE_SIZE
    with uv.anonymous(n, fault_around_bytes=n) as region:
        assert region.nbytes == PAGE_SIZE
    for bad in (np.float64(PAGE_SIZE), np.bool_(True)):
        with pytest.raises(uv.InvalidArgument, match="no int"):
            uv.map(make_file(), length=bad)
        with pytest.raises(uv.InvalidArgument, match="neither a number"):
            uv.anonymous(bad)


def test_anonymous_memory_of_the_kernel_is_refused():
    with pytest.raises(uv.InvalidArgument, match=r"np\.zeros"):
        uv.anonymous(PAGE_SIZE, service="kernel")


@pytest.mark.parametrize("what", [b"bytes", bytearray(5), 5, None, lambda: 0])
def test_what_is_no_path_is_refused(what):
    with pytest.raises(uv.InvalidArgument, match="no path"):
        uv.map(what)


@pytest.mark.parametrize("path", ["a\0b", "\0", Path("a\0b")])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_path_with_a_nul_is_refused(path, mode):
    with pytest.raises(uv.InvalidArgument, match="NUL"):
        uv.map(path, mode)


@pytest.mark.parametrize(
    "dtype", ["bogus", "f4,bogus", 5, object(), {"names": ["a"]}, [("a",)], "f4,("]
)
def test_what_is_no_dtype_is_refused(make_file, dtype):
    with uv.map(make_file()) as region:
        with pytest.raises(uv.InvalidArgument, match=r"array: .* is no dtype"):
            region.array(dtype)


@pytest.mark.parametrize("offset", [1.5, "0", None, [4]])
def test_what_is_no_offset_of_an_array_is_refused(make_file, offset):
    with uv.map(make_file()) as region:
        with pytest.raises(uv.InvalidArgument, match="no whole number of bytes"):
            region.array(offset=offset)


@pytest.mark.parametrize("advice", [5, None, ["normal"], "dontneed"])
def test_what_is_no_advice_is_refused(make_file, advice):
    with uv.map(make_file()) as region:
        with pytest.raises(uv.InvalidArgument, match="advise"):
            region.advise(advice)


def test_a_url_is_refused():
    with pytest.raises(uv.FeatureUnavailable, match="local files"):
        uv.map("s3://bucket/key")


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
@pytest.mark.parametrize("service", ["auto", "native"])
class TestFiles:
    def test_an_empty_file_is_refused(self, tmp_path, mode, service):
        (tmp_path / "empty").touch()
        with pytest.raises(uv.InvalidArgument, match="is empty"):
            uv.map(tmp_path / "empty", mode, service=service)

    def test_a_directory_is_refused(self, tmp_path, mode, service):
        with pytest.raises(IsADirectoryError, match="map a file in it"):
            uv.map(tmp_path, mode, service=service)

    def test_a_socket_is_refused(self, tmp_path, monkeypatch, mode, service):
        monkeypatch.chdir(tmp_path)  # the path of a socket is short
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind("socket")
            with pytest.raises(uv.InvalidArgument, match="no regular file"):
                uv.map("socket", mode, service=service)

    def test_a_fifo_is_refused_and_never_waited_for(self, tmp_path, mode, service):
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(uv.InvalidArgument, match="no regular file"):
            uv.map(tmp_path / "fifo", mode, service=service)

    def test_a_device_is_refused(self, mode, service):
        with pytest.raises(uv.InvalidArgument, match="no regular file"):
            uv.map("/dev/zero", mode, service=service)

    def test_a_file_that_is_not_there(self, tmp_path, mode, service):
        with pytest.raises(FileNotFoundError, match="nothing"):
            uv.map(tmp_path / "nothing", mode, service=service)

    def test_a_file_that_shrinks_between_open_and_map(
        self, make_file, monkeypatch, mode, service, uffd
    ):
        path = make_file(8 * PAGE_SIZE)
        choose = address_space_module.choose_service

        def shrink(*args):
            os.truncate(path, PAGE_SIZE)
            return choose(*args)

        monkeypatch.setattr(address_space_module, "choose_service", shrink)
        with pytest.raises(uv.SourceChanged, match="shr"):
            uv.map(path, mode, service=service)


def _unprivileged(path: str, mode: str) -> str:
    os.setgroups([])
    os.setresuid(65534, 65534, 65534)
    import uffd_vm

    try:
        uffd_vm.map(path, mode).close()
    except PermissionError as error:
        return str(error)
    return "mapped"


@pytest.mark.root
def test_a_file_without_permission(make_file, run_in_child, tmp_path):
    path = make_file()
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == os.geteuid() and directory != directory.parent:
            directory.chmod(directory.stat().st_mode | 0o055)
    path.chmod(0o444)
    assert run_in_child(_unprivileged, str(path), "r").value == "mapped"
    assert "mode 'r' or 'c'" in run_in_child(_unprivileged, str(path), "r+").value
    path.chmod(0)
    assert "Permission denied" in run_in_child(_unprivileged, str(path), "r").value


# --- what this version or this kernel cannot do


def test_a_budget_is_refused_with_the_decision_that_nobody_carries_out(make_file):
    for make in (
        lambda: uv.map(make_file(), budget="1GiB"),
        lambda: uv.map(make_file(), "c", budget="1GiB"),
        lambda: uv.anonymous(PAGE_SIZE, budget="1GiB"),
    ):
        with pytest.raises(uv.FeatureUnavailable, match=r"budget=.*not in this version"):
            make()
    with pytest.raises(uv.FeatureUnavailable, match="SNAPSHOT"):
        address_space_module.refuse_unexecutable(
            Backing.ANON, FaultFlag.TRACKED | FaultFlag.SNAPSHOT_HELD
        )


def test_all_that_can_be_made_can_be_executed():
    for backing in (Backing.ANON, Backing.PRIVATE_FILE, Backing.SHARED_FILE):
        for flags in (FaultFlag(0), FaultFlag.TRACKED):
            address_space_module.refuse_unexecutable(backing, flags, writable=False)
    address_space_module.refuse_unexecutable(
        Backing.SHARED_FILE, FaultFlag.TRACKED | FaultFlag.HOOK, writable=True
    )


@pytest.mark.parametrize(
    "mask, make",
    [
        ("MISSING_SHMEM", lambda path: uv.map(path, service="native")),
        ("WP_HUGETLBFS_SHMEM", lambda path: uv.map(path, "r+", service="native")),
        ("POISON", lambda path: uv.map(path, service="native")),
        ("PAGEFAULT_FLAG_WP", lambda path: uv.map(path, "c", track=True)),
        ("PAGEFAULT_FLAG_WP", lambda path: uv.anonymous(PAGE_SIZE, track=True)),
    ],
)
def test_a_missing_kernel_feature_is_a_typed_error(make_file, monkeypatch, uffd, mask, make):
    monkeypatch.setenv("UFFD_VM_MASK_FEATURES", mask)
    with pytest.raises(uv.FeatureUnavailable, match=mask):
        make(make_file())
    monkeypatch.delenv("UFFD_VM_MASK_FEATURES")
    features.probe()
    make(make_file()).close()


def test_a_hook_needs_a_process_of_its_own(make_file):
    def hook(offset: int, nr_bytes: int) -> str:
        return "ok"

    with pytest.raises(uv.InvalidArgument, match="service='python'"):
        uv.map(make_file(), "r+", service="native", page_mkwrite=hook)
    with pytest.raises(uv.InvalidArgument, match=r"mode 'r\+'"):
        uv.map(make_file(), "c", service="python", page_mkwrite=hook)


def test_a_hook_that_cannot_be_pickled_is_refused(make_file, uffd, monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)  # which pickles more
    with pytest.raises(uv.InvalidArgument, match=r"page_mkwrite: .* cannot be pickled"):
        uv.map(make_file(), "r+", service="python", page_mkwrite=lambda offset, nr_bytes: "ok")


def test_tracking_must_be_asked_for(make_file, uffd):
    with uv.map(make_file(), "c", service="native") as region:
        for call in (region.protect, region.dirty):
            with pytest.raises(uv.InvalidArgument, match="track=True"):
                call()


def test_ensure_of_a_read_only_region_for_writing_is_refused(make_file, uffd):
    with uv.map(make_file(), service="native") as region:
        with pytest.raises(uv.InvalidArgument, match="mapped 'r'"):
            region.ensure(access="write")
        with pytest.raises(uv.InvalidArgument, match="neither"):
            region.ensure(access="maybe")


# --- a kernel call that fails while a region is made leaves nothing behind (see leaks_nothing)


@pytest.mark.parametrize("op", ["REGISTER", "MEMFD", "MMAP", "MADVISE"])
@pytest.mark.parametrize("skip", range(3))
def test_creation_undoes_itself(make_file, uffd, op, skip):
    path = make_file()
    with inject(op, 12, skip=skip):
        try:
            with uv.map(path, "c", service="native") as region:
                assert bytes(region.buffer) == path.read_bytes()
        except (uv.UffdError, uv.BudgetExceeded):
            pass
    with uv.map(path, "c", service="native") as region:
        assert bytes(region.buffer) == path.read_bytes()
