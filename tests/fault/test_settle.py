"""Every settlement, restated; how an errno is classed; the recheck; the accounting epilogue."""

from __future__ import annotations

import errno
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uffd_vm.fault.action import Commit, Counter, ErrnoClass, Settlement, Truth
from uffd_vm.fault.fault import (
    VM_FAULT_ERROR,
    Access,
    Backing,
    Fault,
    FaultFlag,
    FaultKind,
    FaultResult,
    describe,
)
from uffd_vm.fault.pte import PteState
from uffd_vm.fault.rows import ROWS
from uffd_vm.fault.settle import (
    DONE_UNTOUCHED,
    classify_errno,
    finish_fault,
    mm_account_fault,
    pte_same,
    pte_unmap_same,
    recheck,
    settle,
    settle_truth,
    vmf_pte_changed,
)
from uffd_vm.fault.steps import Step
from uffd_vm.fault.table import compile_tables

COPIES = "ZEROPAGE COPY COPY_WP"
CACHE = "COPY_CACHE COPY_CACHE_WP"
CONTINUES = "CONTINUE CONTINUE_WP"
BLOCKS = "COPY_BLOCK COPY_BLOCK_WP"
INSTALLS = f"{COPIES} {CACHE} {CONTINUES} MOVE"
BUG, BUG_WP = ("POISON SIGBUS UNREACHABLE", "DENY SIGBUS X-BUG")
FALLBACK = ("ORDER0 FALLBACK 33fallback", BLOCKS)
RACE = "DROP NOPAGE X-RACE"

# errno class: (settlement, result, row) for commits. What is not named is a bug: loud.
SETTLEMENTS: dict[str, list[tuple[str, str]]] = {
    "OK": [("DONE 0 -", "*")],
    "EEXIST": [
        ("VERIFY NOPAGE -", f"{COPIES} {CONTINUES} MOVE POISON"),
        ("DONE 0 -", CACHE),
        FALLBACK,
    ],
    "ENOENT": [
        ("ORDER0 NOPAGE -", f"{COPIES} {CACHE} {CONTINUES}"),
        ("VERIFY NOPAGE -", "MOVE"),
        (RACE, "UNPROTECT POISON"),
        FALLBACK,
    ],
    "PARTIAL": [("ADVANCE 0 -", f"{INSTALLS} POISON"), FALLBACK],
    "CHANGING": [("RETRY RETRY -", "*")],
    "ESRCH": [("DETACH NOPAGE X-GONE", "*")],
    "EFAULT": [
        ("POISON SIGBUS p6", f"{COPIES} {CACHE} MOVE"),
        ("VERIFY NOPAGE -", CONTINUES),
        FALLBACK,
    ],
    "ENOMEM": [
        ("RECLAIM OOM X-OOM", f"NONE {INSTALLS}"),
        ("RECLAIM OOM X-OOMwp", "WAKE UNPROTECT"),
        FALLBACK,
    ],
    "EBUSY": [("SKIP 0 6copy", "MOVE"), FALLBACK],
    "EINVAL": [],
    "EIO": [
        ("POISON SIGBUS X-IO", f"NONE {INSTALLS}"),
        ("DENY SIGBUS X-IOwp", "WAKE UNPROTECT"),
        FALLBACK,
    ],
    "TIMEDOUT": [
        ("POISON SIGBUS p7", f"NONE {INSTALLS}"),
        ("DENY SIGBUS p7wp", "WAKE UNPROTECT"),
        FALLBACK,
    ],
    "DENIED": [FALLBACK, ("DENY SIGSEGV X-DENY", "*")],
    "RACE": [(RACE, "*")],
    "CHARGE": [
        ("RECLAIM OOM X-OOM", f"NONE {INSTALLS}"),
        ("RECLAIM OOM X-OOMwp", "WAKE UNPROTECT"),
        FALLBACK,
    ],
    "TRUNCATED": [
        ("POISON SIGBUS p6", f"{COPIES} {CACHE} MOVE"),
        (RACE, f"{CONTINUES} UNPROTECT POISON"),
        FALLBACK,
    ],
    "OTHER": [],
}


def restated(commit: Commit, error: ErrnoClass) -> str:
    for end, commits in SETTLEMENTS[error.name]:
        if commits == "*" or commit.name in commits.split():
            return end
    return BUG_WP if commit.name in ("WAKE", "UNPROTECT", "POISON") else BUG


@pytest.mark.parametrize("error", ErrnoClass, ids=lambda e: e.name)
def test_every_settlement_is_as_restated(error: ErrnoClass) -> None:
    for commit in Commit:
        end = settle(commit, error)
        row = end.row.name if end.row else "-"
        found = f"{end.settlement.name} {describe(end.result)} {row}"
        assert found == restated(commit, error), commit.name


