"""Opening a userfaultfd and the handshake."""

from __future__ import annotations

import errno
import os
import select
import struct
from pathlib import Path

import pytest

from tests.support import call
from uffd_vm.errors import UffdError
from uffd_vm.kernel import features
from uffd_vm.kernel._lib import ffi, lib
from uffd_vm.kernel.features import ALL_FEATURES, USER_MODE_ONLY, Feature, Way
from uffd_vm.kernel.uffd import RegisterMode, Uffd

pytestmark = pytest.mark.requires()

UFFDIO_API = 0xC018AA3F
NONBLOCK = os.O_CLOEXEC | os.O_NONBLOCK


@pytest.fixture(params=[Way.SYSCALL, Way.DEVICE], ids=["syscall", "device"])
def raw(request):
    """A userfaultfd before its handshake."""
    fd = features.open_raw(request.param, NONBLOCK)
    if fd < 0:
        pytest.skip(f"{request.param.value}: {os.strerror(-fd)}; see uffd-vm doctor")
    yield fd
    os.close(fd)


def api(fd: int, wanted: int) -> tuple[int, int]:
    mask = ffi.new("uint64_t *", wanted)
    return lib.uvm_uffd_api(fd, mask, ffi.new("uint64_t *")), mask[0]


def test_nothing_works_before_the_handshake(raw):
    assert lib.uvm_uffd_wake(raw, 0, 4096) == -errno.EINVAL
    with pytest.raises(OSError) as error:
        os.read(raw, 4096)
    assert error.value.errno == errno.EINVAL
    poll = select.poll()
    poll.register(raw, select.POLLIN)
    assert poll.poll(0)[0][1] & select.POLLERR


def test_another_version_of_the_api_is_refused(raw):
    request = bytearray(struct.pack("QQQ", 0xAB, 0, 0))
    buffer = ffi.from_buffer("char[]", request, require_writable=True)
    rc = call("ioctl", raw, UFFDIO_API, int(ffi.cast("uintptr_t", buffer)))
    assert rc == -errno.EINVAL


def test_unknown_feature_is_refused_and_the_descriptor_stays_usable(raw):
    assert api(raw, 1 << 63)[0] == -errno.EINVAL
    rc, offered = api(raw, 0)
    assert rc == 0
    assert Feature(offered & ALL_FEATURES) | features.probe().features == offered & ALL_FEATURES


def test_handshake_is_final(raw):
    assert api(raw, 0)[0] == 0
    assert api(raw, Feature.PAGEFAULT_FLAG_WP)[0] == -errno.EINVAL


def test_poll_on_a_blocking_descriptor_is_an_error(open_uffd):
    uffd = open_uffd(flags=os.O_CLOEXEC)
    poll = select.poll()
    poll.register(uffd.fileno(), select.POLLIN)
    assert poll.poll(0)[0][1] & select.POLLERR


def test_short_read_is_einval_and_empty_read_is_eagain(open_uffd):
    uffd = open_uffd()
    with pytest.raises(OSError) as error:
        os.read(uffd.fileno(), 31)
    assert error.value.errno == errno.EINVAL
    with pytest.raises(BlockingIOError):
        os.read(uffd.fileno(), 32)
    assert uffd.read() == []


def test_failed_open_leaks_no_descriptor(monkeypatch):
    monkeypatch.setattr(features, "require", lambda wanted: None)
    with pytest.raises(UffdError) as error:
        Uffd.open(Feature(1 << 40))
    assert error.value.errno == errno.EINVAL


def test_unclosed_uffd_warns():
    uffd = Uffd.open()
    fd = uffd.fileno()
    with pytest.warns(ResourceWarning, match="unclosed <Uffd"):
        del uffd
    with pytest.raises(OSError):
        os.fstat(fd)


def test_close_is_idempotent():
    with Uffd.open() as uffd:
        uffd.close()
        uffd.close()
        assert uffd.closed


# --- as nobody (run in a child: the uid does not come back)


def as_nobody() -> dict[str, object]:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    features.forget()
    found = features.probe(user_mode_only=False)
    opted = features.probe(user_mode_only=True)
    fork = features.open_raw(Way.USER_MODE_ONLY, NONBLOCK)
    answer = {
        "syscall": lib.uvm_userfaultfd(NONBLOCK),
        "device": lib.uvm_uffd_from_device(NONBLOCK),
        "user mode": lib.uvm_userfaultfd(NONBLOCK | USER_MODE_ONLY),
        "way": found.way,
        "opted": opted.way,
        "fork": api(fork, Feature.EVENT_FORK)[0],
        "fork retry": api(fork, Feature.EVENT_REMAP)[0],
        "cures": [command for cure in features.cures(found) for command in cure.commands],
    }
    try:
        Uffd.open()
    except PermissionError as error:
        answer["error"] = str(error)
    return answer


@pytest.mark.root
def test_without_privilege_only_user_mode_faults_are_served(run_in_child):
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("vm.unprivileged_userfaultfd is on; set it to 0")
    answer = run_in_child(as_nobody).value
    assert answer["syscall"] == -errno.EPERM
    assert answer["device"] in (-errno.EACCES, -errno.ENOENT)
    assert answer["user mode"] >= 0
    assert answer["way"] is None and answer["opted"] is Way.USER_MODE_ONLY
    assert answer["fork"] == -errno.EPERM and answer["fork retry"] == 0
    assert "sudo sysctl vm.unprivileged_userfaultfd=1" in answer["cures"]
    assert "export UFFD_VM_USER_MODE_ONLY=1" in answer["cures"]
    assert "vm.unprivileged_userfaultfd" in answer["error"]


def test_register_modes_are_named_as_in_the_kernel():
    assert [m.value for m in RegisterMode] == [1, 2, 4]


def test_each_userfaultfd_has_an_inode_of_its_own(raw):
    """By which native/keeper.c tells it from a file that has its number now."""
    other = features.open_raw(Way.SYSCALL, NONBLOCK)
    if other < 0:
        other = features.open_raw(Way.DEVICE, NONBLOCK)
    copy = os.dup(raw)
    try:
        found = [(st.st_dev, st.st_ino) for st in map(os.fstat, (raw, copy, other))]
        assert found[0] == found[1] != found[2]
    finally:
        os.close(copy)
        os.close(other)
