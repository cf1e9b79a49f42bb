"""Devices that vendors describe, edited into a runtime-spec."""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci.cdi import Cdi, requested
from oci.cdi_edits import DeviceNode, Edits, Hook, Mount, edited, merged
from oci.errors import FailedPrecondition, InvalidArgument


def _objects(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = ["cdiVersion", "kind", "devices", "name", "containerEdits", "env", "deviceNodes", "path", "hooks", "mounts"]
    return st.dictionaries(st.sampled_from(names) | st.text(), values)


def config(uid: int = 0) -> dict[str, Any]:
    return {
        "process": {"env": ["PATH=/bin", "A=1"], "user": {"uid": uid, "gid": uid}},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": []}],
        "linux": {"resources": {"devices": [{"allow": False, "access": "rwm"}]}},
    }


def write(
    directory: Path,
    name: str,
    devices: dict[str, Any],
    edits: Any = None,
    kind: str = "vendor.com/gpu",
    version: str = "1.1.0",
) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / name
    described = [{"name": each, "containerEdits": device} for each, device in devices.items()]
    path.write_text(
        json.dumps({"cdiVersion": version, "kind": kind, "devices": described, "containerEdits": edits or {}})
    )
    return path


def injected(directories: list[Path], *names: str, uid: int = 0) -> dict[str, Any]:
    made = config(uid)
    Cdi(directories).inject(made, names)
    return made


def test_all_edits_of_a_device_are_made(tmp_path: Path) -> None:
    write(
        tmp_path,
        "v.json",
        {
            "0": {
                "env": ["A=2", "GPU=0"],
                "deviceNodes": [
                    {"path": "/dev/gpu0", "type": "c", "major": 195, "minor": 7, "fileMode": 438, "permissions": "rw"}
                ],
                "mounts": [{"hostPath": "/lib/gpu", "containerPath": "/usr/lib/gpu", "options": ["ro", "rbind"]}],
                "hooks": [{"hookName": "createContainer", "path": "/bin/hook", "args": ["hook"], "timeout": 3}],
                "additionalGids": [44],
                "netDevices": [{"hostInterfaceName": "ib0", "name": "net1"}],
                "intelRdt": {"closID": "gold"},
            }
        },
    )

    made = injected([tmp_path], "vendor.com/gpu=0")

    assert made["process"]["env"] == ["PATH=/bin", "A=2", "GPU=0"]
    assert made["linux"]["devices"] == [{"path": "/dev/gpu0", "type": "c", "major": 195, "minor": 7, "fileMode": 438}]
    assert made["process"]["user"] == {"uid": 0, "gid": 0, "additionalGids": [44]}
    assert made["linux"]["resources"]["devices"][-1] == {
        "allow": True,
        "type": "c",
        "major": 195,
        "minor": 7,
        "access": "rw",
    }
    assert made["mounts"][-1] == {
        "destination": "/usr/lib/gpu",
        "type": "bind",
        "source": "/lib/gpu",
        "options": ["ro", "rbind"],
    }
    assert made["hooks"] == {"createContainer": [{"path": "/bin/hook", "args": ["hook"], "timeout": 3}]}
    assert made["linux"]["netDevices"] == {"ib0": {"name": "net1"}}
    assert made["linux"]["intelRdt"] == {"closID": "gold"}


def test_what_devices_of_one_description_share_comes_once(tmp_path: Path) -> None:
    hook = {"hookName": "createRuntime", "path": "/bin/shared"}
    write(tmp_path, "v.json", {"0": {"env": ["ZERO=1"]}, "1": {"env": ["ONE=1"]}}, {"hooks": [hook]})

    made = injected([tmp_path], "vendor.com/gpu=0", "vendor.com/gpu=1")

    assert made["hooks"] == {"createRuntime": [{"path": "/bin/shared"}]}
    assert made["process"]["env"][-2:] == ["ZERO=1", "ONE=1"]


def test_numbers_that_are_not_described_are_those_of_the_host_s_node(tmp_path: Path) -> None:
    write(tmp_path, "v.json", {"0": {"deviceNodes": [{"path": "/dev/mine", "hostPath": "/dev/null"}]}})

    (device,) = injected([tmp_path], "vendor.com/gpu=0", uid=1000)["linux"]["devices"]

    seen = Path("/dev/null").stat()
    assert device == {
        "path": "/dev/mine",
        "type": "c",
        "major": os.major(seen.st_rdev),
        "minor": os.minor(seen.st_rdev),
        "fileMode": 0o666,
        "uid": 1000,
        "gid": 1000,
    }


def test_a_later_directory_counts_over_an_earlier_one(tmp_path: Path) -> None:
    write(tmp_path / "a", "v.json", {"0": {"env": ["FROM=a"]}, "1": {"env": ["FROM=a1"]}})
    write(tmp_path / "b", "v.json", {"0": {"env": ["FROM=b"]}})
    directories = [tmp_path / "a", tmp_path / "b", tmp_path / "missing"]

    assert injected(directories, "vendor.com/gpu=0")["process"]["env"][-1] == "FROM=b"
    assert injected(directories, "vendor.com/gpu=1")["process"]["env"][-1] == "FROM=a1"


def test_yaml_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_text(
        "cdiVersion: 0.5.0\nkind: vendor.com/gpu\ndevices:\n- name: all\n  containerEdits:\n    env: [Y=1]\n"
    )

    assert injected([tmp_path], "vendor.com/gpu=all")["process"]["env"][-1] == "Y=1"


def test_a_changed_description_is_read_anew(tmp_path: Path) -> None:
    cdi, before, after = Cdi([tmp_path]), config(), config()
    path = write(tmp_path, "v.json", {"0": {"env": ["V=old"]}})
    cdi.inject(before, ["vendor.com/gpu=0"])
    path.unlink()
    write(tmp_path, "w.json", {"0": {"env": ["V=newer"]}})

    cdi.inject(after, ["vendor.com/gpu=0"])

    assert (before["process"]["env"][-1], after["process"]["env"][-1]) == ("V=old", "V=newer")


def test_a_device_that_nobody_describes_names_the_files_that_could_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "empty.json").write_text("{}")

    with pytest.raises(InvalidArgument) as raised:
        injected([tmp_path], "vendor.com/gpu=0")

    assert all(each in str(raised.value) for each in ("vendor.com/gpu=0", "bad.json", "bad.yaml", "`cdiVersion`"))


