"""The walk of a decision names the kernel's functions, in the kernel's order, with a reason for each."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path

import pytest

import uffd_vm.fault.handle as handle
from uffd_vm.fault.explain import explain, walk
from uffd_vm.fault.fault import Access, Backing, Fault, FaultFlag, FaultKind
from uffd_vm.fault.invariants import every_cell
from uffd_vm.fault.pte import PteState
from uffd_vm.fault.rows import UNREACHABLE


def fault(words: str) -> Fault:
    kind, access, backing, pte, *flags = words.split()
    wanted = FaultFlag(0)
    for flag in flags:
        wanted |= FaultFlag[flag]
    return Fault(FaultKind[kind], Access[access], Backing[backing], PteState[pte], wanted)


TOP = "handle_mm_fault __handle_mm_fault handle_pte_fault"
WALKS = [
    ("MISSING READ ANON NONE", f"{TOP} do_pte_missing do_anonymous_page", "1"),
    ("MISSING WRITE ANON NONE", f"{TOP} do_pte_missing do_anonymous_page", "4"),
    ("MISSING READ ANON SWAPPED", f"{TOP} do_swap_page pte_unmap_same", "7"),
    ("MISSING READ ANON POISONED", f"{TOP} do_swap_page pte_unmap_same", "31"),
    (  # the kernel maps what is cached: nothing to finish
        "MISSING WRITE PRIVATE_FILE NONE CACHED",
        f"{TOP} do_pte_missing do_fault do_cow_fault",
        "11wake",
    ),
    ("MISSING READ ANON STAGED HINT", f"{TOP} do_numa_page", "35"),
    ("MISSING READ ANON PRESENT", TOP, "30"),
    (
        "MISSING READ ANON NONE HUGE_OK",
        "handle_mm_fault __handle_mm_fault create_huge_pmd",
        "33",
    ),
    (  # FALLBACK
        "MISSING WRITE SHARED_FILE NONE HUGE_OK",
        "handle_mm_fault __handle_mm_fault create_huge_pmd handle_pte_fault do_pte_missing do_fault "
        "do_shared_fault __do_fault do_page_mkwrite finish_fault",
        "13",
    ),
    (
        "MISSING READ PRIVATE_FILE NONE TRACKED",
        f"{TOP} do_pte_missing do_fault do_read_fault __do_fault finish_fault",
        "10",
    ),
    (
        "MISSING READ PRIVATE_FILE NONE CACHED TRACKED",
        f"{TOP} do_pte_missing do_fault do_read_fault do_fault_around",
        "9",
    ),
    (
        "MISSING WRITE PRIVATE_FILE NONE",
        f"{TOP} do_pte_missing do_fault do_cow_fault __do_fault finish_fault",
        "11cache",
    ),
    (
        "MINOR WRITE SHARED_FILE CACHED CACHED",
        f"{TOP} do_pte_missing do_fault do_shared_fault do_page_mkwrite finish_fault",
        "15",
    ),
    (
        "MISSING READ SNAPSHOT SNAP_PARENT",
        f"{TOP} do_pte_missing do_anonymous_page do_snapshot_page",
        "25",
    ),
    ("WP WRITE ANON WRITE_PROTECTED", f"{TOP} do_wp_page wp_page_reuse", "18"),
    ("WP WRITE ANON WRITE_PROTECTED SNAPSHOT_HELD", f"{TOP} do_wp_page wp_page_copy", "19"),
    (
        "WP WRITE ANON WRITE_PROTECTED HOOK",
        f"{TOP} do_wp_page wp_page_reuse do_page_mkwrite",
        "18hook",
    ),
    (
        "WP WRITE SHARED_FILE WRITE_PROTECTED",
        f"{TOP} do_wp_page wp_page_shared do_page_mkwrite",
        "22",
    ),
    ("MISSING READ HUGETLB NONE", "handle_mm_fault hugetlb_fault hugetlb_no_page", "34read"),
    ("WP WRITE HUGETLB WRITE_PROTECTED", "handle_mm_fault hugetlb_fault hugetlb_wp", "34reuse"),
    ("MISSING READ ANON NONE CLOSING", "handle_mm_fault", "p4"),
    ("MINOR READ ANON NONE", "handle_mm_fault", "UNREACHABLE"),
]


@pytest.mark.parametrize("words, functions, row", WALKS, ids=[w[0] for w in WALKS])
def test_walk(words: str, functions: str, row: str) -> None:
    found = walk(fault(words))
    assert explain(fault(words)) == tuple(functions.split())
    assert found.row.name == row
    assert all(level.because for level in found.levels)


def test_every_cell_has_a_walk_with_reasons() -> None:
    for cell in every_cell():
        if cell.flags & FaultFlag.HINT and cell.backing is not Backing.ANON:
            continue  # nobody else looks at it: half the time
        found = walk(cell)
        assert found.row is cell.row
        assert all(level.because for level in found.levels)
        assert (len(found.levels) == 1) is (cell.row is UNREACHABLE)


def test_watching_changes_nothing_and_ends() -> None:
    with handle.recording() as levels:
        handle.decide(FaultKind.MISSING, Access.READ, Backing.ANON, PteState.NONE, FaultFlag(0))
    seen = list(levels)
    handle.decide(FaultKind.MISSING, Access.READ, Backing.ANON, PteState.NONE, FaultFlag(0))
    assert levels == seen and len(seen) == 5


# ---- uffd-vm table -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cli_table() -> types.ModuleType:
    """uffd_vm/cli/table.py by its path: the package around it needs click."""
    path = Path(handle.__file__).parents[1] / "cli" / "table.py"
    spec = importlib.util.spec_from_file_location("cli_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cell_explained_in_words(cli_table: types.ModuleType) -> None:
    text = cli_table.explain("wp", "write", "shared-file", "write-protected", ["cached"])
    assert text.splitlines()[:9] == [
        "WP WRITE fault, SHARED_FILE region, page WRITE_PROTECTED, flags CACHED",
        "",
        "handle_mm_fault(): the message is admitted",
        "  __handle_mm_fault(): an ordinary region",
        "    handle_pte_fault(): one page",
        "      do_wp_page(): a write to a write-protected page",
        "        wp_page_shared(): a shared mapping",
        "          do_page_mkwrite(): the page is about to be written",
        "            row 22: first write to a shared page: page_mkwrite, dirty",
    ]
    assert "result   0, the executor may add RETRY|COMPLETED" in text
    assert " 1. look up the region, take its generation" in text


def test_a_file_fault_explained_ends_in_finish_fault(cli_table: types.ModuleType) -> None:
    text = cli_table.explain("missing", "read", "shared-file", "none")
    assert text.splitlines()[7:11] == [
        "          do_read_fault(): a read",
        "            __do_fault(): the folio is not cached",
        "            finish_fault(): the folio is complete",
        "            row 12: a hole of the memfd: read it into the page cache",
    ]


def test_a_page_that_is_not_present_explained_has_pte_unmap_same(
    cli_table: types.ModuleType,
) -> None:
    text = cli_table.explain("missing", "read", "anon", "poisoned")
    assert text.splitlines()[5:8] == [
        "      do_swap_page(): neither empty nor present",
        "        pte_unmap_same(): an early look, before work that may be in vain",
        "        row 31: poisoned before: still is",
    ]


def test_unknown_word_lists_the_known(cli_table: types.ModuleType) -> None:
    with pytest.raises(ValueError, match=r"PTE: 'gone' is none of none, none-wp"):
        cli_table.explain("missing", "read", "anon", "gone")
    with pytest.raises(ValueError, match=r"FLAGS: 'x' is none of tracked, "):
        cli_table.explain("missing", "read", "anon", "none", ["x"])


def test_impossible_fault_says_why(cli_table: types.ModuleType) -> None:
    text = cli_table.explain("minor", "read", "anon", "none")
    assert "handle_mm_fault(): only shared memfd mappings are registered for minor faults" in text
