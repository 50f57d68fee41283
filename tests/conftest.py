"""Markers, skips with a reason and a cure, and the check that no test leaves anything behind.

UFFD_VM_REQUIRE=all turns skips into failures (a module that is not installed, or an older Python, excepted):
where all kernel features and permissions must be there, nothing may be skipped unseen.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy  # noqa: F401  (its threads start now, not inside a test)
import psutil
import pytest

from tests import support
from uffd_vm.kernel import features, mapping
from uffd_vm.kernel._lib import ffi, lib
from uffd_vm.kernel.features import Feature
from uffd_vm.kernel.uffd import Uffd

REQUIRE_ALL = os.environ.get("UFFD_VM_REQUIRE", "") == "all"


# --- markers


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow") or "slow" in config.getoption("-m"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_report_header() -> list[str]:
    found = features.probe()
    lines = [
        f"userfaultfd: Linux {found.release}, {found.way.value if found.way else 'unavailable'}"
    ]
    if found.masked:
        lines.append(f"masked features: {', '.join(sorted(found.masked))}")
    return lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("memory")
    if marker and "memory" in metafunc.fixturenames:
        assert set(marker.args) <= set(support.KINDS), f"memory kinds are {support.KINDS}"
        metafunc.parametrize("memory", marker.args, indirect=True)


def missing_requirement(*wanted: Feature | str) -> str | None:
    """Why a test that needs `wanted` cannot run here, and the cure; None: it can."""
    found = features.probe()
    if not found.way:
        cures = "; ".join(command for cure in features.cures(found) for command in cure.commands)
        return f"userfaultfd is not available; {cures}"
    for one in wanted:
        if one == "PAGEMAP_SCAN":
            if not found.pagemap_scan:
                return "PAGEMAP_SCAN is missing; use Linux 6.7 or later"
        elif isinstance(one, Feature):
            if one & ~found.features:
                return f"userfaultfd lacks {one & ~found.features!r}; use a newer kernel"
        else:
            raise pytest.UsageError(f"requires({one!r}): neither a Feature nor 'PAGEMAP_SCAN'")
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("needs root; run as root")
    for marker in item.iter_markers("requires"):
        if reason := missing_requirement(*marker.args):
            pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        reason = str(call.excinfo.value) if call.excinfo else "skipped"
        if not re.search(r"could not import|from 3\.12 on", reason):
            report.outcome = "failed"
            report.longrepr = f"UFFD_VM_REQUIRE=all, but skipped: {reason}"
    return report


# --- memory and descriptors that go away with the test


@pytest.fixture
def _areas() -> Iterator[list[support.Area]]:
    areas: list[support.Area] = []
    yield areas
    for fd in {area.fd for area in areas if area.fd >= 0}:
        os.close(fd)
    for area in areas:
        area.unmap()


@pytest.fixture
def open_uffd(_areas: list[support.Area]) -> Iterator[Callable[..., Uffd]]:
    """open_uffd(features, **as Uffd.open): closed after the test, before memory is unmapped.

    So every thread that still waits in a page is let go, and no unmapping waits for an event to be read.
    """
    if reason := missing_requirement():
        pytest.skip(reason)
    opened: list[Uffd] = []

    def open_one(*args, **kwargs) -> Uffd:
        opened.append(Uffd.open(*args, **kwargs))
        return opened[-1]

    yield open_one
    for uffd in opened:
        uffd.close()


@pytest.fixture
def memory(
    request: pytest.FixtureRequest, _areas: list[support.Area]
) -> Iterator[Callable[..., support.Area]]:
    """memory(nr_pages, kind=None, **as map_area): fresh memory of the test's kind, unmapped after it.

    `memory.kind` is the kind that the marker `memory` gave, or "anon".
    """
    marked = getattr(request, "param", "anon")
    if reason := missing_requirement(support.KIND_FEATURES[marked]):
        pytest.skip(reason)

    def map_one(nr_pages: int = 4, kind: str | None = None, **kwargs) -> support.Area:
        _areas.append(support.map_area(kind or marked, nr_pages, **kwargs))
        return _areas[-1]

    map_one.kind = marked
    if marked != "hugetlb":
        yield map_one
        return
    with support.huge_page_pool(32) as there:
        if not there:
            pytest.skip("no huge pages; as root: sysctl vm.nr_hugepages=32")
        yield map_one
        while _areas:
            _areas.pop().unmap()


@pytest.fixture
def swap(tmp_path: Path) -> Iterator[None]:
    """Memory can be swapped out: `support.page_out()`. For tests marked root."""
    with support.swap_space(tmp_path) as why_not:
        if why_not:
            pytest.skip(f"{why_not}; use pytest --basetemp on ext4 or xfs")
        yield


@pytest.fixture
def run_in_child() -> Callable[..., support.ChildResult]:
    return support.run_in_child


# --- nothing is left behind


def _fds() -> Counter[str]:
    names: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        try:
            names[re.sub(r"\d+", "N", os.readlink(f"/proc/self/fd/{fd}"))] += 1
        except FileNotFoundError:
            pass  # the one that listed them
    return names


def _threads() -> Counter[str]:
    names: Counter[str] = Counter()
    for task in Path("/proc/self/task").iterdir():
        try:
            names[(task / "comm").read_text().strip()] += 1
        except (FileNotFoundError, ProcessLookupError):
            pass
    return names


def _children() -> Counter[str]:
    names: Counter[str] = Counter()
    for child in psutil.Process().children():
        try:
            command = " ".join(child.cmdline()) or f"zombie {child.name()}"
        except psutil.Error:
            continue
        if "multiprocessing.resource_tracker" not in command:
            names[command] += 1
    return names


def _native() -> dict[str, int]:
    """The library's own count of what it holds."""
    if not hasattr(lib, "uvm_process_stats"):
        return {}
    stats = ffi.new("struct uvm_process_stats *")
    lib.uvm_process_stats(stats)
    return {name: getattr(stats, name) for name, _ in ffi.typeof("struct uvm_process_stats").fields}


