"""What an executor can do: the closed sets of actions, commits, settlements and counters.

An action is everything before the commit (get a buffer, charge, read, ask a hook); a commit is the one
ioctl under the page-table lock that makes it true; a settlement is what follows from how the ioctl, or
the work before it, ended. Executors have one function for each member and index the tables; they
never branch on kind, backing or state. The numbers are shared with C (see table.py): append only.
"""

from __future__ import annotations

import enum

__all__ = [
    "AMOUNTS",
    "EXECUTABLE",
    "Action",
    "Commit",
    "Counter",
    "ErrnoClass",
    "Settlement",
    "Truth",
]


class Action(enum.IntEnum):
    """Prepares a commit; all of it may sleep, so no lock of ours is held."""

    WAKE = 0  #: nothing: the woken thread runs the instruction again
    READ_EVENT = 1  #: handle a message that is no fault
    UNREGISTER_STRAY = 2  #: unregister a range that is not a region any more
    JOIN = 3  #: wait for the handler that owns the page, then start again from the top
    POISON = 4  #: take a write-protect marker away first: UFFDIO_POISON refuses one with EEXIST
    DENY_WRITE = 5  #: nothing is granted; the protection kills the writer
    SCAN = 6  #: PAGEMAP_SCAN the page, then settle_truth()
    ZERO_FILL = 7  #: a zero buffer, or none for ZEROPAGE
    MOVE_BACK = 8  #: take the staged page off the inactive list
    STAGED_COPY = 9  #: read the staged page, free it after the commit
    SWAP_IN = 10  #: read the swap slot
    MAP_CACHED = 11  #: the folio that is cached, and its cached neighbours (fault-around)
    READ_FOLIO = 12  #: start the read and answer RETRY; commit on completion
    COW_FOLIO = 13  #: as READ_FOLIO if not cached; a private copy, charged before the read
    MKWRITE_FOLIO = 14  #: as READ_FOLIO if not cached; page_mkwrite hook; mark dirty
    REUSE = 15  #: keep the page: log it dirty, detach it from what shared it
    COW_SNAPSHOT = 16  #: store the page for the snapshots that hold it, then detach it
    MKWRITE = 17  #: page_mkwrite hook; mark dirty
    CANCEL_EVICT = 18  #: take the page from the evictor, which will notice; log it dirty
    UNPROTECT_AGAIN = 19  #: nothing: un-write-protecting twice is harmless
    SNAP_COPY = 20  #: copy the parent's page under the parent's lock
    SNAP_FRAME = 21  #: get the snapshot's frame
    SNAP_COW = 22  #: the snapshot's content from where it is; detach the index
    FILL_BLOCK = 23  #: the content of a whole 2 MiB block
    HUGETLB_FILL = 24  #: a 2 MiB buffer for one hugetlb page


#: What the executors of this version implement; see table.unexecutable().
EXECUTABLE: frozenset[Action] = frozenset(
    {
        Action.WAKE,
        Action.READ_EVENT,
        Action.UNREGISTER_STRAY,
        Action.JOIN,
        Action.POISON,
        Action.DENY_WRITE,
        Action.SCAN,
        Action.ZERO_FILL,
        Action.MAP_CACHED,
        Action.READ_FOLIO,
        Action.COW_FOLIO,
        Action.MKWRITE_FOLIO,
        Action.REUSE,
        Action.MKWRITE,
        Action.CANCEL_EVICT,
        Action.UNPROTECT_AGAIN,
    }
)


class Commit(enum.IntEnum):
    """The ioctl that makes a decision true. Followed by a wake where it does not wake by itself."""

    NONE = 0
    WAKE = 1
    ZEROPAGE = 2
    COPY = 3
    COPY_WP = 4
    COPY_CACHE = 5  #: COPY into the page cache by the shared alias, then WAKE the faulter
    COPY_CACHE_WP = 6
    CONTINUE = 7
    CONTINUE_WP = 8
    UNPROTECT = 9
    POISON = 10
    MOVE = 11
    COPY_BLOCK = 12  #: COPY of a whole block that may always fall back to single pages
    COPY_BLOCK_WP = 13


