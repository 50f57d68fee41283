"""A whole page-cached file, once per page, in order; a second mapping of what is there."""

from __future__ import annotations

from contextlib import ExitStack
from time import perf_counter_ns

from benchmarks import machine
from benchmarks.floor import Floor, Handler, PlainTmpfs, warm
from benchmarks.library import Region
from benchmarks.measure import (
    NotMeasured,
    Options,
    Round,
    Runner,
    Slices,
    Subject,
    interleave,
    scan_round,
    unavailable,
)
from benchmarks.report import Bound, Row, make_row

TOUCHER = machine.CPUS[0]


def run(options: Options) -> list[Row]:
    return first_rows(options) + second_rows(options)


def everything(options: Options) -> int:
    """The sum that a scan of the whole file must give."""
    return machine.page_words(range(options.pages))


def missing_scan(slices: Slices, subject: Subject, cpu: int | None = None) -> Runner:
    """From nothing to everything, by faults."""

    def run(number: int) -> Round:
        subject.reset()
        warm(slices.nbytes + 64 * machine.MIB)
        with machine.pinned(cpu), subject.active():
            figure = slices.scan(subject.address, number)
        subject.reset()  # its memory is the next participant's warm memory
        return figure

    return run


def filled_scan(slices: Slices, floor: Floor) -> Runner:
    """pread + COPY of everything without a fault, then the touches; the time of both."""

    def run(number: int) -> Round:
        floor.reset()
        warm(slices.nbytes + 64 * machine.MIB)
        start = perf_counter_ns()
        floor.fill(number % slices.count * slices.nbytes, slices.nbytes)
        slices.scan(floor.address, number)
        elapsed = perf_counter_ns() - start
        floor.reset()
        return Round(float(elapsed))

    return run


def first_rows(options: Options) -> list[Row]:
    path = machine.data_file(options.file_bytes)
    machine.read_once(path)
    slices = Slices.of(options)
    floors = {
        "on faults, same CPU": (Handler.THREAD, TOUCHER),
        "on faults, unpinned": (Handler.THREAD, None),
        "on faults, SIGBUS": (Handler.SIGBUS, None),
    }
    with ExitStack() as stack:
        runners: dict[str, Runner] = {}
        try:
            region = stack.enter_context(options.library.map_file(path))
        except Exception as error:
            runners["library"] = unavailable(error)
        else:
            runners["library"] = missing_scan(slices, region)
        for name, (handler, cpu) in floors.items():
            floor = stack.enter_context(
                Floor(path, options.file_bytes, handler=handler, block=machine.MIB, cpu=cpu)
            )
            runners[name] = missing_scan(slices, floor, cpu)
        bulk = stack.enter_context(
            Floor(path, options.file_bytes, handler=Handler.NONE, block=machine.MIB)
        )
        runners["in a loop, then touched"] = filled_scan(slices, bulk)
        results = slices.interleave(options, runners)
    candidates = [name for name in results if name != "library"]
    best = max(candidates, key=lambda name: results[name].median or 0.0)
    seen = ", ".join(f"{name} {results[name].median or 0:.2f}" for name in candidates)
    return [
        make_row(
            f"{options.mib} MiB once per page, defaults",
            "GB/s",
            results["library"],
            results[best],
            Bound(0.9, better="higher"),
            f"floor: pread + COPY of 1 MiB pieces, the fastest way ({seen} GB/s)",
        )
    ]


def second_rows(options: Options) -> list[Row]:
    """What is in the cache already, mapped once more; ns per page."""
    path = machine.data_file(options.file_bytes)
    machine.read_once(path)
    expected = everything(options)
    rows = []
    with ExitStack() as stack:
        plain = PlainTmpfs(options.file_bytes, b"\x01" * machine.MIB)
        stack.callback(plain.close)
        nothing = 0x01010101 * options.pages
        first: Region | Exception
        try:
            first = stack.enter_context(options.library.map_file(path))
            first.load()
        except Exception as error:
            first = error
        for mode, what in (("r", "MAP_SHARED"), ("c", "MAP_PRIVATE")):
            results = interleave(
                options,
                {
                    "library": unavailable(first)
                    if isinstance(first, Exception)
                    else _second_mapping(options, mode, expected),
                    "floor": _plain_mapping(options, plain, mode == "c", nothing),
                },
            )
            rows.append(
                make_row(
                    f'second mapping, mode "{mode}"',
                    "ns/page",
                    results["library"],
                    results["floor"],
                    Bound(1.2),
                    f"floor: a fresh {what} mapping of a full tmpfs file",
                )
            )
    return rows


def _second_mapping(options: Options, mode: str, expected: int) -> Runner:
    path = machine.data_file(options.file_bytes)

    def run(number: int) -> Round:
        with options.library.map_file(path, mode=mode) as second:
            if second.nbytes < options.file_bytes:
                raise NotMeasured(f"the second mapping has {second.nbytes} bytes")
            return Round(scan_round(second.address, options.file_bytes, expected) / options.pages)

    return run


def _plain_mapping(options: Options, plain: PlainTmpfs, private: bool, expected: int) -> Runner:
    def run(number: int) -> Round:
        with plain.mapped(private=private) as address:
            return Round(scan_round(address, options.file_bytes, expected) / options.pages)

    return run
