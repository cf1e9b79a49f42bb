"""The command line against a real daemon: images, status, and how the daemon starts and stops."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import network
from tests.e2e.harness import registry as registries
from tests.e2e.harness.daemon import CRITO, Daemon
from tests.e2e.harness.images import BUSYBOX, TestImage, busybox_image
from tests.e2e.harness.ports import free_port, wait_until
from tests.e2e.harness.registry import Registry, running_registry

MISSING = [
    name
    for name, there in {
        "root": os.geteuid() == 0,
        "docker-registry": bool(registries.PROGRAM),
        "busybox-static": BUSYBOX.exists(),
        "CNI plugins": not network.missing_plugins(),
    }.items()
    if not there
]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")

IMAGE = busybox_image("commands")


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="crito-cmd-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def registry(home: Path) -> Iterator[Registry]:
    with running_registry(home / "registry") as running:
        yield running


@pytest.fixture(scope="module")
def daemon(home: Path, registry: Registry) -> Iterator[Daemon]:
    made = Daemon(home / "d", {"metrics": {"listen": f"127.0.0.1:{free_port()}"}})
    made.registries_conf.write_text(f'[[registry]]\nlocation = "{registry.host}"\ninsecure = true\n')
    try:
        made.start()
        yield made
    finally:
        made.destroy()


@pytest.fixture(scope="module")
def reference(registry: Registry) -> str:
    return registry.push(IMAGE, "commands/busybox", "1")


def crito(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(CRITO), *arguments, "--socket", str(daemon.socket)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def said(daemon: Daemon, *arguments: str) -> str:
    done = crito(daemon, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def write_layout(directory: Path, image: TestImage) -> Path:
    """An OCI layout of one image without a name."""
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for blob in (image.manifest, image.config, *image.layers):
        (blobs / blob.digest.removeprefix("sha256:")).write_bytes(blob.data)
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    index = {"schemaVersion": 2, "manifests": [image.manifest.descriptor()]}
    (directory / "index.json").write_text(json.dumps(index))
    return directory


def test_an_image_is_pulled_listed_inspected_and_removed(daemon: Daemon, reference: str) -> None:
    pulled = said(daemon, "images", "pull", reference)
    listed = json.loads(said(daemon, "images", "list", "--json"))
    inspected = json.loads(said(daemon, "images", "inspect", reference))
    said(daemon, "images", "remove", reference)

    assert pulled.split()[0] == IMAGE.id.removeprefix("sha256:")[:12]
    assert reference in pulled
    assert [(each["id"], each["repo_tags"]) for each in listed] == [(IMAGE.id, [reference])]
    assert inspected["id"] == IMAGE.id
    assert inspected["imageSpec"]["config"]["Cmd"] == ["sh"]
    assert json.loads(said(daemon, "images", "list", "--json")) == []


def test_a_pull_tells_its_progress_to_programs(daemon: Daemon, reference: str) -> None:
    lines = objects(said(daemon, "images", "pull", reference, "--json"))
    said(daemon, "images", "remove", reference)

    assert lines[-1]["image"]["id"] == IMAGE.id
    done = [line["progress"] for line in lines if "progress" in line][-1]
    assert (done["phase"], done["layers_done"], done["layers_total"]) == ("done", 1, 1)


def test_an_image_is_loaded_from_a_layout_under_the_name_that_is_given(daemon: Daemon, home: Path) -> None:
    layout = write_layout(home / "layout", IMAGE)

    said(daemon, "images", "load", str(layout), "--reference", "local.test/loaded:2")
    table = said(daemon, "images", "list")
    said(daemon, "images", "remove", "local.test/loaded:2")

    assert table.splitlines()[1].split()[:2] == ["local.test/loaded:2", IMAGE.id.removeprefix("sha256:")[:12]]


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="needs skopeo")
def test_an_image_is_loaded_from_a_docker_archive(daemon: Daemon, home: Path, reference: str) -> None:
    archive = home / "docker.tar"
    copy = ["skopeo", "copy", "--src-tls-verify=false", f"docker://{reference}"]
    subprocess.run([*copy, f"docker-archive:{archive}:local.test/archived:3"], check=True, capture_output=True)

    loaded = said(daemon, "images", "load", str(archive))
    said(daemon, "images", "remove", "local.test/archived:3")

    assert "local.test/archived:3" in loaded


def test_what_is_not_there_is_said_in_a_line(daemon: Daemon, registry: Registry, home: Path) -> None:
    for arguments in (
        ("images", "pull", f"{registry.host}/commands/none:1"),
        ("images", "load", str(home / "none.tar")),
        ("images", "inspect", "local.test/none:1"),
        ("images", "remove", "local.test/none:1"),
    ):
        done = crito(daemon, *arguments)

        assert done.returncode == 1
        assert done.stderr.startswith("crito: ")
        assert "none" in done.stderr
        assert "Traceback" not in done.stderr


def test_the_status_is_told_to_people_and_programs(daemon: Daemon) -> None:
    text = said(daemon, "status")
    status = json.loads(said(daemon, "status", "--json"))

    assert "✓ RuntimeReady" in text
    assert "✓ NetworkReady" in text
    assert status["daemon"]["pid"] == daemon.pid
    assert status["daemon"]["root"] == str(daemon.root)
    assert "" in status["runtime_handlers"]


def test_metrics_are_served_where_the_configuration_says(daemon: Daemon) -> None:
    said(daemon, "status")

    with urllib.request.urlopen(f"http://{daemon.settings['metrics']['listen']}/metrics", timeout=10) as answer:
        text = answer.read().decode()

    assert 'crito_operations_total{code="OK",operation="Status"}' in text
    assert "crito_pod_sandboxes 0.0" in text
    assert "process_resident_memory_bytes" in text


def test_the_socket_is_for_the_owner_and_the_group(daemon: Daemon) -> None:
    assert daemon.socket.stat().st_mode & 0o777 == 0o660


def test_a_second_daemon_of_the_same_directories_is_refused(daemon: Daemon) -> None:
    command = [str(CRITO), "serve", "--config", str(daemon.directory / "crito.toml")]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 1
    assert "in use by another crito daemon" in done.stderr
    assert "Traceback" not in done.stderr
    said(daemon, "status")  # the first one still answers


def test_a_daemon_without_pods_takes_all_of_its_own_along(home: Path) -> None:
    lonely = Daemon(home / "lonely", {"log": {"format": "json"}})
    try:
        lonely.start()
        status = lonely.stop()

        assert status == 0
        assert all(json.loads(line)["level"] in ("info", "debug", "warning") for line in lonely.log.open())
        wait_until(lambda: not lonely.traces()["processes"], "no process is left", 10)
        assert not lonely.socket.exists()
    finally:
        lonely.destroy()


def test_an_interrupt_stops_it_too(home: Path) -> None:
    interrupted = Daemon(home / "interrupted")
    try:
        interrupted.start()
        assert interrupted.process is not None
        interrupted.process.send_signal(signal.SIGINT)

        assert interrupted.process.wait(30) == 0
    finally:
        interrupted.destroy()
