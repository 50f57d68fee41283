"""The fault-service process lives and says nothing (SIGSTOP): nobody waits for it longer than the deadline,
everybody is told by a typed exception, and it never goes on where it was. In a child each: a mistake is a
hang with the GIL held."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.support import run_program
from uffd_vm.kernel.features import Feature
from uffd_vm.page import PAGE_SIZE

pytestmark = pytest.mark.requires(Feature.MISSING_SHMEM, Feature.POISON)

PRELUDE = """
from tests.service import service_hooks as hooks
from uffd_vm.service.python import python_service, running_service

def stop():
    pid = python_service().pid
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    return pid

def is_dead(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True
"""

run = functools.partial(run_program, prelude=PRELUDE)


def test_toucher_is_told_after_the_deadline_and_load_starts_another() -> None:
    run(
        """
        with uv.map(file.name, service="python", deadline=1.5, fault_around_bytes=PAGE) as region:
            b = region.buffer
            assert bytes(b[:8]) == data[:8]
            pid = stop()
            with within(4, least=1.4):
                error = raises(uv.PagerDied, lambda: bytes(b[9 * PAGE : 10 * PAGE]))
            assert error.errno == errno.ETIMEDOUT and error.index == 9, error
            assert "did not answer" in str(error) and "region.load()" in str(error), error
            assert is_dead(pid)  # it does not wake up later, and go on where it was
            with within(1):  # the others at once: by the death of the process
                error = raises(uv.PagerDied, lambda: bytes(b[20 * PAGE : 21 * PAGE]))
            assert "region.load()" in str(error), error
            assert bytes(b[:8]) == data[:8]  # what is there stays there
            region.load((9 * PAGE, 10 * PAGE))
            assert python_service().pid != pid
            assert bytes(b) == data
            b.release()
        """
    )


def test_toucher_whose_fault_was_read_already_is_told() -> None:
    run(
        """
        with uv.map(file.name, "r+", service="python", deadline=1,
                    page_mkwrite=hooks.stop_process) as region:
            a = region.array("uint8")
            with within(4, least=0.9):
                error = raises(uv.PagerDied, lambda: a[: 4 * PAGE].fill(7))
            assert error.errno == errno.ETIMEDOUT, error
            del a
            region.discard()
        assert open(file.name, "rb").read() == data
        """
    )


def test_many_touchers_are_all_told_and_no_byte_is_invented() -> None:
    run(
        """
        with uv.map(file.name, service="python", deadline=1, fault_around_bytes=PAGE) as region:
            a = region.array("uint8")
            pid = stop()
            errors = []
            def touch(i):
                errors.append(raises(uv.PagerDied, lambda: int(a[i * PAGE : (i + 3) * PAGE].sum())))
            threads = [threading.Thread(target=touch, args=(5 * i,)) for i in range(6)]
            with within(6):
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(10)
            assert len(errors) == 6, errors
            errors.clear()  # their tracebacks hold views
            region.load()
            assert a.tobytes() == data
            del a
        """
    )


@pytest.mark.parametrize("call", ["load", "evict", "flush", "prefetch", "protect"])
def test_requests_end_with_a_typed_error_and_the_next_one_is_answered(call: str) -> None:
    run(
        f"""
        with uv.map(file.name, "r+", service="python", deadline=1, track=True) as region:
            region.buffer[0] = data[0] ^ 1
            pid = stop()
            with within(4, least=0.9):
                error = raises(uv.PagerDied, region.{call})
            assert error.errno == errno.ETIMEDOUT and "did not answer" in str(error), error
            assert "region.load()" in str(error), error
            assert is_dead(pid)
            region.{call}()
            region.load()
            assert bytes(region.buffer)[1:] == data[1:]
        assert open(file.name, "rb").read() == bytes([data[0] ^ 1]) + data[1:]
        """
    )


def test_a_new_region_is_a_typed_error_then_made() -> None:
    run(
        """
        with uv.anonymous(4 * PAGE, service="python", deadline=1) as keeps:
            keeps.buffer[0] = 5
            stop()
            with within(4, least=0.9):
                raises(uv.PagerDied, lambda: uv.map(file.name, service="python", deadline=1))
            with uv.map(file.name, service="python", deadline=1) as region:
                assert bytes(region.buffer) == data
            assert keeps.buffer[0] == 5 and keeps.buffer[PAGE] == 0  # taken over with it
        """
    )


@pytest.mark.parametrize("mode", ["r", "c"])
def test_a_region_with_nothing_to_lose_closes(mode: str) -> None:
    run(
        f"""
        region = uv.map(file.name, {mode!r}, service="python", deadline=1)
        assert region.buffer[0] == data[0]
        pid = stop()
        with within(4):
            region.close()
        assert region.closed and is_dead(pid)
        with uv.map(file.name, service="python") as region:
            assert bytes(region.buffer) == data
        """
    )


def test_close_of_a_dirty_region_raises_stays_open_and_loses_nothing() -> None:
    run(
        """
        region = uv.map(file.name, "r+", service="python", deadline=1)
        region.buffer[5 * PAGE] = data[5 * PAGE] ^ 1
        stop()
        with within(4, least=0.9):
            raises(uv.PagerDied, region.close)
        assert not region.closed
        region.close()
        assert open(file.name, "rb").read()[5 * PAGE] == data[5 * PAGE] ^ 1
        """
    )


def test_what_is_dirty_at_exit_goes_home_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(8 * PAGE_SIZE))
    run(
        f"""
        region = uv.map({str(path)!r}, "r+", service="python", deadline=1)
        region.buffer[0] = 77
        stop()
        """
    )
    assert path.read_bytes()[0] == 77


def test_ctrl_c_is_served_within_a_second() -> None:
    run(
        """
        region = uv.map(file.name, service="python", deadline=30)
        b = region.buffer
        assert b[0] == data[0]
        stop()
        with ctrl_c(1, most=2):
            raises(KeyboardInterrupt, lambda: bytes(b[30 * PAGE : 31 * PAGE]))
        region.load()
        assert bytes(b) == data
        b.release()
        region.close()
        """
    )


def test_ctrl_c_is_served_within_a_second_in_a_system_call() -> None:
    run(
        """
        region = uv.map(file.name, service="python", deadline=30)
        b = region.buffer
        assert b[0] == data[0]
        reader, writer = os.pipe()
        stop()
        with ctrl_c(1, most=2):
            try:
                try:
                    os.write(writer, b[30 * PAGE : 31 * PAGE])
                except OSError as error:
                    assert error.errno == errno.EFAULT  # the call's own end
                    for _ in range(100):
                        time.sleep(0.01)  # Python looks after a call
                raise SystemExit("not interrupted")
            except KeyboardInterrupt:
                pass
        region.load()
        assert bytes(b) == data
        b.release()
        region.close()
        """
    )


def test_ctrl_c_is_served_within_a_second_in_load() -> None:
    run(
        """
        region = uv.map(file.name, service="python", deadline=30)
        stop()
        with ctrl_c(1, most=2):
            raises(KeyboardInterrupt, region.load)
        os.kill(python_service().pid, signal.SIGCONT)
        region.load()
        region.close()
        """
    )


def test_interrupts_are_pythons_own_again_afterwards() -> None:
    run(
        """
        region = uv.map(file.name, service="python", deadline=1)
        stop()
        raises(uv.PagerDied, lambda: bytes(region.buffer[:PAGE]))
        time.sleep(1)
        with ctrl_c(0.3, most=1):
            raises(KeyboardInterrupt, time.sleep, 5)
        region.close()
        """
    )


def test_a_process_stopped_together_with_its_owner_is_not_silent() -> None:
    run(
        """
        with uv.map(file.name, service="python", deadline=1, fault_around_bytes=PAGE) as region:
            a = region.array("uint8")
            assert a[0] == data[0]
            pid, me = python_service().pid, os.getpid()
            # Ctrl-Z, while a thread waits: the service first, so that its fault is there and unanswered.
            child = outside(
                f"kill -STOP {pid}; sleep 0.5; kill -STOP {me}; sleep 3; kill -CONT {me}; kill -CONT {pid}"
            )
            time.sleep(0.2)
            assert int(a[3 * PAGE : 4 * PAGE].sum()) == sum(data[3 * PAGE : 4 * PAGE])
            child.wait()
            assert python_service().pid == pid
            del a
        """
    )


def test_a_service_that_is_slow_and_answers_is_not_killed() -> None:
    run(
        """
        with uv.anonymous(PAGE, service="python", deadline=1):  # the shortest deadline
            with uv.map(file.name, "r+", service="python", deadline=30,
                        page_mkwrite=hooks.WaitFirst(2.5)) as region:
                pid = python_service().pid
                with within(6, least=2.4):
                    region.buffer[0] = data[0] ^ 1
                assert python_service().pid == pid
            assert open(file.name, "rb").read()[0] == data[0] ^ 1
        """
    )


def test_idle_service_may_be_stopped_as_long_as_nobody_waits() -> None:
    run(
        """
        with uv.map(file.name, service="python", deadline=1) as region:
            pid = stop()
            time.sleep(2)
            os.kill(pid, signal.SIGCONT)
            assert bytes(region.buffer) == data
            assert python_service().pid == pid
        """
    )


def test_restart_that_fails_leaves_nobody_waiting() -> None:
    """Another process cannot be had: faults go on failing, and a later load() gets it."""
    run(
        """
        from uffd_vm.service import python
        with uv.map(file.name, service="python", deadline=5) as region:
            b = region.buffer
            python_service().kill()
            spawn = python._spawn
            def no_more(*args):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            python._spawn = no_more
            raises(OSError, region.load)
            for _ in range(2):
                with within(1):
                    raises(uv.PagerDied, lambda: bytes(b[9 * PAGE : 10 * PAGE]))
            python._spawn = spawn
            hand_over = python.PythonService._hand_over
            def fails(self, region):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            python.PythonService._hand_over = fails
            raises(OSError, region.load)
            with within(1):
                raises(uv.PagerDied, lambda: bytes(b[9 * PAGE : 10 * PAGE]))
            python.PythonService._hand_over = hand_over
            region.load()
            assert bytes(b) == data
            b.release()
        """
    )


def test_touch_with_the_gil_while_another_takes_over_is_told_at_once() -> None:
    """The new process must not read faults of regions of which this interpreter has still to tell it."""
    run(
        """
        from uffd_vm.service.fault_service import protocol
        with uv.map(file.name, service="python", deadline=2, fault_around_bytes=PAGE) as region:
            b = region.buffer
            attach_message, told = protocol.attach_message, []
            def touch_first(descriptor):
                told.append(raises(uv.PagerDied, lambda: bytes(b[9 * PAGE : 9 * PAGE + 8])))
                return attach_message(descriptor)
            protocol.attach_message = touch_first
            python_service().kill()
            with within(10):
                region.load()
            assert len(told) == 1 and bytes(b) == data
            b.release()
        """,
        timeout=30,
    )


def test_region_that_goes_while_another_takes_over_is_gone_there_too() -> None:
    run(
        """
        from uffd_vm.service.fault_service import protocol
        keeps = uv.map(file.name, service="python")
        goes = uv.anonymous(4 * PAGE, service="python")
        attach_message, threads = protocol.attach_message, []
        def close_first(descriptor):
            if not threads:
                threads.append(threading.Thread(target=goes.close))
                threads[0].start()
                time.sleep(0.3)
            return attach_message(descriptor)
        old = python_service()
        protocol.attach_message = close_first
        old.kill()
        keeps.load()
        threads[0].join()
        assert python_service() is not old
        assert python_service().statistics()["nr_regions"] == 1
        assert bytes(keeps.buffer) == data
        """
    )


def test_write_back_that_was_killed_half_way_is_done_again() -> None:
    """Between the write and the note of its mtime: the file is ours all the same, nothing is lost."""
    run(
        """
        region = uv.map(file.name, "r+", service="python", deadline=5)
        region.buffer[0] = data[0] ^ 1
        python_service().kill()
        ctl = lib.uvm_cache_ctl(region._ops.cache.id)
        ctl.nr_writing = 1  # as it was in the process that died
        time.sleep(0.02)
        os.pwrite(file.fileno(), b"half", 0)
        region.flush()
        assert open(file.name, "rb").read() == bytes([data[0] ^ 1]) + data[1:]
        region.close()
        """
    )


def test_a_long_request_lets_faults_and_the_question_in_between() -> None:
    run(
        """
        nbytes = 2 << 30  # half a million pages, one kernel call each: longer than the deadline
        with uv.anonymous(nbytes, service="python", deadline=1) as region:
            pid = python_service().pid
            loader = threading.Thread(target=region.load)
            loader.start()
            waits = []
            a = region.array()
            while loader.is_alive():
                began = time.monotonic()
                assert int(a[-PAGE * (len(waits) + 1)]) == 0
                waits.append(time.monotonic() - began)
                time.sleep(0.05)
            loader.join()
            assert python_service().pid == pid
            assert max(waits) < 0.9, waits
            assert region.residency().mapped_bytes == nbytes
            del a
        """
    )


def test_folios_that_a_dead_process_left_half_done_are_what_is_there() -> None:
    run(
        """
        from uffd_vm.fault.pte import FolioState
        with uv.map(file.name, service="python", deadline=5) as region:
            region.load((0, 8 * PAGE))
            python_service().kill()
            folios = lib.uvm_cache_folios(region._ops.cache.id)
            for index, state in ((1, "EVICTING"), (2, "FILLING"), (20, "EVICTING"), (21, "FILLING")):
                folios[index] = int(FolioState[state])
            with within(4):
                region.load()
            assert bytes(region.buffer) == data
            assert {w & 0xFF for w in region._ops.cache.folios(0, 64)} == {int(FolioState.UPTODATE)}
        """
    )


@pytest.mark.slow
def test_stopped_and_killed_at_random_no_store_is_lost_and_no_byte_is_wrong() -> None:
    """Four threads read, store, evict and load, each its own pages; a store that raised was not made."""
    run(
        """
        import random
        N = 256
        content = bytearray(os.urandom(N * PAGE // 2).replace(b"\\xff", b"x") * 2)
        file.seek(0); file.write(content); file.flush()
        region = uv.map(file.name, "r+", service="python", deadline=1, fault_around_bytes=4 * PAGE,
                        cap=64 * PAGE)
        over = threading.Event()
        wrong, died = [], []

        def step(rng, page):
            what, at = rng.random(), page * PAGE
            if what < 0.5:
                if bytes(region.buffer[at : at + PAGE]) != content[at : at + PAGE]:
                    wrong.append(page)
            elif what < 0.9:
                value = rng.randrange(255)
                ctypes.memset(region.address + at, value, 1)
                content[at] = value
            elif what < 0.95:
                region.evict()
            else:
                region.load()

        def work(k):
            rng = random.Random(k)
            while not over.is_set() and not wrong:
                try:
                    step(rng, rng.randrange(k, N, 4))
                except uv.PagerDied as error:
                    died.append(error.errno)
                    try:
                        region.load()
                    except uv.PagerDied:
                        pass

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        rng, end = random.Random(7), time.monotonic() + 20
        while time.monotonic() < end:
            time.sleep(rng.uniform(0.2, 1.5))
            try:
                pid = running_service().pid
                os.kill(pid, rng.choice((signal.SIGSTOP, signal.SIGSTOP, signal.SIGKILL)))
                if rng.random() < 0.3:
                    time.sleep(rng.uniform(0, 0.8))
                    os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                pass
        over.set()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert not wrong, wrong
        assert {errno.EPIPE, errno.ETIMEDOUT} <= set(died), died
        try:
            region.load()
        except uv.PagerDied:
            region.load()
        region.close()
        assert open(file.name, "rb").read() == content
        """
    )
