"""The numbers that C, trace files and statistics rely on: written down once more, so none can move."""

import enum

import pytest

from uffd_vm.fault.action import AMOUNTS, Action, Commit, Counter, ErrnoClass, Settlement, Truth
from uffd_vm.fault.fault import (
    MAIN_FLAGS,
    PROLOGUE_FLAGS,
    VM_FAULT_ERROR,
    Access,
    Backing,
    Fault,
    FaultFlag,
    FaultKind,
    FaultResult,
    describe,
)
from uffd_vm.fault.pte import (
    EMPTY,
    LEGAL_FOLIO_TRANSITIONS,
    LEGAL_PTE_TRANSITIONS,
    MAPPED,
    FolioState,
    PteState,
)
from uffd_vm.fault.rows import ROWS, row

IN_ORDER: dict[type[enum.IntEnum], str] = {
    FaultKind: "MISSING WP MINOR",
    Access: "READ WRITE",
    Backing: "ANON PRIVATE_FILE SHARED_FILE SHARED_ANON SNAPSHOT HUGETLB",
    PteState: "NONE NONE_WP ZERO ZERO_WP PRESENT WRITE_PROTECTED STAGED STAGED_WP SWAPPED SWAPPED_WP "
    "POISONED GUARD BUSY EVICTING EVICTED CACHED SNAP_PARENT SNAP_FRAME SNAP_ZERO",
    FolioState: "ABSENT FILLING UPTODATE DIRTY WRITEBACK ERROR EVICTING",
    Action: "WAKE READ_EVENT UNREGISTER_STRAY JOIN POISON DENY_WRITE SCAN ZERO_FILL MOVE_BACK "
    "STAGED_COPY SWAP_IN MAP_CACHED READ_FOLIO COW_FOLIO MKWRITE_FOLIO REUSE COW_SNAPSHOT MKWRITE "
    "CANCEL_EVICT UNPROTECT_AGAIN SNAP_COPY SNAP_FRAME SNAP_COW FILL_BLOCK HUGETLB_FILL",
    Commit: "NONE WAKE ZEROPAGE COPY COPY_WP COPY_CACHE COPY_CACHE_WP CONTINUE CONTINUE_WP UNPROTECT "
    "POISON MOVE COPY_BLOCK COPY_BLOCK_WP",
    ErrnoClass: "OK EEXIST ENOENT PARTIAL CHANGING ESRCH EFAULT ENOMEM EBUSY EINVAL EIO TIMEDOUT "
    "DENIED RACE CHARGE TRUNCATED OTHER",
    Settlement: "DONE RETRY ADVANCE VERIFY ORDER0 POISON DROP DETACH RECLAIM SKIP DENY",
    Truth: "ABSENT MARKER PRESENT PRESENT_WP POISONED GUARDED",
    Counter: "pgfault pgmajfault pgminfault pgfault_failed zero_fill anon_alloc wp_grant pg_activate "
    "refault pswpin pswpout workingset_refault io_error map_around cow mkwrite dirtied pgreuse "
    "cow_reuse evict_cancel spurious snap_copy duplicate lost_page poison_hit thp_alloc thp_fallback "
    "numa_hint oom race_lost stray timeout joined deny bytes_read pgsteal pgscan readahead writeback "
    "bytes_written reclaim throttled bug",
}


@pytest.mark.parametrize("members", IN_ORDER, ids=lambda m: m.__name__)
def test_members_keep_their_numbers(members: type[enum.IntEnum]) -> None:
    assert [(m.name, m.value) for m in members] == [
        (name, number) for number, name in enumerate(IN_ORDER[members].split())
    ]


def test_fault_result_has_the_kernels_values() -> None:
    assert {str(r.name): int(r) for r in FaultResult} == {
        "OOM": 0x1,
        "SIGBUS": 0x2,
        "MAJOR": 0x4,
        "HWPOISON": 0x10,
        "HWPOISON_LARGE": 0x20,
        "SIGSEGV": 0x40,
        "NOPAGE": 0x100,
        "LOCKED": 0x200,
        "RETRY": 0x400,
        "FALLBACK": 0x800,
        "DONE_COW": 0x1000,
        "NEEDDSYNC": 0x2000,
        "COMPLETED": 0x4000,
    }
    assert int(VM_FAULT_ERROR) == 0x1 | 0x2 | 0x40 | 0x10 | 0x20 | 0x800


