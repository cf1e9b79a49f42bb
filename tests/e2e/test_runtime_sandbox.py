"""Pods of gVisor's runsc: the OCI runtime makes the sandbox, and all containers live in its one process."""

import asyncio
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import cgroups
from tests.e2e.harness.client import Client, Pod
from tests.e2e.harness.daemon import Daemon
from tests.e2e.harness.leftovers import processes
from tests.e2e.harness.ports import wait_until
from tests.fakes.stream_client import open_port, spdy_client, spdy_command

RUNSC = os.environ.get("CRITO_TEST_RUNSC") or shutil.which("runsc") or ""
FOR_EVER = ["sleep", "100000"]
OWN_PID = pb.NamespaceOption(pid=pb.CONTAINER)
pytestmark = pytest.mark.skipif(not RUNSC, reason="runsc is not installed")


# Older versions of runsc take a network namespace for the node's where it shows /proc/sys/net/core/rmem_default, as
# newer kernels do in all: their own network stack starts where that is hidden.
NETSTACK = f"""#!/bin/sh
for word; do
    [ "$word" != start ] || exec unshare --mount --propagation slave sh -c '
        mount -t tmpfs none /mnt && mkdir /mnt/fs /mnt/kernel /mnt/vm
        for each in fs kernel vm; do mount --bind /proc/sys/$each /mnt/$each; done
        mount --rbind /mnt /proc/sys && exec "$@"' sh {RUNSC} "$@"
done
exec {RUNSC} "$@"
"""


@pytest.fixture(scope="module")
def shared_daemon(make_daemon: MakeDaemon, directory: Path, busybox: str) -> Daemon:
    netstack = directory / "runsc-netstack"
    netstack.write_text(NETSTACK)
    netstack.chmod(0o755)
    gvisor = {"path": RUNSC, "sandbox_by_runtime": True, "runtime_args": ["--network=host"]}
    handlers = {"gvisor": gvisor, "netstack": {"path": netstack, "sandbox_by_runtime": True}}
    made = make_daemon({"runtime": {"handlers": handlers}})
    client = made.client()
    for handler in handlers:
        warm_up(client, busybox, handler)
    client.close()
    return made


def warm_up(client: Client, image: str, handler: str) -> None:
    """What is made once and stays is there after this."""
    pod = client.run_pod("warm-up", handler=handler)
    client.run(pod, image, ["true"])
    client.remove_pod(pod.id)


@pytest.fixture
def restarted(daemon: Daemon) -> Iterator[Daemon]:
    """A daemon that runs again after the test, whatever the test has done to it."""
    yield daemon
    if daemon.process is None or daemon.process.poll() is not None:
        daemon.kill()
        daemon.start()


def run_pod(client: Client, name: str, options: pb.NamespaceOption = OWN_PID, **fields: object) -> Pod:
    security = pb.LinuxSandboxSecurityContext(namespace_options=options)
    return client.run_pod(name, handler="gvisor", linux=pb.LinuxPodSandboxConfig(security_context=security), **fields)  # type: ignore[arg-type]


def container_security(options: pb.NamespaceOption) -> pb.LinuxContainerConfig:
    return pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(namespace_options=options))


def sandbox_processes(daemon: Daemon, kind: str = "runsc-sandbox") -> list[int]:
    return [each.pid for each in processes() if each.command.startswith(kind) and str(daemon.run_dir) in each.command]


