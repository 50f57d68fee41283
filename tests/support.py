"""What tests share: raw memory of every kind, threads that touch it, children that may hang.

A test that touches lazy memory in this process does it through `Touch` or `ctypes.memmove`, which give up
the GIL; anything else that may hang goes through `run_in_child`, or `run_program` where it is a text.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import faulthandler
import importlib.util
import mmap
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uffd_vm.kernel.features import Feature
from uffd_vm.page import PAGE_SIZE

ROOT = Path(__file__).resolve().parent.parent
HUGE_PAGE_SIZE = 2 << 20

MAP_HUGETLB = 0x40000
MAP_NORESERVE = 0x4000
MREMAP_MAYMOVE = 1
MREMAP_FIXED = 2
MADV_NORMAL = 0
MADV_DONTNEED = 4
MADV_DONTFORK = 10
MADV_NOHUGEPAGE = 15
MADV_PAGEOUT = 21
MADV_POPULATE_READ = 22
MADV_POPULATE_WRITE = 23
MADV_COLLAPSE = 25
MADV_GUARD_INSTALL = 102
MADV_GUARD_REMOVE = 103
SWAP_FLAG_FIRST = 0x8000 | 0x7FFF  # SWAP_FLAG_PREFER, and the highest priority
FALLOC_PUNCH_HOLE = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_void_p,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
_libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
_libc.write.restype = ctypes.c_ssize_t
_libc.read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
_libc.read.restype = ctypes.c_ssize_t
_libc.swapon.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.swapoff.argtypes = [ctypes.c_char_p]
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]


def call(name: str, *args: Any) -> int:
    """A libc call, without the GIL: its result, or -errno."""
    ctypes.set_errno(0)
    rc = getattr(_libc, name)(*args)
    if rc is None:  # a NULL pointer
        return 0
    if rc == -1 or rc == 2**64 - 1:
        return -ctypes.get_errno()
    return int(rc)


def must(name: str, *args: Any) -> int:
    rc = call(name, *args)
    if -4096 < rc < 0:
        raise OSError(-rc, f"{name}: {os.strerror(-rc)}")
    return rc


# --- memory


@dataclass
class Area:
    """Raw memory, `nr_pages` pages of `page` bytes at `addr`; `fd` is its memfd, -1 if anonymous."""

    kind: str
    addr: int
    nr_pages: int
    page: int
    fd: int
    flags: int

    @property
    def nr_bytes(self) -> int:
        return self.nr_pages * self.page

    def at(self, index: int) -> int:
        """Address of a page."""
        return self.addr + index * self.page

    def view(self, index: int = 0) -> ctypes.Array[ctypes.c_ubyte]:
        """The bytes from page `index` on. Subscripts hold the GIL: for pages that are present."""
        size = self.nr_bytes - index * self.page
        return (ctypes.c_ubyte * size).from_address(self.at(index))

    def get(self, index: int) -> int:
        return self.view(index)[0]

    def set(self, index: int, value: int) -> None:
        self.view(index)[0] = value

    def madvise(self, index: int, nr_pages: int, advice: int) -> int:
        return call("madvise", self.at(index), nr_pages * self.page, advice)

    def punch(self, index: int, nr_pages: int) -> None:
        must("fallocate", self.fd, FALLOC_PUNCH_HOLE, index * self.page, nr_pages * self.page)

    def unmap(self) -> None:
        if self.nr_pages:
            must("munmap", self.addr, self.nr_bytes)
            self.nr_pages = 0


KINDS = ("anon", "shmem", "shmem_private", "hugetlb")
KIND_FEATURES = {
    "anon": Feature(0),
    "shmem": Feature.MISSING_SHMEM,
    "shmem_private": Feature.MISSING_SHMEM,
    "hugetlb": Feature.MISSING_HUGETLBFS,
}


def map_area(
    kind: str = "anon",
    nr_pages: int = 4,
    *,
    fd: int = -1,
    prot: int = mmap.PROT_READ | mmap.PROT_WRITE,
) -> Area:
    """Maps fresh memory; with `fd` (a memfd) another mapping of that one. The caller unmaps it."""
    page = HUGE_PAGE_SIZE if kind == "hugetlb" else PAGE_SIZE
    flags = mmap.MAP_SHARED if kind == "shmem" else mmap.MAP_PRIVATE
    if kind == "anon":
        flags |= mmap.MAP_ANONYMOUS | MAP_NORESERVE
    elif kind == "hugetlb":
        flags |= mmap.MAP_ANONYMOUS | MAP_HUGETLB
    elif fd < 0:
        fd = os.memfd_create(f"test-{kind}")
        os.ftruncate(fd, nr_pages * page)
    addr = must("mmap", None, nr_pages * page, prot, flags, fd, 0)
    area = Area(kind, addr, nr_pages, page, fd, flags)
    if kind == "anon":
        area.madvise(0, nr_pages, MADV_NOHUGEPAGE)
    return area


class Pages:
    """Resident bytes to copy from: page i is filled with the byte i + 1."""

    def __init__(self, nr_pages: int, page: int = PAGE_SIZE) -> None:
        self._map = mmap.mmap(-1, nr_pages * page)
        for i in range(nr_pages):
            self._map[i * page : (i + 1) * page] = bytes([(i + 1) & 0xFF]) * page
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self.addr = ctypes.addressof(self._anchor)
        self.page = page

    def at(self, index: int) -> int:
        return self.addr + index * self.page


BYTES = Pages(8)
"""A source that lives as long as the process: `Pages(1).addr` alone would dangle."""


class Touch(threading.Thread):
    """A thread that reads a byte at `addr` (or writes `value` there) without the GIL."""

    def __init__(self, addr: int, value: int | None = None) -> None:
        super().__init__(daemon=True)
        self.addr = addr
        self._buffer = ctypes.create_string_buffer(1)
        self._value = value
        self._started_up = threading.Event()
        self.tid = 0
        self.start()
        self._started_up.wait()

    def run(self) -> None:
        self.tid = threading.get_native_id()
        self._started_up.set()
        if self._value is None:
            ctypes.memmove(self._buffer, self.addr, 1)
        else:
            ctypes.memset(self.addr, self._value, 1)

    def finish(self, timeout: float = 10) -> int:
        """Waits for the access; the byte that was read."""
        self.join(timeout)
        assert not self.is_alive(), f"the access to {self.addr:#x} still waits after {timeout} s"
        return self._buffer.raw[0]

    def waits(self, seconds: float = 0.05) -> bool:
        """Whether the access is not over after `seconds`."""
        self.join(seconds)
        return self.is_alive()


def in_thread(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Starts fn(*args) in a thread; call what is returned to wait for its result."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(fn(*args)), daemon=True)
    thread.start()

    def finish(timeout: float = 10) -> Any:
        thread.join(timeout)
        assert not thread.is_alive(), f"{fn} still runs after {timeout} s"
        return result[0]

    finish.alive = thread.is_alive  # type: ignore[attr-defined]
    return finish


def wait_until(condition: Callable[[], Any], what: str = "", timeout: float = 10) -> None:
    """Polls until `condition()` is true."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not within {timeout} s: {what or condition}"
        time.sleep(0.002)


