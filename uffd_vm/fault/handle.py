"""Choose: from one fault to one row of the table, in the order of mm/memory.c (6.12).

Each function is one level of the kernel's walk and has its name. It only chooses: no level locks,
allocates, reads or writes; what the row says is done by an executor, and how that ended is settled in
settle.py. A condition of the table stands here and nowhere else. Reading order: top to bottom.

Invariants kept (checked in invariants.py): `every_cell_decided`, `poison_and_guard_never_pierced`,
`write_seen_or_not_tracked`, `copy_before_write`, `huge_fallback_never_leaves`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple, Protocol, TypeVar

from .action import Commit
from .fault import Access, Backing, Fault, FaultFlag, FaultKind
from .pte import EMPTY, PteState
from .rows import UNREACHABLE, Row, row
from .settle import finish_fault, pte_unmap_same

__all__ = [
    "POSSIBLE_PTES",
    "PROLOGUE",
    "Level",
    "admit",
    "create_huge_pmd",
    "decide",
    "do_anonymous_page",
    "do_cow_fault",
    "do_fault",
    "do_fault_around",
    "do_numa_page",
    "do_page_mkwrite",
    "do_pte_missing",
    "do_read_fault",
    "do_shared_fault",
    "do_swap_page",
    "do_wp_page",
    "handle_mm_fault",
    "handle_pte_fault",
    "hugetlb_fault",
    "hugetlb_no_page",
    "hugetlb_wp",
    "recording",
    "sanitize_fault_flags",
    "wp_page_copy",
    "wp_page_reuse",
    "wp_page_shared",
]

_P = PteState
_ANY = frozenset(
    {_P.NONE, _P.NONE_WP, _P.PRESENT, _P.WRITE_PROTECTED, _P.POISONED, _P.GUARD, _P.BUSY}
)
_EVICT = frozenset({_P.EVICTING, _P.EVICTED})
_SWAP = frozenset({_P.STAGED, _P.STAGED_WP, _P.SWAPPED, _P.SWAPPED_WP})
_ZERO = frozenset({_P.ZERO, _P.ZERO_WP})
_SNAP = frozenset({_P.SNAP_PARENT, _P.SNAP_FRAME, _P.SNAP_ZERO})

#: The states that a page of such a region can be in; a fault on any other is a bug.
POSSIBLE_PTES: dict[Backing, frozenset[PteState]] = {
    Backing.ANON: _ANY | _EVICT | _SWAP | _ZERO,
    Backing.PRIVATE_FILE: _ANY | _EVICT | _SWAP | {_P.CACHED},
    Backing.SHARED_FILE: _ANY | _EVICT | {_P.CACHED},
    Backing.SHARED_ANON: _ANY | _EVICT,
    Backing.SNAPSHOT: _ANY | _EVICT | _SWAP | _ZERO | _SNAP,
    Backing.HUGETLB: _ANY,
}
# do_swap_page() takes what is neither empty nor mapped.
_NOT_PRESENT = _SWAP | {_P.BUSY, _P.POISONED, _P.GUARD, _P.EVICTED}


class Level(NamedTuple):
    """One level of a walk: the kernel's function, why it was entered, how deep below the first, and
    whether it has a choice."""

    function: str
    because: str
    depth: int
    chooses: bool


class _Recorder:
    """What a walk leaves behind; `depth` is that of the next level."""

    def __init__(self) -> None:
        self.levels: list[Level] = []
        self.depth = 0

    def enter(self, function: str, because: str, *, chooses: bool = True) -> None:
        self.levels.append(Level(function, because, self.depth, chooses))


_R_co = TypeVar("_R_co", bound="Row | None", covariant=True)
_R = TypeVar("_R", bound="Row | None")
_recorder: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)


class _Chooser(Protocol[_R_co]):
    def __call__(self, vmf: Fault, *, because: str = "") -> _R_co: ...


def _level(chooser: Callable[[Fault], _R]) -> _Chooser[_R]:
    """Lets a walk be watched (explain.py). `because` says why a level is entered, never what it does:
    the chosen row depends on the fault alone."""

    @functools.wraps(chooser)
    def enter(vmf: Fault, *, because: str = "") -> _R:
        recorder = _recorder.get()
        if recorder is None:
            return chooser(vmf)
        recorder.enter(chooser.__name__, because)
        recorder.depth += 1
        try:
            return chooser(vmf)
        finally:
            recorder.depth -= 1

    return enter


def _through(function: Callable[..., object], because: str) -> None:
    """A level with nothing to choose: it is the same for every fault that comes there (settle.py)."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.enter(function.__name__, because, chooses=False)


