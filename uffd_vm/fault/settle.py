"""Settle: what follows from how an action or its commit ended, and the end of every fault.

The kernel's rule is the same: read without a lock, prepare everything that can sleep, take the
page-table lock, compare with what was read, commit or throw away. Here each way to fail has one entry.
A lost race is never an error; a bug is never a silent loop: it ends in a poisoned page or a denied
access, and is counted.

Invariants kept: `recheck_under_ptl`, `lost_race_is_no_error`, `bug_is_loud`, `errors_add_up`.
"""

from __future__ import annotations

import errno as _errno
from dataclasses import dataclass

from .action import Commit, Counter, ErrnoClass, Settlement, Truth
from .fault import VM_FAULT_ERROR, Backing, Fault, FaultResult
from .pte import KEEP, PteState
from .rows import UNREACHABLE, Row, row
from .steps import Step

__all__ = [
    "DONE_UNTOUCHED",
    "EHWPOISON",
    "Settled",
    "classify_errno",
    "finish_fault",
    "mm_account_fault",
    "pte_same",
    "pte_unmap_same",
    "recheck",
    "settle",
    "settle_truth",
    "vmf_pte_changed",
]

#: Put into an ioctl's out field beforehand; still there afterwards: the kernel never wrote it.
DONE_UNTOUCHED = -(1 << 62)

_OK = FaultResult(0)


@dataclass(frozen=True, slots=True)
class Settled:
    """DONE with no row of its own: the decided row stands. Else `result` is the fault's result, and
    `row`, if there is one, what it ends in: its counters count, its next state (unless KEEP) is
    published, and its action is what a RECLAIM without progress does."""

    settlement: Settlement
    result: FaultResult
    row: Row | None = None


# ---- how it ended ----------------------------------------------------------------------------------


def classify_errno(errno: int, done: int) -> ErrnoClass:
    """The class of one ioctl's end. `errno` is 0 or positive; `done` is the out field: bytes done,
    -errno, or DONE_UNTOUCHED. Only EAGAIN is ambiguous without `done`."""
    if errno == 0:
        return ErrnoClass.OK
    if errno in (_errno.EAGAIN, _errno.EINTR):
        return ErrnoClass.PARTIAL if done > 0 else ErrnoClass.CHANGING
    return _CLASS_OF.get(errno, ErrnoClass.OTHER)


EHWPOISON = 133  # <asm-generic/errno.h>; Python's errno module does not have it
_CLASS_OF = {
    _errno.EEXIST: ErrnoClass.EEXIST,
    _errno.ENOENT: ErrnoClass.ENOENT,
    _errno.ESRCH: ErrnoClass.ESRCH,
    _errno.ENOSPC: ErrnoClass.ESRCH,  # the spelling of Linux 4.11 and 4.12
    _errno.EFAULT: ErrnoClass.EFAULT,
    _errno.ENOMEM: ErrnoClass.ENOMEM,
    _errno.EBUSY: ErrnoClass.EBUSY,
    _errno.EINVAL: ErrnoClass.EINVAL,
    _errno.EIO: ErrnoClass.EIO,
    EHWPOISON: ErrnoClass.EIO,  # the source page is poisoned
    _errno.ETIMEDOUT: ErrnoClass.TIMEDOUT,
}


def pte_same(before: PteState, now: PteState) -> bool:
    """pte_same(): the comparison under the page-table lock."""
    return before is now


def pte_unmap_same(vmf: Fault, now: PteState) -> bool:
    """pte_unmap_same(): an early look, without a lock, before work that would be in vain. A byte is
    never torn, so it protects nothing by itself; vmf_pte_changed() does."""
    return pte_same(vmf.pte, now)


def vmf_pte_changed(vmf: Fault, *, generation: int, version: int, pte: PteState) -> bool:
    """vmf_pte_changed(): asked under the page-table lock, last thing before the commit."""
    return vmf.generation != generation or vmf.version != version or not pte_same(vmf.pte, pte)


def recheck(vmf: Fault, *, generation: int, version: int, pte: PteState) -> ErrnoClass:
    """vmf_pte_changed() in the words of settle(): OK or RACE."""
    changed = vmf_pte_changed(vmf, generation=generation, version=version, pte=pte)
    return ErrnoClass.RACE if changed else ErrnoClass.OK


# ---- what follows ----------------------------------------------------------------------------------