def test_settle_table_is_settle() -> None:
    table = compile_tables().settle
    assert len(table) == len(Commit) * 17 * 8
    for commit, error in itertools.product(Commit, ErrnoClass):
        at = (commit * 17 + error) * 8
        end = settle(commit, error)
        assert table[at] == end.settlement
        assert table[at + 1] == (0xFF if end.row is None else end.row.id)
        assert int.from_bytes(table[at + 4 : at + 8], "little") == end.result


# ---- the kernel's truth ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "commit, truth, backing, expected",
    [
        # Row 30: SCAN, whose commit is WAKE.
        ("WAKE", "ABSENT", "ANON", "RETRY RETRY 30lost"),
        ("WAKE", "MARKER", "SHARED_FILE", "RETRY RETRY 30marker"),
        ("WAKE", "PRESENT", "ANON", "DROP NOPAGE 30duplicate"),
        ("WAKE", "PRESENT_WP", "ANON", "DROP NOPAGE 30duplicate"),
        ("WAKE", "POISONED", "ANON", "DROP HWPOISON 31"),
        ("WAKE", "GUARDED", "ANON", "DROP SIGSEGV 32"),
        # EEXIST: somebody was faster, or a marker is in the way.
        ("COPY", "PRESENT", "ANON", "DONE NOPAGE 30found"),
        ("COPY_WP", "PRESENT_WP", "PRIVATE_FILE", "DONE NOPAGE 30foundwp"),
        ("COPY", "ABSENT", "ANON", "DROP NOPAGE X-RACE"),
        ("COPY", "MARKER", "SHARED_FILE", "DROP NOPAGE X-RACE"),
        ("ZEROPAGE", "MARKER", "ANON", "RETRY RETRY 30marker"),
        ("MOVE", "MARKER", "ANON", "RETRY RETRY 30marker"),
        ("MOVE", "ABSENT", "ANON", "RETRY RETRY -"),
        ("POISON", "POISONED", "ANON", "DONE HWPOISON 31"),
        ("POISON", "POISONED", "HUGETLB", "DONE HWPOISON_LARGE 31huge"),
        ("POISON", "MARKER", "ANON", "DENY SIGBUS X-BUG"),
        ("POISON", "PRESENT", "ANON", "DONE NOPAGE 30found"),
        # The pool of huge pages is empty: EEXIST on 6.18.
        ("COPY", "ABSENT", "HUGETLB", "RECLAIM OOM X-OOM"),
        ("COPY", "PRESENT", "HUGETLB", "DONE NOPAGE 30found"),
        ("UNPROTECT", "PRESENT", "ANON", "DROP NOPAGE X-RACE"),
    ],
)
def test_what_the_truth_means(commit: str, truth: str, backing: str, expected: str) -> None:
    end = settle_truth(Commit[commit], Truth[truth], Backing[backing])
    row = end.row.name if end.row else "-"
    assert f"{end.settlement.name} {describe(end.result)} {row}" == expected


def test_truth_table_is_settle_truth() -> None:
    table = compile_tables().truth
    keys = itertools.product(Commit, Truth, Backing)
    for index, key in enumerate(keys):
        end = settle_truth(*key)
        at = index * 8
        assert table[at] == end.settlement
        assert table[at + 1] == (0xFF if end.row is None else end.row.id)
        assert int.from_bytes(table[at + 4 : at + 8], "little") == end.result
    assert len(table) == len(Commit) * len(Truth) * len(Backing) * 8


def test_a_marker_never_livelocks_a_fill() -> None:
    """ZEROPAGE on a marker is EEXIST for ever: the truth turns row 1 into row 3."""
    end = settle_truth(Commit.ZEROPAGE, Truth.MARKER, Backing.ANON)
    assert end.row is not None and end.row.next_pte is PteState.NONE_WP


# ---- errno -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number, done, expected",
    [
        (0, 4096, ErrnoClass.OK),
        (errno.EAGAIN, 4096, ErrnoClass.PARTIAL),
        (errno.EAGAIN, -errno.EAGAIN, ErrnoClass.CHANGING),
        (errno.EAGAIN, 1, ErrnoClass.PARTIAL),
        (errno.EAGAIN, DONE_UNTOUCHED, ErrnoClass.CHANGING),  # UFFDIO_WRITEPROTECT has no out field
        (errno.EAGAIN, 0, ErrnoClass.CHANGING),
        (errno.EINTR, 8192, ErrnoClass.PARTIAL),
        (errno.EEXIST, -errno.EEXIST, ErrnoClass.EEXIST),
        (errno.EEXIST, DONE_UNTOUCHED, ErrnoClass.EEXIST),
        (errno.ENOENT, -errno.ENOENT, ErrnoClass.ENOENT),
        (errno.ESRCH, DONE_UNTOUCHED, ErrnoClass.ESRCH),
        (errno.ENOSPC, DONE_UNTOUCHED, ErrnoClass.ESRCH),
        (errno.EFAULT, -errno.EFAULT, ErrnoClass.EFAULT),
        (errno.ENOMEM, -errno.ENOMEM, ErrnoClass.ENOMEM),
        (errno.EBUSY, -errno.EBUSY, ErrnoClass.EBUSY),
        (errno.EINVAL, DONE_UNTOUCHED, ErrnoClass.EINVAL),
        (errno.EIO, DONE_UNTOUCHED, ErrnoClass.EIO),
        (133, DONE_UNTOUCHED, ErrnoClass.EIO),
        (errno.ETIMEDOUT, DONE_UNTOUCHED, ErrnoClass.TIMEDOUT),
        (errno.EPERM, DONE_UNTOUCHED, ErrnoClass.OTHER),
    ],
)
def test_classify_errno(number: int, done: int, expected: ErrnoClass) -> None:
    assert classify_errno(number, done) is expected


