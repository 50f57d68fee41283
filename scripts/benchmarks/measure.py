"""Rounds: library, floor and peers take turns, and what counts is the median of the rounds."""

from __future__ import annotations

import faulthandler
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks import machine
from benchmarks.floor import PAGE, Toucher, scan, warm
from benchmarks.library import Library, Unavailable


class WrongData(Exception):
    """What was read is not what the file holds; no figure is worth anything then."""


class NotMeasured(Exception):
    """A round did not do what its row says, such as starting from missing pages."""


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    rounds: int = 7
    touches: int = 4000
    mib: int = 1024
    timeout: float = 300.0
    spin_us: int = 50
    idle_seconds: float = 3.0
    library: Library = field(default_factory=Library)

    @property
    def file_bytes(self) -> int:
        return self.mib * machine.MIB

    @property
    def pages(self) -> int:
        return self.file_bytes // PAGE


class Subject(Protocol):
    """What can be touched: a region of the library or a floor."""

    @property
    def address(self) -> int: ...
    def reset(self) -> None: ...
    def active(self) -> AbstractContextManager[None]: ...
    def faults(self) -> int | None: ...


@dataclass(frozen=True)
class Round:
    """One figure, and for latencies the 99th percentile of the same round."""

    value: float
    p99: float | None = None


@dataclass
class Series:
    """All rounds of one participant, or why there are none."""

    rounds: list[Round] = field(default_factory=list)
    problem: str | None = None

    @property
    def values(self) -> list[float]:
        return [r.value for r in self.rounds]

    @property
    def median(self) -> float | None:
        return statistics.median(self.values) if self.rounds else None

    @property
    def p99(self) -> float | None:
        known = [r.p99 for r in self.rounds if r.p99 is not None]
        return statistics.median(known) if known else None


Runner = Callable[[int], Round]


def interleave(
    options: Options, runners: Mapping[str, Runner], *, rounds: int = 0, first: int = -1
) -> dict[str, Series]:
    """A warm-up turn each (round -1), then `rounds` turns each, in alternating order.

    A participant that fails stops taking part and keeps the reason; the others go on. A hang in
    a fault cannot be ended by Python (the thread may hold the GIL), hence faulthandler.
    """
    results = {name: Series() for name in runners}
    order = list(runners)
    for number in range(first, rounds or options.rounds):
        for name in order if number % 2 else reversed(order):
            series = results[name]
            if series.problem is not None:
                continue
            faulthandler.dump_traceback_later(options.timeout, exit=True)
            try:
                figure = runners[name](number)
            except WrongData:
                raise
            except Exception as error:
                series.rounds.clear()
                series.problem = problem(error)
            else:
                if number >= 0:
                    series.rounds.append(figure)
            finally:
                faulthandler.cancel_dump_traceback_later()
    return results


def problem(error: Exception) -> str:
    """The reason as a row's note gives it."""
    if isinstance(error, (Unavailable, NotMeasured)):
        return str(error)
    print(f"benchmark: {type(error).__name__}: {error}", file=sys.stderr)
    return f"{type(error).__name__}: {error}"


def unavailable(error: Exception) -> Runner:
    """A participant that never got as far as a round."""

    def run(number: int) -> Round:
        raise error

    return run


def latency_round(
    subject: Subject,
    offsets: Sequence[int],
    *,
    expected: int | None,
    write: bool = False,
    cpu: int | None = None,
    from_missing: bool = True,
) -> Round:
    """Touch each offset once; microseconds, median and 99th percentile."""
    toucher = Toucher(offsets)
    subject.reset()
    if from_missing and not write and (present := toucher.present(subject.address)):
        raise NotMeasured(f"{present} of {len(offsets)} pages were present before the round")
    warm(2 * len(offsets) * PAGE + 32 * machine.MIB)
    with machine.pinned(cpu), subject.active():
        before = subject.faults()
        total, latencies = toucher.touch(subject.address, write=write)
        after = subject.faults()
    if expected is not None and total != expected:
        raise WrongData(f"{len(offsets)} words add up to {total}, not to {expected}")
    if before is not None and after is not None and after - before != len(offsets):
        raise NotMeasured(f"{after - before} faults for {len(offsets)} touches")
    latencies.sort()
    return Round(
        statistics.median(latencies) / 1e3, latencies[int(0.99 * (len(latencies) - 1))] / 1e3
    )


def random_touches(
    options: Options,
    subject: Subject,
    *,
    cpu: int | None = None,
    write: bool = False,
    pages: int = 0,
) -> Runner:
    """Rounds of random single-page touches; the same pages for everybody in a round."""

    def run(number: int) -> Round:
        chosen = machine.random_pages(number, pages or options.pages, options.touches)
        return latency_round(
            subject,
            [page * PAGE for page in chosen],
            expected=None if write else machine.page_words(chosen),
            write=write,
            cpu=cpu,
        )

    return run


SLICE = 128 * machine.MIB


@dataclass(frozen=True)
class Slices:
    """A scan of a file in slices, in order, so that participants alternate within a round too.

    Memory for one slice stays warm where memory for the whole file would not (README.md).
    """

    count: int
    nbytes: int
    sums: Sequence[int]

    @staticmethod
    def of(options: Options) -> Slices:
        count = max(1, options.file_bytes // SLICE)
        nbytes = options.file_bytes // count // PAGE * PAGE
        pages = nbytes // PAGE
        sums = [machine.page_words(range(i * pages, (i + 1) * pages)) for i in range(count)]
        return Slices(count, nbytes, sums)

    def scan(self, address: int, number: int) -> Round:
        """The slice of this turn: ns in all, for `interleave` below."""
        i = number % self.count
        return Round(scan_round(address + i * self.nbytes, self.nbytes, self.sums[i]))

    def interleave(self, options: Options, runners: Mapping[str, Runner]) -> dict[str, Series]:
        """A turn is a slice, a round all slices; GB/s."""
        turns = interleave(options, runners, rounds=options.rounds * self.count, first=-self.count)
        results = {}
        for name, series in turns.items():
            took = series.values
            rounds = [
                Round(self.count * self.nbytes / sum(took[i : i + self.count]))
                for i in range(0, len(took), self.count)
            ]
            results[name] = Series(rounds, series.problem)
        return results


def scan_round(address: int, nbytes: int, expected: int) -> float:
    """Read once per page, in order: ns in all."""
    total, elapsed = scan(address, nbytes)
    if total != expected:
        raise WrongData(f"the scan adds up to {total}, not to {expected}")
    return float(elapsed)
