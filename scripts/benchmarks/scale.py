"""The same fault with many regions and in a huge one, and what mapping a huge one costs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from benchmarks import machine
from benchmarks.floor import PAGE, Floor, Handler
from benchmarks.library import Region, Regions
from benchmarks.measure import (
    Options,
    Round,
    Runner,
    Series,
    interleave,
    latency_round,
    random_touches,
    unavailable,
)
from benchmarks.report import Bound, Row, make_row

TOUCHER = machine.CPUS[0]
REGIONS = 1000
SMALL = machine.MIB
HUGE = machine.TIB
WINDOW = 2 * machine.MIB  # what one page-table page maps


def run(options: Options) -> list[Row]:
    machine.raise_file_limit(8 * REGIONS)
    return latency_rows(options) + mapping_rows(options)


def windows(options: Options, nbytes: int) -> list[int]:
    """Offsets of as many 2 MiB windows as the ordinary file has, spread over a huge one."""
    count = options.file_bytes // WINDOW
    return [WINDOW * i for i in random.Random(1).sample(range(nbytes // WINDOW), count)]


def latency_rows(options: Options) -> list[Row]:
    one = machine.data_file(options.file_bytes)
    many = machine.many_files(REGIONS, SMALL)
    huge = machine.sparse_file(HUGE)
    spread = windows(options, HUGE)
    scattered = [PAGE * page for page in machine.random_pages(2, HUGE // PAGE, options.touches)]
    for path in (one, *many):
        machine.read_once(path)
    machine.read_once(huge, [(offset, WINDOW) for offset in spread])
    machine.read_once(huge, [(offset, PAGE) for offset in scattered])

    def in_windows(number: int) -> list[int]:
        chosen = machine.random_pages(number, options.pages, options.touches)
        return [spread[p * PAGE // WINDOW] + p * PAGE % WINDOW for p in chosen]

    def everywhere(number: int) -> list[int]:
        return scattered

    def mapped(path: Path) -> Callable[[], Region]:
        return lambda: options.library.map_file(path, one_page=True)

    def floor(path: Path, nbytes: int) -> Callable[[], Floor]:
        return lambda: Floor(path, nbytes, handler=Handler.THREAD, cpu=TOUCHER)

    results = interleave(
        options,
        {
            "one": _once_open(options, mapped(one)),
            "many": _many_open(options, many),
            "windows": _huge_open(mapped(huge), in_windows),
            "scattered": _huge_open(mapped(huge), everywhere),
            "C many": _once_open(
                options,
                lambda: Floor(many, SMALL, handler=Handler.THREAD, cpu=TOUCHER),
                pages=REGIONS * SMALL // PAGE,
            ),
            "C one": _once_open(options, floor(one, options.file_bytes)),
            "C windows": _huge_open(floor(huge, HUGE), in_windows),
            "C scattered": _huge_open(floor(huge, HUGE), everywhere),
        },
    )
    base = results["C one"].median
    own = {
        name: f"{(results[name].median or 0) / base:.2f}x" if base else "not measured"
        for name in ("C many", "C windows", "C scattered")
    }
    floor_note = f"floor: the library with one {options.mib} MiB region"
    return [
        make_row(
            f"{REGIONS} regions of 1 MiB",
            "us",
            results["many"],
            results["one"],
            Bound(1.1),
            f"{floor_note}; the plain C handler's own ratio is {own['C many']}",
        ),
        make_row(
            "1 TiB sparse region, as many page tables",
            "us",
            results["windows"],
            results["one"],
            Bound(1.1),
            f"{floor_note}; touches fall in {len(spread)} windows of 2 MiB; "
            f"the plain C handler's own ratio is {own['C windows']}",
        ),
        make_row(
            "1 TiB sparse region, anywhere",
            "us",
            results["scattered"],
            results["one"],
            None,
            f"{floor_note}; each touch needs page tables and cache nodes of its own; "
            f"the plain C handler's own ratio is {own['C scattered']}",
        ),
        make_row("C handler, one region", "us", results["C one"]),
        make_row(f"C handler, {REGIONS} files of 1 MiB", "us", results["C many"]),
        make_row("C handler, 1 TiB, as many page tables", "us", results["C windows"]),
        make_row("C handler, 1 TiB, anywhere", "us", results["C scattered"]),
    ]


def _once_open(
    options: Options,
    make: Callable[[], AbstractContextManager[Region | Floor]],
    *,
    pages: int = 0,
) -> Runner:
    """A round with nothing else mapped; an untimed pass first makes the page tables."""

    def run(number: int) -> Round:
        with make() as subject:
            touches = random_touches(options, subject, cpu=TOUCHER, pages=pages)
            touches(number)
            return touches(number)

    return run


def _huge_open(
    make: Callable[[], AbstractContextManager[Region | Floor]],
    offsets: Callable[[int], list[int]],
) -> Runner:
    def run(number: int) -> Round:
        with make() as subject:
            for _ in range(2):
                figure = latency_round(subject, offsets(number), expected=0, cpu=TOUCHER)
        return figure

    return run


def _many_open(options: Options, paths: Sequence[Path]) -> Runner:
    pages_each = SMALL // PAGE

    def addresses(regions: Regions, chosen: Sequence[int]) -> list[int]:
        return [
            regions.regions[page // pages_each].address + page % pages_each * PAGE
            for page in chosen
        ]

    def run(number: int) -> Round:
        chosen = machine.random_pages(number, len(paths) * pages_each, options.touches)
        with options.library.map_files(paths, one_page=True) as regions:
            for _ in range(2):
                figure = latency_round(
                    regions,
                    addresses(regions, chosen),
                    expected=machine.page_words(chosen),
                    cpu=TOUCHER,
                )
        return figure

    return run


def mapping_rows(options: Options) -> list[Row]:
    """Mapping 1 TiB: how long, and what it leaves in memory."""
    huge = machine.sparse_file(HUGE)
    taken: list[tuple[float, float]] = []

    def run(number: int) -> Round:
        before = machine.resident_bytes()
        start = time.perf_counter_ns()
        region = options.library.map_file(huge)
        elapsed = time.perf_counter_ns() - start
        try:
            taken.append((elapsed / 1e6, (machine.resident_bytes() - before) / machine.MIB))
        finally:
            region.close()
        return Round(elapsed / 1e6)

    with ExitStack() as stack:
        try:  # what the first region of a process starts is not the price of a huge one
            stack.enter_context(options.library.map_file(machine.data_file(options.file_bytes)))
        except Exception as error:
            results = interleave(options, {"library": unavailable(error)})
        else:
            results = interleave(options, {"library": run})
    times = results["library"]
    memory = Series([Round(mib) for _, mib in taken[1:]], times.problem)
    note = "another region is mapped already"
    return [
        make_row("mapping 1 TiB, time", "ms", times, None, Bound(5.0, on="value"), note),
        make_row("mapping 1 TiB, memory", "MiB", memory, None, Bound(1.0, on="value"), note),
    ]
