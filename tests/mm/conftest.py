from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import missing_requirement
from uffd_vm.kernel.features import Feature
from uffd_vm.page import PAGE_SIZE
from uffd_vm.testing.strategies import pattern


@pytest.fixture
def uffd() -> None:
    """Asked for by tests whose regions are served by userfaultfd."""
    if reason := missing_requirement(Feature.MISSING_SHMEM, Feature.POISON):
        pytest.skip(reason)


@pytest.fixture
def make_file(tmp_path: Path) -> Callable[..., Path]:
    """make_file(nbytes, seed=0, name="data.bin"): a file in which every page tells its place."""

    def make(nbytes: int = 64 * PAGE_SIZE, seed: int = 0, name: str = "data.bin") -> Path:
        path = tmp_path / name
        path.write_bytes(pattern(nbytes, seed))
        return path

    return make
