"""What the machine must be like while we measure: CPUs, a busy neighbour, cached files."""

from __future__ import annotations

import array
import os
import random
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.floor import PAGE, ROOT

DATA = ROOT / "build" / "bench-data"
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
CPUS: tuple[int, ...] = tuple(sorted(os.sched_getaffinity(0)))

_SPIN = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)  # die with the benchmark
os.sched_setaffinity(0, {int(sys.argv[1])})
print("ready", flush=True)
while True:
    pass
"""


@contextmanager
def pinned(cpu: int | None) -> Iterator[None]:
    """Keep the calling thread on one CPU inside; None leaves it where it is."""
    before = os.sched_getaffinity(0)
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def busy(cpus: Sequence[int]) -> Iterator[None]:
    """A process that spins on each of these CPUs; they end with the block."""
    spinners: list[subprocess.Popen[bytes]] = []
    try:
        for cpu in cpus:
            spinner = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _SPIN, str(cpu)], stdout=subprocess.PIPE
            )
            spinners.append(spinner)
            if spinner.stdout is None or not spinner.stdout.readline():
                raise RuntimeError(f"the spinner for CPU {cpu} did not start")
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
            if spinner.stdout is not None:
                spinner.stdout.close()


def descendants() -> list[int]:
    """Process ids of our children, and theirs."""
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        pid = waiting.pop()
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                children = [int(word) for word in task.read_text().split()]
            except OSError:
                continue  # a thread that has just ended
            found += children
            waiting += children
    return found


@contextmanager
def processes_pinned(pids: Sequence[int], cpu: int) -> Iterator[None]:
    """Keep every thread of these processes on one CPU inside."""
    before: dict[int, set[int]] = {}
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            before[int(task.name)] = os.sched_getaffinity(int(task.name))
            os.sched_setaffinity(int(task.name), {cpu})
    try:
        yield
    finally:
        for thread, cpus in before.items():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, cpus)


def raise_file_limit(wanted: int) -> None:
    """Soft limit of open files, as far as the hard one allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def resident_bytes() -> int:
    """Rss of this process, exact (statm is not)."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no Rss line in /proc/self/smaps_rollup")


def cpu_seconds() -> float:
    """CPU time of this process, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# ---- files: float32 data, and the first number of each page is the page's number ----


def page_word(page: int) -> int:
    """What the toucher reads at the start of a page, as the 32-bit word that it adds up."""
    return int(struct.unpack("<I", struct.pack("<f", float(page)))[0])


def page_words(pages: Sequence[int]) -> int:
    """The sum that touching these pages must give."""
    return int(sum(map(page_word, pages)))


def _write_pattern(path: Path, first_page: int, nbytes: int) -> None:
    values = array.array("f", (((i * 37) % 1009) / 100.0 for i in range(MIB // 4)))
    piece = bytearray(values.tobytes())
    partial = path.with_suffix(".tmp")
    with open(partial, "wb") as out:
        for start in range(0, nbytes, MIB):
            for offset in range(0, MIB, PAGE):
                page = first_page + (start + offset) // PAGE
                struct.pack_into("<f", piece, offset, float(page))
            out.write(memoryview(piece)[: nbytes - start])
        out.flush()
        os.fsync(out.fileno())
    partial.rename(path)


def data_file(nbytes: int) -> Path:
    """A file of this size with real blocks on disk; made once."""
    path = DATA / f"float32-{nbytes // MIB}MiB.bin"
    if not path.exists() or path.stat().st_size != nbytes:
        DATA.mkdir(parents=True, exist_ok=True)
        print(f"making {path.relative_to(ROOT)} (once)", file=sys.stderr)
        _write_pattern(path, 0, nbytes)
    return path


def many_files(count: int, nbytes: int) -> list[Path]:
    """The same data as `data_file(count * nbytes)`, cut into files; made once."""
    folder = DATA / f"many-{nbytes // MIB}MiB"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:04}.bin" for i in range(count)]
    for i, path in enumerate(paths):
        if not path.exists():
            _write_pattern(path, i * (nbytes // PAGE), nbytes)
    return paths


def sparse_file(nbytes: int) -> Path:
    """A file without a single block."""
    path = DATA / f"sparse-{nbytes // GIB}GiB.bin"
    DATA.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as out:
        os.ftruncate(out.fileno(), nbytes)
    return path


def read_once(path: Path, pieces: Sequence[tuple[int, int]] | None = None) -> None:
    """Into the page cache with it: the whole file, or these (offset, length) pieces."""
    buffer = bytearray(MIB)
    with open(path, "rb", buffering=0) as file:
        wanted = pieces if pieces is not None else [(0, os.fstat(file.fileno()).st_size)]
        for offset, length in wanted:
            for start in range(offset, offset + length, MIB):
                size = min(MIB, offset + length - start)
                os.preadv(file.fileno(), [memoryview(buffer)[:size]], start)


def random_pages(seed: int, pages: int, count: int) -> list[int]:
    """Different pages, in random order; the same for the same seed."""
    return random.Random(seed).sample(range(pages), count)
