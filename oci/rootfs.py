"""Root filesystems of containers: an overlay of the image's layers and a writable layer of the container's own.

<root>/<container id>/upper, work     the writable layer, on disk until the container is removed
                      volumes/<n>     one per image VOLUME that the CRI mounts nothing on
<run>/<container id>/rootfs           where it is mounted (in the bundle), gone after a reboot
                     lower/<n>        layers shifted for a user namespace, only while mounting
"""

import os
import stat
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from oci.container_spec import ContainerId, IdMapping, UserNamespace
from oci.errors import FailedPrecondition, InvalidArgument
from oci.linux import lsm, mount, syscalls, tree
from oci.linux.tree import Usage
from oci.projects import Projects

_OPTIONS = ("index=off",)  # with the index, a layer in use by one container can be refused to another


@dataclass(frozen=True, slots=True)
class Shift:
    """A pod's own user namespace, as a root filesystem sees it."""

    mappings: UserNamespace
    ns_path: str  # a pinned nsfs file


class Rootfs:
    """Synchronous: call it in a pool."""

    def __init__(self, root: Path, run: Path, options: Sequence[str] = _OPTIONS) -> None:
        self._root = root
        self._run = run
        self._options = tuple(options)
        self._projects = Projects(root)

    def prepare(self) -> None:
        """Keep the mounts below the run directory in this mount namespace. Once, before the first mount.

        The root of a user namespace must be able to pass through the directories, not to read them; so must it
        through their parents.
        """
        for directory in (self._root, self._run):
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(0o711)
        mount.make_private_mountpoint(self._run)
        self._projects.prepare()

    def release(self) -> None:
        """Undo `prepare` and every mount that is still there."""
        mount.unmount_below(self._run)

    def path(self, id: ContainerId) -> Path:
        """Where the container's root filesystem is mounted, or will be."""
        return self._run / id / "rootfs"

    def writable_layer(self, id: ContainerId) -> Path:
        return self._root / id / "upper"

    def mount(
        self, id: ContainerId, layers: Sequence[Path], *, shift: Shift | None = None, selinux_label: str = ""
    ) -> Path:
        """Mount the container's root filesystem over `layers` (lowest first), if it is not mounted yet.

        On an error `unmount` and `remove` undo what was done.
        """
        if not layers:
            raise FailedPrecondition(f"container {id}: its image has no layers")
        target = self.path(id)
        if mount.is_mountpoint(target):
            return target
        upper, work = self.writable_layer(id), self._root / id / "work"
        is_new = not upper.exists()
        if is_new:
            _make_like(upper, layers[-1], shift)
        work.mkdir(mode=0o700, exist_ok=True)
        if is_new:
            self._projects.give(id, (upper, work))
        target.mkdir(parents=True, exist_ok=True)
        for directory in (self._root / id, self._run / id):
            directory.chmod(0o711)
        options = [*self._options, *([f'context="{selinux_label}"'] if selinux_label else [])]
        if shift is None:
            mount.overlay(target, layers, upper, work, options)
        else:
            self._mount_shifted(id, layers, options, shift)
        return target

    def unmount(self, id: ContainerId) -> None:
        """Take the root filesystem away; that it is not mounted is success. The writable layer stays."""
        mount.unmount_below(self._run / id / "lower")
        mount.unmount(self.path(id))
        tree.remove(self._run / id / "lower")

    def remove(self, id: ContainerId) -> None:
        """Remove the writable layer and the volumes; the root filesystem is unmounted first if need be."""
        self.unmount(id)
        tree.remove(self._root / id)
        self._projects.release(id)

    @property
    def is_accounted(self) -> bool:
        """Whether the file system keeps account of what containers write."""
        return self._projects.is_accounted

    def accounted_usage(self, id: ContainerId) -> Usage | None:
        """What the container has written, by the file system's own account, which costs nothing; None where there is
        none. The overlay's work directory counts too: three directories more."""
        return self._projects.usage(id)

    def usage(self, id: ContainerId) -> Usage:
        """What the container has written. Where there is no account it walks the layer: cache it."""
        return self.accounted_usage(id) or tree.usage(self.writable_layer(id))

    def make_working_directory(self, id: ContainerId, path: str, *, shift: Shift | None = None) -> None:
        """Make the process's working directory where the image lacks it; InvalidArgument when a file is there."""
        uid, gid = _owner(0, 0, shift)
        try:
            tree.make_directory(self.path(id), path, uid=uid, gid=gid)
        except (NotADirectoryError, FileExistsError) as error:
            raise InvalidArgument(f"working_dir {path!r}: {error.strerror}") from error

    def make_volumes(
        self,
        id: ContainerId,
        volumes: Collection[str],
        mounted: Collection[str],
        *,
        shift: Shift | None = None,
        selinux_label: str = "",
    ) -> dict[str, Path]:
        """A directory for each VOLUME of the image that is not in `mounted`, filled with what the image has there.

        The result maps paths in the container to directories on the host. Source: OCI image-spec, config.md, "Volumes".
        """
        taken = {str(PurePosixPath("/", path)) for path in mounted}
        wanted = sorted({str(PurePosixPath("/", path)) for path in volumes} - taken - {"/"})
        made: dict[str, Path] = {}
        for number, path in enumerate(wanted):
            directory = self._root / id / "volumes" / str(number)
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._fill(id, path, directory, shift)
            if selinux_label:
                lsm.relabel(directory, selinux_label)
            made[path] = directory
        return made

    def volumes_in(self, id: ContainerId, config: Mapping[str, Any]) -> dict[str, str]:
        """Which of `make_volumes`'s directories a runtime-spec mounts: paths in the container to those on the host."""
        top = f"{self._root / id / 'volumes'}/"
        mounts = config.get("mounts") or ()
        return {each["destination"]: each["source"] for each in mounts if str(each.get("source")).startswith(top)}

    def _fill(self, id: ContainerId, path: str, directory: Path, shift: Shift | None) -> None:
        with syscalls.opened(self.path(id), os.O_PATH | os.O_DIRECTORY) as root_fd:
            try:
                with syscalls.opened_in_root(root_fd, path, os.O_RDONLY | os.O_DIRECTORY) as fd:
                    tree.copy(Path(f"/proc/self/fd/{fd}/."), directory)
                    return
            except (FileNotFoundError, NotADirectoryError):
                pass
        os.chown(directory, *_owner(0, 0, shift))
        directory.chmod(0o755)

    def _mount_shifted(self, id: ContainerId, layers: Sequence[Path], options: Sequence[str], shift: Shift) -> None:
        """Overlay id-mapped mounts of the layers, so that the image's files belong to the ids of the user namespace.

        The overlay keeps private clones of its lower mounts: theirs go as soon as it stands.
        """
        lower = self._run / id / "lower"
        shifted = [lower / str(number) for number in range(len(layers))]
        try:
            with syscalls.opened(shift.ns_path, os.O_RDONLY) as user_namespace:
                for layer, target in zip(layers, shifted, strict=True):
                    target.mkdir(parents=True, exist_ok=True)
                    mount.idmapped(layer, target, user_namespace)
            upper, work = self.writable_layer(id), self._root / id / "work"
            mount.overlay(self.path(id), shifted, upper, work, options)
        finally:
            mount.unmount_below(lower)
            tree.remove(lower)


def to_host(mappings: Sequence[IdMapping], id: int) -> int:
    """The host's id of one in a user namespace. Raises InvalidArgument where it has none."""
    for mapping in mappings:
        if mapping.container_id <= id < mapping.container_id + mapping.length:
            return mapping.host_id + id - mapping.container_id
    raise InvalidArgument(f"id {id} is not mapped in the pod's user namespace")


def _owner(uid: int, gid: int, shift: Shift | None) -> tuple[int, int]:
    if shift is None:
        return uid, gid
    return to_host(shift.mappings.uids, uid), to_host(shift.mappings.gids, gid)


def _make_like(upper: Path, layer: Path, shift: Shift | None) -> None:
    """The upper directory is the container's "/": owner and mode come from the topmost layer's."""
    upper.mkdir(mode=0o755, parents=True)
    found = layer.stat()
    os.chown(upper, *_owner(found.st_uid, found.st_gid, shift))
    upper.chmod(stat.S_IMODE(found.st_mode))