def test_a_device_that_two_describe_in_one_directory_is_refused_and_others_are_not(tmp_path: Path) -> None:
    write(tmp_path, "a.json", {"0": {}, "1": {"env": ["A=a"]}})
    write(tmp_path, "b.json", {"0": {}})

    with pytest.raises(InvalidArgument, match=r"more than once: .*a\.json, .*b\.json"):
        injected([tmp_path], "vendor.com/gpu=0")
    assert injected([tmp_path], "vendor.com/gpu=1")["process"]["env"][-1] == "A=a"


@pytest.mark.parametrize(
    "name", ["gpu", "vendor.com/gpu", "vendor=0", "vendor.com/gpu=", "/gpu=0", "v/=0", "1v/c=0", "v/c=a b", "v/c=a/b"]
)
def test_what_is_no_device_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match="VENDOR/CLASS=NAME"):
        injected([tmp_path], name)


@pytest.mark.parametrize(
    ("node", "seen"),
    [
        ({"path": "/no/such/device"}, "No such file"),
        ({"path": "/dev/x", "hostPath": "/etc"}, "not a device node"),
        ({"path": "/dev/null", "type": "b"}, "not a device node of type b"),
    ],
)
def test_a_node_that_the_host_has_not_is_named_with_device_and_file(
    tmp_path: Path, node: dict[str, Any], seen: str
) -> None:
    write(tmp_path, "v.json", {"0": {"deviceNodes": [node]}})

    with pytest.raises(FailedPrecondition, match=rf"vendor\.com/gpu=0 of .*v\.json: .*{seen}"):
        injected([tmp_path], "vendor.com/gpu=0")


