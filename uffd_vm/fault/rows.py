"""The rows of the decision table: every outcome that a decision or a settlement can name.

Rows 1 to 35 carry their number as id; a variant has a suffix ("7wp", "6copy") and an id behind them;
p1 to p7 are the prologue, X-rows are what settlements end in. What leads to a row is in handle.py and
settle.py; here is only what the row says, so that every number exists once. Append only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .action import EXECUTABLE, Action, Commit, Counter
from .fault import FaultResult
from .pte import KEEP, PteState

__all__ = ["NR_HUGE", "ROWS", "UNREACHABLE", "Row", "row"]

#: Base pages of one 2 MiB block.
NR_HUGE = 512


@dataclass(frozen=True, slots=True)
class Row:
    """One row: prepare by `action`, make it true by `commit`, then publish `next_pte`.

    `next_pte` is None (KEEP) where the state is left to its owner. `nr_charge` pages are charged to
    the budget before the commit, and uncharged unless it settles as DONE. `counters` go up by one
    each when it does. `may_add` are bits that only the executor can know: RETRY while the action waits
    (the row's result is that of the completion), COMPLETED if it throttled the writer after the
    commit. `fallback` names the row that Settlement.SKIP goes on with.
    """

    id: int
    name: str
    action: Action
    commit: Commit
    next_pte: PteState | None
    result: FaultResult
    nr_charge: int
    counters: frozenset[Counter]
    why: str
    may_add: FaultResult
    fallback: str | None

    @property
    def base(self) -> str:
        """The row that this is, or is a variant of: "7" of "7wp", "X-IO" of "X-IOwp"."""
        match = re.match(r"\d+|p\d|X-[A-Z]+", self.name)
        return match.group() if match else self.name

    @property
    def number(self) -> int:
        """`base` as a number; 0 for p-, X- and unreachable rows."""
        return int(self.base) if self.base.isdigit() else 0

    @property
    def executable(self) -> bool:
        return self.action in EXECUTABLE

    def __str__(self) -> str:
        return self.name


_A, _C, _P, _N = Action, Commit, PteState, Counter
_OK = FaultResult(0)
_MAJOR, _NOPAGE, _RETRY = FaultResult.MAJOR, FaultResult.NOPAGE, FaultResult.RETRY
_SIGBUS, _SIGSEGV, _OOM = FaultResult.SIGBUS, FaultResult.SIGSEGV, FaultResult.OOM
_COMPLETED = FaultResult.COMPLETED
_MKWRITE = (_N.mkwrite, _N.dirtied)
_SWAP_IN = (_N.pswpin, _N.workingset_refault)
_REFAULT = (_N.pg_activate, _N.refault)

_rows: list[Row] = []


def _row(
    name: str,
    action: Action,
    commit: Commit,
    next_pte: PteState | None,
    result: FaultResult,
    nr_charge: int,
    counters: tuple[Counter, ...],
    why: str,
    *,
    may_add: FaultResult = _OK,
    fallback: str | None = None,
) -> None:
    _rows.append(
        Row(
            len(_rows), name, action, commit, next_pte, result, nr_charge,
            frozenset(counters), why, may_add, fallback,
        )
    )  # fmt: skip


# fmt: off
_row("UNREACHABLE", _A.POISON, _C.POISON, _P.POISONED, _SIGBUS, 0, (_N.bug,),
     "a bug: no message can say this of such a page")
_row("1", _A.ZERO_FILL, _C.ZEROPAGE, _P.ZERO, _OK, 0, (_N.zero_fill,),
     "read of a hole, writes need not be seen: the zero page")
_row("2", _A.ZERO_FILL, _C.COPY_WP, _P.WRITE_PROTECTED, _OK, 1, (_N.zero_fill,),
     "read of a hole, writes must be seen: zeros, write-protected")
_row("3", _A.ZERO_FILL, _C.COPY_WP, _P.WRITE_PROTECTED, _OK, 1, (_N.zero_fill,),
     "read of a hole with a marker: zeros that keep it (ZEROPAGE would be EEXIST)")
_row("4", _A.ZERO_FILL, _C.COPY, _P.PRESENT, _OK, 1, (_N.anon_alloc,),
     "write to a hole: zeros, writable")
_row("5", _A.ZERO_FILL, _C.COPY, _P.PRESENT, _OK, 1, (_N.anon_alloc, _N.wp_grant),
     "write to a hole with a marker: COPY clears it, which grants the write")
_row("6", _A.MOVE_BACK, _C.MOVE, _P.PRESENT, _OK, 0, _REFAULT,
     "staged: second chance, the page itself moves back", fallback="6copy")
_row("7", _A.SWAP_IN, _C.COPY, _P.PRESENT, _MAJOR, 1, _SWAP_IN,
     "swapped out: read the slot", may_add=_RETRY)
_row("8", _A.POISON, _C.POISON, _P.POISONED, _SIGBUS, 0, (_N.io_error,),
     "the swap slot cannot be read")
_row("9", _A.MAP_CACHED, _C.COPY_WP, _P.WRITE_PROTECTED, _OK, 1, (),
     "cached: a write-protected copy, and of its cached neighbours")
_row("10", _A.READ_FOLIO, _C.COPY_WP, _P.WRITE_PROTECTED, _MAJOR, 1, (),
     "not cached: read it, then a write-protected copy", may_add=_RETRY)
_row("11", _A.COW_FOLIO, _C.COPY, _P.PRESENT, _MAJOR, 1, (_N.cow,),
     "not cached: charge, read, then a private writable copy", may_add=_RETRY)
_row("12", _A.READ_FOLIO, _C.COPY, _P.PRESENT, _MAJOR, 1, (),
     "a hole of the memfd: read it into the page cache", may_add=_RETRY)
_row("13", _A.MKWRITE_FOLIO, _C.COPY, _P.PRESENT, _MAJOR, 1, _MKWRITE,
     "a hole of the memfd: read it, page_mkwrite, dirty", may_add=_RETRY | _COMPLETED)
_row("14", _A.MAP_CACHED, _C.CONTINUE, _P.PRESENT, _OK, 0, (),
     "cached: map it, and its cached neighbours")
_row("15", _A.MKWRITE_FOLIO, _C.CONTINUE, _P.PRESENT, _OK, 0, _MKWRITE,
     "cached: page_mkwrite, dirty, map it", may_add=_RETRY | _COMPLETED)
_row("16", _A.READ_FOLIO, _C.COPY_WP, _P.WRITE_PROTECTED, _MAJOR, 1, (),
     "emulated sharing, not at hand: read it, then a write-protected copy", may_add=_RETRY)
_row("17", _A.MKWRITE_FOLIO, _C.COPY, _P.PRESENT, _MAJOR, 1, _MKWRITE,
     "emulated sharing, not at hand: read it, page_mkwrite, dirty", may_add=_RETRY | _COMPLETED)
_row("18", _A.REUSE, _C.UNPROTECT, _P.PRESENT, _OK, 0, (_N.pgreuse, _N.dirtied),
     "nobody else needs the page: log it dirty and let the write through")
_row("19", _A.COW_SNAPSHOT, _C.UNPROTECT, _P.PRESENT, _OK, 1, (_N.cow,),
     "a snapshot needs the page: store it first, then let the write through", may_add=_RETRY)
_row("20", _A.REUSE, _C.UNPROTECT, _P.PRESENT, _OK, 1, (_N.pgreuse, _N.dirtied),
     "the snapshots get the zero frame; the kernel replaces its zero page by a new one")
_row("21", _A.REUSE, _C.UNPROTECT, _P.PRESENT, _OK, 0, (_N.cow_reuse, _N.dirtied),
     "the page is the private copy already: keep it, dirty")
_row("22", _A.MKWRITE, _C.UNPROTECT, _P.PRESENT, _OK, 0, _MKWRITE,
     "first write to a shared page: page_mkwrite, dirty", may_add=_RETRY | _COMPLETED)
_row("23", _A.CANCEL_EVICT, _C.UNPROTECT, _P.PRESENT, _OK, 0, (_N.evict_cancel, _N.dirtied),
     "being evicted and still here: the write wins")
_row("24", _A.UNPROTECT_AGAIN, _C.UNPROTECT, _P.PRESENT, _NOPAGE, 0, (_N.spurious,),
     "already writable: a stale message")
_row("25", _A.SNAP_COPY, _C.COPY_WP, _P.WRITE_PROTECTED, _OK, 1, (_N.snap_copy,),
     "the parent still has the page unchanged: copy it, write-protected")
_row("26", _A.SNAP_FRAME, _C.COPY_WP, _P.WRITE_PROTECTED, _OK, 1, (),
     "the snapshot has a frame in memory: copy it, write-protected")
_row("27", _A.ZERO_FILL, _C.ZEROPAGE, _P.ZERO, _OK, 0, (_N.zero_fill,),
     "the snapshot says zeros: the zero page")
_row("28", _A.SNAP_COW, _C.COPY, _P.PRESENT, _OK, 1, (_N.cow,),
     "first touch is a write: a copy of the snapshot's content, detached from it")
_row("29", _A.REUSE, _C.UNPROTECT, _P.PRESENT, _OK, 0, (_N.pgreuse, _N.dirtied),
     "the child's own copy: detach it from the snapshot")
_row("30", _A.SCAN, _C.WAKE, _P.NONE, _NOPAGE, 0, (),
     "missing, but believed present: ask the kernel (settle_truth)")
_row("31", _A.POISON, _C.POISON, _P.POISONED, FaultResult.HWPOISON, 0, (_N.poison_hit,),
     "poisoned before: still is")
_row("32", _A.WAKE, _C.WAKE, _P.GUARD, _SIGSEGV, 0, (),
     "a guard page: the kernel raises SIGSEGV (COPY would pierce the guard)")
_row("33", _A.FILL_BLOCK, _C.COPY_BLOCK, _P.PRESENT, _OK, NR_HUGE, (_N.thp_alloc,),
     "an empty aligned block: zeros, writable, all at once")
_row("34", _A.HUGETLB_FILL, _C.COPY, _P.PRESENT, _OK, NR_HUGE, (),
     "a huge page whose content is at hand")
_row("35", _A.MOVE_BACK, _C.MOVE, _P.PRESENT, _OK, 0, (_N.numa_hint,),
     "staged by the sampler: it is used, move it back", fallback="6copy")

_row("p1", _A.READ_EVENT, _C.NONE, KEEP, _OK, 0, (),
     "no page fault: the event path; nothing is accounted")
_row("p2", _A.UNREGISTER_STRAY, _C.WAKE, KEEP, _NOPAGE, 0, (_N.stray,),
     "no region here: unregister the range if it was ours, wake")
_row("p3", _A.JOIN, _C.NONE, KEEP, _RETRY, 0, (_N.joined,),
     "another handler owns the page: wait for it, start again")
_row("p4", _A.WAKE, _C.WAKE, KEEP, _NOPAGE, 0, (),
     "the region is closing: nothing is filled any more")
_row("p5", _A.DENY_WRITE, _C.WAKE, KEEP, _SIGSEGV, 0, (_N.deny,),
     "the region is read-only: never grant, the protection kills the writer")
_row("p6", _A.POISON, _C.POISON, _P.POISONED, _SIGBUS, 0, (),
     "past the end of the backing")
_row("p7", _A.POISON, _C.POISON, _P.POISONED, _SIGBUS, 0, (_N.timeout,),
     "tried for too long")
_row("X-OOM", _A.POISON, _C.POISON, _P.POISONED, _OOM, 0, (_N.oom,),
     "no memory, and reclaim made no progress")
_row("X-IO", _A.POISON, _C.POISON, _P.POISONED, _SIGBUS, 0, (_N.io_error,),
     "the backing failed; the typed error is kept for the owner")
_row("X-DENY", _A.DENY_WRITE, _C.WAKE, KEEP, _SIGSEGV, 0, (_N.deny,),
     "page_mkwrite said no: mprotect, wake, SIGSEGV")
_row("X-RACE", _A.WAKE, _C.WAKE, KEEP, _NOPAGE, 0, (_N.race_lost,),
     "somebody else was faster: throw the preparation away, run again")
_row("X-GONE", _A.WAKE, _C.NONE, KEEP, _NOPAGE, 0, (),
     "the address space is gone: detach from it")

_row("5hook", _A.ZERO_FILL, _C.COPY_WP, _P.WRITE_PROTECTED, _OK, 1, (_N.anon_alloc,),
     "write to a hole, a hook must agree: write-protected zeros; comes back as a WP fault")
_row("6copy", _A.STAGED_COPY, _C.COPY, _P.PRESENT, _OK, 0, _REFAULT,
     "staged, and MOVE says EBUSY: copy it back, free the staged page")
_row("6wp", _A.STAGED_COPY, _C.COPY_WP, _P.WRITE_PROTECTED, _OK, 0, _REFAULT,
     "staged, to stay write-protected (MOVE drops the bit): copy it back")
_row("7wp", _A.SWAP_IN, _C.COPY_WP, _P.WRITE_PROTECTED, _MAJOR, 1, _SWAP_IN,
     "swapped out, to stay write-protected: read the slot", may_add=_RETRY)
_row("9wake", _A.MAP_CACHED, _C.WAKE, _P.CACHED, _NOPAGE, 0, (),
     "cached, writes need not be seen: the kernel maps it by itself")
_row("10cache", _A.READ_FOLIO, _C.COPY_CACHE, _P.CACHED, _MAJOR, 1, (),
     "not cached: read it into the page cache; the kernel maps it by itself", may_add=_RETRY)
_row("11cached", _A.COW_FOLIO, _C.COPY, _P.PRESENT, _OK, 1, (_N.cow,),
     "cached: a private writable copy")
_row("11wake", _A.MAP_CACHED, _C.WAKE, _P.CACHED, _NOPAGE, 0, (_N.cow,),
     "cached, writes need not be seen: the kernel copies it by itself")
_row("11cache", _A.COW_FOLIO, _C.COPY_CACHE, _P.CACHED, _MAJOR, 1, (_N.cow,),
     "not cached: read it into the page cache; the kernel copies it by itself", may_add=_RETRY)
_row("12wp", _A.READ_FOLIO, _C.COPY_WP, _P.WRITE_PROTECTED, _MAJOR, 1, (),
     "a hole of the memfd, writes must be seen: read it, write-protected", may_add=_RETRY)
_row("12dup", _A.WAKE, _C.WAKE, KEEP, _NOPAGE, 0, (_N.duplicate,),
     "somebody filled it meanwhile: the kernel maps it")
_row("14wp", _A.MAP_CACHED, _C.CONTINUE_WP, _P.WRITE_PROTECTED, _OK, 0, (),
     "cached, writes must be seen: map it write-protected")
_row("14gone", _A.WAKE, _C.WAKE, KEEP, _NOPAGE, 0, (_N.race_lost,),
     "the folio was punched out meanwhile: comes back as missing")
_row("16cached", _A.MAP_CACHED, _C.COPY_WP, _P.WRITE_PROTECTED, _OK, 1, (),
     "emulated sharing, at hand: a write-protected copy")
_row("17cached", _A.MKWRITE_FOLIO, _C.COPY, _P.PRESENT, _OK, 1, _MKWRITE,
     "emulated sharing, at hand: page_mkwrite, dirty", may_add=_RETRY | _COMPLETED)
_row("18zero", _A.REUSE, _C.UNPROTECT, _P.PRESENT, _OK, 1, (_N.pgreuse, _N.dirtied),
     "nobody else needs the zero page: the kernel replaces it by a new page")
_row("18hook", _A.MKWRITE, _C.UNPROTECT, _P.PRESENT, _OK, 0, (*_MKWRITE, _N.pgreuse),
     "nobody else needs the page: ask the hook, dirty", may_add=_RETRY | _COMPLETED)
_row("18zerohook", _A.MKWRITE, _C.UNPROTECT, _P.PRESENT, _OK, 1, (*_MKWRITE, _N.pgreuse),
     "the zero page under a hook: ask it; the kernel replaces the page",
     may_add=_RETRY | _COMPLETED)
_row("19wake", _A.COW_SNAPSHOT, _C.WAKE, KEEP, _NOPAGE, 1, (_N.cow,),
     "store the page for the snapshots; the write comes back and is not held any more",
     may_add=_RETRY)
_row("19huge", _A.COW_SNAPSHOT, _C.UNPROTECT, _P.PRESENT, _OK, NR_HUGE, (_N.cow,),
     "a snapshot needs the huge page: store it first", may_add=_RETRY)
_row("20wake", _A.COW_SNAPSHOT, _C.WAKE, KEEP, _NOPAGE, 0, (),
     "the snapshots get the zero frame; the write comes back for the hook")
_row("21map", _A.REUSE, _C.UNPROTECT, _P.PRESENT, _OK, 1, (_N.cow, _N.dirtied),
     "the cached folio was mapped under a marker: the kernel copies it for the writer")
_row("23keep", _A.CANCEL_EVICT, _C.WAKE, _P.WRITE_PROTECTED, _NOPAGE, 0, (_N.evict_cancel,),
     "being evicted and still here, but the write must be asked for: it comes back")
_row("23late", _A.WAKE, _C.WAKE, KEEP, _NOPAGE, 0, (_N.spurious,),
     "already dropped: comes back as a missing write")
_row("24gone", _A.WAKE, _C.WAKE, KEEP, _NOPAGE, 0, (_N.spurious,),
     "the page left after this message was sent: comes back as a missing write")
_row("26disk", _A.SNAP_FRAME, _C.COPY_WP, _P.WRITE_PROTECTED, _MAJOR, 1, (),
     "the snapshot has a frame on disk: read it, write-protected", may_add=_RETRY)
_row("27wp", _A.ZERO_FILL, _C.COPY_WP, _P.WRITE_PROTECTED, _OK, 1, (_N.zero_fill,),
     "the snapshot says zeros, writes must be seen: zeros, write-protected")
_row("28disk", _A.SNAP_COW, _C.COPY, _P.PRESENT, _MAJOR, 1, (_N.cow,),
     "first touch is a write, the frame is on disk: read it, detach", may_add=_RETRY)
_row("29zero", _A.REUSE, _C.UNPROTECT, _P.PRESENT, _OK, 1, (_N.pgreuse, _N.dirtied),
     "the child's zero page: the kernel replaces it by a new page")
_row("30duplicate", _A.WAKE, _C.WAKE, KEEP, _NOPAGE, 0, (_N.duplicate,),
     "the kernel has the page: a stale duplicate")
_row("30lost", _A.WAKE, _C.NONE, _P.NONE, _RETRY, 0, (_N.lost_page,),
     "the kernel lost the page: believe it, decide again")
_row("30marker", _A.WAKE, _C.NONE, _P.NONE_WP, _RETRY, 0, (_N.lost_page,),
     "the kernel has only a marker: believe it, decide again")
_row("30found", _A.WAKE, _C.WAKE, _P.PRESENT, _NOPAGE, 0, (_N.duplicate,),
     "the kernel has a page that we did not know: believe it, count it as written")
_row("30foundwp", _A.WAKE, _C.WAKE, _P.WRITE_PROTECTED, _NOPAGE, 0, (_N.duplicate,),
     "the kernel has a write-protected page that we did not know: believe it")
_row("31huge", _A.POISON, _C.POISON, _P.POISONED, FaultResult.HWPOISON_LARGE, 0, (_N.poison_hit,),
     "a poisoned huge page: still is")
_row("33wp", _A.FILL_BLOCK, _C.COPY_BLOCK_WP, _P.WRITE_PROTECTED, _OK, NR_HUGE, (_N.thp_alloc,),
     "an empty aligned block, read: zeros, write-protected, all at once")
_row("33read", _A.FILL_BLOCK, _C.COPY_BLOCK, _P.PRESENT, _MAJOR, NR_HUGE, (_N.thp_alloc,),
     "an empty aligned block of a file: read it all at once", may_add=_RETRY)
_row("33readwp", _A.FILL_BLOCK, _C.COPY_BLOCK_WP, _P.WRITE_PROTECTED, _MAJOR, NR_HUGE,
     (_N.thp_alloc,),
     "an empty aligned block of a file, writes must be seen: read it all at once", may_add=_RETRY)
_row("33fallback", _A.WAKE, _C.NONE, KEEP, FaultResult.FALLBACK, 0, (_N.thp_fallback,),
     "the block failed in any way: page by page; FALLBACK never leaves the executor")
_row("34wp", _A.HUGETLB_FILL, _C.COPY_WP, _P.WRITE_PROTECTED, _OK, NR_HUGE, (),
     "a huge page whose content is at hand, writes must be seen")
_row("34read", _A.HUGETLB_FILL, _C.COPY, _P.PRESENT, _MAJOR, NR_HUGE, (),
     "a huge page to be read", may_add=_RETRY)
_row("34readwp", _A.HUGETLB_FILL, _C.COPY_WP, _P.WRITE_PROTECTED, _MAJOR, NR_HUGE, (),
     "a huge page to be read, writes must be seen", may_add=_RETRY)
_row("34reuse", _A.REUSE, _C.UNPROTECT, _P.PRESENT, _OK, 0, (_N.pgreuse, _N.dirtied),
     "nobody else needs the huge page: log it dirty and let the write through")
_row("35wp", _A.STAGED_COPY, _C.COPY_WP, _P.WRITE_PROTECTED, _OK, 0, (_N.numa_hint,),
     "staged by the sampler, to stay write-protected: copy it back")
_row("X-OOMwp", _A.DENY_WRITE, _C.WAKE, KEEP, _OOM, 0, (_N.oom, _N.deny),
     "no memory to let a write through: the page stays as it is, the writer fails")
_row("X-IOwp", _A.DENY_WRITE, _C.WAKE, KEEP, _SIGBUS, 0, (_N.io_error, _N.deny),
     "a store failed before the write: the page stays as it is, the writer fails")
_row("p7wp", _A.DENY_WRITE, _C.WAKE, KEEP, _SIGBUS, 0, (_N.timeout, _N.deny),
     "a hook or store took too long: the page stays as it is, the writer fails")
_row("X-BUG", _A.DENY_WRITE, _C.WAKE, KEEP, _SIGBUS, 0, (_N.bug, _N.deny),
     "a bug where the page cannot be poisoned: take the permission away, loudly")
# fmt: on

ROWS: tuple[Row, ...] = tuple(_rows)
UNREACHABLE = ROWS[0]
_BY_NAME = {r.name: r for r in ROWS}


def row(name: str) -> Row:
    """The row called `name`; KeyError if there is none."""
    return _BY_NAME[name]
