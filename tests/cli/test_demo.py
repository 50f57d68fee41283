"""`scripts/demo` runs through on an array made small and on users' files, and refuses what it cannot show."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support import ROOT

TIMEOUT_S = 100


def run_demo(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: it touches lazy memory with the GIL held."""
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "uffd_vm.cli.demo", *arguments],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "COLUMNS": "80", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def npy(path: Path, array: np.ndarray, version: tuple[int, int] | None = None) -> Path:
    with open(path, "wb") as file:
        np.lib.format.write_array(file, array, version=version)
    return path


def test_makes_its_array_once_and_shows_every_step(tmp_path: Path) -> None:
    first = run_demo(tmp_path, "--mib", "16")
    assert (first.returncode, first.stderr) == (0, "")
    array = tmp_path / "uffd_vm" / "demo-16MiB.npy"
    made = array.stat().st_mtime_ns
    for shown in (
        "first element", "random rows", "column 8", "Same values", ": yes", "resident", "latency p99",
        "The file's own bytes are the same", "handle_mm_fault", "do_read_fault", "read the content",
    ):  # fmt: skip
        assert shown in " ".join(first.stdout.split()), shown
    too_long = [line for line in first.stdout.splitlines() if len(line) > 80]
    assert [line for line in too_long if str(tmp_path) not in line] == []
    again = run_demo(tmp_path, "--mib", "16")
    assert again.returncode == 0
    assert array.stat().st_mtime_ns == made


def test_the_picture_shows_what_was_touched(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="pillow is in the extra [demo]")
    done = run_demo(tmp_path, "--mib", "64")
    assert done.returncode == 0, done.stderr
    with image_module.open(tmp_path / "uffd_vm" / "heatmap.png") as image:
        assert image.size == (1024, 1024 + 48)
        pixels, legend = np.split(np.asarray(image), [1024])
    assert len(np.unique(legend.reshape(-1, 3), axis=0)) > 20  # text and a colour key
    warm = (pixels[..., 0] > 200).mean()
    assert 1 / 32 < warm < 1 / 2  # one column of 16, the sampled rows and read-ahead; not all


@pytest.mark.parametrize(
    "array",
    [
        np.arange(300_000, dtype="f8").reshape(-1, 3),
        np.asfortranarray(np.arange(90_000, dtype="i2").reshape(-1, 9)),
        np.arange(5, dtype="u1"),
        np.array(7.5),
        np.arange(24_000, dtype=">f4").reshape(20, 30, 40),
        np.asfortranarray(np.arange(24_000, dtype="f4").reshape(20, 30, 40)),
        np.array([True, False] * 5000),
        np.full((100, 2), np.nan),
        np.array([np.inf, -np.inf] * 100),
        np.ones((3, 2, 100), "f2"),
    ],
    ids=["C", "F", "tiny", "scalar", "3d big-endian", "3d F", "bool", "nan", "inf", "half"],
)
def test_takes_any_array_of_numbers(tmp_path: Path, array: np.ndarray) -> None:
    done = run_demo(tmp_path, str(npy(tmp_path / "users.npy", array)))
    assert (done.returncode, done.stderr) == (0, "")
    assert ": yes" in done.stdout


def test_a_name_is_no_markup(tmp_path: Path) -> None:
    done = run_demo(tmp_path, str(npy(tmp_path / "[bold]x [red] [x].npy", np.arange(1000.0))))
    assert (done.returncode, done.stderr) == (0, "")
    assert "[bold]x [red] [x].npy" in done.stdout


def test_a_file_is_meant_from_where_the_script_was_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "export UFFD_VM_DEMO_FROM=$PWD" in (ROOT / "scripts/demo").read_text()
    monkeypatch.setenv("UFFD_VM_DEMO_FROM", str(tmp_path))
    npy(tmp_path / "users.npy", np.arange(1000.0))
    done = run_demo(tmp_path, "users.npy")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/users.npy" in done.stdout


def test_takes_every_version_of_the_format(tmp_path: Path) -> None:
    for version in ((1, 0), (2, 0), (3, 0)):
        path = npy(tmp_path / "users.npy", np.arange(4000.0), version)
        assert run_demo(tmp_path, str(path)).returncode == 0


def bad_files(directory: Path) -> dict[str, str]:
    """A file by what the message has to say."""
    (directory / "text.npy").write_text("no array")
    (directory / "nothing.npy").write_bytes(b"")
    whole = io.BytesIO()
    np.save(whole, np.zeros(10_000))
    (directory / "short.npy").write_bytes(whole.getvalue()[:1000])
    npy(directory / "empty.npy", np.zeros((0, 3)))
    npy(directory / "words.npy", np.array(["a", "b"]))
    npy(directory / "fields.npy", np.zeros(9, dtype=[("a", "i4"), ("b", "f8")]))
    npy(directory / "complex.npy", np.zeros(9, "c8"))
    np.savez(directory / "many.npz", np.zeros(9))
    os.mkfifo(directory / "fifo")
    return {
        str(directory / "text.npy"): "no .npy array",
        str(directory / "nothing.npy"): "no .npy array",
        str(directory / "short.npy"): "no .npy array",
        str(directory / "empty.npy"): "empty",
        str(directory / "words.npy"): "dtype <U1",
        str(directory / "fields.npy"): "dtype [('a', '<i4'), ('b', '<f8')]",
        str(directory / "complex.npy"): "dtype complex64",
        str(directory / "many.npz"): "no .npy array",
        str(directory / "fifo"): "a directory or a device",
        str(directory / "absent.npy"): "No such file",
        str(directory): "directory",
    }


def test_bad_input_is_one_line_and_exit_status_2(tmp_path: Path) -> None:
    for file, message in bad_files(tmp_path).items():
        done = run_demo(tmp_path, file)
        assert done.returncode == 2, file
        assert message in done.stderr, (file, done.stderr)
        assert "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [("--mib", "0"), ("--mib", "x"), ("a.npy", "b.npy"), ("--no",)]
)
def test_wrong_usage_is_exit_status_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run_demo(tmp_path, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
