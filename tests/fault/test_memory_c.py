"""mm/memory.c, function by function: each has a counterpart of its name, in the policy and in the reference
executor; and its contract is a check with a name, which is seen to fail on what that function decides.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Iterator

import pytest

import uffd_vm.fault.handle as handle
import uffd_vm.fault.invariants as invariants
from uffd_vm.fault.explain import walk
from uffd_vm.fault.fault import Fault, FaultFlag
from uffd_vm.fault.invariants import CELL_CHECKS, OTHER_CHECKS, PLAN_CHECKS, Cell, every_cell
from uffd_vm.fault.plan import plan
from uffd_vm.fault.rows import ROWS, Row
from uffd_vm.fault.steps import Step

# By name: uffd_vm.fault.settle, the attribute, is the function.
settle = importlib.import_module("uffd_vm.fault.settle")

#: Function: what it must keep, as names of checks in fault/invariants.py.
CONTRACTS: dict[str, str] = {
    # The lock may be gone afterwards; every fault is accounted once.
    "handle_mm_fault": "vma_not_dereferenced_after_handle_mm_fault errors_add_up every_message_ends",
    "__handle_mm_fault": "huge_fallback_never_leaves vma_not_dereferenced_after_handle_mm_fault",
    # Reads the entry first, and compares under the lock before anything changes.
    "handle_pte_fault": "recheck_under_ptl transitions_are_legal lost_race_is_no_error",
    "do_pte_missing": "marker_is_kept write_seen_or_not_tracked",
    # Charged, filled and marked uptodate before the entry shows it.
    "do_anonymous_page": "contents_before_pte charge_before_commit hook_before_write",
    # The page table before the folio lock; the region's lock is dropped to wait.
    "__do_fault": "prealloc_before_folio_lock retry_drops_the_region no_sleep_under_ptl",
    "do_fault": "write_seen_or_not_tracked wake_after_publish",
    "do_read_fault": "finish_fault_has_the_folio write_seen_or_not_tracked",
    # Allocates and charges before it reads; the entry only if it is the one that was walked.
    "do_cow_fault": "charge_before_commit prealloc_before_folio_lock recheck_under_ptl",
    "do_shared_fault": "file_write_is_dirty contents_before_pte",
    "do_wp_page": "hook_before_write file_write_is_dirty copy_before_write",
    "wp_page_copy": "copy_before_write contents_before_pte recheck_under_ptl",
    # Gets a locked folio, and gives it back only behind the commit.
    "finish_fault": "finish_fault_has_the_folio recheck_under_ptl settlement_agrees_with_result",
    "do_swap_page": "poison_and_guard_never_pierced retry_drops_the_region bug_is_loud",
    "do_numa_page": "recheck_under_ptl wake_after_publish lost_race_is_no_error",
    # Only an early look: the comparison under the lock is what protects.
    "pte_unmap_same": "recheck_under_ptl lost_race_is_no_error",
}
#: Not in the notes, but on the way.
ALSO = """
sanitize_fault_flags create_huge_pmd hugetlb_fault hugetlb_no_page hugetlb_wp do_fault_around
do_page_mkwrite wp_page_shared wp_page_reuse vmf_pte_changed pte_same mm_account_fault
"""
#: Decided, and not executed by this version.
NOT_EXECUTED = {"wp_page_copy", "do_numa_page"}


@pytest.mark.parametrize("name", [*CONTRACTS, *ALSO.split()])
def test_function_of_memory_c_has_its_counterpart(name: str) -> None:
    function = getattr(settle, name, None) or getattr(handle, name)
    assert function.__name__ == name
    assert function.__doc__ and f"{name}()" in function.__doc__


@pytest.mark.parametrize("name", CONTRACTS)
def test_the_reference_executor_has_it_too(name: str) -> None:
    memory = pytest.importorskip("uffd_vm.service.fault_service.memory")
    if name in NOT_EXECUTED:
        assert not hasattr(memory, name)
        refused = FaultFlag.SNAPSHOT_HELD | FaultFlag.HINT  # when the region is made
        assert all(cell.flags & refused for cell in cells()[name])
    else:
        assert getattr(memory, name).__name__ == name


# ---- the contracts -----------------------------------------------------------------------------------


@functools.cache
def cells() -> dict[str, list[Cell]]:
    """By function: the cells whose walk goes through it."""
    through: dict[str, list[Cell]] = {}
    for cell in every_cell():
        if cell.flags & FaultFlag.HINT and cell.pte.name not in ("STAGED", "STAGED_WP"):
            continue  # nobody else looks at it
        for level in walk(Fault(*cell[:5])).levels:
            through.setdefault(level.function, []).append(cell)
    return through


def decided_by(name: str) -> list[Row]:
    """The rows that a walk through the function may end in."""
    numbers = {cell.row.id for cell in cells()[name] if cell.row.id}
    return [ROWS[number] for number in sorted(numbers)]


def broken_plans(row: Row) -> Iterator[tuple[Step, ...]]:
    """The row's plan with one step left out, or done at another time."""
    steps = plan(row)
    for at in range(len(steps)):
        rest = steps[:at] + steps[at + 1 :]
        yield rest
        for to in range(len(rest) + 1):
            yield (*rest[:to], steps[at], *rest[to:])


def is_seen_to_fail(name: str, check: str) -> bool:
    """Whether the check objects to a wrong order of work, or a wrong row, where the function decides."""
    function = getattr(invariants, f"check_{check}")
    if function in PLAN_CHECKS:
        return any(
            any(function(row, steps)) for row in decided_by(name) for steps in broken_plans(row)
        )
    assert function in CELL_CHECKS
    return any(
        any(function(cell._replace(row=row)))
        for cell, row in itertools.product(cells()[name][::7], ROWS)
    )


@pytest.mark.parametrize(
    ("name", "check"), [(name, check) for name in CONTRACTS for check in CONTRACTS[name].split()]
)
def test_its_contract_is_a_check_that_can_fail(name: str, check: str) -> None:
    if getattr(invariants, f"check_{check}") in OTHER_CHECKS:
        return  # of settlements, which are every function's: tests/fault/test_invariants.py breaks them
    assert is_seen_to_fail(name, check)


def test_every_check_is_somebodys_contract() -> None:
    named = {f"check_{check}" for checks in CONTRACTS.values() for check in checks.split()}
    assert named == {c.__name__ for c in (*PLAN_CHECKS, *CELL_CHECKS, *OTHER_CHECKS)}
