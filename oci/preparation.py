"""From what is asked of a container to its mounted root filesystem and its runtime-spec.

In this order: CDI devices are found, host paths looked up, the image mounted, the spec built, CDI's edits and OCI hooks
put into it. What half of it leaves behind, `unmount` takes away.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oci import cdi, cdi_edits, host, spec, trace
from oci.cdi import Cdi
from oci.cdi_edits import Edits
from oci.container import ContainerRecord
from oci.container_spec import ContainerId, ContainerSpec, PodEnvironment
from oci.handlers import Handler
from oci.hook_files import HookFiles
from oci.image import ImageConfig
from oci.image_volumes import ImageMount, ImageVolumes
from oci.linux import cgroup, passwd
from oci.linux.node import Node
from oci.rootfs import Rootfs, Shift


@dataclass(frozen=True, slots=True)
class ImageToRun:
    """What a container needs of its image, and of the images that it mounts as volumes."""

    id: str
    ref: str  # how the status names it
    config: ImageConfig
    layers: tuple[Path, ...]  # lowest first
    volumes: tuple[ImageMount, ...]


class Preparation:
    def __init__(
        self,
        driver: cgroup.Driver,
        defaults: spec.Defaults,
        devices: Cdi,
        hook_files: HookFiles,
        rootfs: Rootfs,
        image_volumes: ImageVolumes,
        node: Node,
        mounts: Executor,
    ) -> None:
        self._driver = driver
        self._default = defaults
        self._cdi = devices
        self._hook_files = hook_files
        self._rootfs = rootfs
        self._image_volumes = image_volumes
        self._node = node
        self._mounts = mounts

    async def devices(self, wanted: ContainerSpec) -> Edits:
        """What the container's CDI devices ask for; found before anything is made for it."""
        names = cdi.requested(wanted.cdi_devices, wanted.annotations)
        devices: Edits = await self._pooled(self._cdi.resolve, names) if names else Edits()
        return devices

    async def build(
        self,
        record: ContainerRecord,
        pod: PodEnvironment,
        image: ImageToRun,
        handler: Handler,
        devices: Edits,
        target_pid_ns: str | None,
    ) -> tuple[passwd.User, dict[str, Any]]:
        """The container's user, and config.json as far as image, CRI, node and handler decide it."""
        wanted = record.spec
        with trace.step("look up host paths"):
            found = await host.look_up(wanted, privileged_devices=not handler.privileged_without_host_devices)
        with trace.step("mount root filesystem", {"crito.layers": len(image.layers)}):
            user, config = await self._pooled(self._mount_and_build, record, pod, image, found, handler, target_pid_ns)
        config = cdi_edits.edited(config, devices, idmap_mounts=handler.features.idmap_mounts)
        return user, await self._pooled(self._hook_files.inject, config, *_asked_of_hooks(pod, wanted))

    def unmount(self, id: ContainerId) -> None:
        """Take the mounts away; in a pool. That there are none is success."""
        self._image_volumes.unmount(id)
        self._rootfs.unmount(id)

    def _mount_and_build(
        self,
        record: ContainerRecord,
        pod: PodEnvironment,
        image: ImageToRun,
        found: host.HostObjects,
        handler: Handler,
        target_pid_ns: str | None,
    ) -> tuple[passwd.User, dict[str, Any]]:
        """Mount the root filesystem, build the runtime-spec; in a pool. What half of it leaves a release takes away."""
        id, wanted = record.id, record.spec
        shift = Shift(pod.user_namespace, pod.user_ns) if pod.user_namespace else None
        rootfs = self._rootfs.mount(id, image.layers, shift=shift)
        self._rootfs.make_working_directory(id, spec.working_directory(wanted, image.config), shift=shift)
        mounted = [mount.container_path for mount in wanted.mounts]
        user = passwd.resolve(rootfs, image.config.user, wanted.security)
        config = spec.build(
            wanted,
            image.config,
            pod,
            self._node,
            placement=spec.Placement(
                container_id=id,
                rootfs=rootfs,
                user=user,
                cgroups_path=cgroup.runtime_path(self._driver, record.cgroup_parent, id),
                volumes=self._rootfs.make_volumes(id, image.config.volumes, mounted, shift=shift),
                image_mounts=self._image_volumes.mount(id, image.volumes),
                target_pid_ns=target_pid_ns,
                annotations=handler.annotations({**pod.annotations, **wanted.annotations}),
            ),
            host=found,
            features=handler.features,
            defaults=self._defaults(handler),
        )
        return user, config

    def _defaults(self, handler: Handler) -> spec.Defaults:
        defaults = self._default
        return defaults if handler.seccomp is None else replace(defaults, seccomp=handler.seccomp)

    async def _pooled(self, leaf: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._mounts, leaf, *arguments)


def _asked_of_hooks(pod: PodEnvironment, wanted: ContainerSpec) -> tuple[dict[str, str], bool]:
    """What OCI hooks' conditions look at: all annotations, the runtime's or not, and whether host paths are mounted."""
    return {**pod.annotations, **wanted.annotations}, any(mount.host_path for mount in wanted.mounts)
