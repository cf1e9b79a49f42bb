"""Containers and pods are written down by CRIU with runc, and go on in other pods."""

import gzip
import json
import os
import shutil
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness.client import Client, Pod
from tests.e2e.harness.daemon import Daemon
from tests.e2e.harness.images import LAYER, Blob, image, sha256
from tests.e2e.harness.registry import Registry

CRIU = os.environ.get("CRITO_TEST_CRIU") or shutil.which("criu") or ""  # a newer one than the node's can be named
COUNTER = ["sh", "-c", "echo written > /data; rm /etc/group; i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done"]


def _missing() -> str:
    if not CRIU:
        return "criu is not installed"
    checked = subprocess.run([CRIU, "check"], capture_output=True, text=True, check=False)
    if checked.returncode != 0:
        return f"criu check: {checked.stderr.strip().splitlines()[:1]}"
    return "" if shutil.which("runc") else "runc is not installed"


@pytest.fixture(scope="module")
def shared_daemon(make_daemon: MakeDaemon) -> Daemon:
    if missing := _missing():
        pytest.skip(missing)
    return make_daemon({"runtime": {"default_handler": "runc", "criu_path": CRIU}})


@pytest.fixture
def restarted(daemon: Daemon) -> Iterator[Daemon]:
    yield daemon
    if daemon.process is None or daemon.process.poll() is not None:
        daemon.kill()
        daemon.start()


def own_pids() -> pb.NamespaceOption:
    return pb.NamespaceOption(pid=pb.CONTAINER)


def run_pod(client: Client, name: str) -> Pod:
    return client.run_pod(name, linux=pod_linux())


def pod_linux() -> pb.LinuxPodSandboxConfig:
    return pb.LinuxPodSandboxConfig(security_context=pb.LinuxSandboxSecurityContext(namespace_options=own_pids()))


def container_linux() -> pb.LinuxContainerConfig:
    return pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(namespace_options=own_pids()))


def run_counter(client: Client, pod: Pod, image: str, name: str = "main") -> str:
    container_id = client.run(pod, image, COUNTER, name, linux=container_linux())
    wait_for_lines(client, pod, 10, name)
    return container_id


def wait_for_lines(client: Client, pod: Pod, least: int, name: str = "main") -> list[int]:
    deadline = time.monotonic() + 20
    while len(lines := client.log(pod, name).split()) < least:
        assert time.monotonic() < deadline, f"only {len(lines)} lines"
        time.sleep(0.05)
    return [int(line) for line in lines]


def checkpoint(client: Client, container_id: str, location: Path, timeout: int = 60) -> None:
    request = pb.CheckpointContainerRequest(container_id=container_id, location=str(location), timeout=timeout)
    client.runtime.CheckpointContainer(request, timeout=90)


def assert_runs_on(client: Client, pod: Pod, container_id: str, name: str = "main") -> None:
    before = len(client.log(pod, name).split())
    lines = wait_for_lines(client, pod, before + 5, name)
    assert lines == list(range(len(lines)))
    assert client.status(container_id).state == pb.CONTAINER_RUNNING


def refused(error: pytest.ExceptionInfo[grpc.RpcError]) -> tuple[grpc.StatusCode, str]:
    return error.value.code(), error.value.details() or ""


def test_a_counter_goes_on_counting_in_another_pod_and_in_its_own(client: Client, busybox: str, tmp_path: Path) -> None:
    pod = run_pod(client, "first")
    original = run_counter(client, pod, busybox)
    archive = tmp_path / "counter.tar"

    checkpoint(client, original, archive)

    assert_runs_on(client, pod, original)
    other = run_pod(client, "second")
    restored = client.create(other, client.container_config(str(archive), linux=container_linux()))
    assert client.status(restored).state == pb.CONTAINER_CREATED
    before = client.log(other).split()
    client.start(restored)
    lines = wait_for_lines(client, other, len(before) + 5)
    assert lines == list(range(len(lines)))
    seen = client.exec_sync(restored, ["sh", "-c", "cat /data; hostname; ls /etc"]).stdout.decode().split()
    assert seen[:2] == ["written", "second"]
    assert "group" not in seen
    assert client.status(restored).image_ref == client.status(original).image_ref
    client.stop(restored)
    assert client.status(restored).exit_code == 137


