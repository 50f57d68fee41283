"""service="kernel": the region is an ordinary mmap, and everything on Region works there too."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import textwrap

import numpy as np
import pytest

import uffd_vm as uv
from tests.support import run_in_child
from uffd_vm.mm import arguments
from uffd_vm.page import PAGE_SIZE


def test_a_plain_local_file_is_the_kernels(make_file, caplog):
    path = make_file()
    with caplog.at_level(logging.INFO, "uffd_vm"), uv.map(path) as region:
        assert region.service == "kernel" and "local file" in region.service_reason
        assert region.handle == region.generation == 0
        assert bytes(region.buffer) == path.read_bytes()
        assert "kernel" in repr(region) and "<table>" in region._repr_html_()
    assert "served by kernel" in caplog.text


@pytest.mark.parametrize(
    "wish",
    [{"cap": "1GiB"}, {"trace": True}, {"track": True}, {"deadline": 5}, {"on_error": "raise"}],
)
def test_wishes_that_the_kernel_cannot_fulfil(make_file, uffd, wish):
    with uv.map(make_file(), "c", **wish) as region:
        assert region.service == "native" and next(iter(wish)) in region.service_reason
    with pytest.raises(uv.InvalidArgument, match="service='native'"):
        uv.map(make_file(), "c", service="kernel", **wish)


def test_what_plain_mmap_does_by_itself_is_no_wish(make_file):
    with uv.map(make_file(), on_error="sigbus", fault_around_bytes=PAGE_SIZE) as region:
        assert region.service == "kernel"
    # Of the process, not of the call:
    with uv.config.context(deadline=5, on_error="raise", cap="1GiB"):
        with uv.map(make_file()) as region:
            assert region.service == "kernel"


def test_a_remote_file_is_ours(make_file, monkeypatch, uffd):
    for kind in ("nfs4", "fuse.sshfs", "fuse", "cifs", "9p"):
        monkeypatch.setattr(arguments, "filesystem_of", lambda device, kind=kind: kind)
        with uv.map(make_file()) as region:
            assert region.service == "native" and kind in region.service_reason
    for kind in ("ext4", "fuseblk", "overlay", None):
        monkeypatch.setattr(arguments, "filesystem_of", lambda device, kind=kind: kind)
        with uv.map(make_file()) as region:
            assert region.service == "kernel"


def test_the_file_system_of_a_path_is_found():
    assert arguments.filesystem_of(os.stat("/proc").st_dev) == "proc"
    assert arguments.filesystem_of(0xFFFFF) is None


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_requests(make_file, mode):
    path = make_file(64 * PAGE_SIZE)
    with uv.map(path, mode, service="kernel") as region:
        for advice in ("normal", "sequential", "random", "willneed"):
            region.advise(advice)
        region.prefetch((0, 5))
        region.load()
        region.ensure((0, 10 * PAGE_SIZE))
        residency = region.residency()
        assert residency.mapped_bytes >= 10 * PAGE_SIZE
        assert residency.resident_bytes == 64 * PAGE_SIZE
        assert residency.heatmap(4) == (1.0,) * 4
        assert region.evict() >= 0
        assert bytes(region.buffer) == path.read_bytes()
        region.check()
        assert dict(region.stats()) == {} and region.stats().latency.count == 0
        with pytest.raises(uv.FeatureUnavailable, match="trace=True"):
            region.trace()


def test_writing_home(make_file):
    path = make_file(8 * PAGE_SIZE)
    with uv.map(path, "r+", service="kernel") as region:
        region.buffer[0] = 42
        region.ensure(access="write")
        region.flush()
        assert path.read_bytes()[0] == 42
        region.evict()
        assert region.buffer[0] == 42


def test_writers_through_the_kernel_exclude_our_own_page_cache(make_file, uffd):
    path = make_file()
    with uv.map(path, "r+") as one, uv.map(path, "r+", service="kernel") as two:
        one.buffer[0] = 42
        assert two.buffer[0] == 42
        with pytest.raises(uv.RegionBusyError, match="locked by this process"):
            uv.map(path, "r+", service="native")
    with uv.map(path, "r+", service="native") as region:
        assert region.buffer[0] == 42
        with pytest.raises(uv.RegionBusyError, match="locked by this process"):
            uv.map(path, "r+", service="kernel")
        uv.map(path, "r", service="kernel").close()


def test_private_changes_survive_eviction(make_file):
    path = make_file(64 * PAGE_SIZE)
    with uv.map(path, "c", service="kernel") as region:
        a = region.array()
        a[::PAGE_SIZE] = 42
        assert region.residency().dirty_bytes == 64 * PAGE_SIZE
        region.evict()
        assert (a[::PAGE_SIZE] == 42).all()
        np.testing.assert_array_equal(a[1:99], np.frombuffer(path.read_bytes(), "u1")[1:99])
        del a


def test_a_truncated_file_is_found_by_check_and_load(make_file):
    path = make_file(8 * PAGE_SIZE)
    with uv.map(path, service="kernel") as region:
        os.truncate(path, PAGE_SIZE)
        for call in (region.check, region.load, region.ensure):
            with pytest.raises(uv.SourceChanged, match="SIGBUS"):
                call()
        os.truncate(path, 8 * PAGE_SIZE)


@pytest.mark.parametrize("mapped", ["uv.map(path)", "np.memmap(path, mode='r')"])
def test_a_touch_past_the_end_is_sigbus_as_with_memmap(mapped, make_file):
    script = f"""
        import os, sys
        import numpy as np
        import uffd_vm as uv
        path = sys.argv[1]
        memory = {mapped}
        array = memory.array() if isinstance(memory, uv.Region) else memory
        os.truncate(path, 4096)
        with open(path + ".out", "wb", buffering=0) as out:
            try:
                out.write(array[8192:8200])
            except OSError as error:
                print(error.strerror, flush=True)
        array[8192]
        print("never printed")
    """
    path = make_file(8 * PAGE_SIZE)
    child = run_in_child(textwrap.dedent(script), path, check=False)
    assert (child.returncode, child.stdout) == (-signal.SIGBUS, "Bad address\n")


def test_life(make_file):
    path = make_file()
    region = uv.map(path)
    a = region.array()
    with pytest.raises(uv.RegionBusyError):
        region.close()
    del a
    with pickle.loads(pickle.dumps(region)) as twin:
        assert bytes(twin.buffer) == path.read_bytes() and twin.service == "kernel"
    region.close()
    region.close()
    calls = (region.array, region.load, region.residency, region.stats, region.flush, region.trace)
    for call in calls:
        with pytest.raises(uv.RegionClosedError):
            call()


def test_a_sparse_tebibyte(tmp_path):
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with uv.map(path) as region:
        assert region.buffer[1 << 39] == 0
        assert "TiB" in repr(region) or "1024.0 GiB" in repr(region)
        assert region.residency().resident_bytes < 1 << 30
