"""Entry of `scripts/bench`. Run as a file: the installed uffd_vm is found, not a folder's."""

from __future__ import annotations

import sys
from pathlib import Path


def _run() -> int:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from benchmarks.cli import main

    return main(sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(_run())
