"""One 4 KiB fault: who resolves it, where it runs, what the other CPU does."""

from __future__ import annotations

import time
from contextlib import ExitStack, nullcontext

from benchmarks import machine
from benchmarks.floor import PAGE, Floor, Handler
from benchmarks.measure import (
    Options,
    Round,
    Runner,
    Subject,
    interleave,
    random_touches,
    unavailable,
)
from benchmarks.report import Bound, Row, make_row

TOUCHER, OTHERS = machine.CPUS[0], machine.CPUS[1:]
WRITE_BYTES = 64 * machine.MIB


def run(options: Options) -> list[Row]:
    rows = missing_rows(options)
    rows += inline_row(options)
    rows += write_protect_rows(options)
    return rows


def library_file(options: Options, stack: ExitStack, service: str) -> Subject | Exception:
    """The 1 GiB file through the library, or why not."""
    path = machine.data_file(options.file_bytes)
    machine.read_once(path)
    try:
        return stack.enter_context(options.library.map_file(path, service=service, one_page=True))
    except Exception as error:
        return error


def missing_rows(options: Options) -> list[Row]:
    """The native service: pinned and floating toucher, the other CPU idle and busy."""
    rows = []
    path = machine.data_file(options.file_bytes)
    with ExitStack() as stack:
        region = library_file(options, stack, "native")
        same_cpu = stack.enter_context(
            Floor(path, options.file_bytes, handler=Handler.THREAD, cpu=TOUCHER)
        )
        spinning = stack.enter_context(
            Floor(path, options.file_bytes, handler=Handler.THREAD, spin_us=options.spin_us)
        )
        for name, floor, cpu, limit, what in (
            ("pinned", same_cpu, TOUCHER, 1.3, "C handler sleeping on the toucher's CPU"),
            ("floating", spinning, None, 1.3, f"C handler spinning {options.spin_us} us, unpinned"),
        ):
            for load in ("idle", "busy"):
                if load == "busy" and not OTHERS:
                    continue
                with machine.busy(OTHERS) if load == "busy" else nullcontext():
                    results = interleave(
                        options,
                        {
                            "library": _touches(options, region, cpu),
                            "floor": random_touches(options, floor, cpu=cpu),
                        },
                    )
                rows.append(
                    make_row(
                        f"native, toucher {name}, other CPU {load}",
                        "us",
                        results["library"],
                        results["floor"],
                        Bound(limit),
                        f"floor: {what}",
                    )
                )
        rows.append(idle_row(options, region, spinning))
    return rows


def _touches(options: Options, region: Subject | Exception, cpu: int | None) -> Runner:
    if isinstance(region, Exception):
        return unavailable(region)
    return random_touches(options, region, cpu=cpu)


def idle_row(options: Options, region: Subject | Exception, floor: Floor) -> Row:
    """What the process costs while nothing happens, right after some faults."""

    def cost(subject: Subject) -> Runner:
        touches = random_touches(options, subject)

        def run(number: int) -> Round:
            touches(number)
            start, before = time.monotonic(), machine.cpu_seconds()
            time.sleep(options.idle_seconds)
            return Round(100.0 * (machine.cpu_seconds() - before) / (time.monotonic() - start))

        return run

    runners = {
        name: unavailable(subject) if isinstance(subject, Exception) else cost(subject)
        for name, subject in (("library", region), ("floor", floor))
    }
    results = interleave(options, runners, rounds=2, first=0)
    return make_row(
        "native, idle cost of the process",
        "% CPU",
        results["library"],
        results["floor"],
        Bound(1.0, on="value"),
        f"CPU time of all threads over {options.idle_seconds:g} s of sleep, right after faults",
    )


def inline_row(options: Options) -> list[Row]:
    """Resolved in the touching thread."""
    path = machine.data_file(options.file_bytes)
    with ExitStack() as stack:
        region = library_file(options, stack, "inline")
        floor = stack.enter_context(Floor(path, options.file_bytes, handler=Handler.SIGBUS))
        results = interleave(
            options,
            {
                "library": _touches(options, region, TOUCHER),
                "floor": random_touches(options, floor, cpu=TOUCHER),
            },
        )
    return [
        make_row(
            "inline",
            "us",
            results["library"],
            results["floor"],
            Bound(1.3),
            "floor: C SIGBUS handler, pread + COPY",
        )
    ]


def write_protect_rows(options: Options) -> list[Row]:
    """The first write to a present, protected page that nobody shares."""
    rows = []
    for service, handler, cpu, what in (
        ("native", Handler.THREAD, TOUCHER, "C handler on the toucher's CPU, unprotect"),
        ("inline", Handler.SIGBUS, None, "C SIGBUS handler, unprotect"),
    ):
        with ExitStack() as stack:
            region: Subject | Exception
            try:
                region = stack.enter_context(
                    options.library.protected(WRITE_BYTES, service=service)
                )
            except Exception as error:
                region = error
            floor = stack.enter_context(Floor((), WRITE_BYTES, handler=handler, cpu=cpu))
            results = interleave(
                options,
                {
                    "library": _writes(options, region),
                    "floor": _writes(options, floor),
                },
            )
        rows.append(
            make_row(
                f"write-protect, {service}",
                "us",
                results["library"],
                results["floor"],
                Bound(1.3),
                f"floor: {what}; private memory, toucher pinned",
            )
        )
    return rows


def _writes(options: Options, subject: Subject | Exception) -> Runner:
    if isinstance(subject, Exception):
        return unavailable(subject)
    return random_touches(options, subject, cpu=TOUCHER, write=True, pages=WRITE_BYTES // PAGE)
