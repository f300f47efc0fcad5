"""Control groups, on a folder that looks like one: where these tests run there may be none."""

import os

import pytest

from broker.confined.ceilings import Ceilings, NoGroups, group, join, mounted

CEILINGS = Ceilings(memory=1 << 30, cpus=1.5, pids=64)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (tmp_path / "cgroup.subtree_control").write_text("")
    return tmp_path


def test_the_groups_are_found_where_they_are_mounted():
    assert str(mounted("proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n")) == "/sys/fs/cgroup"
    with pytest.raises(NoGroups, match="not mounted"):
        mounted("cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n")


def test_a_group_has_the_ceilings_and_its_process(root):
    with group(root, CEILINGS) as made:
        join(made, 4711)
        found = {path.name: path.read_text() for path in made.iterdir()}
    assert (root / "cgroup.subtree_control").read_text() == "+memory +cpu +pids"
    assert found == {"memory.max": "1073741824", "cpu.max": "150000 100000", "pids.max": "64", "cgroup.procs": "4711"}
    assert (made / "cgroup.kill").read_text() == "1"


def test_swap_is_bounded_where_the_kernel_has_any(root, monkeypatch):
    name = root / f"broker-run-{os.getpid()}"
    monkeypatch.setattr(type(root), "mkdir", lambda path: (os.mkdir(path), (path / "memory.swap.max").write_text("max")))  # noqa: PTH102
    with group(root, CEILINGS):
        assert (name / "memory.swap.max").read_text() == "0"


def test_where_there_are_no_controllers_it_says_which(root):
    (root / "cgroup.controllers").write_text("memory\n")
    with pytest.raises(NoGroups, match="don't have cpu, pids"), group(root, CEILINGS):
        pass
    assert not list(root.glob("broker-run-*"))


def test_where_it_may_not_write_it_says_so(tmp_path):
    with pytest.raises(NoGroups, match="can't be made"), group(tmp_path / "none", CEILINGS):
        pass


def test_what_a_killed_one_left_is_removed_and_what_still_runs_is_not(root):
    gone, here = root / "broker-run-4194305", root / "broker-run-1"  # above the highest process ID that Linux gives
    gone.mkdir()
    here.mkdir()
    with group(root, CEILINGS):
        assert (gone.exists(), here.exists()) == (False, True)


def test_without_groups_each_process_has_its_own_limit():
    assert CEILINGS.by_process == {"RLIMIT_DATA": 1 << 30}