_BLOCK = frozenset({Commit.COPY_BLOCK, Commit.COPY_BLOCK_WP})
_CONTINUE = frozenset({Commit.CONTINUE, Commit.CONTINUE_WP})
_COPY_CACHE = frozenset({Commit.COPY_CACHE, Commit.COPY_CACHE_WP})
#: Installs something where nothing is: UFFDIO_* with an out field.
_INSTALL = (
    frozenset({Commit.ZEROPAGE, Commit.COPY, Commit.COPY_WP, Commit.MOVE})
    | _COPY_CACHE
    | _CONTINUE
    | _BLOCK
)
#: Something is there that poisoning would destroy, or poisoning is what failed.
_PAGE_STAYS = frozenset({Commit.WAKE, Commit.UNPROTECT, Commit.POISON})
# A block that fails like this is tried page by page: the kernel's VM_FAULT_FALLBACK.
_FALLS_BACK = frozenset(ErrnoClass) - {
    ErrnoClass.OK,
    ErrnoClass.CHANGING,
    ErrnoClass.ESRCH,
    ErrnoClass.EINVAL,
    ErrnoClass.RACE,
    ErrnoClass.OTHER,
}


def settle(commit: Commit, errno: ErrnoClass) -> Settled:
    """What to do when `commit`, or the action before it, ended like `errno`. Pure and total."""
    if errno is ErrnoClass.OK:
        return Settled(Settlement.DONE, _OK)
    if commit in _BLOCK and errno in _FALLS_BACK:
        return Settled(Settlement.ORDER0, FaultResult.FALLBACK, row("33fallback"))
    if errno is ErrnoClass.ESRCH:
        return Settled(Settlement.DETACH, FaultResult.NOPAGE, row("X-GONE"))
    if errno is ErrnoClass.RACE:
        return _drop()
    if errno is ErrnoClass.DENIED:
        return Settled(Settlement.DENY, FaultResult.SIGSEGV, row("X-DENY"))
    if commit is Commit.POISON:
        return _settle_poison(errno)
    if errno in (ErrnoClass.ENOMEM, ErrnoClass.CHARGE):
        oom = row("X-OOMwp") if commit in _PAGE_STAYS else row("X-OOM")
        return Settled(Settlement.RECLAIM, FaultResult.OOM, oom)
    if errno is ErrnoClass.EIO:
        return _fail(commit, row("X-IO"), row("X-IOwp"))
    if errno is ErrnoClass.TIMEDOUT:
        return _fail(commit, row("p7"), row("p7wp"))
    if errno is ErrnoClass.CHANGING:
        return Settled(Settlement.RETRY, FaultResult.RETRY)
    if commit in _INSTALL:
        return _settle_install(commit, errno)
    if commit is Commit.UNPROTECT and errno in (ErrnoClass.ENOENT, ErrnoClass.TRUNCATED):
        return _drop()  # do_page_mkwrite() finds the page truncated: 0, fault again
    return _bug(commit)


def _settle_install(commit: Commit, errno: ErrnoClass) -> Settled:
    if errno is ErrnoClass.EEXIST:
        if commit in _COPY_CACHE:
            return Settled(Settlement.DONE, _OK)  # the page cache has it, and that was the aim
        return Settled(Settlement.VERIFY, FaultResult.NOPAGE)
    if errno is ErrnoClass.PARTIAL:
        return Settled(Settlement.ADVANCE, _OK)
    if errno is ErrnoClass.ENOENT:
        if commit is Commit.MOVE:  # the staging area has a hole: somebody moved it back
            return Settled(Settlement.VERIFY, FaultResult.NOPAGE)
        return Settled(Settlement.ORDER0, FaultResult.NOPAGE)
    if errno is ErrnoClass.EFAULT and commit in _CONTINUE:
        return Settled(Settlement.VERIFY, FaultResult.NOPAGE)  # punched out
    if errno is ErrnoClass.TRUNCATED and commit in _CONTINUE:
        return _drop()
    if errno in (ErrnoClass.EFAULT, ErrnoClass.TRUNCATED):
        return Settled(Settlement.POISON, FaultResult.SIGBUS, row("p6"))
    if errno is ErrnoClass.EBUSY and commit is Commit.MOVE:
        return Settled(Settlement.SKIP, _OK, row("6copy"))
    return _bug(commit)


def _settle_poison(errno: ErrnoClass) -> Settled:
    """The last resort failed: never poison again, that would be a loop."""
    if errno is ErrnoClass.EEXIST:
        return Settled(Settlement.VERIFY, FaultResult.NOPAGE)
    if errno is ErrnoClass.PARTIAL:
        return Settled(Settlement.ADVANCE, _OK)
    if errno is ErrnoClass.CHANGING:
        return Settled(Settlement.RETRY, FaultResult.RETRY)
    if errno in (ErrnoClass.ENOENT, ErrnoClass.TRUNCATED):
        return _drop()  # nothing is mapped there any more: the kernel itself raises the signal
    return _bug(Commit.POISON)


