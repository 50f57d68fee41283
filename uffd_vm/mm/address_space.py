"""`AddressSpace`: the regions and page caches of this process. The kernel's mm_struct.

Makes regions (checks arguments, chooses who serves, opens the file, maps, registers) and brings up what
they need lazily: the failure service with the first region that raises, the fault-service process with
the first that it serves; both go with the last. Owns the registry of caches and the list of live
mappings. Keeps: `nothing_outlives_the_last_region` (no thread, descriptor, mapping, child process).

One per process by default, as the native library has one region table: `address_space()`.
"""

from __future__ import annotations

import atexit
import errno
import functools
import itertools
import logging
import math
import mmap
import os
import re
import resource
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from uffd_vm.config import Options, config, parse_size
from uffd_vm.errors import FeatureUnavailable, InvalidArgument, SourceChanged, UffdError
from uffd_vm.fault.fault import Backing, FaultFlag, FaultKind
from uffd_vm.fault.pte import PteState
from uffd_vm.fault.table import reachable_states, unexecutable
from uffd_vm.kernel import features
from uffd_vm.kernel._lib import check, ffi, lib
from uffd_vm.mm.mapping import Mapping, retry_orphans
from uffd_vm.mm.page_cache import (
    FileVersion,
    PageCache,
    PageCaches,
    lock_for_writing,
    open_file,
)
from uffd_vm.mm.region import Region, RegionSpec
from uffd_vm.mm.vm_ops import KernelOps, UserfaultOps, VmOps
from uffd_vm.page import PAGE_SIZE, is_page_aligned, round_up

if TYPE_CHECKING:
    from uffd_vm.service.failure import InlineHandlers
    from uffd_vm.service.python import PageMkwrite, RegionDescriptor

__all__ = ["AddressSpace", "Mode", "OnError", "Service", "address_space", "anonymous", "map"]

log = logging.getLogger("uffd_vm")

Mode: TypeAlias = Literal["r", "c", "r+"]
Service: TypeAlias = Literal["auto", "native", "python", "inline", "kernel"]
OnError: TypeAlias = Literal["raise", "sigbus"]
Size: TypeAlias = "int | str"

