"""Devices that vendors describe, edited into a runtime-spec."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from oci.cdi import Cdi, requested
from oci.errors import FailedPrecondition, InvalidArgument


def config(uid: int = 0) -> dict[str, Any]:
    return {
        "process": {"env": ["PATH=/bin", "A=1"], "user": {"uid": uid, "gid": uid}},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": []}],
        "linux": {"resources": {"devices": [{"allow": False, "access": "rwm"}]}},
    }


def write(directory: Path, name: str, devices: dict[str, Any], edits: Any = None, kind: str = "vendor.com/gpu") -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / name
    described = [{"name": each, "containerEdits": device} for each, device in devices.items()]
    path.write_text(
        json.dumps({"cdiVersion": "0.6.0", "kind": kind, "devices": described, "containerEdits": edits or {}})
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
    assert made["process"]["user"]["additionalGids"] == [44]
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

    with pytest.raises(FailedPrecondition) as raised:
        injected([tmp_path], "vendor.com/gpu=0")

    assert all(each in str(raised.value) for each in ("vendor.com/gpu=0", "bad.json", "bad.yaml", "has no kind"))


def test_a_device_that_two_describe_in_one_directory_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.json", {"0": {}})
    write(tmp_path, "b.json", {"0": {}})

    with pytest.raises(FailedPrecondition, match=r"more than once: .*a\.json, .*b\.json"):
        injected([tmp_path], "vendor.com/gpu=0")


@pytest.mark.parametrize("name", ["gpu", "vendor.com/gpu", "vendor=0", "vendor.com/gpu="])
def test_what_is_no_device_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match="VENDOR/CLASS=NAME"):
        injected([tmp_path], name)


@pytest.mark.parametrize(
    "edits",
    [
        {"deviceNodes": [{"path": "/no/such/device"}]},
        {"deviceNodes": [{"path": "/dev/x", "hostPath": "/etc"}]},
        {"deviceNodes": [{}]},
        {"deviceNodes": "all"},
        {"hooks": [{"hookName": "never", "path": "/x"}]},
        {"mounts": [{"hostPath": "/x"}]},
    ],
)
def test_edits_that_make_no_sense_are_refused_by_the_device_s_name(tmp_path: Path, edits: dict[str, Any]) -> None:
    write(tmp_path, "v.json", {"0": edits})

    with pytest.raises(FailedPrecondition, match=r"vendor\.com/gpu=0"):
        injected([tmp_path], "vendor.com/gpu=0")


def test_devices_come_from_the_field_and_from_annotations_each_once() -> None:
    annotations = {"cdi.k8s.io/plugin_a": "v/c=1, v/c=2", "other": "v/c=3"}

    assert requested(("v/c=2", "v/c=0"), annotations) == ("v/c=2", "v/c=0", "v/c=1")
