"""`AddressSpace`: the regions and page caches of this process. The kernel's mm_struct.

Makes regions (checks arguments, chooses who serves, opens the file, maps, registers) and brings up what
they need lazily: the failure service with the first region that raises, the fault-service process with
the first that it serves; both go with the last. Owns the registry of caches and the list of live
mappings. Keeps: `nothing_outlives_the_last_region` (no thread, descriptor, mapping, child process).

One per process by default, as the native library has one region table: `address_space()`.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import mmap
import os
import resource
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uffd_vm.config import config, parse_size
from uffd_vm.errors import BudgetExceeded, InvalidArgument, SourceChanged, UffdError
from uffd_vm.fault.fault import Backing, FaultFlag
from uffd_vm.kernel import features
from uffd_vm.kernel._lib import check, ffi, lib
from uffd_vm.kernel.callbacks import at_exit, in_forked_child
from uffd_vm.mm.arguments import (
    Mode,
    OnError,
    Service,
    Settings,
    Size,
    check_budget,
    check_hook,
    check_kinds,
    check_mode,
    checked,
    choose_service,
    part_of,
    path_of,
    refuse_unexecutable,
)
from uffd_vm.mm.kernel_ops import KernelOps
from uffd_vm.mm.mapping import Mapping, refuse_populated, retry_orphans
from uffd_vm.mm.page_cache import (
    FileVersion,
    PageCache,
    PageCaches,
    lock_for_writing,
    open_file,
)
from uffd_vm.mm.region import Region, RegionSpec
from uffd_vm.mm.userfault_ops import UserfaultOps
from uffd_vm.mm.vm_ops import VmOps
from uffd_vm.page import PAGE_SIZE, round_up

if TYPE_CHECKING:
    from uffd_vm.service.failure import InlineHandlers
    from uffd_vm.service.python import PageMkwrite, RegionDescriptor

__all__ = ["AddressSpace", "address_space", "anonymous", "map"]

log = logging.getLogger("uffd_vm")

_SERVICE_KIND = {
    "native": lib.UVM_SERVICE_NATIVE,
    "python": lib.UVM_SERVICE_PYTHON,
    "inline": lib.UVM_SERVICE_INLINE,
}
#: By mode: (flags, prot) of mmap(2), of the file itself or of the memfd that is its page cache.
_MMAP = {
    "r": (mmap.MAP_SHARED, mmap.PROT_READ),
    "c": (mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE),
    "r+": (mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
}
_BACKING = {
    "r": Backing.SHARED_FILE,
    "c": Backing.PRIVATE_FILE,
    "r+": Backing.SHARED_FILE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """Which bytes of which file, and what the region is called, while it is being made."""

    fd: int
    path: str
    version: FileVersion
    offset: int
    nbytes: int
    name: str


@contextmanager
def _telling_limits(what: str) -> Iterator[None]:
    """Whichever call finds a limit of the process: what to do is the same."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EMFILE:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            cure = f"this process may have {limit} open: raise `ulimit -n`, or close regions"
        elif error.errno == errno.ENFILE:
            cure = "the machine has no more: raise /proc/sys/fs/file-max, or close regions"
        elif error.errno == errno.EFBIG:
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
            raise UffdError(
                error.errno,
                f"{what!r}: {os.strerror(error.errno)}. Its page cache is a file in memory of the same size, "
                f"and this process may make none above {limit} bytes: raise `ulimit -f`",
                "ftruncate",
            ) from error
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
        self._mappings: dict[int, weakref.ref[Mapping]] = {}  # (a WeakSet has callbacks in Python)
        self._python: dict[int, RegionDescriptor] = {}
        self._numbers = itertools.count(1)
        self._hooked = False
        # Before the first region: a thread may be inside, mapping it, while another one forks.
        in_forked_child(self._renew_lock)

    @property
    def lock(self) -> AbstractContextManager[object]:
        return self._lock

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
        mappings = [ref() for ref in self._mappings.copy().values()]
        return [m for m in mappings if m is not None and not m.closed]

    def _keep(self, mapping: Mapping) -> None:
        """Lists it, as long as it lives."""
        for address, ref in self._mappings.copy().items():
            if ref() is None:
                self._mappings.pop(address, None)
        self._mappings[id(mapping)] = weakref.ref(mapping)

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
                            "kernel": plain mmap. "auto": "kernel" for a plain local file, but "native"
                            where the call gives what plain mmap cannot do (and "kernel" refuses):
                            deadline, on_error="raise", cap, trace, track
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
        settings = checked(
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
        check_mode(mode, track=track)
        check_kinds(track, trace, name)
        check_budget(budget, _BACKING[mode], writable=mode == "r+")
        path = os.path.abspath(path_of(path))
        check_hook(page_mkwrite, mode, settings.service)
        with _telling_limits(path), ExitStack() as stack:
            fd = stack.enter_context(open_file(path, writable=mode == "r+"))
            version = FileVersion.of(fd)
            if _version is not None and (version.size, version.mtime_ns) != (
                _version.size,
                _version.mtime_ns,
            ):
                raise SourceChanged(f"{path!r} is not the version that was pickled; map it afresh")
            offset, nbytes = part_of(path, version.size, offset, length)
            file = _File(
                fd=fd,
                path=path,
                version=version,
                offset=offset,
                nbytes=nbytes,
                name=name or os.path.basename(path),
            )
            wishes = {
                "cap=": cap is not None,
                "deadline=": deadline is not None,
                "on_error='raise'": on_error == "raise",
                "trace=True": trace,
                "track=True": track,
            }
            serving, reason = choose_service(settings.service, wishes, version.device)
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
            spec = RegionSpec(path, mode, version, arguments)
            log.info("map %r mode %r: served by %s (%s)", path, mode, serving, reason)
            mapping: Mapping
            ops: VmOps
            if serving == "kernel":
                mapping, ops = self._map_plain(file, mode)
            else:
                mapping, ops = self._map_cached(file, mode, serving, settings, track, page_mkwrite)
            if mode == "r+":
                ops.home = (path, version)
            region = Region(
                mapping,
                ops,
                spec,
                name=file.name,
                service=serving,
                service_reason=reason,
                tracked=track,
            )
            if FileVersion.of(fd).size < offset + nbytes:
                region.discard()
                raise SourceChanged(
                    f"{path!r} shrank while it was mapped: it had {version.size} bytes when it was opened"
                )
            return region

    def _map_plain(self, file: _File, mode: str) -> tuple[Mapping, KernelOps]:
        flags, prot = _MMAP[mode]
        if mode == "r+":
            lock_for_writing(file.fd, file.path, shared=True)
        try:
            mapping = Mapping.of_fd(
                file.fd, file.nbytes, offset=file.offset, flags=flags, prot=prot
            )
        except ValueError:  # mmap looks at the size too
            raise SourceChanged(f"{file.path!r} shrank while it was mapped; try again") from None
        ops = KernelOps(
            file.name,
            mapping.address,
            file.nbytes,
            fd=file.fd,
            offset=file.offset,
            version=file.version,
            mode=mode,
        )
        mapping.own(ops, self)
        self._keep(mapping)
        return mapping, ops

    def _map_cached(
        self,
        file: _File,
        mode: str,
        serving: str,
        settings: Settings,
        track: bool,
        hook: PageMkwrite | None,
    ) -> tuple[Mapping, UserfaultOps]:
        private, shared_writable = mode == "c", mode == "r+"
        features.require_library("writable files" if shared_writable else "lazy files")
        features.require_library("typed errors")
        if track and private:
            features.require_library("write tracking")
        flags, prot = _MMAP[mode]
        with self._locked(), ExitStack() as undo:
            refuse_populated(file.name)
            cache = self._caches.get(
                file.fd,
                file.path,
                file.version,
                writable=shared_writable,
                sharing=_sharing(serving, track and private),
                cap=settings.cap,
                cap_is_explicit=settings.cap_is_explicit,
            )
            undo.callback(self._caches.put, cache)
            mapping = Mapping.of_fd(
                cache.data_fd, file.nbytes, offset=file.offset, flags=flags, prot=prot
            )
            undo.callback(mapping.close)
            ops = self._register(
                mapping,
                file.name,
                backing=_BACKING[mode],
                cache=cache,
                pgoff=file.offset // PAGE_SIZE,
                writable=mode != "r",
                flags=(FaultFlag.TRACKED if track or shared_writable else FaultFlag(0))
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
        what np.zeros() gives. Raises InvalidArgument, FeatureUnavailable, PermissionUnavailable, and
        BudgetExceeded (a MemoryError) where no such range of addresses is free.
        """
        size = parse_size(nbytes, what="nbytes")
        if size == 0:
            raise InvalidArgument("nbytes: 0 is not above 0")
        settings = checked(
            config.options(
                service=service,
                fault_around_bytes=fault_around_bytes,
                deadline=deadline,
                on_error=on_error,
            ),
            cap_is_explicit=False,
        )
        check_kinds(track, trace, name)
        check_budget(budget, Backing.ANON)
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
        with _telling_limits(title), self._locked(), ExitStack() as undo:
            refuse_populated(title)
            try:
                mapping = Mapping.anonymous(size)
            except (OSError, OverflowError) as error:
                raise BudgetExceeded(
                    f"nbytes: no address space for {size} bytes ({error}); ask for less, or see `ulimit -v`"
                ) from None
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
        settings: Settings,
        hook: PageMkwrite | None,
    ) -> UserfaultOps:
        """Makes the native region of a mapping, which owns it from then on. The lock is held."""
        refuse_unexecutable(backing, flags, writable=writable)
        start, nr_bytes = mapping.address, round_up(len(mapping))
        with ExitStack() as undo:
            _configure()
            raising = settings.on_error == "raise" or serving == "inline"
            if raising:  # each region by itself: our SIGBUS handler is put back if it was replaced
                from uffd_vm.service import failure

                failure.install()
                undo.callback(failure.shutdown)
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
                before_end=functools.partial(self._detach, handle) if serving == "python" else None,
                release=functools.partial(self._release, cache, raising, handle),
                request=request,
                handlers=handlers,
                user_mode_only=serving == "inline"
                or features.probe().way is features.Way.USER_MODE_ONLY,
            )
            mapping.own(ops, self)
            self._keep(mapping)
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
        at_exit(self.flush_all)
        if not self._hooked:
            self._hooked = True
            in_forked_child(self._after_fork_in_child)

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


def _drop_region(handle: int) -> None:
    lib.uvm_region_close_begin(handle)
    lib.uvm_region_close_end(handle)


def _python_request(op: str, handle: int, index: int, count: int) -> int:
    from uffd_vm.service.python import python_service

    return python_service().request(op, handle, index, count)


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
