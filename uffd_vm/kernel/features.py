"""What this kernel offers and what this process may use of it: probed, never guessed from a version.

Facts: a successful UFFDIO_API is final, and features=0 answers the full mask. So `probe()` asks on a
throw-away descriptor. userfaultfd is opened in the order syscall, /dev/userfaultfd; the third way,
USER_MODE_ONLY, is taken only when opted into (UFFD_VM_USER_MODE_ONLY=1), since a system call that touches a
missing page then fails with EFAULT or is a short write instead of waiting.

`LIBRARY_FEATURES` says for each part of the library what it needs and what happens without.
UFFD_VM_MASK_FEATURES="POISON,MOVE,PAGEMAP_SCAN" hides features, so that tests see older kernels.
"""

from __future__ import annotations

import enum
import errno
import functools
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from uffd_vm.errors import FeatureUnavailable, InvalidArgument, PermissionUnavailable
from uffd_vm.kernel import mapping
from uffd_vm.kernel._lib import check, ffi, lib

__all__ = [
    "ALL_FEATURES",
    "KERNELS",
    "LIBRARY_FEATURES",
    "NATIVE_FEATURES",
    "USER_MODE_ONLY",
    "Cure",
    "Feature",
    "LibraryFeature",
    "Probe",
    "Way",
    "configure_native",
    "cures",
    "open_raw",
    "probe",
    "require",
    "require_library",
    "require_open",
]

USER_MODE_ONLY = 1  # UFFD_USER_MODE_ONLY


class Feature(enum.IntFlag):
    """UFFD_FEATURE_*"""

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15
    MOVE = 1 << 16


ALL_FEATURES = Feature(0x1FFFF)

NATIVE_FEATURES = (
    Feature.PAGEFAULT_FLAG_WP
    | Feature.MISSING_SHMEM
    | Feature.MINOR_SHMEM
    | Feature.THREAD_ID
    | Feature.EVENT_REMAP
    | Feature.WP_HUGETLBFS_SHMEM
    | Feature.WP_UNPOPULATED
    | Feature.POISON
)
"""What the fault service asks for, as far as the kernel has it. No other event: an event that nobody
reads blocks the application for ever."""


class Way(enum.Enum):
    """How a userfaultfd is opened."""

    SYSCALL = "syscall"
    DEVICE = "/dev/userfaultfd"
    USER_MODE_ONLY = "user mode only"


@dataclass(frozen=True)
class Probe:
    """What was found. `refused` has the errno of each way that does not work."""

    release: str
    way: Way | None
    """The way that is used; None: there is none."""
    features: Feature
    """Of the kernel, without those masked; of nothing if no way works."""
    pagemap_scan: bool
    refused: Mapping[Way, int]
    masked: frozenset[str]

    @property
    def usable(self) -> bool:
        return self.way is not None


def open_raw(way: Way, flags: int) -> int:
    """A userfaultfd before its handshake, or -errno."""
    if way is Way.DEVICE:
        return lib.uvm_uffd_from_device(flags)
    return lib.uvm_userfaultfd(flags | (USER_MODE_ONLY if way is Way.USER_MODE_ONLY else 0))


def _ask_features(fd: int) -> Feature:
    mask = ffi.new("uint64_t *", 0)
    check(lib.uvm_uffd_api(fd, mask, ffi.new("uint64_t *")), "UFFDIO_API")
    return Feature(mask[0]) & ALL_FEATURES


def _mask(environ: Mapping[str, str]) -> frozenset[str]:
    names = {n.strip() for n in environ.get("UFFD_VM_MASK_FEATURES", "").split(",") if n.strip()}
    known = {*Feature.__members__, "PAGEMAP_SCAN"}
    if unknown := sorted(names - known):
        raise InvalidArgument(
            f"UFFD_VM_MASK_FEATURES: no feature {unknown[0]!r}; there are {', '.join(sorted(known))}"
        )
    return frozenset(names)


@functools.cache
def _probe(masked: frozenset[str], user_mode_only: bool) -> Probe:
    refused: dict[Way, int] = {}
    chosen: Way | None = None
    features = Feature(0)
    for way in Way:
        fd = open_raw(way, os.O_CLOEXEC | os.O_NONBLOCK)
        if fd < 0:
            refused[way] = -fd
            continue
        try:
            found = _ask_features(fd)
        finally:
            os.close(fd)
        if chosen is None and (way is not Way.USER_MODE_ONLY or user_mode_only):
            chosen, features = way, found
    for name in masked & Feature.__members__.keys():
        features &= ~Feature[name]
    return Probe(
        release=os.uname().release,
        way=chosen,
        features=features,
        pagemap_scan="PAGEMAP_SCAN" not in masked and mapping.pagemap_scan_available(),
        refused=refused,
        masked=masked,
    )


