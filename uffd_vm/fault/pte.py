"""What is known of one page: the page-table entry of an address space, the folio of a page cache.

Two tables, never one. Both are a byte or a word per page in memory shared with C, changed only by
compare-and-swap along the transitions listed here. The kernel's truth wins over both; PAGEMAP_SCAN
is the audit. Invariant kept here: `legal_transitions_only`.
"""

from __future__ import annotations

import enum

__all__ = [
    "EMPTY",
    "KEEP",
    "LEGAL_FOLIO_TRANSITIONS",
    "LEGAL_PTE_TRANSITIONS",
    "MAPPED",
    "MARKERS",
    "FolioState",
    "PteState",
]


class PteState(enum.IntEnum):
    """One byte a page and address space. `_WP` means the write-protect bit is wanted there."""

    NONE = 0  #: nothing here
    NONE_WP = 1  #: a hole with a write-protect marker
    ZERO = 2  #: the kernel's zero page; a write replaces it unseen
    ZERO_WP = 3
    PRESENT = 4  #: readable and writable
    WRITE_PROTECTED = 5  #: readable; a write faults
    STAGED = 6  #: moved out to the staging area, still in memory (the inactive list)
    STAGED_WP = 7
    SWAPPED = 8  #: in a slot of the swap area
    SWAPPED_WP = 9
    POISONED = 10  #: touching it fails, because its content could not be had
    GUARD = 11  #: touching it is SIGSEGV
    BUSY = 12  #: claimed by a handler: a fill or a freeze is in flight (a migration entry)
    EVICTING = 13  #: write-protected and being copied out; may still be cancelled
    EVICTED = 14  #: already dropped; the evictor has yet to say where the content is
    CACHED = 15  #: empty here, and its folio is uptodate in the memfd
    SNAP_PARENT = 16  #: empty; the snapshot's content is the parent's unchanged page
    SNAP_FRAME = 17  #: empty; the snapshot's content is a stored frame
    SNAP_ZERO = 18  #: empty; the snapshot says zeros, or that it never existed


#: Row.next_pte of a row that leaves the state to its owner; 0xFF in the compiled tables.
KEEP = None


class FolioState(enum.IntEnum):
    """One word a page of a cache, shared by all its address spaces."""

    ABSENT = 0
    FILLING = 1
    UPTODATE = 2
    DIRTY = 3
    WRITEBACK = 4
    ERROR = 5
    EVICTING = 6


_P = PteState
_F = FolioState

#: pte_none() or an entry that says only where content could come from.
EMPTY = frozenset({_P.NONE, _P.NONE_WP, _P.CACHED, _P.SNAP_PARENT, _P.SNAP_FRAME, _P.SNAP_ZERO})

#: pte_present(): the kernel maps something here.
MAPPED = frozenset({_P.ZERO, _P.ZERO_WP, _P.PRESENT, _P.WRITE_PROTECTED, _P.EVICTING})

#: The kernel's entry is a marker, which its page map tells as if it were swapped out.
MARKERS = frozenset({_P.NONE_WP, _P.POISONED, _P.GUARD})

# What a fault, freeze or thaw (write-protecting or not), reclaim and fork() may do.
_PTE_STEPS: dict[PteState, frozenset[PteState]] = {
    _P.NONE: frozenset(
        {_P.NONE_WP, _P.ZERO, _P.PRESENT, _P.WRITE_PROTECTED, _P.CACHED}
        | {_P.SNAP_PARENT, _P.SNAP_FRAME, _P.SNAP_ZERO}
    ),
    _P.NONE_WP: frozenset({_P.ZERO_WP, _P.PRESENT, _P.WRITE_PROTECTED, _P.CACHED}),
    _P.ZERO: frozenset({_P.ZERO_WP, _P.NONE_WP, _P.PRESENT}),
    _P.ZERO_WP: frozenset({_P.ZERO, _P.NONE_WP, _P.PRESENT}),
    _P.PRESENT: frozenset({_P.WRITE_PROTECTED, _P.STAGED, _P.EVICTING, _P.CACHED, _P.NONE_WP}),
    _P.WRITE_PROTECTED: frozenset({_P.PRESENT, _P.STAGED_WP, _P.EVICTING, _P.CACHED, _P.NONE_WP}),
    _P.STAGED: frozenset({_P.PRESENT, _P.WRITE_PROTECTED, _P.STAGED_WP, _P.SWAPPED}),
    _P.STAGED_WP: frozenset({_P.WRITE_PROTECTED, _P.STAGED, _P.SWAPPED_WP}),
    _P.SWAPPED: frozenset({_P.PRESENT, _P.WRITE_PROTECTED, _P.SWAPPED_WP}),
    _P.SWAPPED_WP: frozenset({_P.PRESENT, _P.WRITE_PROTECTED, _P.SWAPPED}),
    _P.POISONED: frozenset(),
    _P.GUARD: frozenset(),
    _P.BUSY: frozenset(PteState) - {_P.EVICTED},
    _P.EVICTING: frozenset({_P.PRESENT, _P.WRITE_PROTECTED, _P.EVICTED}),
    _P.EVICTED: frozenset({_P.SWAPPED, _P.SWAPPED_WP, _P.NONE_WP, _P.CACHED}),
    _P.CACHED: frozenset({_P.NONE_WP, _P.PRESENT, _P.WRITE_PROTECTED}),
    _P.SNAP_PARENT: frozenset({_P.SNAP_FRAME, _P.PRESENT, _P.WRITE_PROTECTED}),
    _P.SNAP_FRAME: frozenset({_P.PRESENT, _P.WRITE_PROTECTED}),
    _P.SNAP_ZERO: frozenset({_P.ZERO, _P.PRESENT, _P.WRITE_PROTECTED}),
}
# Open to every state: the page is discarded (DONTNEED, clear_poison, GUARD_REMOVE) or fails.
_FROM_ANYWHERE = frozenset({_P.NONE, _P.POISONED, _P.GUARD})
_NOT_CLAIMABLE = frozenset({_P.POISONED, _P.GUARD, _P.EVICTED})

LEGAL_PTE_TRANSITIONS: frozenset[tuple[PteState, PteState]] = frozenset(
    {(a, b) for a, targets in _PTE_STEPS.items() for b in targets}
    | {(a, b) for a in PteState for b in _FROM_ANYWHERE}
    | {(a, _P.BUSY) for a in PteState if a not in _NOT_CLAIMABLE}
    | {(a, a) for a in PteState}
)

LEGAL_FOLIO_TRANSITIONS: frozenset[tuple[FolioState, FolioState]] = frozenset(
    {
        (_F.ABSENT, _F.FILLING),
        (_F.ERROR, _F.FILLING),
        (_F.FILLING, _F.UPTODATE),
        (_F.FILLING, _F.DIRTY),
        (_F.FILLING, _F.ERROR),
        (_F.FILLING, _F.ABSENT),
        (_F.FILLING, _F.FILLING),  # a live process takes over from a dead one
        (_F.UPTODATE, _F.DIRTY),
        (_F.UPTODATE, _F.EVICTING),
        (_F.DIRTY, _F.WRITEBACK),
        (_F.WRITEBACK, _F.UPTODATE),
        (_F.WRITEBACK, _F.DIRTY),  # written again meanwhile, or the write-back failed
        (_F.EVICTING, _F.ABSENT),
        (_F.EVICTING, _F.UPTODATE),
        (_F.ERROR, _F.ABSENT),
    }
)
