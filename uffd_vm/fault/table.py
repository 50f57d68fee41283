"""The policy compiled: byte tables for executors, C source for the build, the golden print for readers.

`python -m uffd_vm.fault.table` prints docs/fault-table.md, with `--c` the C arrays. The tables are the
whole interface to executors: they index and never branch. Layouts are little-endian and fixed.

cells     one row id each; index ((((kind * 2 + access) * 6 + backing) * 19 + pte) * 64 + flags & 63)
admit     one row id each, or PASS; index kind * 128 + (flags >> 6)
rows      24 bytes each: u8 id, action, commit, next_pte (KEEP: leave it); u32 result; u16 nr_charge,
          number; u16 may_add, u8 fallback row (0: none), u8 0; u64 counters, one bit each
settle    8 bytes each: u8 settlement, u8 row (0xFF: none), u16 0, u32 result; index commit * 17 + errno
truth     as settle; index (commit * 6 + truth) * 6 + backing
legal_pte one byte each, 1 = legal; index from * 19 + to
"""

from __future__ import annotations

import enum
import functools
import itertools
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .action import AMOUNTS, EXECUTABLE, Action, Commit, Counter, ErrnoClass, Settlement, Truth
from .fault import (
    MAIN_FLAGS,
    PROLOGUE_FLAGS,
    PROLOGUE_SHIFT,
    VM_FAULT_ERROR,
    Access,
    Backing,
    FaultFlag,
    FaultKind,
    FaultResult,
    describe,
)
from .handle import POSSIBLE_PTES, PROLOGUE, admit, decide
from .pte import LEGAL_FOLIO_TRANSITIONS, LEGAL_PTE_TRANSITIONS, FolioState, PteState
from .rows import ROWS, UNREACHABLE, Row, row
from .settle import Settled, settle, settle_truth

__all__ = [
    "KEEP_BYTE",
    "NO_ROW",
    "PASS",
    "Tables",
    "c_source",
    "cell_index",
    "compile_tables",
    "golden",
    "reachable_states",
    "unexecutable",
]

PASS = 0xFF  #: in `admit`: go on with the main table (p8)
KEEP_BYTE = 0xFF  #: next_pte of a row that publishes nothing
NO_ROW = 0xFF  #: in `settle` and `truth`

_NR_FLAGS = int(MAIN_FLAGS) + 1
_ROW = struct.Struct("<BBBBIHHHBBQ")
_SETTLED = struct.Struct("<BBHI")


@dataclass(frozen=True, slots=True)
class Tables:
    """The compiled policy; the layouts are in the module's docstring."""

    cells: bytes
    admit: bytes
    rows: bytes
    settle: bytes
    truth: bytes
    legal_pte: bytes


def cell_index(
    kind: FaultKind, access: Access, backing: Backing, pte: PteState, flags: FaultFlag
) -> int:
    """Where a cell stands in `Tables.cells`; the prologue's flags do not matter."""
    index = (kind * len(Access) + access) * len(Backing) + backing
    return (index * len(PteState) + pte) * _NR_FLAGS + int(flags & MAIN_FLAGS)


@functools.cache
def compile_tables() -> Tables:
    """Runs every input through the choosers and settlements once."""
    flags = [FaultFlag(f) for f in range(_NR_FLAGS)]
    return Tables(
        cells=bytes(
            decide(*key).id
            for key in itertools.product(FaultKind, Access, Backing, PteState, flags)
        ),
        admit=bytes(
            _admitted(kind, flags)
            for kind in FaultKind
            for flags in range((int(PROLOGUE_FLAGS) >> PROLOGUE_SHIFT) + 1)
        ),
        rows=b"".join(_pack_row(r) for r in ROWS),
        settle=b"".join(
            _pack_settled(settle(*key)) for key in itertools.product(Commit, ErrnoClass)
        ),
        truth=b"".join(
            _pack_settled(settle_truth(*key)) for key in itertools.product(Commit, Truth, Backing)
        ),
        legal_pte=bytes(
            pair in LEGAL_PTE_TRANSITIONS for pair in itertools.product(PteState, repeat=2)
        ),
    )


