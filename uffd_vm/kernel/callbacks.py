"""Our functions that CPython calls in the middle of other code: at fork, at exit, from a destructor.

An exception that was set for the thread (native/raise.c) would be raised in the first line of such a
function, printed and dropped; what the function is for would not be done. So each is registered here, and
native/callback.c puts the exception off until the function has returned. Nothing of ours is registered
with os, atexit or weakref directly.
"""

from __future__ import annotations

import atexit
import functools
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from uffd_vm.kernel._lib import lib

__all__ = ["at_exit", "finalized", "in_forked_child", "no_fork"]

T = TypeVar("T", bound=type)

#: Held while a region is neither open nor gone. os.fork() takes it too: a child must not inherit such a
#: region, whose memory may be unmapped already, or still be there and no longer served.
no_fork = threading.RLock()

_in_child: list[Callable[[], None]] = []
_at_exit: dict[Callable[[], None], tuple[Callable[[], None], ...]] = {}


def in_forked_child(call: Callable[[], None]) -> None:
    """Runs `call` in each forked child, after those registered before it."""
    _in_child.append(call)


def at_exit(call: Callable[[], None]) -> None:
    """Runs `call` at exit, before those registered before it; again: moves it to the front."""
    begin, end = functools.partial(lib.uvm_callback_begin), functools.partial(lib.uvm_callback_end)
    for each in _at_exit.pop(call, ()):
        atexit.unregister(each)
    _at_exit[call] = (end, call, begin)
    for each in _at_exit[call]:
        atexit.register(each)


def finalized(cls: T) -> T:
    """Of a class with a __del__."""
    lib.uvm_callback_is_finalizer(id(cls))
    return cls


def _after_fork_in_child() -> None:
    for call in _in_child:
        call()


# Hooks before the fork run in reverse order, those after it in order: the second call stands around the
# first, and around the hooks of whoever registered earlier.
os.register_at_fork(after_in_child=_after_fork_in_child)
os.register_at_fork(
    before=functools.partial(lib.uvm_fork_begin, id(no_fork)),
    after_in_parent=functools.partial(lib.uvm_fork_end, id(no_fork)),
    after_in_child=functools.partial(lib.uvm_fork_end, id(no_fork)),
)
