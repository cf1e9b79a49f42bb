"""Checkpoints as the CRI speaks of them: of a container to an archive, of a pod to a directory, and the way back.

A pod's directory has one archive per container, and pod.dump, which comes last and names them:

    pod.dump             {"version": 1, "pod": {…}, "runtimeHandler": …, "containers": {NAME: "container-0.tar", …}}
    container-0.tar …    as CheckpointContainer writes them; the first one has the pod's /dev/shm too
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cri.image_service.images import Image, Images
from oci import checkpoint_archive
from oci.checkpoint import Checkpoints
from oci.checkpoint_archive import Checkpoint
from oci.container import Container
from oci.container_spec import ContainerSpec
from oci.containers import Containers
from oci.errors import FailedPrecondition, InvalidArgument, NotFound
from oci.handlers import Handlers
from oci.preparation import ImageToRun
from sandbox.sandbox import Sandbox
from sandbox.sandboxes import Sandboxes
from sandbox.spec import SandboxSpec

DEFAULT_TIMEOUT_S = 300.0  # of a caller who names none
MARGIN_S = 1.0  # before the caller's deadline: for resuming, cleaning up and answering
POD_DUMP = "pod.dump"
VERSION = 1
IMAGE_ANNOTATION = "io.kubernetes.cri-o.annotations.checkpoint.name"  # of an image that is a container's checkpoint

ARCHIVE_TRANSPORT = "tarball"  # as which a policy judges an archive that is no image (containers-policy.json(5))

ToRun = Callable[[Image, ContainerSpec, str], Awaitable[ImageToRun]]


class ContainerCheckpoints:
    def __init__(
        self,
        checkpoints: Checkpoints,
        sandboxes: Sandboxes,
        containers: Containers,
        images: Images,
        handlers: Handlers,
    ) -> None:
        self._checkpoints = checkpoints
        self._sandboxes = sandboxes
        self._containers = containers
        self._images = images
        self._handlers = handlers
        self._is_checkpoint: dict[str, bool] = {}  # by image id

    # One container

    async def save(self, container: Container, location: str, timeout_s: float) -> None:
        """Write the archive `location`. Raises InvalidArgument for a place where none can be."""
        path = Path(location)
        await asyncio.to_thread(_check_location, path)
        await self._checkpoints.save({path: container}, timeout_s)

    async def find(self, image: str, name: str, namespace: str) -> Checkpoint | None:
        """What CreateContainer is to restore where `image` is an archive's path or a checkpoint image; else None.

        Raises PermissionDenied where the policy of the namespace refuses it: `name` is what the pod's author called it.
        """
        if image.startswith("/"):
            await self._images.allow_file(Path(image), ARCHIVE_TRANSPORT, namespace)
            return await checkpoint_archive.read(Path(image))
        found = self._images.find(image)
        if found is None or not await self._is_checkpoint_image(found.id):
            return None
        await self._images.allow(found, name, namespace)
        await self._images.ensure(found.id)
        layers = self._images.layer_paths(found.id)
        if len(layers) != 1:
            raise InvalidArgument(f"image {image}: a checkpoint image has one layer, this one {len(layers)}")
        return await checkpoint_archive.read(layers[0])

    async def _is_checkpoint_image(self, image_id: str) -> bool:
        if image_id not in self._is_checkpoint:
            _, manifest = await self._images.raw_documents(image_id)
            annotations = json.loads(manifest).get("annotations") if manifest else None
            self._is_checkpoint[image_id] = IMAGE_ANNOTATION in (annotations or {})
        return self._is_checkpoint[image_id]

    async def image_of(self, checkpoint: Checkpoint, namespace: str) -> Image:
        """The image that the checkpointed container ran, pulled where it is not here any more."""
        for name in checkpoint.image_names:
            if (found := self._images.find(name)) is not None:
                return found
        pullable = [name for name in checkpoint.image_names if not name.startswith(("sha256:", "/"))]
        if not pullable:
            raise NotFound(f"checkpoint {checkpoint.source}: it does not name the image that its container ran")
        return await self._images.pull(pullable[0], namespace=namespace)

    # A pod

    async def save_pod(
        self, sandbox: Sandbox, containers: Sequence[Container], directory: Path, timeout_s: float
    ) -> None:
        """Write all of `containers`, as they were at one moment, into an empty directory."""
        await asyncio.to_thread(_check_empty, directory)
        for container in containers:
            if container.record.sandbox_id != sandbox.id:
                raise InvalidArgument(f"container_ids: {container.id} is not in pod sandbox {sandbox.id}")
        archives = {directory / f"container-{number}.tar": each for number, each in enumerate(containers)}
        await self._checkpoints.save(archives, timeout_s, shared_memory=True)
        spec = sandbox.record.spec
        dump = {
            "version": VERSION,
            "pod": {"id": sandbox.id, "name": spec.name, "namespace": spec.namespace, "uid": spec.uid},
            "runtimeHandler": sandbox.record.runtime_handler,
            "containers": {each.record.spec.name: path.name for path, each in archives.items()},
        }
        try:
            await asyncio.to_thread(_write_whole, directory / POD_DUMP, json.dumps(dump))
        except OSError:
            await asyncio.to_thread(_unlink, list(archives))
            raise

    async def restore_pod(
        self, directory: Path, spec: SandboxSpec, handler: str, wanted: Sequence[ContainerSpec], to_run: ToRun
    ) -> tuple[Sandbox, list[Container]]:
        """Make a pod of a checkpoint, its containers ready to start. On any error nothing of it stays."""
        found = await self._archives(directory)
        names = [each.name for each in wanted]
        if not names or len(set(names)) != len(names) or set(names) != set(found):
            raise InvalidArgument(f"container_configs: {sorted(names)}; the checkpoint {directory} has {sorted(found)}")
        parts = [(each, await self._matching(found[each.name], each, spec.namespace)) for each in wanted]
        sandbox = await self._sandboxes.run(spec, handler)
        try:
            pod = self._sandboxes.environment(sandbox)
            made = [
                await self._containers.create(
                    each, pod, await to_run(image, each, spec.namespace), self._handlers.resolve(handler), checkpoint
                )
                for each, (image, checkpoint) in parts
            ]
        except BaseException:
            await self._sandboxes.remove(sandbox)
            raise
        return sandbox, made

    async def _archives(self, directory: Path) -> Mapping[str, Path]:
        try:
            dump: Any = json.loads(await asyncio.to_thread((directory / POD_DUMP).read_text))
            if dump["version"] != VERSION:
                raise FailedPrecondition(f"checkpoint {directory}: version {dump['version']}, this is {VERSION}")
            return {name: directory / Path(file).name for name, file in dump["containers"].items()}
        except FileNotFoundError as error:
            raise InvalidArgument(f"checkpoint_path: {error.filename} does not exist") from error
        except (ValueError, KeyError, AttributeError, TypeError, NotADirectoryError) as error:
            raise InvalidArgument(f"checkpoint_path: {directory / POD_DUMP} is none of ours: {error!r}") from error

    async def _matching(self, archive: Path, wanted: ContainerSpec, namespace: str) -> tuple[Image, Checkpoint]:
        await self._images.allow_file(archive, ARCHIVE_TRANSPORT, namespace)
        checkpoint = await checkpoint_archive.read(archive)
        image = await self.image_of(checkpoint, namespace)
        named = self._images.find(wanted.image)
        if named is not None and named.id != image.id:
            raise InvalidArgument(f"container_configs: {wanted.name!r} names {named.id}, its checkpoint {image.id}")
        return image, replace(checkpoint, must_match=True)


def timeout_of(asked_s: float, deadline_s: float | None) -> float:
    """How long a checkpoint may take: what the request says, and less than the call's own deadline."""
    timeout_s = asked_s or DEFAULT_TIMEOUT_S
    if deadline_s is None:
        return timeout_s
    return max(min(timeout_s, deadline_s - MARGIN_S), 0.0)


def _check_location(path: Path) -> None:
    if not path.is_absolute():
        raise InvalidArgument(f"location: {str(path)!r} is not an absolute path of an archive")
    if not path.parent.is_dir():
        raise InvalidArgument(f"location: {path.parent} is not a directory")
    if path.is_dir():
        raise InvalidArgument(f"location: {path} is a directory")


def _check_empty(directory: Path) -> None:
    if not directory.is_absolute() or not directory.is_dir():
        raise InvalidArgument(f"output_path: {str(directory)!r} is not the absolute path of a directory")
    if any(directory.iterdir()):
        raise InvalidArgument(f"output_path: {directory} is not empty")


def _write_whole(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(text)
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def _unlink(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
