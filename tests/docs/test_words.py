"""What a reader looks up is there: docs/design.md has each word that traces and `uffd-vm table` print."""

from __future__ import annotations

import builtins
import re

import pytest

import uffd_vm as uv
from tests.support import ROOT
from uffd_vm import errors
from uffd_vm.fault.fault import PROLOGUE_FLAGS, FaultFlag
from uffd_vm.fault.handle import PROLOGUE
from uffd_vm.fault.pte import PteState

DESIGN = (ROOT / "docs/design.md").read_text(encoding="utf-8")
#: First cells of all tables.
CELLS = [
    re.findall(r"[A-Z_]{3,}", row) for row in re.findall(r"^\| ([^|]*) \|", DESIGN, re.MULTILINE)
]


@pytest.mark.parametrize("word", [*PteState.__members__, *FaultFlag.__members__])
def test_every_state_and_flag_is_explained(word: str) -> None:
    assert any(word.removesuffix("_WP") in cell for cell in CELLS)


def test_the_prologue_is_in_its_order() -> None:
    order = [flag.name for flag, _ in PROLOGUE]
    assert order in CELLS
    assert len(order) == PROLOGUE_FLAGS.bit_count()


def test_every_exception_is_in_the_guide_with_its_bases() -> None:
    guide = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\w, ]+) \|", guide, re.MULTILINE)
    classes = {name for name in errors.__all__ if name not in ("UffdVmError", "FailureDetails")}
    assert {name for name, _ in rows} == classes
    for name, bases in rows:
        for base in bases.split(", "):
            other = getattr(uv, base, None) or getattr(builtins, base)
            assert issubclass(getattr(uv, name), other), (name, base)


def test_every_call_of_a_region_is_in_the_guide() -> None:
    guide = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
    calls = {name for name in dir(uv.Region) if not name.startswith("_")} - {"generation", "handle"}
    assert {name for name in calls if not re.search(rf"\b{name}\b", guide)} == set()
