"""What only a node with systemd, cgroup v2 alone and AppArmor can show, through the CRI, with crun and with runc."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import cgroups
from tests.e2e.harness.client import Client, Pod
from tests.e2e.harness.daemon import Daemon
from tests.e2e.harness.ports import wait_until
from tests.vm import node

pytestmark = node.only_in_the_machine

FOR_EVER = ["sleep", "100000"]
PROFILE = "crito-test-no-writes"
MIB = 1 << 20
Profile = pb.SecurityProfile


@pytest.fixture(scope="module", params=["crun", "runc"])
def daemon(request: pytest.FixtureRequest, make_daemon: MakeDaemon) -> Daemon:
    return make_daemon({"runtime": {"default_handler": request.param}})


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    client = daemon.client()
    yield client
    client.remove_everything()
    node.wait_until_nothing_is_left(sorted(client.ids))
    client.close()


@pytest.fixture
def pod(client: Client) -> Pod:
    return client.run_pod("node")


@pytest.fixture(scope="module")
def loaded_profile() -> Iterator[str]:
    text = f"profile {PROFILE} flags=(attach_disconnected) {{ file, capability, network, signal, deny /tmp/** w, }}"
    subprocess.run(["apparmor_parser", "--replace"], input=text, text=True, check=True)
    yield PROFILE
    subprocess.run(["apparmor_parser", "--remove"], input=text, text=True, check=True)


def scope(container_id: str) -> Path:
    (found,) = Path("/sys/fs/cgroup").glob(f"**/crito-{container_id}.scope")
    return found


def limits(container_id: str, name: str) -> str:
    """A file of the container's cgroup; crun has a cgroup of its own below the scope."""
    top = scope(container_id)
    values = [(each / name).read_text().strip() for each in (top / "container", top) if (each / name).exists()]
    return next((value for value in values if not value.startswith("max")), values[0])


def with_resources(**fields: object) -> pb.LinuxContainerConfig:
    return pb.LinuxContainerConfig(resources=pb.LinuxContainerResources(**fields))  # type: ignore[arg-type]


def confined(profile: pb.SecurityProfile) -> pb.LinuxContainerConfig:
    return pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(apparmor=profile))


# cgroups


def test_limits_are_in_the_scope_s_files(client: Client, pod: Pod, busybox: str) -> None:
    asked = with_resources(
        cpu_period=100000,
        cpu_quota=50000,
        cpu_shares=2048,
        memory_limit_in_bytes=64 * MIB,
        cpuset_cpus="0",
        unified={"memory.high": str(48 * MIB), "pids.max": "77"},
    )
    container_id = client.run(pod, busybox, FOR_EVER, linux=asked)

    assert limits(container_id, "cpu.max") == "50000 100000"
    assert limits(container_id, "memory.max") == str(64 * MIB)
    assert limits(container_id, "memory.high") == str(48 * MIB)
    assert limits(container_id, "pids.max") == "77"
    assert limits(container_id, "cpuset.cpus") == "0"
    assert int(limits(container_id, "cpu.weight")) > 39


def test_an_update_changes_them_and_outlives_a_reload_of_systemd(client: Client, pod: Pod, busybox: str) -> None:
    container_id = client.run(pod, busybox, FOR_EVER, linux=with_resources(memory_limit_in_bytes=64 * MIB))
    changes = pb.LinuxContainerResources(
        memory_limit_in_bytes=96 * MIB, cpu_period=100000, cpu_quota=30000, unified={"memory.high": str(80 * MIB)}
    )
    request = pb.UpdateContainerResourcesRequest(container_id=container_id, linux=changes)

    client.runtime.UpdateContainerResources(request, timeout=30)
    node.systemctl("daemon-reload")

    assert limits(container_id, "memory.max") == str(96 * MIB)
    assert limits(container_id, "memory.high") == str(80 * MIB)
    assert limits(container_id, "cpu.max") == "30000 100000"
    shown = client.status(container_id).resources.linux
    assert (shown.memory_limit_in_bytes, shown.cpu_quota) == (96 * MIB, 30000)


def test_an_exec_that_takes_too_long_ends_with_all_its_processes(client: Client, pod: Pod, busybox: str) -> None:
    container_id = client.run(pod, busybox, FOR_EVER)
    escaping = "for i in 1 2 3; do setsid sh -c 'sleep 4717 & sleep 4717' & done; sleep 4717"

    with pytest.raises(grpc.RpcError) as failure:
        client.exec_sync(container_id, ["sh", "-c", escaping], timeout_s=2)

    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    listed = client.exec_sync(container_id, ["ps"]).stdout.decode()
    assert "4717" not in listed
    assert client.status(container_id).state == pb.CONTAINER_RUNNING


def test_stats_tell_pressure_io_and_processes(client: Client, pod: Pod, busybox: str) -> None:
    container_id = client.run(pod, busybox, ["sh", "-c", "while :; do :; done"])

    def stats() -> pb.ContainerStats:
        request = pb.ContainerStatsRequest(container_id=container_id)
        found: pb.ContainerStats = client.runtime.ContainerStats(request, timeout=30).stats
        return found

    wait_until(lambda: stats().cpu.usage_core_nano_seconds.value > 10**8, "it has used the CPU", 20)
    found = stats()
    assert found.memory.usage_bytes.value > 0
    assert found.memory.HasField("psi") and found.cpu.HasField("psi") and found.io.HasField("psi")


