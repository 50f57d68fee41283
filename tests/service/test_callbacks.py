"""Our own functions that CPython calls in the middle of other code: an exception that the thread is still
to be told of is not raised in there, where it would be printed and dropped, but behind them."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.service.test_failure import PRELUDE as FAILURES
from tests.support import run_program
from uffd_vm.kernel.features import Feature

pytestmark = pytest.mark.requires(Feature.MISSING_SHMEM, Feature.POISON)

PRELUDE = (
    FAILURES
    + """
import signal, warnings
ignored = []
sys.unraisablehook = lambda args: ignored.append((args.exc_type, args.object))

def map_changed(service):
    file = make_file(64)
    region = uv.map(file.name, service=service, **one_page)
    assert region.buffer[0] == 0
    os.utime(file.name, ns=(1, 1))
    return region
"""
)
run = functools.partial(run_program, prelude=PRELUDE, timeout=15)
SERVICES = pytest.mark.parametrize("service", ["native", "inline", "python"])


@SERVICES
@pytest.mark.parametrize("where", ["main", "worker"])
def test_a_fork_right_after_the_touch(service: str, where: str) -> None:
    """Parent and child go on with the same value: both are told, with the details, and not by a hook."""
    run(
        f"""
        region = map_changed("{service}")
        b = region.buffer
        def body():
            pid = None
            try:
                value = b[5 * PAGE]
                pid = os.fork()
                if pid == 0:
                    os._exit(3)
                outcome = None
            except uv.SourceChanged as error:
                outcome = error
            finally:
                if os.getpid() != parent:
                    told = type(outcome) is uv.SourceChanged and outcome.index == 5
                    os._exit(0 if told and not ignored else 4)
            assert outcome is not None and outcome.index == 5, outcome
            assert os.wait()[1] == 0
        parent = os.getpid()
        for _ in range(5):
            {"body()" if where == "main" else "in_thread(body)"}
        assert ignored == [], ignored
        assert nr_placeholders() == 0
        """
    )


@SERVICES
def test_a_fork_waits_for_a_region_that_is_being_closed(service: str) -> None:
    """Also with a failure pending, and whatever Ctrl-C does meanwhile: it comes behind the fork."""
    run(
        f"""
        region = map_changed("{service}")
        b = region.buffer
        from uffd_vm.kernel.callbacks import no_fork
        parent, held, forked = os.getpid(), threading.Event(), []
        def hold():
            with no_fork:
                held.set()
                for _ in range(10):
                    time.sleep(0.05)
                    os.kill(parent, signal.SIGINT)
                assert not forked
        signal.signal(signal.SIGINT, lambda *_: interrupts.append(len(forked)))
        interrupts = []
        for fails in (True, False):
            forked.clear()
            interrupts.clear()
            held.clear()
            holder = threading.Thread(target=hold)
            holder.start()
            held.wait()
            began = time.monotonic()
            try:
                value = b[5 * PAGE] if fails else 0
                pid = os.fork()
                forked.append(time.monotonic() - began)
                len(str(forked))
            except uv.SourceChanged:
                forked.append(time.monotonic() - began)
            if os.getpid() != parent:
                os._exit(0)
            holder.join()
            assert os.wait()[1] == 0
            assert forked[0] > 0.3, forked
            assert ignored == [], ignored
        """
    )


@SERVICES
@pytest.mark.parametrize("last", ["region", "view", "uffd"])
def test_a_finalizer_right_after_the_touch(service: str, last: str) -> None:
    """What it is for is done; then the exception comes."""
    run(
        f"""
        region = map_changed("{service}")
        b = region.buffer
        from uffd_vm.kernel.uffd import Uffd
        warnings.simplefilter("ignore", ResourceWarning)
        def make():
            if "{last}" == "uffd":
                return Uffd.open()
            other = uv.anonymous("64KiB", service="{service}", name="other")
            other.buffer[0] = 1
            return other.buffer if "{last}" == "view" else other
        from uffd_vm.mm.address_space import address_space
        for _ in range(5):
            other = make()
            value = outcome = None
            try:
                value = b[5 * PAGE]
                del other
                len(str(value))
            except uv.SourceChanged as error:
                outcome = error
            assert outcome is not None and outcome.index == 5, (outcome, ignored)
            assert ignored == [], ignored
            until = time.monotonic() + 5  # a thread closes what another process serves
            while len(address_space().regions()) != 1:
                assert time.monotonic() < until, address_space().regions()
                time.sleep(0.01)
        """
    )


@SERVICES
def test_changes_are_written_at_exit_though_the_hook_before_failed(
    service: str, tmp_path: Path
) -> None:
    """The last C call of the hook that runs before ours touches a page that cannot be had."""
    changed = tmp_path / "changed"
    changed.write_bytes(b"x" * 4096)
    run(
        f"""
        import atexit
        region = map_changed("{service}")
        writable = uv.map({str(changed)!r}, "r+", service="{service}")
        writable.buffer[0] = 77
        atexit.register(operator.getitem, region.buffer, 5 * PAGE)
        """
    )
    assert changed.read_bytes()[0] == 77


@SERVICES
@pytest.mark.parametrize("gil", ["with", "without"])
def test_the_thread_that_touches_is_told_not_the_one_that_it_starts(service: str, gil: str) -> None:
    run(
        f"""
        region = map_changed("{service}")
        b, a = region.buffer, region.array("uint8")
        import _thread
        sys.setswitchinterval(10)  # the new thread does not run before the touch
        at = 5 * PAGE
        calls = {{"with": lambda: bytes(b[at : at + 9]), "without": a[at : at + 2 * PAGE].sum}}
        for _ in range(10):
            value = None
            try:
                _thread.start_new_thread(time.sleep, (0,))
                value = calls["{gil}"]()
            except uv.SourceChanged as error:
                assert error.index == 5
            else:
                raise SystemExit(f"nobody was told of {{value!r}}")
        assert ignored == [], ignored
        """
    )
