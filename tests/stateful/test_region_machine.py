"""A real region against a bytearray, under every request in any order; after each step the invariants.

The model: `memory` is what the region must read as, `file` what a crash would leave (mode "r+"),
`dirty` the pages written in this period of tracking.
"""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

import uffd_vm as uv
from tests.conftest import missing_requirement
from uffd_vm.kernel.features import Feature
from uffd_vm.page import PAGE_SIZE
from uffd_vm.testing.invariants import check_all
from uffd_vm.testing.strategies import pattern, region_sizes

Where = tuple[float, float]
#: A range as two fractions, so that it can be drawn before the size is known.
wheres = st.tuples(st.floats(0, 1), st.floats(0, 1))


class RegionMachine(RuleBasedStateMachine):
    mode = ""
    service = "native"
    region: uv.Region | None = None

    @initialize(
        nbytes=region_sizes(40),
        seed=st.integers(0, 255),
        around=st.sampled_from([1, 4, 16]),
        readahead=st.sampled_from([0, 8, 64]),
    )
    def make(self, nbytes: int, seed: int, around: int, readahead: int) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "data.bin"
        self.file = bytearray(pattern(nbytes, seed))
        self.path.write_bytes(self.file)
        self.options = {
            "fault_around_bytes": around * PAGE_SIZE,
            "readahead_bytes": readahead * PAGE_SIZE,
        }
        self.nbytes = nbytes
        self.nr_pages = -(-nbytes // PAGE_SIZE)
        self.open()

    def open(self) -> None:
        if self.mode == "anonymous":
            around = self.options["fault_around_bytes"]
            self.region = uv.anonymous(
                self.nbytes, track=True, service=self.service, fault_around_bytes=around
            )
            self.memory = bytearray(self.nbytes)
        else:
            self.region = uv.map(
                self.path, self.mode, service=self.service, track=True, **self.options
            )
            self.memory = bytearray(self.file)
        self.dirty: set[int] = set()

    def span(self, where: Where) -> tuple[int, int]:
        start, stop = sorted(where)
        # Mostly at a border, where the errors are.
        start, stop = int(start * self.nbytes), int(stop * self.nbytes)
        if start % 3 == 0:
            start -= start % PAGE_SIZE
        if stop % 3 == 0:
            stop = min(self.nbytes, -(-stop // PAGE_SIZE) * PAGE_SIZE)
        return start, stop

    @staticmethod
    def pages(start: int, stop: int) -> set[int]:
        return set(range(start // PAGE_SIZE, -(-stop // PAGE_SIZE))) if stop > start else set()

    # --- what a program does

    @rule(where=wheres)
    def read(self, where: Where) -> None:
        start, stop = self.span(where)
        assert bytes(self.region.buffer[start:stop]) == self.memory[start:stop]

    @rule(where=wheres, value=st.integers(0, 255))
    def write(self, where: Where, value: int) -> None:
        start, stop = self.span(where)
        stop = min(stop, start + 3 * PAGE_SIZE)
        self.region.buffer[start:stop] = bytes([value]) * (stop - start)
        self.memory[start:stop] = bytes([value]) * (stop - start)
        self.dirty |= self.pages(start, stop)

    @rule(where=wheres)
    def write_one_byte(self, where: Where) -> None:
        at = min(self.span(where)[0], self.nbytes - 1)
        self.region.buffer[at] = self.memory[at] = self.memory[at] ^ 0xFF
        self.dirty.add(at // PAGE_SIZE)

    @rule(where=wheres)
    def load(self, where: Where) -> None:
        self.region.load(self.span(where))

    @rule(where=wheres)
    def ensure(self, where: Where) -> None:
        self.region.ensure(self.span(where))

    @rule(where=wheres)
    def evict(self, where: Where) -> None:
        start, stop = self.span(where)
        given_back = self.region.evict((start, stop))
        assert 0 <= given_back <= len(self.pages(start, stop)) * PAGE_SIZE

    @rule(where=wheres)
    def flush(self, where: Where) -> None:
        start, stop = self.span(where)
        self.region.flush((start, stop))
        if self.mode == "r+":
            self.dirty -= self.pages(start, stop)
            for page in self.pages(start, stop):
                a, b = page * PAGE_SIZE, min((page + 1) * PAGE_SIZE, self.nbytes)
                self.file[a:b] = self.memory[a:b]
                assert self.path.read_bytes()[a:b] == self.memory[a:b]

    @rule(where=wheres)
    def protect(self, where: Where) -> None:
        start, stop = self.span(where)
        self.region.protect((start, stop))
        self.dirty -= self.pages(start, stop)

    @rule(advice=st.sampled_from(["normal", "sequential", "random"]))
    def advise(self, advice: str) -> None:
        self.region.advise(advice)

    @rule()
    def reopen(self) -> None:
        self.region.close()
        if self.mode == "r+":
            self.file[:] = self.memory
        assert self.path.read_bytes() == self.file
        self.open()

    @precondition(lambda self: self.service == "native")
    @rule(where=wheres)
    def fork(self, where: Where) -> None:
        start, stop = self.span(where)
        stop = min(stop, start + 2 * PAGE_SIZE)
        private = self.mode != "r+"
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                buffer = self.region.buffer
                if bytes(buffer) != self.memory:
                    code = 2
                elif private:
                    buffer[start:stop] = bytes(stop - start)
                    self.memory[start:stop] = bytes(stop - start)
                    code = 0 if bytes(buffer) == self.memory else 3
                else:
                    code = 0
            finally:
                os._exit(code)
        watch = threading.Timer(20, os.kill, (pid, 9))
        watch.start()
        _, status = os.waitpid(pid, 0)
        watch.cancel()
        watch.join()
        assert status == 0, f"child: {status >> 8} (2: read other bytes, 3: after its writes)"

    # --- after every step

    @invariant()
    def tracking_is_exact(self) -> None:
        if self.region is not None:
            told = {p for a, b in self.region.dirty() for p in self.pages(a, b)}
            assert told == self.dirty

    @invariant()
    def invariants_hold(self) -> None:
        if self.region is not None:
            check_all(self.region, timeout=0.2)

    def teardown(self) -> None:
        if self.region is not None:
            try:
                assert bytes(self.region.buffer) == self.memory
            finally:
                self.region.discard()
            assert self.path.read_bytes() == self.file
            self.directory.cleanup()


def _test_of(mode: str, service: str, examples: int, steps: int) -> type:
    machine = type(f"{mode}-{service}", (RegionMachine,), {"mode": mode, "service": service})
    case = machine.TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return case


pytestmark = pytest.mark.skipif(
    missing_requirement(Feature.PAGEFAULT_FLAG_WP, Feature.WP_HUGETLBFS_SHMEM, "PAGEMAP_SCAN")
    is not None,
    reason="needs write-protection of shared memory and PAGEMAP_SCAN; use Linux 6.7 or later",
)

TestAnonymous = _test_of("anonymous", "native", 25, 30)
TestPrivateFile = _test_of("c", "native", 25, 30)
TestWritableFile = _test_of("r+", "native", 25, 30)


@pytest.mark.slow
class TestLong:
    @pytest.mark.parametrize("service", ["native", "python"])
    @pytest.mark.parametrize("mode", ["anonymous", "c", "r+"])
    def test_long(self, mode: str, service: str) -> None:
        many = 300 if service == "native" else 30
        _test_of(mode, service, many, 60)("runTest").runTest()
