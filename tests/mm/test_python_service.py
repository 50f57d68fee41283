"""The same requests on regions that the fault-service process serves."""

from __future__ import annotations

import numpy as np
import pytest

import uffd_vm as uv
from uffd_vm.page import PAGE_SIZE
from uffd_vm.testing.invariants import check_all

pytestmark = pytest.mark.usefixtures("uffd")


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_files(make_file, mode):
    path = make_file(70 * PAGE_SIZE + 5)
    with uv.map(path, mode, service="python") as region:
        assert region.service == "python"
        assert region.buffer[3 * PAGE_SIZE] == path.read_bytes()[3 * PAGE_SIZE]
        assert region.trace() and region.stats()["pgfault"] > 0
        region.load((0, 10 * PAGE_SIZE))
        region.prefetch((20 * PAGE_SIZE, 30 * PAGE_SIZE))
        np.testing.assert_array_equal(region.array(), np.fromfile(path, "u1"))
        region.evict()
        assert bytes(region.buffer) == path.read_bytes()
        check_all(region)


def test_writing_home(make_file):
    path = make_file(16 * PAGE_SIZE)
    with uv.map(path, "r+", service="python", track=True) as region:
        region.buffer[5 * PAGE_SIZE] = 42
        assert region.dirty() == [(5 * PAGE_SIZE, 6 * PAGE_SIZE)]
        region.flush()
        assert path.read_bytes()[5 * PAGE_SIZE] == 42
        region.buffer[5 * PAGE_SIZE] = 43
        check_all(region)
    assert path.read_bytes()[5 * PAGE_SIZE] == 43


def test_anonymous_tracking():
    with uv.anonymous(16 * PAGE_SIZE, service="python", track=True) as region:
        region.buffer[0] = 1
        region.protect()
        region.buffer[2 * PAGE_SIZE] = 1
        assert region.dirty() == [(2 * PAGE_SIZE, 3 * PAGE_SIZE)]
        assert region.buffer[0] == 1
        check_all(region)


def test_views_keep_a_region_that_the_process_serves(make_file):
    path = make_file(16 * PAGE_SIZE)
    region = uv.map(path, service="python")
    a = region.array()
    with pytest.raises(uv.RegionBusyError):
        region.close()
    assert bytes(a) == path.read_bytes()  # still served after the attempt
    del a
    region.close()


def test_the_process_goes_with_the_last_region(make_file):
    from uffd_vm.service import python

    with uv.map(make_file(), service="python") as one:
        with uv.anonymous(PAGE_SIZE, service="python") as two:
            assert two.buffer[0] == 0
        pid = python.python_service().pid
        assert one.buffer[0]
        assert python.python_service().pid == pid
    with uv.map(make_file(), service="python") as one:
        assert one.buffer[0] and python.python_service().pid != pid
