"""The parts of making a pod that need no privileges."""

import pytest

from oci.monitor.pod import sysctl_path


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("net.ipv4.ip_forward", "net/ipv4/ip_forward"),
        ("net/ipv4/ip_forward", "net/ipv4/ip_forward"),
        ("net/ipv4/conf/eth0.100/forwarding", "net/ipv4/conf/eth0.100/forwarding"),
        ("net.ipv4.conf.eth0/100.forwarding", "net/ipv4/conf/eth0.100/forwarding"),
    ],
)
def test_a_sysctl_may_be_written_with_dots_or_slashes(name: str, path: str) -> None:
    assert sysctl_path(name) == f"/proc/sys/{path}"
