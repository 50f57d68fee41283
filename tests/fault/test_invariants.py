"""The contracts of mm/memory.c hold for every row and cell; and each check sees what breaks it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest

from uffd_vm.fault import invariants
from uffd_vm.fault.action import Action, Commit, Counter, ErrnoClass, Settlement
from uffd_vm.fault.fault import Access, Backing, FaultFlag, FaultKind, FaultResult
from uffd_vm.fault.invariants import CELL_CHECKS, OTHER_CHECKS, PLAN_CHECKS, Cell, every_cell
from uffd_vm.fault.plan import plan
from uffd_vm.fault.pte import PteState
from uffd_vm.fault.rows import ROWS, Row, row
from uffd_vm.fault.settle import Settled, settle
from uffd_vm.fault.steps import Step

S = Step
NO_FLAGS = FaultFlag(0)


@pytest.mark.parametrize("check", PLAN_CHECKS, ids=lambda c: c.__name__)
def test_order_of_work_keeps(check: invariants.PlanCheck) -> None:
    for r in ROWS:
        assert not list(check(r, plan(r)))


def test_every_cell_keeps_all() -> None:
    assert not [
        f"{check.__name__}: {text}"
        for cell in every_cell()
        for check in CELL_CHECKS
        for text in check(cell)
    ]


@pytest.mark.parametrize("check", OTHER_CHECKS, ids=lambda c: c.__name__)
def test_settlements_and_accounting_keep(check: Callable[[], Iterator[str]]) -> None:
    assert not list(check())


def test_checks_are_complete() -> None:
    """No check is written and then not called."""
    named = {name for name in vars(invariants) if name.startswith("check_")}
    assert named == {c.__name__ for c in (*PLAN_CHECKS, *CELL_CHECKS, *OTHER_CHECKS)}


# ---- each check sees what breaks it ------------------------------------------------------------------


def without(r: Row, *steps: Step) -> tuple[Step, ...]:
    return tuple(s for s in plan(r) if s not in steps)


def moved(r: Row, step: Step, behind: Step) -> tuple[Step, ...]:
    """The plan of `r` with `step` done right after `behind`."""
    steps = list(without(r, step))
    steps.insert(steps.index(behind) + 1, step)
    return tuple(steps)


BROKEN_PLANS: list[tuple[str, Row, tuple[Step, ...]]] = [
    (
        "vma_not_dereferenced_after_handle_mm_fault",
        row("4"),
        moved(row("4"), S.CHARGE, S.EXIT_REGION),
    ),
    ("vma_not_dereferenced_after_handle_mm_fault", row("12"), moved(row("12"), S.CHARGE, S.READ)),
    ("contents_before_pte", row("4"), moved(row("4"), S.FILL, S.COMMIT)),
    ("contents_before_pte", row("22"), moved(row("22"), S.HOOK, S.COMMIT)),
    ("contents_before_pte", row("19"), moved(row("19"), S.STORE, S.COMMIT)),
    ("contents_before_pte", row("2"), without(row("2"), S.FILL)),
    ("prealloc_before_folio_lock", row("12"), moved(row("12"), S.PREALLOC, S.LOCK_FOLIO)),
    ("prealloc_before_folio_lock", row("11"), moved(row("11"), S.CHARGE, S.FILL)),
    ("recheck_under_ptl", row("1"), moved(row("1"), S.RECHECK, S.READ_PTE)),
    ("recheck_under_ptl", row("1"), moved(row("1"), S.PUBLISH, S.PTE_UNLOCK)),
    ("recheck_under_ptl", row("30lost"), without(row("30lost"), S.RECHECK)),
    ("no_sleep_under_ptl", row("7"), moved(row("7"), S.READ, S.PTE_LOCK)),
    ("no_sleep_under_ptl", row("2"), moved(row("2"), S.CHARGE, S.RECHECK)),
    ("retry_drops_the_region", row("10"), without(row("10"), S.PUT_REGION)),
    ("retry_drops_the_region", row("10"), without(row("10"), S.READ)),
    ("wake_after_publish", row("4"), moved(row("4"), S.PUBLISH, S.WAKE)),
    ("wake_after_publish", row("4"), without(row("4"), S.PUBLISH)),
    ("charge_before_commit", row("4"), without(row("4"), S.CHARGE)),
    ("charge_before_commit", row("4"), moved(row("4"), S.CHARGE, S.PTE_LOCK)),
    ("finish_fault_has_the_folio", row("12"), without(row("12"), S.UNLOCK_FOLIO)),
    ("finish_fault_has_the_folio", row("12"), moved(row("12"), S.UNLOCK_FOLIO, S.FILL)),
    ("every_message_ends", row("24gone"), without(row("24gone"), S.WAKE)),
]


@pytest.mark.parametrize("name, r, steps", BROKEN_PLANS)
def test_plan_check_sees(name: str, r: Row, steps: tuple[Step, ...]) -> None:
    check = next(c for c in PLAN_CHECKS if c.__name__ == f"check_{name}")
    assert list(check(r, steps))


def test_every_plan_check_is_seen_to_fail() -> None:
    assert {c.__name__ for c in PLAN_CHECKS} == {f"check_{name}" for name, *_ in BROKEN_PLANS}


MISSING, WP = FaultKind.MISSING, FaultKind.WP
READ, WRITE = Access.READ, Access.WRITE
ANON, SHARED = Backing.ANON, Backing.SHARED_FILE
BROKEN_CELLS: list[tuple[str, Cell]] = [
    ("transitions_are_legal", Cell(MISSING, READ, ANON, PteState.SWAPPED, NO_FLAGS, row("1"))),
    (
        "poison_and_guard_never_pierced",
        Cell(MISSING, READ, ANON, PteState.GUARD, NO_FLAGS, row("4")),
    ),
    (
        "write_seen_or_not_tracked",
        Cell(MISSING, READ, ANON, PteState.NONE, FaultFlag.TRACKED, row("1")),
    ),
    (
        "write_seen_or_not_tracked",
        Cell(MISSING, READ, SHARED, PteState.NONE, FaultFlag.TRACKED, row("12")),
    ),
    ("marker_is_kept", Cell(MISSING, READ, ANON, PteState.NONE_WP, NO_FLAGS, row("1"))),
    (
        "copy_before_write",
        Cell(WP, WRITE, ANON, PteState.WRITE_PROTECTED, FaultFlag.SNAPSHOT_HELD, row("18")),
    ),
    (
        "hook_before_write",
        Cell(WP, WRITE, ANON, PteState.WRITE_PROTECTED, FaultFlag.HOOK, row("18")),
    ),
    (
        "file_write_is_dirty",
        Cell(MISSING, WRITE, SHARED, PteState.NONE, NO_FLAGS, row("12")),
    ),
    (
        "huge_fallback_never_leaves",
        Cell(MISSING, READ, ANON, PteState.NONE, NO_FLAGS, row("33fallback")),
    ),
    (
        "huge_fallback_never_leaves",
        Cell(MISSING, READ, ANON, PteState.NONE, NO_FLAGS, row("33")),
    ),
]


@pytest.mark.parametrize("name, cell", BROKEN_CELLS)
def test_cell_check_sees(name: str, cell: Cell) -> None:
    check = next(c for c in CELL_CHECKS if c.__name__ == f"check_{name}")
    assert list(check(cell))


def test_every_cell_check_is_seen_to_fail() -> None:
    assert {c.__name__ for c in CELL_CHECKS} == {f"check_{name}" for name, _ in BROKEN_CELLS}


def instead(errno: ErrnoClass, end: Settled) -> invariants.Settle:
    return lambda commit, e: end if e is errno else settle(commit, e)


def test_a_silent_bug_is_seen() -> None:
    silent = Settled(Settlement.RETRY, FaultResult.RETRY)
    assert list(invariants.check_bug_is_loud(instead(ErrnoClass.EINVAL, silent)))
    again = Settled(Settlement.POISON, FaultResult.SIGBUS)
    assert list(invariants.check_bug_is_loud(instead(ErrnoClass.ENOMEM, again)))


def test_a_race_that_surfaces_is_seen() -> None:
    error = Settled(Settlement.POISON, FaultResult.SIGBUS)
    for errno in (ErrnoClass.RACE, ErrnoClass.EEXIST, ErrnoClass.CHANGING):
        assert list(invariants.check_lost_race_is_no_error(instead(errno, error)))


def test_a_settlement_that_hides_its_failure_is_seen() -> None:
    hidden = Settled(Settlement.POISON, FaultResult(0))
    check = invariants.check_settlement_agrees_with_result
    assert list(check(instead(ErrnoClass.EIO, hidden)))
    leaves = Settled(Settlement.DROP, FaultResult.FALLBACK)
    assert list(check(instead(ErrnoClass.EIO, leaves)))


def test_wrong_accounts_are_seen() -> None:
    assert list(invariants.check_errors_add_up(lambda result, tries: frozenset({Counter.pgfault})))


def test_plans_end_with_the_epilogue() -> None:
    for r in ROWS:
        steps = plan(r)
        if r.action is Action.READ_EVENT:
            assert steps == ()
            continue
        assert steps[-1] is S.LEAVE_SCOPE
        assert (S.ACCOUNT in steps) is not bool(r.result & FaultResult.RETRY)
        assert steps.index(S.EXIT_REGION) > steps.index(S.READ_PTE)


def test_cow_fault_charges_before_it_reads() -> None:
    steps = plan(row("11"))
    assert steps.index(S.CHARGE) < steps.index(S.READ) < steps.index(S.COMMIT)


def test_a_row_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        row("1").commit = Commit.COPY  # type: ignore[misc]
