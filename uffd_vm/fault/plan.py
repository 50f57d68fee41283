"""The order of work: for each row the steps of its executor, as an executor's trace can show them.

The kernel's contracts in mm/memory.c are about order: contents before the entry, page table before the
folio lock, recheck under the page-table lock, no vma after the fault. The order is data here, so that
invariants.py can check it for every row, and executors can be compared with it.
"""

from __future__ import annotations

from .action import Action, Commit
from .fault import FaultResult
from .rows import Row
from .settle import finish_fault
from .steps import SLEEPS, Step

__all__ = ["plan"]

_S = Step
# What each action does, without the charge and without letting go of the region around a sleep.
_PREPARE: dict[Action, tuple[Step, ...]] = {
    Action.WAKE: (),
    Action.READ_EVENT: (),
    Action.UNREGISTER_STRAY: (),
    Action.JOIN: (_S.WAIT,),
    Action.POISON: (),
    Action.DENY_WRITE: (),
    Action.SCAN: (_S.SCAN,),
    Action.ZERO_FILL: (_S.PREALLOC, _S.FILL),
    Action.MOVE_BACK: (),
    Action.STAGED_COPY: (_S.PREALLOC, _S.FILL),
    Action.SWAP_IN: (_S.PREALLOC, _S.READ, _S.FILL),
    Action.MAP_CACHED: (_S.PREALLOC, _S.LOCK_FOLIO, _S.FILL),
    Action.READ_FOLIO: (_S.PREALLOC, _S.LOCK_FOLIO, _S.READ, _S.FILL),
    Action.COW_FOLIO: (_S.PREALLOC, _S.LOCK_FOLIO, _S.READ, _S.FILL),
    Action.MKWRITE_FOLIO: (
        _S.PREALLOC, _S.LOCK_FOLIO, _S.READ, _S.FILL, _S.HOOK, _S.MARK_DIRTY
    ),
    Action.REUSE: (_S.MARK_DIRTY,),
    Action.COW_SNAPSHOT: (_S.PREALLOC, _S.STORE, _S.MARK_DIRTY),
    Action.MKWRITE: (_S.PREALLOC, _S.LOCK_FOLIO, _S.HOOK, _S.MARK_DIRTY),
    Action.CANCEL_EVICT: (_S.MARK_DIRTY,),
    Action.UNPROTECT_AGAIN: (),
    Action.SNAP_COPY: (_S.PREALLOC, _S.FILL),
    Action.SNAP_FRAME: (_S.PREALLOC, _S.READ, _S.FILL),
    Action.SNAP_COW: (_S.PREALLOC, _S.READ, _S.FILL),
    Action.FILL_BLOCK: (_S.PREALLOC, _S.READ, _S.FILL),
    Action.HUGETLB_FILL: (_S.PREALLOC, _S.READ, _S.FILL),
}  # fmt: skip
# These have no buffer of their own to fill.
_NO_BUFFER = frozenset({Commit.NONE, Commit.WAKE, Commit.ZEROPAGE})


def plan(row: Row) -> tuple[Step, ...]:
    """The steps of `row` in order, when nothing fails."""
    if row.action is Action.READ_EVENT:
        return ()
    prepare = [s for s in _PREPARE[row.action] if _needed(s, row)]
    if row.nr_charge:  # before any folio lock: reclaim may wait for what holds one
        prepare.insert(prepare.index(_S.PREALLOC) + 1 if _S.PREALLOC in prepare else 0, _S.CHARGE)
    steps = [_S.LOOK_UP_REGION, _S.READ_PTE, _S.ENTER_SCOPE]
    for step in prepare:
        steps += [_S.PUT_REGION, step, _S.LOOK_UP_REGION] if step in SLEEPS else [step]
    steps += finish_fault(row)
    if _S.LOCK_FOLIO in prepare:
        steps.append(_S.UNLOCK_FOLIO)
    steps.append(_S.EXIT_REGION)
    if not row.result & FaultResult.RETRY:
        steps.append(_S.ACCOUNT)
    return (*steps, _S.LEAVE_SCOPE)


def _needed(step: Step, row: Row) -> bool:
    if step is _S.READ:
        return bool(row.result & FaultResult.MAJOR)
    if step is _S.FILL:
        return row.commit not in _NO_BUFFER
    if step is _S.PREALLOC:
        return row.commit not in _NO_BUFFER or row.action is Action.COW_SNAPSHOT
    if step is _S.MARK_DIRTY:
        return row.commit is not Commit.WAKE
    return True
