"""Bad requests and broken surroundings: the right code, within the deadline, and nothing left behind."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.harness.client import Client
from tests.e2e.harness.daemon import Daemon
from tests.e2e.harness.registry import Registry, Silence, running_server

Code = grpc.StatusCode
UNKNOWN_ID = "f" * 64
FOR_EVER = ["sleep", "100000"]


@contextmanager
def fails(code: Code | tuple[Code, ...], *words: str) -> Iterator[None]:
    """The block must fail with `code` (or one of several), and its text must hold all `words`."""
    codes = code if isinstance(code, tuple) else (code,)
    with pytest.raises(grpc.RpcError) as failure:
        yield
    error = failure.value
    assert error.code() in codes, f"{error.code()}: {error.details()}"
    for word in words:
        assert word in (error.details() or ""), error.details()


# Ids that nobody knows

UNKNOWN: dict[str, Callable[[Client], Any]] = {
    "PodSandboxStatus": lambda c: c.pod_status(UNKNOWN_ID),
    "ContainerStatus": lambda c: c.status(UNKNOWN_ID),
    "StartContainer": lambda c: c.start(UNKNOWN_ID),
    "ExecSync": lambda c: c.exec_sync(UNKNOWN_ID, ["true"]),
    "ContainerStats": lambda c: c.runtime.ContainerStats(pb.ContainerStatsRequest(container_id=UNKNOWN_ID)),
    "PodSandboxStats": lambda c: c.runtime.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=UNKNOWN_ID)),
    "ReopenContainerLog": lambda c: c.runtime.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=UNKNOWN_ID)),
    "UpdateContainerResources": lambda c: c.runtime.UpdateContainerResources(
        pb.UpdateContainerResourcesRequest(container_id=UNKNOWN_ID, linux=pb.LinuxContainerResources(cpu_shares=2))
    ),
    "CreateContainer": lambda c: c.runtime.CreateContainer(
        pb.CreateContainerRequest(
            pod_sandbox_id=UNKNOWN_ID, config=c.container_config("x"), sandbox_config=c.pod_config()
        )
    ),
}


@pytest.mark.parametrize("verb", UNKNOWN)
def test_an_unknown_id_is_not_found(client: Client, verb: str) -> None:
    with fails(Code.NOT_FOUND, UNKNOWN_ID[:12]):
        UNKNOWN[verb](client)


def test_stopping_and_removing_what_is_not_there_succeeds(client: Client) -> None:
    client.stop_pod(UNKNOWN_ID)
    client.remove_pod(UNKNOWN_ID)
    client.remove(UNKNOWN_ID)
    client.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image="localhost/never/pulled:1")))


def test_the_status_of_an_image_that_is_not_there_is_empty(client: Client) -> None:
    answer = client.images.ImageStatus(pb.ImageStatusRequest(image=pb.ImageSpec(image="localhost/never/pulled:1")))

    assert not answer.HasField("image")


# Requests that are wrong in themselves

WRONG_PODS: dict[str, Callable[[Client], pb.RunPodSandboxRequest]] = {
    "no configuration": lambda _: pb.RunPodSandboxRequest(),
    "no metadata": lambda _: pb.RunPodSandboxRequest(config=pb.PodSandboxConfig(hostname="x")),
    "no name": lambda _: pb.RunPodSandboxRequest(
        config=pb.PodSandboxConfig(metadata=pb.PodSandboxMetadata(uid="u", namespace="n"))
    ),
    "no uid": lambda _: pb.RunPodSandboxRequest(
        config=pb.PodSandboxConfig(metadata=pb.PodSandboxMetadata(name="x", namespace="n"))
    ),
    "a relative log directory": lambda c: pb.RunPodSandboxRequest(config=c.pod_config(log_directory="logs")),
    "a host name that is none": lambda c: pb.RunPodSandboxRequest(config=c.pod_config(hostname="a/b" * 100)),
    "a cgroup parent that climbs": lambda c: pb.RunPodSandboxRequest(
        config=c.pod_config(linux=pb.LinuxPodSandboxConfig(cgroup_parent="/../../x"))
    ),
    "a sysctl of the node": lambda c: pb.RunPodSandboxRequest(
        config=c.pod_config(linux=pb.LinuxPodSandboxConfig(sysctls={"vm.swappiness": "1"}))
    ),
    "a port that is none": lambda c: pb.RunPodSandboxRequest(
        config=c.pod_config(port_mappings=[pb.PortMapping(container_port=99999, host_port=80)])
    ),
    "a group without a user": lambda c: pb.RunPodSandboxRequest(
        config=c.pod_config(
            linux=pb.LinuxPodSandboxConfig(
                security_context=pb.LinuxSandboxSecurityContext(run_as_group=pb.Int64Value(value=1))
            )
        )
    ),
}


@pytest.mark.parametrize("what", WRONG_PODS)
def test_a_wrong_pod_is_an_invalid_argument(client: Client, what: str) -> None:
    with fails(Code.INVALID_ARGUMENT):
        client.runtime.RunPodSandbox(WRONG_PODS[what](client), timeout=30)


def test_an_unknown_runtime_handler_is_refused_by_name(client: Client) -> None:
    with fails((Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.FAILED_PRECONDITION), "no-such-handler"):
        client.run_pod(handler="no-such-handler")


WRONG_CONTAINERS: dict[str, tuple[dict[str, Any], tuple[Code, ...], str]] = {
    "a missing mount": (
        {"mounts": [pb.Mount(container_path="/x", host_path="/no/such/path")]},
        (Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.FAILED_PRECONDITION),
        "/no/such/path",
    ),
    "a mount without a container path": (
        {"mounts": [pb.Mount(host_path="/tmp")]},
        (Code.INVALID_ARGUMENT,),
        "container_path",
    ),
    "a missing device": (
        {"devices": [pb.Device(container_path="/dev/x", host_path="/dev/no-such", permissions="rwm")]},
        (Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.FAILED_PRECONDITION),
        "/dev/no-such",
    ),
    "a group without a user": (
        {"linux": {"security_context": {"run_as_group": {"value": 5}}}},
        (Code.INVALID_ARGUMENT,),
        "run_as_group",
    ),
    "a user that the image has not": (
        {"linux": {"security_context": {"run_as_username": "nobody-knows"}}},
        (Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.FAILED_PRECONDITION),
        "nobody-knows",
    ),
    "an unknown capability": (
        {"linux": {"security_context": {"capabilities": {"add_capabilities": ["FLY"]}}}},
        (Code.INVALID_ARGUMENT,),
        "FLY",
    ),
    "a log path that climbs": ({"log_path": "../../../../etc/x.log"}, (Code.INVALID_ARGUMENT,), "log_path"),
    "a seccomp profile that is missing": (
        {"linux": {"security_context": {"seccomp": {"profile_type": "Localhost", "localhost_ref": "/no/profile"}}}},
        (Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.FAILED_PRECONDITION),
        "/no/profile",
    ),
}


@pytest.mark.parametrize("what", WRONG_CONTAINERS)
def test_a_wrong_container_is_refused_and_the_pod_stays_usable(client: Client, busybox: str, what: str) -> None:
    fields, codes, word = WRONG_CONTAINERS[what]
    fields = dict(fields)
    if isinstance(fields.get("linux"), dict):
        fields["linux"] = pb.LinuxContainerConfig(**fields["linux"])
    pod = client.run_pod("wrong")

    with fails(codes, word):
        client.create(pod, client.container_config(busybox, FOR_EVER, "wrong", **fields))

    assert not client.containers()
    client.run(pod, busybox, FOR_EVER, "wrong")


def test_a_container_without_metadata_is_an_invalid_argument(client: Client, busybox: str) -> None:
    pod = client.run_pod("wrong")
    config = pb.ContainerConfig(image=pb.ImageSpec(image=busybox))

    with fails(Code.INVALID_ARGUMENT, "metadata"):
        client.create(pod, config)


def test_a_container_of_an_image_that_is_not_there_is_not_found(client: Client) -> None:
    pod = client.run_pod("wrong")

    with fails(Code.NOT_FOUND, "never/pulled"):
        client.create(pod, client.container_config("localhost/never/pulled:1", FOR_EVER))


def test_a_program_that_the_image_has_not_is_told_by_name(client: Client, busybox: str) -> None:
    pod = client.run_pod("wrong")
    config = client.container_config(busybox, ["/no/such/program"])

    with pytest.raises(grpc.RpcError) as failure:
        client.start(client.create(pod, config))

    assert failure.value.code() != Code.UNKNOWN
    assert "/no/such/program" in (failure.value.details() or "")


def test_what_needs_another_state_is_a_failed_precondition(client: Client, busybox: str) -> None:
    pod = client.run_pod("state")
    container_id = client.run(pod, busybox, ["true"])
    client.wait_exited(container_id)

    with fails(Code.FAILED_PRECONDITION):
        client.start(container_id)
    with fails(Code.FAILED_PRECONDITION):
        client.exec_sync(container_id, ["true"])
    client.stop_pod(pod.id)
    with fails(Code.FAILED_PRECONDITION):
        client.create(pod, client.container_config(busybox, FOR_EVER, "late"))


def test_an_exec_without_a_command_is_an_invalid_argument(client: Client, busybox: str) -> None:
    pod = client.run_pod("exec")
    container_id = client.run(pod, busybox, FOR_EVER)

    with fails(Code.INVALID_ARGUMENT):
        client.exec_sync(container_id, [])


@pytest.mark.parametrize(
    "reference", ["", "host.io/UPPER", "a b", "x:y:z", "img@sha256:short", "http://host/img", "/img"]
)
def test_a_malformed_image_name_is_an_invalid_argument(client: Client, reference: str) -> None:
    with fails(Code.INVALID_ARGUMENT):
        client.pull(reference, timeout_s=20)


# Registries


def trust(daemon: Daemon, host: str) -> None:
    """Let `host` be asked over plain HTTP; the file is read anew when it changes."""
    with daemon.registries_conf.open("a") as file:
        file.write(f'\n[[registry]]\nlocation = "{host}"\ninsecure = true\n')


def test_an_image_that_the_registry_has_not_is_not_found(client: Client, image_registry: Registry) -> None:
    with fails(Code.NOT_FOUND, "no/such"):
        client.pull(f"{image_registry.host}/no/such:1")


def test_a_registry_that_answers_garbage_is_told(daemon: Daemon, client: Client) -> None:
    with running_server() as host:
        trust(daemon, host)
        with pytest.raises(grpc.RpcError) as failure:
            client.pull(f"{host}/some/image:1", timeout_s=30)

    assert failure.value.code() in (Code.INTERNAL, Code.UNAVAILABLE), failure.value
    assert host in (failure.value.details() or "")


def test_a_registry_that_is_not_there_is_unavailable(daemon: Daemon, client: Client) -> None:
    with running_server() as host:
        trust(daemon, host)

    with fails(Code.UNAVAILABLE, "RegistryUnavailable", host):
        client.pull(f"{host}/some/image:1", timeout_s=60)


def test_a_pull_whose_caller_gives_up_leaves_nothing(daemon: Daemon, client: Client) -> None:
    with running_server(Silence) as host:
        trust(daemon, host)
        with fails((Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE)):
            client.pull(f"{host}/some/image:1", timeout_s=1)

    assert not [each for each in client.images.ListImages(pb.ListImagesRequest()).images if host in str(each)]


# Plugins and OCI runtimes that fail or hang


@pytest.fixture(scope="module")
def fakes(directory: Path) -> Path:
    """A directory of executables that misbehave."""
    folder = directory / "fakes"
    folder.mkdir(exist_ok=True)
    unless_del = 'cat >/dev/null; [ "$CNI_COMMAND" = DEL ] && exit 0;'
    features = 'for word; do [ $word = features ] && echo \'{"ociVersionMin":"1.0.0"}\' && exit 0; done;'
    luck = '{"cniVersion":"1.0.0","code":11,"msg":"no luck today"}'
    scripts = {
        "fails": f"{unless_del} echo '{luck}'; exit 1",
        "garbage": f"{unless_del} echo '{{]'",
        "hangs": f"{unless_del} exec sleep 4714",
        "fails-for-a-while": f"cat >/dev/null; [ -e {folder}/mended ] && exit 0; echo '{luck}'; exit 1",
        "runtime-fails": f"{features} echo 'broken on purpose' >&2; exit 1",
        "runtime-hangs": f"{features} exec sleep 4715",
        "runtime-never-answers": "exec sleep 4716",
    }
    for name, body in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


def cni_with(plugin: str, daemon: Daemon) -> str:
    """A conflist whose first plugin works and whose second one is `plugin`."""
    first = daemon.network.conflist()["plugins"][0]
    return json.dumps({"cniVersion": "1.0.0", "name": daemon.network.bridge, "plugins": [first, {"type": plugin}]})


@contextmanager
def network_of(daemon: Daemon, client: Client, plugin: str) -> Iterator[None]:
    """The network's second plugin is `plugin` within the block; the directory is watched by the daemon."""
    path = daemon.cni_conf / "10-bridge.conflist"
    before = path.read_text()
    replace(path, cni_with(plugin, daemon))
    time.sleep(0.5)
    try:
        yield
    finally:
        replace(path, before)
        time.sleep(0.5)
        client.remove_everything()


def replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}")
    draft.write_text(text)
    draft.rename(path)


@pytest.fixture(scope="module")
def shared_daemon(make_daemon: Callable[..., Daemon], fakes: Path) -> Daemon:
    """With plugins and OCI runtimes that misbehave, and short deadlines for them."""
    runtimes = ("runtime-fails", "runtime-hangs", "runtime-never-answers")
    plugins = ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni", str(fakes)]
    return make_daemon(
        {
            "network": {"plugin_dirs": plugins, "timeout": 2},
            "runtime": {
                "container_create_timeout": 3,
                "handlers": {name: {"path": str(fakes / name)} for name in runtimes},
            },
        }
    )


def test_a_cni_plugin_that_fails_is_told_in_its_own_words(daemon: Daemon, client: Client) -> None:
    with network_of(daemon, client, "fails"), fails((Code.INTERNAL, Code.UNAVAILABLE), "no luck today", "fails"):
        client.run_pod("network")


def test_a_cni_plugin_that_answers_garbage_is_told(daemon: Daemon, client: Client) -> None:
    with network_of(daemon, client, "garbage"), fails((Code.INTERNAL, Code.UNAVAILABLE), "garbage"):
        client.run_pod("network")


def test_a_cni_plugin_that_hangs_is_ended_at_its_deadline(daemon: Daemon, client: Client) -> None:
    started = time.monotonic()

    with network_of(daemon, client, "hangs"), fails((Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE), "hangs"):
        client.run_pod("network")

    assert time.monotonic() - started < 15