def _admitted(kind: FaultKind, prologue: int) -> int:
    refused = admit(kind, FaultFlag(prologue << PROLOGUE_SHIFT))
    return PASS if refused is None else refused.id


def _pack_row(r: Row) -> bytes:
    return _ROW.pack(
        r.id,
        r.action,
        r.commit,
        KEEP_BYTE if r.next_pte is None else r.next_pte,
        r.result,
        r.nr_charge,
        r.number,
        r.may_add,
        row(r.fallback).id if r.fallback else 0,
        0,
        sum(1 << counter for counter in r.counters),
    )


def _pack_settled(end: Settled) -> bytes:
    return _SETTLED.pack(end.settlement, NO_ROW if end.row is None else end.row.id, 0, end.result)


# ---- what a region can come to ---------------------------------------------------------------------


def _cells(
    backing: Backing,
    flags_possible: FaultFlag,
    pte_states_possible: Iterable[PteState],
    kinds: Iterable[FaultKind],
) -> Iterator[tuple[tuple[FaultKind, Access, PteState, FaultFlag], Row]]:
    """The cells of such a region that are no bug, and the rows that SKIP goes on with. `flags_possible`:
    any subset of it can be set."""
    possible = flags_possible & MAIN_FLAGS
    flags = [FaultFlag(f) for f in range(_NR_FLAGS) if f & ~int(possible) == 0]
    for kind, access, pte, flag in itertools.product(
        kinds, Access, sorted(pte_states_possible), flags
    ):
        chosen = decide(kind, access, backing, pte, flag)
        if chosen is not UNREACHABLE:
            yield (kind, access, pte, flag), chosen
            if chosen.fallback:
                yield (kind, access, pte, flag), row(chosen.fallback)


def reachable_states(
    backing: Backing,
    flags_possible: FaultFlag,
    start: Iterable[PteState],
    kinds: Iterable[FaultKind],
) -> frozenset[PteState]:
    """`start` and every state that faults of these kinds lead to from there."""
    states, kinds = frozenset(start), tuple(kinds)
    while True:
        cells = _cells(backing, flags_possible, states, kinds)
        more = states | {r.next_pte for _, r in cells if r.next_pte is not None}
        if more == states:
            return states
        states = more


def unexecutable(
    backing: Backing,
    flags_possible: FaultFlag,
    pte_states_possible: Iterable[PteState],
    kinds: Iterable[FaultKind],
    executable: frozenset[Action] = EXECUTABLE,
) -> tuple[str, ...]:
    """Why such a region must not be made: one sentence for each row that no executor can carry out,
    in row order, with the first fault that leads there. Empty: it may be made."""
    reasons: dict[int, str] = {}
    for (kind, access, pte, flag), chosen in _cells(
        backing, flags_possible, pte_states_possible, kinds
    ):
        if chosen.action not in executable and chosen.id not in reasons:
            when = f" with {describe(flag)}" if flag else ""
            reasons[chosen.id] = (
                f"{chosen.action.name} is not implemented: a {_word(kind, access)} fault on a "
                f"{pte.name} page of a {backing.name} region{when} needs it "
                f"(row {chosen}: {chosen.why})"
            )
    return tuple(reasons[i] for i in sorted(reasons))


def _word(kind: FaultKind, access: Access) -> str:
    return "write-protect" if kind is FaultKind.WP else f"{kind.name} {access.name}".lower()


# ---- C ---------------------------------------------------------------------------------------------

_C_ENUMS: tuple[tuple[str, type[enum.IntEnum] | type[enum.IntFlag]], ...] = (
    ("KIND", FaultKind),
    ("ACCESS", Access),
    ("BACKING", Backing),
    ("PTE", PteState),
    ("FOLIO", FolioState),
    ("FLAG", FaultFlag),
    ("VM_FAULT", FaultResult),
    ("ACTION", Action),
    ("COMMIT", Commit),
    ("ERR", ErrnoClass),
    ("SETTLEMENT", Settlement),
    ("TRUTH", Truth),
    ("COUNTER", Counter),
)