def test_fault_flags_index_two_tables() -> None:
    assert {str(f.name): int(f) for f in FaultFlag} == {
        "TRACKED": 1,
        "SNAPSHOT_HELD": 2,
        "CACHED": 4,
        "HOOK": 8,
        "HUGE_OK": 16,
        "HINT": 32,
        "EVENT": 64,
        "NO_REGION": 128,
        "PAGE_BUSY": 256,
        "CLOSING": 512,
        "WRITE_DENIED": 1024,
        "BEYOND_SIZE": 2048,
        "DEADLINE": 4096,
    }
    assert (int(MAIN_FLAGS), int(PROLOGUE_FLAGS)) == (63, 127 << 6)


def test_one_printer_for_flags() -> None:
    assert describe(FaultResult(0)) == "0"
    assert describe(FaultResult.OOM | FaultResult.RETRY) == "OOM|RETRY"
    assert describe(FaultFlag.HOOK) == "HOOK"


def test_a_fault_is_frozen() -> None:
    fault = Fault(FaultKind.MISSING, Access.READ, Backing.ANON, PteState.NONE)
    with pytest.raises(AttributeError):
        fault.pte = PteState.PRESENT  # type: ignore[misc]


def test_row_ids() -> None:
    assert [r.id for r in ROWS] == list(range(len(ROWS)))
    assert len(ROWS) < 0xFF
    assert ROWS[0].name == "UNREACHABLE"
    assert [r.name for r in ROWS[1:36]] == [str(n) for n in range(1, 36)]
    assert len({r.name for r in ROWS}) == len(ROWS)
    assert (row("7wp").base, row("7wp").number) == ("7", 7)
    assert (row("X-IOwp").base, row("p7wp").base, row("p3").number) == ("X-IO", "p7", 0)


def test_rows_count_no_amounts_and_leave_pgfault_to_the_epilogue() -> None:
    epilogue = {
        Counter.pgfault,
        Counter.pgmajfault,
        Counter.pgminfault,
        Counter.pgfault_failed,
    }
    for r in ROWS:
        assert not r.counters & (AMOUNTS | epilogue), r


def test_counters_fit_a_word() -> None:
    assert max(Counter) < 64


def test_which_states_have_a_page_mapped_and_which_have_nothing() -> None:
    assert {p.name for p in MAPPED} == {
        "ZERO", "ZERO_WP", "PRESENT", "WRITE_PROTECTED", "EVICTING",
    }  # fmt: skip
    assert {p.name for p in EMPTY} == {
        "NONE", "NONE_WP", "CACHED", "SNAP_PARENT", "SNAP_FRAME", "SNAP_ZERO",
    }  # fmt: skip


@pytest.mark.parametrize(
    "before, after",
    [
        (PteState.POISONED, PteState.PRESENT),  # COPY would overwrite the poison
        (PteState.GUARD, PteState.PRESENT),  # COPY would pierce the guard
        (PteState.SWAPPED, PteState.ZERO),
        (PteState.NONE, PteState.EVICTING),
        (PteState.STAGED_WP, PteState.PRESENT),  # MOVE would drop the bit
        (PteState.EVICTED, PteState.PRESENT),
        (PteState.EVICTED, PteState.BUSY),
        (PteState.SNAP_FRAME, PteState.ZERO),
    ],
)
def test_transitions_that_would_lose_something_are_illegal(
    before: PteState, after: PteState
) -> None:
    assert (before, after) not in LEGAL_PTE_TRANSITIONS


def test_dirty_folio_is_never_dropped() -> None:
    lost = {FolioState.ABSENT, FolioState.EVICTING, FolioState.UPTODATE, FolioState.ERROR}
    assert not {(FolioState.DIRTY, state) for state in lost} & LEGAL_FOLIO_TRANSITIONS
