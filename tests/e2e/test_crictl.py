"""Every verb of crictl against the daemon."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness.crictl import Crictl
from tests.e2e.harness.daemon import Daemon
from tests.e2e.harness.images import busybox_image
from tests.e2e.harness.ports import wait_until
from tests.e2e.harness.registry import Registry


@pytest.fixture
def files(daemon: Daemon, tmp_path: Path, busybox: str) -> dict[str, str]:
    """Paths of a pod's and a container's configuration, as a user writes them."""
    pod = {
        "metadata": {"name": "web", "uid": "uid-1", "namespace": "default", "attempt": 0},
        "hostname": "web",
        "log_directory": str(tmp_path / "logs"),
        "labels": {"app": "web"},
        "annotations": {"note": "kept as it is"},
        "linux": {"cgroup_parent": f"/{daemon.cgroup_parent}"},
    }
    container = {
        "metadata": {"name": "main", "attempt": 0},
        "image": {"image": busybox},
        "command": ["sh", "-c", "echo hello; echo wrong >&2; trap 'exit 3' TERM; while :; do sleep 0.1; done"],
        "envs": [{"key": "COLOUR", "value": "blue"}],
        "labels": {"app": "web"},
        "log_path": "main.log",
        "linux": {"resources": {"memory_limit_in_bytes": 64 << 20, "cpu_shares": 512}},
    }
    written = {}
    for name, content in (("pod", pod), ("container", container)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        written[name] = str(path)
    return written


@pytest.fixture
def running(crictl: Crictl, files: dict[str, str]) -> tuple[str, str]:
    """Ids of a pod and of a container that runs in it."""
    pod_id = crictl("runp", files["pod"])
    container_id = crictl("create", pod_id, files["container"], files["pod"])
    crictl("start", container_id)
    return pod_id, container_id


def names(listed: dict[str, Any], key: str) -> list[str]:
    return [each["metadata"]["name"] for each in listed[key]]


def test_version_tells_the_name_and_the_api(crictl: Crictl) -> None:
    answer = crictl("version")

    assert "RuntimeName:  crito" in answer
    assert "RuntimeApiVersion:  v1" in answer


def test_info_says_that_runtime_and_network_are_ready(crictl: Crictl) -> None:
    status = crictl.json("info")["status"]

    conditions = {each["type"]: each["status"] for each in status["conditions"]}
    assert conditions["RuntimeReady"] is True
    assert conditions["NetworkReady"] is True


def test_an_image_is_pulled_listed_inspected_and_removed(crictl: Crictl, image_registry: Registry) -> None:
    reference = image_registry.push(busybox_image("to be removed"), "test/removed", "1")

    crictl("pull", reference)

    listed = crictl.json("images", "-o", "json", reference)["images"]
    assert [each["repoTags"] for each in listed] == [[reference]]
    assert crictl.json("inspecti", reference)["status"]["id"] == listed[0]["id"]
    crictl("rmi", reference)
    assert crictl.json("images", "-o", "json", reference)["images"] == []


def test_the_room_that_images_take_is_told(crictl: Crictl) -> None:
    usage = crictl.json("imagefsinfo")["status"]["imageFilesystems"][0]

    assert Path(usage["fsId"]["mountpoint"]).is_dir()
    assert int(usage["usedBytes"]["value"]) > 0


def test_a_pod_is_run_listed_inspected_stopped_and_removed(crictl: Crictl, files: dict[str, str]) -> None:
    pod_id = crictl("runp", files["pod"])

    assert names(crictl.json("pods", "-o", "json", "--name", "web", "--state", "ready"), "items") == ["web"]
    status = crictl.json("inspectp", pod_id)["status"]
    assert status["state"] == "SANDBOX_READY"
    assert status["network"]["ip"]
    assert status["annotations"] == {"note": "kept as it is"}

    crictl("stopp", pod_id)
    assert crictl.json("inspectp", pod_id)["status"]["state"] == "SANDBOX_NOTREADY"
    crictl("rmp", pod_id)
    assert crictl.json("pods", "-o", "json")["items"] == []


def test_a_container_is_created_started_listed_and_inspected(
    crictl: Crictl, files: dict[str, str], busybox: str
) -> None:
    pod_id = crictl("runp", files["pod"])

    container_id = crictl("create", pod_id, files["container"], files["pod"])
    assert crictl.json("inspect", container_id)["status"]["state"] == "CONTAINER_CREATED"
    crictl("start", container_id)

    listed = crictl.json("ps", "-o", "json", "--pod", pod_id, "--label", "app=web")
    assert [(each["id"], each["state"]) for each in listed["containers"]] == [(container_id, "CONTAINER_RUNNING")]
    inspected = crictl.json("inspect", container_id)
    assert inspected["status"]["image"]["image"] == busybox
    assert inspected["status"]["resources"]["linux"]["memoryLimitInBytes"] == str(64 << 20)
    assert inspected["info"]["pid"] > 0


def test_a_command_runs_in_a_container_with_its_exit_code(crictl: Crictl, running: tuple[str, str]) -> None:
    _, container_id = running

    assert crictl("exec", "-s", container_id, "sh", "-c", "echo $COLOUR on $(hostname)") == "blue on web"
    failed = crictl.run("exec", "-s", container_id, "sh", "-c", "echo no >&2; exit 7")
    assert failed.returncode != 0
    assert "exited with 7: no" in failed.stderr


def test_a_container_s_log_has_both_streams(crictl: Crictl, running: tuple[str, str]) -> None:
    _, container_id = running

    def read() -> subprocess.CompletedProcess[str]:
        return crictl.run("logs", container_id)

    wait_until(lambda: "wrong" in read().stderr, "the log is written", 10)
    assert read().stdout == "hello\n"


def test_what_a_container_uses_is_told(crictl: Crictl, running: tuple[str, str]) -> None:
    pod_id, container_id = running

    stats = crictl.json("stats", "-o", "json", "--id", container_id)["stats"]
    assert [each["attributes"]["id"] for each in stats] == [container_id]
    assert int(stats[0]["cpu"]["usageCoreNanoSeconds"]["value"]) > 0
    assert int(stats[0]["memory"]["workingSetBytes"]["value"]) > 0

    pods = crictl.json("statsp", "-o", "json", "--id", pod_id)["stats"]
    assert [each["attributes"]["id"] for each in pods] == [pod_id]
    assert int(pods[0]["linux"]["network"]["defaultInterface"]["rxBytes"]["value"]) >= 0


def test_a_container_s_limits_are_changed_while_it_runs(crictl: Crictl, running: tuple[str, str]) -> None:
    _, container_id = running

    crictl("update", "--memory", str(96 << 20), "--cpu-share", "256", container_id)

    resources = crictl.json("inspect", container_id)["status"]["resources"]["linux"]
    assert resources["memoryLimitInBytes"] == str(96 << 20)
    assert resources["cpuShares"] == "256"
    seen = crictl(
        "exec",
        "-s",
        container_id,
        "sh",
        "-c",
        "cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max",
    )
    assert seen == str(96 << 20)


def test_a_container_is_stopped_and_removed(crictl: Crictl, running: tuple[str, str]) -> None:
    _, container_id = running
    wait_until(lambda: "wrong" in crictl.run("logs", container_id).stderr, "the trap is set", 10)

    crictl("stop", "--timeout", "10", container_id)

    status = crictl.json("inspect", container_id)["status"]
    assert (status["state"], status["exitCode"], status["reason"]) == ("CONTAINER_EXITED", 3, "Error")
    crictl("rm", container_id)
    assert crictl.json("ps", "-a", "-o", "json")["containers"] == []


def test_a_pod_is_removed_with_all_that_runs_in_it(crictl: Crictl, running: tuple[str, str]) -> None:
    pod_id, _ = running

    crictl("rmp", "-f", pod_id)

    assert crictl.json("ps", "-a", "-o", "json")["containers"] == []
    assert crictl.json("pods", "-o", "json")["items"] == []


@pytest.fixture
def events(crictl: Crictl, tmp_path: Path) -> Iterator[Path]:
    """The file in which events arrive as crictl prints them."""
    path = tmp_path / "events"
    with path.open("wb") as output:
        process = subprocess.Popen(
            crictl.command("events", "-o", "json"), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    time.sleep(0.5)  # crictl says nothing when it has subscribed
    yield path
    process.kill()
    process.wait()


def test_events_tell_what_happens_to_containers(crictl: Crictl, files: dict[str, str], events: Path) -> None:
    pod_id = crictl("runp", files["pod"])
    container_id = crictl("create", pod_id, files["container"], files["pod"])
    crictl("start", container_id)
    crictl("stop", container_id)
    crictl("rm", container_id)

    def seen() -> list[str]:
        return [
            each["containerEventType"] for each in objects(events.read_text()) if each["containerId"] == container_id
        ]

    expected = [f"CONTAINER_{kind}_EVENT" for kind in ("CREATED", "STARTED", "STOPPED", "DELETED")]
    wait_until(lambda: len(seen()) >= len(expected), f"four events in {events}", 10)
    assert seen() == expected


def objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects that stand one after the other in `text`; one that is not whole yet ends it."""
    decoder, position = json.JSONDecoder(), 0
    while (position := text.find("{", position)) >= 0:
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            return
        yield value
