"""Pods and containers through the CRI, from the pull to nothing left."""

import re
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.harness.client import Client
from tests.e2e.harness.daemon import Daemon
from tests.e2e.harness.ports import free_port

FOR_EVER = ["sleep", "100000"]


def test_a_pod_with_a_container_goes_its_whole_way(client: Client, daemon: Daemon, busybox: str) -> None:
    pod = client.run_pod("whole", labels={"a": "b"}, annotations={"c": "d"})
    status = client.pod_status(pod.id)
    assert status.state == pb.SANDBOX_READY
    assert (status.metadata.name, status.metadata.uid) == ("whole", pod.config.metadata.uid)
    assert (dict(status.labels), dict(status.annotations)) == ({"a": "b"}, {"c": "d"})
    assert status.network.ip in daemon.network.leased()
    assert status.created_at > 0

    container_id = client.run(pod, busybox, ["sh", "-c", "echo $0 in $(hostname); exit 5", "hello"])
    ended = client.wait_exited(container_id)
    assert (ended.exit_code, ended.reason) == (5, "Error")
    assert ended.created_at <= ended.started_at <= ended.finished_at
    assert client.log(pod) == "hello in whole\n"
    assert Path(ended.log_path).is_file()

    client.remove_pod(pod.id)
    assert not client.pods()
    assert not client.containers()


def test_containers_of_a_pod_share_its_network_and_its_shared_memory(client: Client, busybox: str) -> None:
    pod = client.run_pod("shared")
    client.run(pod, busybox, ["sh", "-c", "echo page > /tmp/index.html; httpd -f -p 8080 -h /tmp"], "server")
    second = client.run(pod, busybox, FOR_EVER, "second")

    got = client.exec_sync(
        second, ["sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do wget -qO- 127.0.0.1:8080 && break; sleep 0.2; done"]
    )
    assert got.stdout == b"page\n"
    client.exec_sync(second, ["touch", "/dev/shm/mark"])
    ids = {each.metadata.name: each.id for each in client.containers()}
    assert client.exec_sync(ids["server"], ["ls", "/dev/shm"]).stdout == b"mark\n"


def test_the_log_has_the_format_that_kubelet_reads(client: Client, busybox: str) -> None:
    pod = client.run_pod("log")
    container_id = client.run(pod, busybox, ["sh", "-c", "echo out; echo err >&2; printf unfinished"])
    status = client.wait_exited(container_id)

    lines = Path(status.log_path).read_text().splitlines()

    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}(Z|[+-]\d\d:\d\d)"
    assert sorted(re.sub(f"^{stamp} ", "", line) for line in lines) == [
        "stderr F err",
        "stdout F out",
        "stdout P unfinished" if any(" P unfinished" in line for line in lines) else "stdout F unfinished",
    ]
    assert all(re.match(stamp, line) for line in lines)


def test_no_byte_of_a_quick_container_s_output_is_lost(client: Client, busybox: str) -> None:
    pod = client.run_pod("quick")
    container_id = client.run(pod, busybox, ["sh", "-c", "seq 1 100000"])
    client.wait_exited(container_id)

    assert client.log(pod) == "".join(f"{number}\n" for number in range(1, 100001))


def test_a_container_over_its_memory_limit_is_told_as_oom_killed(client: Client, busybox: str) -> None:
    pod = client.run_pod("oom")
    limit = 15 << 20
    resources = pb.LinuxContainerResources(memory_limit_in_bytes=limit, memory_swap_limit_in_bytes=limit)
    container_id = client.run(
        pod,
        busybox,
        ["sh", "-c", "dd if=/dev/zero of=/dev/null bs=20M"],
        linux=pb.LinuxContainerConfig(resources=resources),
    )

    ended = client.wait_exited(container_id)

    assert ended.reason == "OOMKilled", ended


def test_a_signal_s_exit_code_is_128_more(client: Client, busybox: str) -> None:
    pod = client.run_pod("signal")
    container_id = client.run(pod, busybox, FOR_EVER)

    client.stop(container_id, grace_s=0)

    assert client.status(container_id).exit_code == 128 + 9


def test_stop_waits_for_the_grace_and_a_second_stop_shortens_it(client: Client, busybox: str) -> None:
    pod = client.run_pod("grace")
    container_id = client.run(pod, busybox, ["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"])
    time.sleep(0.3)
    started = time.monotonic()
    first = threading.Thread(target=client.stop, args=(container_id, 60))
    first.start()
    time.sleep(1)
    assert client.status(container_id).state == pb.CONTAINER_RUNNING

    client.stop(container_id, grace_s=1)

    assert client.status(container_id).state == pb.CONTAINER_EXITED
    assert 1.5 < time.monotonic() - started < 10
    first.join(5)
    assert not first.is_alive()


def test_a_command_that_takes_too_long_is_ended_with_all_its_children(client: Client, busybox: str) -> None:
    pod = client.run_pod("slow")
    container_id = client.run(pod, busybox, FOR_EVER)

    begun = time.monotonic()
    with pytest.raises(grpc.RpcError) as failure:
        client.exec_sync(container_id, ["sh", "-c", "sleep 4711 & setsid sleep 4712 & sleep 4713"], timeout_s=1)

    assert 1 <= time.monotonic() - begun < 15, "the call's own deadline is 20 s later"
    assert failure.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    listed = client.exec_sync(container_id, ["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"]).stdout
    assert b"471" not in listed


