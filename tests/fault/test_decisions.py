"""Every cell of the table against a second, literal statement of it: one changed cell, row or
settlement fails. RULES restates what leads to which row; OUTCOMES what each row says."""

from __future__ import annotations

import dataclasses
import itertools
import random
import struct
from collections.abc import Iterator

import pytest

from uffd_vm.fault.action import Action, Commit, Counter, ErrnoClass, Truth
from uffd_vm.fault.fault import (
    Access,
    Backing,
    Fault,
    FaultFlag,
    FaultKind,
    FaultResult,
    describe,
)
from uffd_vm.fault.handle import decide, handle_mm_fault
from uffd_vm.fault.pte import LEGAL_PTE_TRANSITIONS, PteState
from uffd_vm.fault.rows import ROWS, row
from uffd_vm.fault.settle import settle, settle_truth
from uffd_vm.fault.table import PASS, Tables, cell_index, compile_tables

# name: (action, commit, next page state, result, bits the executor may add, pages charged, counters)
OUTCOMES = """
UNREACHABLE | POISON | POISON | POISONED | SIGBUS | 0 | 0 | bug
1   | ZERO_FILL | ZEROPAGE | ZERO | 0 | 0 | 0 | zero_fill
2   | ZERO_FILL | COPY_WP | WRITE_PROTECTED | 0 | 0 | 1 | zero_fill
3   | ZERO_FILL | COPY_WP | WRITE_PROTECTED | 0 | 0 | 1 | zero_fill
4   | ZERO_FILL | COPY | PRESENT | 0 | 0 | 1 | anon_alloc
5   | ZERO_FILL | COPY | PRESENT | 0 | 0 | 1 | anon_alloc wp_grant
6   | MOVE_BACK | MOVE | PRESENT | 0 | 0 | 0 | pg_activate refault
7   | SWAP_IN | COPY | PRESENT | MAJOR | RETRY | 1 | pswpin workingset_refault
8   | POISON | POISON | POISONED | SIGBUS | 0 | 0 | io_error
9   | MAP_CACHED | COPY_WP | WRITE_PROTECTED | 0 | 0 | 1 |
10  | READ_FOLIO | COPY_WP | WRITE_PROTECTED | MAJOR | RETRY | 1 |
11  | COW_FOLIO | COPY | PRESENT | MAJOR | RETRY | 1 | cow
12  | READ_FOLIO | COPY | PRESENT | MAJOR | RETRY | 1 |
13  | MKWRITE_FOLIO | COPY | PRESENT | MAJOR | RETRY,COMPLETED | 1 | mkwrite dirtied
14  | MAP_CACHED | CONTINUE | PRESENT | 0 | 0 | 0 |
15  | MKWRITE_FOLIO | CONTINUE | PRESENT | 0 | RETRY,COMPLETED | 0 | mkwrite dirtied
16  | READ_FOLIO | COPY_WP | WRITE_PROTECTED | MAJOR | RETRY | 1 |
17  | MKWRITE_FOLIO | COPY | PRESENT | MAJOR | RETRY,COMPLETED | 1 | mkwrite dirtied
18  | REUSE | UNPROTECT | PRESENT | 0 | 0 | 0 | pgreuse dirtied
19  | COW_SNAPSHOT | UNPROTECT | PRESENT | 0 | RETRY | 1 | cow
20  | REUSE | UNPROTECT | PRESENT | 0 | 0 | 1 | pgreuse dirtied
21  | REUSE | UNPROTECT | PRESENT | 0 | 0 | 0 | cow_reuse dirtied
22  | MKWRITE | UNPROTECT | PRESENT | 0 | RETRY,COMPLETED | 0 | mkwrite dirtied
23  | CANCEL_EVICT | UNPROTECT | PRESENT | 0 | 0 | 0 | evict_cancel dirtied
24  | UNPROTECT_AGAIN | UNPROTECT | PRESENT | NOPAGE | 0 | 0 | spurious
25  | SNAP_COPY | COPY_WP | WRITE_PROTECTED | 0 | 0 | 1 | snap_copy
26  | SNAP_FRAME | COPY_WP | WRITE_PROTECTED | 0 | 0 | 1 |
27  | ZERO_FILL | ZEROPAGE | ZERO | 0 | 0 | 0 | zero_fill
28  | SNAP_COW | COPY | PRESENT | 0 | 0 | 1 | cow
29  | REUSE | UNPROTECT | PRESENT | 0 | 0 | 0 | pgreuse dirtied
30  | SCAN | WAKE | NONE | NOPAGE | 0 | 0 |
31  | POISON | POISON | POISONED | HWPOISON | 0 | 0 | poison_hit
32  | WAKE | WAKE | GUARD | SIGSEGV | 0 | 0 |
33  | FILL_BLOCK | COPY_BLOCK | PRESENT | 0 | 0 | 512 | thp_alloc
34  | HUGETLB_FILL | COPY | PRESENT | 0 | 0 | 512 |
35  | MOVE_BACK | MOVE | PRESENT | 0 | 0 | 0 | numa_hint
p1  | READ_EVENT | NONE | - | 0 | 0 | 0 |
p2  | UNREGISTER_STRAY | WAKE | - | NOPAGE | 0 | 0 | stray
p3  | JOIN | NONE | - | RETRY | 0 | 0 | joined
p4  | WAKE | WAKE | - | NOPAGE | 0 | 0 |
p5  | DENY_WRITE | WAKE | - | SIGSEGV | 0 | 0 | deny
p6  | POISON | POISON | POISONED | SIGBUS | 0 | 0 |
p7  | POISON | POISON | POISONED | SIGBUS | 0 | 0 | timeout
X-OOM | POISON | POISON | POISONED | OOM | 0 | 0 | oom
X-IO  | POISON | POISON | POISONED | SIGBUS | 0 | 0 | io_error
X-DENY | DENY_WRITE | WAKE | - | SIGSEGV | 0 | 0 | deny
X-RACE | WAKE | WAKE | - | NOPAGE | 0 | 0 | race_lost
X-GONE | WAKE | NONE | - | NOPAGE | 0 | 0 |
5hook | ZERO_FILL | COPY_WP | WRITE_PROTECTED | 0 | 0 | 1 | anon_alloc
6copy | STAGED_COPY | COPY | PRESENT | 0 | 0 | 0 | pg_activate refault
6wp | STAGED_COPY | COPY_WP | WRITE_PROTECTED | 0 | 0 | 0 | pg_activate refault
7wp | SWAP_IN | COPY_WP | WRITE_PROTECTED | MAJOR | RETRY | 1 | pswpin workingset_refault
9wake | MAP_CACHED | WAKE | CACHED | NOPAGE | 0 | 0 |
10cache | READ_FOLIO | COPY_CACHE | CACHED | MAJOR | RETRY | 1 |
11cached | COW_FOLIO | COPY | PRESENT | 0 | 0 | 1 | cow
11wake | MAP_CACHED | WAKE | CACHED | NOPAGE | 0 | 0 | cow
11cache | COW_FOLIO | COPY_CACHE | CACHED | MAJOR | RETRY | 1 | cow
12wp | READ_FOLIO | COPY_WP | WRITE_PROTECTED | MAJOR | RETRY | 1 |
12dup | WAKE | WAKE | - | NOPAGE | 0 | 0 | duplicate
14wp | MAP_CACHED | CONTINUE_WP | WRITE_PROTECTED | 0 | 0 | 0 |
14gone | WAKE | WAKE | - | NOPAGE | 0 | 0 | race_lost
16cached | MAP_CACHED | COPY_WP | WRITE_PROTECTED | 0 | 0 | 1 |
17cached | MKWRITE_FOLIO | COPY | PRESENT | 0 | RETRY,COMPLETED | 1 | mkwrite dirtied
18zero | REUSE | UNPROTECT | PRESENT | 0 | 0 | 1 | pgreuse dirtied
18hook | MKWRITE | UNPROTECT | PRESENT | 0 | RETRY,COMPLETED | 0 | mkwrite dirtied pgreuse
18zerohook | MKWRITE | UNPROTECT | PRESENT | 0 | RETRY,COMPLETED | 1 | mkwrite dirtied pgreuse
19wake | COW_SNAPSHOT | WAKE | - | NOPAGE | RETRY | 1 | cow
19huge | COW_SNAPSHOT | UNPROTECT | PRESENT | 0 | RETRY | 512 | cow
20wake | COW_SNAPSHOT | WAKE | - | NOPAGE | 0 | 0 |
21map | REUSE | UNPROTECT | PRESENT | 0 | 0 | 1 | cow dirtied
23keep | CANCEL_EVICT | WAKE | WRITE_PROTECTED | NOPAGE | 0 | 0 | evict_cancel
23late | WAKE | WAKE | - | NOPAGE | 0 | 0 | spurious
24gone | WAKE | WAKE | - | NOPAGE | 0 | 0 | spurious
26disk | SNAP_FRAME | COPY_WP | WRITE_PROTECTED | MAJOR | RETRY | 1 |
27wp | ZERO_FILL | COPY_WP | WRITE_PROTECTED | 0 | 0 | 1 | zero_fill
28disk | SNAP_COW | COPY | PRESENT | MAJOR | RETRY | 1 | cow
29zero | REUSE | UNPROTECT | PRESENT | 0 | 0 | 1 | pgreuse dirtied
30duplicate | WAKE | WAKE | - | NOPAGE | 0 | 0 | duplicate
30lost | WAKE | NONE | NONE | RETRY | 0 | 0 | lost_page
30marker | WAKE | NONE | NONE_WP | RETRY | 0 | 0 | lost_page
30found | WAKE | WAKE | PRESENT | NOPAGE | 0 | 0 | duplicate
30foundwp | WAKE | WAKE | WRITE_PROTECTED | NOPAGE | 0 | 0 | duplicate
31huge | POISON | POISON | POISONED | HWPOISON_LARGE | 0 | 0 | poison_hit
33wp | FILL_BLOCK | COPY_BLOCK_WP | WRITE_PROTECTED | 0 | 0 | 512 | thp_alloc
33read | FILL_BLOCK | COPY_BLOCK | PRESENT | MAJOR | RETRY | 512 | thp_alloc
33readwp | FILL_BLOCK | COPY_BLOCK_WP | WRITE_PROTECTED | MAJOR | RETRY | 512 | thp_alloc
33fallback | WAKE | NONE | - | FALLBACK | 0 | 0 | thp_fallback
34wp | HUGETLB_FILL | COPY_WP | WRITE_PROTECTED | 0 | 0 | 512 |
34read | HUGETLB_FILL | COPY | PRESENT | MAJOR | RETRY | 512 |
34readwp | HUGETLB_FILL | COPY_WP | WRITE_PROTECTED | MAJOR | RETRY | 512 |
34reuse | REUSE | UNPROTECT | PRESENT | 0 | 0 | 0 | pgreuse dirtied
35wp | STAGED_COPY | COPY_WP | WRITE_PROTECTED | 0 | 0 | 0 | numa_hint
X-OOMwp | DENY_WRITE | WAKE | - | OOM | 0 | 0 | oom deny
X-IOwp | DENY_WRITE | WAKE | - | SIGBUS | 0 | 0 | io_error deny
p7wp | DENY_WRITE | WAKE | - | SIGBUS | 0 | 0 | timeout deny
X-BUG | DENY_WRITE | WAKE | - | SIGBUS | 0 | 0 | bug deny
"""

