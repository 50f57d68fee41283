"""One 4 KiB fault through the Python service, next to the native one."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks import machine
from benchmarks.library import Region
from benchmarks.measure import Options, Round, Runner, interleave, random_touches, unavailable
from benchmarks.report import Bound, Row, make_row

TOUCHER = machine.CPUS[0]


def run(options: Options) -> list[Row]:
    path = machine.data_file(options.file_bytes)
    machine.read_once(path)
    with ExitStack() as stack:
        runners: dict[str, Runner] = {}
        for service in ("native", "python"):
            children = set(machine.descendants())
            try:
                region = stack.enter_context(
                    options.library.map_file(path, service=service, one_page=True)
                )
            except Exception as error:
                runners[service] = unavailable(error)
            else:
                started = sorted(set(machine.descendants()) - children)
                runners[service] = _pinned(options, region, started)
        results = interleave(options, runners)
    return [
        make_row(
            "Python service, both pinned",
            "us",
            results["python"],
            results["native"],
            Bound(4.0),
            "floor: the native service of this library, toucher pinned; "
            "the Python service's process is kept on the toucher's CPU",
        )
    ]


def _pinned(options: Options, region: Region, pids: list[int]) -> Runner:
    """The toucher on one CPU, and the processes that serve the region, if any, on the same."""
    touches = random_touches(options, region, cpu=TOUCHER)

    def run(number: int) -> Round:
        with machine.processes_pinned(pids, TOUCHER):
            return touches(number)

    return run
