"""Page caches: one per version of a file, shared by all regions of this process that map it.

A cache is a memfd with folio states beside it (native/); this module decides which regions share one,
and who may have a writable one. Follows struct address_space, with struct inode's i_writecount for the
lock. Owns the registry `PageCaches`. Keeps: `one_cache_per_version` (equal key, same cache, as long as a
region uses it) and `one_writer` (a writable cache exists only while its file is locked exclusively).

Facts about flock -> what we do: it belongs to the open file description, so it lives exactly as
long as the native cache's own descriptor (a dup of ours), also when this process forks: a child that
has inherited the region keeps the file locked until it closes the region or exits.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from uffd_vm.errors import InvalidArgument, RegionBusyError, SourceChanged
from uffd_vm.kernel._lib import check, ffi, lib
from uffd_vm.page import PAGE_SIZE

__all__ = ["FileVersion", "PageCache", "PageCaches", "open_file"]


@dataclass(frozen=True)
class FileVersion:
    """Which bytes: a file and the state it was in. Two equal versions have the same content, to the
    grain of mtime."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: int | str) -> FileVersion:
        st = os.stat(file)
        return cls(st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns)


@contextmanager
def open_file(path: str, *, writable: bool) -> Iterator[int]:
    """Opens a regular file, never blocking on a FIFO. The descriptor is closed on exit.

    Raises the OSError of open(2) (FileNotFoundError, PermissionError, IsADirectoryError), or
    InvalidArgument when it is something else than a regular file.
    """
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(path, flags)
    except PermissionError as error:
        if writable:
            why = "no permission to write, which mode 'r+' needs; use mode 'r' or 'c'"
            raise PermissionError(error.errno, why, path) from None
        raise
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ENXIO):  # a directory to write to; a socket
            _check_regular(path, os.stat(path).st_mode)
        raise
    try:
        _check_regular(path, os.fstat(fd).st_mode)
        yield fd
    finally:
        os.close(fd)


