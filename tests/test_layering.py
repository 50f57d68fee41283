"""Imports point down only. The folder list is the architecture; this keeps it true."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "uffd_vm"

LAYERS = [
    {"page", "errors"},
    {"fault"},
    {"config", "stats"},
    {"kernel", "source"},
    {"mm"},
    {"service"},
    {"array", "state"},
    {"cli", "testing"},
    {"__init__", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Calls that go up, made late, inside a function. Each is a door that a user comes in by.
LATE = {
    ("mm", "service"): "a region starts the service that serves it",
    ("mm", "array"): "region.array()",
    ("mm", "state"): "region.snapshot()",
    ("stats", "mm"): "ranges of a Residency are written as those of a region",
}


def imports(tree: ast.AST, late: bool = False) -> Iterator[tuple[str, bool]]:
    """Modules imported, and whether inside a function. Those for the type checker only are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from imports(other, late)
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, late
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "uffd_vm":
                for alias in node.names:
                    yield f"uffd_vm.{alias.name}", late
            else:
                yield node.module, late
        elif isinstance(node, ast.ImportFrom):  # `from .x import y`: of the same package
            assert node.level == 1, f"line {node.lineno}: relative import of another package"
        yield from imports(node, late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    importer = part_of(path)
    assert importer in LEVEL, f"{importer}: give it a layer in {Path(__file__).name}"
    for module, late in imports(ast.parse(path.read_text())):
        parts = module.split(".")
        if parts[0] != "uffd_vm" or len(parts) == 1 or parts[1] == importer:
            continue
        imported = parts[1]
        if imported not in LEVEL:  # the extension, or a name of uffd_vm/__init__.py
            continue
        if late and (importer, imported) in LATE:
            continue
        assert LEVEL[imported] < LEVEL[importer], (
            f"{importer} imports {module}: that is not below it"
        )


def test_only_kernel_lib_imports_the_extension():
    importers = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        for module, _ in imports(ast.parse(path.read_text()))
        if module.startswith("uffd_vm._native")
    }
    assert importers == {"kernel/_lib.py"}


def test_policy_is_pure():
    """uffd_vm/fault/ is loaded by the build, before the extension exists."""
    for path in (PACKAGE / "fault").glob("*.py"):
        for module, _ in imports(ast.parse(path.read_text())):
            if module.split(".")[0] == "uffd_vm":
                assert module.split(".")[1] in {"fault", "page"}, f"{path.name} imports {module}"
            assert module.split(".")[0] not in {"numpy", "cffi", "os", "ctypes"}, path.name