def test_a_cleanup_that_fails_is_tried_again_until_it_is_done(daemon: Daemon, client: Client, fakes: Path) -> None:
    threading.Timer(3.0, (fakes / "mended").touch).start()

    with network_of(daemon, client, "fails-for-a-while"), fails((Code.INTERNAL, Code.UNAVAILABLE), "no luck today"):
        client.run_pod("network")


def test_a_cni_plugin_that_is_not_installed_is_told_by_name(daemon: Daemon, client: Client) -> None:
    with (
        network_of(daemon, client, "not-installed"),
        fails((Code.INTERNAL, Code.UNAVAILABLE, Code.FAILED_PRECONDITION), "not-installed"),
    ):
        client.run_pod("network")


def test_without_any_network_pods_are_refused_and_the_status_says_why(daemon: Daemon, client: Client) -> None:
    path = daemon.cni_conf / "10-bridge.conflist"
    hidden = path.with_suffix(".hidden")
    path.rename(hidden)
    time.sleep(0.5)
    try:
        status = client.runtime.Status(pb.StatusRequest()).status
        ready = {each.type: each for each in status.conditions}
        assert not ready["NetworkReady"].status
        assert ready["NetworkReady"].reason
        assert str(daemon.cni_conf) in ready["NetworkReady"].message
        with fails((Code.UNAVAILABLE, Code.FAILED_PRECONDITION)):
            client.run_pod("network")
    finally:
        hidden.rename(path)
        time.sleep(0.5)
    client.run_pod("network")


