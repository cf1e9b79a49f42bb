import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from sandbox.network.cni import Cni
from sandbox.network.networks import Networks, NetworkStatus
from sandbox.network.plugin import Plugins
from tests.fakes.cni_plugins import FakePlugins, write_conflist


@pytest.fixture
def conf_dir(tmp_path: Path) -> Path:
    return tmp_path / "net.d"


@pytest.fixture
def fakes(tmp_path: Path) -> FakePlugins:
    fakes = FakePlugins(tmp_path / "bin")
    fakes.write("main")
    return fakes


def follow(
    conf_dir: Path, fakes: FakePlugins, story: Callable[[Networks], Awaitable[None]], **settings: Any
) -> Networks:
    async def run() -> Networks:
        keys: dict[str, Any] = {"default_network": "", "max_conf_num": 1, "poll_s": 5.0, "grace_s": 0.0, **settings}
        networks = Networks(conf_dir, Cni(Plugins((fakes.directory,), 5)), **keys)
        await networks.start()
        try:
            await story(networks)
        finally:
            await networks.close()
        return networks

    return asyncio.run(run())


async def nothing(networks: Networks) -> None:
    """Only start and stop."""


async def until(networks: Networks, ready: bool, within_s: float = 2.0) -> NetworkStatus:
    deadline = time.monotonic() + within_s
    while networks.status.ready is not ready:
        assert time.monotonic() < deadline, networks.status
        await asyncio.sleep(0.01)
    return networks.status


def names(networks: Networks) -> list[str]:
    return [network.name for network in networks.selected]


def test_the_first_valid_network_is_the_pods(conf_dir: Path, fakes: FakePlugins) -> None:
    conf_dir.mkdir()
    (conf_dir / "05-broken.conflist").write_text("{")
    write_conflist(conf_dir, {"type": "main"}, name="b")
    write_conflist(conf_dir, {"type": "main"}, name="a")

    networks = follow(conf_dir, fakes, nothing)

    assert names(networks) == ["a"]
    assert networks.status == NetworkStatus(True)


def test_the_default_network_is_the_pods_when_it_is_named(conf_dir: Path, fakes: FakePlugins) -> None:
    for name in "abc":
        write_conflist(conf_dir, {"type": "main"}, name=name)

    assert names(follow(conf_dir, fakes, nothing, default_network="b")) == ["b"]
    assert names(follow(conf_dir, fakes, nothing, default_network="c", max_conf_num=2)) == ["c", "a"]
    assert names(follow(conf_dir, fakes, nothing, max_conf_num=0)) == ["a", "b", "c"]


def test_a_default_network_that_is_missing_is_told_with_what_is_there(conf_dir: Path, fakes: FakePlugins) -> None:
    write_conflist(conf_dir, {"type": "main"}, name="a")

    networks = follow(conf_dir, fakes, nothing, default_network="b")

    assert networks.selected == ()
    assert networks.status == NetworkStatus(
        False, "NetworkPluginNotReady", f'no network "b" (default_network) in {conf_dir}, only a'
    )


def test_an_empty_directory_is_named_and_so_is_what_is_wrong_in_it(conf_dir: Path, fakes: FakePlugins) -> None:
    assert f"{conf_dir} does not exist" in follow(conf_dir, fakes, nothing).status.message

    conf_dir.mkdir()
    assert f"no CNI network configuration (.conflist, .conf, .json) in {conf_dir}" in (
        follow(conf_dir, fakes, nothing).status.message
    )

    (conf_dir / "10.conflist").write_text("{")
    assert f"{conf_dir}/10.conflist is not JSON" in follow(conf_dir, fakes, nothing).status.message


def test_a_directory_that_is_made_later_is_noticed_and_so_is_its_end(conf_dir: Path, fakes: FakePlugins) -> None:
    async def story(networks: Networks) -> None:
        assert not networks.status.ready
        path = write_conflist(conf_dir, {"type": "main"})
        await until(networks, ready=True)
        path.unlink()
        await until(networks, ready=False)

    follow(conf_dir, fakes, story)