def monitor_of(daemon: Daemon, container_id: str) -> int:
    """The pid by which a monitor introduces itself."""
    folder = os.open(daemon.run_dir / "containers" / container_id, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(f"/proc/self/fd/{folder}/monitor.sock")
            return int(json.loads(sock.recv(65536))["hello"]["pid"])
    finally:
        os.close(folder)


def refused(code: grpc.StatusCode, call: Callable[[], object]) -> str:
    with pytest.raises(grpc.RpcError) as refusal:
        call()
    error: grpc.Call = refusal.value  # type: ignore[assignment]
    assert error.code() is code, error
    return error.details() or ""


def test_two_containers_live_in_one_sandbox_and_end_each_with_its_own_code(
    daemon: Daemon, client: Client, busybox: str
) -> None:
    pod = run_pod(client, "two")

    first = client.run(
        pod, busybox, ["sh", "-c", "echo out; echo err >&2; cat /proc/version; sleep 1; exit 7"], "first"
    )
    second = client.run(pod, busybox, ["sh", "-c", "hostname; exec sleep 100000"], "second")

    assert len(sandbox_processes(daemon)) == 1
    assert client.exec_sync(second, ["sh", "-c", "echo here; exit 5"]).exit_code == 5
    ended = client.wait_exited(first)
    assert (ended.exit_code, ended.reason) == (7, "Error")
    assert {"out", "err"} <= set(client.log(pod, "first").splitlines())
    assert "Linux version 4.4.0" in client.log(pod, "first")  # gVisor's own kernel
    assert client.status(second).state == pb.CONTAINER_RUNNING
    assert client.log(pod, "second") == "two\n"
    assert client.pod_status(pod.id).state == pb.SANDBOX_READY


def test_the_usual_fields_of_a_container_hold_in_the_sandbox(client: Client, busybox: str, tmp_path: Path) -> None:
    pod = run_pod(client, "fields")
    tmp_path.chmod(0o777)
    shared = pb.Mount(container_path="/data", host_path=str(tmp_path))
    security = pb.LinuxContainerSecurityContext(
        namespace_options=OWN_PID,
        run_as_user=pb.Int64Value(value=1000),
        readonly_rootfs=True,
        seccomp=pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault),
    )
    limits = pb.LinuxContainerResources(memory_limit_in_bytes=64 << 20, cpu_shares=100)
    script = "id -u; echo $WORD; echo from-within > /data/file; touch /no 2>&1; echo shm > /dev/shm/x; exit 0"
    container_id = client.run(
        pod,
        busybox,
        ["sh", "-c", script],
        linux=pb.LinuxContainerConfig(security_context=security, resources=limits),
        mounts=[shared],
        envs=[pb.KeyValue(key="WORD", value=b"said")],
    )
    privileged = pb.LinuxContainerSecurityContext(namespace_options=OWN_PID, privileged=True)
    other = client.run(
        pod, busybox, ["cat", "/dev/shm/x"], "other", linux=pb.LinuxContainerConfig(security_context=privileged)
    )

    assert client.wait_exited(container_id).exit_code == 0
    assert client.log(pod).splitlines() == ["1000", "said", "touch: /no: Read-only file system"]
    assert (tmp_path / "file").read_text() == "from-within\n"
    assert client.wait_exited(other).exit_code == 0
    assert client.log(pod, "other") == "shm\n"


def test_a_stop_signal_and_then_sigkill_end_a_container(client: Client, busybox: str) -> None:
    pod = run_pod(client, "stop")
    willing = client.run(
        pod, busybox, ["sh", "-c", "trap 'exit 3' TERM; echo on; while :; do sleep 0.1; done"], "willing"
    )
    deaf = client.run(pod, busybox, ["sh", "-c", "trap '' TERM; echo on; while :; do sleep 0.1; done"], "deaf")
    for name in ("willing", "deaf"):
        wait_until(lambda name=name: client.log(pod, name) == "on\n", f"{name} runs", 10)  # type: ignore[misc]
    began = time.monotonic()

    client.stop(willing, grace_s=30)
    assert time.monotonic() - began < 10
    client.stop(deaf, grace_s=1)

    assert client.status(willing).exit_code == 3
    assert client.status(deaf).exit_code == 137
    assert client.pod_status(pod.id).state == pb.SANDBOX_READY


def test_a_container_that_was_never_started_can_be_stopped(client: Client, busybox: str) -> None:
    pod = run_pod(client, "created")
    container_id = client.create(pod, client.container_config(busybox, FOR_EVER))

    client.stop(container_id, grace_s=5)

    assert client.status(container_id).state == pb.CONTAINER_EXITED
    client.remove(container_id)


def test_a_start_that_fails_says_why(client: Client, busybox: str) -> None:
    pod = run_pod(client, "no-program")
    container_id = client.create(pod, client.container_config(busybox, ["/no/such/program"]))

    with pytest.raises(grpc.RpcError, match="no such file"):
        client.start(container_id)

    assert client.status(container_id).state == pb.CONTAINER_EXITED
    assert client.pod_status(pod.id).state == pb.SANDBOX_READY


def test_everything_goes_on_without_the_daemon_and_is_known_to_the_next(
    restarted: Daemon, client: Client, busybox: str
) -> None:
    pod = run_pod(client, "goes-on")
    ending = client.run(pod, busybox, ["sh", "-c", "sleep 1; echo late; exit 42"], "ending")
    running = client.run(pod, busybox, FOR_EVER, "running")

    restarted.kill()
    time.sleep(2)
    restarted.start()

    assert client.wait_exited(ending).exit_code == 42
    assert client.log(pod, "ending") == "late\n"
    assert client.status(running).state == pb.CONTAINER_RUNNING
    assert client.exec_sync(running, ["echo", "still"]).stdout == b"still\n"
    assert client.pod_status(pod.id).state == pb.SANDBOX_READY
    client.stop(running)
    assert client.status(running).exit_code == 137


