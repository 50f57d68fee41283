"""Options of this process, in layers: defaults < environment < `config.set()` < the call's argument.

Every field of `Options` has an environment variable: UFFD_VM_ and the field in capitals, for example
``UFFD_VM_DEADLINE=5`` or ``UFFD_VM_READAHEAD_BYTES=4MiB``. Sizes take an int, "64KiB", "2GiB", or (where
they limit memory) "50%" of what this process may use. `None` as an argument means: not said here.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import operator
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from uffd_vm.errors import InvalidArgument

__all__ = ["Options", "config", "memory_limit", "parse_size"]

_UNITS = {"": 0, "b": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)(b?)\s*", re.IGNORECASE)
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


def parse_size(value: int | str, *, what: str = "size") -> int:
    """Bytes of `value`: an int, "4096", "64KiB" (1024), "64kB" (1000), or "50%" of `memory_limit()`.

    Raises InvalidArgument (a ValueError) for anything else, and for a negative number.
    """
    if not isinstance(value, str):
        try:
            nbytes = None if isinstance(value, bool) else operator.index(value)
        except TypeError:
            nbytes = None
        if nbytes is None:
            raise InvalidArgument(
                f"{what}: {value!r} is neither a number of bytes nor a text like '2GiB'"
            )
        if nbytes < 0:
            raise InvalidArgument(f"{what}: {nbytes} bytes is negative")
        return nbytes
    if match := _PERCENT.fullmatch(value):
        if float(match[1]) > 100:
            raise InvalidArgument(f"{what}: {value!r} is more than all the memory there is")
        return int(memory_limit() * float(match[1]) / 100)
    if match := _SIZE.fullmatch(value):
        number, unit, binary, _ = match.groups()
        return int(float(number) * (1024 if binary or not unit else 1000) ** _UNITS[unit.lower()])
    raise InvalidArgument(
        f"{what}: cannot read {value!r}; write bytes as 4096, '64KiB', '2GiB' or '50%'"
    )


def _cgroup_limits(root: Path, proc_cgroup: str) -> Iterator[int]:
    """Memory limits (bytes) of this process's cgroup and the groups above it, v2 and v1."""
    for line in proc_cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = base / path.lstrip("/")
        # In a container the path may be the host's: then only the mount's own root is there.
        for directory in (group, *group.parents):
            if not directory.is_relative_to(base):
                break
            try:
                text = (directory / name).read_text().strip()
            except OSError:
                continue
            if text.isdigit():
                yield int(text)


@functools.cache
def memory_limit() -> int:
    """Bytes this process may use: the smallest of its cgroup limits (v1, v2) and the machine's RAM."""
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        proc_cgroup = Path("/proc/self/cgroup").read_text()
    except OSError:
        return ram
    return min([ram, *_cgroup_limits(Path("/sys/fs/cgroup"), proc_cgroup)])


@dataclasses.dataclass(frozen=True)
class Options:
    """What `uv.map()` and `uv.anonymous()` use where the call does not say it; checked there."""

    service: str = "auto"
    """Who answers faults: "auto", "native", "python", "inline" or "kernel"."""
    fault_around_bytes: int = 64 << 10
    """Read and mapped around a touched page; a power of two, one page: off."""
    readahead_bytes: int = 2 << 20
    """Largest block read ahead of a sequential reader; 0: off."""
    deadline: float = 30.0
    """Seconds until a fault that its source cannot answer becomes an error."""
    on_error: str = "raise"
    """What a failed page does: "raise" an exception in the touching thread, or leave it "sigbus"."""
    cap: int | str = "50%"
    """Most bytes of memory that one page cache may hold."""


def _from_text(field: str, text: str) -> Any:
    if field == "deadline":
        try:
            return float(text)
        except ValueError:
            raise InvalidArgument(f"UFFD_VM_DEADLINE: {text!r} is no number of seconds") from None
    if field.endswith("_bytes") or field == "cap":
        return parse_size(text, what=f"UFFD_VM_{field.upper()}")
    return text


class Config:
    """The layers below the argument. One object, `uv.config`, per process."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._environ = environ
        self._set: dict[str, Any] = {}
        self._context: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar(
            "uffd_vm_config", default=None
        )

    @staticmethod
    def _checked(changes: dict[str, Any]) -> dict[str, Any]:
        known = {f.name for f in dataclasses.fields(Options)}
        if unknown := sorted(set(changes) - known):
            raise InvalidArgument(f"config: no option {unknown[0]!r}; there are {sorted(known)}")
        return changes

    def set(self, **changes: Any) -> None:
        """Sets options for the process, over the environment. `config.reset()` undoes it."""
        self._set.update(self._checked(changes))

    def reset(self) -> None:
        """Forgets every `set()`."""
        self._set.clear()

    @contextmanager
    def context(self, **changes: Any) -> Iterator[Options]:
        """Sets options inside a `with` block, for this thread or task only."""
        token = self._context.set({**(self._context.get() or {}), **self._checked(changes)})
        try:
            yield self.options()
        finally:
            self._context.reset(token)

    def options(self, **arguments: Any) -> Options:
        """All layers joined; an argument that is None is not said."""
        layers: dict[str, Any] = {}
        for field in dataclasses.fields(Options):
            text = self._environ.get(f"UFFD_VM_{field.name.upper()}")
            if text is not None:
                layers[field.name] = _from_text(field.name, text)
        layers.update(self._set)
        layers.update(self._context.get() or {})
        layers.update({k: v for k, v in arguments.items() if v is not None})
        return Options(**layers)


config = Config()
