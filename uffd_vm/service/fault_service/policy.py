"""decide() and settle() for a hot path in Python: plain ints, and each cell asked for once.

The policy is asked by its own functions and remembered: a fault then costs one look-up and makes no
enum member. Nothing is decided here: what a cell says is written in uffd_vm/fault/.
"""

from __future__ import annotations

from typing import Final

from uffd_vm.fault.action import Commit, ErrnoClass, Truth
from uffd_vm.fault.fault import Access, Backing, FaultFlag, FaultKind
from uffd_vm.fault.handle import decide as _decide
from uffd_vm.fault.pte import PteState
from uffd_vm.fault.rows import ROWS, row
from uffd_vm.fault.settle import Settled
from uffd_vm.fault.settle import settle as _settle
from uffd_vm.fault.settle import settle_truth as _settle_truth

__all__ = [
    "ACTION",
    "COMMIT",
    "COUNTERS",
    "KEEP",
    "NEXT_PTE",
    "RESULT",
    "decide",
    "row_id",
    "settle",
    "settle_truth",
]

#: In NEXT_PTE and in trace records: the state is left to its owner.
KEEP: Final = 0xFF

# By row id.
ACTION: Final = tuple(int(r.action) for r in ROWS)
COMMIT: Final = tuple(int(r.commit) for r in ROWS)
NEXT_PTE: Final = tuple(KEEP if r.next_pte is None else int(r.next_pte) for r in ROWS)
RESULT: Final = tuple(int(r.result) for r in ROWS)
COUNTERS: Final = tuple(tuple(int(c) for c in r.counters) for r in ROWS)

_cells: dict[int, int] = {}
_settled: dict[int, tuple[int, int, int]] = {}


def decide(kind: int, access: int, backing: int, pte: int, flags: int) -> int:
    """The row's id."""
    key = ((kind << 1 | access) << 3 | backing) << 21 | pte << 13 | flags
    found = _cells.get(key)
    if found is None:
        found = _decide(
            FaultKind(kind), Access(access), Backing(backing), PteState(pte), FaultFlag(flags)
        ).id
        _cells[key] = found
    return found


def settle(commit: int, errno_class: int) -> tuple[int, int, int]:
    """(Settlement, FaultResult, id of the row that it ends in, or KEEP)."""
    key = commit << 8 | errno_class
    found = _settled.get(key)
    if found is None:
        found = _settled[key] = _ints(_settle(Commit(commit), ErrnoClass(errno_class)))
    return found


def settle_truth(commit: int, truth: Truth, backing: int) -> tuple[int, int, int]:
    """The same, of what PAGEMAP_SCAN said."""
    return _ints(_settle_truth(Commit(commit), truth, Backing(backing)))


def _ints(settled: Settled) -> tuple[int, int, int]:
    row_id = KEEP if settled.row is None else settled.row.id
    return int(settled.settlement), int(settled.result), row_id


def row_id(name: str) -> int:
    return row(name).id
