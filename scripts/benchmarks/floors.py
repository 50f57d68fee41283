"""All floors and peers without the library: what this machine can do."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack, nullcontext

from benchmarks import fault_latency, machine, peers, scale, scan
from benchmarks.floor import Floor, Handler
from benchmarks.library import Library
from benchmarks.measure import Options, Series, interleave, random_touches
from benchmarks.report import Row, make_row


def run(options: Options) -> list[Row]:
    options = dataclasses.replace(options, library=Library(enabled=False))
    rows = fault_latency.run(options) + unpinned_rows(options)
    rows += scan.run(options) + peers.run(options) + scale.latency_rows(options)
    kept = [row for row in rows if row.floor is not None or row.value is not None]
    return [_floor_only(row) for row in kept]


def _floor_only(row: Row) -> Row:
    """The bound is the library's: it says nothing about a floor."""
    note = row.note.replace("; not measured: floors only", "")
    return dataclasses.replace(
        row, bound=None, met=None, bound_on="", better="", bound_text="", note=note
    )


def unpinned_rows(options: Options) -> list[Row]:
    """The naive handler, for the record: a thread that sleeps wherever it happens to be."""
    path = machine.data_file(options.file_bytes)
    others = machine.CPUS[1:]
    rows = []
    with ExitStack() as stack:
        floor = stack.enter_context(Floor(path, options.file_bytes, handler=Handler.THREAD))
        for load in ("idle", "busy"):
            if load == "busy" and not others:
                continue
            with machine.busy(others) if load == "busy" else nullcontext():
                results = interleave(options, {"floor": random_touches(options, floor)})
            rows.append(
                make_row(
                    f"C handler sleeping anywhere, other CPU {load}",
                    "us",
                    Series(),
                    results["floor"],
                    note="for comparison only: too unsteady to be a denominator",
                )
            )
    return rows