def _finished(chosen: Row) -> Row:
    """What a folio was got for; where the kernel maps it by itself there is nothing to finish."""
    if chosen.commit not in (Commit.NONE, Commit.WAKE):
        _through(finish_fault, "the folio is complete")
    return chosen


@contextlib.contextmanager
def recording() -> Iterator[list[Level]]:
    """The levels entered inside the with-block, in order."""
    recorder = _Recorder()
    token = _recorder.set(recorder)
    try:
        yield recorder.levels
    finally:
        _recorder.reset(token)


def decide(
    kind: FaultKind, access: Access, backing: Backing, pte: PteState, flags: FaultFlag
) -> Row:
    """The policy: what to do about a fault with these five inputs. Pure and total."""
    return handle_mm_fault(Fault(kind, access, backing, pte, flags))


# ---- entry -----------------------------------------------------------------------------------------


@_level
def handle_mm_fault(vmf: Fault) -> Row:
    """handle_mm_fault(): the prologue, the checks, then the walk.

    Whoever calls this must not use the region object afterwards without looking it up again.
    """
    if (refused := admit(vmf.kind, vmf.flags)) is not None:
        return refused
    # p8: from here on inside the budget's user-fault scope (mem_cgroup_enter_user_fault()).
    if sanitize_fault_flags(vmf) is not None:
        return UNREACHABLE
    if vmf.backing is Backing.HUGETLB:
        return hugetlb_fault(vmf, because="a hugetlb region")
    return __handle_mm_fault(vmf, because="an ordinary region")


#: The prologue's conditions with their rows; the first that is set decides. Closing and the deadline
#: come before a busy page: a fault that joined a fill which never ends must still end itself.
PROLOGUE: tuple[tuple[FaultFlag, str], ...] = (
    (FaultFlag.EVENT, "p1"),
    (FaultFlag.NO_REGION, "p2"),
    (FaultFlag.CLOSING, "p4"),
    (FaultFlag.DEADLINE, "p7"),
    (FaultFlag.PAGE_BUSY, "p3"),
    (FaultFlag.WRITE_DENIED, "p5"),
    (FaultFlag.BEYOND_SIZE, "p6"),
)


def admit(kind: FaultKind, flags: FaultFlag) -> Row | None:
    """The prologue; None passes (p8). A store that waits for write protection has its page, which poison
    would refuse: past its deadline it is denied, else it would fault again without end."""
    for flag, name in PROLOGUE:
        if flags & flag:
            denied = kind is FaultKind.WP and flag is FaultFlag.DEADLINE
            return row("p7wp") if denied else row(name)
    return None


def sanitize_fault_flags(vmf: Fault) -> str | None:
    """sanitize_fault_flags(): what makes this combination impossible, or None."""
    if vmf.kind is FaultKind.WP and vmf.access is Access.READ:
        return "a read never faults on write protection"
    if vmf.kind is FaultKind.MINOR and vmf.backing is not Backing.SHARED_FILE:
        return "only shared memfd mappings are registered for minor faults"
    if vmf.pte not in POSSIBLE_PTES[vmf.backing]:
        return f"no page of such a region is {vmf.pte.name}"
    return None


@_level
def __handle_mm_fault(vmf: Fault) -> Row:
    """__handle_mm_fault(): a whole block if it may be one, else page by page."""
    empty = vmf.kind is FaultKind.MISSING and vmf.pte is PteState.NONE
    if empty and vmf.flags & FaultFlag.HUGE_OK:
        huge = create_huge_pmd(vmf, because="the aligned block is empty")
        if huge is not None:
            return huge  # else FALLBACK, which never leaves this level
    return handle_pte_fault(vmf, because="one page")


