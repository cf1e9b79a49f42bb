"""Port forwarding into real pods' networks."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.harness.ports import free_port
from tests.fakes.stream_client import SpdyClient, open_port, spdy_client, tunnel_client, websocket_client
from tests.integration.streaming.conftest import Node

REQUEST = b"GET /index.html HTTP/1.0\r\n\r\n"


@asynccontextmanager
async def forwarding(url: str, tunnel: bool) -> AsyncIterator[SpdyClient]:
    if tunnel:
        async with tunnel_client(url) as tunnelled:
            yield tunnelled
    else:
        async with spdy_client(url, ["portforward.k8s.io"]) as plain:
            yield plain


async def fetch(client: SpdyClient, port: int, request: str) -> bytes:
    data, _ = await open_port(client, port, request)
    await data.write(REQUEST)
    return await data.read_all()


@pytest.mark.parametrize("tunnel", [False, True])
def test_a_pods_own_loopback_is_reached(node: Node, tunnel: bool) -> None:
    async def run() -> None:
        async with forwarding(node.port_forward_url(), tunnel) as client:
            for request in ("1", "2", "3"):
                assert (await fetch(client, 8080, request)).endswith(b"served\n")

    asyncio.run(run())


def test_the_websocket_protocol_of_older_clients(node: Node) -> None:
    async def run() -> None:
        async with websocket_client(node.port_forward_url(ports=[8080]), ["v4.channel.k8s.io"]) as client:
            await client.send(b"\0" + REQUEST)
            await client.until(0, b"served\n")

    asyncio.run(run())


def test_a_port_on_which_nobody_listens_ends_its_connection_alone(node: Node) -> None:
    async def run() -> None:
        async with forwarding(node.port_forward_url(), False) as client:
            data, error = await open_port(client, 9, "1")
            assert (await data.read_all(), await error.read_all()) == (b"", b"")

            assert (await fetch(client, 8080, "2")).endswith(b"served\n")

    asyncio.run(run())


def test_a_pod_on_the_nodes_network(node: Node, busybox: str) -> None:
    port = free_port()
    options = pb.NamespaceOption(network=pb.NODE)
    linux = pb.LinuxPodSandboxConfig(security_context=pb.LinuxSandboxSecurityContext(namespace_options=options))
    pod = node.client.run_pod("on-the-node", linux=linux)
    command = ["sh", "-c", f"echo node > /tmp/index.html; exec httpd -f -p 127.0.0.1:{port} -h /tmp"]
    security = pb.LinuxContainerSecurityContext(namespace_options=options)
    node.client.run(pod, busybox, command, linux=pb.LinuxContainerConfig(security_context=security))

    async def run() -> None:
        async with forwarding(node.port_forward_url(pod.id), False) as client:
            for attempt in range(50):
                if (await fetch(client, port, str(attempt))).endswith(b"node\n"):
                    return
                await asyncio.sleep(0.1)
            raise AssertionError("the server in the pod was not reached")

    asyncio.run(run())
    node.client.remove_pod(pod.id)


def test_a_pod_that_is_not_ready_and_ports_that_are_none_are_refused(node: Node) -> None:
    pod = node.client.run_pod("stopped")
    node.client.stop_pod(pod.id)

    for pod_id, ports, code in (
        (pod.id, [], grpc.StatusCode.FAILED_PRECONDITION),
        ("f" * 64, [], grpc.StatusCode.NOT_FOUND),
        (node.pod.id, [0], grpc.StatusCode.INVALID_ARGUMENT),
        (node.pod.id, [70000], grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            node.port_forward_url(pod_id, ports)
        assert refused.value.code() is code
    node.client.remove_pod(pod.id)
