"""Finding a container's cgroup, and reading what it counted."""

from oci.monitor.exit import cgroup_directory, cgroup_mounts, counters

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
