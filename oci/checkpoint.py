"""The story of a checkpoint: pause, let CRIU write the processes, take what was written, resume, make the archive.

While a checkpoint is made, <directory>/<container id>/ has its parts; a start that finds one, of a daemon that was
killed, lets the container run on and removes it. The archive appears at its place when it is whole.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Executor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from oci import checkpoint_archive, checkpoint_worker, criu
from oci.bundle import Bundles
from oci.checkpoint_archive import METADATA
from oci.container import Container
from oci.container_spec import ContainerId
from oci.containers import Containers
from oci.errors import DeadlineExceeded, Error, FailedPrecondition
from oci.handlers import Handler, Handlers
from oci.linux import tree
from oci.rootfs import Rootfs
from oci.status import ContainerState

_log = logging.getLogger(__name__)

RESUME_TIMEOUT_S = 10.0


class Checkpoints:
    """`layers` tells the trees of an image, lowest first."""

    def __init__(
        self,
        directory: Path,
        containers: Containers,
        bundles: Bundles,
        rootfs: Rootfs,
        handlers: Handlers,
        layers: Callable[[str], tuple[Path, ...]],
        pool: Executor,
    ) -> None:
        self._directory = directory
        self._containers = containers
        self._bundles = bundles
        self._rootfs = rootfs
        self._handlers = handlers
        self._layers = layers
        self._pool = pool

    async def recover(self) -> None:
        """Let containers run on that a daemon before us had paused; forget its unfinished checkpoints. At the start."""
        await self._pooled(_prepare, self._directory)
        for id in await self._pooled(_names, self._directory):
            _log.warning("container %s: the daemon ended while it was being checkpointed", id)
            container = self._containers.find(id)
            if container is not None:
                await self._resume(container)
            await self._pooled(tree.remove, self._directory / id)

    async def save(self, archives: Mapping[Path, Container], timeout_s: float, *, shared_memory: bool = False) -> None:
        """Write one archive for each of these containers, all of the same moment; they run on, whatever happens.

        Raises FailedPrecondition where one does not run, or host or handler cannot do it; DeadlineExceeded.
        On an error no archive is there. With `shared_memory` the first one has the pod's /dev/shm.
        """
        deadline = time.monotonic() + timeout_s
        handlers = {each.id: await self._able(each) for each in archives.values()}
        async with contextlib.AsyncExitStack() as stack:
            for container in archives.values():
                await stack.enter_async_context(self._staged(container))
            documents = await self._dump(list(archives.values()), handlers, shared_memory, deadline)
            stack.push_async_callback(self._pooled, _unlink_unless_done, list(archives), done := _Done())
            for location, container in archives.items():
                await checkpoint_archive.call(
                    "archive",
                    _left(deadline),
                    f"checkpoint of container {container.id}",
                    staging=str(self._directory / container.id),
                    location=str(location),
                    documents=documents[container.id],
                )
            done.is_done = True

    async def _able(self, container: Container) -> Handler:
        record = container.record
        if container.state is not ContainerState.RUNNING:
            raise FailedPrecondition(f"cannot checkpoint a container that is {container.state} (id {container.id})")
        await self._containers.criu.require()
        handler = self._handlers.resolve(record.runtime_handler)
        if not await handler.runtime.can_checkpoint():
            raise FailedPrecondition(
                f"runtime_handler: {handler.name!r} ({handler.runtime.path}) makes no checkpoints; runc does"
            )
        if record.spec.security.user_namespace is not None:
            raise FailedPrecondition(f"container {container.id}: CRIU cannot checkpoint a pod's user namespace")
        return handler

    @contextlib.asynccontextmanager
    async def _staged(self, container: Container) -> AsyncIterator[None]:
        directory = self._directory / container.id
        try:
            await self._pooled(_make_private, directory)
        except FileExistsError:
            raise FailedPrecondition(f"container {container.id}: it is being checkpointed already") from None
        try:
            yield
        finally:
            await self._pooled(tree.remove, directory)

    async def _dump(
        self,
        containers: Sequence[Container],
        handlers: Mapping[ContainerId, Handler],
        shared_memory: bool,
        deadline: float,
    ) -> dict[ContainerId, dict[str, Any]]:
        """Everything that must be of one moment, while all of them are paused; the archives' documents come back."""
        documents: dict[ContainerId, dict[str, Any]] = {}
        async with contextlib.AsyncExitStack() as stack:
            for container in containers:
                stack.push_async_callback(self._resume, container)  # a pause that is late may happen all the same
                await handlers[container.id].runtime.pause(container.id, _left(deadline))
            for container in containers:
                config = await self._containers.runtime_spec(container)
                await self._write_processes(container, handlers[container.id], deadline)
                shm = checkpoint_archive.shared_memory(config) if shared_memory and not documents else {}
                await self._capture(container, {**self._rootfs.volumes_in(container.id, config), **shm}, deadline)
                documents[container.id] = _documents(container, config)
        return documents

    async def _write_processes(self, container: Container, handler: Handler, deadline: float) -> None:
        staging = self._directory / container.id
        images = staging / checkpoint_worker.IMAGES
        try:
            await handler.runtime.checkpoint(
                container.id, images, staging, _left(deadline), self._containers.criu.environment
            )
        except DeadlineExceeded:
            raise
        except Error as error:
            said = await self._pooled(criu.complaints, staging / "dump.log")
            raise type(error)(f"checkpoint of container {container.id}: {error}; CRIU says: {said}") from error

    async def _capture(self, container: Container, volumes: Mapping[str, str], deadline: float) -> None:
        staging, record = self._directory / container.id, container.record
        await checkpoint_archive.call(
            "capture",
            _left(deadline),
            f"checkpoint of container {container.id}",
            staging=str(staging),
            upper=str(self._rootfs.writable_layer(container.id)),
            layers=[str(path) for path in self._layers(record.image_id)],
            volumes=volumes,
            log=record.log_path,
        )

    async def _resume(self, container: Container) -> None:
        handler = self._handlers.find(container.record.runtime_handler)
        if handler is None:
            return
        try:
            await handler.runtime.resume(container.id, RESUME_TIMEOUT_S)
        except Error as error:
            if "not paused" not in str(error):
                _log.warning("container %s: cannot resume it after a checkpoint: %s", container.id, error)

    async def _pooled(self, leaf: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, leaf, *arguments)


