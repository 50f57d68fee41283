"""What is made of the policy: the golden print, the C source, and the refusal of what cannot be done."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import uffd_vm.fault.table as table
from uffd_vm.fault.action import Action, Counter
from uffd_vm.fault.fault import Access, Backing, FaultFlag, FaultKind
from uffd_vm.fault.handle import decide
from uffd_vm.fault.pte import LEGAL_PTE_TRANSITIONS, PteState
from uffd_vm.fault.rows import ROWS
from uffd_vm.fault.table import (
    c_source,
    cell_index,
    compile_tables,
    golden,
    main,
    reachable_states,
    unexecutable,
)

PACKAGE = Path(table.__file__).parent
ROOT = PACKAGE.parents[1]
NONE = {PteState.NONE}
NO_FLAGS = FaultFlag(0)


# ---- golden ------------------------------------------------------------------------------------------


def test_golden_print_is_fresh() -> None:
    """If this fails, read the diff: it says what changed in behaviour. Then
    `python -m uffd_vm.fault.table > docs/fault-table.md`."""
    assert (ROOT / "docs" / "fault-table.md").read_text(encoding="utf-8") == golden()


def test_golden_print_can_be_read() -> None:
    text = golden()
    lines = text.splitlines()
    assert len(lines) < 1000
    for row in ROWS:
        assert f"| {row.id} | {row.name} |" in text
    for kind, access, backing in itertools.product(FaultKind, Access, Backing):
        assert f"### {kind.name} {access.name}, {backing.name}" in lines
    assert "unreachable (row 0): CACHED SNAP_PARENT SNAP_FRAME SNAP_ZERO" in lines


def test_golden_print_says_every_cell() -> None:
    """The wildcards of the print, expanded again, are the table."""
    sections = re.split(r"^### ", golden(), flags=re.M)[1:]
    for section in sections:
        head, *lines = section.split("\n## ")[0].splitlines()
        kind, access, backing = re.match(r"(\w+) (\w+), (\w+)", head).groups()  # type: ignore[union-attr]
        printed: dict[tuple[PteState, int], str] = {}
        for line in lines:
            columns = [c.strip() for c in line.strip("|").split(" | ")]
            if not line.startswith("| ") or columns[0] == "page":
                continue
            for pte, flags in itertools.product(columns[0].split(), range(64)):
                if fits(columns[1], flags):
                    assert (PteState[pte], flags) not in printed, "said twice"
                    printed[PteState[pte], flags] = columns[2]
        for pte_state, flags in itertools.product(PteState, range(64)):
            row = decide(
                FaultKind[kind], Access[access], Backing[backing], pte_state, FaultFlag(flags)
            )
            assert printed.get((pte_state, flags), "UNREACHABLE") == row.name


def fits(condition: str, flags: int) -> bool:
    if condition == "any":
        return True
    return all(
        not flags & FaultFlag[word[1:]] if word.startswith("!") else flags & FaultFlag[word]
        for word in condition.split()
    )


# ---- compiled ----------------------------------------------------------------------------------------


def test_cell_index_is_the_documented_one() -> None:
    key = (FaultKind.WP, Access.WRITE, Backing.SNAPSHOT, PteState.ZERO_WP)
    flags = FaultFlag.HOOK | FaultFlag.DEADLINE
    assert cell_index(*key, flags) == ((((1 * 2 + 1) * 6 + 4) * 19 + 3) * 64) + 8
    assert ROWS[compile_tables().cells[cell_index(*key, flags)]].name == "18zerohook"


def test_legal_pte_is_the_set() -> None:
    legal = compile_tables().legal_pte
    assert len(legal) == 19 * 19
    for before, after in itertools.product(PteState, repeat=2):
        assert legal[before * 19 + after] == ((before, after) in LEGAL_PTE_TRANSITIONS)


def test_c_source_has_all_numbers() -> None:
    defines = dict(re.findall(r"^#define (UVM_\w+) (\S+)$", c_source(), flags=re.M))
    for name, value in {
        "UVM_KIND_MINOR": "2",
        "UVM_ACCESS_WRITE": "1",
        "UVM_BACKING_HUGETLB": "5",
        "UVM_PTE_SNAP_ZERO": "18",
        "UVM_PTE_KEEP": "255",
        "UVM_FOLIO_EVICTING": "6",
        "UVM_FLAG_DEADLINE": "0x1000u",
        "UVM_VM_FAULT_COMPLETED": "0x4000u",
        "UVM_VM_FAULT_ERROR": "0x873u",
        "UVM_ACTION_HUGETLB_FILL": "24",
        "UVM_COMMIT_MOVE": "11",
        "UVM_ERR_OTHER": "16",
        "UVM_SETTLEMENT_DENY": "10",
        "UVM_COUNTER_PGFAULT": "0",
        "UVM_NR_ACTION": "25",
        "UVM_NR_PTE": "19",
        "UVM_NR_ERR": "17",
        "UVM_NR_COUNTER": str(len(Counter)),
        "UVM_NR_ROWS": str(len(ROWS)),
        "UVM_ROW_X_OOM": str(next(r.id for r in ROWS if r.name == "X-OOM")),
        "UVM_ADMIT_PASS": "255",
    }.items():
        assert defines[name] == value
    assert "/" not in "".join(line for line in c_source().splitlines() if "#define" in line)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: apt-get install gcc")
def test_c_compiles_to_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "policy_tables.h").write_text(c_source())
    (tmp_path / "dump.c").write_text(
        '#include "policy_tables.h"\n#include "policy_tables.h"\n#include <stdio.h>\n'
        "struct row { uint8_t id, action, commit, next_pte; uint32_t result;\n"
        "  uint16_t nr_charge, number, may_add; uint8_t fallback, zero; uint64_t counters; };\n"
        '_Static_assert(sizeof(struct row) == 24, "row");\n'
        "int main(void) {\n"
        "  const struct row *r = (const void *)uvm_rows;\n"
        "  if (r[UVM_ROW_7].action != UVM_ACTION_SWAP_IN || r[UVM_ROW_7].number != 7 ||\n"
        "      r[UVM_ROW_7].result != UVM_VM_FAULT_MAJOR || r[UVM_ROW_33].nr_charge != 512)\n"
        "    return 1;\n"
        + "".join(
            f"  fwrite(uvm_{name}, 1, sizeof uvm_{name}, stdout);\n"
            for name in ("cells", "admit", "rows", "settle", "truth", "legal_pte")
        )
        + "  return 0;\n}\n"
    )
    flags = ["-Wall", "-Wextra", "-Werror", "-std=gnu11"]
    subprocess.run(["cc", *flags, "dump.c", "-o", "dump"], cwd=tmp_path, check=True, timeout=60)
    done = subprocess.run([tmp_path / "dump"], check=True, capture_output=True, timeout=60)
    t = compile_tables()
    assert done.stdout == t.cells + t.admit + t.rows + t.settle + t.truth + t.legal_pte


def test_runs_with_the_standard_library_alone(tmp_path: Path) -> None:
    """At build time there is no extension, no dependency and no installed package."""
    (tmp_path / "fault").symlink_to(PACKAGE)
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-m", "fault.table", "--c"],
        cwd=tmp_path,
        env=environ,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == c_source()


def test_main(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out == golden()
    assert main(["--c"]) == 0
    assert capsys.readouterr().out == c_source()
    assert main(["--x"]) == 2
    assert "usage" in capsys.readouterr().err


# ---- what may be made ----------------------------------------------------------------------------------

R_PLUS = (FaultKind.MISSING, FaultKind.WP, FaultKind.MINOR)
POSSIBLE = [
    # What this version makes: backing, flags that can be set, kinds registered.
    (Backing.SHARED_FILE, FaultFlag.CACHED, (FaultKind.MISSING,)),
    (Backing.SHARED_FILE, FaultFlag.CACHED | FaultFlag.TRACKED | FaultFlag.HOOK, R_PLUS),
    (Backing.PRIVATE_FILE, FaultFlag.CACHED, (FaultKind.MISSING,)),
    (
        Backing.PRIVATE_FILE,
        FaultFlag.CACHED | FaultFlag.TRACKED,
        (FaultKind.MISSING, FaultKind.WP),
    ),
    (Backing.ANON, NO_FLAGS, (FaultKind.MISSING,)),
    (Backing.ANON, FaultFlag.TRACKED | FaultFlag.HOOK, (FaultKind.MISSING, FaultKind.WP)),
]


@pytest.mark.parametrize("backing, flags, kinds", POSSIBLE)
def test_regions_of_this_version_can_be_made(
    backing: Backing, flags: FaultFlag, kinds: tuple[FaultKind, ...]
) -> None:
    states = reachable_states(backing, flags, NONE, kinds)
    assert unexecutable(backing, flags, states, kinds) == ()


def test_reachable_states_are_closed() -> None:
    kinds = (FaultKind.MISSING, FaultKind.WP)
    assert reachable_states(Backing.ANON, NO_FLAGS, NONE, (FaultKind.MISSING,)) == {
        PteState.NONE,
        PteState.ZERO,
        PteState.PRESENT,
    }
    assert reachable_states(Backing.ANON, FaultFlag.TRACKED, NONE, kinds) == {
        PteState.NONE,
        PteState.ZERO,
        PteState.PRESENT,
        PteState.WRITE_PROTECTED,
    }
    assert PteState.POISONED in reachable_states(
        Backing.ANON, NO_FLAGS, {PteState.NONE, PteState.POISONED}, kinds
    )


def test_snapshot_of_anonymous_memory_is_refused_with_the_reason() -> None:
    reasons = unexecutable(
        Backing.ANON,
        FaultFlag.TRACKED | FaultFlag.SNAPSHOT_HELD,
        {PteState.NONE, PteState.WRITE_PROTECTED},
        (FaultKind.MISSING, FaultKind.WP),
    )
    assert reasons == (
        "COW_SNAPSHOT is not implemented: a write-protect fault on a WRITE_PROTECTED page of a ANON "
        "region with SNAPSHOT_HELD needs it (row 19: a snapshot needs the page: store it first, then "
        "let the write through)",
    )


def test_swapped_pages_are_refused() -> None:
    reasons = unexecutable(
        Backing.ANON, NO_FLAGS, {PteState.SWAPPED, PteState.STAGED}, (FaultKind.MISSING,)
    )
    # The last one is what a MOVE that is refused goes on with (Settlement.SKIP).
    assert [r.split()[0] for r in reasons] == ["MOVE_BACK", "SWAP_IN", "STAGED_COPY"]


def test_an_executor_that_can_do_all_refuses_nothing() -> None:
    everything = frozenset(Action)
    for backing in Backing:
        assert not unexecutable(backing, FaultFlag(63), PteState, FaultKind, everything)
