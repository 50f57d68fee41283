"""What the programs begin with that `support.run_program` runs: they import all of this."""

# ruff: noqa: F401  (also the modules: for the programs)

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import hashlib
import logging
import mmap
import operator
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

import uffd_vm as uv
from uffd_vm import errors
from uffd_vm.kernel._lib import ffi, lib

E = TypeVar("E", bound=BaseException)

PAGE = 4096
data = os.urandom(PAGE // 2).replace(b"\xff", b"x") * 2 * 64
file = tempfile.NamedTemporaryFile()  # noqa: SIM115
file.write(data)
file.flush()


def raises(cls: type[E], fn: Callable[..., Any], *args: Any) -> E:
    try:
        value = fn(*args)
    except cls as error:
        return error
    raise SystemExit(f"no {cls.__name__}: {fn} returned {value!r:.200}")


def in_thread(fn: Callable[[], Any]) -> None:
    """Calls fn in a thread, waits for it, and raises what it raised."""
    raised = []

    def body() -> None:
        try:
            fn()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


class within:
    """The block takes at least `least` and at most `most` seconds."""

    def __init__(self, most: float, least: float = 0.0) -> None:
        self.least, self.most = least, most

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, kind: object, *rest: object) -> None:
        took = time.monotonic() - self.began
        assert kind or self.least <= took <= self.most, f"{took:.2f} s"


def outside(script: str) -> subprocess.Popen[bytes]:
    """Done by a process of its own: whoever waits here may hold the GIL."""
    return subprocess.Popen(["sh", "-c", script], stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def ctrl_c(after: float, most: float) -> Iterator[None]:
    """Ctrl-C comes `after` seconds; the block, which takes it, is over within `most`."""
    child = outside(f"sleep {after}; kill -INT {os.getpid()}")
    with within(most, least=0.9 * after):
        yield
    child.wait()