class _Done:
    is_done = False


def _unlink_unless_done(locations: list[Path], done: _Done) -> None:
    if not done.is_done:
        for location in locations:
            location.unlink(missing_ok=True)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceeded("the checkpoint took longer than it may")
    return left


def _prepare(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def _make_private(directory: Path) -> None:
    directory.mkdir(mode=0o700)


def _names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def _documents(container: Container, spec: dict[str, Any]) -> dict[str, Any]:
    """config.dump, spec.dump and bind.mounts, with the annotations by which other programs know a CRI container."""
    record = container.record
    metadata = {"name": record.spec.name, "attempt": record.spec.attempt}
    annotations = {
        **(spec.get("annotations") or {}),
        "io.container.manager": "cri-o",
        "io.kubernetes.cri-o.ContainerName": record.spec.name,
        "io.kubernetes.cri-o.ContainerID": record.id,
        "io.kubernetes.cri-o.SandboxID": record.sandbox_id,
        "io.kubernetes.cri-o.Labels": _json(dict(record.spec.labels)),
        "io.kubernetes.cri-o.Annotations": _json(dict(record.spec.annotations)),
        "io.kubernetes.cri-o.ImageName": record.spec.image,
        "io.kubernetes.cri-o.LogPath": record.log_path,
        METADATA: _json(metadata),
    }
    config = {
        "id": record.id,
        "name": record.spec.name,
        "rootfsImage": record.image_id,
        "rootfsImageRef": record.image_ref,
        "rootfsImageName": record.spec.image,
        "runtime": record.runtime_handler,
        "createdTime": _rfc3339(record.status.created_at or 0),
        "checkpointedTime": _rfc3339(time.time_ns()),
        "restoredTime": "0001-01-01T00:00:00Z",
        "restored": bool(record.restored_from),
    }
    mounts = [
        {
            "source": mount["source"],
            "destination": mount["destination"],
            "file_type": "directory" if Path(mount["source"]).is_dir() else "file",
            "permissions": 0o755,
        }
        for mount in spec.get("mounts") or ()
        if mount.get("type") == "bind"
    ]
    return {
        checkpoint_worker.CONFIG: config,
        checkpoint_worker.SPEC: {**spec, "annotations": annotations},
        checkpoint_worker.BIND_MOUNTS: mounts,
    }


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _rfc3339(ns: int) -> str:
    return datetime.fromtimestamp(ns / 1e9, UTC).isoformat().replace("+00:00", "Z")