def test_a_change_is_noticed_by_polling_where_nothing_tells_of_it(
    conf_dir: Path, fakes: FakePlugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox.network.watch.DirectoryWatch.start", lambda self: None)

    async def story(networks: Networks) -> None:
        write_conflist(conf_dir, {"type": "main"})
        await until(networks, ready=True)

    follow(conf_dir, fakes, story, poll_s=0.1)


def test_a_plugin_that_is_missing_is_named_and_its_arrival_noticed(conf_dir: Path, fakes: FakePlugins) -> None:
    write_conflist(conf_dir, {"type": "main", "ipam": {"type": "addresses"}})

    async def story(networks: Networks) -> None:
        assert f"CNI plugin addresses: no such executable in {fakes.directory}" in networks.status.message
        assert names(networks) == ["pods"]
        fakes.write("addresses")
        await until(networks, ready=True)

    follow(conf_dir, fakes, story)


def test_a_plugin_that_says_no_at_the_start_is_believed_at_once(conf_dir: Path, fakes: FakePlugins) -> None:
    fakes.write("main", status='echo \'{"code": 50, "msg": "agent is starting"}\'; exit 1')
    write_conflist(conf_dir, {"type": "main"}, cniVersion="1.1.0")

    async def story(networks: Networks) -> None:
        assert "agent is starting" in networks.status.message
        fakes.write("main")
        await until(networks, ready=True)

    follow(conf_dir, fakes, story, poll_s=0.1, grace_s=60)


def test_a_ready_network_becomes_unready_only_after_the_grace(conf_dir: Path, fakes: FakePlugins) -> None:
    write_conflist(conf_dir, {"type": "main"}, cniVersion="1.1.0")

    async def story(networks: Networks) -> None:
        fakes.write("main", status='echo \'{"code": 50, "msg": "agent is gone"}\'; exit 1')
        started = time.monotonic()
        await asyncio.sleep(0.3)
        assert networks.status.ready
        assert "agent is gone" in (await until(networks, ready=False)).message
        assert time.monotonic() - started >= 0.5
        fakes.write("main")
        await until(networks, ready=True)

    follow(conf_dir, fakes, story, poll_s=0.1, grace_s=0.6)


def test_a_network_of_several_versions_is_spoken_to_in_the_highest_that_its_plugins_know(
    conf_dir: Path, fakes: FakePlugins
) -> None:
    versions = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]
    fakes.write("addresses", version='echo \'{"supportedVersions": ["0.3.1", "0.4.0"]}\'')
    write_conflist(conf_dir, {"type": "main", "ipam": {"type": "addresses"}}, cniVersions=versions)

    networks = follow(conf_dir, fakes, nothing)

    assert [network.version for network in networks.selected] == ["0.4.0"]
    assert json.loads(networks.selected[0].to_json())["cniVersion"] == "0.4.0"


def test_a_plugins_versions_are_asked_once_and_again_when_it_was_replaced(conf_dir: Path, fakes: FakePlugins) -> None:
    write_conflist(conf_dir, {"type": "main"}, cniVersions=["0.4.0", "1.0.0", "1.1.0"])

    async def story(networks: Networks) -> None:
        await networks.refresh()
        assert fakes.story == ["VERSION main"]
        assert networks.selected[0].version == "1.0.0"
        fakes.write("main", version='echo \'{"supportedVersions": ["1.1.0"]}\'')
        await networks.refresh()
        assert networks.selected[0].version == "1.1.0"

    follow(conf_dir, fakes, story)


def test_a_plugin_that_does_not_tell_its_versions_does_not_decide(conf_dir: Path, fakes: FakePlugins) -> None:
    fakes.write("main", version="exit 1")
    write_conflist(conf_dir, {"type": "main"}, cniVersions=["0.4.0", "1.1.0"])

    networks = follow(conf_dir, fakes, nothing)

    assert [network.version for network in networks.selected] == ["1.1.0"]


def test_what_reading_the_directory_runs_into_does_not_end_the_following(
    conf_dir: Path, fakes: FakePlugins, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(networks: Networks) -> None:
        with monkeypatch.context() as broken:
            broken.setattr("sandbox.network.networks.read_directory", lambda conf_dir: 1 / 0)
            await asyncio.sleep(0.3)
        write_conflist(conf_dir, {"type": "main"})
        await until(networks, ready=True)

    follow(conf_dir, fakes, story, poll_s=0.1)

    assert "division by zero" in caplog.text
