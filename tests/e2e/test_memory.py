"""What the processes of Crito cost: memory by the kernel's own books."""

import time

from tests.e2e.harness.client import Client
from tests.e2e.harness.daemon import Daemon
from tests.e2e.harness.memory import pss_kib, rss_kib, support_of

PODS = 20
SETTLED_S = 4.0  # then a monitor with nothing to do is at rest


def test_at_twenty_pods_monitors_and_pauses_stay_under_a_mebibyte_and_the_daemon_under_eighty(
    daemon: Daemon, client: Client, busybox: str
) -> None:
    for number in range(PODS):
        pod = client.run_pod(f"memory-{number}")
        client.run(pod, busybox, ["sleep", "100000"])

    time.sleep(SETTLED_S)

    support = support_of(daemon.owned, spared=daemon.own_processes())

    costs = {pid: pss_kib(pid) for pid in support}
    print("PSS of monitors and pauses:", sorted(costs.values()), "KiB; RSS of the daemon:", rss_kib(daemon.pid), "KiB")
    assert len(support) >= 2 * PODS
    assert max(costs.values()) < 1024
    assert rss_kib(daemon.pid) < 80 * 1024
