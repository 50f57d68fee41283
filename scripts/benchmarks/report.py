"""Rows, and how they are printed."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measure import Series


@dataclass(frozen=True)
class Bound:
    """What a row has to reach.

    on: "ratio" is value / floor, "speedup" is floor / value (of times), "value" the value alone.
    better: on which side of the limit the good figures are.
    """

    limit: float
    on: str = "ratio"
    better: str = "lower"

    def met(self, figure: float) -> bool:
        return figure <= self.limit if self.better == "lower" else figure >= self.limit

    def __str__(self) -> str:
        sign = "<=" if self.better == "lower" else ">="
        return f"{sign} {self.limit:g}" + ("" if self.on == "value" else "x")


@dataclass(frozen=True)
class Row:
    """One line of the result; None is "not measured" or "does not apply"."""

    name: str
    value: float | None
    unit: str
    floor: float | None
    ratio: float | None
    min: float | None
    max: float | None
    bound: float | None
    met: bool | None
    p99: float | None
    floor_p99: float | None
    rounds: int
    note: str
    floor_min: float | None = None
    floor_max: float | None = None
    bound_on: str = ""
    better: str = ""
    bound_text: str = ""
    values: Sequence[float] = ()
    floor_values: Sequence[float] = ()

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Row:
        return Row(**fields)


def _paired(value: Series, floor: Series, on: str) -> list[float]:
    pairs = zip(value.values, floor.values, strict=False)
    return [f / v if on == "speedup" else v / f for v, f in pairs]


def make_row(
    name: str,
    unit: str,
    value: Series,
    floor: Series | None = None,
    bound: Bound | None = None,
    note: str = "",
) -> Row:
    """The ratio is the median of the rounds' ratios, so that a slow spell hits both sides."""
    on = bound.on if bound else "ratio"
    ratios = _paired(value, floor, on) if floor else []
    ratio = statistics.median(ratios) if ratios else None
    judged = value.median if on == "value" else ratio
    notes = [note] if note else []
    if value.problem:
        notes.append(f"not measured: {value.problem}")
    if floor and floor.problem:
        notes.append(f"no floor: {floor.problem}")
    floors = floor.values if floor else []
    return Row(
        name=name,
        value=value.median,
        unit=unit,
        floor=floor.median if floor else None,
        ratio=ratio,
        min=min(value.values, default=None),
        max=max(value.values, default=None),
        bound=bound.limit if bound else None,
        met=bound.met(judged) if bound and judged is not None else None,
        p99=value.p99,
        floor_p99=floor.p99 if floor else None,
        rounds=len(value.rounds) or len(floors),
        note="; ".join(notes),
        floor_min=min(floors, default=None),
        floor_max=max(floors, default=None),
        bound_on=bound.on if bound else "",
        better=bound.better if bound else "",
        bound_text=str(bound) if bound else "",
        values=value.values,
        floor_values=floors,
    )


def to_json(rows: Sequence[Row]) -> str:
    return json.dumps([dataclasses.asdict(row) for row in rows], indent=2)


def _number(figure: float | None) -> str:
    if figure is None:
        return "-"
    return f"{figure:.0f}" if abs(figure) >= 1000 else f"{figure:.3g}"


def _span(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{_number(low)}..{_number(high)}"


HEADINGS = (
    "row",
    "unit",
    "value",
    "range",
    "p99",
    "floor",
    "range",
    "p99",
    "ratio",
    "bound",
    "met",
    "",
)


def _cells(row: Row, mark: str) -> list[str]:
    met = {True: "yes", False: "NO", None: "not measured" if row.bound_text else "-"}[row.met]
    return [
        row.name,
        row.unit,
        _number(row.value),
        _span(row.min, row.max),
        _number(row.p99),
        _number(row.floor),
        _span(row.floor_min, row.floor_max),
        _number(row.floor_p99),
        "-" if row.ratio is None else f"{row.ratio:.2f}x",
        row.bound_text or "-",
        met,
        mark,
    ]


def print_rows(rows: Sequence[Row]) -> None:
    """An aligned table, then the notes by number."""
    marks: dict[str, str] = {}
    for row in rows:
        if row.note:
            marks.setdefault(row.note, f"[{len(marks) + 1}]")
    lines = [_cells(row, marks.get(row.note, "")) for row in rows]
    if not _print_rich(lines):
        widths = [max(len(line[i]) for line in [HEADINGS, *lines]) for i in range(len(HEADINGS))]
        for line in [HEADINGS, *lines]:
            cells = [
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            print("  ".join(cells).rstrip())
    for note, mark in marks.items():
        print(f"{mark} {note}")


def _print_rich(lines: Sequence[Sequence[str]]) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    console = Console()
    if not console.is_terminal:
        return False  # a pipe or a log: no line breaks inside cells
    table = Table(box=None, pad_edge=False)
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if i < 2 else "right", overflow="fold")
    for line in lines:
        style = {"yes": "green", "NO": "red"}.get(line[10], "")
        table.add_row(*(Text(cell, style=style if i == 10 else "") for i, cell in enumerate(line)))
    console.print(table)
    return True
