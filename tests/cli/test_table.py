"""`uffd-vm table`: the decisions, and one of them step by step."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner, Result

from tests.support import ROOT
from uffd_vm.cli import main
from uffd_vm.fault.fault import Access, Backing, FaultFlag, FaultKind
from uffd_vm.fault.pte import PteState

NAMES = [
    str(member.name).lower().replace("_", "-")
    for words in (FaultKind, Access, Backing, PteState, FaultFlag)
    for member in words
]


def table(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["table", *arguments], env={"COLUMNS": "80"})


def test_prints_what_the_document_has() -> None:
    result = table()
    assert result.exit_code == 0
    assert result.output.strip() == (ROOT / "docs/fault-table.md").read_text().strip()


def test_explains_a_decision_in_the_kernels_order() -> None:
    result = table("--explain", "wp", "write", "anon", "write-protected", "tracked")
    assert result.exit_code == 0
    assert re.findall(r"^ *(\w+)\(\):", result.output, re.MULTILINE) == [
        "handle_mm_fault", "__handle_mm_fault", "handle_pte_fault", "do_wp_page", "wp_page_reuse",
    ]  # fmt: skip


def test_takes_names_as_the_kernel_writes_them() -> None:
    ours = table("--explain", "missing", "read", "shared-file", "none", "huge-ok")
    theirs = table("--explain", "MISSING", "READ", "SHARED_FILE", "NONE", "HUGE_OK")
    assert ours.exit_code == 0 and ours.output == theirs.output


def test_help_has_every_word_and_its_examples_run() -> None:
    text = table("--help").output
    assert set(NAMES) <= set(re.findall(r"[\w-]+", text))
    assert max(map(len, text.splitlines())) <= 80
    examples = re.findall(r"uffd-vm table (--explain .*)", text)
    assert len(examples) == 2
    for example in examples:
        assert table(*example.split()).exit_code == 0, example


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--explain missing read anon nonesuch", "PTE: 'nonesuch' is none of none, none-wp,"),
        ("--explain fault read anon none", "KIND: 'fault' is none of missing, wp, minor"),
        ("--explain missing read file none", "BACKING: 'file' is none of anon, private-file"),
        ("--explain missing read anon none tarcked", "FLAGS: 'tarcked' is none of tracked"),
        ("--explain missing read", "requires 4 arguments"),
        ("missing read anon none", "words are for --explain KIND ACCESS BACKING PTE"),
    ],
)
def test_a_wrong_word_is_answered_with_the_right_ones(arguments: str, says: str) -> None:
    result = table(*arguments.split())
    assert result.exit_code == 2
    assert says in result.output