_MODES = ("r", "c", "r+")
_SERVICES = ("auto", "native", "python", "inline", "kernel")
_SERVICE_KIND = {
    "native": lib.UVM_SERVICE_NATIVE,
    "python": lib.UVM_SERVICE_PYTHON,
    "inline": lib.UVM_SERVICE_INLINE,
}
_MAX_FAULT_AROUND = 2 << 20
_MAX_READAHEAD = 2 << 20
_MAX_DEADLINE = 366 * 86400.0
#: How the kernel's own mmap is made for each mode: (flags, prot).
_PLAIN = {
    "r": (mmap.MAP_SHARED, mmap.PROT_READ),
    "c": (mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE),
    "r+": (mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
}
_REMOTE = re.compile(r"(nfs\d?|cifs|smb\d?|9p|virtiofs|ceph|lustre|glusterfs|afs|fuse(\.\S*)?)$")


# --- arguments ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Settings:
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


def _checked(options: Options, *, cap_is_explicit: bool) -> _Settings:
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
    return _Settings(
        service=_one_of(options.service, _SERVICES, "service"),
        fault_around_pages=around // PAGE_SIZE,
        readahead_pages=readahead // PAGE_SIZE,
        deadline_ns=int(deadline * 1e9),
        on_error=_one_of(options.on_error, ("raise", "sigbus"), "on_error"),
        cap=cap,
        cap_is_explicit=cap_is_explicit,
    )


def _check_kinds(track: object, trace: object, name: object) -> None:
    """What says yes or no must not be said by something that only looks true; a name is for people."""
    for what, value in (("track", track), ("trace", trace)):
        if not isinstance(value, bool):
            raise InvalidArgument(f"{what}: {value!r} is neither True nor False")
    if name is not None and not isinstance(name, str):
        raise InvalidArgument(
            f"name: {name!r} is no str; it is what error messages call the region"
        )


def _path_of(path: object) -> str:
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


def _length_of(path: str, size: int, offset: int, length: int | None) -> int:
    """Bytes to map of a file of `size` bytes. Raises InvalidArgument."""
    for what, value in (("offset", offset), ("length", length)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise InvalidArgument(f"{what}: {value!r} is no int")
    if offset < 0:
        raise InvalidArgument(f"offset: {offset} is negative")
    if not is_page_aligned(offset):
        raise InvalidArgument(
            f"offset: {offset} is no multiple of the page size {PAGE_SIZE}; map from "
            f"{offset // PAGE_SIZE * PAGE_SIZE} and use array(offset=...)"
        )
    if size == 0:
        raise InvalidArgument(
            f"{path!r} is empty (or, as in /proc, has no size): there is nothing to map"
        )
    if offset >= size:
        raise InvalidArgument(f"offset: {offset} is at or past the end of {path!r} ({size} bytes)")
    if length is None:
        return size - offset
    if length <= 0:
        raise InvalidArgument(f"length: {length} is not above 0")
    if offset + length > size:
        raise InvalidArgument(
            f"length: {length} bytes from {offset} end past {path!r}, which has {size}; a region never "
            "extends a file (os.truncate() it first)"
        )
    return length


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
    """Who serves a file, and why. `wishes` are the arguments that only userfaultfd can fulfil."""
    need = [name for name, wished in wishes.items() if wished]
    if asked == "kernel":
        if need:
            raise InvalidArgument(
                f"service='kernel' cannot do {need[0]}=: the kernel's own mmap reports and limits nothing; "
                "use service='native'"
            )
        return "kernel", "asked for"
    if asked != "auto":
        return asked, "asked for"
    if need:
        return "native", f"{need[0]}= needs faults to be seen"
    filesystem = filesystem_of(device)
    if filesystem is not None and _REMOTE.match(filesystem):
        return (
            "native",
            f"the file is on {filesystem}: read-ahead, deadline and typed errors matter",
        )
    return "kernel", (
        "a plain local file: the kernel's own page cache is fastest, and coherent with other processes"
    )


# --- the address space ----------------------------------------------------------------------------


@contextmanager
def _telling_descriptors(what: str) -> Iterator[None]:
    """Whichever call finds that no descriptor is left: what to do is the same."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EMFILE:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            cure = f"this process may have {limit} open: raise `ulimit -n`, or close regions"
        elif error.errno == errno.ENFILE:
            cure = "the machine has no more: raise /proc/sys/fs/file-max, or close regions"
        else:
            raise
        call = error.call if isinstance(error, UffdError) else "open"
        raise UffdError(
            error.errno,
            f"{what!r}: {os.strerror(error.errno)}. A mapped file takes up to five descriptors, and {cure}",
            call,
        ) from error


class AddressSpace:
    """See the module. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._caches = PageCaches()
        self._mappings: weakref.WeakSet[Mapping] = weakref.WeakSet()
        self._python: dict[int, RegionDescriptor] = {}
        self._numbers = itertools.count(1)
        self._hooked = False
        # Before the first region: a thread may be inside, mapping it, while another one forks.
        os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            yield
        retry_orphans()

    def is_locked_here(self) -> bool:
        """Whether the calling thread is inside: then a collected mapping waits with its end."""
        return self._lock._is_owned()  # type: ignore[attr-defined,no-any-return]

    def regions(self) -> list[Mapping]:
        """The mappings that are not closed."""
        return [m for m in list(self._mappings) if not m.closed]

    # --- files --------------------------------------------------------------------------------------

    def map(
        self,
        path: str | os.PathLike[str],
        mode: Mode = "r",
        *,
        service: Service | None = None,
        offset: int = 0,
        length: int | None = None,
        fault_around_bytes: Size | None = None,
        readahead_bytes: Size | None = None,
        deadline: float | None = None,
        on_error: OnError | None = None,
        cap: Size | None = None,
        trace: bool = False,
        track: bool = False,
        page_mkwrite: PageMkwrite | None = None,
        budget: object = None,
        name: str | None = None,
        _version: FileVersion | None = None,
    ) -> Region:
        """Maps a file as lazy memory: pages come when they are touched.

        path                local regular file
        mode                as in np.memmap: "r" read-only; "c" changes stay private; "r+" changes are
                            written back by `flush()` and `close()`, the file locked for this process
        service             who answers faults. "native": threads of this library. "python": the
                            reference written in Python, in its own process. "inline": the touching thread.
                            "kernel": plain mmap. "auto": "kernel" where nothing below needs more
        offset, length      bytes of the file; offset page-aligned, length None: to its end
        fault_around_bytes  mapped around a touched page; a power of two, one page: off
        readahead_bytes     largest block read ahead of a sequential reader; 0: off
        deadline            seconds until a fault that the file cannot answer becomes an error
        on_error            "raise" a typed exception in the touching thread, or leave it "sigbus"
        cap                 most bytes the file's page cache may hold: 4096, "2GiB", "50%" (the default)
        trace               wants `region.trace()`
        track               wants `protect()` and `dirty()` (modes "c" and "r+")
        page_mkwrite        (offset, nr_bytes) -> "ok", "wait", "deny": asked before a clean page becomes
                            writable; mode "r+", service "python"

        Arguments not given come from `uv.config`. Raises InvalidArgument (a ValueError) for arguments,
        the OSError of open(2), RegionBusyError when another process has the file "r+", SourceChanged when
        the file changed under our hands, FeatureUnavailable or PermissionUnavailable with a cure.
        """
        settings = _checked(
            config.options(
                service=service,
                fault_around_bytes=fault_around_bytes,
                readahead_bytes=readahead_bytes,
                deadline=deadline,
                on_error=on_error,
                cap=cap,
            ),
            cap_is_explicit=cap is not None,
        )
        _one_of(mode, _MODES, "mode")
        _check_kinds(track, trace, name)
        if budget is not None:
            refuse_unexecutable(
                Backing.PRIVATE_FILE if mode == "c" else Backing.SHARED_FILE,
                FaultFlag.TRACKED,
                budget=budget,
                writable=mode == "r+",
            )
            raise FeatureUnavailable("budget=: not in this version; limit the page cache with cap=")
        file = os.path.abspath(_path_of(path))
        if track and mode == "r":
            raise InvalidArgument("track: mode 'r' has no writes to track; use mode 'c' or 'r+'")
        if page_mkwrite is not None:
            if not callable(page_mkwrite):
                raise InvalidArgument(
                    f"page_mkwrite: {page_mkwrite!r} is no function of (offset, nr_bytes)"
                )
            if mode != "r+":
                raise InvalidArgument("page_mkwrite: only mode 'r+' has writes that reach the file")
            if settings.service != "python":
                raise InvalidArgument(
                    "page_mkwrite: a Python function cannot run in the process whose thread waits for it "
                    "(it may hold the GIL); use service='python'"
                )
        with _telling_descriptors(file), ExitStack() as stack:
            fd = stack.enter_context(open_file(file, writable=mode == "r+"))
            version = FileVersion.of(fd)
            if _version is not None and (version.size, version.mtime_ns) != (
                _version.size,
                _version.mtime_ns,
            ):
                raise SourceChanged(f"{file!r} is not the version that was pickled; map it afresh")
            nbytes = _length_of(file, version.size, offset, length)
            wishes = {
                "cap": cap is not None,
                "trace": trace,
                "track": track,
                "page_mkwrite": page_mkwrite is not None,
            }
            serving, reason = choose_service(settings.service, wishes, version.device)
            title = name or os.path.basename(file)
            arguments = {
                "service": service,
                "offset": offset,
                "length": length,
                "fault_around_bytes": fault_around_bytes,
                "readahead_bytes": readahead_bytes,
                "deadline": deadline,
                "on_error": on_error,
                "cap": cap,
                "trace": trace,
                "track": track,
                "name": name,
            }
            spec = RegionSpec(file, mode, version, arguments)
            log.info("map %r mode %r: served by %s (%s)", file, mode, serving, reason)
            ops: VmOps
            if serving == "kernel":
                mapping, ops = self._map_plain(fd, title, mode, offset, nbytes, version)
            else:
                mapping, ops = self._map_cached(
                    fd,
                    file,
                    version,
                    title,
                    mode,
                    offset,
                    nbytes,
                    serving,
                    settings,
                    track,
                    page_mkwrite,
                )
            if mode == "r+":
                ops.home = (file, version)
            region = Region(
                mapping,
                ops,
                spec,
                name=title,
                service=serving,
                service_reason=reason,
                tracked=track,
            )
            if FileVersion.of(fd).size < offset + nbytes:
                region.discard()
                raise SourceChanged(
                    f"{file!r} shrank while it was mapped: it had {version.size} bytes when it was opened"
                )
            return region

    def _map_plain(
        self, fd: int, title: str, mode: str, offset: int, nbytes: int, version: FileVersion
    ) -> tuple[Mapping, KernelOps]:
        flags, prot = _PLAIN[mode]
        if mode == "r+":
            lock_for_writing(fd, title, shared=True)
        try:
            mapping = Mapping.of_fd(fd, nbytes, offset=offset, flags=flags, prot=prot)
        except ValueError:  # mmap looks at the size too
            raise SourceChanged(f"region {title!r}: the file shrank while it was mapped") from None
        ops = KernelOps(
            title,
            mapping.address,
            nbytes,
            fd=fd,
            offset=offset,
            version=version,
            mode=mode,
            release=lambda: None,
        )
        mapping.own(ops, self)
        self._mappings.add(mapping)
        return mapping, ops

    def _map_cached(
        self,
        fd: int,
        file: str,
        version: FileVersion,
        title: str,
        mode: str,
        offset: int,
        nbytes: int,
        serving: str,
        settings: _Settings,
        track: bool,
        hook: PageMkwrite | None,
    ) -> tuple[Mapping, UserfaultOps]:
        features.require_library("writable files" if mode == "r+" else "lazy files")
        features.require_library("typed errors")
        if track and mode == "c":
            features.require_library("write tracking")
        writable = mode == "r+"
        flags, prot = _PLAIN[mode]
        with self._locked(), ExitStack() as undo:
            cache = self._caches.get(
                fd,
                file,
                version,
                writable=writable,
                sharing=_sharing(serving, track and mode == "c"),
                cap=settings.cap,
                cap_is_explicit=settings.cap_is_explicit,
            )
            undo.callback(self._caches.put, cache)
            mapping = Mapping.of_fd(cache.data_fd, nbytes, offset=offset, flags=flags, prot=prot)
            undo.callback(mapping.close)
            ops = self._register(
                mapping,
                title,
                backing=Backing.PRIVATE_FILE if mode == "c" else Backing.SHARED_FILE,
                cache=cache,
                pgoff=offset // PAGE_SIZE,
                writable=mode != "r",
                flags=(FaultFlag.TRACKED if track or writable else FaultFlag(0))
                | (FaultFlag.HOOK if hook is not None else FaultFlag(0)),
                serving=serving,
                settings=settings,
                hook=hook,
            )
            undo.pop_all()
            return mapping, ops

    # --- anonymous memory ---------------------------------------------------------------------------

    def anonymous(
        self,
        nbytes: Size,
        *,
        service: Service | None = None,
        fault_around_bytes: Size | None = None,
        deadline: float | None = None,
        on_error: OnError | None = None,
        trace: bool = False,
        track: bool = False,
        budget: object = None,
        name: str | None = None,
    ) -> Region:
        """Zero-filled memory whose faults are served and seen by us. The arguments are those of `map()`.

        `nbytes` need not be a multiple of the page size. Service "kernel" is refused: plain memory is
        what np.zeros() gives. Raises InvalidArgument, FeatureUnavailable, PermissionUnavailable.
        """
        size = parse_size(nbytes, what="nbytes")
        if size == 0:
            raise InvalidArgument("nbytes: 0 is not above 0")
        settings = _checked(
            config.options(
                service=service,
                fault_around_bytes=fault_around_bytes,
                deadline=deadline,
                on_error=on_error,
            ),
            cap_is_explicit=False,
        )
        _check_kinds(track, trace, name)
        if budget is not None:
            refuse_unexecutable(Backing.ANON, FaultFlag.TRACKED, budget=budget)
            raise FeatureUnavailable("budget=: not in this version")
        if settings.service == "kernel":
            raise InvalidArgument(
                "service='kernel': anonymous memory that the kernel serves alone is np.zeros(); use 'native'"
            )
        serving, reason = settings.service, "asked for"
        if serving == "auto":
            serving, reason = "native", "anonymous memory that is to be seen or tracked"
        features.require_library("anonymous memory")
        if track:
            features.require_library("write tracking")
        title = name or f"anonymous-{next(self._numbers)}"
        with _telling_descriptors(title), self._locked(), ExitStack() as undo:
            try:
                mapping = Mapping.anonymous(size)
            except (OSError, OverflowError) as error:
                raise MemoryError(f"no address space for {size} bytes: {error}") from None
            undo.callback(mapping.close)
            ops = self._register(
                mapping,
                title,
                backing=Backing.ANON,
                cache=None,
                pgoff=0,
                writable=True,
                flags=FaultFlag.TRACKED if track else FaultFlag(0),
                serving=serving,
                settings=settings,
                hook=None,
            )
            undo.pop_all()
        log.info("anonymous %r, %d bytes: served by %s (%s)", title, size, serving, reason)
        return Region(
            mapping,
            ops,
            RegionSpec(None, "anonymous", None),
            name=title,
            service=serving,
            service_reason=reason,
            tracked=track,
        )

    # --- registration -------------------------------------------------------------------------------

    def _register(
        self,
        mapping: Mapping,
        title: str,
        *,
        backing: Backing,
        cache: PageCache | None,
        pgoff: int,
        writable: bool,
        flags: FaultFlag,
        serving: str,
        settings: _Settings,
        hook: PageMkwrite | None,
    ) -> UserfaultOps:
        """Makes the native region of a mapping, which owns it from then on. The lock is held."""
        refuse_unexecutable(backing, flags, writable=writable)
        start, nr_bytes = mapping.address, round_up(len(mapping))
        with ExitStack() as undo:
            _configure()
            raising = settings.on_error == "raise" or serving == "inline"
            if raising:
                self._failure_up()
                undo.callback(self._failure_down)
            handle = check(
                lib.uvm_region_create(
                    ffi.new(
                        "struct uvm_region_args *",
                        {
                            "start": start,
                            "len": nr_bytes,
                            "pgoff": pgoff,
                            "backing": int(backing),
                            "service": _SERVICE_KIND[serving],
                            "cache": cache.id if cache is not None else -1,
                            "writable": writable,
                            "flags": int(flags),
                            "on_error": lib.UVM_ON_ERROR_RAISE
                            if settings.on_error == "raise"
                            else lib.UVM_ON_ERROR_SIGBUS,
                            "fault_around_pages": settings.fault_around_pages,
                            "readahead_pages": settings.readahead_pages,
                            "deadline_ns": settings.deadline_ns,
                        },
                    )
                ),
                "region_create",
                name=title,
                nbytes=len(mapping),
            )
            undo.callback(_drop_region, handle)
            handlers: InlineHandlers | None = None
            if raising:
                from uffd_vm.service import failure

                failure.register_region(handle, title)
                undo.callback(failure.unregister_region, handle)
                if serving == "inline":
                    handlers = failure.InlineHandlers(title)
            request: Callable[[str, int, int, int], int] | None = None
            if serving == "python":
                from uffd_vm.service.python import RegionDescriptor

                self._attach(
                    RegionDescriptor(
                        handle=handle,
                        start=start,
                        nr_bytes=nr_bytes,
                        pgoff=pgoff,
                        backing=int(backing),
                        flags=int(flags),
                        writable=writable,
                        fault_around_pages=settings.fault_around_pages,
                        readahead_pages=settings.readahead_pages,
                        deadline_ns=settings.deadline_ns,
                        cache=cache.id if cache is not None else -1,
                        page_mkwrite=hook,
                    )
                )
                request = _python_request
            ops = UserfaultOps(
                title,
                start,
                len(mapping),
                handle=handle,
                cache=cache,
                shared=backing == Backing.SHARED_FILE,
                writable=writable,
                tracked=FaultFlag.TRACKED in flags,
                before_end=functools.partial(self._detach, handle)
                if serving == "python"
                else _nothing,
                release=functools.partial(self._release, cache, raising, handle),
                request=request,
                handlers=handlers,
                user_mode_only=serving == "inline"
                or features.probe().way is features.Way.USER_MODE_ONLY,
            )
            mapping.own(ops, self)
            self._mappings.add(mapping)
            self._hook_process()
            undo.pop_all()
            return ops

    def _release(self, cache: PageCache | None, raising: bool, handle: int) -> None:
        """After a region's end: gives back what it had brought up."""
        with self._lock:
            if cache is not None:
                self._caches.put(cache)
            if raising:
                from uffd_vm.service import failure

                failure.unregister_region(handle)
                self._failure_down()

    def _failure_up(self) -> None:
        """Each region by itself: every call puts our SIGBUS handler back if it was replaced."""
        from uffd_vm.service import failure

        failure.install()

    def _failure_down(self) -> None:
        from uffd_vm.service import failure

        failure.shutdown()

    # --- the fault-service process ------------------------------------------------------------------

    def _attach(self, descriptor: RegionDescriptor) -> None:
        from uffd_vm.service.python import python_service

        service = python_service()
        try:
            service.attach(descriptor)
        except BaseException:
            if not self._python:
                service.close()
            raise
        self._python[descriptor.handle] = descriptor

    def _detach(self, handle: int) -> None:
        from uffd_vm.service.python import running_service

        with self._lock:
            if self._python.pop(handle, None) is None:
                return
            service = running_service()  # a dead one has let go already: no other for that
            if service is not None:
                service.detach(handle)
                if not self._python:
                    service.close()

    # --- the process --------------------------------------------------------------------------------

    def _hook_process(self) -> None:
        """Registered after the services' own hooks: at exit it runs before them, in a child after."""
        atexit.unregister(self.flush_all)
        atexit.register(self.flush_all)
        if not self._hooked:
            self._hooked = True
            os.register_at_fork(after_in_child=self._after_fork_in_child)

    def flush_all(self) -> None:
        """Writes back every open "r+" region; what fails is logged. Runs at exit."""
        for mapping in self.regions():
            mapping.flush_quietly()

    def _after_fork_in_child(self) -> None:
        # The fault-service process serves the parent; native code has taken its regions over here.
        self._python.clear()
        self._caches.in_forked_child()
        for mapping in self.regions():
            mapping.in_forked_child()


def _sharing(serving: str, private: bool) -> str:
    """Which regions of one file version may have one page cache. A tracked copy keeps its content in
    private pages and needs a cache that nobody fills: a page in it would map itself, unseen. The
    fault-service process is the only one that changes the folio states of its caches."""
    if private:
        return "private"
    return "python" if serving == "python" else "native"


def _nothing() -> None:
    pass


def _drop_region(handle: int) -> None:
    lib.uvm_region_close_begin(handle)
    lib.uvm_region_close_end(handle)


def _python_request(op: str, handle: int, index: int, count: int) -> int:
    from uffd_vm.service.python import python_service

    return python_service().request(op, handle, index, count)


def refuse_unexecutable(
    backing: Backing, flags: FaultFlag, *, budget: object = None, writable: bool = True
) -> None:
    """Raises FeatureUnavailable if a fault of such a region could be decided in a way that no executor of
    this version carries out: said when the region is made, never found out at a fault."""
    reasons = _unexecutable(backing, flags, budget is not None, writable)
    if reasons:
        asked = "budget=: " if budget is not None else ""
        raise FeatureUnavailable(
            f"{asked}not in this version: {reasons[0]}"
            + (f", and {len(reasons) - 1} more" if len(reasons) > 1 else "")
            + ("; a file's page cache is limited by cap=" if budget is not None else "")
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


_configured = False


def _configure() -> None:
    global _configured
    if not _configured:
        features.configure_native()
        _configured = True


_space = AddressSpace()


def address_space() -> AddressSpace:
    """The address space of this process."""
    return _space


def map_again(spec: RegionSpec) -> Region:
    """What a pickled region becomes."""
    assert spec.path is not None
    arguments: dict[str, Any] = dict(spec.arguments)
    return _space.map(spec.path, spec.mode, _version=spec.version, **arguments)  # type: ignore[arg-type]


map = _space.map
anonymous = _space.anonymous
