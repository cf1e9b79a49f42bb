"""Options of runtime handlers, OCI hooks directories and CDI devices, beside a real daemon."""

import json
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from oci import runtime
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness.client import Client
from tests.e2e.harness.daemon import Daemon
from tests.e2e.harness.ports import wait_until

FOR_EVER = ["sleep", "100000"]
DENY_MKDIR = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}],
}


def wrapper(directory: Path, name: str, before: str) -> Path:
    """An OCI runtime that does `before`, then what the real one does."""
    real = next(iter(runtime.find(("runc", "crun")).values()))
    path = directory / name
    path.write_text(f'#!/bin/sh\n{before}\nexec {real} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def place(directory: Path) -> Path:
    """Where the settings of this module lie."""
    made = directory / "handler-options"
    for name in ("cdi", "hooks.d"):
        (made / name).mkdir(parents=True)
    return made


@pytest.fixture(scope="module")
def shared_daemon(make_daemon: MakeDaemon, place: Path) -> Daemon:
    (place / "seccomp.json").write_text(json.dumps(DENY_MKDIR))
    device = {"deviceNodes": [{"path": "/dev/here", "hostPath": "/dev/null"}]}
    description = {"cdiVersion": "0.6.0", "kind": "v.com/c", "devices": [{"name": "one", "containerEdits": device}]}
    (place / "cdi/v.json").write_text(json.dumps(description))
    told = wrapper(place, "told", f'echo "$*" >> {place}/commands')
    slow = wrapper(place, "slow", 'for word; do [ "$word" != create ] || sleep 60; done')
    handlers: dict[str, Any] = {
        "told": {
            "path": told,
            "runtime_args": ["--debug"],
            "no_pivot": True,
            "allowed_annotations": ["com.example.may", "com.example.both"],
            "default_annotations": ["com.example.both=handler", "com.example.own=handler"],
            "seccomp_profile": place / "seccomp.json",
        },
        "slow": {"path": slow, "container_create_timeout": "1s"},
    }
    runtime_settings = {"cdi_spec_dirs": [place / "cdi"], "hooks_dir": [place / "hooks.d"], "handlers": handlers}
    made = make_daemon({"runtime": runtime_settings})
    for name in handlers:  # runtimes make it at their first container, and it stays
        (made.run_dir / "runtimes" / name).mkdir(0o700, parents=True)
    return made


def config_of(daemon: Daemon, container_id: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((daemon.run_dir / "containers" / container_id / "config.json").read_text())
    return config


def not_ready(client: Client) -> str:
    """Why the runtime is not ready; "" when it is."""
    conditions = client.runtime.Status(pb.StatusRequest(), timeout=10).status.conditions
    condition = next(each for each in conditions if each.type == "RuntimeReady")
    return "" if condition.status else f"{condition.reason}: {condition.message}"


def test_a_handler_s_options_reach_its_runtime(daemon: Daemon, client: Client, busybox: str, place: Path) -> None:
    annotations = {
        "com.example.both": "pod",
        "com.example.may": "pod",
        "com.example.not": "pod",
        "com.example.own": "x",
    }
    pod = client.run_pod("told", handler="told", annotations=annotations)

    container_id = client.run(pod, busybox, FOR_EVER)

    commands = [line for line in (place / "commands").read_text().splitlines() if container_id in line]
    assert any(" --debug " in line and " create " in line and " --no-pivot" in line for line in commands)
    assert all(" --debug " in line for line in commands)
    seen = config_of(daemon, container_id)["annotations"]
    assert {name: value for name, value in seen.items() if name.startswith("com.example.")} == {
        "com.example.both": "pod",
        "com.example.may": "pod",
        "com.example.own": "handler",
    }


def test_runtime_default_is_the_handler_s_seccomp_profile(client: Client, busybox: str) -> None:
    profile = pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault)
    linux = pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(seccomp=profile))

    answers = {}
    for handler in ("told", ""):
        pod = client.run_pod(f"seccomp{handler}", handler=handler)
        container_id = client.run(pod, busybox, FOR_EVER, linux=linux)
        answers[handler] = client.exec_sync(container_id, ["mkdir", "/made"]).exit_code

    assert answers == {"told": 1, "": 0}


def test_a_runtime_that_takes_too_long_is_ended_in_its_handler_s_time(client: Client, busybox: str) -> None:
    pod = client.run_pod("slow", handler="slow")
    began = time.monotonic()

    with pytest.raises(grpc.RpcError) as raised:
        client.run(pod, busybox, FOR_EVER)

    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - began < 30


def test_a_cdi_device_is_there_and_one_that_nobody_has_is_refused_at_once(client: Client, busybox: str) -> None:
    pod = client.run_pod("cdi")
    container_id = client.run(pod, busybox, FOR_EVER, CDI_devices=[pb.CDIDevice(name="v.com/c=one")])
    assert client.exec_sync(container_id, ["test", "-c", "/dev/here"]).exit_code == 0

    for name in ("v.com/c=two", "nothing"):
        with pytest.raises(grpc.RpcError, match=name) as raised:
            client.run(pod, busybox, FOR_EVER, "other", CDI_devices=[pb.CDIDevice(name=name)])
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(client.containers()) == 1


def test_a_hook_runs_for_pods_with_its_annotation(client: Client, busybox: str, place: Path) -> None:
    program, seen = place / "hook", place / "hooked"
    program.write_text(f"#!/bin/sh\ncat > {seen}\n")
    program.chmod(0o755)
    file = place / "hooks.d/one.json"
    file.write_text(
        json.dumps(
            {
                "version": "1.0.0",
                "hook": {"path": str(program)},
                "when": {"annotations": {"^com\\.example\\.hook$": "^yes$"}},
                "stages": ["createRuntime"],
            }
        )
    )
    client.run(client.run_pod("without"), busybox, FOR_EVER)
    assert not seen.exists()

    container_id = client.run(client.run_pod("hooked", annotations={"com.example.hook": "yes"}), busybox, FOR_EVER)

    assert json.loads(seen.read_text())["id"] == container_id
    file.unlink()


def test_a_hook_file_that_is_wrong_refuses_containers_until_it_is_mended(
    client: Client, busybox: str, place: Path
) -> None:
    file = place / "hooks.d/wrong.json"
    file.write_text("{")
    pod = client.run_pod("wrong-hook")

    with pytest.raises(grpc.RpcError, match=r"wrong\.json") as raised:
        client.run(pod, busybox, FOR_EVER)
    wait_until(lambda: "wrong.json" in not_ready(client), "the node is not ready", 15)
    file.unlink()
    wait_until(lambda: not not_ready(client), "the node is ready", 15)

    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert client.run(pod, busybox, FOR_EVER)
