"""`scripts/demo`: the library at work on one .npy file, in figures that this machine produces.

Usage: python -m uffd_vm.cli.demo [FILE]. Without FILE it makes a 1 GiB array once, in $XDG_CACHE_HOME/uffd_vm
or ./build. Every step prints what it did; the heat map goes to a picture beside the array. Bad input ends
in one line and exit status 2.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import textwrap
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
from rich import box
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
#: Values that are copied at once.
MAX_VALUES = 1 << 24
#: Larger files are not read whole to show how long np.load() takes.
MAX_LOAD = 2 << 30
#: How often a file is opened to time it.
NR_OPENS = 9
#: Pixels: a side of the picture, the height of the legend below it, the length of its colour key.
PICTURE, LEGEND, KEY = 1024, 48, 200
COLD, HOT = np.array([20.0, 24, 40]), np.array([255.0, 170, 40])

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
        if path.exists() and not path.is_file():  # opening a FIFO would wait for ever
            raise BadInput(f"{path}: a directory or a device; give a .npy file")
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        except (ValueError, EOFError) as error:
            raise BadInput(
                f"{path}: no .npy array that can be mapped: {str(error).rstrip('.')}. "
                "numpy.save() writes one"
            ) from error
        if array.size == 0:
            raise BadInput(f"{path}: the array is empty (shape {array.shape})")
        if array.dtype.kind not in "biuf":
            raise BadInput(
                f"{path}: dtype {array.dtype} has no mean and no order; give an array of bool, "
                "integers or floats"
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


def _title(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/]")


def _say(console: Console, text: str, indent: int = 0) -> None:
    """A paragraph as it stands: no markup, since names of files are in it."""
    width = min(console.width, 100) - indent
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    console.print(
        textwrap.indent("\n".join(lines), " " * indent),
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
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


def first_element(console: Console, file: NpyFile) -> None:
    """How long from opening the file to its first value. Closing is not counted."""

    def ours() -> float:
        start = time.perf_counter()
        with _mapped(file, service="native") as (_, table):
            float(table[0, 0])
            took = time.perf_counter() - start
            del table
        return took

    def numpys(mode: Literal["r"] | None) -> float:
        start = time.perf_counter()
        array = np.load(file.path, mmap_mode=mode)
        float(array.flat[0])
        return time.perf_counter() - start

    _file_bytes(file, 1)  # so that none of them has to wait for the disk
    first = ours()
    further = statistics.median(ours() for _ in range(NR_OPENS))
    table = _table("from opening the file to its first element", "ms")
    rows = [
        ("uv.map(), the first region of a process", first),
        ("uv.map(), each further one", further),
        ('np.load(mmap_mode="r")', statistics.median(numpys("r") for _ in range(NR_OPENS))),
    ]
    if file.nbytes < min(memory_limit() // 2, MAX_LOAD):
        rows.append(("np.load(), which reads all of it", numpys(None)))
    for name, seconds in rows:
        table.add_row(name, f"{seconds * 1e3:.2f}")
    _title(console, "1. The first element")
    console.print(table)
    _say(
        console,
        "The first region starts the fault service: threads, a userfaultfd. On a local file that is "
        "cached the kernel's own mmap is the fastest lazy way; uv.map() takes it by itself, unless it "
        "is asked for what only a fault service can tell or limit. So this demo asks for "
        'service="native".',
    )


def _described(values: Array) -> tuple[str, ...]:
    with np.errstate(all="ignore"):  # infinities have no standard deviation, and are no error
        described = (values.mean(dtype="f8"), values.std(dtype="f8"), values.min(), values.max())
    return tuple(f"{float(x):.4g}" for x in described)


def column_length(file: NpyFile, table: Array) -> int:
    """Rows of a column that are read: all, save of a large file that is stored row by row."""
    most = min(MAX_VALUES, MAX_COLUMN_SPAN // max(1, abs(table.strides[0])))
    return int(min(table.shape[0], max(1, most)))


def row_sample(table: Array) -> tuple[npt.NDArray[np.int64], int]:
    """Random rows, and how much of each: few of wide ones, so that the sample stays small."""
    width = min(table.shape[1], MAX_VALUES)
    number = max(1, min(NR_SAMPLED, MAX_VALUES // width))
    return np.sort(np.random.default_rng(1).integers(0, table.shape[0], number)), width


def numpy_statistics(console: Console, file: NpyFile, region: uv.Region, table: Array) -> None:
    """Plain NumPy over lazy memory, checked against np.load(mmap_mode="r")."""
    reference = np.load(file.path, mmap_mode="r")
    reference = reference.reshape(table.shape, order="F" if file.order == "F" else "C")
    rows, width = row_sample(table)
    column, length = table.shape[1] // 2, column_length(file, table)
    picks: list[tuple[str, Literal["random", "sequential"], Callable[[Array], Array]]] = [
        (f"{len(rows)} random rows", "random", lambda a: a[rows, :width]),
        (f"column {column}", "sequential", lambda a: a[:length, column]),
    ]
    out = _table("", "values", "mean", "std", "min", "max", "ms")
    same = True
    for name, advice, pick in picks:
        region.advise(advice)
        start = time.perf_counter()
        values = pick(table)
        described = _described(values)
        took = time.perf_counter() - start
        out.add_row(name, f"{values.size:,}", *described, f"{took * 1e3:.1f}")
        same &= np.array_equal(values, pick(reference), equal_nan=file.dtype.kind == "f")
    region.advise("normal")
    _title(console, "2. Statistics, by plain NumPy over the lazy array")
    console.print(out)
    if width < table.shape[1]:
        _say(console, f"Of each row the first {width:,} values.")
    if length < len(table):
        _say(console, f"Of the column the first {length:,} values.")
    _say(console, f'Same values as np.load(mmap_mode="r"): {"yes" if same else "NO"}')
    if not same:
        raise click.ClickException(
            "the mapped values differ from the file's: a bug, please report it"
        )


def memory(console: Console, region: uv.Region) -> None:
    """How much of the file that took."""
    residency, stats = region.residency(), region.stats()
    out = _table("bytes", "", "of the file")
    for name, nbytes in (
        ("mapped", region.nbytes),
        ("read from the file", stats["bytes_read"]),
        ("touched: in this process's page table", residency.mapped_bytes),
        ("resident: takes memory", residency.resident_bytes),
    ):
        out.add_row(name, human_size(nbytes), f"{nbytes / region.nbytes:.1%}")
    _title(console, "3. The memory that this took")
    console.print(out)


def faults(console: Console, region: uv.Region) -> None:
    """What the processor and the service did for it."""
    stats, last = region.stats(), region.trace()
    out = _table("faults", "")
    for counter, meaning in _COUNTERS.items():
        out.add_row(f"{counter:<15} {meaning}", f"{stats[counter]:,}")
    kinds = Counter((record.kind.name, record.access.name) for record in last)
    for (kind, access), number in sorted(kinds.items()):
        out.add_row(f"{kind} {access} among the last {len(last):,}", f"{number:,}")
    out.add_row("latency p50, from message to wake-up", f"{stats.latency.p50 / 1e3:.1f} us")
    out.add_row("latency p99", f"{stats.latency.p99 / 1e3:.1f} us")
    _title(console, "4. Its faults")
    console.print(out)
    _say(
        console,
        "Major means that content was read from the file, be it from the disk or from the kernel's "
        "page cache. Where the kernel had it the service did not wait: the kernel's own count of this "
        f"process, which is of waits for the disk, rose by {_kernel_major() - _MAJOR_AT_START:,}.",
    )


_COUNTERS = {
    "pgfault": "all that were answered",
    "pgmajfault": "major: content was read from the file",
    "pgminfault": "minor: it was there",
    "pgfault_failed": "failed",
    "map_around": "pages that came with a fault, around it",
    "readahead": "pages that were read ahead of a fault",
}


def _kernel_major() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


_MAJOR_AT_START = _kernel_major()


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
    _title(console, '6. Private writes: uv.map(mode="c")')
    _say(
        console,
        f"{changed:,} bytes changed in memory, which made {human_size(dirty)} of private pages. "
        f"The file's own bytes are {'the same' if same else 'DIFFERENT'}.",
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
        record = region.trace()[-1]
        del table
    _title(console, '7. One fault, step by step: uv.map(service="python")')
    _say(
        console,
        f"The program reads {value:.6g}, on page {record.index}. The Python service, the readable "
        f"reference of the native one, fills {record.nr_pages} pages around it, after "
        f"{record.latency_ns / 1e3:.0f} us. The functions are those of mm/memory.c.",
    )
    console.print(f"\n{record.walk}", highlight=False, markup=False)


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


def _cell(region: uv.Region, nr_cells: int) -> str:
    pages = region.nr_pages / nr_cells
    if pages < 1.5:
        return "one page"
    return f"about {pages:,.0f} pages ({human_size(pages * PAGE_SIZE)})"


def heat_map(console: Console, file: NpyFile, region: uv.Region, path: Path) -> None:
    """The picture, and a strip of it for the terminal."""
    strip = heat(region, 64)
    shades = " .:-=+*#%@"
    text = "".join(shades[min(9, int(np.ceil(part * 9)))] for part in strip)
    _title(console, "5. What was touched, from the first page of the file to the last")
    console.print(f"|{text}|", highlight=False, markup=False)
    _say(
        console,
        f"A character is {_cell(region, len(strip))}. Blank: none of them was touched; . the least "
        f"part; {shades[1:]} more and more; @ all.",
    )
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        _say(console, "No picture: pillow is missing. pip install 'uffd_vm[demo]'")
        return
    side = 1 << max(0, (min(512 * 512, region.nr_pages).bit_length() - 1) // 2)
    cells = heat(region, side * side)
    pixels = np.full((side * side, 3), COLD)
    pixels[: len(cells)] = COLD + (HOT - COLD) * np.sqrt(cells)[:, None]
    squares = Image.fromarray(pixels.reshape(side, side, 3).astype(np.uint8))
    image = Image.new("RGB", (PICTURE, PICTURE + LEGEND), "white")
    image.paste(squares.resize((PICTURE, PICTURE), Image.Resampling.NEAREST))
    draw, font, y = ImageDraw.Draw(image), ImageFont.load_default(14), PICTURE + 6
    scale = f"{side} x {side} cells, each {_cell(region, len(cells))}"
    what = f"{file.path.name}, {human_size(region.nbytes)}: {scale}. "
    where = "The file begins at the top left and goes row by row."
    draw.text((8, y), what + where, "black", font)
    for i in range(KEY):
        colour = COLD + (HOT - COLD) * np.sqrt(i / (KEY - 1))
        draw.line((8 + i, y + 22, 8 + i, y + 34), (int(colour[0]), int(colour[1]), int(colour[2])))
    draw.text((16 + KEY, y + 20), "no page of the cell touched ... all of them", "black", font)
    image.save(path)
    _say(console, f"As a picture, {scale}; orange is touched:")
    _say(console, str(path.resolve()), indent=2)


# --- all of it ------------------------------------------------------------------------------------


def run(console: Console, file: NpyFile, picture: Path) -> None:
    shape = " x ".join(map(str, file.shape)) or "one value"
    layout = "row by row" if file.order == "C" else "column by column"
    _say(console, str(file.path.resolve()))
    _say(console, f"{shape} of {file.dtype}, {human_size(file.nbytes)}, stored {layout}")
    first_element(console, file)
    with _mapped(file, service="native") as (region, table):
        numpy_statistics(console, file, region, table)
        del table
        memory(console, region)
        faults(console, region)
        heat_map(console, file, region, picture)
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
        if file is not None:
            npy = NpyFile.of(Path(os.environ.get("UFFD_VM_DEMO_FROM", ""), file))
        else:
            npy = make_array(console, mib)
        directory = cache_directory()
        directory.mkdir(parents=True, exist_ok=True)
        run(console, npy, directory / "heatmap.png")
    except (uv.UffdVmError, OSError) as error:
        raise BadInput(f"{type(error).__name__}: {error}") from error
    console.print(f"\n{time.perf_counter() - start:.1f} s in all", highlight=False)


if __name__ == "__main__":
    main(prog_name="demo")
