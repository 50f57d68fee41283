"""service="inline" is served by our signal handlers: who puts others over them is reported, by name."""

from __future__ import annotations

import functools

import pytest

from tests.support import run_program
from uffd_vm.kernel.features import Feature

pytestmark = pytest.mark.requires(Feature.MISSING_SHMEM, Feature.POISON)

PRELUDE = """
def by_python():
    signal.signal(signal.SIGBUS, seen.append)
seen = []
"""

run = functools.partial(run_program, prelude=PRELUDE)

CALLS = {
    "load": "region.load()",
    "ensure": "region.ensure()",
    "prefetch": "region.prefetch()",
    "evict": "region.evict()",
    "flush": "region.flush()",
    "advise": "region.advise('random')",
    "protect": "region.protect()",
    "dirty": "region.dirty()",
    "stats": "region.stats()",
    "trace": "region.trace()",
    "residency": "region.residency()",
    "buffer": "region.buffer",
    "array": "region.array()",
    "address": "region.address",
    "check": "region.check()",
    "close": "region.close()",
    "with": "region.__enter__()",
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_says_that_our_handler_was_replaced(call: str) -> None:
    run(
        f"""
        region = uv.map(file.name, "r+", service="inline", track=True)
        assert region.buffer[0] == data[0]
        by_python()
        error = raises(uv.HandlerReplaced, lambda: {CALLS[call]})
        assert "SIGBUS" in str(error) and "signal.signal()" in str(error), error
        assert file.name.rpartition("/")[2] in str(error), error
        if {call!r} != "check":
            assert "region.check()" in str(error), error
            raises(uv.HandlerReplaced, region.check)  # puts it back, and says so once
        region.check()
        {CALLS[call]}
        if {call!r} != "close":
            assert bytes(region.buffer) == data
            region.close()
        """
    )


@pytest.mark.parametrize(
    "install, who",
    [
        ("by_python()", "signal.signal()"),
        ("faulthandler.enable()", "faulthandler"),
        ("signal.signal(signal.SIGBUS, signal.SIG_DFL)", "nobody (SIG_DFL)"),
        ("signal.signal(signal.SIGBUS, signal.SIG_IGN)", "nobody (SIG_IGN)"),
        ("signal.signal(signal.SIGSEGV, seen.append)", "SIGSEGV"),
        (
            "ctypes.CDLL(None).signal(signal.SIGBUS, ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p))",
            "libc",
        ),
    ],
)
def test_who_it_was_is_said(install: str, who: str) -> None:
    run(
        f"""
        ctypes.CDLL(None).signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        with uv.map(file.name, service="inline") as region:
            {install}
            error = raises(uv.HandlerReplaced, region.load)
            assert {who!r} in str(error), error
            raises(uv.HandlerReplaced, region.check)
            assert bytes(region.buffer) == data
        """
    )


def test_end_of_with_says_it_and_closes() -> None:
    run(
        """
        def use():
            with uv.map(file.name, "r+", service="inline") as region:
                regions.append(region)
                region.buffer[0] = data[0] ^ 1
                by_python()
        regions = []
        raises(uv.HandlerReplaced, use)
        assert regions[0].closed
        assert os.pread(file.fileno(), 1, 0)[0] == data[0] ^ 1
        """
    )


def test_a_new_region_puts_ours_back_loudly_and_the_old_one_says_it_once() -> None:
    done = run(
        """
        logging.basicConfig(level=logging.WARNING)
        with uv.map(file.name, service="inline") as old:
            by_python()
            with uv.map(file.name, service="inline") as new:
                assert bytes(new.buffer) == data
                old.load()
                error = raises(uv.HandlerReplaced, old.check)
                assert "until another region" in str(error), error
                old.check()
                new.check()
        """
    )
    assert "SIGBUS is handled by" in done.stderr and "signal.signal()" in done.stderr


def test_what_is_dirty_goes_home_also_when_nobody_looks() -> None:
    run(
        """
        import atexit
        region = uv.map(file.name, "r+", service="inline")
        region.buffer[0] = data[0] ^ 1
        by_python()
        uv.address_space().flush_all()  # what happens at exit
        assert os.pread(file.fileno(), 1, 0)[0] == data[0] ^ 1
        region.discard()
        """
    )


def test_other_services_mind_their_own_business() -> None:
    run(
        """
        for service in ("native", "python"):
            with uv.map(file.name, service=service) as region:
                by_python()
                region.load()
                region.check()
                assert bytes(region.buffer) == data
        """
    )
