"""The documents say what is true: each Python block of theirs runs, and each link leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

WITH_CODE = ["README.md", "docs/guide.md", "docs/failure.md"]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "native/*.md", "tests/*.md", "scripts/**/*.md")
    for path in ROOT.glob(pattern)
)
TIMEOUT_S = 100

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]*)(?:#([^)\s]*))?\)")

# Runs the blocks of argv[1] as one program; tracebacks name the document's own lines.
_RUN = """
import pathlib, re, sys
path, pattern = sys.argv[1:]
text = pathlib.Path(path).read_text(encoding="utf-8")
for block in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
    before = text[: block.start(1)].count("\\n")
    exec(compile("\\n" * before + block[1], path, "exec"), globals())
"""


@pytest.mark.parametrize("document", WITH_CODE)
def test_every_python_block_runs(document: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-X", "faulthandler", "-W", "error::ResourceWarning",
            "-c", _RUN, str(ROOT / document), _BLOCK.pattern,
        ],
        cwd=tmp_path,
        env={**_environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "never printed" not in done.stdout
    assert "ResourceWarning" not in done.stderr, done.stderr


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("UFFD_VM_")}


@pytest.mark.parametrize("document", WITH_CODE)
def test_there_are_blocks(document: str) -> None:
    assert _BLOCK.search((ROOT / document).read_text())


def anchors(document: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    here = ROOT / document
    text = re.sub(r"```.*?```", "", here.read_text(), flags=re.DOTALL)
    for target, anchor in _LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        there = (here.parent / target).resolve() if target else here
        assert there.exists(), f"{document}: {target}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{document}: {target}#{anchor}"
