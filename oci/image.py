"""The parts of an OCI image configuration that decide how a container runs.

Source: OCI image-spec, config.md; Docker's image config v1.2 has the same fields.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from oci.errors import Error


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """What an image says of the containers made from it; everything is optional in the format."""

    user: str = ""  # "name", "uid", "name:group", "uid:gid" …
    env: tuple[str, ...] = ()  # "NAME=value"
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    volumes: tuple[str, ...] = ()
    stop_signal: str = ""
    exposed_ports: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    os: str = "linux"
    architecture: str = ""
    variant: str = ""
    created: str = ""  # RFC 3339, as written
    diff_ids: tuple[str, ...] = ()  # "sha256:…" of each uncompressed layer, lowest first


def from_json(text: str | bytes, subject: str = "image configuration") -> ImageConfig:
    """The configuration that the JSON document `text` says; null counts as not set, as Go programs write it.

    Raises Error naming `subject` and the field that is wrong.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Error(f"{subject} is not JSON: {str(error)[:100]}") from error
    top = _Fields(document, subject)
    config = _Fields(top.table("config"), f"{subject}: config")
    return ImageConfig(
        user=config.text("User"),
        env=config.texts("Env"),
        entrypoint=config.texts("Entrypoint"),
        cmd=config.texts("Cmd"),
        working_dir=config.text("WorkingDir"),
        volumes=tuple(config.table("Volumes")),
        stop_signal=config.text("StopSignal"),
        exposed_ports=tuple(config.table("ExposedPorts")),
        labels={key: str(value) for key, value in config.table("Labels").items()},
        os=top.text("os") or "linux",
        architecture=top.text("architecture"),
        variant=top.text("variant"),
        created=top.text("created"),
        diff_ids=_Fields(top.table("rootfs"), f"{subject}: rootfs").texts("diff_ids"),
    )


class _Fields:
    def __init__(self, values: object, subject: str) -> None:
        if not isinstance(values, dict):
            raise Error(f"{subject} is not a JSON object")
        self._values: dict[str, Any] = values
        self._subject = subject

    def text(self, key: str) -> str:
        value = self._values.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, "a text")
        return value or ""

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._values.get(key)
        if value is None:
            return ()
        if isinstance(value, str):  # as Docker accepts it
            return (value,)
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self._wrong(key, "a list of texts")
        return tuple(value)

    def table(self, key: str) -> dict[str, Any]:
        value = self._values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return value or {}

    def _wrong(self, key: str, expectation: str) -> Error:
        return Error(f"{self._subject}: {key} is {str(self._values[key])[:100]!r}; expected {expectation}")