def test_the_archive_has_the_layout_that_other_programs_read(client: Client, busybox: str, tmp_path: Path) -> None:
    pod = run_pod(client, "layout")
    container_id = run_counter(client, pod, busybox)
    archive = tmp_path / "counter.tar"

    checkpoint(client, container_id, archive)

    with tarfile.open(archive) as tar:
        names = set(tar.getnames())
        config, spec, deleted, mounts = (
            json.load(file)
            for name in ("config.dump", "spec.dump", "deleted.files", "bind.mounts")
            if (file := tar.extractfile(name)) is not None
        )
        diff = tar.extractfile("rootfs-diff.tar")
        assert diff is not None
        with tarfile.open(fileobj=diff) as written:
            assert "data" in written.getnames()
    assert {"checkpoint/inventory.img", "dump.log", "container.log"} <= names
    assert (config["id"], config["name"], config["runtime"]) == (container_id, "main", "runc")
    assert spec["annotations"]["io.container.manager"] == "cri-o"
    assert json.loads(spec["annotations"]["io.kubernetes.cri-o.Metadata"]) == {"name": "main", "attempt": 0}
    assert deleted == ["/etc/group"]
    assert {"/etc/hosts", "/dev/shm"} <= {mount["destination"] for mount in mounts}
    assert archive.stat().st_mode & 0o777 == 0o600


def test_a_checkpoint_image_is_restored_as_an_archive_is(
    client: Client, image_registry: Registry, busybox: str, tmp_path: Path
) -> None:
    pod = run_pod(client, "imaged")
    checkpoint(client, run_counter(client, pod, busybox), archive := tmp_path / "counter.tar")
    plain = archive.read_bytes()
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [sha256(plain)]}}
    layer = Blob(LAYER, gzip.compress(plain, 1))
    made = image(config, (layer,), {"io.kubernetes.cri-o.annotations.checkpoint.name": "main"})
    reference = image_registry.push(made, "test/checkpoint", "1")
    client.pull(reference)
    other = run_pod(client, "of-image")

    restored = client.run(other, reference, [], linux=container_linux())

    assert_runs_on(client, other, restored)
    client.remove_pod(other.id)
    client.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=reference)), timeout=30)


def test_a_restored_container_that_is_never_started_goes_like_any_other(
    restarted: Daemon, client: Client, busybox: str, tmp_path: Path
) -> None:
    pod = run_pod(client, "unstarted")
    checkpoint(client, run_counter(client, pod, busybox), archive := tmp_path / "counter.tar")
    other = run_pod(client, "other")
    first = client.create(other, client.container_config(str(archive), linux=container_linux()))
    second = client.create(other, client.container_config(str(archive), name="second", linux=container_linux()))

    restarted.kill()
    restarted.start()

    client.stop(first)
    assert client.status(first).state == pb.CONTAINER_EXITED
    client.remove(first)
    client.start(second)
    assert client.status(second).state == pb.CONTAINER_RUNNING


def test_a_checkpoint_that_takes_too_long_leaves_no_archive_and_a_container_that_runs(
    make_daemon: MakeDaemon, busybox: str, tmp_path: Path
) -> None:
    if missing := _missing():
        pytest.skip(missing)
    slow = tmp_path / "bin" / "criu"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\n[ "$1" = check ] || sleep 60\nexec {CRIU} "$@"\n')
    slow.chmod(0o755)
    client = make_daemon({"runtime": {"default_handler": "runc", "criu_path": slow}}).client()
    pod = run_pod(client, "slow")
    container_id = run_counter(client, pod, busybox)
    archives = tmp_path / "archives"
    archives.mkdir()
    began = time.monotonic()

    with pytest.raises(grpc.RpcError) as error:
        checkpoint(client, container_id, archives / "a.tar", timeout=2)

    assert refused(error)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - began < 10
    assert list(archives.iterdir()) == []
    assert_runs_on(client, pod, container_id)
    client.remove_pod(pod.id)


