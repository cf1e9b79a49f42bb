from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from oci.errors import DeadlineExceeded, Error, FailedPrecondition, InvalidArgument, Unavailable
from sandbox.network.pod_network import PodNetwork, PodNetworkRequest
from sandbox.spec import PortMapping
from sandbox.spec import Protocol as IpProtocol
from tests.fakes.cni_plugins import FakePlugins

if TYPE_CHECKING:
    from tests.integration.network.conftest import Node

MAIN = {"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "main"}]}
FAIL = 'echo \'{"code": 100, "msg": "no luck"}\'; exit 1'


@pytest.fixture
def fakes(node: Node) -> Iterator[FakePlugins]:
    node.fakes.write("main")
    node.configure(MAIN)
    yield node.fakes


def entries(node: Node) -> list[str]:
    return sorted(path.name for path in node.state_dir.glob("*"))


def test_without_a_network_a_pod_is_unavailable_and_told_why(node: Node) -> None:
    pod = node.pod()

    async def story(network: PodNetwork) -> None:
        assert not network.status().ready
        with pytest.raises(Unavailable, match=f"pod shop/web-1: no CNI network configuration .* in {node.conf_dir}"):
            network.plan(pod)

    node.run(story)


def test_a_wrong_annotation_is_refused_before_anything_runs(node: Node, fakes: FakePlugins) -> None:
    async def story(network: PodNetwork) -> None:
        with pytest.raises(InvalidArgument, match="ingress-bandwidth"):
            network.plan(node.pod(annotations={"kubernetes.io/ingress-bandwidth": "fast"}))

    node.run(story)
    assert fakes.calls == []


def test_host_ports_that_nothing_maps_are_logged(
    node: Node, fakes: FakePlugins, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(network: PodNetwork) -> None:
        network.plan(node.pod(port_mappings=(PortMapping(IpProtocol.TCP, 80, 18080),)))

    node.run(story)

    assert "pod shop/web-1: no CNI plugin asks for port mappings; nothing maps the host ports 18080/tcp" in caplog.text


def test_a_hanging_add_ends_at_its_deadline_and_can_be_removed(node: Node, fakes: FakePlugins) -> None:
    fakes.write("main", add="sleep 1000")
    pod = node.pod()

    async def story(network: PodNetwork) -> None:
        attachments = network.plan(pod)
        with pytest.raises(DeadlineExceeded, match=r'CNI ADD of pod shop/web-1 .* network "pods" .* plugin main'):
            await network.add(pod, attachments)
        assert entries(node) == [f"{pod.sandbox_id}-eth0.json"]
        await network.remove(pod, attachments)

    started = time.monotonic()
    node.run(story, timeout_s=0.5)

    assert time.monotonic() - started < 5
    assert fakes.story == ["ADD main", "DEL main"]
    assert entries(node) == []


def test_a_namespace_that_is_not_there_is_named_and_no_plugin_runs(node: Node, fakes: FakePlugins) -> None:
    pod = PodNetworkRequest(node.pod().sandbox_id, "web", "shop", "u", f"{node.root}/no-netns")

    async def story(network: PodNetwork) -> None:
        with pytest.raises(Error, match=f"network namespace {node.root}/no-netns of pod shop/web: No such file"):
            await network.add(pod, network.plan(pod))

    node.run(story)
    assert fakes.calls == []


def test_del_sees_what_add_saw_whatever_the_directory_holds_by_then(node: Node, fakes: FakePlugins) -> None:
    pod = node.pod()

    async def story(network: PodNetwork) -> None:
        result = await network.add(pod, network.plan(pod))
        node.configure({**MAIN, "name": "other", "plugins": [{"type": "main", "mtu": 1}]})
        await asyncio.sleep(0.3)
        assert [attachment.network for attachment in network.plan(pod)] == ["other"]
        await network.remove(pod, result.attachments)

    node.run(story)

    add, delete = fakes.calls
    assert {**add.config, "prevResult": delete.config["prevResult"]} == delete.config
    assert (delete.container_id, delete.netns, delete.ifname, delete.args) == (
        add.container_id,
        add.netns,
        add.ifname,
        add.args,
    )


def test_a_network_that_cannot_be_removed_does_not_keep_the_others(node: Node, fakes: FakePlugins) -> None:
    fakes.write("good")
    fakes.write("bad", **{"del": FAIL})
    node.configure(*({**MAIN, "name": name, "plugins": [{"type": name}]} for name in ("good", "bad")))
    pod = node.pod()

    async def story(network: PodNetwork) -> None:
        result = await network.add(pod, network.plan(pod))
        with pytest.raises(Error, match="no luck"):
            await network.remove(pod, result.attachments)
        assert fakes.story[2:] == ["DEL bad", "DEL good"]
        assert entries(node) == [f"{pod.sandbox_id}-eth1.json"]

        fakes.write("good", **{"del": FAIL})
        with pytest.raises(Error) as error:
            await network.remove(pod, result.attachments)
        assert str(error.value).count("no luck") == 2

        fakes.write("good")
        fakes.write("bad")
        await network.remove(pod, result.attachments)

    node.run(story, max_conf_num=0)
    assert entries(node) == []


def test_what_was_never_attached_cannot_be_checked(node: Node, fakes: FakePlugins) -> None:
    pod = node.pod()

    async def story(network: PodNetwork) -> None:
        with pytest.raises(FailedPrecondition, match='network "pods" of pod shop/web-1 was never attached'):
            await network.check(pod, network.plan(pod))

    node.run(story)


def test_gc_waits_for_verbs_keeps_others_waiting_and_spares_what_was_added_meanwhile(
    node: Node, fakes: FakePlugins
) -> None:
    fakes.write("main", add=f"sleep 0.5; echo '{json.dumps({'ips': [{'address': '10.1.0.5/16'}]})}'")
    node.configure({**MAIN, "cniVersion": "1.1.0"})
    first, second = node.pod(), node.pod()

    async def story(network: PodNetwork) -> None:
        adding = asyncio.create_task(network.add(first, network.plan(first)))
        await asyncio.sleep(0.2)
        collecting = asyncio.create_task(network.gc({}))
        await asyncio.sleep(0.05)
        result = await network.add(second, network.plan(second))
        await collecting
        await network.remove(first, (await adding).attachments)
        await network.remove(second, result.attachments)

    node.run(story)

    verbs = [f"{call.verb} {call.container_id[-1:]}" for call in fakes.calls if call.verb != "STATUS"]
    assert verbs == ["ADD 1", "GC ", "ADD 2", "DEL 1", "DEL 2"]
    collected = next(call for call in fakes.calls if call.verb == "GC")
    assert collected.config["cni.dev/valid-attachments"] == [{"containerID": first.sandbox_id, "ifname": "eth0"}]


def test_gc_also_reaches_a_network_that_is_not_configured_any_more_but_has_a_pod(
    node: Node, fakes: FakePlugins
) -> None:
    node.configure({**MAIN, "cniVersion": "1.1.0"})
    pod = node.pod()

    async def story(network: PodNetwork) -> None:
        result = await network.add(pod, network.plan(pod))
        node.configure()
        await asyncio.sleep(0.3)
        await network.gc({pod.sandbox_id: result.attachments})
        await network.remove(pod, result.attachments)

    node.run(story)

    assert [story for story in fakes.story if "STATUS" not in story] == ["ADD main", "GC main", "DEL main"]


def test_gc_tells_all_that_went_wrong_after_trying_all(node: Node, fakes: FakePlugins) -> None:
    pods = [node.pod(), node.pod()]

    async def lose(network: PodNetwork) -> None:
        for pod in pods:
            await network.add(pod, network.plan(pod))

    async def collect(network: PodNetwork) -> None:
        fakes.write("main", **{"del": FAIL})
        with pytest.raises(Error) as error:
            await network.gc({})
        assert str(error.value).count("no luck") == 2
        assert len(entries(node)) == 2
        fakes.write("main")
        await network.gc({})

    node.run(lose)
    node.run(collect)
    assert entries(node) == []


DAEMON = """
import asyncio, pathlib, sys
import msgspec
from sandbox.network.pod_network import PodNetwork, PodNetworkRequest

async def main(conf_dir, plugin_dir, state_dir, request):
    network = PodNetwork(pathlib.Path(conf_dir), (pathlib.Path(plugin_dir),), state_dir=pathlib.Path(state_dir))
    await network.start()
    pod = msgspec.json.decode(request, type=PodNetworkRequest)
    await network.add(pod, network.plan(pod))
    await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""


def plugin_pids(node: Node, pod: PodNetworkRequest) -> list[int]:
    """The running processes that carry the pod's id, as a plugin does."""
    pids: list[int] = []
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                if f"CNI_CONTAINERID={pod.sandbox_id}\0".encode() in (path / "environ").read_bytes():
                    pids.append(int(path.name))
            except OSError:
                continue
    return pids


def kill_daemon_when(node: Node, pod: PodNetworkRequest, sign: Path) -> None:
    """Run an ADD in a daemon of its own and kill that as soon as `sign` exists."""
    request = msgspec.json.encode(pod).decode()
    arguments = [str(node.conf_dir), str(node.fakes.directory), str(node.state_dir), request]
    daemon = subprocess.Popen([sys.executable, "-c", DAEMON, *arguments], cwd=Path(__file__).parents[3])
    try:
        deadline = time.monotonic() + 20
        while not sign.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()


def test_an_add_that_a_killed_daemon_left_running_is_ended_before_its_del(node: Node, fakes: FakePlugins) -> None:
    sign = node.root / "sign"
    fakes.write("main", add=f"touch {sign}; sleep 1000")
    pod = node.pod()
    kill_daemon_when(node, pod, sign)
    assert len(plugin_pids(node, pod)) == 2  # the plugin and its sleep

    async def story(network: PodNetwork) -> None:
        assert plugin_pids(node, pod) == []
        await network.gc({})

    node.run(story)

    assert fakes.story == ["ADD main", "DEL main"]
    assert entries(node) == []


def test_what_a_finished_add_left_running_on_purpose_is_not_ended(node: Node, fakes: FakePlugins) -> None:
    helper = node.root / "helper"
    result = json.dumps({"ips": [{"address": "10.1.0.5/16"}]})
    fakes.write("main", add=f"setsid sleep 1000 >/dev/null 2>&1 & echo $! > {helper}; echo '{result}'")
    pod = node.pod()

    async def story(network: PodNetwork) -> None:
        await network.add(pod, network.plan(pod))

    node.run(story)
    (pid,) = plugin_pids(node, pod)
    try:
        node.run(lambda network: asyncio.sleep(0))
        assert plugin_pids(node, pod) == [pid]
    finally:
        os.kill(pid, signal.SIGKILL)

    node.run(lambda network: network.gc({}))
    assert entries(node) == []
