import importlib

import psutil
import pytest

from jaxkv.memory import machine

MB = 10**6


def _cgroup(folder, names, limit, used, statistics=""):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(names, (limit, used, statistics), strict=True):
        (folder / name).write_text(f"{content}\n")


V2 = ("memory.max", "memory.current", "memory.stat")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")


@pytest.fixture
def membership(tmp_path):
    def write(text):
        (tmp_path / "cgroup").write_text(text)
        return tmp_path / "cgroup", tmp_path / "root"

    return write


def test_version_2_honours_parents_and_gives_back_page_cache(membership):
    paths = membership("0::/service/task\n")
    root = paths[1]
    _cgroup(root / "service/task", V2, "max", 40 * MB)
    _cgroup(root / "service", V2, 100 * MB, 60 * MB, f"anon 1\ninactive_file {20 * MB}")
    assert list(machine._cgroups(*paths)) == [("cgroup limit", 100 * MB, 60 * MB)]


def test_version_1(membership):
    paths = membership("9:cpu,cpuacct:/a\n4:memory:/job\n")
    _cgroup(paths[1] / "memory/job", V1, 50 * MB, 30 * MB, f"total_inactive_file {5 * MB}")
    assert list(machine._cgroups(*paths)) == [("cgroup limit", 50 * MB, 25 * MB)]


def test_in_a_container_the_limit_stands_at_the_mount(membership):
    paths = membership("0::/not/visible/in/here\n")
    _cgroup(paths[1], V2, 80 * MB, 90 * MB)
    assert list(machine._cgroups(*paths)) == [("cgroup limit", 80 * MB, 0)]


def test_no_cgroups_no_limit(tmp_path, membership):
    assert list(machine._cgroups(tmp_path / "absent", tmp_path)) == []
    assert list(machine._cgroups(*membership("0::/\n"))) == []


def test_address_space_limit(monkeypatch):
    resource = importlib.import_module("resource")
    used = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda which: (used + 10**9, -1))
    (bound,) = machine._address_space()
    assert bound.source == "RLIMIT_AS"
    assert bound.limit_bytes == used + 10**9
    assert 0 <= bound.free_bytes <= 10**9 + 2**28  # the process may have shrunk or grown since


def test_the_bound_that_leaves_least_decides(monkeypatch):
    tight = machine.Bound("cgroup limit", 1000, 1)
    monkeypatch.setattr(machine, "_cgroups", lambda: iter([tight]))
    assert machine.tightest_bound() == tight
    loose = machine.Bound("cgroup limit", 2**62, 2**62)
    monkeypatch.setattr(machine, "_cgroups", lambda: iter([loose]))
    monkeypatch.setattr(machine, "_address_space", lambda: iter([]))
    assert machine.tightest_bound().source == "physical memory"
    assert machine.tightest_bound().limit_bytes == psutil.virtual_memory().total


def test_process_bytes():
    now, peak = machine.process_bytes()
    assert 10 * MB < now <= peak