def test_pods_of_a_handler_that_lost_the_setting_are_stopped_as_they_were_made(
    restarted: Daemon, client: Client, busybox: str
) -> None:
    pod = run_pod(client, "setting-lost")
    stopped = client.run(pod, busybox, ["sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done"], "stopped")
    other = client.run(pod, busybox, FOR_EVER, "other")
    time.sleep(1)  # so that the trap is set
    handler = restarted.settings["runtime"]["handlers"]["gvisor"]

    restarted.kill()
    handler["sandbox_by_runtime"] = False
    try:
        restarted.start()
        client.stop(stopped, grace_s=20)

        assert client.status(stopped).exit_code == 3
        assert client.status(other).state == pb.CONTAINER_RUNNING
        assert client.exec_sync(other, ["true"]).exit_code == 0
        client.remove_pod(pod.id)
        assert sandbox_processes(restarted) == []
    finally:
        restarted.kill()
        handler["sandbox_by_runtime"] = True


def test_a_sandbox_that_was_half_made_when_the_daemon_died_is_taken_away(restarted: Daemon, client: Client) -> None:
    before = restarted.traces()
    asked = client.runtime.RunPodSandbox.future(
        pb.RunPodSandboxRequest(config=client.pod_config("half"), runtime_handler="gvisor"), timeout=20
    )
    wait_until(lambda: any(restarted.run_dir.glob("sandboxes/*/sandbox/config.json")), "it is being made", 10)

    restarted.kill()
    restarted.start()

    assert asked.exception() is not None
    assert list(client.pods()) == []
    restarted.nothing_added(before, 30)


def test_a_sandbox_that_dies_ends_its_containers_and_is_not_ready(daemon: Daemon, client: Client, busybox: str) -> None:
    pod = run_pod(client, "dies")
    container_id = client.run(pod, busybox, FOR_EVER)

    (process,) = sandbox_processes(daemon)
    os.kill(process, signal.SIGKILL)

    ended = client.wait_exited(container_id)
    assert ended.exit_code == 137
    wait_until(lambda: client.pod_status(pod.id).state == pb.SANDBOX_NOTREADY, "the pod is not ready", 10)
    client.remove_pod(pod.id)


def test_a_sandbox_over_its_pods_memory_limit_ends_its_containers_as_oom_killed(
    daemon: Daemon, client: Client, busybox: str
) -> None:
    parent = cgroups.below(daemon.cgroup_parent, "small")
    cgroups.make(parent)
    for hierarchy in cgroups.hierarchies():  # what kubelet sets for the pod
        for name in ("memory.limit_in_bytes", "memory.max"):
            if (limit := hierarchy / parent.strip("/") / name).exists():
                limit.write_text(str(96 << 20))
    security = pb.LinuxSandboxSecurityContext(namespace_options=OWN_PID)
    linux = pb.LinuxPodSandboxConfig(cgroup_parent=parent, security_context=security)
    pod = client.run_pod("greedy", handler="gvisor", linux=linux)
    other = client.run(pod, busybox, FOR_EVER, "other")
    greedy = client.run(pod, busybox, ["dd", "if=/dev/zero", "of=/dev/null", "bs=512M"], "greedy")

    for container_id in (greedy, other):
        ended = client.wait_exited(container_id)
        assert (ended.exit_code, ended.reason) == (137, "OOMKilled")
    wait_until(lambda: client.pod_status(pod.id).state == pb.SANDBOX_NOTREADY, "the pod is not ready", 10)
    client.remove_pod(pod.id)
    cgroups.remove(parent)


def test_a_reboot_ends_the_pod(restarted: Daemon, client: Client, busybox: str) -> None:
    pod = run_pod(client, "reboot")
    container_id = client.run(pod, busybox, FOR_EVER)

    restarted.kill()
    restarted.lose_memory()
    restarted.start()

    assert client.pod_status(pod.id).state == pb.SANDBOX_NOTREADY
    assert client.status(container_id).reason == "NodeRebooted"
    client.remove_pod(pod.id)
    for handler in ("gvisor", "netstack"):
        warm_up(client, busybox, handler)


def test_a_container_whose_monitor_is_lost_has_its_exit_code_all_the_same(
    daemon: Daemon, client: Client, busybox: str
) -> None:
    pod = run_pod(client, "monitor-lost")
    ending = client.run(pod, busybox, ["sh", "-c", "sleep 2; exit 9"], "ending")
    endless = client.run(pod, busybox, FOR_EVER, "endless")
    time.sleep(1.5)  # so that the monitor rests

    for container_id in (ending, endless):
        os.kill(monitor_of(daemon, container_id), signal.SIGKILL)

    ended = client.wait_exited(ending)
    assert ended.exit_code == 9
    assert "its monitor was lost" in ended.message
    client.stop(endless, grace_s=1)
    assert client.status(endless).exit_code in (143, 137)  # gVisor lets SIGTERM end a process 1


