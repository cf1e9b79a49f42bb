from __future__ import annotations

import asyncio
import json
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from oci.errors import Error
from sandbox.network.interfaces import bring_up_loopback, in_netns, interface_stats_in
from sandbox.network.pod_network import PodNetwork, PodNetworkRequest, PodNetworkResult
from sandbox.spec import PortMapping
from sandbox.spec import Protocol as IpProtocol

if TYPE_CHECKING:
    from tests.integration.network.conftest import Node

DUAL = ("10.93.0.0/24", "fd93::/64")
DEPLOYED = Path(__file__).parents[3] / "deploy" / "cni"


async def attach(network: PodNetwork, pod: PodNetworkRequest) -> PodNetworkResult:
    return await network.add(pod, network.plan(pod))


def ip_json(pod: PodNetworkRequest, *arguments: str) -> Any:
    run = in_netns(
        pod.netns, lambda: subprocess.run(["ip", "-json", *arguments], check=True, capture_output=True, text=True)
    )
    return json.loads(run.stdout)


def delete_netns(pod: PodNetworkRequest) -> None:
    subprocess.run(["ip", "netns", "delete", Path(pod.netns).name], check=True)


def listener(netns: str, kind: socket.SocketKind, port: int, family: socket.AddressFamily) -> socket.socket:
    def listen() -> socket.socket:
        server = socket.socket(family, kind)
        server.settimeout(5)
        if family is socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        server.bind(("", port))
        if kind is socket.SOCK_STREAM:
            server.listen()
        return server

    return in_netns(netns, listen)


def can_connect(from_netns: str, address: str, port: int) -> bool:
    def connect() -> bool:
        try:
            socket.create_connection((address, port), timeout=3).close()
            return True
        except OSError:
            return False

    return in_netns(from_netns, connect)


def test_a_pod_gets_an_address_of_each_family_and_a_loopback(node: Node) -> None:
    node.configure(node.network(subnets=DUAL))
    pod = node.pod()

    async def story(network: PodNetwork) -> None:
        result = await attach(network, pod)

        links = {link["ifname"]: link for link in ip_json(pod, "address")}
        assert result.ips == ("10.93.0.2", "fd93::2")
        assert result.mac == links["eth0"]["address"]
        assert {"10.93.0.2", "fd93::2"} <= {address["local"] for address in links["eth0"]["addr_info"]}
        assert "UP" in links["lo"]["flags"]
        assert [stats.name for stats in interface_stats_in(pod.netns)] == ["eth0"]
        await network.check(pod, result.attachments)
        await network.remove(pod, result.attachments)

    node.run(story)
    node.assert_nothing_is_left("br-pods")


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0", "1.0.0"])
def test_every_version_of_cni_that_the_plugins_know_works(node: Node, version: str) -> None:
    node.configure({**node.network(subnets=DUAL), "cniVersion": version})
    pod = node.pod()  # without a host port: portmap's CHECK (1.1.1) looks for each rule in both families

    async def story(network: PodNetwork) -> None:
        result = await attach(network, pod)
        assert result.ips == ("10.93.0.2", "fd93::2")
        await network.check(pod, result.attachments)
        await network.remove(pod, result.attachments)

    node.run(story)
    node.assert_nothing_is_left("br-pods")


def test_a_version_that_the_plugins_do_not_know_is_avoided_where_the_network_allows_another(node: Node) -> None:
    node.configure({**node.network(), "cniVersion": "0.4.0", "cniVersions": ["0.4.0", "1.0.0", "1.1.0"]})
    pod = node.pod()

    async def story(network: PodNetwork) -> None:
        result = await attach(network, pod)
        await network.remove(pod, result.attachments)

    node.run(story)
    node.assert_nothing_is_left("br-pods")


def test_pods_reach_each_other_and_the_node(node: Node) -> None:
    node.configure(node.network(subnets=DUAL))
    first, second = node.pod(), node.pod()

    async def story(network: PodNetwork) -> None:
        results = [await attach(network, pod) for pod in (first, second)]
        with (
            listener(second.netns, socket.SOCK_STREAM, 80, socket.AF_INET),
            listener(second.netns, socket.SOCK_STREAM, 80, socket.AF_INET6),
            listener(node.netns, socket.SOCK_STREAM, 81, socket.AF_INET),
        ):
            assert can_connect(first.netns, results[1].ips[0], 80)
            assert can_connect(first.netns, results[1].ips[1], 80)
            assert can_connect(node.netns, results[1].ips[0], 80)
            assert can_connect(first.netns, "10.93.0.1", 81)
        assert interface_stats_in(second.netns)[0].rx_bytes > 0
        for pod, result in zip((first, second), results, strict=True):
            await network.remove(pod, result.attachments)

    node.run(story)
    node.assert_nothing_is_left("br-pods")


