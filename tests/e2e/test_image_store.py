"""The commands that look after the image store, against a real daemon and without one."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.e2e.harness.daemon import Daemon, crito
from tests.e2e.harness.images import Entry, busybox_layer, image, layer
from tests.e2e.harness.registry import Registry


def test_the_store_is_verified_healed_pinned_and_wiped_by_commands(
    make_daemon: Callable[..., Daemon], busybox: str
) -> None:
    daemon, reference = make_daemon(), busybox
    assert crito(daemon, "images", "pulls").stdout == "nothing is being pulled\n"
    assert crito(daemon, "images", "cancel", reference).returncode == 1
    assert crito(daemon, "images", "pin", reference).returncode == 0
    assert crito(daemon, "check", "--images").returncode == 0

    program = next(daemon.root.glob("images/layers/*/diff/bin/busybox"))
    damage(program)
    found = crito(daemon, "check", "--images", "--json")
    assert found.returncode == 1
    assert json.loads(found.stdout)["found"].startswith("bin/busybox: ")
    daemon.stop()
    healed = crito(daemon, "check", "--repair")
    assert (healed.returncode, "repaired" in healed.stdout) == (0, True), healed
    daemon.start()

    client = daemon.client()
    pod = client.run_pod("web")
    client.run(pod, reference, ["sleep", "1000"])
    refused = crito(daemon, "wipe")
    assert refused.returncode == 1
    assert "1 containers run on this node; --force ends and removes them" in refused.stderr
    assert crito(daemon, "wipe", "--force").stdout == "removed 1 pods and 1 images\n"
    assert list(client.pods()) == []


def test_a_container_is_made_from_a_healed_image_after_a_power_loss(
    make_daemon: Callable[..., Daemon], busybox: str
) -> None:
    daemon, reference = make_daemon(), busybox
    daemon.kill()
    (daemon.root / "images/running").write_text("the boot before")
    damage(next(daemon.root.glob("images/layers/*/diff/bin/busybox")))
    daemon.start()
    client = daemon.client()

    pod = client.run_pod("web")
    container_id = client.run(pod, reference, ["sh", "-c", "echo healed"])
    assert client.wait_exited(container_id).exit_code == 0
    client.remove_pod(pod.id)


def damage(program: Path) -> None:
    content = program.read_bytes()
    program.write_bytes(bytes(4096) + content[4096:])


def test_a_container_of_200_layers_runs_also_after_a_restart(
    make_daemon: Callable[..., Daemon], image_registry: Registry
) -> None:
    daemon = make_daemon()
    layers = [busybox_layer(), *(layer([Entry(f"layers/{number}", b"")]) for number in range(199))]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]},
    }
    built = image(config, tuple(blob for blob, _ in layers))
    client = daemon.client()
    reference = image_registry.push(built, "test/many", "1")

    client.pull(reference, 120)
    daemon.kill()
    daemon.start()
    client = daemon.client()
    pod = client.run_pod("many")
    container_id = client.run(pod, reference, ["sh", "-c", "ls /layers | wc -l"])

    assert client.wait_exited(container_id).exit_code == 0
    assert client.log(pod).strip() == "199"
    client.remove_pod(pod.id)