def c_source() -> str:
    """A C header: the numbers as #defines, the tables as static const byte arrays."""
    lines = [
        "/* Generated by python -m uffd_vm.fault.table --c from uffd_vm/fault/; do not edit. */",
        "#ifndef UVM_POLICY_TABLES_H",
        "#define UVM_POLICY_TABLES_H",
        "",
        "#include <stdint.h>",
    ]
    for prefix, members in _C_ENUMS:
        lines.append("")
        for member in members:
            value = f"{int(member):#x}u" if issubclass(members, enum.IntFlag) else str(int(member))
            lines.append(f"#define UVM_{prefix}_{str(member.name).upper()} {value}")
        if not issubclass(members, enum.IntFlag):
            lines.append(f"#define UVM_NR_{prefix} {len(members)}")
    lines += [
        f"#define UVM_VM_FAULT_ERROR {int(VM_FAULT_ERROR):#x}u",
        "",
        f"#define UVM_FLAG_MAIN {int(MAIN_FLAGS):#x}u",
        f"#define UVM_FLAG_PROLOGUE {int(PROLOGUE_FLAGS):#x}u",
        f"#define UVM_FLAG_PROLOGUE_SHIFT {PROLOGUE_SHIFT}",
        f"#define UVM_NR_FLAGS {_NR_FLAGS}",
        f"#define UVM_ADMIT_PASS {PASS}",
        f"#define UVM_PTE_KEEP {KEEP_BYTE}",
        f"#define UVM_NO_ROW {NO_ROW}",
        "",
        *(f"#define UVM_ROW_{_c_name(r)} {r.id}" for r in ROWS),
        f"#define UVM_NR_ROWS {len(ROWS)}",
        "",
    ]
    tables = compile_tables()
    for name in ("cells", "admit", "rows", "settle", "truth", "legal_pte"):
        lines += _c_array(f"uvm_{name}", getattr(tables, name))
    return "\n".join([*lines, "#endif", ""])


def _c_name(r: Row) -> str:
    return r.name.replace("-", "_").upper()


def _c_array(name: str, content: bytes) -> Iterator[str]:
    yield f"static const uint8_t {name}[{len(content)}] __attribute__((aligned(8), unused)) = {{"
    for start in range(0, len(content), 24):
        yield "\t" + " ".join(f"{byte}," for byte in content[start : start + 24])
    yield "};"


# ---- the golden print ------------------------------------------------------------------------------

_T = TypeVar("_T")
_INTRO = """\
# The fault table

Generated from `uffd_vm/fault/`; `python -m uffd_vm.fault.table` prints it again, and a test compares.

A fault passes the **prologue**; its kind, access, backing, page state and flags name a **row**; the row
says what to prepare (action), what makes it true (commit), and what the page is then (next). How that
ended is **settled**. `[!]` marks rows that no executor of this version carries out: a region that could
come to one is refused when it is made.
"""


def golden() -> str:
    """The whole policy as Markdown: what docs/fault-table.md holds."""
    parts = [_INTRO, _prologue(), _rows(), _decisions(), _settlements(), _truths(), _transitions()]
    return "\n".join(parts)


def _prologue() -> str:
    lines = ["## Prologue", "", "In this order; the first that is set decides.", ""]
    body = []
    for flag, _ in PROLOGUE:
        refused = {kind: admit(kind, flag) for kind in FaultKind}
        for r in dict.fromkeys(refused.values()):
            assert r is not None
            kinds = [kind.name for kind in FaultKind if refused[kind] is r]
            only = "" if len(kinds) == len(FaultKind) else f", {' '.join(kinds)}"
            body.append([r.name, f"{flag.name}{only}", *_row_columns(r)])
    passed = ["" for _ in _ROW_COLUMNS[:-1]]
    body.append(["p8", "none of these", *passed, "enter the budget's scope"])
    return "\n".join([*lines, *_markdown(["row", "flag", *_ROW_COLUMNS], body), ""])


_ROW_COLUMNS = ["action", "commit", "next", "result", "charge", "counters", "why"]


