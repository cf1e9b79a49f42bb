"""Finding a container's cgroup, and reading what it counted."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oci.monitor.exit import ABOVE, OWN, Cgroup, above_scope, cgroup_directory, cgroup_mounts, counters

HYBRID = """\
31 25 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw
32 31 0:28 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
33 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
34 31 0:30 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
35 31 0:31 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""


def test_each_hierarchy_is_found_by_its_controllers() -> None:
    mounts = cgroup_mounts(HYBRID)

    assert mounts["memory"] == ("/", "/sys/fs/cgroup/memory")
    assert mounts["cpuacct"] == ("/", "/sys/fs/cgroup/cpu,cpuacct")
    assert mounts[""] == ("/", "/sys/fs/cgroup/unified")


def test_a_cgroup_directory_is_below_the_mount_of_its_hierarchy() -> None:
    mounts = cgroup_mounts(HYBRID)
    groups = [("memory", "/pods/c1"), ("cpu,cpuacct", "/pods/c1"), ("", "/")]

    assert cgroup_directory(groups, "memory", mounts) == "/sys/fs/cgroup/memory/pods/c1"
    assert cgroup_directory(groups, "cpu", mounts) == "/sys/fs/cgroup/cpu,cpuacct/pods/c1"
    assert cgroup_directory(groups, "hugetlb", mounts) == ""


def test_a_mount_of_a_part_of_the_hierarchy_hides_the_path_above_it() -> None:
    mounts = {"memory": ("/docker/abc", "/sys/fs/cgroup/memory")}

    assert cgroup_directory([("memory", "/docker/abc/c1")], "memory", mounts) == "/sys/fs/cgroup/memory/c1"


def test_counters_are_read_and_other_lines_passed_over() -> None:
    assert counters("oom_kill_disable 0\nunder_oom 0\noom_kill 2\nodd line here\n\n")["oom_kill"] == 2


# A scope that systemd removes at its end


@pytest.mark.parametrize(
    ("directory", "above"),
    [
        ("/sys/fs/cgroup/kubepods.slice/pod1.slice/crito-c1.scope", "/sys/fs/cgroup/kubepods.slice/pod1.slice"),
        ("/sys/fs/cgroup/pod1.slice/crito-c1.scope/container", "/sys/fs/cgroup/pod1.slice"),
        ("/sys/fs/cgroup/kubepods/pod1/c1", ""),
    ],
)
def test_above_a_scope_is_the_pod(directory: str, above: str) -> None:
    assert above_scope(directory) == above


class PlainFiles:
    """A loop that waits on nothing: epoll takes no plain files."""

    def watch(self, fd: int, events: int, handler: Any) -> None: ...

    def forget(self, fd: int) -> None: ...


@pytest.fixture
def scope(tmp_path: Path) -> Iterator[Cgroup]:
    """With a kill above it that was somebody else's."""
    directory = tmp_path / "crito-c1.scope"
    directory.mkdir()
    tell_kills(directory, 0)
    tell_kills(tmp_path, 1)
    cgroup = Cgroup(PlainFiles(), str(directory), is_unified=True, is_own=True)  # type: ignore[arg-type]
    events = {OWN: directory / "memory.events", ABOVE: tmp_path / "memory.events"}
    cgroup.watch({name: os.open(path, os.O_RDONLY) for name, path in events.items()})
    yield cgroup
    cgroup.close()


def tell_kills(directory: Path, number: int) -> None:
    (directory / "memory.events").write_text(f"oom {number}\noom_kill {number}\n")


def take_away(cgroup: Cgroup) -> None:
    """Reading its counters fails from now on, as after its removal."""
    read, write = os.pipe()
    os.dup2(read, cgroup.at_rest()[0][OWN])
    os.close(read)
    os.close(write)


def test_kills_are_known_although_the_scope_went_before_they_were_read(scope: Cgroup, tmp_path: Path) -> None:
    tell_kills(tmp_path, 3)
    take_away(scope)

    assert scope.oom() == (2, "")


def test_what_others_were_killed_for_before_is_not_the_scope_s(scope: Cgroup, tmp_path: Path) -> None:
    take_away(scope)

    assert scope.oom() == (0, "")


def test_kills_of_others_are_no_news_once_the_scope_s_own_were_read_with_them(scope: Cgroup, tmp_path: Path) -> None:
    tell_kills(tmp_path, 5)
    assert scope.oom() == (0, "")

    take_away(scope)

    assert scope.oom() == (0, "")


def test_a_resting_monitor_keeps_what_it_has_counted(scope: Cgroup, tmp_path: Path) -> None:
    fds, facts = scope.at_rest()
    again = Cgroup.resume(PlainFiles(), {name: os.dup(fd) for name, fd in fds.items()}, facts)  # type: ignore[arg-type]
    tell_kills(tmp_path, 2)
    take_away(again)

    assert again.oom() == (1, "")
    again.close()


def test_the_scope_s_own_counters_are_believed_first(scope: Cgroup, tmp_path: Path) -> None:
    tell_kills(tmp_path / "crito-c1.scope", 1)
    (tmp_path / "crito-c1.scope" / "memory.events.local").write_text("oom 1\n")

    assert scope.oom() == (1, "container")