class ErrnoClass(enum.IntEnum):
    """How an action or a commit ended. The last six come from the action, not from the ioctl."""

    OK = 0
    EEXIST = 1
    ENOENT = 2
    PARTIAL = 3  #: EAGAIN with bytes done
    CHANGING = 4  #: EAGAIN with nothing done: an unread event, or the layout is changing
    ESRCH = 5
    EFAULT = 6
    ENOMEM = 7
    EBUSY = 8
    EINVAL = 9
    EIO = 10  #: the backing, the swap area or the snapshot's store failed
    TIMEDOUT = 11
    DENIED = 12  #: the page_mkwrite hook said no
    RACE = 13  #: vmf_pte_changed(): generation or page version is not what was read
    CHARGE = 14  #: the budget refused
    TRUNCATED = 15  #: the backing ends before this index
    OTHER = 16


class Settlement(enum.IntEnum):
    """What to do about how it ended."""

    DONE = 0  #: publish the next state; charge and result stand
    RETRY = 1  #: drop everything, start again from the top with TRIED
    ADVANCE = 2  #: settle the pages that are done, commit the rest
    VERIFY = 3  #: WAKE, PAGEMAP_SCAN, then settle_truth()
    ORDER0 = 4  #: decide each page alone, with HUGE_OK cleared; for one page alone this is DROP
    POISON = 5  #: free, uncharge, poison the page
    DROP = 6  #: free, uncharge, WAKE
    DETACH = 7  #: free, uncharge; the address space is gone and nobody waits
    RECLAIM = 8  #: reclaim: progress is RETRY; none is the action of the settlement's row
    SKIP = 9  #: the row's fallback row instead (a fault), the next victim (reclaim)
    DENY = 10  #: free, uncharge; mprotect so that the access fails, WAKE: never park


class Truth(enum.IntEnum):
    """What PAGEMAP_SCAN says of one page."""

    ABSENT = 0
    MARKER = 1  #: a write-protect marker on a hole
    PRESENT = 2
    PRESENT_WP = 3
    POISONED = 4
    GUARDED = 5


class Counter(enum.IntEnum):
    """Counters by their bit; /proc/vmstat's names where it has one.

    A row counts its own by one each. pgfault and the three that it is the sum of are counted by
    mm_account_fault() alone, and the AMOUNTS by whoever knows the amount.
    """

    pgfault = 0
    pgmajfault = 1
    pgminfault = 2
    pgfault_failed = 3
    zero_fill = 4
    anon_alloc = 5
    wp_grant = 6
    pg_activate = 7
    refault = 8
    pswpin = 9
    pswpout = 10
    workingset_refault = 11
    io_error = 12
    map_around = 13
    cow = 14
    mkwrite = 15
    dirtied = 16
    pgreuse = 17
    cow_reuse = 18
    evict_cancel = 19
    spurious = 20
    snap_copy = 21
    duplicate = 22
    lost_page = 23
    poison_hit = 24
    thp_alloc = 25
    thp_fallback = 26
    numa_hint = 27
    oom = 28
    race_lost = 29
    stray = 30
    timeout = 31
    joined = 32
    deny = 33
    bytes_read = 34
    pgsteal = 35
    pgscan = 36
    readahead = 37
    writeback = 38
    bytes_written = 39
    reclaim = 40
    throttled = 41
    bug = 42


#: Counted in pages or bytes by the executor, so never part of a row.
AMOUNTS: frozenset[Counter] = frozenset(
    {
        Counter.map_around,
        Counter.bytes_read,
        Counter.bytes_written,
        Counter.pgsteal,
        Counter.pgscan,
        Counter.pswpout,
        Counter.readahead,
        Counter.writeback,
        Counter.reclaim,
        Counter.throttled,
    }
)