@_level
def create_huge_pmd(vmf: Fault) -> Row | None:
    """create_huge_pmd(): the whole block, or None for FALLBACK."""
    write = vmf.access is Access.WRITE
    if write and (vmf.flags & FaultFlag.HOOK or _shared(vmf)):
        return None  # page_mkwrite is asked page by page
    if _anonymous(vmf):
        return row("33") if write or not _wants_wp(vmf) else row("33wp")
    if vmf.flags & FaultFlag.CACHED:
        return None  # fault-around does that
    if vmf.backing is Backing.PRIVATE_FILE and not _tracked(vmf):
        return None  # the kernel maps these by itself; blocks are the read-ahead's matter
    if vmf.backing is Backing.SHARED_FILE:
        return row("33readwp") if _wants_wp(vmf) else row("33read")
    return row("33read") if write else row("33readwp")


@_level
def handle_pte_fault(vmf: Fault) -> Row:
    """handle_pte_fault(): by the page's state, as it was read without a lock."""
    if vmf.pte in _NOT_PRESENT:
        if _sampled(vmf):
            return do_numa_page(vmf, because="staged by the sampler")
        return do_swap_page(vmf, because="neither empty nor present")
    if vmf.kind is FaultKind.WP:
        return do_wp_page(vmf, because="a write to a write-protected page")
    if vmf.pte in EMPTY:
        return do_pte_missing(vmf, because="the entry is empty")
    if vmf.pte is PteState.EVICTING:
        return row("p3")
    return row("30")


@_level
def do_pte_missing(vmf: Fault) -> Row:
    """do_pte_missing(): anonymous or file."""
    if _anonymous(vmf):
        return do_anonymous_page(vmf, because="an anonymous region")
    return do_fault(vmf, because="the region has a backing")


# ---- anonymous memory ------------------------------------------------------------------------------


@_level
def do_anonymous_page(vmf: Fault) -> Row:
    """do_anonymous_page(): the zero page or fresh zeros; of a snapshot's child, the snapshot's content."""
    if vmf.pte in (PteState.SNAP_PARENT, PteState.SNAP_FRAME, PteState.SNAP_ZERO):
        return do_snapshot_page(vmf, because="a snapshot says what was here")
    marker = vmf.pte is PteState.NONE_WP
    if vmf.access is Access.READ:
        if marker:
            return row("3")
        return row("2") if _wants_wp(vmf) else row("1")
    if vmf.flags & FaultFlag.HOOK:
        return row("5hook")
    return row("5") if marker else row("4")


@_level
def do_snapshot_page(vmf: Fault) -> Row:
    """No counterpart in the kernel, where fork() has mapped these pages already."""
    on_disk = vmf.pte is PteState.SNAP_FRAME and not vmf.flags & FaultFlag.CACHED
    if vmf.access is Access.WRITE and not vmf.flags & FaultFlag.HOOK:
        return row("28disk") if on_disk else row("28")
    if vmf.pte is PteState.SNAP_PARENT:
        return row("25")
    if vmf.pte is PteState.SNAP_FRAME:
        return row("26disk") if on_disk else row("26")
    return row("27wp") if _wants_wp(vmf) else row("27")


# ---- file-backed memory ----------------------------------------------------------------------------


@_level
def do_fault(vmf: Fault) -> Row:
    """do_fault(): read, copy on write, or shared write."""
    cached = vmf.flags & FaultFlag.CACHED
    if vmf.kind is FaultKind.MINOR and not cached:
        return row("14gone")
    if vmf.kind is FaultKind.MISSING and vmf.backing is Backing.SHARED_FILE and cached:
        return row("12dup")
    if vmf.access is Access.READ:
        return do_read_fault(vmf, because="a read")
    if vmf.backing is Backing.PRIVATE_FILE:
        return do_cow_fault(vmf, because="a write to private memory")
    return do_shared_fault(vmf, because="a write to shared memory")


@_level
def do_read_fault(vmf: Fault) -> Row:
    """do_read_fault(): what is cached first, with its neighbours; else vm_ops->fault."""
    if vmf.flags & FaultFlag.CACHED:
        return do_fault_around(vmf, because="the folio is cached")
    return _finished(__do_fault(vmf, because="the folio is not cached"))


@_level
def do_fault_around(vmf: Fault) -> Row:
    """do_fault_around(): map_pages, which never does I/O."""
    if vmf.backing is Backing.SHARED_FILE:
        return row("14wp") if _wants_wp(vmf) else row("14")
    if vmf.backing is Backing.SHARED_ANON:
        return row("16cached")
    return row("9") if _tracked(vmf) else row("9wake")