# --- children


@dataclass(frozen=True)
class ChildResult:
    returncode: int
    """-N: killed by signal N."""
    stdout: str
    stderr: str
    value: Any
    """What the function returned (pickled); None for a script."""


class ChildTimeout(AssertionError):
    pass


def run_in_child(
    what: Callable[..., Any] | str,
    *args: Any,
    timeout: float = 30,
    check: bool = True,
    env: dict[str, str] | None = None,
) -> ChildResult:
    """Runs a test module's function (or a script) in a new interpreter, in its own process group.

    After `timeout` seconds the whole group is killed and ChildTimeout raised, with what was printed and the
    stacks of its threads. With `check` a status other than 0 is an AssertionError.
    """
    with tempfile.TemporaryDirectory() as directory:
        result_path = os.path.join(directory, "result")
        if isinstance(what, str):
            argv = [sys.executable, "-c", what, *map(str, args)]
        else:
            job = (what.__code__.co_filename, what.__qualname__, args, result_path, timeout)
            blob = base64.b64encode(pickle.dumps(job)).decode()
            argv = [sys.executable, str(Path(__file__)), blob]
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "PYTHONFAULTHANDLER": "1",
                "OPENBLAS_NUM_THREADS": "1",
                **(env or {}),
            },
            start_new_session=True,
        )
        try:
            out, err = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            out, err = child.communicate()
            raise ChildTimeout(f"the child hung for {timeout} s\n{out}\n{err}") from None
        finally:
            # What it left running, also after a normal end.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        value = None
        if os.path.exists(result_path) and (blob := Path(result_path).read_bytes()):
            value = pickle.loads(blob)
    if check and child.returncode != 0:
        raise AssertionError(f"the child ended with {child.returncode}\n{out}\n{err}")
    return ChildResult(child.returncode, out, err, value)


def program(code: str, prelude: str = "", timeout: float = 60) -> str:
    """The source of a program: what tests/program.py offers, then `prelude`, then `code`.

    A moment before `timeout` it prints the stacks of its threads and ends itself.
    """
    watchdog = f"faulthandler.dump_traceback_later({timeout - min(5, timeout / 2)}, exit=True)"
    parts = ("from tests.program import *", watchdog, prelude, code)
    return "\n".join(map(textwrap.dedent, parts))


