"""Each field of a pod sandbox does what the CRI says, and is told again."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.harness import cgroups
from tests.e2e.harness.client import Client, Pod
from tests.e2e.harness.daemon import Daemon
from tests.e2e.harness.inside import cgroup_of, output, pid_of
from tests.e2e.harness.ports import free_port

FOR_EVER = ["sleep", "100000"]
HOST_IDS = 200_000


def namespaces(**fields: object) -> pb.LinuxPodSandboxConfig:
    options = pb.NamespaceOption(**fields)  # type: ignore[arg-type]
    return pb.LinuxPodSandboxConfig(security_context=pb.LinuxSandboxSecurityContext(namespace_options=options))


def within(**fields: object) -> pb.LinuxContainerConfig:
    options = pb.NamespaceOption(**fields)  # type: ignore[arg-type]
    return pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(namespace_options=options))


def user_namespace(mode: "pb.NamespaceMode.ValueType" = pb.POD) -> pb.UserNamespace:
    ids = [pb.IDMapping(container_id=0, host_id=HOST_IDS, length=65536)]
    return pb.UserNamespace(mode=mode, uids=ids, gids=ids) if mode == pb.POD else pb.UserNamespace(mode=mode)


def a_handler(client: Client) -> str:
    handlers = client.runtime.Status(pb.StatusRequest(), timeout=10).runtime_handlers
    name: str = next(each.name for each in handlers if each.name)
    return name


def test_a_pod_is_told_as_it_was_run(client: Client) -> None:
    labels = {"a": "b", "io.kubernetes.pod.name": "told", "odd": " ü\n"}
    annotations = {"kubernetes.io/config": '{"x": 1}', "empty": ""}
    handler = a_handler(client)
    before = time.time_ns()

    pod = client.run_pod("told", attempt=3, labels=labels, annotations=annotations, handler=handler)

    listed = next(each for each in client.pods() if each.id == pod.id)
    status = client.pod_status(pod.id)
    for each in (listed, status):
        assert each.id == pod.id
        assert each.metadata == pod.config.metadata
        assert each.state == pb.SANDBOX_READY
        assert before < each.created_at < time.time_ns()
        assert (dict(each.labels), dict(each.annotations)) == (labels, annotations)
        assert each.runtime_handler == handler
    client.stop_pod(pod.id)
    assert client.pod_status(pod.id).state == pb.SANDBOX_NOTREADY
    assert client.pods()[0].state == pb.SANDBOX_NOTREADY


@pytest.mark.parametrize("field", ["name", "namespace", "uid"])
def test_a_name_is_a_pod_s_own_by_its_name_namespace_uid_and_attempt(client: Client, field: str) -> None:
    first = client.run_pod("own")
    other = pb.PodSandboxConfig()
    other.CopyFrom(first.config)
    other.labels["another"] = "pod"
    with pytest.raises(grpc.RpcError) as refused:
        client.run_pod(config=other)
    assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS

    setattr(other.metadata, field, "another")
    client.run_pod(config=other)
    other.metadata.attempt += 1
    client.run_pod(config=other)

    assert len(client.pods()) == 3


def test_the_hostname_may_be_a_full_name(client: Client, busybox: str) -> None:
    pod = client.run_pod("host-name", hostname="web.e2e.example")
    container_id = client.run(pod, busybox, FOR_EVER)

    assert (
        output(client, container_id, "hostname; cat /etc/hostname; echo $HOSTNAME").split() == ["web.e2e.example"] * 3
    )
    assert "web.e2e.example" in output(client, container_id, "cat /etc/hosts")


def test_without_dns_the_node_s_resolv_conf_is_the_pod_s(client: Client, busybox: str) -> None:
    pod = client.run_pod("dns")
    container_id = client.run(pod, busybox, FOR_EVER)

    assert output(client, container_id, "cat /etc/resolv.conf") == Path("/etc/resolv.conf").read_text().strip()


def test_logs_lie_in_the_pod_s_directory_and_only_where_a_path_is_given(client: Client, busybox: str) -> None:
    pod = client.run_pod("logs")
    kept = client.run(pod, busybox, ["echo", "kept"], "kept", log_path="deep/kept.log")
    dropped = client.run(pod, busybox, ["echo", "dropped"], "dropped", log_path="")
    directory = Path(pod.config.log_directory)

    assert client.wait_exited(kept).log_path == str(directory / "deep/kept.log")
    assert client.wait_exited(dropped).log_path == ""
    assert (directory / "deep/kept.log").read_text().endswith("stdout F kept\n")
    assert [path for path in directory.rglob("*") if path.is_file()] == [directory / "deep/kept.log"]


def test_a_host_port_may_be_of_udp_and_of_one_address(client: Client, daemon: Daemon, busybox: str) -> None:
    everywhere, elsewhere = free_port(), free_port()
    mappings = [
        pb.PortMapping(protocol=pb.UDP, container_port=9999, host_port=everywhere),
        pb.PortMapping(protocol=pb.UDP, container_port=9999, host_port=elsewhere, host_ip="192.0.2.7"),
    ]
    pod = client.run_pod("udp", port_mappings=mappings)
    pid = pid_of(client, client.run(pod, busybox, FOR_EVER))
    echo = "import socket as s; u = s.socket(type=s.SOCK_DGRAM); u.bind(('', 9999))\nwhile 1: u.sendto(*u.recvfrom(99))"
    server = subprocess.Popen(["nsenter", f"--net=/proc/{pid}/ns/net", sys.executable, "-c", echo])
    try:
        assert answer_of(daemon.network.gateway, everywhere) == b"hello"
        assert answer_of(daemon.network.gateway, elsewhere, tries=3) == b""
    finally:
        server.kill()
        server.wait()


def answer_of(address: str, port: int, tries: int = 30) -> bytes:
    """What comes back for a datagram; b"" when nothing does."""
    for _ in range(tries):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(0.3)
            client.connect((address, port))
            try:
                client.send(b"hello")
                return client.recv(100)
            except OSError:
                time.sleep(0.1)
    return b""


def test_a_pod_is_in_the_cgroup_that_it_names(client: Client, daemon: Daemon, busybox: str) -> None:
    parent = cgroups.below(client.cgroup_parent, "named")
    pod = client.run_pod("cgroup", linux=pb.LinuxPodSandboxConfig(cgroup_parent=parent))
    container_id = client.run(pod, busybox, FOR_EVER)

    assert cgroup_of(pid_of(client, container_id), "memory").startswith(f"{parent}/")

    client.remove_pod(pod.id)
    cgroups.remove(parent)


def test_sysctls_are_the_pod_s_own(client: Client, busybox: str) -> None:
    sysctls = {"kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "2000\t3000"}
    pod = client.run_pod("sysctls", linux=pb.LinuxPodSandboxConfig(sysctls=sysctls))
    container_id = client.run(pod, busybox, FOR_EVER)

    seen = output(client, container_id, "cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_local_port_range")

    assert seen.split() == ["1", "2000", "3000"]
    assert Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split() != ["2000", "3000"]


def test_a_sysctl_of_the_node_is_refused(client: Client) -> None:
    with pytest.raises(grpc.RpcError, match=r"vm\.swappiness") as refused:
        client.run_pod("sysctls", linux=pb.LinuxPodSandboxConfig(sysctls={"vm.swappiness": "1"}))

    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_what_a_pod_is_told_to_use_is_told_again(client: Client) -> None:
    linux = namespaces(network=pb.NODE, pid=pb.CONTAINER, ipc=pb.NODE)
    pod = client.run_pod("modes", hostname="", linux=linux)

    options = client.pod_status(pod.id).linux.namespaces.options

    assert (options.network, options.pid, options.ipc) == (pb.NODE, pb.CONTAINER, pb.NODE)


def test_containers_of_a_pod_with_one_pid_namespace_see_each_other(client: Client, busybox: str) -> None:
    pod = client.run_pod("pids", linux=namespaces(pid=pb.POD))
    client.run(pod, busybox, ["sleep", "4711"], "first", linux=within(pid=pb.POD))
    second = client.run(pod, busybox, FOR_EVER, "second", linux=within(pid=pb.POD))

    seen = output(client, second, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '; echo; cat /proc/1/comm")

    assert "sleep 4711" in seen
    assert seen.splitlines()[-1] != "sleep"


def test_a_container_may_have_a_pid_namespace_of_its_own_or_another_s_or_the_node_s(
    client: Client, busybox: str
) -> None:
    pod = client.run_pod("pids", linux=namespaces(pid=pb.CONTAINER))
    own = client.run(pod, busybox, ["sleep", "4711"], "own", linux=within(pid=pb.CONTAINER))
    target = client.run(pod, busybox, FOR_EVER, "debug", linux=within(pid=pb.TARGET, target_id=own))

    assert output(client, own, "tr '\\0' ' ' < /proc/1/cmdline") == "sleep 4711"
    assert output(client, target, "tr '\\0' ' ' < /proc/1/cmdline") == "sleep 4711"

    on_node = client.run_pod("node-pids", linux=namespaces(pid=pb.NODE))
    node = client.run(on_node, busybox, FOR_EVER, linux=within(pid=pb.NODE))
    assert output(client, node, f"cat /proc/{os.getpid()}/comm") == Path("/proc/self/comm").read_text().strip()


def test_ipc_is_the_pod_s_or_the_node_s(client: Client, busybox: str) -> None:
    def ipc(pod: Pod, name: str, mode: "pb.NamespaceMode.ValueType") -> str:
        container_id = client.run(pod, busybox, FOR_EVER, name, linux=within(ipc=mode))
        return output(client, container_id, "readlink /proc/self/ns/ipc")

    node = str(Path("/proc/self/ns/ipc").readlink())
    shared = client.run_pod("ipc", linux=namespaces(ipc=pb.POD))
    on_node = client.run_pod("node-ipc", linux=namespaces(ipc=pb.NODE))

    assert ipc(shared, "first", pb.POD) == ipc(shared, "second", pb.POD) != node
    assert ipc(on_node, "first", pb.NODE) == node


def test_a_pod_with_a_user_namespace_has_its_ids_shifted(client: Client, busybox: str) -> None:
    pod = client.run_pod("users", linux=namespaces(userns_options=user_namespace()))
    container_id = client.run(pod, busybox, FOR_EVER, linux=within(userns_options=user_namespace()))

    assert output(client, container_id, "cat /proc/self/uid_map").split() == ["0", str(HOST_IDS), "65536"]
    assert output(client, container_id, "cat /proc/self/gid_map").split() == ["0", str(HOST_IDS), "65536"]
    assert output(client, container_id, "touch /x && stat -c %u:%g /x /bin/busybox").split() == ["0:0", "0:0"]
    assert Path(f"/proc/{pid_of(client, container_id)}").stat().st_uid == HOST_IDS
    assert client.pod_status(pod.id).linux.namespaces.options.userns_options == user_namespace()


def test_a_user_namespace_of_mode_node_is_the_node_s(client: Client, busybox: str) -> None:
    options = user_namespace(pb.NODE)
    pod = client.run_pod("users", linux=namespaces(userns_options=options))
    container_id = client.run(pod, busybox, FOR_EVER, linux=within(userns_options=options))

    assert output(client, container_id, "cat /proc/self/uid_map") == Path("/proc/self/uid_map").read_text().strip()


def test_a_pod_on_the_node_s_network_may_have_a_user_namespace(client: Client, busybox: str) -> None:
    features = client.runtime.Status(pb.StatusRequest(), timeout=10).features
    pod = client.run_pod("both", hostname="", linux=namespaces(network=pb.NODE, userns_options=user_namespace()))
    container_id = client.run(pod, busybox, FOR_EVER, linux=within(network=pb.NODE, userns_options=user_namespace()))

    assert features.user_namespaces_host_network
    assert output(client, container_id, "readlink /proc/self/ns/net") == str(Path("/proc/self/ns/net").readlink())
    assert output(client, container_id, "cat /proc/self/uid_map").split()[1] == str(HOST_IDS)
    assert "lo" in output(client, container_id, "ls /sys/class/net").split()