def _left(before: Counter[str], after: Counter[str], allowed: int) -> str | None:
    more = after - before
    return (
        ", ".join(f"{n} x {name}" for name, n in more.items()) if more.total() > allowed else None
    )


@pytest.fixture(autouse=True)
def leaks_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves descriptors, threads, registered mappings, regions or children behind.

    What the library keeps per process (its service threads and their descriptors, started by the
    first region) it reports in uvm_process_stats(), and that is no leak.
    """
    marker = request.node.get_closest_marker("leaves")
    ignored = set(marker.args) if marker else set()
    fds, threads, children = _fds(), _threads(), _children()
    native = _native()
    nr_registered = len(mapping.registered_vmas())
    yield
    end = time.monotonic() + 3
    while True:
        now = _native()
        grown = {key: now[key] - native[key] for key in now}
        left = {
            "fds": _left(fds, _fds(), grown.get("nr_fds", 0)),
            "threads": _left(threads, _threads(), grown.get("nr_threads", 0)),
            "children": _left(children, _children(), 0),
            "regions": grown.get("nr_regions", 0) or None,
            "caches": grown.get("nr_caches", 0) or None,
        }
        left = {what: names for what, names in left.items() if names and what not in ignored}
        if not left and "mappings" not in ignored:
            registered = mapping.registered_vmas()
            if len(registered) > nr_registered:
                left["mappings"] = ", ".join(
                    f"{v.start:#x}-{v.end:#x} {v.path}" for v in registered
                )
        if not left or time.monotonic() > end:
            break
        gc.collect()
        time.sleep(0.02)
    assert not left, f"left behind: {left}"


def pytest_sessionstart() -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # A job of a shell in the background ignores Ctrl-C, and so would the programs that the tests start.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    features.probe()