# faults | regions | page states | flags | row. The first line that fits decides; none: UNREACHABLE.
# faults: MR missing read, MW missing write, WP, IR and IW minor read and write. Regions: A anonymous,
# P private file, S shared file, E emulated sharing, F fork child of a snapshot, H hugetlb.
RULES = """
IR IW       | A P E F H | *                                       |                        | UNREACHABLE
*           | A         | CACHED SNAP_PARENT SNAP_FRAME SNAP_ZERO |                        | UNREACHABLE
*           | P         | ZERO ZERO_WP SNAP_PARENT SNAP_FRAME SNAP_ZERO |                  | UNREACHABLE
*           | S         | ZERO ZERO_WP STAGED STAGED_WP SWAPPED SWAPPED_WP |               | UNREACHABLE
*           | S         | SNAP_PARENT SNAP_FRAME SNAP_ZERO        |                        | UNREACHABLE
*           | E         | ZERO ZERO_WP STAGED STAGED_WP SWAPPED SWAPPED_WP |               | UNREACHABLE
*           | E         | CACHED SNAP_PARENT SNAP_FRAME SNAP_ZERO |                        | UNREACHABLE
*           | F         | CACHED                                  |                        | UNREACHABLE
*           | H         | ZERO ZERO_WP STAGED STAGED_WP SWAPPED SWAPPED_WP EVICTING EVICTED | | UNREACHABLE
*           | H         | CACHED SNAP_PARENT SNAP_FRAME SNAP_ZERO |                        | UNREACHABLE

*           | *         | BUSY                                    |                        | p3
*           | H         | POISONED                                |                        | 31huge
*           | *         | POISONED                                |                        | 31
*           | *         | GUARD                                   |                        | 32
MR MW IR IW | *         | EVICTING EVICTED                        |                        | p3
MR MW IR IW | *         | ZERO ZERO_WP PRESENT WRITE_PROTECTED    |                        | 30

MR          | A F       | NONE     | HUGE_OK !TRACKED !HOOK           | 33
MR          | A F       | NONE     | HUGE_OK                          | 33wp
MW          | A F       | NONE     | HUGE_OK !HOOK                    | 33
MR          | P         | NONE     | HUGE_OK TRACKED !CACHED          | 33readwp
MW          | P         | NONE     | HUGE_OK TRACKED !CACHED !HOOK    | 33read
MR          | S         | NONE     | HUGE_OK !CACHED !TRACKED !HOOK   | 33read
MR          | S         | NONE     | HUGE_OK !CACHED                  | 33readwp
MR          | E         | NONE     | HUGE_OK !CACHED                  | 33readwp

MR          | A F       | NONE     | !TRACKED !HOOK                   | 1
MR          | A F       | NONE     |                                  | 2
MR          | A F       | NONE_WP  |                                  | 3
MW          | A F       | NONE NONE_WP | HOOK                         | 5hook
MW          | A F       | NONE     |                                  | 4
MW          | A F       | NONE_WP  |                                  | 5
MR MW       | A         | STAGED   | HINT !SNAPSHOT_HELD              | 35
MR MW       | A         | STAGED STAGED_WP | HINT                     | 35wp
MR MW       | A P F     | STAGED   | !SNAPSHOT_HELD                   | 6
MR MW       | A P F     | STAGED STAGED_WP |                          | 6wp
MR MW       | A P F     | SWAPPED  | !SNAPSHOT_HELD                   | 7
MW          | A P F     | SWAPPED_WP | !SNAPSHOT_HELD !HOOK           | 7
MR MW       | A P F     | SWAPPED SWAPPED_WP |                        | 7wp

MR          | P         | NONE CACHED  | CACHED !TRACKED              | 9wake
MR          | P         | NONE NONE_WP CACHED | CACHED                | 9
MR          | P         | NONE CACHED  | !TRACKED                     | 10cache
MR          | P         | NONE NONE_WP CACHED |                       | 10
MW          | P         | NONE CACHED  | CACHED !TRACKED              | 11wake
MW          | P         | NONE NONE_WP CACHED | CACHED                | 11cached
MW          | P         | NONE CACHED  | !TRACKED                     | 11cache
MW          | P         | NONE NONE_WP CACHED |                       | 11
MR MW       | S         | NONE NONE_WP CACHED | CACHED                | 12dup
MR          | S         | NONE CACHED  | !TRACKED !HOOK               | 12
MR          | S         | NONE NONE_WP CACHED |                       | 12wp
MW          | S         | NONE NONE_WP CACHED |                       | 13
IR IW       | S         | NONE NONE_WP CACHED | !CACHED               | 14gone
IR          | S         | NONE CACHED  | !TRACKED !HOOK               | 14
IR          | S         | NONE NONE_WP CACHED |                       | 14wp
IW          | S         | NONE NONE_WP CACHED |                       | 15
MR          | E         | NONE NONE_WP | CACHED                       | 16cached
MR          | E         | NONE NONE_WP |                              | 16
MW          | E         | NONE NONE_WP | CACHED                       | 17cached
MW          | E         | NONE NONE_WP |                              | 17

WP          | *         | EVICTING | !SNAPSHOT_HELD !HOOK             | 23
WP          | *         | EVICTING |                                  | 23keep
WP          | *         | EVICTED  |                                  | 23late
WP          | *         | PRESENT ZERO |                              | 24
WP          | *         | STAGED STAGED_WP SWAPPED SWAPPED_WP |       | 24gone
WP          | A E F H   | NONE NONE_WP SNAP_PARENT SNAP_FRAME SNAP_ZERO | | 24gone
WP          | P S       | NONE NONE_WP CACHED | !CACHED               | 24gone
WP          | P         | NONE NONE_WP CACHED | !SNAPSHOT_HELD        | 21map
WP          | P S       | NONE NONE_WP CACHED | SNAPSHOT_HELD         | 19wake
WP          | S         | NONE NONE_WP CACHED |                       | 22
WP          | H         | WRITE_PROTECTED | SNAPSHOT_HELD             | 19huge
WP          | H         | WRITE_PROTECTED |                           | 34reuse
WP          | S E       | WRITE_PROTECTED | SNAPSHOT_HELD             | 19wake
WP          | S E       | WRITE_PROTECTED |                           | 22
WP          | A F       | ZERO_WP  | SNAPSHOT_HELD HOOK               | 20wake
WP          | A F       | ZERO_WP  | SNAPSHOT_HELD                    | 20
WP          | A F       | ZERO_WP  | HOOK                             | 18zerohook
WP          | A         | ZERO_WP  |                                  | 18zero
WP          | F         | ZERO_WP  |                                  | 29zero
WP          | A P F     | WRITE_PROTECTED | SNAPSHOT_HELD HOOK        | 19wake
WP          | A P F     | WRITE_PROTECTED | SNAPSHOT_HELD             | 19
WP          | P         | WRITE_PROTECTED |                           | 21
WP          | A F       | WRITE_PROTECTED | HOOK                      | 18hook
WP          | A         | WRITE_PROTECTED |                           | 18
WP          | F         | WRITE_PROTECTED |                           | 29

MW          | F         | SNAP_FRAME | !HOOK !CACHED                  | 28disk
MW          | F         | SNAP_PARENT SNAP_FRAME SNAP_ZERO | !HOOK    | 28
MR MW       | F         | SNAP_PARENT |                               | 25
MR MW       | F         | SNAP_FRAME | !CACHED                        | 26disk
MR MW       | F         | SNAP_FRAME |                                | 26
MR          | F         | SNAP_ZERO  | !TRACKED !HOOK                 | 27
MR MW       | F         | SNAP_ZERO  |                                | 27wp

MR          | H         | NONE     | CACHED !TRACKED                  | 34
MR          | H         | NONE NONE_WP | CACHED                       | 34wp
MR          | H         | NONE     | !TRACKED                         | 34read
MR          | H         | NONE NONE_WP |                              | 34readwp
MW          | H         | NONE NONE_WP | CACHED                       | 34
MW          | H         | NONE NONE_WP |                              | 34read
"""

