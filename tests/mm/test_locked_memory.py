"""mlockall(): memory that is filled as it is mapped would be filled before anybody is asked for it."""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path

import pytest

import uffd_vm as uv
from tests.support import fork_and_ask, run_in_child
from uffd_vm.page import PAGE_SIZE
from uffd_vm.testing.strategies import pattern

pytestmark = pytest.mark.usefixtures("uffd")

MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
DATA = pattern(64 * PAGE_SIZE)
SERVICES = ("native", "inline", "python")
KINDS = ("r", "c", "c tracked", "r+", "anonymous")


def lock(flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(flags):
        raise OSError(ctypes.get_errno(), "mlockall")


def make(kind: str, service: str, path: Path) -> uv.Region:
    if kind == "anonymous":
        return uv.anonymous(len(DATA), service=service)
    mode, _, tracked = kind.partition(" ")
    return uv.map(path, mode, service=service, track=bool(tracked), deadline=5)


def use(region: uv.Region, kind: str, path: Path) -> None:
    expected = bytes(len(DATA)) if kind == "anonymous" else DATA
    assert region.buffer[:] == expected
    if kind != "r":
        region.buffer[5] = 99
        assert region.buffer[:] == expected[:5] + b"\x63" + expected[6:]
    region.close()
    assert path.read_bytes() == (DATA[:5] + b"\x63" + DATA[6:] if kind == "r+" else DATA)


def in_child_locked_before(kind: str, service: str, flags: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "data.bin"
        path.write_bytes(DATA)
        lock(flags)
        if flags & MCL_FUTURE and not flags & MCL_ONFAULT:
            with pytest.raises(uv.FeatureUnavailable, match="MCL_ONFAULT"):
                make(kind, service, path)
            with uv.map(path, "r", service="kernel") as plain:
                assert plain.buffer[:] == DATA
            ctypes.CDLL(None).munlockall()
        use(make(kind, service, path), kind, path)


@pytest.mark.parametrize(
    "flags",
    [MCL_FUTURE, MCL_CURRENT | MCL_FUTURE, MCL_FUTURE | MCL_ONFAULT, MCL_CURRENT],
    ids=["future", "both", "onfault", "current"],
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("service", SERVICES)
def test_memory_that_would_be_filled_with_zeros_is_refused(
    service: str, kind: str, flags: int
) -> None:
    run_in_child(in_child_locked_before, kind, service, flags, timeout=40)


def in_child_locked_after(kind: str, service: str, flags: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "data.bin"
        path.write_bytes(DATA)
        region = make(kind, service, path)
        lock(flags)
        if (kind, service) != ("r+", "python"):  # which no child inherits
            expected = bytes(len(DATA)) if kind == "anonymous" else DATA
            assert fork_and_ask(lambda: bytes(region.buffer[:])) == (0, expected)
        use(region, kind, path)


@pytest.mark.parametrize("flags", [MCL_FUTURE, MCL_CURRENT | MCL_FUTURE], ids=["future", "both"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("service", SERVICES)
def test_locking_what_is_mapped_is_served(service: str, kind: str, flags: int) -> None:
    run_in_child(in_child_locked_after, kind, service, flags, timeout=40)
