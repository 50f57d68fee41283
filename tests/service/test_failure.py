"""What a touch of lazy memory gets whose content cannot be had. Each scenario runs in a child: a mistake
here is a hang with the GIL held, or a death by SIGBUS."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.support import ROOT, program, run_program
from uffd_vm.kernel.features import Feature

pytestmark = pytest.mark.requires(Feature.MISSING_SHMEM, Feature.POISON)

PRELUDE = """
one_page = dict(fault_around_bytes=4096, readahead_bytes=0)

def content(nr_pages):
    # never 0xff, and different in each page
    page = (np.arange(PAGE, dtype=np.uint32) % 251).astype(np.uint8)
    return np.concatenate([(page + i % 4) for i in range(nr_pages)]).astype(np.uint8).tobytes()

files = []

def make_file(nr_pages=64):
    file = tempfile.NamedTemporaryFile(dir=os.environ.get("UVM_TEST_DIR"))
    file.write(content(nr_pages))
    file.flush()
    files.append(file)  # for as long as this process lives
    return file

def fail(err=errno.EIO, count=1 << 40, delay_s=0.0, nowait=None):
    lib.uvm_inject(lib.UVM_OP_PREAD_NOWAIT, 0, count, nowait or err, 0)
    lib.uvm_inject(lib.UVM_OP_PREAD, 0, count, err, int(delay_s * 1e9))

def heal():
    lib.uvm_inject_clear()

def nr_placeholders():
    stats = ffi.new("struct uvm_process_stats *")
    lib.uvm_process_stats(stats)
    return stats.nr_placeholders

def nr_vmas(region):
    start, end = region.address, region.address + region.nbytes
    with open("/proc/self/maps") as maps:
        spans = [[int(x, 16) for x in line.split()[0].split("-")] for line in maps]
    return sum(a < end and b > start for a, b in spans)

def start_readers(address, nr_pages):
    '''A thread a page, that reads without the GIL; and the list of what each is told.'''
    told = []
    def body(page):
        buffer = ctypes.create_string_buffer(8)
        try:
            ctypes.memmove(buffer, address + page * PAGE, 8)
            for _ in range(20):
                len(buffer)
            told.append((-1, None))
        except uv.SourceError as error:
            told.append((error.index, type(error)))
    threads = [threading.Thread(target=body, args=(page,)) for page in range(nr_pages)]
    for thread in threads:
        thread.start()
    return threads, told
