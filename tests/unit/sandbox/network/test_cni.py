import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from oci.errors import DeadlineExceeded, Error
from sandbox.network.cni import AttachmentParameters, Cni
from sandbox.network.conflist import NetworkConfig, parse
from sandbox.network.plugin import PluginError, Plugins
from tests.fakes.cni_plugins import RESULT, FakePlugins

T = TypeVar("T")

PARAMETERS = AttachmentParameters(
    "c1",
    "/run/netns/x",
    "eth0",
    "IgnoreUnknown=1",
    "pod shop/web",
    {"portMappings": [{"hostPort": 1}], "dns": {"a": 1}},
)


@pytest.fixture
def fakes(tmp_path: Path) -> FakePlugins:
    fakes = FakePlugins(tmp_path / "bin")
    fakes.write("main")
    fakes.write("chained", add='echo "$stdin" | sed \'s/.*"prevResult": //; s/}$//\'')
    return fakes


def run(fakes: FakePlugins, verb: Callable[[Cni], Awaitable[T]], timeout_s: float = 5.0) -> T:
    async def call() -> T:
        return await verb(Cni(Plugins((fakes.directory,), timeout_s)))

    return asyncio.run(call())


def network(version: str = "1.0.0", **keys: Any) -> NetworkConfig:
    plugins = [{"type": "main", "mtu": 1400}, {"type": "chained", "capabilities": {"portMappings": True, "dns": False}}]
    return parse({"cniVersion": version, "name": "pods", "plugins": plugins, **keys})


def test_add_runs_the_chain_in_order_and_hands_each_result_on(fakes: FakePlugins) -> None:
    result = run(fakes, lambda cni: cni.add(network(), PARAMETERS))

    assert fakes.story == ["ADD main", "ADD chained"]
    first, second = fakes.calls
    assert first.config == {"type": "main", "mtu": 1400, "cniVersion": "1.0.0", "name": "pods"}
    assert second.config == {
        "type": "chained",
        "cniVersion": "1.0.0",
        "name": "pods",
        "runtimeConfig": {"portMappings": [{"hostPort": 1}]},
        "prevResult": RESULT,
    }
    assert (second.container_id, second.netns, second.ifname, second.args) == (
        "c1",
        "/run/netns/x",
        "eth0",
        "IgnoreUnknown=1",
    )
    assert result == RESULT


def test_a_result_is_handed_on_in_the_version_of_the_network(fakes: FakePlugins) -> None:
    result = run(fakes, lambda cni: cni.add(network("0.4.0"), PARAMETERS))

    assert fakes.calls[1].config["prevResult"]["cniVersion"] == "0.4.0"
    assert result["cniVersion"] == "0.4.0"


def test_add_stops_at_the_plugin_that_fails(fakes: FakePlugins) -> None:
    fakes.write("main", add='echo \'{"code": 100, "msg": "no"}\'; exit 1')

    with pytest.raises(PluginError, match='CNI ADD of pod shop/web to network "pods" as eth0: plugin main failed'):
        run(fakes, lambda cni: cni.add(network(), PARAMETERS))

    assert fakes.story == ["ADD main"]


def test_an_add_without_a_result_is_an_error(fakes: FakePlugins) -> None:
    fakes.write("main", add="true")

    with pytest.raises(Error, match="plugin main succeeded, but answered no result"):
        run(fakes, lambda cni: cni.add(network(), PARAMETERS))


def test_a_plugin_of_a_chain_that_hangs_is_the_one_that_is_named(fakes: FakePlugins) -> None:
    fakes.write("chained", add="sleep 1000")

    with pytest.raises(DeadlineExceeded, match='CNI ADD of pod shop/web to network "pods" as eth0: plugin chained'):
        run(fakes, lambda cni: cni.add(network(), PARAMETERS), timeout_s=0.5)


def test_delete_runs_the_chain_backwards_and_shows_every_plugin_the_final_result(fakes: FakePlugins) -> None:
    run(fakes, lambda cni: cni.delete(network(), PARAMETERS, {"ips": ["final"]}))

    assert fakes.story == ["DEL chained", "DEL main"]
    assert [call.config["prevResult"] for call in fakes.calls] == [{"ips": ["final"]}, {"ips": ["final"]}]
    assert fakes.calls[0].config["runtimeConfig"] == {"portMappings": [{"hostPort": 1}]}


