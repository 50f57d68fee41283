"""Next to what a Python user picks today: np.memmap, over a FUSE mount or on the local file."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.floor import BUILD, PAGE, Floor, Handler, warm
from benchmarks.library import Region, Unavailable
from benchmarks.measure import (
    Options,
    Round,
    Runner,
    Slices,
    interleave,
    latency_round,
    random_touches,
    unavailable,
)
from benchmarks.report import Bound, Row, make_row
from benchmarks.scan import missing_scan

MOUNT_SECONDS = 10.0
#: Where the toucher runs. A peer's server runs wherever the kernel likes.
PLACES: tuple[tuple[str, int | None], ...] = (("pinned", machine.CPUS[0]), ("floating", None))
#: What plain C reaches in the same run.
C_HANDLERS: tuple[tuple[str, Handler, int | None], ...] = (
    ("C handler, same CPU", Handler.THREAD, machine.CPUS[0]),
    ("C SIGBUS handler", Handler.SIGBUS, None),
)


class Memmap:
    """np.memmap of a file, as something to touch."""

    def __init__(self, path: Path, *, advice: int | None) -> None:
        import numpy as np

        self._array: Any = None
        self._array = np.memmap(path, dtype=np.uint8, mode="r")
        if advice is not None:
            mapping: Any = self._array._mmap
            mapping.madvise(advice)
        self.address = int(self._array.ctypes.data)

    def reset(self) -> None:
        """Each round has a fresh mapping (and a fresh mount); there is nothing to drop."""

    def active(self) -> AbstractContextManager[None]:
        return nullcontext()

    def faults(self) -> int | None:
        return None

    def close(self) -> None:
        self._array = None


def requirements() -> str | None:
    """Why the FUSE rows cannot run here, if they cannot."""
    if shutil.which("bindfs") is None:
        return "bindfs is not installed (Debian: apt install bindfs)"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse cannot be opened (modprobe fuse; root, or a user that may mount FUSE)"
    if _unmount_command() is None:
        return "neither root nor fusermount3 (Debian: apt install fuse3)"
    try:
        import numpy  # noqa: F401
    except ImportError:
        return "numpy is not installed (pip install numpy)"
    return None


def _unmount_command() -> list[str] | None:
    if os.geteuid() == 0:
        return ["umount", "--lazy"]
    for name in ("fusermount3", "fusermount"):
        if shutil.which(name):
            return [name, "-u", "-z"]
    return None


@contextmanager
def fuse_mount(source: Path) -> Iterator[Path]:
    """`source` through a C FUSE file system that only passes calls on."""
    target = BUILD / "mount"
    target.mkdir(parents=True, exist_ok=True)
    unmount = _unmount_command()
    if unmount is None:
        raise Unavailable("nothing to unmount with")
    if target.is_mount():  # left by a run that was killed
        subprocess.run([*unmount, str(target)], check=True)
    server = subprocess.Popen(["bindfs", "-f", "--multithreaded", str(source), str(target)])
    try:
        deadline = time.monotonic() + MOUNT_SECONDS
        while not target.is_mount():
            if server.poll() is not None or time.monotonic() > deadline:
                raise Unavailable(f"bindfs did not mount (exit status {server.poll()})")
            time.sleep(0.01)
        yield target
    finally:
        if target.is_mount():
            subprocess.run([*unmount, str(target)], check=True)
        try:
            server.wait(MOUNT_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def over_fuse(
    options: Options, advice: int | None, measure: Callable[[Memmap, int], Round]
) -> Runner:
    """One fresh mount per round: nothing is in the mount's own page cache."""
    path = machine.data_file(options.file_bytes)

    def run(number: int) -> Round:
        if reason := requirements():
            raise Unavailable(reason)
        with fuse_mount(path.parent) as mount:
            mapped = Memmap(mount / path.name, advice=advice)
            try:
                return measure(mapped, number)
            finally:
                mapped.close()

    return run


def on_local_file(
    options: Options, advice: int | None, measure: Callable[[Memmap, int], Round]
) -> Runner:
    path = machine.data_file(options.file_bytes)

    def run(number: int) -> Round:
        mapped = Memmap(path, advice=advice)
        try:
            return measure(mapped, number)
        finally:
            mapped.close()

    return run


