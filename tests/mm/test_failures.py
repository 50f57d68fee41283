"""What a user of a region is told when a page cannot be had."""

from __future__ import annotations

import errno
import os
import time

import pytest

import uffd_vm as uv
from uffd_vm.page import PAGE_SIZE
from uffd_vm.testing.inject import inject, until_clean

pytestmark = pytest.mark.usefixtures("uffd")


def touch(buffer: memoryview, at: int) -> int:
    """The byte there. CPython delivers the exception of a failed touch at the next call or jump back,
    so that the value is never returned."""
    value = buffer[at]
    for _ in range(2):
        pass
    return value


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_a_touch_of_a_page_that_cannot_be_read_raises_and_the_next_tries_again(make_file, mode):
    path = make_file(8 * PAGE_SIZE)
    with uv.map(path, mode, service="native", deadline=5) as region:
        mv = region.buffer
        with (
            inject("PREAD", errno.EIO, count=1000),
            inject("PREAD_NOWAIT", errno.EAGAIN, count=1000),
        ):
            with pytest.raises(uv.SourceError, match=r"data\.bin") as raised:
                touch(mv, 3 * PAGE_SIZE)
        assert raised.value.errno == errno.EIO and raised.value.index == 3
        assert mv[3 * PAGE_SIZE] == path.read_bytes()[3 * PAGE_SIZE]
        mv.release()


@pytest.mark.parametrize("err", [errno.EIO, errno.ENOMEM, errno.ENOBUFS])
def test_a_read_that_fails_in_the_thread_that_may_not_wait_is_tried_again(make_file, err):
    path = make_file(8 * PAGE_SIZE)
    with uv.map(path, service="native", deadline=5) as region:
        with inject("PREAD_NOWAIT", err, count=1 << 40) as first:
            assert touch(region.buffer, 3 * PAGE_SIZE) == path.read_bytes()[3 * PAGE_SIZE]
            assert first.fired
        with (
            inject("PREAD_NOWAIT", err, count=1 << 40),
            inject("PREAD", err, count=2),  # the third try succeeds
        ):
            assert bytes(region.buffer) == path.read_bytes()


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_load_raises_an_ordinary_exception(make_file, mode):
    path = make_file(8 * PAGE_SIZE)
    with uv.map(path, mode, service="native") as region:
        with inject("PREAD", errno.EIO, count=1000):
            with pytest.raises(uv.SourceError, match=r"data\.bin.*page 2\)") as raised:
                region.load((2 * PAGE_SIZE, 3 * PAGE_SIZE))
        assert raised.value.index == 2 and raised.value.errno == errno.EIO
        region.load()
        assert bytes(region.buffer) == path.read_bytes()


@pytest.mark.parametrize("mode", ["r", "c"])
def test_a_file_that_changed_is_never_mixed_with_what_was_mapped(make_file, mode):
    path = make_file(300 * PAGE_SIZE)
    with uv.map(path, mode, service="native") as region:
        first = region.buffer[0]
        time.sleep(0.01)
        os.pwrite(fd := os.open(path, os.O_WRONLY), b"x", 0)
        os.close(fd)
        with pytest.raises(uv.SourceChanged, match="map it again"):
            region.load()
        with pytest.raises(uv.SourceChanged, match="map it again"):
            bytes(region.buffer)
        assert region.buffer[0] == first  # what had come stays


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_a_truncated_file_is_a_typed_error_and_not_a_crash(make_file, mode):
    path = make_file(300 * PAGE_SIZE)
    region = uv.map(path, mode, service="native")
    os.truncate(path, PAGE_SIZE)
    with pytest.raises(uv.SourceChanged, match="shorter"):
        region.load()
    with pytest.raises(uv.SourceChanged, match="shorter"):
        touch(region.buffer, 200 * PAGE_SIZE)
    region.discard()


def test_ensure_says_why(make_file):
    with uv.map(make_file(), service="native") as region:
        with inject("PREAD", errno.EIO, count=1000):
            with pytest.raises(uv.SourceError):
                region.ensure()
        region.ensure()


@pytest.mark.parametrize("op, code", [("COPY", errno.ENOMEM), ("PREAD", errno.EIO)])
def test_load_is_exact_whichever_call_fails(make_file, op, code):
    path = make_file(32 * PAGE_SIZE)
    content = path.read_bytes()

    def run() -> None:
        with uv.map(path, service="native") as region:
            try:
                region.load()
            except (uv.SourceError, uv.BudgetExceeded):
                region.load()
            assert bytes(region.buffer) == content

    until_clean(op, code, run)


@pytest.mark.parametrize("service", ["native", "inline"])
@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_half_of_the_pages_fail_and_the_other_half_is_right(make_file, mode, service):
    """Every even page cannot be read: exactly those fail, and nothing around them."""
    nr_pages = 24
    path = make_file(nr_pages * PAGE_SIZE)
    data = path.read_bytes()
    with uv.map(
        path, mode, service=service, fault_around_bytes=PAGE_SIZE, readahead_bytes=0
    ) as region:
        with region.buffer as mv:
            failed = []
            for page in range(nr_pages):
                if page % 2:
                    assert touch(mv, page * PAGE_SIZE) == data[page * PAGE_SIZE]
                    continue
                with (
                    inject("PREAD", errno.EIO, count=1000),
                    inject("PREAD_NOWAIT", errno.EAGAIN, count=1000),
                    pytest.raises(uv.SourceError) as raised,
                ):
                    touch(mv, page * PAGE_SIZE)
                failed.append(raised.value.index)
            assert failed == list(range(0, nr_pages, 2))
            assert region.stats()["io_error"] == nr_pages // 2
            assert bytes(mv) == data
