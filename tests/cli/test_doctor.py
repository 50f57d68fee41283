"""`uffd-vm doctor`: what it finds, what it advises, and that an ordinary terminal can show it."""

from __future__ import annotations

import errno
import json
import re

import pytest
from click.testing import CliRunner, Result

from uffd_vm.cli import main
from uffd_vm.kernel import features
from uffd_vm.kernel.features import ALL_FEATURES, LIBRARY_FEATURES, Feature, Probe, Way

#: What an ordinary user finds where nothing was set up.
REFUSED = {Way.SYSCALL: errno.EPERM, Way.DEVICE: errno.EACCES}


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments], env={"COLUMNS": "80"})


def pretend(monkeypatch: pytest.MonkeyPatch, way: Way | None, has: Feature = ALL_FEATURES) -> None:
    probe = Probe(
        release="6.18.0",
        way=way,
        features=has if way else Feature(0),
        pagemap_scan=True,
        refused={} if way is Way.SYSCALL else REFUSED,
        masked=frozenset(),
    )
    monkeypatch.setattr(features, "probe", lambda **_: probe)


@pytest.mark.requires()
def test_json_agrees_with_the_probe() -> None:
    result = doctor("--json")
    report = json.loads(result.output)
    assert report["release"] == features.probe().release
    assert report["mode"] == features.probe().way.value
    assert report["self_test"] == "ok"
    assert result.exit_code == report["exit_code"]
    assert {row["name"] for row in report["library"]} == {f.name for f in LIBRARY_FEATURES}


@pytest.mark.requires(ALL_FEATURES, "PAGEMAP_SCAN")
def test_exit_status_is_1_when_a_feature_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor().exit_code == 0
    monkeypatch.setenv("UFFD_VM_MASK_FEATURES", "POISON")
    result = doctor()
    assert result.exit_code == 1
    assert "lacking" in result.output and "POISON" in result.output


def test_exit_status_is_2_without_userfaultfd(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None)
    result = doctor()
    assert result.exit_code == 2
    assert "setfacl" in result.output and "vm.unprivileged_userfaultfd=1" in result.output
    assert "export UFFD_VM_USER_MODE_ONLY=1" in result.output


@pytest.mark.requires()
def test_who_runs_degraded_is_told_the_way_out_and_not_the_way_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, Way.USER_MODE_ONLY)
    result = doctor()
    assert result.exit_code == 1
    assert "degraded" in result.output
    assert "setfacl" in result.output and "vm.unprivileged_userfaultfd=1" in result.output
    assert "UFFD_VM_USER_MODE_ONLY" not in result.output


def test_an_unknown_masked_feature_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UFFD_VM_MASK_FEATURES", "POISSON")
    result = doctor()
    assert result.exit_code == 1
    assert result.output.startswith("Error: UFFD_VM_MASK_FEATURES: no feature 'POISSON'")


@pytest.mark.requires()
@pytest.mark.parametrize("way", [None, Way.USER_MODE_ONLY, Way.SYSCALL])
@pytest.mark.parametrize("has", [ALL_FEATURES, Feature.MISSING_SHMEM])
def test_fits_80_columns(way: Way | None, has: Feature, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, way, has)
    lines = doctor().output.splitlines()
    for line in lines:
        assert len(line) <= 80 or line.lstrip().startswith("sudo "), (
            line
        )  # commands are for copying
    for feature in LIBRARY_FEATURES:  # each is one line: its name, then five words
        assert any(
            re.fullmatch(re.escape(feature.name) + r"(\s+\w+){5}\s*", line) for line in lines
        )
