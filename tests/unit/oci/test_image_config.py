"""An image's configuration is read from its JSON."""

import json
from typing import Any

import pytest

from oci.errors import Error
from oci.image import ImageConfig, from_json


def test_every_field_is_read() -> None:
    document = {
        "architecture": "arm64",
        "os": "linux",
        "variant": "v8",
        "created": "2025-01-01T00:00:00Z",
        "config": {
            "User": "nobody:users",
            "Env": ["A=1", "B=2"],
            "Entrypoint": ["/e"],
            "Cmd": ["c"],
            "WorkingDir": "/w",
            "Volumes": {"/v": {}},
            "StopSignal": "SIGUSR1",
            "ExposedPorts": {"80/tcp": {}},
            "Labels": {"k": "v"},
        },
        "rootfs": {"type": "layers", "diff_ids": ["sha256:1"]},
    }

    assert from_json(json.dumps(document)) == ImageConfig(
        user="nobody:users",
        env=("A=1", "B=2"),
        entrypoint=("/e",),
        cmd=("c",),
        working_dir="/w",
        volumes=("/v",),
        stop_signal="SIGUSR1",
        exposed_ports=("80/tcp",),
        labels={"k": "v"},
        os="linux",
        architecture="arm64",
        variant="v8",
        created="2025-01-01T00:00:00Z",
        diff_ids=("sha256:1",),
    )


def test_what_is_missing_or_null_is_not_set() -> None:
    assert from_json("{}") == ImageConfig()
    assert from_json('{"config": {"Env": null, "Labels": null, "User": null}, "rootfs": null}') == ImageConfig()


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ("no json", "x is not JSON"),
        ([], "x is not a JSON object"),
        ({"config": []}, "x: config"),
        ({"config": {"Env": "A=1", "Cmd": [1]}}, "x: config: Cmd"),
        ({"config": {"User": 5}}, "x: config: User is '5'; expected a text"),
        ({"rootfs": {"diff_ids": {}}}, "x: rootfs: diff_ids"),
    ],
)
def test_a_wrong_field_is_named(document: Any, complaint: str) -> None:
    with pytest.raises(Error, match=complaint):
        from_json(document if isinstance(document, str) else json.dumps(document), "x")