def test_a_host_port_leads_to_the_pod_until_the_pod_is_removed(node: Node) -> None:
    node.configure(node.network(subnets=DUAL))
    pod = node.pod(
        port_mappings=(
            PortMapping(IpProtocol.TCP, 80, 18080),
            PortMapping(IpProtocol.UDP, 53, 15353),
            PortMapping(IpProtocol.TCP, 443, 0),
        )
    )

    other = node.pod()

    async def story(network: PodNetwork) -> None:
        result, other_result = await attach(network, pod), await attach(network, other)
        with (
            listener(pod.netns, socket.SOCK_STREAM, 80, socket.AF_INET),
            listener(pod.netns, socket.SOCK_STREAM, 80, socket.AF_INET6),
            listener(pod.netns, socket.SOCK_DGRAM, 53, socket.AF_INET) as udp,
        ):
            assert can_connect(node.netns, "127.0.0.1", 18080)
            assert can_connect(node.netns, "10.93.0.1", 18080)
            assert can_connect(other.netns, "10.93.0.1", 18080)
            assert can_connect(other.netns, "fd93::1", 18080)
            with in_netns(node.netns, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as client:
                client.sendto(b"question", ("127.0.0.1", 15353))
                assert udp.recv(100) == b"question"
            await network.remove(pod, result.attachments)
            assert not can_connect(node.netns, "127.0.0.1", 18080)
        await network.remove(other, other_result.attachments)

    node.run(story)
    node.assert_nothing_is_left("br-pods")


def test_a_broken_network_does_not_pass_the_check(node: Node) -> None:
    node.configure(node.network())
    pod = node.pod()

    async def story(network: PodNetwork) -> None:
        result = await attach(network, pod)
        in_netns(pod.netns, lambda: subprocess.run(["ip", "route", "delete", "default"], check=True))
        with pytest.raises(Error, match=f"CNI CHECK of pod shop/{pod.name} .* plugin bridge failed"):
            await network.check(pod, result.attachments)
        await network.remove(pod, result.attachments)

    node.run(story)
    node.assert_nothing_is_left("br-pods")


def test_a_pod_is_removed_as_often_as_wanted_and_also_without_its_namespace(node: Node) -> None:
    node.configure(node.network(subnets=DUAL))
    pod = node.pod(port_mappings=(PortMapping(IpProtocol.TCP, 80, 18080),))

    async def story(network: PodNetwork) -> None:
        result = await attach(network, pod)
        assert node.leased() == ["10.93.0.2", "fd93::2"]
        await network.remove(pod, result.attachments)
        await network.remove(pod, result.attachments)
        delete_netns(pod)
        await network.remove(pod, result.attachments)
        await network.remove(replace(pod, netns=""), result.attachments)
        assert node.leased() == []

    node.run(story)


def test_a_pod_whose_namespace_was_lost_gives_back_its_address(node: Node) -> None:
    node.configure(node.network(ipMasq=False))  # the bridge plugin (1.1.1) cannot undo its masquerading then
    pod = node.pod(port_mappings=(PortMapping(IpProtocol.TCP, 80, 18080),))

    async def story(network: PodNetwork) -> None:
        result = await attach(network, pod)
        delete_netns(pod)
        await network.remove(pod, result.attachments)

    node.run(story)
    node.assert_nothing_is_left("br-pods")


def test_a_reboot_leaves_a_file_without_a_namespace_and_the_lease_is_still_released(node: Node, tmp_path: Path) -> None:
    node.configure(node.network())
    pod = node.pod()
    (tmp_path / "netns").touch()

    async def story(network: PodNetwork) -> None:
        result = await attach(network, pod)
        delete_netns(pod)
        await network.remove(replace(pod, netns=str(tmp_path / "netns")), result.attachments)

    node.run(story)
    assert node.leased() == []


def test_a_pod_whose_chain_failed_half_way_is_removed_whole(node: Node) -> None:
    network_config = node.network()
    network_config["plugins"].append({"type": "tuning", "sysctl": {"net.no.such.key": "1"}})
    node.configure(network_config)
    pod = node.pod(port_mappings=(PortMapping(IpProtocol.TCP, 80, 18080),))

    async def story(network: PodNetwork) -> None:
        attachments = network.plan(pod)
        with pytest.raises(Error, match='to network "pods" as eth0: plugin tuning failed'):
            await network.add(pod, attachments)
        assert node.leased() == ["10.93.0.2"]
        await network.remove(pod, attachments)

    node.run(story)
    node.assert_nothing_is_left("br-pods")


def test_a_pod_can_have_several_networks(node: Node) -> None:
    node.configure(node.network(), node.network("storage", ("10.94.0.0/24",), ipMasq=False))
    pod = node.pod()

    async def story(network: PodNetwork) -> None:
        result = await attach(network, pod)
        assert [(each.network, each.ifname) for each in result.attachments] == [("pods", "eth0"), ("storage", "eth1")]
        assert result.ips == ("10.93.0.2", "10.94.0.2")
        assert {link["ifname"] for link in ip_json(pod, "link")} >= {"lo", "eth0", "eth1"}
        await network.check(pod, result.attachments)
        await network.remove(pod, result.attachments)

    node.run(story, max_conf_num=2)
    node.assert_nothing_is_left("br-pods", "br-storage")


def test_many_pods_at_once_get_addresses_of_their_own(node: Node) -> None:
    node.configure(node.network())
    pods = [node.pod() for _ in range(12)]

    async def story(network: PodNetwork) -> None:
        results = await asyncio.gather(*(attach(network, pod) for pod in pods))
        assert len({result.ips[0] for result in results}) == len(pods)
        removals = zip(pods, results, strict=True)
        await asyncio.gather(*(network.remove(pod, result.attachments) for pod, result in removals))

    node.run(story)
    node.assert_nothing_is_left("br-pods")


def test_a_bandwidth_annotation_shapes_the_pods_link(node: Node) -> None:
    if not Path("/usr/lib/cni/bandwidth").exists():
        pytest.skip("the CNI plugin bandwidth is not installed")
    network_config = node.network()
    network_config["plugins"].append({"type": "bandwidth", "capabilities": {"bandwidth": True}})
    node.configure(network_config)
    pod = node.pod(annotations={"kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "5M"})

    async def story(network: PodNetwork) -> None:
        attachments = network.plan(pod)
        try:
            await network.add(pod, attachments)
            shaped = node.command("tc", "qdisc")
            assert "tbf" in shaped
            assert "10Mbit" in shaped
            assert "5Mbit" in shaped
        finally:
            await network.remove(pod, attachments)

    try:
        node.run(story)
    except Error as error:
        if "not supported" in str(error) or "no such file" in str(error):
            pytest.skip(f"this kernel cannot shape: {error}")
        raise
    node.assert_nothing_is_left("br-pods")


def test_what_a_daemon_lost_is_collected_and_what_it_has_is_kept(node: Node) -> None:
    node.configure(node.network())
    kept, lost = node.pod(), node.pod()
    kept_result, _ = node.run(lambda network: asyncio.gather(attach(network, kept), attach(network, lost)))
    assert len(node.leased()) == 2

    async def story(network: PodNetwork) -> None:
        await network.gc({kept.sandbox_id: kept_result.attachments})
        assert node.leased() == [kept_result.ips[0]]
        await network.check(kept, kept_result.attachments)
        await network.remove(kept, kept_result.attachments)

    node.run(story)
    node.assert_nothing_is_left("br-pods")


def test_leases_of_other_runtimes_are_not_collected(node: Node) -> None:
    node.configure(node.network())
    (node.leases / "pods").mkdir(parents=True)
    (node.leases / "pods" / "10.93.0.77").write_text("somebody-else\r\neth0")

    node.run(lambda network: network.gc({}))

    assert node.leased() == ["10.93.0.77"]


def test_an_exhausted_subnet_is_told_in_the_plugins_words(node: Node) -> None:
    node.configure(node.network(subnets=("10.93.0.0/30",)))
    first, second = node.pod(), node.pod()

    async def story(network: PodNetwork) -> None:
        result = await attach(network, first)
        attachments = network.plan(second)
        with pytest.raises(Error, match="no IP addresses available"):
            await network.add(second, attachments)
        await network.remove(second, attachments)
        await network.remove(first, result.attachments)

    node.run(story)
    node.assert_nothing_is_left("br-pods")


@pytest.mark.parametrize(("folder", "families"), [("", 1), ("dual-stack", 2)])
def test_the_configuration_that_we_ship_gives_a_pod_its_network(node: Node, folder: str, families: int) -> None:
    document = json.loads((DEPLOYED / folder / "10-crito-bridge.conflist").read_text())
    document["plugins"][0]["ipam"]["dataDir"] = str(node.leases)
    node.configure(document)
    pod = node.pod(port_mappings=(PortMapping(IpProtocol.TCP, 80, 18080),))

    async def story(network: PodNetwork) -> None:
        result = await attach(network, pod)
        assert len(result.ips) == families
        with listener(pod.netns, socket.SOCK_STREAM, 80, socket.AF_INET):
            assert can_connect(node.netns, "127.0.0.1", 18080)
            assert can_connect(pod.netns, "10.85.0.1", 18080)
        await network.remove(pod, result.attachments)

    node.run(story)
    node.assert_nothing_is_left("crito0")


def test_the_loopback_of_a_namespace_is_brought_up_once(node: Node) -> None:
    pod = node.pod()
    assert "UP" not in ip_json(pod, "link", "show", "lo")[0]["flags"]

    bring_up_loopback(pod.netns)
    bring_up_loopback(pod.netns)

    assert "UP" in ip_json(pod, "link", "show", "lo")[0]["flags"]
    assert Path("/proc/thread-self/ns/net").readlink() == Path("/proc/self/ns/net").readlink()
