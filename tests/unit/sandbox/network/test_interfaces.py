import os
from pathlib import Path

from sandbox.network.interfaces import InterfaceStats, interface_stats, is_netns, parse_net_dev

NET_DEV = """\
Inter-|   Receive                                                |  Transmit
 face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier compressed
    lo:    1520      20    0    0    0     0          0         0     1520   20    0    0    0     0       0         0
  eth0:84329381   61020    1    2    0     0          0         7  9123456   30500    3    4    0     0       0       0
"""


def test_counters_are_read_by_their_columns_and_the_loopback_is_left_out() -> None:
    assert parse_net_dev(NET_DEV) == (InterfaceStats("eth0", 84329381, 61020, 1, 2, 9123456, 30500, 3, 4),)


def test_the_interfaces_of_a_process_are_those_of_its_namespace() -> None:
    names = {path.name for path in Path("/sys/class/net").iterdir()} - {"lo"}

    assert {stats.name for stats in interface_stats(os.getpid())} == names


def test_a_file_without_a_namespace_bound_to_it_is_no_namespace(tmp_path: Path) -> None:
    (tmp_path / "left").touch()

    assert is_netns("/proc/self/ns/net")
    assert not is_netns(str(tmp_path / "left"))
    assert not is_netns(str(tmp_path / "gone"))
    assert not is_netns("")