def test_an_exec_that_takes_too_long_is_killed_in_the_sandbox(client: Client, busybox: str) -> None:
    pod = run_pod(client, "exec-late")
    container_id = client.run(pod, busybox, FOR_EVER)

    details = refused(
        grpc.StatusCode.DEADLINE_EXCEEDED, lambda: client.exec_sync(container_id, ["sleep", "4321"], timeout_s=1)
    )

    assert "timed out" in details
    assert b"4321" not in client.exec_sync(container_id, ["ps"]).stdout


def test_streams_reach_the_sandbox(client: Client, busybox: str) -> None:
    pod = run_pod(client, "streams")
    script = ["sh", "-c", "read word; echo got $word; echo err >&2"]
    plain = client.run(pod, busybox, script, "plain", stdin=True, stdin_once=True)
    terminal = client.run(pod, busybox, script, "terminal", stdin=True, stdin_once=True, tty=True)
    container_id = client.run(pod, busybox, FOR_EVER, "endless")

    def attach(container_id: str, **streams: bool) -> str:
        answer: str = client.runtime.Attach(pb.AttachRequest(container_id=container_id, **streams), timeout=20).url
        return answer

    def execute(command: str, **streams: bool) -> str:
        request = pb.ExecRequest(container_id=container_id, cmd=["sh", "-c", command], **streams)
        answer: str = client.runtime.Exec(request, timeout=20).url
        return answer

    async def run() -> None:
        url = attach(plain, stdin=True, stdout=True, stderr=True)
        async with spdy_command(url, "stdin", "stdout", "stderr") as command:
            await command["stdin"].write(b"word\n", fin=True)
            assert await command["stdout"].read_all() == b"got word\n"
            assert await command["stderr"].read_all() == b"err\n"
        url = attach(terminal, stdin=True, stdout=True, tty=True)
        async with spdy_command(url, "stdin", "stdout", "resize") as command:
            await command["stdin"].write(b"word\n")
            assert b"got word\r\n" in await command["stdout"].read_all()
        url = execute("cat; echo err >&2", stdin=True, stdout=True, stderr=True)
        async with spdy_command(url, "stdin", "stdout", "stderr") as command:
            await command["stdin"].write(b"in", fin=True)
            assert await command["stdout"].read_all() == b"in"
            assert await command["stderr"].read_all() == b"err\n"
        url = execute("[ -t 0 ] && echo terminal", stdout=True, tty=True)
        async with spdy_command(url, "stdout", "resize") as command:
            assert await command["stdout"].read_all() == b"terminal\r\n"

    asyncio.run(asyncio.wait_for(run(), 30))
    assert client.wait_exited(plain).exit_code == 0
    assert client.wait_exited(terminal).exit_code == 0


@pytest.mark.parametrize(("handler", "address"), [("gvisor", "127.0.0.1"), ("netstack", "0.0.0.0")])
def test_a_port_is_forwarded_to_whichever_network_stack_the_sandbox_uses(
    client: Client, busybox: str, handler: str, address: str
) -> None:
    pod = client.run_pod("forward", handler=handler)
    serve = ["sh", "-c", f"echo served > /tmp/index.html; exec httpd -f -p {address}:8080 -h /tmp"]
    client.run(pod, busybox, serve, "server")
    neighbour = client.run(pod, busybox, FOR_EVER, "neighbour")
    client.exec_sync(neighbour, ["sh", "-c", "until netstat -lnt | grep -q :8080; do sleep 0.1; done"])
    url = client.runtime.PortForward(pb.PortForwardRequest(pod_sandbox_id=pod.id, port=[8080]), timeout=20).url

    async def run() -> None:
        async with spdy_client(url, ["portforward.k8s.io"]) as session:
            data, _ = await open_port(session, 8080)
            await data.write(b"GET /index.html HTTP/1.0\r\n\r\n")
            assert (await data.read_all()).endswith(b"served\n")

    asyncio.run(asyncio.wait_for(run(), 20))


