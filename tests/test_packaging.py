"""What is shipped: the source archive has all that the wheel is made of, the wheel what users need."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT


def run(*argv: str | Path, cwd: Path) -> str:
    """In an environment of its own: what runs must not find this source tree."""
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(argv, cwd=cwd, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_source_archive_makes_a_wheel_that_works(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository here: the tree may hold what is not shipped")
    run("git", "clone", "-q", ROOT, tmp_path / "tree", cwd=tmp_path)
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=tmp_path / "tree")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"LICENSE", "CHANGELOG.md", "native/uffd_vm.h", "native/sys.h", "scripts/_env"} <= names
    assert {"tests/support.py", "docs/fault-table.md", "examples/01_zero_page.py"} <= names

    pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, archive, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    with zipfile.ZipFile(wheel) as zipped:
        inside = set(zipped.namelist())
    assert {"uffd_vm/py.typed", f"uffd_vm/_native{suffix}"} <= inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert not [name for name in inside if not name.startswith("uffd_vm")]

    site = tmp_path / "site"
    run(*pip, "install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    script = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import uffd_vm as uv\n"
        "with uv.map(sys.argv[1], service='native') as region:\n"
        "    print(uv.__file__, region.array()[5000])\n"
    )
    (tmp_path / "data").write_bytes(bytes(range(250)) * 40)
    assert (
        run(sys.executable, "-c", script, "data", cwd=tmp_path) == f"{site}/uffd_vm/__init__.py 0\n"
    )
