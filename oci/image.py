"""The parts of an OCI image configuration that decide how a container runs.

Source: OCI image-spec, config.md; Docker's image config v1.2 has the same fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


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
