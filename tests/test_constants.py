"""Constants written by hand in Python and in native/uapi.h, against the compiler's and the headers'."""

from __future__ import annotations

import enum
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import support
from uffd_vm.fault.table import compile_tables
from uffd_vm.kernel import features, mapping, msg, uffd
from uffd_vm.kernel._lib import ffi, lib

ROOT = Path(__file__).parent.parent


def members(prefix: str, members: type[enum.IntEnum] | type[enum.IntFlag]) -> dict[str, int]:
    return {prefix + name: int(member) for name, member in members.__members__.items()}


# C name -> our value. A name that this machine's headers do not have yet is left out by #ifdef.
MACROS: dict[str, int] = {
    **members("UFFD_FEATURE_", features.Feature),
    **members("UFFD_EVENT_", msg.Event),
    **members("UFFD_PAGEFAULT_FLAG_", msg.PagefaultFlag),
    **members("UFFDIO_REGISTER_MODE_", uffd.RegisterMode),
    **members("UFFDIO_COPY_MODE_", uffd.CopyMode),
    **members("UFFDIO_CONTINUE_MODE_", uffd.CopyMode),
    **members("UFFDIO_WRITEPROTECT_MODE_", uffd.WpMode),
    **members("UFFDIO_MOVE_MODE_", uffd.MoveMode),
    **members("PAGE_IS_", mapping.PageCategory),
    "PM_SCAN_WP_MATCHING": mapping.ScanFlag.WP_MATCHING,
    "PM_SCAN_CHECK_WPASYNC": mapping.ScanFlag.CHECK_WPASYNC,
    "UFFD_USER_MODE_ONLY": features.USER_MODE_ONLY,
    **{f"_UFFDIO_{m.name}": int(m).bit_length() - 1 for m in uffd.RangeIoctl},
    **{
        name: getattr(support, name)
        for name in dir(support)
        if name.startswith(("MADV_", "MAP_", "MREMAP_", "MFD_"))
    },
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, int]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("no C compiler; apt-get install gcc libc6-dev")
    directory = tmp_path_factory.mktemp("constants")
    lines = [
        "#define _GNU_SOURCE",
        "#include <stdio.h>",
        "#include <sys/mman.h>",
        "#include <linux/fs.h>",
        "#include <linux/userfaultfd.h>",
        '#include "uapi.h"',
        "int main(void) {",
    ]
    for name in MACROS:
        lines += [
            f"#ifdef {name}",
            f'printf("{name} %llu\\n", (unsigned long long){name});',
            "#endif",
        ]
    # The values that uapi.h writes down itself, where the kernel's own header has them too.
    for ours in re.findall(r"^#define UVM_(\w+)", (ROOT / "native/uapi.h").read_text(), re.M):
        if ours == "UAPI_H":
            continue
        theirs = ours if ours.startswith(("UFFDIO", "PAGEMAP")) else None
        theirs = theirs or ("UFFD_" + ours if ours.startswith("FEATURE") else "UFFDIO_" + ours)
        lines += [
            f"#ifdef {theirs}",
            f'printf("UVM_{ours} %llu\\n", (unsigned long long)UVM_{ours});',
            f'printf("same:UVM_{ours} %llu\\n", (unsigned long long){theirs});',
            "#endif",
        ]
    source = directory / "constants.c"
    source.write_text("\n".join([*lines, "return 0; }", ""]))
    subprocess.run(
        [compiler, f"-I{ROOT / 'native'}", str(source), "-o", str(directory / "constants")],
        check=True,
    )
    out = subprocess.run(
        [str(directory / "constants")], capture_output=True, text=True, check=True
    ).stdout
    return {name: int(value) for name, value in (line.split() for line in out.splitlines())}


@pytest.mark.parametrize("name", MACROS)
def test_constant_is_the_compilers(compiled, name):
    if name in compiled:
        assert MACROS[name] == compiled[name]
    else:
        # Newer than this machine's headers; the running kernel's answers are in tests/kernel/.
        assert not name.startswith(("UFFD_EVENT", "UFFDIO_REGISTER", "MAP_", "MREMAP_")), name


def test_uapi_agrees_with_the_kernels_headers(compiled):
    for name, value in compiled.items():
        if name.startswith("UVM_"):
            assert value == compiled[f"same:{name}"], name


def test_message_is_32_bytes_as_the_kernels():
    assert msg.MSG_BYTES == 32


def test_message_fields_are_read_from_their_places():
    fault = b"\x12" + bytes(7) + (3).to_bytes(8, "little") + (0x7000).to_bytes(8, "little")
    fault += (42).to_bytes(4, "little") + bytes(4)
    remap = (
        b"\x14" + bytes(7) + b"".join(n.to_bytes(8, "little") for n in (1 << 12, 2 << 12, 3 << 12))
    )
    remove = b"\x15" + bytes(7) + b"".join(n.to_bytes(8, "little") for n in (4 << 12, 5 << 12, 0))
    fork = b"\x13" + bytes(7) + (9).to_bytes(4, "little") + bytes(20)
    assert msg.parse(fault + remap + remove + fork) == [
        msg.Pagefault(0x7000, msg.PagefaultFlag.WRITE | msg.PagefaultFlag.WP, 42),
        msg.Remap(1 << 12, 2 << 12, 3 << 12),
        msg.Remove(4 << 12, 5 << 12),
        msg.Fork(9),
    ]


def test_native_structs_have_the_sizes_that_the_header_promises():
    assert ffi.sizeof("struct uvm_region_ctl") <= lib.UVM_REGION_CTL_BYTES
    assert ffi.sizeof("struct uvm_cache_ctl") <= lib.UVM_CACHE_CTL_BYTES
    assert ffi.sizeof("struct uvm_agent_request") == 40
    assert ffi.sizeof("struct uvm_pm_region") == 24


def test_every_function_of_the_header_is_in_the_typed_face():
    """_lib.Lib is written by hand: nothing of the header may be missing there, or be there too much."""
    from uffd_vm.kernel._lib import Lib

    header = (ROOT / "native/uffd_vm.h").read_text().split("/* cdef begin */")[1]
    header = re.sub(r"/\*.*?\*/", "", header.split("/* cdef end */")[0], flags=re.S)
    functions = set(re.findall(r"\b(uvm_\w+)\(", header))
    assert {name for name in vars(Lib) if name.startswith("uvm_")} == functions
    constants = set(Lib.__annotations__)
    assert {name for name in constants if not hasattr(lib, name)} == set()


def test_page_size_is_the_machines():
    from uffd_vm.page import PAGE_SHIFT, PAGE_SIZE

    assert os.sysconf("SC_PAGE_SIZE") == PAGE_SIZE == 1 << PAGE_SHIFT


def test_the_extension_holds_the_tables_of_the_policy():
    """It was built from uffd_vm/fault/ as it was then."""
    tables = compile_tables()
    order = ("cells", "admit", "rows", "settle", "legal_pte", "truth")
    for which, name in enumerate(order):
        nr_bytes = ffi.new("uint64_t *")
        built = lib.uvm_table(which, nr_bytes)
        assert bytes(ffi.buffer(built, nr_bytes[0])) == getattr(tables, name), name
    assert lib.uvm_table(len(order), nr_bytes) == ffi.NULL


def test_an_out_field_that_was_never_written_looks_the_same_to_policy_and_c():
    from uffd_vm.fault.settle import DONE_UNTOUCHED

    assert DONE_UNTOUCHED == lib.UVM_DONE_UNTOUCHED
