"""The agent: what only the owner of the memory can do for the fault-service process, and what becomes of
faults when that process dies. In a child each: a mistake is a hang with the GIL held."""

from __future__ import annotations

import functools

import pytest

from tests.support import run_program
from uffd_vm.kernel.features import Feature

pytestmark = pytest.mark.requires(Feature.MISSING_SHMEM, Feature.POISON)

PRELUDE = """
from uffd_vm.service.python import python_service

DONTNEED, PROTECT_READ, FAILED, EVICT = 1, 2, 3, 4

class Peer:
    '''The other end of the agent's socket, in place of the service process.'''
    def __init__(self):
        lib.uvm_agent_stop()
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(5)
        self.process = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
        pidfd = os.pidfd_open(self.process.pid)
        assert lib.uvm_agent_start(theirs.fileno(), pidfd) == 0
        assert lib.uvm_agent_start(theirs.fileno(), pidfd) == -errno.EBUSY
        assert self.socket.recv(8) == bytes(8)  # it asks whether we live: now we may read faults
        theirs.close()  # the agent has copies
        os.close(pidfd)
        self.seq = 0

    def ask(self, op, region, index=0, nr_pages=1, kind=0, err=0):
        self.seq += 1
        self.socket.send(struct.pack("<IiqQQiI", op, kind, region, index, nr_pages, err, self.seq))
        seq, rc = struct.unpack("<Ii", self.socket.recv(8))
        assert seq == self.seq
        return rc

    def close(self):
        lib.uvm_agent_stop()
        self.process.kill()
        self.process.wait()
        self.socket.close()
"""

run = functools.partial(run_program, prelude=PRELUDE)


def test_requests_are_checked_against_region_and_generation() -> None:
    run(
        """
        region = uv.map(file.name, mode="r", service="python")
        [handle] = [d.handle for d in python_service().regions()]
        peer = Peer()
        assert peer.ask(DONTNEED, handle, 0, 64) == 0
        assert peer.ask(DONTNEED, handle, 63, 2) == -errno.EINVAL
        assert peer.ask(DONTNEED, handle, 64, 1) == -errno.EINVAL
        assert peer.ask(DONTNEED, handle, 1, (1 << 64) - 1) == -errno.EINVAL
        assert peer.ask(DONTNEED, handle, 0, 0) == -errno.EINVAL
        assert peer.ask(99, handle) == -errno.EINVAL
        assert peer.ask(FAILED, handle, kind=0) == -errno.EINVAL
        assert peer.ask(FAILED, handle, kind=77) == -errno.EINVAL
        assert peer.ask(FAILED, handle, kind=1, err=5) == 0
        assert peer.ask(DONTNEED, handle + (1 << 32)) == -errno.ESTALE
        for stale in (0, -1, 1 << 60, 12345):
            assert peer.ask(DONTNEED, stale) == -errno.ESTALE, stale
        peer.socket.send(b"short")
        assert struct.unpack("<Ii", peer.socket.recv(8)) == (0, -errno.EINVAL)
        peer.socket.send(bytes(41))
        assert struct.unpack("<Ii", peer.socket.recv(8))[1] == -errno.EINVAL
        assert peer.ask(PROTECT_READ, handle, 3) == 0
        peer.close()
        """
    )


def test_death_of_the_service_fails_new_faults_and_those_already_waiting() -> None:
    run(
        """
        region = uv.map(file.name, mode="r", service="python", deadline=30)
        b, a = memoryview(region.buffer), region.array("uint8")
        assert bytes(b[:8]) == data[:8]
        service = python_service()
        os.kill(service.pid, signal.SIGSTOP)
        # From outside: who waits in the fault may hold the GIL. Some of the messages were read, some not.
        script = f"sleep 0.4; kill -KILL {service.pid}"
        killer = subprocess.Popen(["sh", "-c", script], stdout=subprocess.DEVNULL)
        errors = []
        def touch():
            errors.append(raises(uv.PagerDied, lambda: int(a[20 * PAGE : 40 * PAGE].sum())))
        threads = [threading.Thread(target=touch) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        killer.wait()
        assert len(errors) == 3 and all(type(e) is uv.PagerDied for e in errors)
        began = time.monotonic()
        error = raises(uv.PagerDied, lambda: bytes(b[50 * PAGE : 50 * PAGE + 8]))
        assert time.monotonic() - began < 1 and error.errno == errno.EPIPE and error.index == 50
        assert bytes(b[:8]) == data[:8]  # what is there stays there
        """
    )


def test_hangup_of_the_socket_is_death_too() -> None:
    run(
        """
        region = uv.map(file.name, mode="r", service="python", deadline=30)
        b = memoryview(region.buffer)
        service = python_service()
        peer = Peer()
        os.kill(service.pid, signal.SIGSTOP)
        peer.socket.close()
        raises(uv.PagerDied, lambda: bytes(b[:8]))
        os.kill(service.pid, signal.SIGCONT)
        peer.close()
        """
    )


def test_service_killed_at_once_under_many_touches() -> None:
    run(
        """
        region = uv.map(file.name, mode="r", service="python", fault_around_bytes=4096, deadline=30)
        b = memoryview(region.buffer)
        service = python_service()
        seen = []
        def touch(first):
            for page in range(first, 64, 4):
                try:
                    part = bytes(b[page * PAGE : page * PAGE + 64])
                    seen.append(part == data[page * PAGE : page * PAGE + 64])
                except uv.PagerDied:
                    seen.append(True)
        threads = [threading.Thread(target=touch, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.002)
        os.kill(service.pid, signal.SIGKILL)
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert seen == [True] * 64, seen
        """
    )
