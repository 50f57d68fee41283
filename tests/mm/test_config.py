"""Layers of options, sizes as people write them, memory limits of cgroups."""

from __future__ import annotations

import threading

import pytest

import uffd_vm as uv
from uffd_vm.config import Config, Options, _cgroup_limits, memory_limit, parse_size
from uffd_vm.page import PAGE_SIZE


@pytest.mark.parametrize(
    "text, nbytes",
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("64KiB", 65536),
        ("64 kib", 65536),
        ("64kB", 64000),
        ("1.5GiB", 3 << 29),
        ("2Gi", 2 << 30),
        ("1T", 10**12),
        ("10 B", 10),
    ],
)
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


def test_a_percentage_is_of_what_this_process_may_use():
    assert parse_size("50%") == memory_limit() // 2
    assert 0 < memory_limit() < 1 << 50


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 XB", "1e9", True, None, 2.5, "50 % of it"])
def test_sizes_that_cannot_be_read(text):
    with pytest.raises(uv.InvalidArgument, match="what"):
        parse_size(text, what="what")


def test_layers():
    config = Config({"UFFD_VM_DEADLINE": "5", "UFFD_VM_READAHEAD_BYTES": "2MiB"})
    assert config.options() == Options(deadline=5.0, readahead_bytes=2 << 20)
    config.set(deadline=6.0)
    assert config.options().deadline == 6.0
    with config.context(deadline=7.0) as options:
        assert options.deadline == config.options().deadline == 7.0
        assert config.options(deadline=8.0).deadline == 8.0
        assert config.options(deadline=None).deadline == 7.0
        seen: list[float] = []
        thread = threading.Thread(target=lambda: seen.append(config.options().deadline))
        thread.start()
        thread.join()
        assert seen == [6.0]
    assert config.options().deadline == 6.0
    config.reset()
    assert config.options().deadline == 5.0


def test_unknown_options_are_refused():
    with pytest.raises(uv.InvalidArgument, match="deadlin"):
        Config({}).set(deadlin=5)
    with pytest.raises(uv.InvalidArgument, match="deadlin"):
        with Config({}).context(deadlin=5):
            pass


@pytest.mark.parametrize("name", ["DEADLINE", "READAHEAD_BYTES", "FAULT_AROUND_BYTES", "CAP"])
def test_an_environment_that_cannot_be_read_is_named(name):
    with pytest.raises(uv.InvalidArgument, match=f"UFFD_VM_{name}"):
        Config({f"UFFD_VM_{name}": "plenty"}).options()


def test_the_configuration_reaches_regions(make_file, uffd):
    with uv.config.context(service="native", cap="1MiB"):
        with uv.map(make_file()) as region:
            assert region.service == "native"
            assert region.residency().cache_cap_bytes == 1 << 20
    with uv.config.context(deadline=-1):
        with pytest.raises(uv.InvalidArgument, match="deadline"):
            uv.map(make_file())


def test_limits_of_cgroups(tmp_path):
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    (tmp_path / "a" / "memory.max").write_text("1000\n")
    (group / "memory.max").write_text("max\n")
    assert list(_cgroup_limits(tmp_path, "0::/a/b\n")) == [1000]
    v1 = tmp_path / "memory" / "docker" / "x"
    v1.mkdir(parents=True)
    (v1 / "memory.limit_in_bytes").write_text("2000\n")
    proc = "5:cpu,memory:/docker/x\n3:cpuset:/docker/x\n"
    assert list(_cgroup_limits(tmp_path, proc)) == [2000]
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{PAGE_SIZE}\n")
    assert list(_cgroup_limits(tmp_path, "5:memory:/host/path\n")) == [PAGE_SIZE]
