"""The policy of a page fault, complete and pure: choose (handle), act (action, rows), settle.

It reads like mm/memory.c and knows nothing of executors: `decide()` maps the five inputs of a fault to
a row, `settle()` maps how the row's work ended to what follows, `table` compiles both to bytes that
executors index. Only the standard library is imported, so that a build can compile the tables first.
"""

from .action import EXECUTABLE, Action, Commit, Counter, ErrnoClass, Settlement, Truth
from .fault import Access, Backing, Fault, FaultFlag, FaultKind, FaultResult, describe
from .handle import decide
from .pte import LEGAL_PTE_TRANSITIONS, FolioState, PteState
from .rows import ROWS, Row
from .settle import Settled, classify_errno, mm_account_fault, settle, settle_truth

__all__ = [
    "EXECUTABLE",
    "LEGAL_PTE_TRANSITIONS",
    "ROWS",
    "Access",
    "Action",
    "Backing",
    "Commit",
    "Counter",
    "ErrnoClass",
    "Fault",
    "FaultFlag",
    "FaultKind",
    "FaultResult",
    "FolioState",
    "PteState",
    "Row",
    "Settled",
    "Settlement",
    "Truth",
    "classify_errno",
    "decide",
    "describe",
    "mm_account_fault",
    "settle",
    "settle_truth",
]
