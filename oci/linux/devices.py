"""Device nodes of this host: one, those of a directory, or all that a privileged container gets."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from oci.container_spec import Device
from oci.errors import InvalidArgument

# Not the host's in a container: terminals, shared memory, message queues, and what the runtime makes itself.
_SKIPPED_DIRECTORIES = frozenset({"pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"})
_SKIPPED_NAMES = frozenset({"console", "ptmx"})


@dataclass(frozen=True, slots=True)
class DeviceNode:
    path: str  # within the container
    type: str  # "b" or "c"
    major: int
    minor: int
    mode: int
    uid: int
    gid: int
    permissions: str  # a subset of "rwm"


def nodes(device: Device) -> tuple[DeviceNode, ...]:
    """The node, or every node below the directory, that the CRI names; symbolic links are followed.

    Raises InvalidArgument when there is none.
    """
    path = Path(device.host_path)
    permissions = device.permissions or "rwm"
    if set(permissions) - set("rwm"):
        raise InvalidArgument(f"device {path}: permissions {permissions!r} are not of r, w and m")
    try:
        found = path.stat()
    except OSError as error:
        raise InvalidArgument(f"device {path}: {error.strerror}") from error
    container_path = device.container_path or device.host_path
    if stat.S_ISDIR(found.st_mode):
        return tuple(_below(path.resolve(), container_path, permissions))
    node = _node(found, container_path, permissions)
    if node is None:
        raise InvalidArgument(f"device {path}: neither a device nor a directory")
    return (node,)


def all_nodes(dev: Path = Path("/dev")) -> tuple[DeviceNode, ...]:
    """Every device of the host that makes sense in a container."""
    return tuple(_below(dev, str(dev), "rwm"))


def _below(directory: Path, container_path: str, permissions: str) -> Iterator[DeviceNode]:
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except (FileNotFoundError, PermissionError):  # gone meanwhile, or a mount of somebody's own (FUSE)
        return
    for entry in entries:
        inner = f"{container_path.rstrip('/')}/{entry.name}"
        try:
            found = entry.stat(follow_symlinks=False)
        except OSError:
            continue
        if stat.S_ISDIR(found.st_mode):
            if entry.name not in _SKIPPED_DIRECTORIES:
                yield from _below(Path(entry.path), inner, permissions)
        elif entry.name not in _SKIPPED_NAMES:
            node = _node(found, inner, permissions)
            if node is not None:
                yield node


def _node(found: os.stat_result, path: str, permissions: str) -> DeviceNode | None:
    kind = "b" if stat.S_ISBLK(found.st_mode) else "c" if stat.S_ISCHR(found.st_mode) else ""
    if not kind:
        return None
    major, minor = os.major(found.st_rdev), os.minor(found.st_rdev)
    if (major, minor) == (0, 0):  # an overlay whiteout
        return None
    return DeviceNode(path, kind, major, minor, stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, permissions)
