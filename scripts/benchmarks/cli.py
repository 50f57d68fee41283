"""The command line of scripts/bench."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import fault_latency, floors, peers, python_service, scale, scan
from benchmarks.floor import CannotMeasure
from benchmarks.measure import Options, WrongData
from benchmarks.report import Row, print_rows, to_json

BENCHMARKS: dict[str, tuple[Callable[[Options], list[Row]], str]] = {
    "fault-latency": (
        fault_latency.run,
        "one 4 KiB fault: native, inline, write-protect, idle cost",
    ),
    "scan": (scan.run, "a whole file once per page; a second mapping of it"),
    "peers": (peers.run, "next to np.memmap over C FUSE, and np.memmap on the local file"),
    "python-service": (python_service.run, "one fault through the Python service, next to native"),
    "scale": (scale.run, "1,000 regions; a 1 TiB region; mapping it"),
    "floors": (floors.run, "the C floors and peers alone, without the library"),
}
BOUNDED = [name for name in BENCHMARKS if name != "floors"]


def parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {name:15} {what}" for name, (_, what) in BENCHMARKS.items())
    result = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Benchmarks next to the least that plain C has to do, in the same run.",
        epilog=f"benchmarks:\n{names}\n  {'all':15} every one but floors, a process each",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("name", nargs="?", choices=[*BENCHMARKS, "all"], metavar="NAME")
    result.add_argument("--list", action="store_true", help="print the names and end")
    result.add_argument("--json", action="store_true", help="print a list of rows as JSON")
    result.add_argument("--check", action="store_true", help="exit 1 unless every bound is met")
    result.add_argument("--rounds", type=_positive, default=7, help="rounds of each (7)")
    result.add_argument("--touches", type=_positive, default=4000, help="faults per round (4000)")
    result.add_argument("--mib", type=_positive, default=1024, help="size of the file (1024)")
    result.add_argument(
        "--timeout", type=float, default=300.0, help="seconds until a hung round ends it all (300)"
    )
    return result


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def run_all(arguments: argparse.Namespace) -> list[Row]:
    """Each benchmark in a process of its own, one after the other."""
    rows: list[Row] = []
    for name in BOUNDED:
        command = [
            sys.executable,
            str(Path(__file__).with_name("__main__.py")),
            name,
            "--json",
            f"--rounds={arguments.rounds}",
            f"--touches={arguments.touches}",
            f"--mib={arguments.mib}",
            f"--timeout={arguments.timeout}",
        ]
        print(f"{name} ...", file=sys.stderr)
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
        if done.returncode:
            raise SystemExit(f"scripts/bench {name} ended with status {done.returncode}")
        rows += [Row.from_json(fields) for fields in json.loads(done.stdout)]
    return rows


def prefixed(name: str, rows: Sequence[Row]) -> list[Row]:
    return [replace(row, name=f"{name}: {row.name}") for row in rows]


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse_args(argv)
    if arguments.list:
        print("\n".join([*BENCHMARKS, "all"]))
        return 0
    if arguments.name is None:
        parser().print_help()
        return 2
    if arguments.name == "all":
        rows = run_all(arguments)
    else:
        function, _ = BENCHMARKS[arguments.name]
        options = Options(
            rounds=arguments.rounds,
            touches=arguments.touches,
            mib=arguments.mib,
            timeout=arguments.timeout,
        )
        try:
            rows = prefixed(arguments.name, function(options))
        except (CannotMeasure, WrongData) as error:
            print(f"scripts/bench: {error}", file=sys.stderr)
            return 3
    if arguments.json:
        print(to_json(rows))
    else:
        print_rows(rows)
    if arguments.check:
        return 0 if all(row.met for row in rows if row.bound is not None) else 1
    return 0