@_level
def do_cow_fault(vmf: Fault) -> Row:
    """do_cow_fault(): a private copy, charged before the folio is read."""
    if not vmf.flags & FaultFlag.CACHED:
        return _finished(__do_fault(vmf, because="the folio is not cached"))
    return _finished(row("11cached") if _tracked(vmf) else row("11wake"))


@_level
def do_shared_fault(vmf: Fault) -> Row:
    """do_shared_fault(): the folio, then page_mkwrite, then dirty."""
    if not vmf.flags & FaultFlag.CACHED:
        return _finished(__do_fault(vmf, because="the folio is not cached"))
    return _finished(do_page_mkwrite(vmf, because="the folio is about to be written"))


@_level
def __do_fault(vmf: Fault) -> Row:
    """__do_fault(): vm_ops->fault, which reads the folio: always MAJOR, and RETRY while it waits."""
    if vmf.backing is Backing.PRIVATE_FILE:
        if vmf.access is Access.WRITE:
            return row("11") if _tracked(vmf) else row("11cache")
        return row("10") if _tracked(vmf) else row("10cache")
    if vmf.access is Access.WRITE:
        return do_page_mkwrite(vmf, because="the folio, once read, is about to be written")
    if vmf.backing is Backing.SHARED_FILE:
        return row("12wp") if _wants_wp(vmf) else row("12")
    return row("16")


@_level
def do_page_mkwrite(vmf: Fault) -> Row:
    """do_page_mkwrite(): the hook is asked, and the folio dirty, before the write is let through."""
    if vmf.kind is FaultKind.WP:
        if _shared(vmf):
            return row("22")
        return row("18zerohook") if vmf.pte is PteState.ZERO_WP else row("18hook")
    if vmf.kind is FaultKind.MINOR:
        return row("15")
    if vmf.backing is Backing.SHARED_FILE:
        return row("13")
    return row("17cached") if vmf.flags & FaultFlag.CACHED else row("17")


# ---- write protection ------------------------------------------------------------------------------


@_level
def do_wp_page(vmf: Fault) -> Row:
    """do_wp_page(): reuse the page if nobody else needs it, else copy it first."""
    if vmf.pte is PteState.EVICTING:
        must_ask = vmf.flags & (FaultFlag.SNAPSHOT_HELD | FaultFlag.HOOK)
        return row("23keep") if must_ask else row("23")
    if vmf.pte in (PteState.PRESENT, PteState.ZERO):
        return row("24")
    if vmf.pte in EMPTY and not _mapped_unseen(vmf):
        return row("24gone")
    if vmf.flags & FaultFlag.SNAPSHOT_HELD:
        return wp_page_copy(vmf, because="a snapshot still needs the page")
    if _shared(vmf):
        return wp_page_shared(vmf, because="a shared mapping")
    return wp_page_reuse(vmf, because="nobody else needs the page")


@_level
def wp_page_shared(vmf: Fault) -> Row:
    """wp_page_shared(): page_mkwrite, then reuse."""
    return do_page_mkwrite(vmf, because="the page is about to be written")


@_level
def wp_page_reuse(vmf: Fault) -> Row:
    """wp_page_reuse(): the page stays, writable and dirty."""
    if vmf.backing is Backing.PRIVATE_FILE:
        return row("21map") if vmf.pte in EMPTY else row("21")
    if vmf.flags & FaultFlag.HOOK:
        return do_page_mkwrite(vmf, because="a hook must agree")
    zero = vmf.pte is PteState.ZERO_WP
    if vmf.backing is Backing.SNAPSHOT:
        return row("29zero") if zero else row("29")
    return row("18zero") if zero else row("18")


@_level
def wp_page_copy(vmf: Fault) -> Row:
    """wp_page_copy(), the other way round: the writer keeps the page and the snapshots get the copy,
    since nobody but the kernel can put another page behind the writer's entry."""
    comes_back = vmf.flags & FaultFlag.HOOK or _shared(vmf) or vmf.pte in EMPTY
    if vmf.pte is PteState.ZERO_WP:
        return row("20wake") if comes_back else row("20")
    return row("19wake") if comes_back else row("19")


# ---- not present, and not empty --------------------------------------------------------------------