def test_a_privileged_container_may_make_cgroups_and_leaves_none(client: Client, busybox: str) -> None:
    security = pb.LinuxSandboxSecurityContext(privileged=True)
    pod = client.run_pod("privileged", linux=pb.LinuxPodSandboxConfig(security_context=security))
    privileged = pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(privileged=True))
    script = (
        "mkdir -p /sys/fs/cgroup/a/b && sleep 4718 & sleep 1; echo $! > /sys/fs/cgroup/a/b/cgroup.procs; sleep 4718"
    )
    container_id = client.run(pod, busybox, ["sh", "-c", script], linux=privileged)
    wait_until(lambda: any(scope(container_id).glob("**/a/b")), "it has made its cgroups", 10)

    client.stop(container_id)

    pattern = f"**/crito-{container_id}.scope"
    wait_until(
        lambda: not any(Path("/sys/fs/cgroup").glob(pattern)), "they are gone", 10
    )  # soon after the exit is told


def test_memory_beyond_the_limit_in_a_child_is_told_as_well(client: Client, pod: Pod, busybox: str) -> None:
    script = "dd if=/dev/zero of=/dev/null bs=64M; echo survived $?; sleep 100000"
    asked = with_resources(memory_limit_in_bytes=16 * MIB, unified={"memory.oom.group": "1"})
    container_id = client.run(pod, busybox, ["sh", "-c", script], linux=asked)

    status = client.wait_exited(container_id)

    assert (status.reason, status.exit_code) == ("OOMKilled", 137)


def test_only_kubelet_limits_the_number_of_processes(client: Client, pod: Pod, busybox: str) -> None:
    """systemd would give every scope 15 % of what the node can have."""
    top = scope(client.run(pod, busybox, FOR_EVER))
    found = {each.read_text().strip() for each in (top / "pids.max", *top.glob("*/pids.max"))}
    assert found <= {"max", str(4 << 20)}


# AppArmor


def label(client: Client, container_id: str) -> str:
    return Path(f"/proc/{node.pid_of(client, container_id)}/attr/current").read_text().strip()


def test_containers_have_our_profile_unless_they_ask_for_another(client: Client, pod: Pod, busybox: str) -> None:
    container_id = client.run(pod, busybox, FOR_EVER)

    assert label(client, container_id) == "crito-default (enforce)"
    in_an_exec = client.exec_sync(container_id, ["cat", "/proc/self/attr/current"]).stdout
    assert in_an_exec.strip() == b"crito-default (enforce)"
    refused = client.exec_sync(container_id, ["sh", "-c", "echo b >/proc/sysrq-trigger"])
    assert refused.exit_code != 0


def test_an_unconfined_container_is(client: Client, pod: Pod, busybox: str) -> None:
    unconfined = confined(Profile(profile_type=Profile.Unconfined))
    assert label(client, client.run(pod, busybox, FOR_EVER, linux=unconfined)) == "unconfined"


def test_a_privileged_container_is_unconfined(client: Client, busybox: str) -> None:
    security = pb.LinuxSandboxSecurityContext(privileged=True)
    pod = client.run_pod("privileged", linux=pb.LinuxPodSandboxConfig(security_context=security))
    privileged = pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(privileged=True))
    assert label(client, client.run(pod, busybox, FOR_EVER, linux=privileged)) == "unconfined"


def test_a_profile_of_the_host_is_enforced(client: Client, pod: Pod, busybox: str, loaded_profile: str) -> None:
    wanted = confined(Profile(profile_type=Profile.Localhost, localhost_ref=f"localhost/{loaded_profile}"))
    container_id = client.run(pod, busybox, FOR_EVER, linux=wanted)

    assert label(client, container_id) == f"{loaded_profile} (enforce)"
    assert client.exec_sync(container_id, ["touch", "/tmp/file"]).exit_code != 0


def test_a_profile_that_is_not_loaded_is_an_error_that_names_it(client: Client, pod: Pod, busybox: str) -> None:
    wanted = confined(Profile(profile_type=Profile.Localhost, localhost_ref="not-there"))

    with pytest.raises(grpc.RpcError, match="not-there") as failure:
        client.run(pod, busybox, FOR_EVER, linux=wanted)

    assert failure.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert not client.containers()


# The other driver


@pytest.mark.parametrize("runtime", ["crun", "runc"])
def test_the_cgroupfs_driver_works_on_cgroup_v2_too(make_daemon: MakeDaemon, busybox: str, runtime: str) -> None:
    daemon = make_daemon_with_cgroupfs(make_daemon, runtime)
    client = daemon.client()
    pod = Pod("", client.pod_config("cgroupfs"))
    pod.config.linux.cgroup_parent = f"/{daemon.cgroup_parent.removesuffix('.slice')}"
    pod = client.run_pod(config=pod.config)
    container_id = client.run(pod, busybox, FOR_EVER, linux=with_resources(memory_limit_in_bytes=32 * MIB))

    (found,) = Path("/sys/fs/cgroup").glob(f"**/crito-{container_id}")
    assert (found / "memory.max").read_text().strip() == str(32 * MIB)
    assert client.exec_sync(container_id, ["echo", "hello"]).stdout == b"hello\n"
    client.remove_everything()
    node.wait_until_nothing_is_left(sorted(client.ids))
    time.sleep(0.1)
    cgroups.remove(f"/{daemon.cgroup_parent}")


def make_daemon_with_cgroupfs(make_daemon: MakeDaemon, runtime: str) -> Daemon:
    """Warmed up by systemd's driver, whose form of cgroup parents the harness has here."""
    daemon = make_daemon({"runtime": {"default_handler": runtime}})
    daemon.stop()
    daemon.settings["runtime"]["cgroup_driver"] = "cgroupfs"
    daemon.start()
    return daemon
