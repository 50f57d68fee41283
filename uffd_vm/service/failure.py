"""Typed exceptions in the thread whose touch of lazy memory failed.

The flow: native/told.c (the SIGBUS handler) covers the failed page with a private placeholder and sets
one of the classes below for the touching thread; CPython raises it once the C call has ended, and
making it asks `_details()`: which page of which region, and why. Asking also takes the placeholder away:
the page is missing again, and the next touch tries again.

Owns the classes (native code borrows them), the names of regions, and the native helper threads, which
live from the first region that raises to the last. Threads that Python does not know cannot be told: for
those `region.check()` raises later.

With service="inline" the handlers are who serves. Anybody may install others over them (faulthandler does,
database drivers, JITs), so every call on such a region looks whether they still stand.
"""

from __future__ import annotations

import faulthandler
import logging
import signal
import threading

from uffd_vm import errors
from uffd_vm.errors import BudgetExceeded, FailureDetails, HandlerReplaced
from uffd_vm.kernel._lib import check, ffi, lib
from uffd_vm.kernel.callbacks import at_exit, in_forked_child
from uffd_vm.mm.failure import CLASSES, details

__all__ = ["InlineHandlers", "install", "register_region", "shutdown", "unregister_region"]

log = logging.getLogger("uffd_vm")


# --- the classes that native code raises ----------------------------------------------------------


class _OutOfMemory(BudgetExceeded):
    """No memory for a page. Made without arguments by native code."""

    def __init__(self) -> None:
        why = _details()
        super().__init__(why.message if why else "no memory for a page of a lazy region")


class _Interrupted(KeyboardInterrupt):
    """Ctrl-C while the main thread waited for a page: the signal was held back for this exception.

    A handler of the user's own is called as well: the touch still has to end in an exception, because
    its value was never read.
    """

    def __init__(self) -> None:
        super().__init__()
        _details()
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            lib.uvm_interrupt_pass()
            signal.raise_signal(signal.SIGINT)


for _private, _public in ((_OutOfMemory, BudgetExceeded), (_Interrupted, KeyboardInterrupt)):
    _private.__name__ = _private.__qualname__ = _public.__name__
    _private.__module__ = _public.__module__

_CLASSES: dict[int, type[BaseException]] = {
    **CLASSES,
    lib.UVM_FAILURE_OOM: _OutOfMemory,
    lib.UVM_FAILURE_INTERRUPT: _Interrupted,
}


# --- details -----------------------------------------------------------------------------------------

_names: dict[int, str] = {}  # of regions, by handle


def register_region(handle: int, name: str) -> None:
    """What error messages call the region, and what their `.region` is: its file's name, say."""
    _names[handle] = name


def unregister_region(handle: int) -> None:
    """After close; unknown handles are ignored."""
    _names.pop(handle, None)


def _details() -> FailureDetails | None:
    """Of the failure that the calling thread is being told; its placeholders go away."""
    out = ffi.new("struct uvm_failure *")
    if lib.uvm_failure_take(out) != 1:
        return None
    handle = int(out.region)
    return details(_names.get(handle, hex(handle)), int(out.index), int(out.kind), int(out.err))


# --- our signal handlers ---------------------------------------------------------------------------


def replaced_by() -> str | None:
    """Which signal of ours somebody else handles now, and who; None: all are ours."""
    handler = ffi.new("uint64_t *")
    number = lib.uvm_sigbus_replaced(handler)
    if not number:
        return None
    return f"{signal.Signals(number).name} is handled by {_owner(number, handler[0])} now"


def _owner(number: int, handler: int) -> str:
    if handler in (signal.SIG_DFL, signal.SIG_IGN):
        return f"nobody ({signal.Handlers(handler).name})"
    function = signal.getsignal(number)
    if callable(function):
        return f"{function!r} (by signal.signal())"
    if faulthandler.is_enabled():
        return "faulthandler (by faulthandler.enable())"
    with open("/proc/self/maps") as maps:
        for line in maps:
            start, end = (int(n, 16) for n in line.split(None, 1)[0].split("-"))
            if start <= handler < end:
                return f"{line.split(None, 5)[-1].strip()} (at {handler:#x})"
    return f"code at {handler:#x}"


_nr_replaced = 0  # times that another handler was found over ours, and ours put back


def _put_back() -> str | None:
    """Puts our handlers in front of those found over them; who that was, None: nobody."""
    global _nr_replaced
    who = replaced_by()
    check(lib.uvm_sigbus_install(), "sigaction(SIGBUS)")
    if who is not None:
        _nr_replaced += 1
    return who


class InlineHandlers:
    """Looks for one region of service="inline" whether our handlers, which serve it, are in force."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._seen = _nr_replaced

    def require(self) -> None:
        """Before any call on the region. Raises HandlerReplaced."""
        if lib.uvm_sigbus_in_force() != 1:
            raise self._error(
                str(replaced_by()),
                "a touch of a page that is not there goes to that handler. Call region.check(), which puts "
                "ours in front of it again; better, install the other one before the region is made",
            )

    def check(self) -> None:
        """Puts our handlers back. Raises HandlerReplaced, once, also if somebody else has put them back."""
        with _lock:
            who = _put_back()
            before, self._seen = self._seen, _nr_replaced
        if who is not None:
            raise self._error(
                who.removesuffix(" now"), "until now. Ours is in front of it again, and hands on"
            )
        if self._seen != before:
            raise self._error(
                "SIGBUS was handled by somebody else",
                "until another region was made. Ours is in front again, and hands on",
            )

    def _error(self, what: str, then: str) -> HandlerReplaced:
        return HandlerReplaced(f"region {self._name!r} (service='inline'): {what}; {then}")


# --- life ------------------------------------------------------------------------------------------

_lock = threading.Lock()
_users = 0
_at_exit = False


def install() -> None:
    """Before a region whose failures raise. Each call wants its `shutdown()`.

    Every call looks whether the SIGBUS handler is still ours (faulthandler.enable() replaces it), and
    puts it back, in front of the one found there.
    """
    global _users, _at_exit
    with _lock:
        if _users == 0:
            check(lib.uvm_sigbus_install(), "sigaction(SIGBUS)")
        elif who := _put_back():
            log.warning("%s, where ours was: ours is in front of it again, and hands on", who)
        if _users == 0:
            for kind, cls in _CLASSES.items():
                lib.uvm_failure_set_class(kind, id(cls))
            errors.failure_details = _details
            check(lib.uvm_janitor_start(), "pthread_create(uvm-janitor)")
            if not _at_exit:
                # Native code must not wait for the GIL of an interpreter that is going away.
                _at_exit = True
                at_exit(_stop_at_exit)
        _users += 1


def shutdown() -> None:
    """After the region is closed; the last one stops the helper threads and gives SIGBUS back."""
    global _users
    with _lock:
        if _users == 0:
            raise RuntimeError("shutdown() without install()")
        _users -= 1
        if _users == 0:
            lib.uvm_janitor_stop()
            lib.uvm_sigbus_remove()


def _stop_at_exit() -> None:
    lib.uvm_janitor_stop()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()


in_forked_child(_after_fork_in_child)