@_level
def do_swap_page(vmf: Fault) -> Row:
    """do_swap_page(): migration entries, markers, then what reclaim took."""
    _through(pte_unmap_same, "an early look, before work that may be in vain")
    if vmf.pte is PteState.BUSY:
        return row("p3")
    if vmf.pte is PteState.POISONED:
        return row("31")
    if vmf.pte is PteState.GUARD:
        return row("32")
    if vmf.kind is FaultKind.WP:
        return row("23late") if vmf.pte is PteState.EVICTED else row("24gone")
    if vmf.pte is PteState.EVICTED:
        return row("p3")
    if vmf.pte in (PteState.STAGED, PteState.STAGED_WP):
        return row("6wp") if _stays_write_protected(vmf) else row("6")
    if vmf.access is Access.WRITE and not vmf.flags & (FaultFlag.SNAPSHOT_HELD | FaultFlag.HOOK):
        return row("7")  # WRITE is consumed here: no do_wp_page() follows
    return row("7wp") if _stays_write_protected(vmf) else row("7")


@_level
def do_numa_page(vmf: Fault) -> Row:
    """do_numa_page(): a hint fault; the page goes back with its full protection."""
    return row("35wp") if _stays_write_protected(vmf) else row("35")


# ---- hugetlb ---------------------------------------------------------------------------------------


@_level
def hugetlb_fault(vmf: Fault) -> Row:
    """hugetlb_fault(): no zero page, no swap, no reclaim."""
    if vmf.pte is PteState.BUSY:
        return row("p3")
    if vmf.pte is PteState.POISONED:
        return row("31huge")
    if vmf.pte is PteState.GUARD:
        return row("32")
    if vmf.kind is FaultKind.WP:
        return hugetlb_wp(vmf, because="a write to a write-protected huge page")
    if vmf.pte in EMPTY:
        return hugetlb_no_page(vmf, because="the entry is empty")
    return row("30")


@_level
def hugetlb_no_page(vmf: Fault) -> Row:
    """hugetlb_no_page(): one huge page, zeros or read."""
    at_hand = vmf.flags & FaultFlag.CACHED
    if vmf.access is Access.READ and _tracked(vmf):
        return row("34wp") if at_hand else row("34readwp")
    return row("34") if at_hand else row("34read")


@_level
def hugetlb_wp(vmf: Fault) -> Row:
    """hugetlb_wp(): as do_wp_page()."""
    if vmf.pte in EMPTY:
        return row("24gone")
    if vmf.pte is PteState.PRESENT:
        return row("24")
    return row("19huge") if vmf.flags & FaultFlag.SNAPSHOT_HELD else row("34reuse")


# ---- the conditions that several levels ask --------------------------------------------------------


def _anonymous(vmf: Fault) -> bool:
    """vma_is_anonymous()"""
    return vmf.backing in (Backing.ANON, Backing.SNAPSHOT)


def _shared(vmf: Fault) -> bool:
    """VM_SHARED"""
    return vmf.backing in (Backing.SHARED_FILE, Backing.SHARED_ANON)


def _tracked(vmf: Fault) -> bool:
    """A write must be seen: asked for, or there is a marker that must not be lost."""
    return bool(vmf.flags & FaultFlag.TRACKED) or vmf.pte is PteState.NONE_WP


def _wants_wp(vmf: Fault) -> bool:
    """vma_wants_writenotify(): the page is installed write-protected at first."""
    return _tracked(vmf) or bool(vmf.flags & FaultFlag.HOOK)


def _sampled(vmf: Fault) -> bool:
    return (
        vmf.kind is FaultKind.MISSING
        and vmf.backing is Backing.ANON
        and vmf.pte in (PteState.STAGED, PteState.STAGED_WP)
        and bool(vmf.flags & FaultFlag.HINT)
    )


def _stays_write_protected(vmf: Fault) -> bool:
    """A page that comes back from reclaim: its bit is in the state, and a snapshot keeps it on."""
    return vmf.pte in (PteState.STAGED_WP, PteState.SWAPPED_WP) or bool(
        vmf.flags & FaultFlag.SNAPSHOT_HELD
    )


def _mapped_unseen(vmf: Fault) -> bool:
    """The kernel maps a cached folio by itself, and a marker's bit with it: no message tells us."""
    on_memfd = vmf.backing in (Backing.PRIVATE_FILE, Backing.SHARED_FILE)
    return on_memfd and bool(vmf.flags & FaultFlag.CACHED)
