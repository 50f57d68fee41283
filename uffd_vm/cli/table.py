"""`uffd-vm table`, without its command line: the fault table as text, or one cell of it explained."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import TypeVar

from uffd_vm.fault.explain import walk
from uffd_vm.fault.fault import Access, Backing, Fault, FaultFlag, FaultKind
from uffd_vm.fault.pte import PteState
from uffd_vm.fault.table import golden

__all__ = ["explain", "render_table"]

_E = TypeVar("_E", bound=enum.IntEnum)


def render_table() -> str:
    """The whole table as Markdown, as docs/fault-table.md has it."""
    return golden()


def explain(kind: str, access: str, backing: str, pte: str, flags: Iterable[str] = ()) -> str:
    """The walk of one decision, as text. Names in any case, "-" for "_": "missing", "shared-file".

    Raises ValueError for a name that there is not; its text lists those that there are.
    """
    wanted = FaultFlag(0)
    for flag in flags:
        wanted |= _flag(flag)
    fault = Fault(
        _member(FaultKind, "kind", kind),
        _member(Access, "access", access),
        _member(Backing, "backing", backing),
        _member(PteState, "page state", pte),
        wanted,
    )
    return str(walk(fault))


def _member(members: type[_E], what: str, name: str) -> _E:
    for member in members:
        if member.name == _key(name):
            return member
    raise ValueError(_unknown(what, name, [m.name for m in members]))


def _flag(name: str) -> FaultFlag:
    for flag in FaultFlag:
        if flag.name == _key(name):
            return flag
    raise ValueError(_unknown("flag", name, [str(f.name) for f in FaultFlag]))


def _key(name: str) -> str:
    return name.strip().upper().replace("-", "_")


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    return f"no {what} is called {name!r}; there are " + ", ".join(k.lower() for k in known)
