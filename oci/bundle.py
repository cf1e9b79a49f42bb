"""The bundles of containers: a directory each under the run directory, with the runtime-spec in it.

<directory>/<container id>/config.json    the runtime-spec, 0600
                           …              what the monitor and the rootfs put beside it
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oci.container_spec import ContainerId
from oci.errors import NotFound
from oci.linux import tree

CONFIG = "config.json"


class Bundles:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, id: ContainerId) -> Path:
        """The bundle's directory, existing or not."""
        return self._directory / id

    def make(self, id: ContainerId) -> Path:
        """The bundle's directory, which exists from now on; only root may look into it.

        It can be passed through: the rootfs in it is entered by the root of the container's user namespace.
        """
        path = self.path(id)
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o711)
        return path

    def write(self, id: ContainerId, config: Mapping[str, Any]) -> Path:
        """Write the runtime-spec, all of it or nothing; the bundle's directory comes back."""
        path = self.make(id)
        write_config(path, config)
        return path

    def read(self, id: ContainerId) -> dict[str, Any]:
        """The runtime-spec as it was written. Raises NotFound."""
        try:
            text = (self.path(id) / CONFIG).read_text(errors="surrogateescape")
        except FileNotFoundError as error:
            raise NotFound(f"container {id}: it has no bundle at {self.path(id)}") from error
        config: dict[str, Any] = json.loads(text)
        return config

    def remove(self, id: ContainerId) -> None:
        """Remove the bundle with all in it; that it is gone is success. Its rootfs is no longer mounted."""
        tree.remove(self.path(id))

    def ids(self) -> list[ContainerId]:
        """The containers that have a bundle."""
        try:
            return sorted(ContainerId(entry.name) for entry in self._directory.iterdir() if entry.is_dir())
        except FileNotFoundError:
            return []


def write_config(bundle: Path, config: Mapping[str, Any]) -> None:
    """Write the runtime-spec into a directory that exists, all of it or nothing."""
    new = bundle / f"{CONFIG}.new"
    # Values of the environment may be bytes of any kind; surrogateescape turns them back into what they were.
    text = json.dumps(config, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogateescape")
    new.touch(mode=0o600)
    new.write_bytes(text)
    new.replace(bundle / CONFIG)