def _check_regular(path: str, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a directory; map a file in it", path) from None
    if not stat.S_ISREG(mode):
        raise InvalidArgument(
            f"{path!r} is no regular file ({stat.filemode(mode)}): a FIFO, socket or device has no pages "
            "to fetch again; copy it to a file first"
        ) from None


THIS_PROCESS = "this process"


def lock_for_writing(fd: int, path: str, *, shared: bool) -> None:
    """Takes the writer's lock of a file, for as long as the open file description of `fd` lives.

    Writers through the kernel's page cache (`shared`) are coherent with each other, so they share it;
    a page cache of ours excludes them and any other. Raises RegionBusyError, naming who has it.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        who = lock_holder(os.fstat(fd).st_ino)
        if who == THIS_PROCESS:
            raise RegionBusyError(
                f"{path!r} is locked by this process: by a flock() of its own, or by a region. With mode "
                "'r+' all regions of a file are of service 'kernel', or none: use the same one, or close it"
            ) from None
        raise RegionBusyError(
            f"{path!r} is locked by {who}: one process at a time maps a file with mode 'r+'. "
            "Close it there, or use mode 'r' or 'c' here (they need no lock)"
        ) from None


def lock_holder(inode: int) -> str:
    """Who holds a flock on an inode, for a message: "process 123 (python)", or "another process"."""
    try:
        locks = Path("/proc/locks").read_text()
    except OSError:
        return "another process"
    for line in locks.splitlines():
        fields = line.split()
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].endswith(f":{inode}"):
            pid = fields[4]
            if int(pid) == os.getpid():
                return THIS_PROCESS
            try:
                comm = Path(f"/proc/{pid}/comm").read_text().strip()
            except OSError:
                return f"process {pid}" if pid != "-1" else "another process"
            return f"process {pid} ({comm})"
    return "another process"


class PageCache:
    """One native page cache and how many regions of this process use it (`users`)."""

    def __init__(
        self,
        key: object,
        fd: int,
        version: FileVersion,
        cap: int,
        *,
        writable: bool,
        sharing: str = "native",
    ) -> None:
        self.key = key
        self.sharing = sharing
        self.version = version
        self.writable = writable
        self.users = 0
        self.id: int = check(
            lib.uvm_cache_create(fd, version.size, version.mtime_ns, cap, int(writable)),
            "uvm_cache_create",
        )

    @property
    def data_fd(self) -> int:
        """The memfd that regions map; stays the cache's."""
        return check(lib.uvm_cache_data_fd(self.id), "uvm_cache_data_fd")

    def limit(self, cap: int) -> None:
        """Lowers the cap to `cap` bytes: the smallest that any region asked for holds."""
        ctl = lib.uvm_cache_ctl(self.id)
        ctl.cap_pages = max(lib.UVM_MIN_CAP_PAGES, min(ctl.cap_pages, cap // PAGE_SIZE))

    @property
    def used_bytes(self) -> int:
        return int(lib.uvm_cache_ctl(self.id).nr_used) * PAGE_SIZE

    @property
    def dirty_bytes(self) -> int:
        return int(lib.uvm_cache_ctl(self.id).nr_dirty) * PAGE_SIZE

    @property
    def cap_bytes(self) -> int:
        return int(lib.uvm_cache_ctl(self.id).cap_pages) * PAGE_SIZE

    def folios(self, index: int, nr_pages: int) -> list[int]:
        """Folio words (state in the low byte) of some pages, for tests and audits."""
        return list(ffi.unpack(lib.uvm_cache_folios(self.id) + index, nr_pages))


class PageCaches:
    """The caches of one address space, by file version. Callers hold the address space's lock."""

    def __init__(self) -> None:
        self._caches: dict[object, PageCache] = {}

    def __len__(self) -> int:
        return len(self._caches)

    def get(
        self,
        fd: int,
        path: str,
        version: FileVersion,
        *,
        writable: bool,
        sharing: str,
        cap: int,
        cap_is_explicit: bool,
    ) -> PageCache:
        """The cache for a version of the file open at `fd`; the caller is one more user until `put()`.

        Regions share a cache only with those of the same `sharing`.

        Raises RegionBusyError when another process has the file "r+", and SourceChanged when this
        process has it "r+" and its size is not what was mapped then.
        """
        # Our own write-back moves the mtime of a writable file; its lock says that it is still ours.
        key = (sharing, (version.device, version.inode, "r+") if writable else version)
        cache = self._caches.get(key)
        if cache is not None and lib.uvm_cache_check(cache.id) < 0:
            # The program closed its descriptors; its regions are inaccessible. This is not one of them.
            del self._caches[key]
            cache.key = ("lost", cache.id)
            self._caches[cache.key] = cache
            cache = None
        if cache is None:
            if writable:
                lock_for_writing(fd, path, shared=False)
            if FileVersion.of(fd) != version:
                raise SourceChanged(
                    f"{path!r} changed (shrank, grew, or was written) while it was being mapped; try again"
                )
            cache = PageCache(key, fd, version, cap, writable=writable, sharing=sharing)
            self._caches[key] = cache
        elif writable and cache.version.size != version.size:
            raise SourceChanged(
                f"{path!r} had {cache.version.size} bytes when it was mapped 'r+', and has {version.size} "
                "now; close the regions that map it, then map it again"
            )
        elif cap_is_explicit:
            cache.limit(cap)
        cache.users += 1
        return cache

    def in_forked_child(self) -> None:
        """Here the caches of the parent's fault-service process are served natively: regions that a
        process of the child's own serves must not share them."""
        for key in [key for key, cache in self._caches.items() if cache.sharing == "python"]:
            cache = self._caches.pop(key)
            cache.key = ("python, forked", key)
            self._caches[cache.key] = cache

    def put(self, cache: PageCache) -> None:
        """One user less; the last one gives the cache back, and with it the file's lock."""
        cache.users -= 1
        if cache.users == 0:
            del self._caches[cache.key]
            check(lib.uvm_cache_put(cache.id), "uvm_cache_put")