@pytest.mark.parametrize(("version", "result"), [("0.3.1", {"ips": []}), ("1.0.0", None)])
def test_delete_shows_no_result_where_there_is_none_or_the_version_has_no_room_for_it(
    fakes: FakePlugins, version: str, result: Any
) -> None:
    run(fakes, lambda cni: cni.delete(network(version), PARAMETERS, result))

    assert ["prevResult" in call.config for call in fakes.calls] == [False, False]


def test_a_container_that_the_plugin_does_not_know_counts_as_deleted(fakes: FakePlugins) -> None:
    fakes.write("chained", **{"del": 'echo \'{"code": 3, "msg": "unknown container"}\'; exit 1'})

    run(fakes, lambda cni: cni.delete(network(), PARAMETERS))

    assert fakes.story == ["DEL chained", "DEL main"]


def test_delete_stops_at_the_plugin_that_fails(fakes: FakePlugins) -> None:
    fakes.write("chained", **{"del": 'echo \'{"code": 100, "msg": "iptables is locked"}\'; exit 1'})

    with pytest.raises(PluginError, match="iptables is locked"):
        run(fakes, lambda cni: cni.delete(network(), PARAMETERS))

    assert fakes.story == ["DEL chained"]


def test_check_shows_every_plugin_the_final_result(fakes: FakePlugins) -> None:
    run(fakes, lambda cni: cni.check(network(), PARAMETERS, RESULT))

    assert fakes.story == ["CHECK main", "CHECK chained"]
    assert [call.config["prevResult"] for call in fakes.calls] == [RESULT, RESULT]


@pytest.mark.parametrize("unchecked", [network("0.3.1"), network(disableCheck=True)])
def test_check_is_left_out_where_the_network_does_not_have_it(fakes: FakePlugins, unchecked: NetworkConfig) -> None:
    run(fakes, lambda cni: cni.check(unchecked, PARAMETERS, RESULT))

    assert fakes.story == []


def test_gc_tells_all_plugins_what_is_valid_even_after_one_failed(fakes: FakePlugins) -> None:
    fakes.write("main", gc='echo \'{"code": 100, "msg": "store is locked"}\'; exit 1')

    with pytest.raises(Error, match='CNI GC of network "pods": plugin main failed with code 100: store is locked'):
        run(fakes, lambda cni: cni.gc(network("1.1.0"), [("c1", "eth0"), ("c2", "eth1")]))

    assert fakes.story == ["GC main", "GC chained"]
    assert fakes.calls[1].config == {
        "type": "chained",
        "cniVersion": "1.1.0",
        "name": "pods",
        "cni.dev/valid-attachments": [
            {"containerID": "c1", "ifname": "eth0"},
            {"containerID": "c2", "ifname": "eth1"},
        ],
    }


@pytest.mark.parametrize("uncollected", [network("1.0.0"), network("1.1.0", disableGC=True)])
def test_gc_is_left_out_where_the_network_does_not_have_it(fakes: FakePlugins, uncollected: NetworkConfig) -> None:
    run(fakes, lambda cni: cni.gc(uncollected, []))

    assert fakes.story == []


def test_status_is_asked_of_every_plugin_from_1_1_on(fakes: FakePlugins) -> None:
    run(fakes, lambda cni: cni.status(network("1.0.0"), 5))
    assert fakes.story == []

    run(fakes, lambda cni: cni.status(network("1.1.0"), 5))
    assert fakes.story == ["STATUS main", "STATUS chained"]


def test_a_plugins_versions_are_those_that_it_says(fakes: FakePlugins) -> None:
    assert run(fakes, lambda cni: cni.versions("main", 5)) == {"0.4.0", "1.0.0"}

    fakes.write("main", version="echo '{}'")
    with pytest.raises(Error, match="plugin main answered no list"):
        run(fakes, lambda cni: cni.versions("main", 5))