def probe(*, user_mode_only: bool | None = None, environ: Mapping[str, str] = os.environ) -> Probe:
    """What this kernel offers and this process may use. Asked once per set of options.

    `user_mode_only` opts into the degraded way; None: UFFD_VM_USER_MODE_ONLY says.
    """
    if user_mode_only is None:
        user_mode_only = environ.get("UFFD_VM_USER_MODE_ONLY", "") not in ("", "0")
    return _probe(_mask(environ), user_mode_only)


def forget() -> None:
    """Makes the next `probe()` ask again: after the uid or a device's permissions changed."""
    _probe.cache_clear()


# --- what is missing, and its cure


@dataclass(frozen=True)
class Cure:
    """One thing that is wrong, and what to type against it."""

    problem: str
    commands: tuple[str, ...]


def _in_container() -> bool:
    return Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()


def cures(found: Probe) -> list[Cure]:
    """Why no full userfaultfd is to be had, and each way out, the least invasive first; [] if it is."""
    if found.way in (Way.SYSCALL, Way.DEVICE):
        return []
    syscall = found.refused.get(Way.SYSCALL, 0)
    device = found.refused.get(Way.DEVICE, 0)
    if syscall == errno.ENOSYS and device == errno.ENOENT:
        return [
            Cure(
                "this kernel has no userfaultfd (or a sandbox such as gVisor hides it)",
                ("use a Linux kernel built with CONFIG_USERFAULTFD=y, 5.15 or later",),
            )
        ]
    result: list[Cure] = []
    if device == errno.EACCES:
        command = f"sudo setfacl -m u:{os.geteuid()}:rw /dev/userfaultfd"
        if shutil.which("setfacl") is None:
            command += "   # setfacl: apt-get install acl"
        result.append(Cure("/dev/userfaultfd is not open to this user", (command,)))
    if device in (errno.ENOENT, errno.EPERM) and _in_container():
        result.append(
            Cure(
                "the container does not have /dev/userfaultfd (Linux 6.1 or later)",
                ("docker run --device /dev/userfaultfd ...",),
            )
        )
    if syscall in (errno.EPERM, errno.EACCES, errno.ENOSYS):
        if Way.USER_MODE_ONLY in found.refused:
            result.append(
                Cure(
                    "a seccomp profile blocks the system call userfaultfd",
                    (
                        "allow `userfaultfd` in the profile: docker run --security-opt "
                        "seccomp=profile.json ...",
                    ),
                )
            )
        else:
            result.append(
                Cure(
                    "faults taken inside system calls need a privilege",
                    (
                        "sudo sysctl vm.unprivileged_userfaultfd=1",
                        "or give the program CAP_SYS_PTRACE",
                    ),
                )
            )
    if Way.USER_MODE_ONLY not in found.refused and found.way is None:  # else it is opted into
        result.append(
            Cure(
                "as a last resort, the degraded mode works: system calls on missing pages then fail "
                "with EFAULT or are cut short, unless region.ensure() was called before",
                ("export UFFD_VM_USER_MODE_ONLY=1",),
            )
        )
    return result


def require_open(found: Probe | None = None) -> Way:
    """The way to open a userfaultfd. Raises PermissionUnavailable with what to do."""
    found = found or probe()
    if found.way is not None:
        return found.way
    lines = [f"{cure.problem}: {'; '.join(cure.commands)}" for cure in cures(found)] or [
        "the kernel refuses it for an unknown reason"
    ]
    raise PermissionUnavailable("userfaultfd is not available. " + " | ".join(lines))


def require(features: Feature, found: Probe | None = None) -> None:
    """Raises FeatureUnavailable if the kernel lacks one of `features`."""
    found = found or probe()
    if lacking := features & ~found.features:
        names = ", ".join(f.name or "" for f in Feature if f & lacking)
        first = max(FIRST_KERNEL[f] for f in Feature if f & lacking)
        raise FeatureUnavailable(
            f"userfaultfd of Linux {found.release} lacks {names}; Linux "
            f"{first[0]}.{first[1]} or later has it"
        )


# --- the library's features, and what each kernel gives

FIRST_KERNEL: Mapping[Feature, tuple[int, int]] = {
    Feature.PAGEFAULT_FLAG_WP: (5, 7),
    Feature.EVENT_FORK: (4, 11),
    Feature.EVENT_REMAP: (4, 11),
    Feature.EVENT_REMOVE: (4, 11),
    Feature.MISSING_HUGETLBFS: (4, 11),
    Feature.MISSING_SHMEM: (4, 11),
    Feature.EVENT_UNMAP: (4, 11),
    Feature.SIGBUS: (4, 14),
    Feature.THREAD_ID: (4, 14),
    Feature.MINOR_HUGETLBFS: (5, 13),
    Feature.MINOR_SHMEM: (5, 14),
    Feature.EXACT_ADDRESS: (5, 18),
    Feature.WP_HUGETLBFS_SHMEM: (5, 19),
    Feature.WP_UNPOPULATED: (6, 4),
    Feature.POISON: (6, 6),
    Feature.WP_ASYNC: (6, 7),
    Feature.MOVE: (6, 8),
}
"""For messages only: what there is, is probed."""

