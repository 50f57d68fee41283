"""Probing, masking, and what a kernel or a user without a feature is told."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import struct
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

import uffd_vm as uv
from uffd_vm.cli import main
from uffd_vm.errors import FeatureUnavailable, InvalidArgument, PermissionUnavailable
from uffd_vm.kernel import features
from uffd_vm.kernel.features import ALL_FEATURES, LIBRARY_FEATURES, Feature, Probe, Way


def found(**changes) -> Probe:
    values = {
        "release": "5.15.0",
        "way": Way.SYSCALL,
        "features": ALL_FEATURES,
        "pagemap_scan": True,
        "refused": {},
        "masked": frozenset(),
    }
    return Probe(**{**values, **changes})


# --- masking


@pytest.mark.requires()
def test_masked_feature_is_not_there():
    plain = features.probe(environ={})
    masked = features.probe(environ={"UFFD_VM_MASK_FEATURES": "POISON, PAGEMAP_SCAN"})
    assert masked.features == plain.features & ~Feature.POISON
    assert not masked.pagemap_scan
    assert masked.masked == {"POISON", "PAGEMAP_SCAN"}


def test_masking_an_unknown_feature_is_refused():
    with pytest.raises(InvalidArgument, match="no feature 'POISSON'"):
        features.probe(environ={"UFFD_VM_MASK_FEATURES": "POISSON"})


@pytest.mark.requires(Feature.POISON)
def test_masking_works_through_the_environment(monkeypatch):
    monkeypatch.setenv("UFFD_VM_MASK_FEATURES", "POISON")
    with pytest.raises(FeatureUnavailable, match=r"lacks POISON; Linux 6\.6 or later"):
        features.require(Feature.POISON | Feature.MISSING_SHMEM)


# --- refusals say what to do


def test_missing_feature_names_the_kernel_that_has_it():
    with pytest.raises(FeatureUnavailable, match=r"Linux 5\.15\.0 lacks MOVE; Linux 6\.8"):
        features.require(Feature.MOVE, found(features=Feature.MISSING_SHMEM))


def test_library_feature_works_falls_back_or_is_refused():
    old = found(features=features.kernel_features((5, 15)), pagemap_scan=False)
    assert features.require_library("anonymous memory", old) is True
    assert features.require_library("counts of private pages", old) is False
    for files in ("lazy files", "writable files"):
        with pytest.raises(FeatureUnavailable, match="Instead: map with service='kernel'"):
            features.require_library(files, old)


@pytest.mark.parametrize(
    "masked, call, lacks",
    [
        ("POISON", "uv.map(path, 'r', service='native')", "POISON"),
        ("MINOR_SHMEM", "uv.map(path, 'r+', service='native')", "MINOR_SHMEM"),
        ("MISSING_SHMEM", "uv.map(path, 'c', service='python')", "MISSING_SHMEM"),
        ("PAGEFAULT_FLAG_WP", "uv.anonymous(4096, track=True)", "PAGEFAULT_FLAG_WP"),
    ],
)
def test_a_region_is_refused_by_what_it_needs(masked, call, lacks, tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(b"x" * 4096)
    monkeypatch.setenv("UFFD_VM_MASK_FEATURES", masked)
    with pytest.raises(FeatureUnavailable, match=lacks):
        eval(call, {"uv": uv, "path": path})


def test_an_unknown_library_feature_is_refused():
    old = found(features=features.kernel_features((5, 15)), pagemap_scan=False)
    with pytest.raises(InvalidArgument):
        features.require_library("no such thing", old)


def test_every_library_feature_says_what_happens_without_it():
    for feature in LIBRARY_FEATURES:
        assert feature.fallback or feature.refusal, feature.name


@pytest.mark.parametrize(
    "kernel, lacks",
    [
        ((5, 15), "EXACT_ADDRESS WP_HUGETLBFS_SHMEM WP_UNPOPULATED POISON WP_ASYNC MOVE"),
        ((6, 1), "WP_UNPOPULATED POISON WP_ASYNC MOVE"),
        ((6, 8), ""),
        ((6, 18), ""),
    ],
)
def test_features_of_the_kernels_in_the_table(kernel, lacks):
    missing = ALL_FEATURES & ~features.kernel_features(kernel)
    assert {f.name for f in Feature if f & missing} == set(lacks.split())


@pytest.mark.parametrize(
    "refused, cure",
    [
        ({Way.SYSCALL: errno.EPERM, Way.DEVICE: errno.EACCES}, "sudo setfacl -m u:"),
        ({Way.SYSCALL: errno.EPERM, Way.DEVICE: errno.ENOENT}, "vm.unprivileged_userfaultfd=1"),
        (
            {
                Way.SYSCALL: errno.EPERM,
                Way.DEVICE: errno.ENOENT,
                Way.USER_MODE_ONLY: errno.EPERM,
            },
            "seccomp=profile.json",
        ),
        (
            {
                Way.SYSCALL: errno.ENOSYS,
                Way.DEVICE: errno.ENOENT,
                Way.USER_MODE_ONLY: errno.ENOSYS,
            },
            "CONFIG_USERFAULTFD",
        ),
    ],
    ids=["device", "sysctl", "seccomp", "kernel"],
)
def test_permission_error_says_the_cure(refused, cure):
    with pytest.raises(PermissionUnavailable) as error:
        features.require_open(found(way=None, features=Feature(0), refused=refused))
    assert cure in str(error.value)
    assert isinstance(error.value, PermissionError) and error.value.errno == errno.EPERM


def test_container_without_the_device_is_told_so(monkeypatch):
    monkeypatch.setattr(features, "_in_container", lambda: True)
    cures = features.cures(
        found(way=None, refused={Way.SYSCALL: errno.EPERM, Way.DEVICE: errno.ENOENT})
    )
    assert any("--device /dev/userfaultfd" in command for c in cures for command in c.commands)


def test_degraded_use_is_not_advised_to_whom_has_it():
    refused = {Way.SYSCALL: errno.EPERM, Way.DEVICE: errno.EACCES}
    commands = {
        way: [
            command
            for cure in features.cures(found(way=way, refused=refused))
            for command in cure.commands
        ]
        for way in (None, Way.USER_MODE_ONLY)
    }
    assert "export UFFD_VM_USER_MODE_ONLY=1" in commands[None]
    assert commands[Way.USER_MODE_ONLY] == commands[None][:-1]


def test_nothing_to_cure_where_all_works():
    assert features.cures(found()) == []


# --- a process that may not: map() and the doctor say the same

_BPF_LOAD, _BPF_JUMP_EQUAL, _BPF_RETURN = 0x20, 0x15, 0x06
_SECCOMP_ALLOW, _SECCOMP_ERRNO = 0x7FFF0000, 0x00050000
_NR_USERFAULTFD = {"x86_64": 323, "aarch64": 282}


def forbid_userfaultfd() -> int:
    """A container's seccomp profile: the system call userfaultfd is EPERM, everything else as before."""
    libc = ctypes.CDLL(None, use_errno=True)
    instructions = [
        struct.pack("HBBI", _BPF_LOAD, 0, 0, 0),  # the number of the system call
        struct.pack("HBBI", _BPF_JUMP_EQUAL, 0, 1, _NR_USERFAULTFD[platform.machine()]),
        struct.pack("HBBI", _BPF_RETURN, 0, 0, _SECCOMP_ERRNO | errno.EPERM),
        struct.pack("HBBI", _BPF_RETURN, 0, 0, _SECCOMP_ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(instructions))
    program = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(instructions), ctypes.addressof(code))
    )
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
        return -ctypes.get_errno()
    return 0


