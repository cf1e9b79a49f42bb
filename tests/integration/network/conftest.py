"""A node for the tests of pod networks: a network namespace of its own, so that bridges, iptables rules and sysctls of
the host stay as they are, with pods beside it and the real plugins, whose leases lie in a temporary directory."""

import asyncio
import json
import os
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from oci.container_spec import SandboxId
from sandbox.network.interfaces import bring_up_loopback, in_netns
from sandbox.network.pod_network import PodNetwork, PodNetworkRequest
from tests.fakes.cni_plugins import FakePlugins

T = TypeVar("T")

PLUGIN_DIR = Path("/usr/lib/cni")
NEEDED = ("bridge", "host-local", "portmap")


@contextmanager
def netns(name: str) -> Iterator[str]:
    """The path of a new network namespace, which is gone in the end."""
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield f"/run/netns/{name}"
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


class Node:
    def __init__(self, path: str, root: Path) -> None:
        self.netns = path
        self.root = root
        self.conf_dir = root / "net.d"
        self.leases = root / "leases"
        self.state_dir = root / "state"
        self.fakes = FakePlugins(root / "bin")
        self._stack = ExitStack()
        self._pods = 0
        self.conf_dir.mkdir()
        bring_up_loopback(path)
        self._links, self._rules = self.links(), self.rules()

    def close(self) -> None:
        self._stack.close()

    def network(
        self, name: str = "pods", subnets: tuple[str, ...] = ("10.93.0.0/24",), **bridge: Any
    ) -> dict[str, Any]:
        """A conflist of bridge and portmap; written with `configure`."""
        ipam = {
            "type": "host-local",
            "dataDir": str(self.leases),
            "ranges": [[{"subnet": subnet}] for subnet in subnets],
            "routes": [{"dst": "::/0" if ":" in subnet else "0.0.0.0/0"} for subnet in subnets],
        }
        plugins = [
            {"type": "bridge", "bridge": f"br-{name}", "isGateway": True, "ipMasq": True, "ipam": ipam, **bridge},
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ]
        return {"cniVersion": "1.0.0", "name": name, "plugins": plugins}

    def configure(self, *networks: dict[str, Any]) -> None:
        for path in self.conf_dir.iterdir():
            path.unlink()
        for number, network in enumerate(networks):
            (self.conf_dir / f"{number:02}.conflist").write_text(json.dumps(network))

    def pod(self, **keys: Any) -> PodNetworkRequest:
        """A pod with a namespace of its own and no network yet."""
        self._pods += 1
        path = self._stack.enter_context(netns(f"crito-pod-{os.getpid()}-{self._pods}"))
        id = SandboxId(f"{os.getpid():032x}{self._pods:032x}")
        return PodNetworkRequest(id, f"web-{self._pods}", "shop", f"uid-{self._pods}", path, **keys)

    def pod_network(self, **settings: Any) -> PodNetwork:
        return PodNetwork(self.conf_dir, (self.fakes.directory, PLUGIN_DIR), state_dir=self.state_dir, **settings)

    def run(self, story: Callable[[PodNetwork], Awaitable[T]], **settings: Any) -> T:
        """What `story` returns when told to a daemon that lives on this node."""

        async def with_pod_network() -> T:
            pod_network = self.pod_network(**settings)
            await pod_network.start()
            try:
                return await story(pod_network)
            finally:
                await pod_network.close()

        return in_netns(self.netns, lambda: asyncio.run(with_pod_network()))

    def command(self, *command: str) -> str:
        """What a command says on this node."""
        run = in_netns(self.netns, lambda: subprocess.run(command, check=True, capture_output=True, text=True))
        return run.stdout

    def links(self) -> list[str]:
        return sorted(link["ifname"] for link in json.loads(self.command("ip", "-json", "link")))

    def rules(self) -> list[str]:
        """The iptables rules of both families, without the plugins' own empty chains and jumps to them."""
        saved = self.command("iptables-save") + self.command("ip6tables-save")
        return [line for line in saved.splitlines() if line.startswith("-A") and "CNI-HOSTPORT" not in line]

    def leased(self, network: str = "pods") -> list[str]:
        names = [path.name for path in (self.leases / network).glob("*")]
        return sorted(name for name in names if name != "lock" and not name.startswith("last_reserved_ip"))

    def assert_nothing_is_left(self, *bridges: str) -> None:
        assert self.links() == sorted([*self._links, *bridges])
        assert self.rules() == self._rules
        assert [self.leased(path.name) for path in self.leases.glob("*") if self.leased(path.name)] == []
        assert list(self.state_dir.glob("*")) == []


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    if os.geteuid() != 0:
        pytest.skip("needs root: makes network namespaces")
    if missing := [name for name in NEEDED if not (PLUGIN_DIR / name).exists()]:
        pytest.skip(f"{PLUGIN_DIR} lacks the CNI plugins {', '.join(missing)}")
    with netns(f"crito-node-{os.getpid()}") as path:
        node = Node(path, tmp_path)
        try:
            yield node
        finally:
            node.close()
