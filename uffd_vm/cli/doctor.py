"""`uffd-vm doctor`: what works on this machine, what is missing, and what to type against it."""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import platform
import sys
import sysconfig
import textwrap
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from uffd_vm.errors import UffdVmError
from uffd_vm.kernel import features
from uffd_vm.kernel._lib import ffi
from uffd_vm.kernel.features import (
    KERNELS,
    LIBRARY_FEATURES,
    PAGEMAP_SCAN_KERNEL,
    Feature,
    LibraryFeature,
    Probe,
    Way,
    kernel_features,
)
from uffd_vm.kernel.uffd import RegisterMode, Uffd
from uffd_vm.page import PAGE_SIZE

__all__ = ["FeatureRow", "Report", "as_json", "examine", "show"]

WORKS, FALLBACK, REFUSED = "yes", "fallback", "refused"


@dataclass(frozen=True)
class FeatureRow:
    """One part of the library, here and on the kernels that distributions ship."""

    name: str
    here: str
    kernels: dict[str, str]
    without: str
    """What happens where it does not work."""


@dataclass(frozen=True)
class Report:
    release: str
    python: str
    mode: str | None
    """How userfaultfd is opened: "syscall", "/dev/userfaultfd", "user mode only"; None: not at all."""
    degraded: bool
    self_test: str
    """"ok", or why a first page could not be filled."""
    kernel_features: list[str]
    kernel_lacks: list[str]
    masked: list[str]
    library: list[FeatureRow]
    problems: list[features.Cure]
    notes: list[str]

    @property
    def exit_code(self) -> int:
        if self.mode is None or self.self_test != "ok":
            return 2
        refused = any(row.here == REFUSED for row in self.library)
        return 1 if self.degraded or refused else 0


def _status(feature: LibraryFeature, available: Feature, pagemap_scan: bool) -> str:
    if feature.works(available, pagemap_scan):
        return WORKS
    return FALLBACK if feature.fallback is not None else REFUSED


def _row(feature: LibraryFeature, found: Probe) -> FeatureRow:
    return FeatureRow(
        name=feature.name,
        here=_status(feature, found.features, found.pagemap_scan) if found.usable else REFUSED,
        kernels={
            f"{major}.{minor}": _status(
                feature,
                kernel_features((major, minor)),
                (major, minor) >= PAGEMAP_SCAN_KERNEL,
            )
            for major, minor in KERNELS
        },
        without=feature.fallback or feature.refusal,
    )


def _self_test() -> str:
    """Fills one page and reads it back, without a fault."""
    source = ffi.new("char[]", b"\x5a" * PAGE_SIZE)
    with mmap.mmap(-1, PAGE_SIZE) as memory:
        addr = int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))
        try:
            with Uffd.open() as uffd:
                uffd.register(addr, PAGE_SIZE, RegisterMode.MISSING)
                commit = uffd.copy(addr, int(ffi.cast("uintptr_t", source)), PAGE_SIZE)
        except (UffdVmError, OSError) as error:
            return str(error)
        if commit.err:
            return f"UFFDIO_COPY: {os.strerror(commit.err)}"
        return "ok" if memory[0] == 0x5A else "the page that was filled reads differently"


def _notes() -> list[str]:
    notes = []
    version = sys.version_info
    if not (3, 10) <= version[:2] <= (3, 13):
        notes.append(f"Python {platform.python_version()} is untested; 3.10 to 3.13 are tested")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        notes.append(
            "this is a free-threaded Python: a thread that waits in a page fault stops the garbage "
            'collector for all threads; do not use service="python" in the same process'
        )
    if version >= (3, 12):
        notes.append(
            "os.fork() warns (DeprecationWarning) once a lazy region exists, since that starts threads; "
            "forked children do serve themselves"
        )
    try:
        count = int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        count = 65530
    if count < 65530:
        notes.append(
            f"vm.max_map_count is {count}: programs with many regions or placeholders may pass it; "
            "sudo sysctl vm.max_map_count=65530"
        )
    return notes


def examine() -> Report:
    """Looks at this machine and process. Raises nothing for what is missing: that is the report."""
    found = features.probe()
    names = [f.name or "" for f in Feature if f & found.features]
    if found.pagemap_scan:
        names.append("PAGEMAP_SCAN")
    lacks = [name for name in (*Feature.__members__, "PAGEMAP_SCAN") if name not in names]
    return Report(
        release=found.release,
        python=platform.python_version(),
        mode=found.way.value if found.way else None,
        degraded=found.way is Way.USER_MODE_ONLY,
        self_test=_self_test() if found.usable else "not tried",
        kernel_features=names,
        kernel_lacks=lacks if found.usable else [],
        masked=sorted(found.masked),
        library=[_row(feature, found) for feature in LIBRARY_FEATURES],
        problems=features.cures(found),
        notes=_notes(),
    )


def as_json(report: Report) -> str:
    return json.dumps({**dataclasses.asdict(report), "exit_code": report.exit_code}, indent=2)


def show(report: Report, console: Console | None = None) -> None:
    """Prints the report for people. Made for 80 columns."""
    console = console or Console(highlight=False)
    out = console.print

    def item(text: str, indent: int, style: str = "") -> None:
        lines = textwrap.wrap(text, console.width - indent)
        out(textwrap.indent("\n".join(lines), " " * indent), style=style, markup=False)

    out(f"Linux        {report.release}")
    out(f"Python       {report.python}")
    out(f"userfaultfd  {report.mode or '[bold red]not available[/]'}")
    if report.degraded:
        item("degraded: system calls on missing pages fail with EFAULT", 13, "yellow")
    out(f"self-test    {report.self_test}")
    if report.masked:
        out("masked       by UFFD_VM_MASK_FEATURES:")
        item(", ".join(report.masked), 13, "yellow")
    if report.kernel_lacks:
        out("lacking      of what newer kernels have:")
        item(", ".join(report.kernel_lacks), 13)

    if report.problems:
        aim = "For full userfaultfd" if report.degraded else "What to do"
        out(f"\n[bold]{aim}[/], any one of these:")
        for cure in report.problems:
            item(cure.problem, 2)
            for command in cure.commands:
                out(f"      [bold]{command}[/]", soft_wrap=True)

    style = {WORKS: "green", FALLBACK: "yellow", REFUSED: "red"}
    out("\n[bold]What the library can do[/], here and on other kernels:")
    table = Table(box=None, pad_edge=False)
    table.add_column("feature", no_wrap=True)
    table.add_column("here")
    for kernel in report.library[0].kernels:
        table.add_column(kernel)
    without: dict[str, list[str]] = {}
    for row in report.library:
        cells = (row.here, *row.kernels.values())
        table.add_row(row.name, *(f"[{style[cell]}]{cell}[/]" for cell in cells))
        if set(cells) != {WORKS}:
            without.setdefault(row.without, []).append(row.name.partition(":")[0])
    out(table)
    if without:
        out("where one does not work:")
        for instead, names in without.items():
            item(f"{', '.join(names)}: {instead}", 2)
    for note in report.notes:
        out(f"note: {note}")
    verdict = {
        0: "[green]All is there.[/]",
        1: "[yellow]Usable, with the limits above.[/]",
        2: "[red]userfaultfd cannot be used: see what to do above.[/]",
    }
    out(f"\n{verdict[report.exit_code]}")
