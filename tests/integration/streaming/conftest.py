"""A daemon with a running pod for the tests of streams, and URLs of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.conftest import MakeDaemon, busybox, directory, image_registry, make_daemon
from tests.e2e.harness.client import Client, Pod
from tests.e2e.harness.daemon import Daemon

__all__ = ["busybox", "directory", "image_registry", "make_daemon"]

SERVE = "echo served > /tmp/index.html; exec httpd -f -p 127.0.0.1:8080 -h /tmp"


@dataclass(frozen=True)
class Node:
    """A daemon, a pod on it, and in the pod a container that serves "served" on port 8080."""

    daemon: Daemon
    client: Client
    pod: Pod
    container: str
    image: str

    def exec_url(self, command: Sequence[str], *, tty: bool = False, stdin: bool = False, container: str = "") -> str:
        request = pb.ExecRequest(
            container_id=container or self.container, cmd=command, tty=tty, stdin=stdin, stdout=True, stderr=not tty
        )
        url: str = self.client.runtime.Exec(request, timeout=20).url
        return url

    def attach_url(self, container: str, *, tty: bool = False, stdin: bool = True, stdout: bool = True) -> str:
        request = pb.AttachRequest(container_id=container, tty=tty, stdin=stdin, stdout=stdout, stderr=not tty)
        url: str = self.client.runtime.Attach(request, timeout=20).url
        return url

    def port_forward_url(self, pod_id: str = "", ports: Sequence[int] = ()) -> str:
        request = pb.PortForwardRequest(pod_sandbox_id=pod_id or self.pod.id, port=ports)
        url: str = self.client.runtime.PortForward(request, timeout=20).url
        return url


@pytest.fixture(scope="module")
def shared_node(make_daemon: MakeDaemon, busybox: str) -> Iterator[Node]:
    daemon = make_daemon()
    client = daemon.client()
    pod = client.run_pod("streams")
    container = client.run(pod, busybox, ["sh", "-c", SERVE])
    yield Node(daemon, client, pod, container, busybox)
    client.remove_pod(pod.id)
    client.close()


@pytest.fixture
def node(shared_node: Node) -> Iterator[Node]:
    """What a test makes on the node must be gone when it ends, processes in the container included."""
    before = shared_node.daemon.traces()
    yield shared_node
    shared_node.daemon.nothing_added(before)
