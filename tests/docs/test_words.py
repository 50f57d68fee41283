"""What a reader looks up is there: docs/design.md has each word that traces and `uffd-vm table` print."""

from __future__ import annotations

import re

import pytest

from tests.support import ROOT
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