def test_a_host_port_reaches_the_container(client: Client, daemon: Daemon, busybox: str) -> None:
    host_port = free_port()
    mapping = pb.PortMapping(protocol=pb.TCP, container_port=8080, host_port=host_port)
    pod = client.run_pod("port", port_mappings=[mapping])
    client.run(pod, busybox, ["sh", "-c", "echo page > /tmp/index.html; exec httpd -f -p 8080 -h /tmp"])

    assert page(f"http://{client.pod_status(pod.id).network.ip}:8080/") == b"page\n"
    assert page(f"http://{daemon.network.gateway}:{host_port}/") == b"page\n"


def page(url: str) -> bytes:
    """What is at `url`; the server may still be starting."""
    for attempt in range(30):
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                body: bytes = answer.read()
                return body
        except OSError:
            if attempt == 29:
                raise
            time.sleep(0.1)
    raise AssertionError


def test_a_pod_of_the_host_s_network_has_the_host_s_links(client: Client, busybox: str) -> None:
    options = pb.NamespaceOption(network=pb.NODE)
    security = pb.LinuxSandboxSecurityContext(namespace_options=options)
    pod = client.run_pod("host", hostname="", linux=pb.LinuxPodSandboxConfig(security_context=security))
    container_security = pb.LinuxContainerSecurityContext(namespace_options=options)
    container_id = client.run(
        pod, busybox, FOR_EVER, linux=pb.LinuxContainerConfig(security_context=container_security)
    )

    seen = client.exec_sync(container_id, ["ls", "/sys/class/net"]).stdout.decode().split()

    assert set(seen) >= {each.name for each in Path("/sys/class/net").iterdir() if not each.name.startswith("veth")}


def test_the_same_requests_again_are_answered_alike(client: Client, busybox: str) -> None:
    pod = client.run_pod("again")
    container_id = client.run(pod, busybox, FOR_EVER)
    for _ in range(2):
        client.stop(container_id)
    for _ in range(2):
        client.remove(container_id)
    for _ in range(2):
        client.stop_pod(pod.id)
    for _ in range(2):
        client.remove_pod(pod.id)


def test_a_pod_under_the_name_of_a_removed_one_can_be_run_at_once(client: Client) -> None:
    config = client.pod_config("name")
    for _ in range(3):
        pod = client.run_pod(config=config)
        client.remove_pod(pod.id)


def test_a_retry_of_run_pod_sandbox_joins_the_one_under_way(client: Client) -> None:
    config = client.pod_config("retry")

    with ThreadPoolExecutor(4) as pool:
        pods = list(pool.map(lambda _: client.run_pod(config=config), range(4)))

    assert len({pod.id for pod in pods}) == 1
    assert len(client.pods()) == 1


def test_many_pods_at_once_come_up_and_go(client: Client, busybox: str) -> None:
    def whole_way(number: int) -> int:
        pod = client.run_pod(f"many-{number}")
        container_id = client.run(pod, busybox, ["sh", "-c", f"exit {number}"])
        code = client.wait_exited(container_id, 60).exit_code
        client.remove_pod(pod.id)
        return code

    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(whole_way, range(30))) == list(range(30))


def test_files_and_limits_of_a_container_are_as_asked(client: Client, busybox: str, tmp_path: Path) -> None:
    (tmp_path / "given").write_text("from the host")
    tmp_path.chmod(0o755)
    pod = client.run_pod(
        "spec", dns_config=pb.DNSConfig(servers=["192.0.2.1"], searches=["e2e.test"], options=["ndots:5"])
    )
    security = pb.LinuxContainerSecurityContext(run_as_username="web", readonly_rootfs=True, no_new_privs=True)
    container_id = client.run(
        pod,
        busybox,
        FOR_EVER,
        mounts=[pb.Mount(container_path="/given", host_path=str(tmp_path), readonly=True)],
        envs=[pb.KeyValue(key="NUMBER", value=b"one")],
        working_dir="/given",
        linux=pb.LinuxContainerConfig(security_context=security),
    )

    def output(command: str) -> str:
        return client.exec_sync(container_id, ["sh", "-c", command]).stdout.decode().strip()

    assert output("id") == "uid=1000(web) gid=1000(web) groups=1000(web),2000(extra)"
    assert output("cat given; echo; echo $NUMBER") == "from the host\none"
    assert output("touch /given/x /x 2>&1; true").count("Read-only file system") == 2
    assert output("cat /etc/resolv.conf").split() == [
        *("search", "e2e.test", "nameserver", "192.0.2.1", "options", "ndots:5"),
    ]
    assert "NoNewPrivs:\t1" in output("cat /proc/self/status")
    status = client.status(container_id)
    assert [(each.container_path, each.readonly) for each in status.mounts] == [("/given", True)]
    assert list(status.user.linux.supplemental_groups) == [1000, 2000]