def _row_columns(r: Row) -> list[str]:
    result = describe(r.result)
    if r.may_add:
        result += f" (+{describe(r.may_add)})"
    return [
        r.action.name + ("" if r.executable else " [!]"),
        r.commit.name,
        "keep" if r.next_pte is None else r.next_pte.name,
        result,
        str(r.nr_charge) if r.nr_charge else "",
        " ".join(c.name for c in sorted(r.counters)),
        r.why,
    ]


def _rows() -> str:
    amounts = ", ".join(c.name for c in sorted(AMOUNTS))
    lines = [
        "## Rows",
        "",
        "`(+...)` are bits that the executor may add: RETRY while it waits, COMPLETED when it throttled",
        "the writer. A row whose commit is MOVE goes on with `6copy` after EBUSY. Every fault counts",
        "pgfault and one of pgmajfault, pgminfault, pgfault_failed; an answer of RETRY counts nothing.",
        f"Counted by amount, not by row: {amounts}.",
        "",
    ]
    body = [[str(r.id), r.name, *_row_columns(r)] for r in ROWS]
    return "\n".join([*lines, *_markdown(["id", "row", *_ROW_COLUMNS], body), ""])


def _decisions() -> str:
    lines = [
        "## Decisions",
        "",
        "`!FLAG` is a flag that is not set; a flag that is not named does not matter.",
        "",
    ]
    for kind, access in itertools.product(FaultKind, Access):
        for backing in Backing:
            title = f"### {kind.name} {access.name}, {backing.name}"
            lines += [title, "", *_section(kind, access, backing), ""]
    return "\n".join(lines)


def _section(kind: FaultKind, access: Access, backing: Backing) -> list[str]:
    """One kind, access and backing: states with equal decisions share their lines."""
    same: dict[tuple[Row, ...], list[PteState]] = {}
    for pte in PteState:
        decisions = tuple(
            decide(kind, access, backing, pte, FaultFlag(f)) for f in range(_NR_FLAGS)
        )
        same.setdefault(decisions, []).append(pte)
    body: list[list[str]] = []
    unreachable: list[PteState] = []
    for decisions, ptes in same.items():
        if set(decisions) == {UNREACHABLE}:
            unreachable = ptes
            continue
        for condition, chosen in _cubes(dict(enumerate(decisions))):
            mark = "" if chosen.executable else " [!]"
            next_pte = "keep" if chosen.next_pte is None else chosen.next_pte.name
            body.append(
                [
                    " ".join(p.name for p in ptes),
                    condition,
                    chosen.name,
                    f"{chosen.action.name}{mark} / {chosen.commit.name}",
                    next_pte,
                    describe(chosen.result),
                ]
            )
    if not body:
        return ["unreachable (row 0)"]
    table = list(_markdown(["page", "flags", "row", "action / commit", "next", "result"], body))
    if unreachable:
        table += ["", "unreachable (row 0): " + " ".join(p.name for p in unreachable)]
    return table


def _cubes(values: Mapping[int, _T], fixed: tuple[str, ...] = ()) -> list[tuple[str, _T]]:
    """Covers a function of the six main flags by the fewest conditions, splitting flag by flag."""
    distinct = list(dict.fromkeys(values.values()))
    if len(distinct) == 1:
        return [(" ".join(fixed) or "any", distinct[0])]
    covers = []
    for flag in FaultFlag:
        if not flag & MAIN_FLAGS or any(str(flag.name) == f.lstrip("!") for f in fixed):
            continue
        unset = {k: v for k, v in values.items() if not k & flag}
        set_ = {k: v for k, v in values.items() if k & flag}
        if [unset[k & ~flag] for k in set_] == list(set_.values()):
            continue
        covers.append(
            _cubes(unset, (*fixed, f"!{flag.name}")) + _cubes(set_, (*fixed, str(flag.name)))
        )
    return min(covers, key=len)