@given(st.integers(0, 4095), st.integers(-(1 << 62), 1 << 40))
def test_every_errno_has_a_settlement(number: int, done: int) -> None:
    for commit in Commit:
        end = settle(commit, classify_errno(number, done))
        assert isinstance(end.settlement, Settlement)


# ---- recheck -----------------------------------------------------------------------------------------

VMF = Fault(
    FaultKind.MISSING,
    Access.READ,
    Backing.ANON,
    PteState.NONE,
    FaultFlag(0),
    region=1,
    generation=5,
    version=9,
)


def test_vmf_pte_changed_compares_generation_version_and_state() -> None:
    assert not vmf_pte_changed(VMF, generation=5, version=9, pte=PteState.NONE)
    assert vmf_pte_changed(VMF, generation=6, version=9, pte=PteState.NONE)
    assert vmf_pte_changed(VMF, generation=5, version=10, pte=PteState.NONE)
    assert vmf_pte_changed(VMF, generation=5, version=9, pte=PteState.BUSY)
    assert recheck(VMF, generation=5, version=9, pte=PteState.NONE) is ErrnoClass.OK
    assert recheck(VMF, generation=6, version=9, pte=PteState.NONE) is ErrnoClass.RACE


def test_pte_unmap_same_is_only_an_early_look() -> None:
    assert pte_unmap_same(VMF, PteState.NONE) and not pte_unmap_same(VMF, PteState.ZERO)
    assert pte_same(PteState.ZERO, PteState.ZERO) and not pte_same(PteState.ZERO, PteState.NONE)


def test_finish_fault_rechecks_before_it_commits() -> None:
    for row in ROWS:
        steps = finish_fault(row)
        if Step.COMMIT in steps:
            assert steps[:3] == (Step.PTE_LOCK, Step.RECHECK, Step.COMMIT)


def test_finish_fault_is_one_critical_section_and_wakes_behind_it() -> None:
    for row in ROWS:
        locked = list(finish_fault(row))
        if row.commit is not Commit.NONE:
            assert locked.pop() is Step.WAKE
        if locked:
            assert (locked[0], locked[-1]) == (Step.PTE_LOCK, Step.PTE_UNLOCK)
            assert len(set(locked)) == len(locked) and Step.WAKE not in locked


# ---- mm_account_fault() --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "result, tries, expected",
    [
        (FaultResult(0), 0, {"pgfault", "pgminfault"}),
        (FaultResult.NOPAGE, 0, {"pgfault", "pgminfault"}),
        (FaultResult.MAJOR, 0, {"pgfault", "pgmajfault"}),
        (FaultResult(0), 1, {"pgfault", "pgmajfault"}),  # TRIED
        (FaultResult.MAJOR | FaultResult.COMPLETED, 1, {"pgfault", "pgmajfault"}),
        (FaultResult.SIGBUS, 0, {"pgfault", "pgfault_failed"}),
        (FaultResult.SIGBUS | FaultResult.MAJOR, 3, {"pgfault", "pgfault_failed"}),
        (FaultResult.RETRY, 0, set()),
        (FaultResult.RETRY | FaultResult.MAJOR, 1, set()),
    ],
)
def test_mm_account_fault(result: FaultResult, tries: int, expected: set[str]) -> None:
    assert {c.name for c in mm_account_fault(result, tries)} == expected


@given(st.lists(st.tuples(st.integers(0, 0x7FFF), st.integers(0, 3))))
def test_pgfault_is_the_sum_of_its_parts(faults: list[tuple[int, int]]) -> None:
    total = dict.fromkeys(Counter, 0)
    for result, tries in faults:
        for counter in mm_account_fault(FaultResult(result), tries):
            total[counter] += 1
    assert (
        total[Counter.pgfault]
        == total[Counter.pgmajfault] + total[Counter.pgminfault] + total[Counter.pgfault_failed]
    )
    assert total[Counter.pgfault_failed] == sum(
        bool(FaultResult(r) & VM_FAULT_ERROR and not FaultResult(r) & FaultResult.RETRY)
        for r, _ in faults
    )