def run(options: Options) -> list[Row]:
    path = machine.data_file(options.file_bytes)
    machine.read_once(path)
    return random_rows(options, path) + sequential_rows(options, path)


def random_rows(options: Options, path: Path) -> list[Row]:
    def touches(cpu: int | None) -> Callable[[Memmap, int], Round]:
        def measure(mapped: Memmap, number: int) -> Round:
            chosen = machine.random_pages(number, options.pages, options.touches)
            # A page of a mount or of a local file may be present already: that is the peer's merit.
            return latency_round(
                mapped,
                [page * PAGE for page in chosen],
                expected=machine.page_words(chosen),
                cpu=cpu,
                from_missing=False,
            )

        return measure

    with ExitStack() as stack:
        runners: dict[str, Runner] = {}
        for service in ("native", "inline"):
            region: Region | Exception
            try:
                region = stack.enter_context(
                    options.library.map_file(path, service=service, one_page=True)
                )
            except Exception as error:
                for name, _ in PLACES:
                    runners[f"{service}, {name}"] = unavailable(error)
            else:
                for name, cpu in PLACES:
                    runners[f"{service}, {name}"] = random_touches(options, region, cpu=cpu)
        for name, cpu in PLACES:
            runners[f"fuse, {name}"] = over_fuse(options, mmap.MADV_RANDOM, touches(cpu))
        for name, handler, cpu in C_HANDLERS:
            floor = stack.enter_context(Floor(path, options.file_bytes, handler=handler, cpu=cpu))
            runners[name] = random_touches(options, floor, cpu=PLACES[0][1])
        runners["local"] = on_local_file(options, mmap.MADV_RANDOM, touches(None))
        results = interleave(options, runners)
    rows = [
        make_row(
            f"random 4 KiB, {service}, {name}",
            "us",
            results[f"{service}, {name}"],
            results[f"fuse, {name}"],
            Bound(limit, on="speedup", better="higher"),
            "floor: np.memmap, MADV_RANDOM, over a fresh bindfs --multithreaded mount; placed alike",
        )
        for service, limit in (("native", 2.0), ("inline", 2.5))
        for name, _ in PLACES
    ]
    rows += [
        make_row(
            f"random 4 KiB, {name}",
            "us",
            results[name],
            results["fuse, pinned"],
            note="not part of uffd_vm: how far a userfaultfd handler can be ahead of this FUSE here",
        )
        for name, _, _ in C_HANDLERS
    ]
    rows.append(
        make_row(
            "random 4 KiB, np.memmap of the local file",
            "us",
            results["local"],
            results["fuse, floating"],
            note="not part of uffd_vm: for a plain local file this is the right tool",
        )
    )
    return rows


def sequential_rows(options: Options, path: Path) -> list[Row]:
    slices = Slices.of(options)

    def reads(mapped: Memmap, number: int) -> Round:
        warm(slices.nbytes + 64 * machine.MIB)
        return slices.scan(mapped.address, number)

    with ExitStack() as stack:
        runners: dict[str, Runner] = {}
        for service in ("native", "inline"):
            try:
                region = stack.enter_context(options.library.map_file(path, service=service))
            except Exception as error:
                runners[service] = unavailable(error)
            else:
                runners[service] = missing_scan(slices, region)
        runners["fuse"] = over_fuse(options, None, reads)
        runners["local"] = on_local_file(options, None, reads)
        results = slices.interleave(options, runners)
    rows = [
        make_row(
            f"sequential, {service}",
            "GB/s",
            results[service],
            results["fuse"],
            Bound(1.0, better="higher"),
            "floor: np.memmap, default advice, over a fresh bindfs --multithreaded mount",
        )
        for service in ("native", "inline")
    ]
    rows.append(
        make_row(
            "sequential, np.memmap of the local file",
            "GB/s",
            results["local"],
            results["fuse"],
            note="not part of uffd_vm: for a plain local file this is the right tool",
        )
    )
    return rows
