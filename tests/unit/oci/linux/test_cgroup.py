import os
from pathlib import Path

import pytest

from oci.errors import InvalidArgument
from oci.linux import cgroup, mount
from oci.linux.cgroup import Driver, Hierarchy, Version

HYBRID = """\
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,release_agent=/lib/agent,name=systemd
42 31 0:37 / /elsewhere/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / {unified} rw,relatime - cgroup2 cgroup2 rw,nsdelegate
"""


def detect(text: str) -> cgroup.Cgroups:
    return cgroup.detect(list(mount.parse_mountinfo(text)))


def test_a_hybrid_host_is_told_from_its_mounts(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("hugetlb\n")

    found = detect(HYBRID.format(unified=tmp_path))

    assert found.version is Version.HYBRID
    assert found.controllers == {"cpu", "cpuacct", "memory", "name=systemd", "hugetlb"}
    assert found.directory("cpuacct", "/a/b") == Path("/sys/fs/cgroup/cpu/a/b")
    assert found.directory("pids", "/a/b") is None
    assert len(found.hierarchies) == 4
    assert found.procs_files("/a")[-1] == tmp_path / "a/cgroup.procs"


def test_one_hierarchy_alone_is_v2_and_none_of_it_v1(tmp_path: Path) -> None:
    lines = HYBRID.format(unified=tmp_path).splitlines()

    assert detect(lines[-1]).version is Version.V2
    assert detect(lines[0]).version is Version.V1


@pytest.mark.parametrize(
    ("driver", "parent", "expected"),
    [
        (Driver.CGROUPFS, "", "/"),
        (Driver.CGROUPFS, "/kubepods/burstable/pod1/", "/kubepods/burstable/pod1"),
        (Driver.CGROUPFS, "kubepods//pod1", "/kubepods/pod1"),
        (Driver.SYSTEMD, "", "system.slice"),
        (Driver.SYSTEMD, "/kubepods.slice/kubepods-besteffort.slice", "kubepods-besteffort.slice"),
        (Driver.SYSTEMD, "kubepods-pod1_2.slice", "kubepods-pod1_2.slice"),
    ],
)
def test_a_parent_of_the_drivers_form_is_taken(driver: Driver, parent: str, expected: str) -> None:
    assert cgroup.check_parent(driver, parent) == expected


@pytest.mark.parametrize(
    ("driver", "parent"),
    [
        (Driver.CGROUPFS, "/kubepods.slice/kubepods-pod1.slice"),
        (Driver.CGROUPFS, "/a/../../b"),
        (Driver.CGROUPFS, "/a\nb"),
        (Driver.SYSTEMD, "/kubepods/pod1"),
        (Driver.SYSTEMD, "a--b.slice"),
        (Driver.SYSTEMD, "-a.slice"),
    ],
)
def test_a_parent_of_another_form_is_refused(driver: Driver, parent: str) -> None:
    with pytest.raises(InvalidArgument, match="cgroup_parent"):
        cgroup.check_parent(driver, parent)


def test_a_slice_lies_below_those_that_its_name_tells() -> None:
    assert cgroup.expand_slice("a-b-c.slice") == "/a.slice/a-b.slice/a-b-c.slice"
    assert cgroup.expand_slice("-.slice") == "/"


def test_both_drivers_agree_with_the_runtime_on_the_place() -> None:
    assert cgroup.child_path(Driver.SYSTEMD, "a-b.slice", "c1") == "/a.slice/a-b.slice/crito-c1.scope"
    assert cgroup.runtime_path(Driver.SYSTEMD, "a-b.slice", "c1") == "a-b.slice:crito:c1"
    assert cgroup.child_path(Driver.CGROUPFS, "/", "c1") == "/crito-c1"
    assert cgroup.runtime_path(Driver.CGROUPFS, "/a", "c1") == cgroup.child_path(Driver.CGROUPFS, "/a", "c1")


def test_the_cgroup_of_a_process_is_known_by_controller() -> None:
    text = "9:name=systemd:/x\n2:cpu,cpuacct:/a:b\n0::/u (deleted)\n"

    assert cgroup.parse_process(text) == {"name=systemd": "/x", "cpu": "/a:b", "cpuacct": "/a:b", "": "/u"}
    assert cgroup.of_process(os.getpid())
    assert cgroup.of_process(1 << 30) == {}


def test_a_tree_of_directories_is_made_and_removed_with_what_is_below(tmp_path: Path) -> None:
    groups = cgroup.Cgroups(
        (Hierarchy(tmp_path / "a", frozenset({"pids"}), False), Hierarchy(tmp_path / "b", frozenset(), True))
    )
    for hierarchy in groups.hierarchies:
        hierarchy.mountpoint.mkdir()

    groups.make("/x/y")
    groups.make("/x/y")
    (tmp_path / "b/x/y/z").mkdir()

    assert groups.exists("/x/y")
    groups.remove("/x")
    groups.remove("/x")
    assert not groups.exists("/x")
    assert list((tmp_path / "a").iterdir()) == []


def test_the_root_is_not_removed(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument):
        cgroup.Cgroups(()).remove("/")


def test_a_new_cpuset_gets_its_parents_cpus(tmp_path: Path) -> None:
    groups = cgroup.Cgroups((Hierarchy(tmp_path, frozenset({"cpuset"}), False),))
    (tmp_path / "x").mkdir()
    for name, value in (("cpuset.cpus", "0-1"), ("cpuset.mems", "0")):
        (tmp_path / name).write_text(value)
        (tmp_path / "x" / name).write_text("\n")

    groups.make("/x")

    assert (tmp_path / "x/cpuset.cpus").read_text() == "0-1"
    assert (tmp_path / "x/cpuset.mems").read_text() == "0"


@pytest.mark.parametrize(
    ("driver", "path", "expected"),
    [
        (cgroup.Driver.CGROUPFS, "/a/b", "/a/b"),
        (cgroup.Driver.SYSTEMD, "kubepods-pod1.slice:crito:c1", "/kubepods.slice/kubepods-pod1.slice/crito-c1.scope"),
        (cgroup.Driver.SYSTEMD, ":by:plugin", "/system.slice/by-plugin.scope"),
        (cgroup.Driver.SYSTEMD, "a.slice::b.slice", "/a.slice/b.slice"),
    ],
)
def test_the_cgroup_of_a_runtime_spec_is_found(driver: cgroup.Driver, path: str, expected: str) -> None:
    assert cgroup.from_runtime_path(driver, path) == expected
