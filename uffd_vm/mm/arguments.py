"""What a region may be asked to be: each argument checked, before anything is made.

Every check raises InvalidArgument (a ValueError) that names the argument, what was given and what is
taken, or FeatureUnavailable where the request is right and this version, or this kernel, cannot do it.
"""

from __future__ import annotations

import functools
import math
import operator
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from uffd_vm.config import Options, parse_size
from uffd_vm.errors import FeatureUnavailable, InvalidArgument
from uffd_vm.fault.fault import Backing, FaultFlag, FaultKind
from uffd_vm.fault.pte import PteState
from uffd_vm.fault.table import reachable_states, unexecutable
from uffd_vm.page import PAGE_SIZE, is_page_aligned, round_down

__all__ = [
    "Mode",
    "OnError",
    "Service",
    "Settings",
    "Size",
    "check_budget",
    "check_hook",
    "check_kinds",
    "check_mode",
    "checked",
    "choose_service",
    "part_of",
    "path_of",
    "refuse_unexecutable",
]

Mode: TypeAlias = Literal["r", "c", "r+"]
Service: TypeAlias = Literal["auto", "native", "python", "inline", "kernel"]
OnError: TypeAlias = Literal["raise", "sigbus"]
Size: TypeAlias = "int | str"

_MODES = ("r", "c", "r+")
_SERVICES = ("auto", "native", "python", "inline", "kernel")
_MAX_FAULT_AROUND = 2 << 20
_MAX_READAHEAD = 2 << 20
_MAX_DEADLINE = 366 * 86400.0
_REMOTE = re.compile(r"(nfs\d?|cifs|smb\d?|9p|virtiofs|ceph|lustre|glusterfs|afs|fuse(\.\S*)?)$")


@dataclass(frozen=True, slots=True)
class Settings:
    """Checked arguments of one region, in the units of native code."""

    service: str
    fault_around_pages: int
    readahead_pages: int
    deadline_ns: int
    on_error: str
    cap: int
    cap_is_explicit: bool


def _one_of(value: object, allowed: tuple[str, ...], what: str) -> str:
    if value not in allowed:
        raise InvalidArgument(f"{what}: {value!r} is none of {', '.join(repr(a) for a in allowed)}")
    return str(value)


def checked(options: Options, *, cap_is_explicit: bool) -> Settings:
    around = parse_size(options.fault_around_bytes, what="fault_around_bytes")
    if not PAGE_SIZE <= around <= _MAX_FAULT_AROUND or around & (around - 1):
        raise InvalidArgument(
            f"fault_around_bytes: {around} is no power of two from {PAGE_SIZE} (one page: off) to "
            f"{_MAX_FAULT_AROUND}"
        )
    readahead = parse_size(options.readahead_bytes, what="readahead_bytes")
    if readahead > _MAX_READAHEAD or not is_page_aligned(readahead):
        raise InvalidArgument(
            f"readahead_bytes: {readahead} is no multiple of {PAGE_SIZE} from 0 (off) to {_MAX_READAHEAD}"
        )
    deadline = options.deadline
    if isinstance(deadline, bool) or not isinstance(deadline, (int, float)):
        raise InvalidArgument(f"deadline: {deadline!r} is no number of seconds")
    if not 0 < deadline <= _MAX_DEADLINE or math.isnan(deadline):
        raise InvalidArgument(
            f"deadline: {deadline} seconds is not above 0 and at most {_MAX_DEADLINE:.0f}: a fault that "
            "nothing ends would hang"
        )
    cap = parse_size(options.cap, what="cap")
    if cap < PAGE_SIZE:
        raise InvalidArgument(f"cap: {cap} bytes is less than one page ({PAGE_SIZE})")
    return Settings(
        service=_one_of(options.service, _SERVICES, "service"),
        fault_around_pages=around // PAGE_SIZE,
        readahead_pages=readahead // PAGE_SIZE,
        deadline_ns=int(deadline * 1e9),
        on_error=_one_of(options.on_error, ("raise", "sigbus"), "on_error"),
        cap=cap,
        cap_is_explicit=cap_is_explicit,
    )


def check_mode(mode: object, *, track: object) -> None:
    _one_of(mode, _MODES, "mode")
    if track is True and mode == "r":
        raise InvalidArgument("track: mode 'r' has no writes to track; use mode 'c' or 'r+'")


def check_hook(hook: object, mode: str, service: str) -> None:
    """page_mkwrite=, which the fault-service process alone can call."""
    if hook is None:
        return
    if not callable(hook):
        raise InvalidArgument(f"page_mkwrite: {hook!r} is no function of (offset, nr_bytes)")
    if mode != "r+":
        raise InvalidArgument("page_mkwrite: only mode 'r+' has writes that reach the file")
    if service != "python":
        raise InvalidArgument(
            "page_mkwrite: a Python function cannot run in the process whose thread waits for it "
            "(it may hold the GIL); use service='python'"
        )


def check_budget(budget: object, backing: Backing, *, writable: bool = True) -> None:
    """budget= is decided in the table, and no executor of this version carries it out."""
    if budget is None:
        return
    refuse_unexecutable(backing, FaultFlag.TRACKED, budgeted=True, writable=writable)
    raise FeatureUnavailable("budget=: not in this version; limit a file's page cache with cap=")


