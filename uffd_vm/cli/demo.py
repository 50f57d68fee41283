"""`scripts/demo`: the library at work on one .npy file, in figures that this machine produces.

Usage: python -m uffd_vm.cli.demo [FILE]. Without FILE it makes a 1 GiB array once, in $XDG_CACHE_HOME/uffd_vm
or ./build. Every step prints what it did; the heat map goes to a picture beside the array. Bad input ends
in one line and exit status 2.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import uffd_vm as uv
from uffd_vm.config import memory_limit
from uffd_vm.fault.pte import MAPPED, PteState
from uffd_vm.page import PAGE_SIZE
from uffd_vm.stats import human_size

__all__ = ["main"]

NR_COLUMNS = 16
NR_SAMPLED = 100
#: A column of a row-by-row file has a value on each page: of larger files only the beginning is read.
MAX_COLUMN_SPAN = 1 << 30
#: Pixels a side of the picture.
PICTURE = 1024

Array = npt.NDArray[Any]


class BadInput(click.ClickException):
    """Something that the user can mend: one line, exit status 2."""

    exit_code = 2


# --- the file -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NpyFile:
    """Where the array lies in its file."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: str  # "C" or "F"
    offset: int  # bytes

    @classmethod
    def of(cls, path: Path) -> NpyFile:
        """Reads the header. Raises BadInput."""
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        except (ValueError, EOFError) as error:
            raise BadInput(f"{path}: no .npy array that can be mapped: {error}") from error
        if array.size == 0:
            raise BadInput(f"{path}: the array is empty (shape {array.shape})")
        if array.dtype.kind not in "biuf":
            raise BadInput(
                f"{path}: dtype {array.dtype} has no statistics; give an array of numbers"
            )
        order = "C" if array.flags.c_contiguous else "F"
        return cls(path, array.dtype, array.shape, order, int(array.offset))

    @property
    def nbytes(self) -> int:
        return int(self.dtype.itemsize * np.prod(self.shape))

    def table(self, region: uv.Region) -> Array:
        """The array over a region that maps the file from its first page: rows and columns, no copy."""
        array = region.array(self.dtype, self.shape, offset=self.offset, order=self.order)  # type: ignore[arg-type]
        if array.ndim == 2:
            return array
        if self.order == "C" and array.ndim > 1:
            return array.reshape(array.shape[0], -1)
        return array.reshape((array.shape[0] if array.ndim else 1, -1), order="F")


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "uffd_vm" if base else Path("build")