def run_program(
    code: str, *, prelude: str = "", status: int = 0, timeout: float = 60
) -> ChildResult:
    """Runs `program(code, prelude)` as run_in_child does; it has to end with `status`."""
    # faulthandler's handlers would lie under ours, and some programs ask what is there.
    env = {"PYTHONFAULTHANDLER": ""}
    done = run_in_child(program(code, prelude, timeout), timeout=timeout, check=False, env=env)
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def _child_main(blob: str) -> None:
    path, name, args, result_path, timeout = pickle.loads(base64.b64decode(blob))
    faulthandler.dump_traceback_later(max(timeout - 1, timeout / 2))
    spec = importlib.util.spec_from_file_location("child_job", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["child_job"] = module
    spec.loader.exec_module(module)
    # Opened now: the function may give up the right to.
    result = os.open(result_path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    target: Any = module
    for part in name.split("."):
        target = getattr(target, part)
    value = target(*args)
    os.write(result, pickle.dumps(value))
    faulthandler.cancel_dump_traceback_later()


def fork_and_ask(fn: Callable[[], bytes]) -> tuple[int, bytes]:
    """Forks; the child runs fn and sends its bytes. Its wait status (-N: signal N) and the bytes.

    Only in a child of `run_in_child`: it forks whatever this process holds.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, fn())
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    os.close(writer)
    data = b""
    while chunk := os.read(reader, 65536):
        data += chunk
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), data


# --- the huge page pool


_POOL = Path("/proc/sys/vm/nr_hugepages")


@contextlib.contextmanager
def huge_page_pool(nr_pages: int) -> Iterator[bool]:
    """Sets the pool's size inside the block; False if it could not be had. Needs root."""
    before = _POOL.read_text()
    try:
        try:
            _POOL.write_text(str(nr_pages))
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
        yield int(_POOL.read_text()) >= nr_pages
    finally:
        with contextlib.suppress(OSError):
            _POOL.write_text(before)


# --- memory cgroups and swap


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[Path | None]:
    """An empty group below or beside our own with so many bytes and no swap; None if it cannot be had.

    Needs root.
    """
    group = None
    for parent, file in _memory_groups():
        made = parent / f"uffd_vm-{os.getpid()}"
        try:
            made.mkdir()
        except OSError:
            continue
        if (made / file).exists():
            (made / file).write_text(str(limit))
            for swap in ("memory.swap.max", "memory.swappiness"):  # of v2, of v1
                if (made / swap).exists():
                    (made / swap).write_text("0")
            group = made
            break
        made.rmdir()  # v2, and the parent does not hand the controller down
    try:
        yield group
    finally:
        if group:
            wait_until(lambda: _rmdir(group), f"{group} is empty")


def _memory_groups() -> Iterator[tuple[Path, str]]:
    """Where a group may be made, and its file with the limit."""
    root = Path("/sys/fs/cgroup")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if not controllers:
            base, file = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, file = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = base / name.lstrip("/")
        yield own, file
        if own != base:
            yield own.parent, file


def _rmdir(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError as error:
        if error.errno != errno.EBUSY:  # who was killed is not gone yet
            raise
        return False
    return True


def nr_oom_kills(group: Path) -> int:
    events = group / "memory.events"  # v2
    text = (events if events.exists() else group / "memory.oom_control").read_text()
    return int(re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)[1])  # type: ignore[index]


@contextlib.contextmanager
def swap_space(directory: Path, nr_bytes: int = 16 << 20) -> Iterator[str]:
    """Swaps to a file in `directory`, before all others; why not, if it cannot be had. Needs root.

    This thread, and what it starts, stays on one CPU: MADV_PAGEOUT passes over pages that another CPU
    has not put on the lists yet.
    """
    path = directory / "swapfile"
    header = bytearray(PAGE_SIZE)
    struct.pack_into("<III", header, 1024, 1, nr_bytes // PAGE_SIZE - 1, 0)
    header[-10:] = b"SWAPSPACE2"
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        os.posix_fallocate(file.fileno(), 0, nr_bytes)
        file.write(header)
    name = os.fsencode(path)
    rc = call("swapon", name, SWAP_FLAG_FIRST)
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        yield "" if rc == 0 else f"{directory} takes no swap file: {os.strerror(-rc)}"
    finally:
        os.sched_setaffinity(0, cpus)
        if rc == 0:
            must("swapoff", name)
        path.unlink()


def page_out(addr: int, nr_bytes: int) -> None:
    """Waits until no page of the range is there any more."""

    def gone() -> bool:
        must("madvise", addr, nr_bytes, MADV_PAGEOUT)
        return not any(entry >> 63 for entry in pagemap(addr, nr_bytes))

    wait_until(gone, "all pages swapped out")


def pagemap(addr: int, nr_bytes: int) -> list[int]:
    """The words of /proc/self/pagemap: bit 57 write-protected, 62 swapped or a marker, 63 present."""
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        words = os.pread(file.fileno(), nr_bytes // PAGE_SIZE * 8, addr // PAGE_SIZE * 8)
    return list(struct.unpack(f"={len(words) // 8}Q", words))


if __name__ == "__main__":
    _child_main(sys.argv[1])