LETTER = dict(zip(Backing, "APSEFH", strict=True))
FAULT = {
    (FaultKind.MISSING, Access.READ): "MR",
    (FaultKind.MISSING, Access.WRITE): "MW",
    (FaultKind.WP, Access.WRITE): "WP",
    (FaultKind.MINOR, Access.READ): "IR",
    (FaultKind.MINOR, Access.WRITE): "IW",
}  # a write-protect fault that is no write: UNREACHABLE
PROLOGUE = (
    ("EVENT", "p1"),
    ("NO_REGION", "p2"),
    ("CLOSING", "p4"),
    ("DEADLINE", "p7"),  # before p3: a fault that joined a fill which never ends must end itself
    ("PAGE_BUSY", "p3"),
    ("WRITE_DENIED", "p5"),
    ("BEYOND_SIZE", "p6"),
)


def parsed(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        if line.strip():
            yield [column.strip() for column in line.split("|")]


def expected_cells() -> Iterator[int]:
    """For each cell in table order the rule that decides it, by RULES alone; -1: none."""
    rules = [
        (set(faults.split()), set(regions.split()), set(ptes.split()), conditions(flags))
        for faults, regions, ptes, flags, _ in parsed(RULES)
    ]
    for kind, access, backing, pte in itertools.product(FaultKind, Access, Backing, PteState):
        fault = FAULT.get((kind, access), "impossible")
        fitting = [
            (required, forbidden, number)
            for number, (faults, regions, ptes, (required, forbidden)) in enumerate(rules)
            if fault != "impossible"
            and faults & {fault, "*"}
            and regions & {LETTER[backing], "*"}
            and ptes & {pte.name, "*"}
        ]
        for flags in range(64):
            yield next(
                (
                    number
                    for required, forbidden, number in fitting
                    if flags & required == required and not flags & forbidden
                ),
                -1,
            )


def conditions(text: str) -> tuple[int, int]:
    required = forbidden = 0
    for word in text.split():
        if word.startswith("!"):
            forbidden |= FaultFlag[word[1:]]
        else:
            required |= FaultFlag[word]
    return required, forbidden


def row_bytes(outcome: list[str], row_id: int) -> bytes:
    """What the compiled table must hold for a line of OUTCOMES."""
    name, action, commit, next_pte, result, may_add, nr_charge, counters = outcome
    digits = "".join(itertools.takewhile(str.isdigit, name))
    return struct.pack(
        "<4BI3H2BQ",
        row_id,
        Action[action],
        Commit[commit],
        0xFF if next_pte == "-" else PteState[next_pte],
        bit_set(result),
        int(nr_charge),
        int(digits or 0),
        bit_set(may_add),
        ROW_ID["6copy"] if commit == "MOVE" else 0,
        0,
        sum(1 << Counter[c] for c in counters.split()),
    )


def bit_set(text: str) -> int:
    return 0 if text == "0" else sum(FaultResult[bit] for bit in text.split(","))


def bits(flags: FaultResult) -> str:
    return describe(flags).replace("|", ",")


ROW_ID = {r.name: r.id for r in ROWS}
RULE_ROWS = [ROW_ID[name] for *_, name in parsed(RULES)] + [ROW_ID["UNREACHABLE"]]
DECIDED_BY = list(expected_cells())
EXPECTED_CELLS = bytes(RULE_ROWS[number] for number in DECIDED_BY)


def test_every_cell_is_as_restated() -> None:
    cells = compile_tables().cells
    assert len(cells) == 3 * 2 * 6 * 19 * 64 == len(EXPECTED_CELLS)
    keys = itertools.product(FaultKind, Access, Backing, PteState, range(64))
    wrong = [
        (*(k.name for k in key[:4]), bin(key[4]), ROWS[found].name, ROWS[expected].name)
        for key, found, expected in zip(keys, cells, EXPECTED_CELLS, strict=True)
        if found != expected
    ]
    assert not wrong


def test_every_rule_is_needed() -> None:
    """A rule that decides nothing states nothing."""
    assert set(DECIDED_BY) >= set(range(len(RULE_ROWS) - 1))


@pytest.mark.parametrize("outcome", list(parsed(OUTCOMES)), ids=lambda o: o[0])
def test_every_row_is_as_restated(outcome: list[str]) -> None:
    name, action, commit, next_pte, result, may_add, nr_charge, counters = outcome
    r = row(name)
    assert (r.action.name, r.commit.name) == (action, commit)
    assert (r.next_pte.name if r.next_pte is not None else "-") == next_pte
    assert (bits(r.result), bits(r.may_add)) == (result, may_add)
    assert r.nr_charge == int(nr_charge)
    assert {c.name for c in r.counters} == set(counters.split())
    assert r.fallback == ("6copy" if commit == "MOVE" else None)
    assert r.why


def test_no_row_is_forgotten() -> None:
    assert [name for name, *_ in parsed(OUTCOMES)] == [r.name for r in ROWS]


def test_the_prologue_is_in_order_and_before_everything() -> None:
    """Poison would destroy the page that a write-protected store waits for, or be refused for ever."""
    admit = compile_tables().admit
    assert len(admit) == 3 * 128
    for kind, prologue in itertools.product(FaultKind, range(128)):
        flags = FaultFlag(prologue << 6)
        first = next((name for flag, name in PROLOGUE if flags & FaultFlag[flag]), None)
        if kind is FaultKind.WP and first == "p7":
            first = "p7wp"
        assert admit[kind * 128 + prologue] == (PASS if first is None else ROW_ID[first])
        if first is None:
            continue
        for key in itertools.product(Access, Backing, PteState):
            assert decide(kind, *key, flags).name == first


def test_decide_is_handle_mm_fault_and_pure() -> None:
    key = (FaultKind.WP, Access.WRITE, Backing.ANON, PteState.WRITE_PROTECTED, FaultFlag.HOOK)
    other = Fault(*key, region=7, generation=3, pgoff=9, version=2, tid=1, deadline_ns=5, tries=4)
    assert decide(*key) is decide(*key) is handle_mm_fault(Fault(*key)) is handle_mm_fault(other)


def test_every_row_is_reached() -> None:
    tables = compile_tables()
    reached = {ROWS[i].name for i in tables.cells}
    reached |= {ROWS[i].name for i in tables.admit if i != PASS}
    ends = [settle(*key) for key in itertools.product(Commit, ErrnoClass)]
    ends += [settle_truth(*key) for key in itertools.product(Commit, Truth, Backing)]
    reached |= {end.row.name for end in ends if end.row is not None}
    assert {r.name for r in ROWS} - reached == {"8"}  # which is X-IO of row 7:
    eio = settle(row("7").commit, ErrnoClass.EIO).row
    assert eio is not None
    assert (eio.action, eio.commit, eio.next_pte, eio.result, eio.counters) == (
        row("8").action,
        row("8").commit,
        row("8").next_pte,
        row("8").result,
        row("8").counters,
    )


def test_every_step_of_a_page_is_legal() -> None:
    for key in itertools.product(FaultKind, Access, Backing, PteState, range(64)):
        *_, pte, _flags = key
        after = ROWS[compile_tables().cells[cell_index(*key[:4], FaultFlag(key[4]))]].next_pte
        assert after is None or (pte, after) in LEGAL_PTE_TRANSITIONS


# ---- mutations: the restatement notices --------------------------------------------------------------

EXPECTED_ROWS = b"".join(row_bytes(o, i) for i, o in enumerate(parsed(OUTCOMES)))
EXPECTED_LEGAL = bytes(
    pair in LEGAL_PTE_TRANSITIONS for pair in itertools.product(PteState, repeat=2)
)


def noticed(tables: Tables) -> bool:
    return (tables.cells, tables.rows, tables.legal_pte) != (
        EXPECTED_CELLS,
        EXPECTED_ROWS,
        EXPECTED_LEGAL,
    )


def test_the_compiled_tables_are_as_restated() -> None:
    assert not noticed(compile_tables())


@pytest.mark.parametrize("table", ["cells", "rows", "legal_pte"])
@pytest.mark.parametrize("seed", range(8))
def test_any_changed_byte_is_noticed(table: str, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        content = bytearray(getattr(compile_tables(), table))
        content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        assert noticed(dataclasses.replace(compile_tables(), **{table: bytes(content)}))


def test_any_two_swapped_rows_are_noticed() -> None:
    for a, b in itertools.combinations(range(len(ROWS)), 2):
        packed = [EXPECTED_ROWS[24 * i : 24 * i + 24] for i in range(len(ROWS))]
        packed[a], packed[b] = packed[b], packed[a]
        assert noticed(dataclasses.replace(compile_tables(), rows=b"".join(packed)))
        if a in EXPECTED_CELLS or b in EXPECTED_CELLS:
            swapped = EXPECTED_CELLS.translate(bytes.maketrans(bytes([a, b]), bytes([b, a])))
            assert noticed(dataclasses.replace(compile_tables(), cells=swapped))