def test_a_daemon_that_is_killed_in_the_middle_leaves_nothing_half_visible(
    restarted: Daemon, client: Client, busybox: str, tmp_path: Path
) -> None:
    pod = run_pod(client, "killed")
    container_id = run_counter(client, pod, busybox)

    for delay_s in (0.02, 0.08, 0.15, 0.25):
        directory = tmp_path / f"{delay_s}"
        directory.mkdir()
        calling = threading.Thread(target=_checkpoint_or_not, args=(client, container_id, directory / "a.tar"))
        calling.start()
        time.sleep(delay_s)
        restarted.kill()
        calling.join()
        restarted.start()

        assert_runs_on(client, pod, container_id)
        for archive in directory.iterdir():
            with tarfile.open(archive) as tar:
                assert {"config.dump", "spec.dump", "checkpoint/inventory.img", "rootfs-diff.tar"} <= set(
                    tar.getnames()
                )
        assert list((restarted.root / "checkpoints").iterdir()) == []

    checkpoint(client, container_id, tmp_path / "after.tar")


def _checkpoint_or_not(client: Client, container_id: str, location: Path) -> None:
    try:
        checkpoint(client, container_id, location)
    except grpc.RpcError:
        return


def test_a_restore_that_a_killed_daemon_was_waiting_for_is_an_end_and_leaves_no_process(
    make_daemon: MakeDaemon, busybox: str, tmp_path: Path
) -> None:
    if missing := _missing():
        pytest.skip(missing)
    slow = tmp_path / "bin" / "criu"
    slow.parent.mkdir()
    slow.symlink_to(CRIU)
    daemon = make_daemon({"runtime": {"default_handler": "runc", "criu_path": slow}})
    client = daemon.client()
    pod = run_pod(client, "counts")
    checkpoint(client, run_counter(client, pod, busybox), archive := tmp_path / "counter.tar")
    other = run_pod(client, "restored")
    restored = client.create(other, client.container_config(str(archive), linux=container_linux()))
    slow.unlink()
    slow.write_text("#!/bin/sh\nsleep 60\n")
    slow.chmod(0o755)
    starting = threading.Thread(target=_start_or_not, args=(client, restored))
    starting.start()
    time.sleep(0.7)

    daemon.kill()
    starting.join()
    daemon.start()

    assert client.status(restored).state == pb.CONTAINER_EXITED
    assert client.status(restored).reason == "StartError"
    client.remove_pod(other.id, timeout_s=20)
    client.remove_pod(pod.id)
    assert client.containers() == []


def _start_or_not(client: Client, container_id: str) -> None:
    try:
        client.start(container_id)
    except grpc.RpcError:
        return


def test_what_is_no_place_or_no_checkpoint_is_refused(client: Client, busybox: str, tmp_path: Path) -> None:
    pod = run_pod(client, "refused")
    container_id = run_counter(client, pod, busybox)
    (tmp_path / "no.tar").write_bytes(b"not a tar")

    for location in ("relative.tar", "/nowhere/at/all.tar", str(tmp_path)):
        with pytest.raises(grpc.RpcError) as error:
            checkpoint(client, container_id, Path(location))
        assert refused(error)[0] is grpc.StatusCode.INVALID_ARGUMENT
    for name, code in (("no.tar", grpc.StatusCode.INVALID_ARGUMENT), ("none.tar", grpc.StatusCode.NOT_FOUND)):
        with pytest.raises(grpc.RpcError) as error:
            client.create(pod, client.container_config(str(tmp_path / name), name="no", linux=container_linux()))
        assert refused(error)[0] is code
    client.stop(container_id)
    with pytest.raises(grpc.RpcError) as error:
        checkpoint(client, container_id, tmp_path / "a.tar")
    assert refused(error)[0] is grpc.StatusCode.FAILED_PRECONDITION
    assert sorted(path.name for path in tmp_path.iterdir()) == ["no.tar"]


