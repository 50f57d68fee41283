"""The contracts of mm/memory.c as named checks over the table, the settlements and the plans.

Each returns what breaks it, as text; nothing means that it holds. The parts that a check looks at are
arguments, so that a test can hand it broken ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from .action import Action, Commit, Counter, ErrnoClass, Settlement
from .fault import (
    MAIN_FLAGS,
    VM_FAULT_ERROR,
    Access,
    Backing,
    FaultFlag,
    FaultKind,
    FaultResult,
)
from .handle import decide
from .pte import LEGAL_PTE_TRANSITIONS, PteState
from .rows import Row
from .settle import Settled, mm_account_fault, settle
from .steps import SLEEPS, USES_REGION, Step

__all__ = ["CELL_CHECKS", "OTHER_CHECKS", "PLAN_CHECKS", "Cell", "every_cell"]


class Cell(NamedTuple):
    """One cell of the main table."""

    kind: FaultKind
    access: Access
    backing: Backing
    pte: PteState
    flags: FaultFlag
    row: Row

    def __str__(self) -> str:
        names = (self.kind.name, self.access.name, self.backing.name, self.pte.name)
        return f"{' '.join(names)} {self.flags!r}: row {self.row}"


def every_cell() -> Iterator[Cell]:
    """The whole product, in the order of the compiled table."""
    flags = [FaultFlag(f) for f in range(int(MAIN_FLAGS) + 1)]
    for key in itertools.product(FaultKind, Access, Backing, PteState, flags):
        yield Cell(*key, decide(*key))


# ---- order: over the plan of every row -------------------------------------------------------------

Plan = Sequence[Step]
PlanCheck = Callable[[Row, Plan], Iterator[str]]


def check_vma_not_dereferenced_after_handle_mm_fault(row: Row, steps: Plan) -> Iterator[str]:
    """A lock was, or may have been, dropped: the region is looked up again or not used."""
    held = False
    for step in steps:
        if step is Step.LOOK_UP_REGION:
            held = True
        elif step in (Step.PUT_REGION, Step.EXIT_REGION):
            held = False
        elif step in USES_REGION and not held:
            yield f"row {row}: {step.name} without the region"


def check_contents_before_pte(row: Row, steps: Plan) -> Iterator[str]:
    """Whatever makes the page right is complete before others can see it."""
    if Step.COMMIT not in steps:
        return
    before = steps[: steps.index(Step.COMMIT)]
    for step in (Step.READ, Step.FILL, Step.HOOK, Step.STORE, Step.MARK_DIRTY):
        if step in steps and step not in before:
            yield f"row {row}: {step.name} after the commit"
    copies = {Commit.COPY, Commit.COPY_WP, Commit.COPY_CACHE, Commit.COPY_CACHE_WP}
    if row.commit in copies | {Commit.COPY_BLOCK, Commit.COPY_BLOCK_WP} and Step.FILL not in steps:
        yield f"row {row}: commits a buffer that nothing filled"


def check_prealloc_before_folio_lock(row: Row, steps: Plan) -> Iterator[str]:
    """Allocating or charging under a folio lock could wait for reclaim, which waits for the folio."""
    if Step.LOCK_FOLIO not in steps:
        return
    for step in (Step.PREALLOC, Step.CHARGE):
        if step in steps[steps.index(Step.LOCK_FOLIO) :]:
            yield f"row {row}: {step.name} under the folio lock"


def check_recheck_under_ptl(row: Row, steps: Plan) -> Iterator[str]:
    """Nothing is committed or published without the lock, and nothing before the comparison."""
    locked = checked = False
    for step in steps:
        if step is Step.PTE_LOCK:
            locked, checked = True, False
        elif step is Step.PTE_UNLOCK:
            locked = False
        elif step is Step.RECHECK:
            checked = locked
        elif step in (Step.COMMIT, Step.PUBLISH) and not (locked and checked):
            yield f"row {row}: {step.name} without a recheck under the page-table lock"


def check_no_sleep_under_ptl(row: Row, steps: Plan) -> Iterator[str]:
    """No I/O, no hook, no waiting, no allocation while the page-table lock is held."""
    locked = False
    for step in steps:
        if step in (Step.PTE_LOCK, Step.PTE_UNLOCK):
            locked = step is Step.PTE_LOCK
        elif locked and step in SLEEPS | {Step.PREALLOC, Step.CHARGE, Step.SCAN, Step.LOCK_FOLIO}:
            yield f"row {row}: {step.name} under the page-table lock"


def check_retry_drops_the_region(row: Row, steps: Plan) -> Iterator[str]:
    """Sleeping lets go of the region first; only a row that sleeps may answer RETRY."""
    for before, step in itertools.pairwise(steps):
        if step in SLEEPS and before is not Step.PUT_REGION:
            yield f"row {row}: {step.name} keeps the region"
    if row.may_add & FaultResult.RETRY and not SLEEPS.intersection(steps):
        yield f"row {row}: RETRY without anything to wait for"


def check_wake_after_publish(row: Row, steps: Plan) -> Iterator[str]:
    """Whoever is woken finds the new state."""
    if Step.WAKE in steps and Step.PUBLISH in steps[steps.index(Step.WAKE) :]:
        yield f"row {row}: published after the wake"
    if (Step.PUBLISH in steps) is not (
        row.next_pte is not None or row.commit not in (Commit.NONE, Commit.WAKE)
    ):
        yield f"row {row}: publishes nothing, or what is not its own"


def check_charge_before_commit(row: Row, steps: Plan) -> Iterator[str]:
    """charged_iff_resident: what will be resident is charged before it is."""
    if (Step.CHARGE in steps) is not (row.nr_charge > 0):
        yield f"row {row}: charge of {row.nr_charge} pages"
    elif Step.CHARGE in steps and Step.PTE_LOCK in steps[: steps.index(Step.CHARGE)]:
        yield f"row {row}: charged too late"


def check_finish_fault_has_the_folio(row: Row, steps: Plan) -> Iterator[str]:
    """finish_fault() gets the folio locked, and it is let go only behind it."""
    if Step.LOCK_FOLIO not in steps:
        return
    if Step.UNLOCK_FOLIO not in steps:
        yield f"row {row}: keeps the folio"
    elif Step.PTE_LOCK in steps[steps.index(Step.UNLOCK_FOLIO) :]:
        yield f"row {row}: commits a folio that it let go"


def check_every_message_ends(row: Row, steps: Plan) -> Iterator[str]:
    """Each message ends in an install, an un-write-protect, a poison or a wake; or it starts again."""
    if Step.WAKE not in steps and not (
        row.result & (FaultResult.RETRY | FaultResult.FALLBACK)
        or row.action is Action.READ_EVENT
        or row.name == "X-GONE"
    ):
        yield f"row {row}: nobody is woken"


# ---- decisions: over every cell --------------------------------------------------------------------

_GRANTED = frozenset({PteState.PRESENT, PteState.ZERO})
# The write was let through before, and nothing has taken it back since.
_WAS_WRITABLE = _GRANTED | {PteState.STAGED, PteState.SWAPPED}
# What a snapshot may hold: protected, or taken by reclaim.
_HAS_CONTENT = frozenset(
    {PteState.WRITE_PROTECTED, PteState.EVICTING}
    | {PteState.STAGED, PteState.STAGED_WP, PteState.SWAPPED, PteState.SWAPPED_WP}
)


def check_transitions_are_legal(cell: Cell) -> Iterator[str]:
    """legal_transitions_only"""
    next_pte = cell.row.next_pte
    if next_pte is not None and (cell.pte, next_pte) not in LEGAL_PTE_TRANSITIONS:
        yield f"{cell}: {cell.pte.name} -> {next_pte.name}"


def check_poison_and_guard_never_pierced(cell: Cell) -> Iterator[str]:
    """COPY overwrites both without a word."""
    harmless = (Commit.POISON, Commit.WAKE)
    if cell.pte in (PteState.POISONED, PteState.GUARD) and cell.row.commit not in harmless:
        yield str(cell)


def check_write_seen_or_not_tracked(cell: Cell) -> Iterator[str]:
    """Under TRACKED a read never makes a page writable, and the kernel is never left to itself."""
    if not cell.flags & FaultFlag.TRACKED or cell.row.next_pte is None:
        return
    unseen = {Commit.ZEROPAGE, Commit.COPY_CACHE, Commit.COPY_CACHE_WP}
    if cell.row.commit in unseen or cell.row.next_pte is PteState.CACHED:
        yield f"{cell}: an unseen kernel copy"
    grants = cell.row.next_pte in _GRANTED and cell.pte not in _WAS_WRITABLE
    if cell.access is Access.READ and grants:
        yield f"{cell}: a read grants the write"


def check_marker_is_kept(cell: Cell) -> Iterator[str]:
    """A read of a hole with a marker keeps it, whatever the flags say."""
    loses = cell.row.next_pte in _GRANTED or cell.row.commit is Commit.ZEROPAGE
    if cell.pte is PteState.NONE_WP and cell.access is Access.READ and loses:
        yield str(cell)


def check_copy_before_write(cell: Cell) -> Iterator[str]:
    """A page that a snapshot holds becomes writable only after it was stored (zeros need no store)."""
    held = cell.flags & FaultFlag.SNAPSHOT_HELD and cell.pte in _HAS_CONTENT
    grants = cell.row.next_pte in _GRANTED
    if held and grants and cell.row.action is not Action.COW_SNAPSHOT:
        yield str(cell)


def check_hook_before_write(cell: Cell) -> Iterator[str]:
    """Under HOOK no page becomes writable unasked."""
    if not cell.flags & FaultFlag.HOOK or cell.row.next_pte not in _GRANTED:
        return
    if cell.backing in (Backing.PRIVATE_FILE, Backing.HUGETLB) or cell.pte in _WAS_WRITABLE:
        return
    if cell.row.action not in (Action.MKWRITE, Action.MKWRITE_FOLIO):
        yield str(cell)


def check_file_write_is_dirty(cell: Cell) -> Iterator[str]:
    """A shared page that becomes writable for a writer is dirty from then on."""
    if cell.backing not in (Backing.SHARED_FILE, Backing.SHARED_ANON):
        return
    grants = cell.access is Access.WRITE and cell.row.next_pte is PteState.PRESENT
    asked = Counter.dirtied in cell.row.counters
    if grants and not asked and cell.pte is not PteState.PRESENT:
        yield str(cell)


def check_huge_fallback_never_leaves(cell: Cell) -> Iterator[str]:
    """FALLBACK stays inside __handle_mm_fault(); a block is only for who may have one."""
    if cell.row.result & FaultResult.FALLBACK:
        yield str(cell)
    if cell.row.action is Action.FILL_BLOCK and not cell.flags & FaultFlag.HUGE_OK:
        yield str(cell)


# ---- settlements, accounting -----------------------------------------------------------------------

Settle = Callable[[Commit, ErrnoClass], Settled]


def check_bug_is_loud(settled: Settle = settle) -> Iterator[str]:
    """EINVAL and the unknown fail the access, visibly; poisoning that failed is not tried again."""
    for commit, errno in itertools.product(Commit, (ErrnoClass.EINVAL, ErrnoClass.OTHER)):
        end = settled(commit, errno)
        if end.settlement not in (Settlement.POISON, Settlement.DENY):
            yield f"{commit.name} {errno.name}: {end.settlement.name}"
        if not end.result & FaultResult.SIGBUS:
            yield f"{commit.name} {errno.name}: no SIGBUS"
    for errno in ErrnoClass:
        if settled(Commit.POISON, errno).settlement in (Settlement.POISON, Settlement.RECLAIM):
            yield f"POISON {errno.name}: poisons again"


def check_lost_race_is_no_error(settled: Settle = settle) -> Iterator[str]:
    """0 or NOPAGE, and the instruction runs again."""
    benign = (ErrnoClass.RACE, ErrnoClass.CHANGING, ErrnoClass.ESRCH)
    commits = [c for c in Commit if c not in (Commit.NONE, Commit.WAKE, Commit.UNPROTECT)]
    cases = [*itertools.product(Commit, benign)]
    cases += itertools.product(commits, (ErrnoClass.EEXIST, ErrnoClass.PARTIAL))
    for commit, errno in cases:
        if settled(commit, errno).result & VM_FAULT_ERROR & ~FaultResult.FALLBACK:
            yield f"{commit.name} {errno.name}: {settled(commit, errno)}"


def check_settlement_agrees_with_result(settled: Settle = settle) -> Iterator[str]:
    """The result says what the settlement does."""
    for commit, errno in itertools.product(Commit, ErrnoClass):
        end = settled(commit, errno)
        fails = end.settlement in (Settlement.POISON, Settlement.DENY, Settlement.RECLAIM)
        if fails is not bool(end.result & VM_FAULT_ERROR & ~FaultResult.FALLBACK):
            yield f"{commit.name} {errno.name}: {end.settlement.name} with {end.result!r}"
        if (end.settlement is Settlement.RETRY) is not bool(end.result & FaultResult.RETRY):
            yield f"{commit.name} {errno.name}: {end.settlement.name} with {end.result!r}"
        if bool(end.result & FaultResult.FALLBACK) and end.settlement is not Settlement.ORDER0:
            yield f"{commit.name} {errno.name}: FALLBACK leaves"


def check_errors_add_up(
    account: Callable[[FaultResult, int], frozenset[Counter]] = mm_account_fault,
) -> Iterator[str]:
    """pgfault = pgmajfault + pgminfault + pgfault_failed, for every result and any number of tries."""
    parts = {Counter.pgmajfault, Counter.pgminfault, Counter.pgfault_failed}
    for bits, tries in itertools.product(range(0x8000), (0, 1)):
        counted = account(FaultResult(bits), tries)
        if len(counted & parts) != (Counter.pgfault in counted) or counted - parts - {
            Counter.pgfault
        }:
            yield f"result {bits:#x}, {tries} tries: {counted}"


PLAN_CHECKS: tuple[PlanCheck, ...] = (
    check_vma_not_dereferenced_after_handle_mm_fault,
    check_contents_before_pte,
    check_prealloc_before_folio_lock,
    check_recheck_under_ptl,
    check_no_sleep_under_ptl,
    check_retry_drops_the_region,
    check_wake_after_publish,
    check_charge_before_commit,
    check_finish_fault_has_the_folio,
    check_every_message_ends,
)
CELL_CHECKS: tuple[Callable[[Cell], Iterator[str]], ...] = (
    check_transitions_are_legal,
    check_poison_and_guard_never_pierced,
    check_write_seen_or_not_tracked,
    check_marker_is_kept,
    check_copy_before_write,
    check_hook_before_write,
    check_file_write_is_dirty,
    check_huge_fallback_never_leaves,
)
OTHER_CHECKS: tuple[Callable[[], Iterator[str]], ...] = (
    check_bug_is_loud,
    check_lost_race_is_no_error,
    check_settlement_agrees_with_result,
    check_errors_add_up,
)
