"""Builds uffd_vm._native: one cffi extension module from native/*.c.

The marked part of native/uffd_vm.h is the cdef, as it stands: there is no second copy of a
declaration. The policy (uffd_vm/fault/) is compiled to byte tables first: its c_source() becomes
policy_tables.h in the build directory, which native code includes.

Used by setup.py. By hand: `python native/build.py [DIR]` writes policy_tables.h (into DIR).
"""

import importlib
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from cffi import FFI

# Paths below are relative to the project's root, where setuptools runs: it wants them so.
ROOT = Path(globals().get("__file__", "native/build.py")).resolve().parent.parent
NATIVE = Path("native")
POLICY_DIR = Path("build/policy")
CFLAGS = ["-O2", "-g", "-Wall", "-Wextra", "-Werror", "-std=gnu11", "-pthread"]
# In the file that cffi generates: its functions take arguments that they do not use.
PREAMBLE = """
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#include "uffd_vm.h"
"""


def check_toolchain() -> None:
    """Says what is missing and its cure, before a compiler says it in a hundred lines."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    cc = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if not (shutil.which(cc) or shutil.which("cc")):
        raise SystemExit(
            f"uffd_vm: no C compiler ({cc}). Install one: apt-get install gcc libc6-dev"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise SystemExit(
            f"uffd_vm: Python.h of Python {version} is missing. Install it: "
            f"apt-get install python{version}-dev"
        )


def cdef() -> str:
    header = (ROOT / NATIVE / "uffd_vm.h").read_text(encoding="utf-8")
    return header.split("/* cdef begin */")[1].split("/* cdef end */")[0]


def load_policy() -> ModuleType:
    """uffd_vm.fault.table, without running uffd_vm/__init__.py: that needs the extension."""
    before = {name: sys.modules[name] for name in sys.modules if name.split(".")[0] == "uffd_vm"}
    for name in before:
        del sys.modules[name]
    parent = ModuleType("uffd_vm")
    parent.__path__ = [str(ROOT / "uffd_vm")]
    sys.modules["uffd_vm"] = parent
    try:
        return importlib.import_module("uffd_vm.fault.table")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "uffd_vm"]:
            del sys.modules[name]
        sys.modules.update(before)


def write_policy_tables(directory: Path = ROOT / POLICY_DIR) -> Path:
    """Writes policy_tables.h if it is not what is there: an unchanged file rebuilds nothing."""
    path = directory / "policy_tables.h"
    text = load_policy().c_source()
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        directory.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f"{path.name}.{os.getpid()}")
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    return path


def make_ffibuilder() -> FFI:
    ffi = FFI()
    ffi.cdef(cdef())
    headers = sorted(str(NATIVE / p.name) for p in (ROOT / NATIVE).glob("*.h"))
    policy = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "uffd_vm" / "fault").glob("*.py"))
    ffi.set_source(
        "uffd_vm._native",
        PREAMBLE,
        sources=sorted(str(NATIVE / p.name) for p in (ROOT / NATIVE).glob("*.c")),
        include_dirs=[str(NATIVE), str(POLICY_DIR)],
        depends=[*headers, *policy, str(NATIVE / "build.py")],
        extra_compile_args=[*CFLAGS, "-fvisibility=hidden"],
        extra_link_args=["-pthread"],
        # callback.c calls PyThreadState_SetAsyncExc: built for one version of Python, not abi3.
        py_limited_api=False,
        define_macros=[("_GNU_SOURCE", None)],
    )
    return ffi


if __name__ == "__main__":
    print(write_policy_tables(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / POLICY_DIR))
elif __name__ == "__cffi__":
    ffibuilder = make_ffibuilder()
