"""Racing threads and processes over every kind of region, verified against an array outside.

Threads, all over the same pages of one region:
  touchers   Each owns one 8-byte word of every page and counts in it, by ctypes without the GIL. What each
             word holds is noted in a plain array beside, after the store: that is the shadow.
  churner    evict, flush, protect, prefetch and load of random ranges, in random order.
  mapper     maps, touches and closes other regions, of the same file in mode "r" and anonymous.
  forker     forks: the child checks every word against the shadow (a word may be newer than the note
             made before the fork, never older), stores into its own word, reads it back, exits.

Invariants, in the style of the kernel's uffd-stress.c (a counter in every page):
  1. an owner reads exactly what it stored last;
  2. anybody reads of another's word a value between what was noted before and what was noted after;
  3. the rest of a page never changes: in a file region it is the file's bytes, never zeros;
  4. afterwards memory, and in mode "r+" the file, hold the shadow; the page table is the kernel's;
  5. no fault failed, every fault was either minor or major, nothing is left behind.

Each run is a child with a time limit: a second a kind in the quick form, 30 s in the slow one. The seed
is printed; UFFD_VM_STRESS_SEED repeats it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import uffd_vm as uv
from tests.support import run_in_child, wait_until
from uffd_vm.fault.pte import FolioState
from uffd_vm.kernel._lib import lib
from uffd_vm.kernel.features import Feature
from uffd_vm.page import PAGE_SIZE
from uffd_vm.testing.invariants import INVARIANTS, charged_iff_resident
from uffd_vm.testing.strategies import pattern

pytestmark = pytest.mark.requires(Feature.MISSING_SHMEM, Feature.POISON)

NR_PAGES = 256
NR_TOUCHERS = 3
CHILDS_WORD = 8  # word of a page that forked children store into
CHECKED_BYTE = 1000
KINDS = ("anonymous", "anonymous tracked", "r", "c", "c tracked", "r+")


def holds(invariant: Callable[[uv.Region], None], region: uv.Region) -> bool:
    try:
        invariant(region)
    except AssertionError:
        return False
    return True


class Stress:
    def __init__(self, kind: str, service: str, cap_pages: int, seconds: float, seed: int) -> None:
        self.kind, self.seed = kind, seed
        self.seconds, self.end = seconds, 0.0
        self.failures: list[str] = []
        self.steps = [0] * 8
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "data.bin"
        self.data = pattern(NR_PAGES * PAGE_SIZE, seed)
        self.path.write_bytes(self.data)
        tracked = kind.endswith("tracked") or kind == "r+"
        options: dict[str, Any] = {"service": service, "fault_around_bytes": 4 * PAGE_SIZE}
        if kind.startswith("anonymous"):
            self.data = bytes(len(self.data))
            self.region = uv.anonymous(len(self.data), track=tracked, **options)
        else:
            options |= {"cap": cap_pages * PAGE_SIZE, "readahead_bytes": 32 * PAGE_SIZE}
            self.region = uv.map(self.path, kind.split()[0], track=tracked, **options)
        self.address = self.region.address
        # Shared, so that a child sees what was noted after the fork too.
        self.shadow_map = mmap.mmap(-1, NR_PAGES * NR_TOUCHERS * 8)
        self.shadow = memoryview(self.shadow_map).cast("Q")
        for page in range(NR_PAGES):
            for who in range(NR_TOUCHERS):
                self.shadow[page * NR_TOUCHERS + who] = self.first_word(page, who)

    def first_word(self, page: int, word: int) -> int:
        at = page * PAGE_SIZE + word * 8
        return int.from_bytes(self.data[at : at + 8], "little")

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end or bool(self.failures)

    def load(self, page: int, word: int) -> int:
        buffer = ctypes.c_uint64()
        ctypes.memmove(ctypes.byref(buffer), self.address + page * PAGE_SIZE + word * 8, 8)
        return buffer.value

    def store(self, page: int, word: int, value: int) -> None:
        buffer = ctypes.c_uint64(value)
        ctypes.memmove(self.address + page * PAGE_SIZE + word * 8, ctypes.byref(buffer), 8)

    def expect(self, condition: bool, *what: object) -> None:
        if not condition:
            raise AssertionError(" ".join(map(str, what)))

    # --- threads ------------------------------------------------------------------------------------

    def touch(self, me: int) -> None:
        rng = random.Random(self.seed * 10 + me)
        while not self.over:
            self.steps[me] += 1
            page = rng.randrange(NR_PAGES)
            note = page * NR_TOUCHERS + me
            mine = self.shadow[note]
            got = self.load(page, me)
            self.expect(got == mine, f"page {page}: own word {got:#x}, stored {mine:#x}")
            byte = ctypes.create_string_buffer(1)
            ctypes.memmove(byte, self.address + page * PAGE_SIZE + CHECKED_BYTE, 1)
            self.expect(
                byte.raw[0] == self.data[page * PAGE_SIZE + CHECKED_BYTE],
                f"page {page}: byte {CHECKED_BYTE} is {byte.raw[0]:#x}",
            )
            if self.kind != "r" and rng.random() < 0.5:
                self.store(page, me, mine + 1)
                self.shadow[note] = mine + 1
            other = (me + 1) % NR_TOUCHERS
            before = self.shadow[page * NR_TOUCHERS + other]
            got = self.load(page, other)
            after = self.shadow[page * NR_TOUCHERS + other] + 1  # stored, not noted yet
            self.expect(before <= got <= after, f"page {page}: {before} <= {got} <= {after}")

    def churn(self) -> None:
        rng = random.Random(self.seed * 10 + 8)
        region = self.region
        requests: list[Callable[[tuple[int, int]], object]] = [
            region.evict,
            region.flush,
            region.prefetch,
            region.load,
        ]
        if region._tracked:
            requests += [region.protect, region.dirty]
        while not self.over:
            self.steps[6] += 1
            start = rng.randrange(NR_PAGES)
            stop = min(NR_PAGES, start + 1 + rng.randrange(NR_PAGES))
            rng.choice(requests)((start * PAGE_SIZE, stop * PAGE_SIZE))

    def map_others(self) -> None:
        rng = random.Random(self.seed * 10 + 9)
        other = Path(self.directory.name) / "other.bin"
        content = pattern(32 * PAGE_SIZE, 5)
        other.write_bytes(content)
        while not self.over:
            self.steps[7] += 1
            page = rng.randrange(32)
            with uv.map(other, rng.choice(["r", "c"]), service="native") as region:
                self.expect(region.buffer[page * PAGE_SIZE] == content[page * PAGE_SIZE], "other")
            with uv.anonymous(8 * PAGE_SIZE) as region:
                region.buffer[PAGE_SIZE] = 9
                self.expect(region.buffer[PAGE_SIZE] == 9 and region.buffer[0] == 0, "anonymous")

    def fork(self) -> None:
        notes = list(self.shadow)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for page in range(NR_PAGES):
                    for who in range(NR_TOUCHERS):
                        got = self.load(page, who)
                        at = page * NR_TOUCHERS + who
                        newest = self.shadow[at] + 1
                        self.expect(notes[at] <= got <= newest, f"child: page {page}: {got:#x}")
                    if self.kind not in ("r", "r+"):
                        self.store(page, CHILDS_WORD, page + 1)
                        self.expect(self.load(page, CHILDS_WORD) == page + 1, "child's own word")
                if self.kind == "r+":
                    self.region.flush()
                status = 0
            except BaseException as error:
                os.write(2, f"{error!r}\n".encode())
            finally:
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        self.expect(status == 0, f"a forked child ended with wait status {status:#x}")

    def forker(self) -> None:
        while not self.over:
            self.steps[5] += 1
            self.fork()
            time.sleep(0.05)

    # --- the run ------------------------------------------------------------------------------------

    def guarded(self, fn: Callable[..., None], *args: Any) -> None:
        try:
            fn(*args)
        except BaseException as error:
            self.failures.append(f"{fn.__name__}: {error!r}")

    def run(self, *, forks: bool) -> dict[str, int]:
        jobs: list[tuple[Any, ...]] = [(self.touch, i) for i in range(NR_TOUCHERS)]
        jobs += [(self.churn,), (self.map_others,)]
        if forks:
            jobs.append((self.forker,))
        threads = [threading.Thread(target=self.guarded, args=job) for job in jobs]
        self.end = time.monotonic() + self.seconds
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not self.failures, self.failures
        self.check_end(forks)
        return {
            "touches": sum(self.steps[:NR_TOUCHERS]),
            "forks": self.steps[5],
            "churn": self.steps[6],
        }

    def check_invariants(self, forks: bool) -> None:
        """All of them. XXX A child that exits while a thread of ours in it moves pages has moved them and
        not counted them, or the other way round: then the charge is off by that, and only near."""
        for invariant in INVARIANTS:
            if invariant is not charged_iff_resident or not forks:
                wait_until(lambda i=invariant: holds(i, self.region), invariant.__name__, timeout=2)
        ops = self.region._ops
        if ops.cache is not None:
            words = ops.cache.folios(0, NR_PAGES)
            used = sum(word & 0xFF not in (FolioState.ABSENT, FolioState.ERROR) for word in words)
            assert abs(lib.uvm_cache_ctl(ops.cache.id).nr_used - used) <= NR_PAGES // 8

    def check_end(self, forks: bool) -> None:
        want = bytearray(self.data)
        for page in range(NR_PAGES):
            for who in range(NR_TOUCHERS):
                at = page * PAGE_SIZE + who * 8
                want[at : at + 8] = self.shadow[page * NR_TOUCHERS + who].to_bytes(8, "little")
        with self.region.buffer as buffer:
            assert bytes(buffer) == want
        self.region.flush()
        self.check_invariants(forks)
        stats = self.region.stats()
        assert stats["pgfault_failed"] == 0
        assert stats["pgfault"] == stats["pgmajfault"] + stats["pgminfault"]
        if self.kind == "r+":
            content = self.path.read_bytes()
            parts = [slice(p * PAGE_SIZE, (p + 1) * PAGE_SIZE) for p in range(NR_PAGES)]
            wrong = [p for p in range(NR_PAGES) if content[parts[p]] != want[parts[p]]]
            assert not wrong, f"flush() left pages {wrong} of the file behind"
        self.region.close()
        assert self.path.read_bytes() == want or self.kind != "r+"
        self.shadow.release()
        self.shadow_map.close()
        self.directory.cleanup()


def in_child_stress(
    kind: str, service: str, cap_pages: int, seconds: float, seed: int, forks: bool
) -> dict[str, int]:
    return Stress(kind, service, cap_pages, seconds, seed).run(forks=forks)


def stress(kind: str, service: str, cap_pages: int, seconds: float, *, forks: bool) -> None:
    seed = int(os.environ.get("UFFD_VM_STRESS_SEED", "0")) or random.randrange(1, 1 << 20)
    print(f"UFFD_VM_STRESS_SEED={seed}")
    limit = seconds * 2 + 30
    done = run_in_child(
        in_child_stress, kind, service, cap_pages, seconds, seed, forks, timeout=limit
    ).value
    print(done)
    assert done["touches"] > 100 and done["churn"] > 5
    assert done["forks"] > 1 or not forks


@pytest.mark.parametrize("kind", KINDS)
def test_races_for_a_second(kind: str) -> None:
    stress(kind, "native", cap_pages=96, seconds=1.0, forks=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("service", ["python", "inline"])
def test_races_of_the_other_services(kind: str, service: str) -> None:
    # What the Python service writes back is not inherited (tests/service/test_fork.py).
    forks = service == "python" and kind != "r+"
    stress(kind, service, cap_pages=96, seconds=0.7, forks=forks)


@pytest.mark.slow
@pytest.mark.parametrize("cap_pages", [40, 2 * NR_PAGES], ids=["tight cap", "no pressure"])
@pytest.mark.parametrize("kind", KINDS)
def test_races_for_long(kind: str, cap_pages: int) -> None:
    stress(kind, "native", cap_pages=cap_pages, seconds=30.0, forks=True)


@pytest.mark.slow
@pytest.mark.parametrize("service", ["python", "inline"])
@pytest.mark.parametrize("kind", KINDS)
def test_races_of_the_other_services_for_long(kind: str, service: str) -> None:
    stress(kind, service, cap_pages=40, seconds=30.0, forks=False)
