"""`uffd-vm table`, without its command line: the fault table as text, or one cell of it explained."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import TypeVar

from uffd_vm.fault.explain import walk
from uffd_vm.fault.fault import Access, Backing, Fault, FaultFlag, FaultKind
from uffd_vm.fault.pte import PteState
from uffd_vm.fault.table import golden

__all__ = ["explain", "render_table", "words"]

_E = TypeVar("_E", bound=enum.IntEnum)


def render_table() -> str:
    """The whole table as Markdown, as docs/fault-table.md has it."""
    return golden()


def explain(kind: str, access: str, backing: str, pte: str, flags: Iterable[str] = ()) -> str:
    """The walk of one decision, as text. Names in any case, with "-" or "_": "shared-file".

    Raises ValueError for a name that there is not; its text lists those that there are.
    """
    wanted = FaultFlag(0)
    for flag in flags:
        wanted |= _flag(flag)
    fault = Fault(
        _member(FaultKind, "KIND", kind),
        _member(Access, "ACCESS", access),
        _member(Backing, "BACKING", backing),
        _member(PteState, "PTE", pte),
        wanted,
    )
    return str(walk(fault))


def words() -> dict[str, list[str]]:
    """What explain() takes, by argument."""
    return {
        "KIND": [_shown(kind.name) for kind in FaultKind],
        "ACCESS": [_shown(access.name) for access in Access],
        "BACKING": [_shown(backing.name) for backing in Backing],
        "PTE": [_shown(state.name) for state in PteState],
        "FLAGS": [_shown(str(flag.name)) for flag in FaultFlag],
    }


def _member(members: type[_E], what: str, name: str) -> _E:
    for member in members:
        if member.name == _key(name):
            return member
    raise ValueError(_unknown(what, name))


def _flag(name: str) -> FaultFlag:
    for flag in FaultFlag:
        if flag.name == _key(name):
            return flag
    raise ValueError(_unknown("FLAGS", name))


def _key(name: str) -> str:
    return name.strip().upper().replace("-", "_")


def _shown(name: str) -> str:
    return name.lower().replace("_", "-")


def _unknown(what: str, name: str) -> str:
    return f"{what}: {name!r} is none of {', '.join(words()[what])}"