def test_a_node_that_is_described_whole_needs_none_on_the_host(tmp_path: Path) -> None:
    write(tmp_path, "v.json", {"0": {"deviceNodes": [{"path": "/dev/no", "type": "b", "major": 7, "minor": 1}]}})

    made = injected([tmp_path], "vendor.com/gpu=0")

    assert made["linux"]["devices"] == [{"path": "/dev/no", "type": "b", "major": 7, "minor": 1}]


@pytest.mark.parametrize(
    ("edits", "why"),
    [
        ({"deviceNodes": [{}]}, "`path`"),
        ({"deviceNodes": [{"path": "dev/x"}]}, "absolute"),
        ({"deviceNodes": [{"path": "/dev/x", "permissions": "rwx"}]}, "permissions"),
        ({"deviceNodes": [{"path": "/dev/x", "type": "d"}]}, "type 'd'"),
        ({"deviceNodes": [{"path": "/dev/x", "uid": -1}]}, "uid"),
        ({"deviceNodes": [{"path": "/dev/x", "major": 1 << 70}]}, "major"),
        ({"deviceNodes": "all"}, "deviceNodes"),
        ({"env": ["NOVALUE"]}, "NAME=VALUE"),
        ({"env": [{"NAME": "VALUE"}]}, "env"),
        ({"hooks": [{"hookName": "never", "path": "/x"}]}, "hookName"),
        ({"hooks": [{"hookName": "poststop", "path": "x"}]}, "absolute"),
        ({"hooks": [{"hookName": "poststop", "path": "/x", "timeout": -1}]}, "timeout"),
        ({"mounts": [{"hostPath": "/x"}]}, "`containerPath`"),
        ({"mounts": [{"hostPath": "/x", "containerPath": "/a/../../b"}]}, "containerPath"),
        ({"mounts": [{"hostPath": "/x", "containerPath": "//"}]}, "containerPath"),
        ({"intelRdt": {"closID": "../x"}}, "closID"),
        ({"additionalGids": ["root"]}, "additionalGids"),
        ({"netDevices": [{"hostInterfaceName": "e", "name": "n"}] * 2}, "two have the same"),
        ({"seccomp": {}}, "seccomp"),
    ],
)
def test_a_description_that_makes_no_sense_is_not_used(tmp_path: Path, edits: dict[str, Any], why: str) -> None:
    write(tmp_path, "v.json", {"0": edits})
    write(tmp_path, "good.json", {"0": {}}, kind="other.com/gpu")

    with pytest.raises(InvalidArgument, match=r"vendor\.com/gpu=0: .*v\.json cannot be used: .*" + re.escape(why)):
        injected([tmp_path], "vendor.com/gpu=0")
    injected([tmp_path], "other.com/gpu=0")  # what is wrong with one is not the other's


@pytest.mark.parametrize(
    "changed",
    [
        {"cdiVersion": "2.0.0"},
        {"cdiVersion": "one"},
        {"cdiVersion": 1},
        {"cdiVersion": "0.6.0"},  # additionalGids came later
        {"kind": "gpu"},
        {"kind": "vendor.com/gpu/x"},
        {"kind": "vendor.com/-gpu"},
        {"devices": []},
        {"devices": [{"name": "0"}, {"name": "0"}]},
        {"devices": [{"name": "a b"}]},
        {"devices": {"0": {}}},
        {"more": True},
    ],
)
def test_a_description_of_another_version_or_shape_is_not_used(tmp_path: Path, changed: dict[str, Any]) -> None:
    path = write(tmp_path, "v.json", {"0": {"additionalGids": [5]}})
    injected([tmp_path], "vendor.com/gpu=0")

    path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    assert list(Cdi([tmp_path]).unusable()) == [path]


def test_hostile_files_are_told_and_hurt_nobody(tmp_path: Path) -> None:
    write(tmp_path, "good.json", {"0": {"env": ["GOOD=1"]}})
    (tmp_path / "deep.json").write_text("[" * 200_000)
    (tmp_path / "deep.yaml").write_text("[" * 5_000)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00" * 10)
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    (tmp_path / "loop.yaml").write_text("a: &a [*a]")
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "directory.json").mkdir()
    with (tmp_path / "huge.json").open("w") as huge:
        huge.truncate(1 << 30)
    cdi = Cdi([tmp_path, tmp_path / "good.json"])
    made = config()

    cdi.inject(made, ["vendor.com/gpu=0"])

    assert made["process"]["env"][-1] == "GOOD=1"
    hostile = (
        "bomb.yaml bytes.json deep.json deep.yaml directory.json good.json huge.json link.json loop.yaml pipe.json"
    )
    assert " ".join(sorted(file.name for file, reason in cdi.unusable().items() if reason)) == hostile


