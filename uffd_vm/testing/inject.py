"""Fault injection: makes the n-th kernel call of one kind fail, or late.

    with inject("COPY", errno.EAGAIN, skip=2):      # the third UFFDIO_COPY from here on
        region.load()

Works on the calls of native code in this process, service threads included.
"""

from __future__ import annotations

import errno as errno_module
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from uffd_vm.kernel._lib import check, ffi, lib

__all__ = ["OPS", "Injection", "inject", "until_clean"]

#: enum uvm_op by name: "COPY", "PREAD", "MMAP" ...
OPS: dict[str, int] = {
    name.removeprefix("UVM_OP_"): number
    for number, name in ffi.typeof("enum uvm_op").elements.items()
    if name != "UVM_OP_NR"
}


class Injection:
    """What was armed; `calls` counts the calls of that kind seen since."""

    def __init__(self, op: int, count: int, skip: int) -> None:
        self._op = op
        self._count = count
        self._skip = skip

    @property
    def calls(self) -> int:
        return int(lib.uvm_inject_calls(self._op))

    @property
    def fired(self) -> bool:
        return self.calls > self._skip and self._count > 0


@contextmanager
def inject(
    op: str, err: int = 0, *, skip: int = 0, count: int = 1, delay: float = 0.0
) -> Iterator[Injection]:
    """From the `skip`-th call of `op` on, `count` calls fail with errno `err` after `delay` seconds.

    `err` 0 is only the delay. Everything armed, by anybody, is disarmed at the end.
    """
    if op not in OPS:
        raise ValueError(f"no operation {op!r}; one of {sorted(OPS)}")
    if err and err not in errno_module.errorcode:
        raise ValueError(f"{err} is no errno")
    check(lib.uvm_inject(OPS[op], skip, count, err, int(delay * 1e9)), "uvm_inject", op=op)
    try:
        yield Injection(OPS[op], count, skip)
    finally:
        lib.uvm_inject_clear()


def until_clean(op: str, err: int, run: Callable[[], object], *, limit: int = 10_000) -> int:
    """Fails the 1st call of `op`, then the 2nd, ... until `run` passes without the injector firing.

    `run` decides what may be raised. Returns how many calls were failed. Follows SQLite's malloc tests.
    """
    for skip in range(limit):
        with inject(op, err, skip=skip) as injection:
            run()
            if not injection.fired:
                return skip
    raise AssertionError(f"{op} was called more than {limit} times")