def test_a_pod_goes_on_in_another_one_with_what_its_containers_share(
    client: Client, busybox: str, tmp_path: Path
) -> None:
    pod = run_pod(client, "pod")
    ids = [run_counter(client, pod, busybox, name) for name in ("one", "two")]
    client.exec_sync(ids[0], ["sh", "-c", "echo shared > /dev/shm/note"])
    directory = tmp_path / "checkpoint"
    directory.mkdir()

    client.runtime.CheckpointPod(
        pb.CheckpointPodRequest(pod_sandbox_id=pod.id, output_path=str(directory), container_ids=ids), timeout=60
    )

    for container_id, name in zip(ids, ("one", "two"), strict=True):
        assert_runs_on(client, pod, container_id, name)
    config = client.pod_config("again", linux=pod_linux())
    wanted = [client.container_config(busybox, COUNTER, name, linux=container_linux()) for name in ("one", "two")]
    answer = restore_pod(client, directory, config, wanted)
    restored = {each.name: each.container_id for each in answer.restored_containers}
    assert set(restored) == {"one", "two"}
    again = Pod(answer.pod_sandbox_id, config)
    for name, container_id in restored.items():
        assert client.status(container_id).state == pb.CONTAINER_CREATED
        client.start(container_id)
        assert_runs_on(client, again, container_id, name)
    assert client.exec_sync(restored["two"], ["cat", "/dev/shm/note"]).stdout == b"shared\n"


def test_a_pod_that_is_not_the_checkpoints_is_refused_and_leaves_nothing(
    client: Client, busybox: str, tmp_path: Path
) -> None:
    pod = run_pod(client, "mismatch")
    container_id = run_counter(client, pod, busybox)
    request = pb.CheckpointPodRequest(pod_sandbox_id=pod.id, output_path=str(tmp_path), container_ids=[container_id])
    client.runtime.CheckpointPod(request, timeout=60)
    config = client.pod_config("again", linux=pod_linux())

    for name, command in (("another", COUNTER), ("main", ["sleep", "1"])):
        with pytest.raises(grpc.RpcError) as error:
            restore_pod(
                client, tmp_path, config, [client.container_config(busybox, command, name, linux=container_linux())]
            )
        assert refused(error)[0] is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as error:
        client.runtime.CheckpointPod(request, timeout=60)  # the directory is not empty

    assert refused(error)[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert [each.id for each in client.pods()] == [pod.id]


def restore_pod(
    client: Client, directory: Path, config: pb.PodSandboxConfig, wanted: list[pb.ContainerConfig]
) -> pb.RestorePodResponse:
    request = pb.RestorePodRequest(checkpoint_path=str(directory), config=config, container_configs=wanted)
    answer: pb.RestorePodResponse = client.runtime.RestorePod(request, timeout=60)
    assert client.pod_status(answer.pod_sandbox_id).metadata == config.metadata
    client.ids.add(answer.pod_sandbox_id)
    client.ids.update(each.container_id for each in answer.restored_containers)
    return answer


def test_a_handler_without_criu_says_so(make_daemon: MakeDaemon, busybox: str, tmp_path: Path) -> None:
    if missing := _missing():
        pytest.skip(missing)
    if b"--image-path" in subprocess.run(["crun", "checkpoint", "--help"], capture_output=True, check=False).stdout:
        pytest.skip("this crun is built with CRIU")
    client = make_daemon({"runtime": {"default_handler": "crun", "criu_path": CRIU}}).client()
    pod = run_pod(client, "crun")
    container_id = client.run(pod, busybox, ["sleep", "1000"], linux=container_linux())

    with pytest.raises(grpc.RpcError) as error:
        checkpoint(client, container_id, tmp_path / "a.tar")

    assert refused(error)[0] is grpc.StatusCode.FAILED_PRECONDITION
    assert "crun" in refused(error)[1]
    client.remove_pod(pod.id)
