"""Streams and the daemon's life: open sessions go on, the next daemon takes the server over, and nothing stays."""

import asyncio
import os
import signal
import socket
import time
from pathlib import Path

import grpc
import pytest

from oci.monitor_client import Monitor
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import leftovers
from tests.fakes.stream_client import Command, open_port, spdy_client, spdy_command
from tests.integration.streaming.conftest import SERVE, Node


@pytest.fixture
def own_node(make_daemon: MakeDaemon, busybox: str) -> Node:
    """Of one test: its daemon may be killed."""
    daemon = make_daemon()
    client = daemon.client()
    pod = client.run_pod("streams")
    return Node(daemon, client, pod, client.run(pod, busybox, ["sh", "-c", SERVE]), busybox)


def server_pids(node: Node) -> list[int]:
    mark = f"/cri/streaming/__main__.py {node.daemon.run_dir} "
    return [each.pid for each in leftovers.processes() if mark in each.command + " "]


def wait_for_servers(node: Node, count: int, timeout_s: float = 15.0) -> list[int]:
    deadline = time.monotonic() + timeout_s
    while len(pids := server_pids(node)) != count:
        assert time.monotonic() < deadline, f"stream servers {pids}, expected {count}"
        time.sleep(0.05)
    return pids


async def talks(command: Command, text: bytes) -> None:
    await command["stdin"].write(text)
    await command["stdout"].read_until(text)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_open_sessions_outlive_the_daemon_and_the_next_one_goes_on_with_the_server(own_node: Node, how: str) -> None:
    node = own_node
    before = wait_for_servers(node, 1)

    async def run() -> None:
        async with (
            spdy_command(node.exec_url(["cat"], stdin=True), "stdin", "stdout", "stderr") as command,
            spdy_client(node.port_forward_url(), ["portforward.k8s.io"]) as forwarding,
        ):
            await talks(command, b"with the first daemon")
            await asyncio.to_thread(node.daemon.kill if how == "killed" else node.daemon.stop)
            await talks(command, b"without a daemon")
            data, _ = await open_port(forwarding, 8080)
            await data.write(b"GET /index.html HTTP/1.0\r\n\r\n")
            assert (await data.read_all()).endswith(b"served\n")
            await asyncio.to_thread(node.daemon.start)
            await talks(command, b"with the second daemon")

            async with spdy_command(node.exec_url(["echo", "new"]), "stdout", "stderr") as other:
                assert await other["stdout"].read_all() == b"new\n"
            await command["stdin"].close()
            assert (await command.status())["status"] == "Success"

    asyncio.run(run())
    assert server_pids(node) == before


def test_other_settings_get_another_server_and_the_old_one_ends_with_its_last_session(own_node: Node) -> None:
    node = own_node
    (old,) = wait_for_servers(node, 1)

    async def run() -> None:
        async with spdy_command(node.exec_url(["cat"], stdin=True), "stdin", "stdout", "stderr") as command:
            node.daemon.settings["streaming"] = {"idle_timeout": 100}
            await asyncio.to_thread(node.daemon.restart)
            await asyncio.to_thread(wait_for_servers, node, 2)

            await talks(command, b"served by the old one")
            async with spdy_command(node.exec_url(["echo", "new"]), "stdout", "stderr") as other:
                assert await other["stdout"].read_all() == b"new\n"

    asyncio.run(run())
    (new,) = wait_for_servers(node, 1)
    assert new != old


def test_a_server_that_has_died_is_started_anew(own_node: Node) -> None:
    node = own_node
    (pid,) = wait_for_servers(node, 1)
    os.kill(pid, signal.SIGKILL)

    async def run() -> None:
        async with spdy_command(node.exec_url(["echo", "again"]), "stdout", "stderr") as command:
            assert await command["stdout"].read_all() == b"again\n"

    asyncio.run(run())


def test_nothing_of_it_stays_when_the_daemon_stops_with_nothing_left(own_node: Node) -> None:
    node = own_node
    node.client.remove_pod(node.pod.id)

    assert node.daemon.stop() == 0

    wait_for_servers(node, 0, 3)
    assert not (node.daemon.run_dir / "streaming.sock").exists()


def test_a_port_that_is_taken_is_told_to_callers_and_keeps_no_pod_from_running(
    make_daemon: MakeDaemon, busybox: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        daemon = make_daemon({"streaming": {"port": port}})
        client = daemon.client()
        pod = client.run_pod("streams")
        node = Node(daemon, client, pod, client.run(pod, busybox, ["sleep", "1000"]), busybox)
        with pytest.raises(grpc.RpcError, match=f"port {port}: Address already in use") as refused:
            node.exec_url(["true"])
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE

    assert f":{port}/exec/" in node.exec_url(["true"])  # once the port is free


def test_the_server_is_small(own_node: Node) -> None:
    (pid,) = wait_for_servers(own_node, 1)

    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])

    assert int(fields["Pss"].split()[0]) < 40_000  # kB


def test_a_monitor_that_is_killed_ends_the_session_with_the_reason(own_node: Node) -> None:
    node = own_node

    async def run() -> None:
        url = node.exec_url(["cat"], stdin=True)
        async with spdy_command(url, "stdin", "stdout", "stderr") as command:
            await talks(command, b"hello")
            os.kill(await monitor_of(node, node.container), signal.SIGKILL)

            status = await command.status()
            assert status["reason"] == "InternalError"
            assert "monitor" in status["message"]
            await command["stdout"].read_all()

    asyncio.run(run())
    node.client.remove_pod(node.pod.id)


async def monitor_of(node: Node, container: str) -> int:
    monitor = await Monitor.connect(node.daemon.run_dir / "containers" / container)
    monitor.close()
    return monitor.pid
