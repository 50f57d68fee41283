"""Each example runs as a user would run it, and walks the functions of mm/memory.c that it is about."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from uffd_vm.kernel.features import Feature

ROOT = Path(__file__).resolve().parents[2]
ENTRY = ("handle_mm_fault", "__handle_mm_fault", "handle_pte_fault")
ANON = (*ENTRY, "do_pte_missing", "do_anonymous_page")
READ = (*ENTRY, "do_pte_missing", "do_fault", "do_read_fault", "__do_fault")
COW = (*ENTRY, "do_pte_missing", "do_fault", "do_cow_fault", "__do_fault")
REUSE = (*ENTRY, "do_wp_page", "wp_page_reuse")

#: What each fault of the example walked through, in order; and how it ended.
EXAMPLES = {
    "01_zero_page": [(ANON, "0"), (ANON, "0")],
    "02_file_read": [((*READ, "finish_fault"), "MAJOR")],
    "03_copy_on_write": [((*COW, "finish_fault"), "MAJOR")],
    "04_write_protect": [(ANON, "0"), (REUSE, "0"), (REUSE, "0")],
    "05_retry": [(READ, "RETRY"), ((*READ, "finish_fault"), "MAJOR")],
    "06_typed_failure": [((*READ, "finish_fault"), "MAJOR"), (READ, "SIGBUS")],
}
SAYS = {
    "01_zero_page": ["page 1 reads as 7 and 0", "NONE -> ZERO", "NONE -> PRESENT"],
    "02_file_read": ["page 41 holds 41", "16 pages"],
    "03_copy_on_write": [
        "NONE -> CACHED",
        "4096 bytes are private to this process",
        "the file says   b'from the file'",
    ],
    "04_write_protect": ["NONE -> WRITE_PROTECTED", "WRITE_PROTECTED -> PRESENT"],
    "05_retry": ["page 0 says b'cold'", "NONE -> PRESENT [MAJOR]"],
    "06_typed_failure": ["SourceChanged: ", "NONE -> POISONED [SIGBUS]"],
}
_RECORD = re.compile(r"#\d+ page .* \[(?P<result>\S+)\] .*: (?P<steps>handle_mm_fault.*)$")


@pytest.mark.requires(Feature.MISSING_SHMEM, Feature.POISON)
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_walks_as_the_kernel_does(name: str) -> None:
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    run = subprocess.run(
        [sys.executable, "-X", "faulthandler", ROOT / "examples" / f"{name}.py"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    for said in SAYS[name]:
        assert said in run.stdout
    records = [m for line in run.stdout.splitlines() if (m := _RECORD.search(line))]
    walked = [(tuple(m["steps"].split(" > ")), m["result"]) for m in records]
    if name == "05_retry" and walked == EXAMPLES[name][1:]:
        pytest.skip(
            "this file system keeps a file cached that it is told to drop; use another TMPDIR"
        )
    assert walked == EXAMPLES[name]


def test_every_numbered_example_is_here() -> None:
    here = {path.stem for path in (ROOT / "examples").glob("0[1-6]_*.py")}
    assert here == set(EXAMPLES)