def in_child_without_permission(seccomp: bool) -> dict[str, object]:
    CliRunner().invoke(main, ["doctor", "--json"])  # imports, which somebody else may not
    if seccomp and (rc := forbid_userfaultfd()):
        return {"skip": os.strerror(-rc)}
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    features.forget()
    answer: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.bin"
        path.write_bytes(b"x" * 8192)
        for name, make in {
            "map": lambda: uv.map(path, service="native"),
            "anonymous": lambda: uv.anonymous(4096),
        }.items():
            try:
                make().close()
            except PermissionUnavailable as error:
                answer[name] = (error.errno, str(error))
        with uv.map(path) as region:  # "auto": the kernel's own mmap needs no permission
            answer["auto"] = (region.service, bytes(region.buffer[:2]))
    result = CliRunner().invoke(main, ["doctor", "--json"])
    answer["doctor"], answer["exit"] = json.loads(result.output), result.exit_code
    return answer


@pytest.mark.root
@pytest.mark.requires()
@pytest.mark.parametrize("seccomp", [False, True], ids=["no privilege", "seccomp"])
def test_map_and_the_doctor_name_the_same_cures(run_in_child, seccomp):
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("vm.unprivileged_userfaultfd is on; set it to 0")
    answer = run_in_child(in_child_without_permission, seccomp).value
    if "skip" in answer:
        pytest.skip(f"no seccomp filter here ({answer['skip']}); use a kernel with CONFIG_SECCOMP")
    assert answer["exit"] == 2 and answer["doctor"]["mode"] is None
    assert answer["auto"] == ("kernel", b"xx")
    problems = answer["doctor"]["problems"]
    assert problems
    for name in ("map", "anonymous"):
        code, text = answer[name]
        assert code == errno.EPERM
        for cure in problems:
            assert cure["problem"] in text
            assert all(command in text for command in cure["commands"])
    commands = " ".join(command for cure in problems for command in cure["commands"])
    assert ("seccomp=profile.json" in commands) is seccomp
    assert ("vm.unprivileged_userfaultfd=1" in commands) is not seccomp
    assert ("UFFD_VM_USER_MODE_ONLY=1" in commands) is not seccomp
