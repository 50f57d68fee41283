"""Mode "r" written to from C: the kernel's own answer, SIGSEGV, and nothing is changed. (Python's own ways
to write are refused before: tests/mm/test_map.py.)"""

from __future__ import annotations

import ctypes
import signal
import tempfile
from pathlib import Path

import pytest

import uffd_vm as uv
from tests.support import run_in_child
from uffd_vm.kernel.features import Feature
from uffd_vm.page import PAGE_SIZE
from uffd_vm.testing.strategies import pattern

pytestmark = pytest.mark.requires(Feature.MISSING_SHMEM, Feature.POISON)

DATA = pattern(8 * PAGE_SIZE)


def in_child_store(path: str, service: str, present: bool) -> str:
    with uv.map(path, service=service) as region:
        if present:
            assert region.buffer[3 * PAGE_SIZE] == DATA[3 * PAGE_SIZE]
        ctypes.memset(region.address + 3 * PAGE_SIZE, 0, 1)
        return "it was stored"


@pytest.mark.parametrize("present", [False, True], ids=["missing page", "present page"])
@pytest.mark.parametrize("service", ["native", "python", "inline", "kernel"])
def test_a_store_into_mode_r_is_sigsegv_and_changes_nothing(
    tmp_path: Path, service: str, present: bool
) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(DATA)
    with uv.map(path, service="native") as beside:
        result = run_in_child(in_child_store, str(path), service, present, check=False)
        assert result.returncode == -signal.SIGSEGV, (result.value, result.stderr)
        assert bytes(beside.buffer) == DATA == path.read_bytes()


def in_child_store_by_a_system_call(path: str, service: str) -> str:
    import os

    libc = ctypes.CDLL(None, use_errno=True)
    with uv.map(path, service=service) as region, tempfile.TemporaryFile() as file:
        file.write(b"zz")
        file.flush()
        address = ctypes.c_void_p(region.address + 3 * PAGE_SIZE)
        assert libc.pread(file.fileno(), address, ctypes.c_size_t(2), ctypes.c_long(0)) == -1
        code = ctypes.get_errno()
        assert bytes(region.buffer) == DATA
        return os.strerror(code)


@pytest.mark.parametrize("service", ["native", "python", "inline", "kernel"])
def test_a_system_call_that_stores_into_mode_r_is_efault(tmp_path: Path, service: str) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(DATA)
    value = run_in_child(in_child_store_by_a_system_call, str(path), service).value
    assert value == "Bad address"
