"""Images mounted as volumes of a container: the image's layers, read-only, or one directory or file of them.

<run>/<container id>/images/<n>     where the n-th one is mounted on the host, until the container is released

Synchronous; called in a pool.
"""

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from oci.container_spec import ContainerId
from oci.errors import InvalidArgument
from oci.linux import mount, syscalls, tree


@dataclass(frozen=True, slots=True)
class ImageMount:
    """What one mount of a container shows of an image."""

    container_path: str
    image_id: str
    layers: tuple[Path, ...]  # lowest first
    sub_path: str  # "" for all of it


class ImageVolumes:
    def __init__(self, run: Path) -> None:
        self._run = run

    def mount(self, id: ContainerId, wanted: tuple[ImageMount, ...]) -> dict[str, Path]:
        """Mount them; container path → what to bind there. On an error `unmount` undoes what was done.

        Raises InvalidArgument, with the CRI's word for it, where a sub path is not in the image.
        """
        return {each.container_path: self._mount(id, number, each) for number, each in enumerate(wanted)}

    def unmount(self, id: ContainerId) -> None:
        """Take them away; that there are none is success."""
        directory = self._run / id / "images"
        mount.unmount_below(directory)
        tree.remove(directory)

    def _mount(self, id: ContainerId, number: int, wanted: ImageMount) -> Path:
        target = self._run / id / "images" / str(number)
        target.mkdir(mode=0o755, parents=True, exist_ok=True)
        if not mount.is_mountpoint(target):
            _mount_layers(target, wanted.layers)
        return _inside(target, wanted) if wanted.sub_path else target


def _mount_layers(target: Path, layers: tuple[Path, ...]) -> None:
    """An overlay needs two layers at least when nothing is to be written: fewer are mounted as they are."""
    if len(layers) < 2:
        mount.bind(layers[0] if layers else target, target, readonly=True)
    else:
        mount.overlay(target, layers, readonly=True)


def _inside(root: Path, wanted: ImageMount) -> Path:
    """The sub path, with links followed as in a container whose "/" is `root`."""
    what = f"ImageVolumeMountFailed: image_sub_path {wanted.sub_path!r} of {wanted.container_path!r}"
    parts = PurePosixPath(wanted.sub_path)
    if parts.is_absolute() or ".." in parts.parts:
        raise InvalidArgument(f"{what}: not a relative path within the image")
    with syscalls.opened(root, os.O_PATH | os.O_DIRECTORY) as root_fd:
        try:
            with syscalls.opened_in_root(root_fd, wanted.sub_path, os.O_PATH) as fd:
                return Path(f"/proc/self/fd/{fd}").readlink()
        except OSError as error:
            raise InvalidArgument(f"{what}: {error.strerror}") from error