PAGEMAP_SCAN_KERNEL = (6, 7)
KERNELS: tuple[tuple[int, int], ...] = ((5, 15), (6, 1), (6, 8), (6, 18))
"""The kernels that the feature table shows: long-term ones of the distributions, and the newest."""


@dataclass(frozen=True)
class LibraryFeature:
    """A part of the library, what it needs, and what happens without.

    `fallback` says what is done instead; None: FeatureUnavailable is raised, and `refusal` says so.
    """

    name: str
    needs: Feature
    fallback: str | None = None
    refusal: str = ""
    needs_pagemap_scan: bool = False

    def works(self, features: Feature, pagemap_scan: bool) -> bool:
        return not self.needs & ~features and (pagemap_scan or not self.needs_pagemap_scan)


_FAILABLE = (
    Feature.POISON | Feature.EVENT_REMAP
)  # a page that cannot be had is marked, then shown again

LIBRARY_FEATURES: tuple[LibraryFeature, ...] = (
    LibraryFeature(
        "lazy files: uv.map(), modes r and c",
        Feature.MISSING_SHMEM | _FAILABLE,
        refusal="map with service='kernel', which is the kernel's own mmap",
    ),
    LibraryFeature(
        "writable files: uv.map(), mode r+",
        Feature.MISSING_SHMEM
        | Feature.MINOR_SHMEM
        | Feature.PAGEFAULT_FLAG_WP
        | Feature.WP_HUGETLBFS_SHMEM
        | _FAILABLE,
        refusal="map with service='kernel', which is the kernel's own mmap",
    ),
    LibraryFeature(
        "anonymous memory: uv.anonymous()",
        Feature(0),
        refusal="np.zeros() gives the same memory, and nobody sees its faults",
    ),
    LibraryFeature(
        "write tracking: track=True",
        Feature.PAGEFAULT_FLAG_WP,
        refusal="do not ask for tracking",
    ),
    LibraryFeature(
        "typed errors of failed pages",
        _FAILABLE,
        refusal="memory that can fail is refused: a failed page could not be told apart from data",
    ),
    LibraryFeature(
        "counts of private pages: residency()",
        Feature(0),
        fallback="mapped pages are counted by our own table, dirty private bytes read 0",
        needs_pagemap_scan=True,
    ),
)


def kernel_features(kernel: tuple[int, int]) -> Feature:
    """The features that a mainline kernel of this version has."""
    return functools.reduce(
        lambda acc, f: acc | (f if FIRST_KERNEL[f] <= kernel else Feature(0)), Feature, Feature(0)
    )


def require_library(name: str, found: Probe | None = None) -> bool:
    """True if the library feature whose name starts with `name` works here, False if its fallback does.

    Raises FeatureUnavailable where there is no fallback.
    """
    found = found or probe()
    feature = next((f for f in LIBRARY_FEATURES if f.name.startswith(name)), None)
    if feature is None:
        raise InvalidArgument(f"the library has no feature {name!r}")
    require_open(found)
    if feature.works(found.features, found.pagemap_scan):
        return True
    if feature.fallback is not None:
        return False
    try:
        require(feature.needs, found)
    except FeatureUnavailable as error:
        raise FeatureUnavailable(f"{feature.name}: {error}. Instead: {feature.refusal}") from None
    raise FeatureUnavailable(f"{feature.name}: needs PAGEMAP_SCAN. Instead: {feature.refusal}")


_NR_WORKERS = 2  # that may wait for the disk at a time
_SPIN_NS = 50_000  # docs/adr/0010: how long the fault thread looks for the next fault


def configure_native() -> None:
    """Tells native code how userfaultfds are opened here, with which features. Once, before regions.

    Raises PermissionUnavailable or FeatureUnavailable with what to do.
    """
    found = probe()
    way = require_open(found)
    require(Feature.MISSING_SHMEM | Feature.THREAD_ID, found)
    config = ffi.new(
        "struct uvm_config *",
        {
            "uffd_features": int(NATIVE_FEATURES & found.features),
            "uffd_flags": os.O_CLOEXEC
            | os.O_NONBLOCK
            | (USER_MODE_ONLY if way is Way.USER_MODE_ONLY else 0),
            "uffd_from_device": way is Way.DEVICE,
            "nr_workers": _NR_WORKERS,
            "spin_ns": _SPIN_NS,
        },
    )
    check(lib.uvm_configure(config), "uvm_configure")