def test_null_is_what_is_not_set(tmp_path: Path) -> None:
    write(tmp_path, "v.json", {"0": {"env": None, "mounts": None, "intelRdt": None}})

    assert injected([tmp_path], "vendor.com/gpu=0") == config()


def test_permissions_of_none_are_no_access(tmp_path: Path) -> None:
    write(tmp_path, "v.json", {"0": {"deviceNodes": [{"path": "/dev/null", "permissions": "none"}]}})

    assert injected([tmp_path], "vendor.com/gpu=0")["linux"]["resources"]["devices"][-1]["access"] == ""


def test_a_mount_replaces_that_on_its_path_and_comes_after_its_parents(tmp_path: Path) -> None:
    mounts = [
        {"hostPath": "/b", "containerPath": "/proc/driver/x", "options": ["bind", "ro"]},
        {"hostPath": "/a", "containerPath": "//proc/", "options": ["rbind"]},
        {"hostPath": "tmpfs", "containerPath": "/t", "type": "tmpfs"},
    ]
    write(tmp_path, "v.json", {"0": {"mounts": mounts}})

    made = injected([tmp_path], "vendor.com/gpu=0")["mounts"]

    assert [(each["destination"], each["source"], each["type"]) for each in made] == [
        ("/proc", "/a", "bind"),
        ("/t", "tmpfs", "tmpfs"),
        ("/proc/driver/x", "/b", "bind"),
    ]


def test_bind_mounts_of_a_user_namespace_are_id_mapped_where_the_runtime_can(tmp_path: Path) -> None:
    spec = config()
    spec["linux"]["namespaces"] = [{"type": "user"}]
    mounts = (Mount("/a", "/a", ("rbind", "ro")), Mount("/b", "/b", ("bind",)), Mount("none", "/c", (), "tmpfs"))

    mapped = edited(spec, Edits(mounts=mounts), idmap_mounts=True)["mounts"][1:]

    assert [each["options"] for each in mapped] == [["rbind", "ro", "ridmap"], ["bind", "idmap"], []]
    plain = edited(spec, Edits(mounts=mounts))["mounts"][1:]
    assert [each["options"] for each in plain] == [["rbind", "ro"], ["bind"], []]
    write(tmp_path, "v.json", {"0": {"mounts": [{"hostPath": "/a", "containerPath": "/a"}]}})
    Cdi([tmp_path]).inject(spec, ["vendor.com/gpu=0"], idmap_mounts=True)
    assert spec["mounts"][-1]["options"] == ["rbind", "rprivate", "ridmap"]


def test_editing_leaves_the_given_spec_as_it_is(tmp_path: Path) -> None:
    rest = Edits(env=("B=1",), additional_gids=(7, 0), hooks=(Hook("poststop", "/h"),), mounts=(Mount("/a", "/a"),))
    edits = merged([rest, Edits(device_nodes=(DeviceNode("/dev/x", type="c", major=1, minor=3),))])
    spec = config()

    made = edited(spec, edits)

    assert spec == config()
    assert made["process"]["user"]["additionalGids"] == [7]
    assert edited(made, Edits()) == made


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c) | _objects(c)))
def test_no_document_does_more_than_be_refused(document: Any) -> None:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "v.json").write_text(json.dumps(document))
        with pytest.raises(InvalidArgument, match="no description"):
            Cdi([Path(directory)]).resolve(["v/c=0"])


def test_devices_come_from_the_field_and_from_annotations_each_once() -> None:
    annotations = {"cdi.k8s.io/plugin_a": "v/c=1, v/c=2", "other": "v/c=3"}

    assert requested(("v/c=2", "v/c=0"), annotations) == ("v/c=2", "v/c=0", "v/c=1")
