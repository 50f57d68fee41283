"""page_mkwrite hooks that do something to the fault-service process, which runs them. Pickled by name."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

from uffd_vm.kernel._lib import lib
from uffd_vm.testing.inject import OPS


def stop_process(offset: int, nr_bytes: int) -> str:
    """The process has read the fault, and says nothing from here on."""
    os.kill(os.getpid(), signal.SIGSTOP)
    return "ok"


@dataclass
class WaitFirst:
    """Not yet, for `seconds` from the first time that it is asked."""

    seconds: float
    until: float = 0.0

    def __call__(self, offset: int, nr_bytes: int) -> str:
        now = time.monotonic()
        self.until = self.until or now + self.seconds
        return "wait" if now < self.until else "ok"


@dataclass
class Fail:
    """From here on this kernel call fails in the process: `count` times after the first `skip`."""

    op: str
    err: int
    count: int = 1 << 40
    skip: int = 0

    def __setstate__(self, state: dict[str, object]) -> None:
        """Unpickled in the process: armed before the first fault."""
        self.__dict__.update(state)
        assert lib.uvm_inject(OPS[self.op], self.skip, self.count, self.err, 0) == 0

    def __call__(self, offset: int, nr_bytes: int) -> str:
        return "ok"