"""

run = functools.partial(run_program, prelude=PRELUDE)

C_CALLS = """
calls = {
    "bytes": lambda at: bytes(b[at : at + 16]),
    "tobytes": lambda at: b[at : at + 64].tobytes(),
    "from_bytes": lambda at: int.from_bytes(b[at : at + 8], "little"),
    "unpack": lambda at: struct.unpack_from("<q", b, at),
    "sha256": lambda at: hashlib.sha256(b[at : at + 64]).hexdigest(),
    "equal": lambda at: operator.eq(b[at : at + 16], bytes(16)),
    "string_at": lambda at: ctypes.string_at(region.address + at, 16),
    "join": lambda at: b"".join([b[at : at + 16]]),
    "bytearray": lambda at: bytearray(b[at : at + 32]),
    "item": lambda at: a[at].item(),
    "small sum": lambda at: a[at : at + 8].sum(),
    "sha256 without the GIL": lambda at: hashlib.sha256(b[at : at + 4096]).hexdigest(),
    "sum without the GIL": lambda at: a[at : at + 8000].sum(),
    "copy": lambda at: a[at : at + 4096].copy(),
}
"""


@pytest.mark.parametrize("service", ["native", "inline"])
@pytest.mark.parametrize("where", ["main", "worker"])
def test_wrong_result_is_never_assigned(where: str, service: str) -> None:
    done = run(
        f"""
        file = make_file(2048)
        region = uv.map(file.name, mode="r", service="{service}", **one_page)
        b, a = memoryview(region.buffer), region.array("uint8")
        {textwrap.indent(C_CALLS, " " * 8).strip()}
        UNSET = object()
        nr_raised = nr_wrong = nr_after = 0
        def loop():
            global nr_raised, nr_wrong, nr_after
            rounds = 0
            while nr_raised < 240:
                rounds += 1
                for name, call in calls.items():
                    at = 5 * nr_raised * PAGE + 1000  # pages that were never there
                    value = UNSET
                    fail()
                    try:
                        value = call(at)
                    except uv.SourceError as error:
                        nr_raised += 1
                        assert error.errno == errno.EIO and error.index == at // PAGE, (name, error)
                    else:
                        raise SystemExit(f"{{name}} of page {{at // PAGE}} returned {{value!r:.99}}")
                    nr_wrong += value is not UNSET
                    heal()
                    if rounds % 4 == 0:  # the page is missing again, and comes
                        assert bytes(b[at : at + 1])
                        # A neighbour may have been poisoned late, by a fault that was woken in vain.
                        until = time.monotonic() + 5
                        while True:
                            try:
                                assert call(at) is not None
                                break
                            except uv.SourceError as error:
                                assert error.index != at // PAGE and time.monotonic() < until, error
                                time.sleep(0.01)
                        nr_after += 1
        {"loop()" if where == "main" else "in_thread(loop)"}
        assert bytes(b) == content(2048)
        assert nr_placeholders() == 0
        print(nr_raised, nr_wrong, nr_after)
        """
    )
    nr_raised, nr_wrong, _ = map(int, done.stdout.split())
    assert nr_raised >= 240 and nr_wrong == 0


@pytest.mark.parametrize(
    "looks",
    [
        "region.check()",
        "in_python()",
        "[0 for _ in pair]",
        "str(value)",
        "for _ in pair: pass",
    ],
)
def test_bare_subscript_raises_at_the_first_place_that_looks(looks: str) -> None:
    """docs/failure.md, "Subscripts and operators". In code that is hot len() and isinstance() do not look."""
    run(
        f"""
        file = make_file(256)
        region = uv.map(file.name, mode="r", service="native", **one_page)
        b = memoryview(region.buffer)
        pair, seen = (1, 2), []
        def in_python():
            pass
        def touch(at):
            value = b[at]
            len(pair)
            isinstance(value, int)
            {looks}
            seen.append(value)
        for _ in range(100):
            touch(0)
        seen.clear()
        fail()
        for page in range(1, 200):
            raises(uv.SourceError, touch, page * PAGE)
        assert seen == []
        """
    )


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_a_second_process_never_reads_a_placeholder(mode: str) -> None:
    # The exception is made while the placeholder is there: the moment to look from outside.
    run(
        f"""
        file = make_file(64)
        region = uv.map(file.name, mode="{mode}", service="native")
        b = memoryview(region.buffer)
        fds = [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{{fd}}")]
        memfds = [fd for fd in fds if "memfd:" in os.readlink(f"/proc/self/fd/{{fd}}")]
        assert memfds
        inner, looks = errors.failure_details, []
        def details():
            seen = ctypes.string_at(region.address + 5 * PAGE, 8)
            others = []
            for fd in memfds:
                with open(f"/proc/self/fd/{{fd}}", "rb") as other:
                    others.append(other.read())
            looks.append((seen, nr_placeholders(), others))
            return inner()
        errors.failure_details = details
        fail()
        error = raises(uv.SourceError, lambda: bytes(b[5 * PAGE : 5 * PAGE + 8]))
        [(seen, nr, others)] = looks
        assert seen == b"\\xff" * 8 and nr == 1, looks
        assert not any(b"\\xff" * 8 in other[:64 * PAGE] for other in others if len(other) == 64 * PAGE)
        assert nr_placeholders() == 0 and nr_vmas(region) == 1
        heal()
        assert bytes(b[5 * PAGE : 6 * PAGE]) == content(64)[5 * PAGE : 6 * PAGE]
        assert open(file.name, "rb").read() == content(64)
        """
    )


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_forked_child_reads_the_page_not_the_placeholder(mode: str) -> None:
    run(
        f"""
        file = make_file(64)
        region = uv.map(file.name, mode="{mode}", service="native")
        b = memoryview(region.buffer)
        inner = errors.failure_details
        def details():
            if os.getpid() == parent:
                heal()
                pid = os.fork()
                if pid == 0:
                    ok = nr_placeholders() == 0
                    ok &= bytes(b[: 64 * PAGE]) == content(64)
                    os._exit(0 if ok else 3)
                assert os.waitpid(pid, 0)[1] == 0
                forked.append(pid)
            return inner()
        parent, forked = os.getpid(), []
        errors.failure_details = details
        fail()
        raises(uv.SourceError, lambda: bytes(b[5 * PAGE : 5 * PAGE + 8]))
        assert len(forked) == 1
        assert bytes(b[5 * PAGE : 6 * PAGE]) == content(64)[5 * PAGE : 6 * PAGE]
        """
    )


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_forked_child_is_told_too(mode: str) -> None:
    run(
        f"""
        file = make_file(64)
        region = uv.map(file.name, mode="{mode}", service="native")
        b, a = memoryview(region.buffer), region.array("uint8")
        fail()
        raises(uv.SourceError, lambda: bytes(b[:8]))
        pid = os.fork()
        if pid == 0:
            fail()
            raises(uv.SourceError, lambda: bytes(b[PAGE : PAGE + 5]))
            # The kernel joins what a failure splits, except private mappings that were cloned by fork.
            if nr_vmas(region) != 1 and "{mode}" != "c":
                os._exit(3)
            in_thread(lambda: raises(uv.SourceError, a.sum))
            heal()
            assert a.sum() == sum(content(64))
            sys.stdout.flush()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        """
    )


@pytest.mark.parametrize("what", ["tofile", "send", "write", "direct", "pwritev", "readinto"])
def test_syscalls_on_a_failed_page_raise_oserror_and_write_none(what: str) -> None:
    done = run(
        f"""
        what = "{what}"
        file = make_file(64)
        region = uv.map(file.name, mode="r+" if what == "readinto" else "r", service="native")
        b, a = memoryview(region.buffer), region.array("uint8")
        target = tempfile.NamedTemporaryFile(dir=os.environ.get("UVM_TEST_DIR"))
        ours, theirs = socket.socketpair()
        def direct():
            fd = os.open(target.name, os.O_WRONLY | os.O_DIRECT)
            try:
                return os.write(fd, b[: 4 * PAGE])
            finally:
                os.close(fd)
        if what == "direct":
            try:
                os.close(os.open(target.name, os.O_WRONLY | os.O_DIRECT))
            except OSError:
                print("SKIP no O_DIRECT here")
                raise SystemExit(0)
        calls = {{
            "tofile": lambda: a[: 4 * PAGE].tofile(target.name),
            "send": lambda: ours.send(b[: 4 * PAGE]),
            "write": lambda: os.write(target.fileno(), b[: 4 * PAGE]),
            "direct": direct,
            "pwritev": lambda: os.pwritev(target.fileno(), [b[:PAGE], b[PAGE : 2 * PAGE]], 0),
            "readinto": lambda: os.preadv(os.open(file.name, os.O_RDONLY), [b[:PAGE]], 0),
        }}
        fail()
        for _ in range(20):
            raises(OSError, calls[what])
        assert os.stat(target.name).st_size == 0
        theirs.setblocking(False)
        raises(BlockingIOError, theirs.recv, 1)
        heal()
        for _ in range(100):  # the poison that woke the call goes by itself
            try:
                calls[what]()
                break
            except OSError:
                time.sleep(0.01)
        else:
            raise SystemExit("the page never came back")
        if what not in ("send", "readinto"):
            written = open(target.name, "rb").read()
            assert written and written == content(64)[: len(written)]
        """
    )
    if "SKIP" in done.stdout:
        pytest.skip(done.stdout)


@pytest.mark.parametrize("where", ["main", "worker"])
@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_numpy_reduction_without_the_gil_raises(where: str, mode: str) -> None:
    run(
        f"""
        file = make_file(2048)
        region = uv.map(file.name, mode="{mode}", service="native")
        a = region.array("uint8")
        expected = np.frombuffer(content(2048), "uint8").sum()
        ticks, done = [], False
        def tick():  # other Python threads go on meanwhile
            while not done:
                ticks.append(time.monotonic())
                time.sleep(0.001)
        ticker = threading.Thread(target=tick, daemon=True)
        ticker.start()
        def body():
            value = None
            fail()
            for _ in range(5):
                began = time.process_time()  # a second; a busy machine makes it longer by the clock
                try:
                    value = a.sum()
                except uv.SourceError as error:
                    assert error.index == 0
                else:
                    raise SystemExit(value)
                assert time.process_time() - began < 8, time.process_time() - began
                assert value is None and nr_placeholders() == 0
            assert nr_vmas(region) == 1, nr_vmas(region)
            heal()
            assert a.sum() == expected
        {"body()" if where == "main" else "in_thread(body)"}
        done = True
        ticker.join()
        """
    )


def test_large_reduction_that_fails_ends_in_moments() -> None:
    # 1 GiB, 262144 pages: one by one it would take a minute and half a million mappings.
    run(
        """
        file = make_file(1)
        os.truncate(file.name, 1 << 30)
        region = uv.map(file.name, mode="r", service="native")
        a = region.array("uint64")
        fail()
        began = time.monotonic()
        raises(uv.SourceError, a.sum)
        assert time.monotonic() - began < 20, time.monotonic() - began
        assert nr_placeholders() == 0 and nr_vmas(region) == 1
        """
    )


@pytest.mark.parametrize("service", ["native", "inline"])
def test_a_call_may_fail_on_more_pages_than_there_are_placeholders(service: str) -> None:
    # Every other page is there, so that each failed one takes a placeholder of its own.
    run(
        f"""
        file = make_file(1)
        os.truncate(file.name, 10000 * PAGE)
        region = uv.map(file.name, mode="r", service="{service}", **one_page)
        a = region.array("uint8")
        for page in range(0, 10000, 2):
            region.load((page * PAGE, page * PAGE + PAGE))
        fail(errno.EACCES)
        assert raises(uv.SourceError, a.sum).index == 1
        assert nr_placeholders() == 0 and nr_vmas(region) == 1
        heal()
        assert a.sum() == sum(content(1))
        """
    )


def test_threads_that_end_or_swallow_untold_leave_room_for_others() -> None:
    # There are 512 places for threads that are being told.
    run(
        """
        file = make_file(600)
        region = uv.map(file.name, mode="r", service="native", **one_page)
        b = memoryview(region.buffer)
        details, errors.failure_details = errors.failure_details, lambda: None  # nobody asks
        fail(errno.EACCES)
        for page in range(599):
            in_thread(lambda: raises(uv.SourceError, lambda: bytes(b[page * PAGE : page * PAGE + 8])))
        errors.failure_details = details
        assert raises(uv.SourceError, lambda: bytes(b[599 * PAGE : 599 * PAGE + 8])).index == 599
        heal()
        for _ in range(400):
            if nr_placeholders() == 0:
                break
            time.sleep(0.02)
        assert bytes(b) == content(600)
        """
    )


def test_a_hundred_threads_without_the_gil_that_fail_together_are_all_told() -> None:
    # One thread takes the GIL for them, and has 64 places for who asks it.
    run(
        """
        file = make_file(128)
        region = uv.map(file.name, mode="r", service="native", deadline=0.6, **one_page)
        fail(delay_s=5, nowait=errno.EAGAIN)
        threads, told = start_readers(region.address, 100)
        ctypes.PyDLL(None).usleep(1500000)  # nobody else gets the GIL
        for thread in threads:
            thread.join()
        assert sorted(told) == [(page, uv.SourceTimeout) for page in range(100)], told
        sys.stdout.flush()
        os._exit(0)
        """
    )


def test_inline_threads_that_wait_to_be_told_hold_nothing_up() -> None:
    # 16 faults are served at a time. The main thread has the GIL, which those wait for that have failed.
    run(
        """
        file = make_file(64)
        region = uv.map(file.name, mode="r", service="inline", **one_page)
        address, out = region.address, ctypes.create_string_buffer(3 * PAGE)
        fail(errno.EACCES, delay_s=0.3)
        threads, told = start_readers(address, 40)
        def all_pages():
            ctypes.PyDLL(None).memmove(ctypes.byref(out), ctypes.c_void_p(address + 50 * PAGE), 3 * PAGE)
            for _ in range(20):
                len(out)
        began = time.monotonic()
        raises(uv.SourceError, all_pages)
        for thread in threads:
            thread.join()
        assert time.monotonic() - began < 20
        assert sorted(told) == [(page, uv.SourceError) for page in range(40)], told
        """
    )


def test_a_touch_while_a_placeholder_is_taken_away_waits() -> None:
    run(
        """
        file = make_file(64)
        region = uv.map(file.name, mode="r", service="native", **one_page)
        address, b = region.address, memoryview(region.buffer)
        inner = errors.failure_details
        touching, results = threading.Event(), []
        def other():
            buffer = ctypes.create_string_buffer(8)
            touching.wait()
            try:
                ctypes.memmove(buffer, address + 5 * PAGE, 8)
                for _ in range(20):
                    len(buffer)
                results.append(buffer.raw)
            except uv.SourceError as error:
                results.append(error.index)
        def details():
            errors.failure_details = inner
            heal()
            lib.uvm_inject(lib.UVM_OP_REGISTER, 0, 1, 0, int(1e9))  # a second in the middle of it
            touching.set()
            return inner()
        thread = threading.Thread(target=other)
        thread.start()
        errors.failure_details = details
        fail(errno.EACCES)
        raises(uv.SourceError, lambda: bytes(b[5 * PAGE : 5 * PAGE + 8]))
        thread.join()
        assert results in ([5], [content(6)[5 * PAGE : 5 * PAGE + 8]]), results
        """
    )


def test_poison_goes_by_itself_after_a_close_that_was_refused() -> None:
    run(
        """
        file = make_file(64)
        region = uv.map(file.name, mode="r", service="native", **one_page)
        b = memoryview(region.buffer)
        target = tempfile.TemporaryFile()
        fail(errno.EACCES)
        raises(OSError, os.write, target.fileno(), b[:PAGE])
        handle = region._ops.handle
        assert lib.uvm_region_close_begin(handle) == 0
        time.sleep(0.2)  # the janitor comes by
        assert lib.uvm_region_close_abort(handle) == 0
        heal()
        time.sleep(0.5)
        assert os.write(target.fileno(), b[:PAGE]) == PAGE
        """
    )


def test_a_page_that_a_told_thread_did_not_wait_for_gets_a_try_of_its_own() -> None:
    # The hash goes on in C over what it cannot have, step by step, for longer than the other's touch.
    run(
        """
        file = make_file(64)
        region = uv.map(file.name, mode="r", service="native", **one_page)
        address, b = region.address, memoryview(region.buffer)
        fail(errno.EACCES, delay_s=0.05, nowait=errno.EAGAIN)
        indices = []
        def hash_all():
            indices.append(raises(uv.SourceError, hashlib.sha256, b).index)
        hashing = threading.Thread(target=hash_all)
        hashing.start()
        while nr_placeholders() < 2:
            time.sleep(0)
        def touch():
            out = ctypes.create_string_buffer(8)
            ctypes.memmove(out, address + PAGE, 8)
            for _ in range(20):
                len(out)
        error = raises(uv.SourceError, touch)
        assert (error.index, error.errno) == (1, errno.EACCES), error
        hashing.join()
        assert indices == [0]
        heal()
        assert bytes(b) == content(64)
        """
    )


@pytest.mark.parametrize("service", ["native", "inline"])
def test_threads_that_retry_a_failing_page_are_told_each_time(service: str) -> None:
    # Each is in the middle of its C call over the other's placeholder again and again.
    run(
        f"""
        file = make_file(64)
        region = uv.map(file.name, mode="r", service="{service}", **one_page)
        a, address = region.array("uint8"), region.address
        fail(errno.EACCES)
        out = ctypes.create_string_buffer(8)
        def reduce():
            return int(a[:PAGE].sum())
        def copy():
            ctypes.memmove(out, address, 8)
            return out.raw
        told, untold, others = [], [], []
        def body(fn):
            end = time.monotonic() + 3
            while time.monotonic() < end:
                try:
                    untold.append(fn())
                except uv.SourceError as error:
                    told.append((error.index, error.errno))
                except BaseException as error:
                    others.append(error)
        threads = [threading.Thread(target=body, args=(fn,)) for fn in (reduce, copy, reduce, copy)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (untold, others) == ([], [])
        assert len(told) > 20 and set(told) == {{(0, errno.EACCES)}}, (len(told), set(told))
        heal()
        assert bytes(region.buffer) == content(64)
        """
    )


@pytest.mark.parametrize("service", ["native", "inline"])
def test_a_call_reads_again_what_it_has_stored(service: str) -> None:
    # Else a sort in place may run out of its array. Another thread lives: instructions are sent elsewhere.
    run(
        f"""
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
        file = make_file(8)
        region = uv.map(file.name, mode="c", service="{service}", **one_page)
        a = region.array("int64")
        for page in (0, 1, 2, 3, 4, 6, 7):
            a[page * 512]
        sums = np.frombuffer(content(8), "int64").copy()
        sums[5 * 512 : 6 * 512] = -1
        np.cumsum(sums, out=sums)
        fail()
        assert raises(uv.SourceError, lambda: np.cumsum(a, out=a)).index == 5
        assert (a[: 5 * 512] == sums[: 5 * 512]).all()
        assert (a[6 * 512 :] == sums[6 * 512 :]).all()
        assert nr_placeholders() == 0
        heal()
        assert a[5 * 512 : 6 * 512].tobytes() == content(8)[5 * PAGE : 6 * PAGE]
        os._exit(0)
        """
    )


def test_two_threads_that_fail_on_one_page_are_both_told() -> None:
    run(
        """
        file = make_file(64)
        region = uv.map(file.name, mode="r", service="native")
        a = region.array("uint8")
        fail(delay_s=0.05, nowait=errno.EAGAIN)  # both wait for the same page
        results = []
        def body():
            try:
                results.append(int(a[:8192].sum()))
            except uv.SourceError as error:
                results.append(type(error))
        for _ in range(10):
            threads = [threading.Thread(target=body) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            time.sleep(0.06)
        assert results == [uv.SourceError] * 60, results
        assert nr_placeholders() == 0
        heal()
        assert int(a.sum()) == sum(content(64))
        """
    )


@pytest.mark.parametrize(
    ("cause", "cls", "code"),
    [
        ("fail(errno.EIO)", "SourceError", "EIO"),
        ("fail(errno.EACCES)", "SourceError", "EACCES"),
        ("os.truncate(file.name, 3 * PAGE)", "SourceChanged", None),
        ("os.truncate(file.name, 0)", "SourceChanged", None),
        (
            "open(file.name, 'r+b').write(b'another version'); os.utime(file.name)",
            "SourceChanged",
            None,
        ),
        ("fail(delay_s=1.5, nowait=errno.EAGAIN)", "SourceTimeout", "ETIMEDOUT"),
    ],
    ids=["EIO", "EACCES", "truncated", "truncated to nothing", "replaced", "deadline"],
)
def test_each_cause_has_its_type(cause: str, cls: str, code: str | None) -> None:
    run(
        f"""
        file = make_file(64)
        region = uv.map(file.name, mode="r", service="native", deadline=0.4)
        b = memoryview(region.buffer)
        time.sleep(0.02)
        {cause}
        began = time.monotonic()
        error = raises(uv.{cls}, lambda: bytes(b[9 * PAGE + 7 : 9 * PAGE + 17]))
        assert time.monotonic() - began < 1.4
        assert type(error) is uv.{cls} and isinstance(error, OSError), error
        assert {code!r} in (None, errno.errorcode[error.errno]), error
        text = str(error)
        assert f"page 9" in text and f"{{9 * PAGE}}" in text, text
        """
    )


def test_threads_unknown_to_python_make_the_failure_sticky() -> None:
    run(
        """
        file = make_file(64)
        region = uv.map(file.name, mode="r", service="native")
        b = memoryview(region.buffer)
        libc = ctypes.CDLL(None)
        def native_thread(address):  # a pthread that runs strnlen(address), unknown to Python
            thread = ctypes.c_ulong()
            start = ctypes.cast(libc.strlen, ctypes.c_void_p)
            assert libc.pthread_create(ctypes.byref(thread), None, start, ctypes.c_void_p(address)) == 0
            assert libc.pthread_join(thread, None) == 0
        region.check()
        fail()
        native_thread(region.address + 7 * PAGE + 4000)
        heal()
        raises(uv.SourceError, lambda: region.load())
        error = raises(uv.SourceError, region.check)
        assert error.index == 7, error
        region.check()
        for _ in range(100):  # its placeholder goes by itself
            if nr_placeholders() == 0:
                break
            time.sleep(0.02)
        assert bytes(b[7 * PAGE : 8 * PAGE]) == content(64)[7 * PAGE : 8 * PAGE]
        """
    )


@pytest.mark.parametrize("blocked", ["SIGBUS", "SIGTRAP", "SIGUSR1"])
def test_a_thread_that_blocks_our_signals_cannot_be_told(blocked: str) -> None:
    """The kernel ends a process that may not be sent what its instruction has earned: as the page in the
    documents says, and never wrong data."""
    ours = blocked != "SIGUSR1"
    done = run(
        f"""
        region = uv.map(make_file(64).name, service="native", **one_page)
        b = region.buffer
        fail()
        def touch():
            signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.{blocked}}})
            error = raises(uv.SourceError, lambda: bytes(b[7 * PAGE : 7 * PAGE + 10]))
            print("told", error.index)
        in_thread(touch)
        """,
        status=-getattr(signal, blocked) if ours else 0,
    )
    assert ("told 7" in done.stdout) != ours


@pytest.mark.parametrize("service", ["native", "inline"])
@pytest.mark.parametrize("handler", ["enable", "disable"])
def test_sigbus_leaves_the_signal_to_do_what_it_does(handler: str, service: str) -> None:
    done = run(
        f"""
        faulthandler.{handler}()
        file = make_file(64)
        region = uv.map(file.name, mode="r", service="{service}", on_error="sigbus")
        other = uv.map(make_file(1).name, mode="r", service="native")  # our handler is installed
        fail()
        memoryview(region.buffer)[9 * PAGE]
        """,
        status=-signal.SIGBUS,
    )
    assert ("Fatal Python error: Bus error" in done.stderr) == (handler == "enable")


def test_foreign_sigbus_goes_to_the_handler_before_ours() -> None:
    done = run(
        """
        file = make_file(4)
        region = uv.map(file.name, mode="r", service="native")
        faulthandler.enable()  # over ours
        again = uv.map(file.name, mode="r", service="native")
        fail()
        raises(uv.SourceError, lambda: bytes(again.buffer[:4])) if lib.uvm_sigbus_in_force() else 0
        os.truncate(file.name, 0)
        mapping = mmap.mmap(os.open(file.name, os.O_RDWR), 0) if os.stat(file.name).st_size else None
        short = tempfile.TemporaryFile()
        short.truncate(4096)
        foreign = mmap.mmap(short.fileno(), 4096)
        short.truncate(0)
        foreign[0]
        """,
        status=-signal.SIGBUS,
    )
    assert done.stderr.count("Fatal Python error: Bus error") == 1, done.stderr


def test_signal_sent_by_somebody_is_passed_on() -> None:
    run(
        """
        region = uv.map(make_file(4).name, mode="r", service="native")
        faulthandler.disable()
        os.kill(os.getpid(), signal.SIGBUS)
        time.sleep(5)
        """,
        status=-signal.SIGBUS,
    )


def test_load_raises_an_ordinary_exception_ahead_of_use() -> None:
    run(
        """
        file = make_file(64)
        region = uv.map(file.name, mode="r", service="native")
        b = memoryview(region.buffer)
        fail()
        raises(uv.SourceError, region.load)
        raises(uv.SourceError, lambda: bytes(b[:8]))
        heal()
        region.load()
        assert bytes(b) == content(64)
        """
    )


def test_private_copies_survive_their_neighbours_failure() -> None:
    run(
        """
        file = make_file(2048)
        region = uv.map(file.name, mode="c", service="native")
        b, a = memoryview(region.buffer), region.array("uint8")
        expected = bytearray(content(2048))
        for page in range(3, 2048, 17):  # private copies between pages that will fail
            b[page * PAGE + 5] = 200
            expected[page * PAGE + 5] = 200
        fail()
        for _ in range(3):
            raises(uv.SourceError, a.sum)
            in_thread(lambda: raises(uv.SourceError, a.max))
        heal()
        assert bytes(b) == expected
        """
    )


def test_exception_swallowed_by_c_code_gives_its_placeholder_back() -> None:
    run(
        """
        file = make_file(64)
        region = uv.map(file.name, mode="r", service="native")
        b = memoryview(region.buffer)
        errors.failure_details = lambda: None  # nobody asks for details
        fail()
        raises(uv.SourceError, lambda: bytes(b[:8]))
        heal()
        assert nr_placeholders() == 1
        for _ in range(300):
            if nr_placeholders() == 0:
                break
            time.sleep(0.02)
        assert bytes(b[:64]) == content(1)[:64]
        """
    )


def test_handler_and_helper_threads_go_with_the_last_region() -> None:
    run(
        """
        def names():
            out = []
            for tid in os.listdir("/proc/self/task"):
                with open(f"/proc/self/task/{tid}/comm") as comm:
                    out.append(comm.read().strip())
            return out
        for _ in range(5):
            with uv.map(make_file(4).name, mode="r", service="native") as region:
                assert lib.uvm_sigbus_in_force()
                while not {"uvm-janitor", "uvm-raiser"} <= set(names()):
                    time.sleep(0.001)
                fail()
                raises(uv.SourceError, lambda: bytes(region.buffer[:4]))
                heal()
            assert not lib.uvm_sigbus_in_force()
            assert not {"uvm-janitor", "uvm-raiser"} & set(names()), names()
        """
    )


def test_exit_with_a_failing_thread_does_not_hang() -> None:
    run(
        """
        region = uv.map(make_file(4096).name, mode="r", service="native")
        a = region.array("uint8")
        fail()
        def body():
            while True:
                try:
                    a.sum()
                except uv.SourceError:
                    pass
        for _ in range(3):
            threading.Thread(target=body, daemon=True).start()
        time.sleep(0.3)
        """,
        timeout=20,
    )


# --- Ctrl-C -----------------------------------------------------------------------------------------

TOUCHES = {
    "subscript, GIL held": "bytes(b[5 * PAGE : 5 * PAGE + 3])",
    "reduction, no GIL": "a.sum()",
    "system call": "os.write(os.open('/dev/shm', os.O_TMPFILE | os.O_RDWR), b[: 2 * PAGE])",
}


def interrupt(code: str) -> tuple[subprocess.Popen[str], float, str]:
    """Starts the code, sends SIGINT when it says that it waits; returns how long it lived on."""
    child = subprocess.Popen(
        [sys.executable, "-c", program(code, PRELUDE)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "waiting\n"
    time.sleep(0.6)
    child.send_signal(signal.SIGINT)
    began = time.monotonic()
    line = child.stdout.readline()
    took = time.monotonic() - began
    text = line + child.stdout.read()
    child.wait(30)
    child.stdout.close()
    return child, took, text


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES.keys())
def test_ctrl_c_reaches_a_thread_that_waits_for_a_slow_source(touch: str) -> None:
    child, took, text = interrupt(
        f"""
        file = make_file(64)
        region = uv.map(file.name, mode="r", service="native", deadline=30)
        b, a = memoryview(region.buffer), region.array("uint8")
        fail(delay_s=3, nowait=errno.EAGAIN)
        print("waiting", flush=True)
        value = None
        try:
            try:
                value = {touch}
            except OSError as error:  # of a system call; the signal comes with the next bytecode
                assert error.errno == errno.EFAULT
            for _ in range(100):
                pass
        except KeyboardInterrupt:
            print("KeyboardInterrupt", value, flush=True)
        for _ in range(100):  # and only once
            pass
        heal()
        try:
            assert bytes(b) == content(64)  # the slow read may still run: then it is waited for
        except uv.SourceError as error:
            print(error)
        print("end", nr_placeholders())
        os._exit(0)
        """
    )
    assert text.startswith("KeyboardInterrupt None"), text
    assert took < 1.0, took
    assert "end 0" in text and child.returncode == 0, text


def test_ctrl_c_with_a_handler_of_the_users_own() -> None:
    # The handler runs, and the touch still does not invent a value.
    _, took, text = interrupt(
        """
        file = make_file(64)
        region = uv.map(file.name, mode="r", service="native", deadline=30)
        b = memoryview(region.buffer)
        fail(delay_s=3, nowait=errno.EAGAIN)
        calls = []
        signal.signal(signal.SIGINT, lambda *_: calls.append(1))
        print("waiting", flush=True)
        value = None
        try:
            value = bytes(b[5 * PAGE : 5 * PAGE + 3])
        except KeyboardInterrupt:
            pass
        print("calls", len(calls), value, flush=True)
        os._exit(0)
        """
    )
    assert text.startswith("calls 1 None"), text
    assert took < 1.0, took
