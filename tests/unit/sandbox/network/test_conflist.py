import json
from pathlib import Path
from typing import Any

import pytest

from oci.errors import InvalidArgument
from sandbox.network.conflist import from_json, parse, read_directory, version_key

DEPLOYED = Path(__file__).parents[4] / "deploy" / "cni"


def document(**keys: Any) -> dict[str, Any]:
    return {"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge"}], **keys}


def test_networks_are_in_the_order_of_their_file_names_whatever_the_suffix(tmp_path: Path) -> None:
    (tmp_path / "20-b.conflist").write_text(json.dumps(document(name="second")))
    (tmp_path / "10-a.conf").write_text(
        json.dumps({"cniVersion": "0.3.1", "name": "first", "type": "ptp", "mtu": 9000})
    )
    (tmp_path / "30-c.json").write_text(json.dumps(document(name="third")))
    (tmp_path / "05-a.conflist.bak").write_text(json.dumps(document(name="backup")))
    (tmp_path / "06-folder.conf").mkdir()

    directory = read_directory(tmp_path)

    assert [network.name for network in directory.networks] == ["first", "second", "third"]
    assert directory.networks[0].plugins == ({"type": "ptp", "mtu": 9000},)
    assert directory.problems == ()


def test_a_broken_file_is_a_problem_and_does_not_hide_the_others(tmp_path: Path) -> None:
    (tmp_path / "10-broken.conflist").write_text('{"cniVersion": ')
    (tmp_path / "20-binary.conflist").write_bytes(b"\xff\xfe")
    (tmp_path / "30-list.conflist").write_text("[]")
    (tmp_path / "40-dangling.conflist").symlink_to("nowhere")
    (tmp_path / "50-good.conflist").write_text(json.dumps(document()))

    directory = read_directory(tmp_path)

    assert [network.name for network in directory.networks] == ["pods"]
    assert [problem.split(" ")[0] for problem in directory.problems] == [
        str(tmp_path / name)
        for name in ("10-broken.conflist", "20-binary.conflist", "30-list.conflist", "40-dangling.conflist")
    ]


def test_of_two_files_with_the_same_network_the_first_counts_and_the_second_is_named(tmp_path: Path) -> None:
    (tmp_path / "10.conflist").write_text(json.dumps(document(plugins=[{"type": "bridge"}])))
    (tmp_path / "20.conflist").write_text(json.dumps(document(plugins=[{"type": "ptp"}])))

    directory = read_directory(tmp_path)

    assert [network.plugins[0]["type"] for network in directory.networks] == ["bridge"]
    assert directory.problems == (f'{tmp_path}/20.conflist: an earlier file already defines the network "pods"',)


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert read_directory(tmp_path / "net.d").problems == (f"{tmp_path}/net.d does not exist",)


def test_plugins_in_the_folder_of_the_network_come_after_the_inlined_ones(tmp_path: Path) -> None:
    (tmp_path / "10.conflist").write_text(json.dumps(document()))
    (tmp_path / "pods").mkdir()
    (tmp_path / "pods" / "20-tuning.conf").write_text('{"type": "tuning"}')
    (tmp_path / "pods" / "10-portmap.conf").write_text('{"type": "portmap"}')
    (tmp_path / "pods" / "README").write_text("not a plugin")

    (network,) = read_directory(tmp_path).networks

    assert [plugin["type"] for plugin in network.plugins] == ["bridge", "portmap", "tuning"]


def test_only_inlined_plugins_are_loaded_when_the_network_says_so(tmp_path: Path) -> None:
    (tmp_path / "10.conflist").write_text(json.dumps(document(loadOnlyInlinedPlugins=True)))
    (tmp_path / "pods").mkdir()
    (tmp_path / "pods" / "10-portmap.conf").write_text('{"type": "portmap"}')

    (network,) = read_directory(tmp_path).networks

    assert [plugin["type"] for plugin in network.plugins] == ["bridge"]


@pytest.mark.parametrize(
    ("keys", "versions"),
    [
        ({"cniVersion": "0.3.0"}, ("0.3.0",)),
        ({"cniVersion": "1.0.0", "cniVersions": ["0.4.0", "1.1.0"]}, ("1.1.0", "1.0.0", "0.4.0")),
        ({"cniVersion": "1.0.0", "cniVersions": ["1.0.0", "7.0.0"]}, ("1.0.0",)),
        ({"cniVersion": None, "cniVersions": ["0.4.0"]}, ("0.4.0",)),
    ],
)
def test_the_highest_version_that_both_speak_is_in_use(keys: dict[str, Any], versions: tuple[str, ...]) -> None:
    network = parse(document(**keys))

    assert network.versions == versions
    assert network.version == versions[0]


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"name": None}, '"name" is None'),
        ({"name": "../etc"}, '"name" is '),
        ({"name": "-dash"}, '"name" is '),
        ({"cniVersion": None}, "say nothing; Crito speaks CNI 0.3.0 to 1.1.0"),
        ({"cniVersion": "0.2.0"}, "say 0.2.0;"),
        ({"cniVersion": ["1.0.0"]}, "say "),
        ({"plugins": []}, 'neither a "type" nor a "plugins" list'),
        ({"plugins": {}}, '"plugins" is not a list'),
        ({"plugins": ["bridge"]}, "plugin 1 is not an object"),
        ({"plugins": [{"type": "bridge"}, {}]}, 'plugin 2: "type" is None'),
        ({"plugins": [{"type": "../bridge"}]}, "plugin 1: \"type\" is '../bridge'"),
        ({"plugins": [{"type": "bridge", "capabilities": ["dns"]}]}, '"capabilities" is not an object'),
        ({"disableCheck": "perhaps"}, "\"disableCheck\" is 'perhaps'"),
        ({"plugins": [], "loadOnlyInlinedPlugins": True}, '"loadOnlyInlinedPlugins" is true and "plugins" is empty'),
    ],
)
def test_a_wrong_key_is_named_with_its_value(keys: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        parse(document(**keys))

    assert text in str(error.value)


def test_a_network_survives_being_written_and_read_with_the_version_in_use_only() -> None:
    network = parse(document(cniVersions=["0.4.0", "1.1.0"], disableCheck="true", disableGC=True))

    again = from_json(network.to_json())

    assert again.version == "1.1.0"
    assert again.versions == ("1.1.0",)
    assert (again.name, again.plugins, again.disable_check, again.disable_gc) == ("pods", network.plugins, True, True)


def test_versions_are_compared_as_numbers() -> None:
    assert version_key("0.10.0") > version_key("0.4.0") > version_key("dev")


@pytest.mark.parametrize("conf_dir", [DEPLOYED, DEPLOYED / "dual-stack"])
def test_the_configurations_that_we_ship_are_valid(conf_dir: Path) -> None:
    directory = read_directory(conf_dir)

    assert directory.problems == ()
    assert [network.name for network in directory.networks] == ["crito"]