def _settlements() -> str:
    header = ["errno", "what happens", "result", "row", "for commits"]
    body = []
    for errno in ErrnoClass:
        ends = _group(Commit, functools.partial(_settle_of, errno))
        body += [[errno.name, *_settled_columns(end), _names(cs)] for end, cs in ends.items()]
    lines = ["## Settlements", "", "By how the action, or the commit after it, ended.", ""]
    return "\n".join([*lines, *_markdown(header, body), ""])


def _settle_of(errno: ErrnoClass, commit: Commit) -> Settled:
    return settle(commit, errno)


def _truths() -> str:
    header = ["the kernel says", "what happens", "result", "row", "after"]
    body = []
    for truth in Truth:
        pairs = list(itertools.product(Commit, Backing))
        ends = _group(pairs, functools.partial(_truth_of, truth))
        for end, group in ends.items():
            body.append([truth.name, *_settled_columns(end), _pairs(group)])
    lines = [
        "## What the kernel's truth means",
        "",
        "After VERIFY, or SCAN (whose commit is WAKE); the row's next state is published.",
        "",
    ]
    return "\n".join([*lines, *_markdown(header, body), ""])


def _truth_of(truth: Truth, pair: tuple[Commit, Backing]) -> Settled:
    return settle_truth(pair[0], truth, pair[1])


def _pairs(pairs: Sequence[tuple[Commit, Backing]]) -> str:
    """Commits by their backings, the backings left out where they do not matter."""
    backings_of: dict[Commit, list[Backing]] = {}
    for commit, backing in pairs:
        backings_of.setdefault(commit, []).append(backing)
    commits_of: dict[tuple[Backing, ...], list[Commit]] = {}
    for commit, backings in backings_of.items():
        commits_of.setdefault(tuple(backings), []).append(commit)
    texts = []
    for group, commits in commits_of.items():
        others = [b for b in Backing if b not in group]
        if not others:
            where = ""
        elif len(others) < len(group):
            where = f" (not {_names(others)})"
        else:
            where = f" ({_names(group)})"
        texts.append(_names(commits) + where)
    return "; ".join(texts)


def _settled_columns(end: Settled) -> list[str]:
    if end.settlement is Settlement.DONE and not end.result:
        result = "the row's"
    else:
        result = describe(end.result)
    return [end.settlement.name, result, end.row.name if end.row else ""]


def _transitions() -> str:
    lines = ["## Legal transitions of a page", ""]
    pte_pairs = {p: [q for q in PteState if (p, q) in LEGAL_PTE_TRANSITIONS] for p in PteState}
    everywhere = [q for q in PteState if all(q in targets for targets in pte_pairs.values())]
    lines += [f"From every state to itself, and to {_names(everywhere)}. Besides:", ""]
    body = [
        [p.name, _names([q for q in targets if q not in everywhere and q is not p])]
        for p, targets in pte_pairs.items()
    ]
    lines += [*_markdown(["from", "to"], body), "", "Of a folio:", ""]
    folio = [
        [f.name, _names([g for g in FolioState if (f, g) in LEGAL_FOLIO_TRANSITIONS])]
        for f in FolioState
    ]
    lines += [*_markdown(["from", "to"], folio), "", "A page can be, by backing:", ""]
    possible = [[b.name, _names([p for p in PteState if p in POSSIBLE_PTES[b]])] for b in Backing]
    return "\n".join([*lines, *_markdown(["backing", "states"], possible), ""])


_K = TypeVar("_K")


def _group(keys: Iterable[_K], value_of: Callable[[_K], Settled]) -> dict[Settled, list[_K]]:
    groups: dict[Settled, list[_K]] = {}
    for key in keys:
        groups.setdefault(value_of(key), []).append(key)
    return groups


def _names(members: Iterable[enum.IntEnum]) -> str:
    members = list(members)
    if members and len(members) == len(type(members[0])):
        return "all"
    return " ".join(m.name for m in members) or "none"


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    yield line(header)
    yield "|" + "---|" * len(header)
    yield from map(line, body)


def main(argv: Sequence[str]) -> int:
    if argv not in ([], ["--c"]):
        print("usage: python -m uffd_vm.fault.table [--c]", file=sys.stderr)
        return 2
    sys.stdout.write(c_source() if argv else golden())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