def test_pid_namespaces_are_as_the_pod_wants_them(client: Client, busybox: str) -> None:
    own = run_pod(client, "own-pids")
    target = client.run(own, busybox, ["sleep", "4444"], "target", linux=container_security(OWN_PID))
    alone = client.run(own, busybox, ["sleep", "5555"], "alone", linux=container_security(OWN_PID))
    at_target = container_security(pb.NamespaceOption(pid=pb.TARGET, target_id=target))
    debugger = client.run(own, busybox, FOR_EVER, "debugger", linux=at_target)
    shared_option = pb.NamespaceOption(pid=pb.POD)
    shared = run_pod(client, "shared-pids", shared_option)
    first = client.run(shared, busybox, ["sleep", "1"], "first", linux=container_security(shared_option))
    second = client.run(shared, busybox, ["sleep", "6666"], "second", linux=container_security(shared_option))

    assert b"4444" in client.exec_sync(debugger, ["ps"]).stdout
    assert b"4444" not in client.exec_sync(alone, ["ps"]).stdout
    assert b"/pause" in client.exec_sync(second, ["ps"]).stdout
    assert client.wait_exited(first).exit_code == 0
    assert client.status(second).state == pb.CONTAINER_RUNNING


def test_stats_tell_what_the_runtime_counts(client: Client, busybox: str) -> None:
    pod = run_pod(client, "stats")
    busy = client.run(pod, busybox, ["sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; exec sleep 99999"])
    time.sleep(1)

    stats = client.runtime.ContainerStats(pb.ContainerStatsRequest(container_id=busy), timeout=30).stats
    of_pod = client.runtime.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=pod.id), timeout=30).stats

    assert stats.cpu.usage_core_nano_seconds.value > 0
    assert stats.memory.working_set_bytes.value > 0
    assert of_pod.linux.memory.usage_bytes.value > 1 << 20
    assert of_pod.linux.network.default_interface.name == "eth0"
    metrics = client.runtime.ListPodSandboxMetrics(pb.ListPodSandboxMetricsRequest(), timeout=30).pod_metrics
    assert (len(metrics[0].metrics) > 0, list(metrics[0].container_metrics)) == (True, [])
    client.stop(busy)
    assert not client.runtime.ContainerStats(pb.ContainerStatsRequest(container_id=busy), timeout=30).stats.HasField(
        "cpu"
    )


def test_what_a_sandbox_cannot_do_is_refused_with_a_reason(client: Client, busybox: str, tmp_path: Path) -> None:
    pod = run_pod(client, "cannot")
    container_id = client.run(pod, busybox, FOR_EVER)
    resources = pb.LinuxContainerResources(cpu_shares=512)
    update = pb.UpdateContainerResourcesRequest(container_id=container_id, linux=resources)
    checkpoint = pb.CheckpointContainerRequest(container_id=container_id, location=str(tmp_path / "x.tar"))
    ids = [pb.IDMapping(host_id=1 << 20, container_id=0, length=65536)]
    userns = pb.NamespaceOption(pid=pb.CONTAINER, userns_options=pb.UserNamespace(mode=pb.POD, uids=ids, gids=ids))

    details = refused(
        grpc.StatusCode.UNIMPLEMENTED, lambda: client.runtime.UpdateContainerResources(update, timeout=30)
    )
    assert "limits of one container in its sandbox" in details
    refused(grpc.StatusCode.FAILED_PRECONDITION, lambda: client.runtime.CheckpointContainer(checkpoint, timeout=30))
    details = refused(grpc.StatusCode.FAILED_PRECONDITION, lambda: run_pod(client, "userns", userns))
    assert "without user namespaces" in details
    details = refused(
        grpc.StatusCode.FAILED_PRECONDITION,
        lambda: client.run_pod(
            "shm", handler="gvisor", linux=pb.LinuxPodSandboxConfig(sysctls={"kernel.shm_rmid_forced": "1"})
        ),
    )
    assert "kernel.shm_rmid_forced" in details


def test_status_tells_the_handler_without_user_namespaces(client: Client) -> None:
    handlers = client.runtime.Status(pb.StatusRequest(), timeout=10).runtime_handlers

    gvisor = next(each for each in handlers if each.name == "gvisor")
    assert not gvisor.features.user_namespaces


def test_a_removed_pod_leaves_no_process_of_the_sandbox(daemon: Daemon, client: Client, busybox: str) -> None:
    before = daemon.traces()
    pod = run_pod(client, "gone")
    client.run(pod, busybox, FOR_EVER, "first")
    client.run(pod, busybox, FOR_EVER, "second")
    assert len(sandbox_processes(daemon, "runsc-gofer")) == 3

    client.remove_pod(pod.id)

    daemon.nothing_added(before)
    assert sandbox_processes(daemon) == sandbox_processes(daemon, "runsc-gofer") == []
    assert Path("/dev/null").stat().st_uid == 0  # which runsc gives away where it is somebody's stdin
