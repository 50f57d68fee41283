"""What a fault is: the five inputs of the policy, the identity of one fault, and its result.

`Fault` plays the part of `struct vm_fault` (mm/memory.c, 6.12). It is frozen: what changes while a
fault is served (locks, buffers, progress) belongs to the executor, so a recorded fault can be decided
again. It names its region by id and generation and never holds the object. The numbers are shared
with C (see table.py); none may change.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from .pte import PteState

__all__ = [
    "MAIN_FLAGS",
    "PROLOGUE_FLAGS",
    "PROLOGUE_SHIFT",
    "VM_FAULT_ERROR",
    "Access",
    "Backing",
    "Fault",
    "FaultFlag",
    "FaultKind",
    "FaultResult",
    "describe",
]


class FaultKind(enum.IntEnum):
    """Why the kernel sent the message: UFFD_PAGEFAULT_FLAG_WP, _MINOR, or neither."""

    MISSING = 0
    WP = 1
    MINOR = 2


class Access(enum.IntEnum):
    """UFFD_PAGEFAULT_FLAG_WRITE. Of a missing fault it is only a hint: a page filled for a read is
    writable unless it is write-protected."""

    READ = 0
    WRITE = 1


class Backing(enum.IntEnum):
    """What is behind the region, and who copies on write."""

    ANON = 0  #: private anonymous memory
    PRIVATE_FILE = 1  #: mode "c": MAP_PRIVATE over the memfd page cache
    SHARED_FILE = 2  #: modes "r" and "r+": MAP_SHARED of the memfd page cache
    SHARED_ANON = 3  #: sharing emulated by copies in anonymous memory
    SNAPSHOT = 4  #: fork child of a snapshot: anonymous memory with a parent to copy from
    HUGETLB = 5  #: hugetlb pages, served 2 MiB at a time


class FaultFlag(enum.IntFlag):
    """The conditions of the table that are neither kind, access, backing nor page state.

    The executor finds them out before it decides; it never looks at them afterwards. The first six
    index the main table, the others the prologue (rows p1 to p7, in the order of handle.PROLOGUE).
    """

    TRACKED = 1 << 0  #: writes must be seen: dirty tracking, a snapshot, or a budget
    SNAPSHOT_HELD = 1 << 1  #: at least one snapshot still needs this page as it is now
    CACHED = 1 << 2  #: the content is at hand without I/O: folio UPTODATE or DIRTY, frame in memory
    HOOK = 1 << 3  #: a page_mkwrite hook must agree to a write (not of private files and hugetlb)
    HUGE_OK = 1 << 4  #: the aligned block around it is all NONE and the budget has room for it
    HINT = 1 << 5  #: the sampler staged this page to learn whether it is used

    EVENT = 1 << 6  #: the message is no page fault (fork, remap, remove, unmap)
    NO_REGION = 1 << 7  #: no region of ours covers the address
    PAGE_BUSY = 1 << 8  #: another handler owns the page or fills its folio (eviction has own rows)
    CLOSING = 1 << 9  #: the region is being closed
    WRITE_DENIED = 1 << 10  #: the access is a write and the region's protection lacks write
    BEYOND_SIZE = 1 << 11  #: file backings: the index is at or past the end of the backing
    DEADLINE = 1 << 12  #: this fault has been tried for longer than the region's deadline


PROLOGUE_SHIFT = 6
MAIN_FLAGS = FaultFlag(0x003F)
PROLOGUE_FLAGS = FaultFlag(0x1FC0)


class FaultResult(enum.IntFlag):
    """vm_fault_t, with the kernel's VM_FAULT_* values. 0 is success, minor."""

    OOM = 0x0001
    SIGBUS = 0x0002
    MAJOR = 0x0004
    HWPOISON = 0x0010
    HWPOISON_LARGE = 0x0020
    SIGSEGV = 0x0040
    NOPAGE = 0x0100
    LOCKED = 0x0200
    RETRY = 0x0400
    FALLBACK = 0x0800
    DONE_COW = 0x1000
    NEEDDSYNC = 0x2000
    COMPLETED = 0x4000


VM_FAULT_ERROR = (
    FaultResult.OOM
    | FaultResult.SIGBUS
    | FaultResult.SIGSEGV
    | FaultResult.HWPOISON
    | FaultResult.HWPOISON_LARGE
    | FaultResult.FALLBACK
)


def describe(flags: FaultResult | FaultFlag) -> str:
    """The one printer of both flag sets: "0", "MAJOR", "OOM|RETRY"; lowest bit first."""
    return "|".join(str(bit.name) for bit in type(flags) if bit & flags) or "0"


_NO_FLAGS = FaultFlag(0)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: what decides it, then who it is.

    The first five fields are all that a decision depends on. `version` is the page's version when
    `pte` was read; with `generation` it is what vmf_pte_changed() compares under the page-table lock.
    """

    kind: FaultKind
    access: Access
    backing: Backing
    pte: PteState
    flags: FaultFlag = _NO_FLAGS
    region: int = 0
    generation: int = 0
    pgoff: int = 0
    version: int = 0
    tid: int = 0
    deadline_ns: int = 0
    tries: int = 0
