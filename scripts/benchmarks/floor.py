"""The C floors: compiled on first use, loaded by ctypes which releases the GIL."""

from __future__ import annotations

import ctypes
import enum
import errno
import functools
import hashlib
import os
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "bench"
SOURCE = Path(__file__).with_name("floor.c")
CFLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread")
PAGE = 4096


CURES = {
    errno.EPERM: ": userfaultfd needs root, or sysctl vm.unprivileged_userfaultfd=1",
    errno.ENOSYS: ": no userfaultfd in this kernel, or a container forbids it",
    errno.EINVAL: ": the kernel is older than 5.19 or lacks a userfaultfd feature",
    errno.ENOMEM: ": not enough memory",
}


class CannotMeasure(Exception):
    """This machine cannot run the floors; the text says what is missing."""


class Handler(enum.IntEnum):
    """Who resolves the faults of a floor; the numbers are those of floor.c."""

    NONE = 0
    THREAD = 1
    SIGBUS = 2


def compile_floor() -> Path:
    """The shared object, named by a hash of its source and command, so that it is never stale."""
    command = [*shlex.split(os.environ.get("CC", "gcc")), *CFLAGS]
    digest = hashlib.sha256(SOURCE.read_bytes() + repr(command).encode()).hexdigest()[:16]
    target = BUILD / f"floor-{digest}.so"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        try:
            subprocess.run([*command, "-o", str(partial), str(SOURCE)], check=True)
        except FileNotFoundError as error:
            raise CannotMeasure(f"no C compiler: {command[0]} (apt install gcc)") from error
        partial.rename(target)
    return target


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded floors, every function declared."""
    c = ctypes.CDLL(str(compile_floor()), use_errno=True)
    pointer, size, number, u64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint64
    declared: dict[str, tuple[object, list[object]]] = {
        "bench_touch": (u64, [pointer, pointer, size, pointer, number]),
        "bench_scan": (u64, [pointer, size, size, ctypes.POINTER(u64)]),
        "bench_warm": (number, [size]),
        "bench_present": (ctypes.c_long, [pointer, pointer, size]),
        "floor_open": (
            pointer,
            [ctypes.POINTER(ctypes.c_char_p), size, size, size, number, ctypes.c_uint],
        ),
        "floor_base": (pointer, [pointer]),
        "floor_faults": (u64, [pointer]),
        "floor_pin": (number, [pointer, number]),
        "floor_enter": (number, [pointer]),
        "floor_leave": (number, [pointer]),
        "floor_reset": (number, [pointer]),
        "floor_fill": (None, [pointer, size, size]),
        "floor_close": (None, [pointer]),
        "plain_map": (pointer, [number, size, number]),
        "plain_unmap": (number, [pointer, size]),
    }
    for name, (result, arguments) in declared.items():
        function = getattr(c, name)
        function.restype, function.argtypes = result, arguments
    return c


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


class Toucher:
    """Touches a list of offsets and keeps what each touch took, in buffers that are warm."""

    def __init__(self, offsets: Sequence[int]) -> None:
        self.count = len(offsets)
        self._offsets = (ctypes.c_uint64 * self.count)(*offsets)
        self._latencies = (ctypes.c_uint64 * self.count)()

    def touch(self, address: int, *, write: bool = False) -> tuple[int, list[int]]:
        """The sum of the 32-bit words read, and the latencies in ns."""
        total = library().bench_touch(
            address, self._offsets, self.count, self._latencies, int(write)
        )
        return int(total), list(self._latencies)

    def present(self, address: int) -> int:
        """How many of the pages to touch are in memory already."""
        return _check(library().bench_present(address, self._offsets, self.count))


def scan(address: int, nbytes: int, step: int = PAGE) -> tuple[int, int]:
    """One read per step: the sum of the words read, and ns in all."""
    elapsed = ctypes.c_uint64()
    total = library().bench_scan(address, nbytes, step, ctypes.byref(elapsed))
    return int(total), int(elapsed.value)


def warm(nbytes: int) -> None:
    """Refill the kernel's free memory with pages that the host really backs."""
    _check(library().bench_warm(nbytes))


class Floor:
    """One C floor, `nbytes` of each file. No file is the write-protect floor: present, protected pages."""

    def __init__(
        self,
        paths: Path | Sequence[Path],
        nbytes: int,
        *,
        handler: Handler,
        block: int = PAGE,
        spin_us: int = 0,
        cpu: int | None = None,
    ) -> None:
        names = [os.fsencode(path) for path in ([paths] if isinstance(paths, Path) else paths)]
        self._handle: int | None = library().floor_open(
            (ctypes.c_char_p * len(names))(*names), len(names), nbytes, block, int(handler), spin_us
        )
        if not self._handle:
            number = ctypes.get_errno()
            raise CannotMeasure(f"C floor: {os.strerror(number)}{CURES.get(number, '')}")
        self.nbytes = nbytes * max(1, len(names))
        self.address = int(library().floor_base(self._handle))
        if cpu is not None:
            _check(library().floor_pin(self._handle, cpu))

    def __enter__(self) -> Floor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle:
            library().floor_close(handle)

    def reset(self) -> None:
        """Every page missing again, or protected again."""
        _check(library().floor_reset(self._handle))

    def fill(self, offset: int, length: int) -> None:
        """Bring in a range of whole blocks without a fault."""
        library().floor_fill(self._handle, offset, length)

    def faults(self) -> int:
        """Faults resolved since the floor was opened."""
        return int(library().floor_faults(self._handle))

    @contextmanager
    def active(self) -> Iterator[None]:
        """The signal handler of a SIGBUS floor is installed only inside; else nothing."""
        _check(library().floor_enter(self._handle))
        try:
            yield
        finally:
            _check(library().floor_leave(self._handle))


class PlainTmpfs:
    """A memfd full of data: what a second mapping costs when no userfaultfd is in the way."""

    def __init__(self, nbytes: int, content: bytes) -> None:
        self.nbytes = nbytes
        self._fd = os.memfd_create("benchmark plain", os.MFD_CLOEXEC)
        for offset in range(0, nbytes, len(content)):
            os.pwrite(self._fd, content[: nbytes - offset], offset)

    def close(self) -> None:
        os.close(self._fd)

    @contextmanager
    def mapped(self, *, private: bool) -> Iterator[int]:
        """The address of a fresh mapping."""
        address = library().plain_map(self._fd, self.nbytes, int(private))
        if not address:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        try:
            yield int(address)
        finally:
            _check(library().plain_unmap(address, self.nbytes))