def make_array(console: Console, mib: int) -> NpyFile:
    """The array of the demo: float32, each column in one piece. Made once."""
    shape = ((mib << 20) // 4 // NR_COLUMNS, NR_COLUMNS)
    path = cache_directory() / f"demo-{mib}MiB.npy"
    if path.exists():
        try:
            found = NpyFile.of(path)
        except BadInput:
            path.unlink()
        else:
            if (found.shape, found.order, found.dtype) == (shape, "F", np.dtype("<f4")):
                return found
    path.parent.mkdir(parents=True, exist_ok=True)
    need = (mib << 20) + (16 << 20)
    if shutil.disk_usage(path.parent).free < need:
        raise BadInput(
            f"{path.parent} has no {human_size(need)} free; set XDG_CACHE_HOME to a directory that has, "
            "or give a .npy file"
        )
    scratch = path.with_suffix(f".{os.getpid()}")
    try:
        _write_array(console, scratch, shape)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return NpyFile.of(path)


def _write_array(console: Console, path: Path, shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    header = {"descr": "<f4", "fortran_order": True, "shape": shape}
    rows, columns = shape
    piece = 1 << 20
    with open(path, "wb") as file, Progress(console=console, transient=True) as progress:
        np.lib.format.write_array_header_1_0(file, header)
        bar = progress.add_task(f"making {human_size(rows * columns * 4)}", total=rows * columns)
        for column in range(columns):
            for start in range(0, rows, piece):
                n = min(piece, rows - start)
                file.write((random.standard_normal(n, dtype="f4") + column).data)
                progress.advance(bar, n)


# --- the steps ------------------------------------------------------------------------------------


def _table(*columns: str) -> Table:
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


@contextmanager
def _mapped(file: NpyFile, **arguments: Any) -> Iterator[tuple[uv.Region, Array]]:
    """A region and its array, which has to be gone before the region can be closed."""
    with uv.map(file.path, **arguments) as region:
        holder = [file.table(region)]
        try:
            yield region, holder[0][:]
        finally:
            holder.clear()


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def first_element(console: Console, file: NpyFile) -> None:
    """How long from opening the file to its first value."""

    def ours() -> None:
        with uv.map(file.path, service="native") as region:
            float(file.table(region)[0, 0])

    table = _table("how", "time")
    rows: list[tuple[str, Callable[[], object]]] = [
        ('uffd_vm, service="native"', ours),
        ('np.load(mmap_mode="r")', lambda: np.load(file.path, mmap_mode="r").flat[0]),
    ]
    if file.nbytes < memory_limit() // 2:
        rows.append(("np.load(): all of it", lambda: np.load(file.path).flat[0]))
    for name, work in rows:
        table.add_row(name, f"{_seconds(work) * 1e3:.2f} ms")
    console.print("[bold]From opening the file to its first element[/]", table)
    console.print(
        "[dim]A local file in the page cache: here the kernel's own mmap is the fastest way, and the one "
        'that service="auto" takes.[/]\n'
    )


def _describe(values: Array) -> tuple[str, ...]:
    v = values.astype("f8")
    return tuple(f"{x:.6g}" for x in (v.mean(), v.std(), v.min(), v.max()))


def column_length(file: NpyFile, table: Array) -> int:
    """Rows of a column whose pages are read: all, save in large files that are stored row by row."""
    return int(min(table.shape[0], max(1, MAX_COLUMN_SPAN // max(1, table.strides[0]))))


def statistics(console: Console, file: NpyFile, region: uv.Region, table: Array) -> None:
    """Plain NumPy over lazy memory, checked against np.load(mmap_mode="r")."""
    reference = np.load(file.path, mmap_mode="r")
    reference = reference.reshape(table.shape, order="F" if file.order == "F" else "C")
    rows = np.sort(np.random.default_rng(1).integers(0, table.shape[0], NR_SAMPLED))
    column, length = table.shape[1] // 2, column_length(file, table)

    part = "" if length == len(table) else f", first {length:,} rows"
    picks: list[tuple[str, Literal["random", "sequential"], Callable[[Array], Array]]] = [
        (f"{NR_SAMPLED} random rows", "random", lambda a: a[rows]),
        (f"column {column}{part}", "sequential", lambda a: a[:length, column]),
    ]
    out = _table("of", "values", "mean", "std", "min", "max", "time")
    same = True
    for name, advice, pick in picks:
        region.advise(advice)
        start = time.perf_counter()
        values = pick(table)
        described = _describe(values)
        took = time.perf_counter() - start
        out.add_row(name, f"{values.size:,}", *described, f"{took * 1e3:.1f} ms")
        same &= np.array_equal(values, pick(reference), equal_nan=file.dtype.kind == "f")
    region.advise("normal")
    console.print("[bold]Statistics, by plain NumPy[/]", out)
    console.print(f'Same values as np.load(mmap_mode="r"): {"yes" if same else "NO"}\n')
    if not same:
        raise click.ClickException(
            "the mapped values differ from the file's: a bug, please report it"
        )


def numbers(console: Console, region: uv.Region) -> None:
    """What those touches cost."""
    residency, stats = region.residency(), region.stats()
    out = _table("what", "bytes", "of it")
    for name, nbytes in (
        ("mapped: the whole file", region.nbytes),
        ("touched: in this process's page table", residency.mapped_bytes),
        ("resident: takes memory", residency.resident_bytes),
        ("read from the file", stats["bytes_read"]),
    ):
        out.add_row(name, human_size(nbytes), f"{nbytes / region.nbytes:.1%}")
    console.print("[bold]The region[/]", out)

    out = _table("kind", "number")
    for counter in (
        "pgfault",
        "pgmajfault",
        "pgminfault",
        "pgfault_failed",
        "map_around",
        "readahead",
    ):
        out.add_row(_COUNTERS[counter], f"{stats[counter]:,}")
    last = region.trace()
    kinds = Counter((record.kind.name, record.access.name) for record in last)
    for (kind, access), number in sorted(kinds.items()):
        out.add_row(f"of the last {len(last):,}: {kind} {access}", f"{number:,}")
    out.add_row("latency p50", f"{stats.latency.p50 / 1e3:.1f} us")
    out.add_row("latency p99", f"{stats.latency.p99 / 1e3:.1f} us")
    console.print("[bold]Its faults[/]", out, "")


_COUNTERS = {
    "pgfault": "faults (pgfault)",
    "pgmajfault": "that read the file (pgmajfault)",
    "pgminfault": "that did not (pgminfault)",
    "pgfault_failed": "that failed (pgfault_failed)",
    "map_around": "pages mapped around them (map_around)",
    "readahead": "pages asked for ahead (readahead)",
}


def private_writes(console: Console, file: NpyFile) -> None:
    """Mode "c": what is written stays in this process."""
    with _mapped(file, mode="c", service="native") as (region, table):
        nbytes = min(64 * PAGE_SIZE, file.nbytes)
        before = _file_bytes(file, nbytes)
        flat = np.frombuffer(region.buffer, np.uint8, nbytes, file.offset)
        flat ^= 0xFF
        changed = int(np.count_nonzero(flat != np.frombuffer(before, np.uint8)))
        same = _file_bytes(file, nbytes) == before
        dirty = region.residency().dirty_bytes
        del flat, table
    console.print(
        f'[bold]Private writes[/] (mode "c"): {changed:,} bytes changed in memory, {human_size(dirty)} of '
        f"private pages; the file's own bytes are {'the same' if same else 'DIFFERENT'}\n"
    )
    if not same:
        raise click.ClickException("a private write reached the file: a bug, please report it")


def _file_bytes(file: NpyFile, nbytes: int) -> bytes:
    with open(file.path, "rb") as f:
        return os.pread(f.fileno(), nbytes, file.offset)


def one_fault(console: Console, file: NpyFile) -> None:
    """A single fault, served by the Python service and explained step by step."""
    with _mapped(file, service="python") as (region, table):
        value = float(table[table.shape[0] // 2, 0])
        record = _last_record(region)
        del table
    console.print('[bold]One fault[/], served by the Python service (service="python"):')
    console.print(f"the program reads {value:.6g}")
    console.print(str(record), highlight=False)
    console.print(str(record.walk), highlight=False)
    console.print("")


def _last_record(region: uv.Region) -> uv.TraceRecord:
    """Of the fault that was just served: it is written a moment after the thread was woken."""
    until = time.monotonic() + 5
    while not (records := region.trace()) and time.monotonic() < until:
        time.sleep(0.001)
    return records[-1]


# --- the heat map ---------------------------------------------------------------------------------

_TOUCHED = bytes(int(i in {int(state) for state in MAPPED}) for i in range(256))
_CACHED = bytes(int(i == PteState.CACHED) for i in range(256))


def heat(region: uv.Region, nr_cells: int) -> npt.NDArray[np.float64]:
    """Touched fraction of `nr_cells` equal parts of the region."""
    states = region.residency().pages()
    touched = np.frombuffer(states.translate(_TOUCHED), np.uint8)
    cached = np.frombuffer(states.translate(_CACHED), np.uint8)
    seen = np.maximum(touched, cached)
    edges = np.linspace(0, len(seen), min(nr_cells, len(seen)) + 1).astype(int)
    heated: npt.NDArray[np.float64] = np.add.reduceat(seen, edges[:-1], dtype="f8") / np.diff(edges)
    return heated


def heat_map(console: Console, region: uv.Region, path: Path) -> None:
    """The picture, and a strip of it for the terminal."""
    strip = heat(region, 64)
    shades = " .:-=+*#%@"
    text = "".join(shades[min(9, int(np.ceil(part * 9)))] for part in strip)
    console.print("[bold]What was touched[/], from the first page to the last:")
    console.print(f"|{text}|", highlight=False, markup=False)
    try:
        from PIL import Image
    except ImportError:
        console.print("No picture: pillow is missing (pip install 'uffd_vm[demo]')")
        return
    side = 1 << max(0, (min(512 * 512, region.nr_pages).bit_length() - 1) // 2)
    cells = heat(region, side * side)
    cold, hot = np.array([20, 24, 40]), np.array([255, 170, 40])
    pixels = np.zeros((side * side, 3))
    pixels[: len(cells)] = cold + (hot - cold) * np.sqrt(cells)[:, None]
    image = Image.fromarray(pixels.reshape(side, side, 3).astype(np.uint8))
    image.resize((PICTURE, PICTURE), Image.Resampling.NEAREST).save(path)
    console.print(f"The same as a picture, {len(cells):,} cells, row by row: {path}\n")


# --- all of it ------------------------------------------------------------------------------------


def run(console: Console, file: NpyFile, picture: Path) -> None:
    shape = " x ".join(map(str, file.shape))
    console.print(
        f"[bold]{file.path}[/]: {shape} {file.dtype}, {human_size(file.nbytes)}, "
        f"{'row' if file.order == 'C' else 'column'} by {'row' if file.order == 'C' else 'column'}\n"
    )
    first_element(console, file)
    with _mapped(file, service="native") as (region, table):
        console.print(str(region), highlight=False, markup=False)
        console.print(f"served by {region.service}: {region.service_reason}\n")
        statistics(console, file, region, table)
        numbers(console, region)
        del table
        heat_map(console, region, picture)
    private_writes(console, file)
    one_fault(console, file)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--mib", default=1024, show_default=True, type=click.IntRange(1, 1 << 20),
              help="Size of the array that is made where no FILE is given.")  # fmt: skip
def main(file: Path | None, mib: int) -> None:
    """Show the library at work on FILE (.npy), or on an array that is made once."""
    console = Console()
    start = time.perf_counter()
    try:
        npy = NpyFile.of(file) if file is not None else make_array(console, mib)
        directory = cache_directory()
        directory.mkdir(parents=True, exist_ok=True)
        run(console, npy, directory / "heatmap.png")
    except (uv.UffdVmError, OSError) as error:
        raise BadInput(f"{type(error).__name__}: {error}") from error
    console.print(f"[dim]{time.perf_counter() - start:.1f} s in all[/]")


if __name__ == "__main__":
    main(prog_name="demo")
