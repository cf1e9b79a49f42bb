"""A reboot of the node, run over two boots: the machine runs the same command again when it is up again."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.harness.images import busybox_image
from tests.e2e.harness.registry import running_registry
from tests.vm import node

pytestmark = [
    node.only_in_the_machine,
    pytest.mark.skipif("CRITO_TEST_REBOOT" not in os.environ, reason="reboots the machine: set CRITO_TEST_REBOOT"),
]

SHUTDOWN_S = 30  # systemd waits three times as long for those who ignore SIGTERM
MEMORY = Path("/var/lib/crito-test-reboot.json")


def test_after_a_reboot_all_is_listed_as_ended_and_can_be_cleaned_up(tmp_path: Path) -> None:
    if MEMORY.exists():
        memory = json.loads(MEMORY.read_text())
        up_s = float(Path("/proc/uptime").read_text().split()[0])
        assert time.time() - up_s - memory["time"] < SHUTDOWN_S, "something of ours kept the node from going down"
        _after(memory["ids"])
    else:
        _before(tmp_path)


def _before(directory: Path) -> None:
    with running_registry(directory) as registry:
        image = registry.push(busybox_image(), "test/busybox", "1")
        node.install(registry.host)
        node.settle_packages()
        node.systemctl("enable", "--now", "crito.service")
        client = node.connected()
        client.pull(image)
        pod = client.run_pod("reboot")
        running = client.run(pod, image, ["sh", "-c", "echo running; sleep 100000"], "running")
        ended = client.run(pod, image, ["sh", "-c", "exit 3"], "ended")
        created = client.create(pod, client.container_config(image, ["true"], "created"))
        client.wait_exited(ended)
        assert len(node.leases()) == 1
    known = {"image": image, "pod": pod.id, "running": running, "ended": ended, "created": created}
    MEMORY.write_text(json.dumps({"ids": known, "time": time.time()}))
    if os.environ["CRITO_TEST_REBOOT"] == "power-cut":
        subprocess.run(["sync"], check=True)  # the machine's own disk has no journal
        Path("/proc/sysrq-trigger").write_text("b")
    node.systemctl("reboot")
    time.sleep(300)  # until the machine's shutdown ends this


def _after(known: dict[str, str]) -> None:
    client = node.connected()
    assert node.show("ActiveState") == "active", node.journal()
    assert node.is_ready(client)

    (pod,) = client.pods()
    assert (pod.id, pod.state) == (known["pod"], pb.SANDBOX_NOTREADY)
    states = {each.id: each.state for each in client.containers()}
    assert states == dict.fromkeys((known["running"], known["ended"], known["created"]), pb.CONTAINER_EXITED)
    assert client.status(known["ended"]).exit_code == 3
    lost = client.status(known["running"])
    assert lost.exit_code != 0 and lost.finished_at > lost.started_at
    assert "running" in Path(lost.log_path).read_text()

    deadline = time.monotonic() + 10
    while node.leases() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert node.leases() == []

    again = client.run_pod("again")
    container_id = client.run(again, known["image"], ["true"])
    assert client.wait_exited(container_id).exit_code == 0

    client.remove_everything()
    node.wait_until_nothing_is_left([*known.values(), again.id, container_id])