def test_an_oci_runtime_that_fails_is_told_in_its_own_words(client: Client, busybox: str) -> None:
    with fails((Code.INTERNAL, Code.FAILED_PRECONDITION, Code.UNAVAILABLE), "broken on purpose"):
        pod = client.run_pod("runtime", handler="runtime-fails")
        client.run(pod, busybox, FOR_EVER)

    assert not client.containers()


def test_an_oci_runtime_that_hangs_is_ended_at_its_deadline(client: Client, busybox: str) -> None:
    started = time.monotonic()

    with fails((Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE, Code.INTERNAL, Code.FAILED_PRECONDITION)):
        pod = client.run_pod("runtime", handler="runtime-hangs")
        client.run(pod, busybox, FOR_EVER)

    assert time.monotonic() - started < 20
    assert not client.containers()


def test_an_oci_runtime_that_never_answers_is_told_as_such(client: Client) -> None:
    with fails((Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED), "runtime-never-answers"):
        client.run_pod("runtime", handler="runtime-never-answers")


# The edge itself


def test_bytes_that_are_no_message_are_answered_with_an_error(client: Client) -> None:
    call = client.channel.unary_unary("/runtime.v1.RuntimeService/RunPodSandbox", None, None)

    with pytest.raises(grpc.RpcError) as failure:
        call(b"\xff\xff\xff\xff", timeout=5)

    assert failure.value.code() in (Code.INTERNAL, Code.INVALID_ARGUMENT, Code.UNKNOWN)  # gRPC answers this by itself
    assert client.runtime.Version(pb.VersionRequest(), timeout=5).runtime_name == "crito"


def test_an_unknown_method_is_unimplemented(client: Client) -> None:
    call = client.channel.unary_unary("/runtime.v1.RuntimeService/MakeCoffee", None, None)

    with fails(Code.UNIMPLEMENTED):
        call(b"", timeout=5)


def test_the_socket_is_closed_to_others(daemon: Daemon, client: Client) -> None:
    del client

    assert daemon.socket.stat().st_mode & 0o777 == 0o660