def _drop() -> Settled:
    return Settled(Settlement.DROP, FaultResult.NOPAGE, row("X-RACE"))


def _fail(commit: Commit, poison: Row, deny: Row) -> Settled:
    """Fails the access: by poison where nothing is, by protection where a page would be destroyed."""
    if commit in _PAGE_STAYS:
        return Settled(Settlement.DENY, FaultResult.SIGBUS, deny)
    return Settled(Settlement.POISON, FaultResult.SIGBUS, poison)


def _bug(commit: Commit) -> Settled:
    return _fail(commit, UNREACHABLE, row("X-BUG"))


def settle_truth(commit: Commit, truth: Truth, backing: Backing) -> Settled:
    """What PAGEMAP_SCAN's answer means, after Settlement.VERIFY or Action.SCAN (whose commit is WAKE).

    The waiters are awake already. The next state of the row named here, unless it is KEEP, is
    published: the truth wins. DONE keeps the charge: a page is resident that nobody else charged.
    """
    if truth is Truth.POISONED:
        hit = row("31huge") if backing is Backing.HUGETLB else row("31")
        done = Settlement.DONE if commit is Commit.POISON else Settlement.DROP
        return Settled(done, hit.result, hit)
    if truth is Truth.GUARDED:
        return Settled(Settlement.DROP, FaultResult.SIGSEGV, row("32"))
    if commit is Commit.WAKE:
        if truth is Truth.ABSENT:
            return Settled(Settlement.RETRY, FaultResult.RETRY, row("30lost"))
        if truth is Truth.MARKER:
            return Settled(Settlement.RETRY, FaultResult.RETRY, row("30marker"))
        return Settled(Settlement.DROP, FaultResult.NOPAGE, row("30duplicate"))
    if truth is Truth.MARKER:
        if commit is Commit.POISON:  # the action has taken the marker away: it cannot be here
            return _bug(commit)
        if commit in (Commit.ZEROPAGE, Commit.MOVE):  # a marker refuses these; COPY takes it
            return Settled(Settlement.RETRY, FaultResult.RETRY, row("30marker"))
    if truth is Truth.ABSENT:
        if backing is Backing.HUGETLB:  # the pool is empty: 6.18 says EEXIST, not ENOMEM
            return Settled(Settlement.RECLAIM, FaultResult.OOM, row("X-OOM"))
        if commit is Commit.MOVE:  # neither here nor staged: tried again until p7
            return Settled(Settlement.RETRY, FaultResult.RETRY)
    if truth in (Truth.PRESENT, Truth.PRESENT_WP) and commit in _INSTALL | {Commit.POISON}:
        found = row("30found") if truth is Truth.PRESENT else row("30foundwp")
        return Settled(Settlement.DONE, FaultResult.NOPAGE, found)
    return _drop()


# ---- the end ---------------------------------------------------------------------------------------


def finish_fault(chosen: Row) -> tuple[Step, ...]:
    """finish_fault(): the part under the page-table lock, for any row.

    Everything that can sleep is behind us and the contents are complete. The ioctl and the store that
    publishes it are one critical section, so nobody decides in between, even if the ioctl woke.
    """
    publishes = chosen.next_pte is not KEEP
    if chosen.commit in (Commit.NONE, Commit.WAKE):
        locked = (Step.PTE_LOCK, Step.RECHECK, Step.PUBLISH, Step.PTE_UNLOCK)
        steps = locked if publishes else ()
        return (*steps, Step.WAKE) if chosen.commit is Commit.WAKE else steps
    return (
        Step.PTE_LOCK,
        Step.RECHECK,
        Step.COMMIT,
        Step.PUBLISH,
        Step.PTE_UNLOCK,
        Step.WAKE,
    )


def mm_account_fault(result: FaultResult, tries: int) -> frozenset[Counter]:
    """mm_account_fault(): one pgfault for every fault, however it ended; RETRY is not the end.

    `tries` counts restarts: a fault that waited is major even if another one did the read. Always
    pgfault = pgmajfault + pgminfault + pgfault_failed. Needs nothing of the region but its counters.
    """
    if result & FaultResult.RETRY:
        return frozenset()
    if result & VM_FAULT_ERROR:
        return frozenset({Counter.pgfault, Counter.pgfault_failed})
    if result & FaultResult.MAJOR or tries > 0:
        return frozenset({Counter.pgfault, Counter.pgmajfault})
    return frozenset({Counter.pgfault, Counter.pgminfault})
