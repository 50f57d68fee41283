"""The scripts' common beginning (scripts/_env): what a machine lacks is named, with its cure."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT


def env_function(
    call: str, path: str | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    """A function of scripts/_env, in a shell of its own."""
    return subprocess.run(
        [shutil.which("bash") or "bash", "-c", f". scripts/_env; {call}"],
        cwd=ROOT,
        env={**os.environ, "PATH": path or os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def programs(directory: Path, *names: str) -> str:
    """A PATH on which nothing but `names` is found."""
    directory.mkdir(exist_ok=True)
    for name in names:
        (directory / name).symlink_to(shutil.which(name) or pytest.skip(f"no {name} here"))
    return str(directory)


def lame_python(path: Path, before: str) -> str:
    """An interpreter that runs `before` ahead of the program on its standard input."""
    path.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c '{before}\nimport sys; exec(sys.stdin.read())'\n"
    )
    path.chmod(0o755)
    return str(path)


def test_a_machine_with_everything_is_taken() -> None:
    done = env_function(
        "uvm_need_compiler; uvm_find_python; echo took $uvm_python", UFFD_VM_PYTHON=sys.executable
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"took {sys.executable}\n", "")


def test_no_compiler(tmp_path: Path) -> None:
    done = env_function("uvm_need_compiler", programs(tmp_path / "bin", "uname"), CC="")
    assert done.returncode == 1
    assert "no C compiler (gcc): apt-get install gcc libc6-dev" in done.stderr
    done = env_function("uvm_need_compiler", CC="nonesuch -m32")
    assert "no C compiler (nonesuch)" in done.stderr


def test_a_compiler_without_headers() -> None:
    done = env_function("uvm_need_compiler", CC="gcc -nostdinc")
    assert done.returncode == 1
    assert "finds no headers of the C library: apt-get install libc6-dev" in done.stderr


@pytest.mark.parametrize(
    "before, cure",
    [
        ('import sysconfig; sysconfig.get_path = lambda name: "/nonexistent"', "-dev"),
        ("import importlib.util; importlib.util.find_spec = lambda name: None", "-venv"),
        (
            "import sys; sys.version_info = (3, 9, 2)",
            "Python 3.9 is too old, 3.10 or later is needed",
        ),
        ("raise SystemExit(3)", "does not run"),
    ],
    ids=["no headers", "no venv", "old", "broken"],
)
def test_a_python_that_lacks_something(before: str, cure: str, tmp_path: Path) -> None:
    python = lame_python(tmp_path / "lame", before)
    done = env_function("uvm_find_python", UFFD_VM_PYTHON=python)
    assert done.returncode == 1
    assert cure in done.stderr
    if cure.startswith("-"):
        version = "{}.{}".format(*sys.version_info)
        assert f"apt-get install python{version}{cure}" in done.stderr


def test_no_python(tmp_path: Path) -> None:
    done = env_function("uvm_find_python", UFFD_VM_PYTHON="nonesuch")
    assert "UFFD_VM_PYTHON=nonesuch: there is no such program" in done.stderr


def test_what_fails_shows_its_end_and_where_the_rest_is(tmp_path: Path) -> None:
    log = tmp_path / "pip.log"
    log.write_text("".join(f"line {i}\n" for i in range(1000)))
    done = env_function(f"uvm_failed 'pip install failed' {log}")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0] == "line 960" and lines[-2] == "line 999"
    assert lines[-1] == f"uffd_vm: pip install failed: see above; all of it is in {log}"