def check_kinds(track: object, trace: object, name: object) -> None:
    """What says yes or no must not be said by something that only looks true; a name is for people."""
    for what, value in (("track", track), ("trace", trace)):
        if not isinstance(value, bool):
            raise InvalidArgument(f"{what}: {value!r} is neither True nor False")
    if name is not None and not isinstance(name, str):
        raise InvalidArgument(
            f"name: {name!r} is no str; it is what error messages call the region"
        )


def path_of(path: object) -> str:
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidArgument(
            f"map: {type(path).__name__} is no path; this version maps local files (a str or os.PathLike)"
        )
    name = os.fspath(path)
    if not isinstance(name, str):
        name = os.fsdecode(name)
    if not name:
        raise InvalidArgument("map: '' is no path")
    if "\0" in name:
        raise InvalidArgument(
            f"map: {name!r} is no path: it has a NUL character, which ends a path; take it out"
        )
    if re.match(r"[a-z][a-z0-9+.-]+://", name):
        raise FeatureUnavailable(
            f"map: {name!r} is a URL, and this version maps local files only; download it, or mount it"
        )
    return name


def _int(value: object, what: str) -> int:
    """Also NumPy's integers, which `.nbytes` and sums of shapes may be; not True and False."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise InvalidArgument(f"{what}: {value!r} is no int")


def part_of(path: str, size: int, offset: object, length: object) -> tuple[int, int]:
    """(offset, number of bytes) to map of a file of `size` bytes. Raises InvalidArgument."""
    offset = _int(offset, "offset")
    if offset < 0:
        raise InvalidArgument(f"offset: {offset} is negative")
    if not is_page_aligned(offset):
        raise InvalidArgument(
            f"offset: {offset} is no multiple of the page size {PAGE_SIZE}; map from "
            f"{round_down(offset)} and use array(offset=...)"
        )
    if size == 0:
        raise InvalidArgument(
            f"{path!r} is empty (or, as in /proc, has no size): there is nothing to map"
        )
    if offset >= size:
        raise InvalidArgument(f"offset: {offset} is at or past the end of {path!r} ({size} bytes)")
    if length is None:
        return offset, size - offset
    length = _int(length, "length")
    if length <= 0:
        raise InvalidArgument(f"length: {length} is not above 0")
    if offset + length > size:
        raise InvalidArgument(
            f"length: {length} bytes from {offset} end past {path!r}, which has {size}; a region never "
            "extends a file (os.truncate() it first)"
        )
    return offset, length


def filesystem_of(device: int) -> str | None:
    """Type of the mounted file system with this st_dev ("ext4"), None if it cannot be told."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace")
    except OSError:
        return None
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == wanted:
            return rest.split()[0]
    return None


def choose_service(asked: str, wishes: dict[str, bool], device: int) -> tuple[str, str]:
    """Who serves a file, and why. `wishes` are arguments of the call that only userfaultfd can fulfil:
    none is ignored, since "auto" takes "native" for it, and "kernel" refuses it."""
    need = [name for name, wished in wishes.items() if wished]
    if asked == "kernel":
        if need:
            raise InvalidArgument(
                f"service='kernel' cannot do {need[0]}: the kernel's own mmap reports nothing, limits "
                "nothing, and fails a page by SIGBUS alone; use service='native'"
            )
        return "kernel", "asked for"
    if asked != "auto":
        return asked, "asked for"
    if need:
        return "native", f"the kernel's own mmap cannot do {need[0]}"
    filesystem = filesystem_of(device)
    if filesystem is not None and _REMOTE.match(filesystem):
        return (
            "native",
            f"the file is on {filesystem}: read-ahead, deadline and typed errors matter",
        )
    return "kernel", (
        "a plain local file: the kernel's own page cache is fastest, and coherent with other processes"
    )


def refuse_unexecutable(
    backing: Backing, flags: FaultFlag, *, budgeted: bool = False, writable: bool = True
) -> None:
    """Raises FeatureUnavailable if a fault of such a region could be decided in a way that no executor of
    this version carries out: said when the region is made, never found out at a fault."""
    reasons = _unexecutable(backing, flags, budgeted, writable)
    if reasons:
        raise FeatureUnavailable(
            ("budget=: " if budgeted else "")
            + f"not in this version: {reasons[0]}"
            + (f", and {len(reasons) - 1} more" if len(reasons) > 1 else "")
            + ("; limit a file's page cache with cap=" if budgeted else "")
        )


@functools.cache
def _unexecutable(
    backing: Backing, flags: FaultFlag, budgeted: bool, writable: bool
) -> tuple[str, ...]:
    kinds = {FaultKind.MISSING}
    states = {PteState.NONE, PteState.BUSY, PteState.POISONED}
    if FaultFlag.TRACKED in flags or budgeted:
        kinds.add(FaultKind.WP)
        flags |= FaultFlag.TRACKED
        states |= {PteState.WRITE_PROTECTED, PteState.ZERO_WP}
    if backing == Backing.SHARED_FILE and writable:
        kinds.add(FaultKind.MINOR)
        states |= {PteState.CACHED, PteState.EVICTING}
    if budgeted:  # reclaim stages private pages, then swaps them
        states |= {PteState.STAGED, PteState.SWAPPED}
    if backing != Backing.ANON:
        flags |= FaultFlag.CACHED
    reachable = reachable_states(backing, flags, states, kinds)
    return unexecutable(backing, flags, reachable, kinds)
