"""The story of an image: pulled or loaded, found by its names, held by containers, removed.

What is known is in catalog.py and layers.py, which also has the layers; bulk bytes stay in worker processes.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cri.image_service import acceptance, documents
from cri.image_service import reference as references
from cri.image_service.acceptance import Acceptance, PolicyFiles, Run
from cri.image_service.additional import State, open_stores
from cri.image_service.auth import AuthFile, Credentials
from cri.image_service.catalog import Catalog, Image, our_own
from cri.image_service.contents import Described
from cri.image_service.joined import Joined
from cri.image_service.layer_request import LayerRequests, WantedLayer
from cri.image_service.layers import FsUsage, Layers, Totals
from cri.image_service.limits import RegistryLimit, Slots
from cri.image_service.manifest import host_platform, parse_platform
from cri.image_service.progress import CANCELLED, Progress
from cri.image_service.recovery import recover
from cri.image_service.reference import Reference
from cri.image_service.registries_conf import RegistriesFiles
from cri.image_service.repair import Damage, Repair
from cri.image_service.save import FORMATS, Saved
from cri.image_service.save import remove as remove_unfinished
from cri.image_service.snapshots import LayerDirectory, References
from cri.image_service.sources import Sources
from cri.image_service.store import ImageRecord, Name, Origin, Store
from cri.image_service.stores import Stores
from cri.image_service.tasks import Tasks
from cri.image_service.workers import Workers
from oci import trace
from oci.errors import Error, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unavailable
from oci.linux import proc

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ImageSettings:
    root: Path  # …/images
    registries_conf: Path | None = None
    registries_conf_dir: Path | None = None
    policy: Path | None = None  # None: every image is accepted
    policy_dir: Path | None = None  # of policies by namespace
    registries_d: Path | None = None  # where signatures lie
    auth_file: Path | None = None
    namespaced_auth_dir: Path | None = None
    additional_stores: tuple[Path, ...] = ()  # the images directories of other roots
    certs_dir: Path | None = None
    pinned_images: tuple[str, ...] = ()  # exact names, "glob*", "*keyword*"
    max_parallel_layers: int = 4
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 30.0
    progress_timeout_s: float = 300.0  # without a byte fetched, unpacked or synced
    registry_limits: Mapping[str, RegistryLimit] = field(default_factory=dict)  # by registry
    decryption_keys_path: Path | None = None  # private keys that encrypted layers are encrypted for
    keep_partial_s: float = 600.0  # how long layers of a pull that failed wait for the next try


@dataclass(frozen=True, slots=True)
class _Pull:
    """A pull as it was asked for; the same at once is one."""

    wanted: Reference
    credentials: Credentials | None
    platform: str | None
    namespace: str
    policy: Path | None


class Images:
    """Use `open`."""

    def __init__(self, settings: ImageSettings, stores: Stores, thread: ThreadPoolExecutor) -> None:
        self._settings = settings
        self._stores = stores
        self._thread = thread
        self._directory = LayerDirectory(settings.root)
        self._keys_path = str(settings.decryption_keys_path or "")
        timeouts = {"connect_s": settings.connect_timeout_s, "read_s": settings.read_timeout_s}
        self._timeouts: dict[str, Any] = {"timeouts": timeouts}  # as part of a worker's request
        self._workers = Workers(settings.max_parallel_layers, settings.progress_timeout_s)
        self._tasks = Tasks()
        self._references = References()
        registries = RegistriesFiles(settings.registries_conf, settings.registries_conf_dir)
        self._sources = Sources(registries, settings.auth_file, settings.namespaced_auth_dir, settings.certs_dir)
        limits = settings.registry_limits
        self._requests = LayerRequests(self._directory, limits, self._keys_path, self._timeouts)
        self._layers = Layers(
            self._directory,
            stores,
            self._references,
            self._workers,
            self._tasks,
            Slots(settings.max_parallel_layers, limits),
            settings.keep_partial_s,
        )
        self._catalog = Catalog(
            stores.additional,
            self._references,
            settings.pinned_images,
            self._layers.has,
            self._sources.local_meanings,
        )
        self._repair = Repair(
            self._catalog, self._layers, self._references, stores, self._sources, self._requests, self._give_up
        )
        files = PolicyFiles(settings.policy, settings.policy_dir, settings.registries_d)
        self._acceptance = Acceptance(files, self._workers, self._timeouts)
        self._changing = asyncio.Lock()  # held while database and memory take in one change of images or names
        self._taking_auth = asyncio.Lock()  # who has taken a file begins the pull with it, before the next one looks
        self._pulls: Joined[_Pull, Image] = Joined()
        self._progress: dict[object, Progress] = {}  # by pull; of others by an object of their own

    # ---- life

    @classmethod
    async def open(cls, settings: ImageSettings) -> "Images":
        """The images under `settings.root`; an image that lacks a layer is dropped, what a crash left is discarded.

        Containers that live must `hold` their image anew, then call `sweep`.
        """
        thread = ThreadPoolExecutor(1, thread_name_prefix="images.db")
        run = partial(asyncio.get_running_loop().run_in_executor, thread)
        try:
            directory = LayerDirectory(settings.root)
            await run(directory.prepare)
            store = await run(Store, settings.root / "images.db")
            boot_id = proc.boot_id()
            additional = await run(open_stores, settings.additional_stores, settings.root, boot_id)
            for path, trouble in additional.troubles.items():
                log.error("additional image store %s: %s", path, trouble)
            contents = await run(recover, store, directory, additional, boot_id)
        except BaseException:
            thread.shutdown()
            raise
        images = cls(settings, Stores(thread, store, additional), thread)
        images._catalog.take(contents)
        await images._sources.sweep()
        images._layers.take(contents)
        return images

    async def close(self) -> None:
        """Ends pulls and workers; what they were making is swept at the next start."""
        await self._pulls.cancel_all()
        await self._layers.close()
        await self._workers.close()
        await self._tasks.ended()
        await self._stores.close()
        await self._stores.run(self._directory.end)
        self._thread.shutdown()

    # ---- look-ups, from memory

    def list(self, reference: str = "") -> tuple[Image, ...]:
        """All images, or the one that `reference` names."""
        if not reference:
            return self._catalog.list()
        found = self.find(reference)
        return () if found is None else (found,)

    def find(self, reference: str) -> Image | None:
        """The image with this id (or a unique prefix of it), tag or digest; None also for what is no reference."""
        return self._catalog.find(reference)

    def resolve(self, reference: str) -> Image:
        """As `find`; raises NotFound."""
        return self._catalog.resolve(reference)

    def layer_paths(self, image_id: str) -> tuple[Path, ...]:
        """The trees to mount, lowest first; also of an image that was removed while a container held it."""
        return tuple(self._layers.tree(layer_id) for layer_id in self._catalog.stack(image_id))

    def pulls(self) -> tuple[Progress, ...]:
        """How far each pull and load under way is."""
        return tuple(self._progress.values())

    @property
    def totals(self) -> Totals:
        return self._layers.totals

    @property
    def waiting(self) -> int:
        """How many layers wait for their turn."""
        return self._layers.waiting

    @property
    def suspects(self) -> int:
        """How many layers an unclean shutdown may have damaged that nobody has verified since."""
        return self._layers.suspects

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """The worker processes there are now, idle ones too."""
        return tuple(self._workers.pids)

    @property
    def additional_stores(self) -> tuple[State, ...]:
        """What each additional store has to offer, and what is wrong with it."""
        return self._stores.additional.states

    async def fs_usage(self) -> FsUsage:
        return self._layers.usage()

    async def raw_documents(self, image_id: str) -> tuple[str, str]:
        """Config and manifest as they were pulled; "" where the source had none, as config also of an artifact."""
        record = await self._stores.image(image_id)
        if record is None:
            raise NotFound(f"image {image_id} is not on this node")
        return record.config, record.manifest

    # ---- pull

    async def pull(
        self,
        reference: str,
        credentials: Credentials | None = None,
        *,
        platform: str | None = None,
        namespace: str = "",
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Image:
        """The image that the registry has under `reference` now; layers that are here are not fetched again.

        `namespace`, that of the pod that the image is for, chooses policy and credentials. The same pull at once is
        one. A caller that is cancelled stops waiting; when none is left the pull ends.
        Raises InvalidArgument, NotFound, PermissionDenied ("SignatureValidationFailed…" where the policy refuses),
        Unavailable ("RegistryUnavailable…"), ResourceExhausted, DeadlineExceeded, or Error for what makes no sense.
        """
        parsed = references.with_default_tag(references.parse(reference))
        if platform is not None:
            parse_platform(platform)
        policy = await self._acceptance.policy_of(namespace)
        pull = _Pull(parsed, credentials, platform, namespace, policy)
        async with self._taking_auth:  # also of one who joins: no file may lie there for a later pull
            own = await self._sources.take_auth(namespace, parsed)
        if not self._pulls.is_running(pull):
            self._progress[pull] = Progress(str(parsed))
        progress = self._progress[pull]
        if on_progress is not None:
            progress.listeners.append(on_progress)
        try:
            return await self._pulls.run(pull, lambda: self._traced(pull, own, progress))
        except asyncio.CancelledError as error:
            if progress.phase == CANCELLED and not _is_being_cancelled():
                raise Unavailable(f"the pull of {parsed} was cancelled by the node's administrator") from error
            raise
        finally:
            if on_progress is not None:
                progress.listeners.remove(on_progress)
            if self._progress.get(pull) is progress and not self._pulls.is_running(pull):
                del self._progress[pull]

    async def _traced(self, pull: _Pull, own: AuthFile | None, progress: Progress) -> Image:
        with trace.step("pull", {"container.image.name": str(pull.wanted)}):  # may outlast the request that began it
            return await self._pull(pull, own, progress)

    async def _pull(self, pull: _Pull, own: AuthFile | None, progress: Progress) -> Image:
        meanings = await self._sources.qualified(pull.wanted)
        for at, meaning in enumerate(meanings):
            try:
                return await self._pull_qualified(meaning, pull, own, progress)
            except (NotFound, PermissionDenied, Unavailable) as error:
                if at == len(meanings) - 1:
                    raise
                log.info("%s is not at %s: %s", pull.wanted, meaning.registry, error)
        raise NotFound(f"image {pull.wanted} has no place to be asked for")

    async def _pull_qualified(self, wanted: Reference, pull: _Pull, own: AuthFile | None, progress: Progress) -> Image:
        asked = await self._acceptance.of_pull(wanted, pull.policy)
        sources = await self._sources.of(wanted, pull.credentials, own)
        resolved = await self._workers.call(
            {
                "verb": "resolve",
                "name": str(wanted),
                "reference": wanted.digest or wanted.tag,
                "platform": pull.platform or str(host_platform()),
                "sources": sources,
                "keys_path": self._keys_path,
                **asked,
                **self._timeouts,
            }
        )
        described = await documents.described(resolved, f"image {wanted}")
        best = [sources[resolved["source"]], *(each for each in sources if each is not sources[resolved["source"]])]
        layers = [self._requests.remote(content, best, resolved["session"]) for content in described.contents]
        origin = acceptance.origin_of_pull(wanted, resolved)
        return await self._complete(resolved, described, layers, _names(wanted, resolved["digest"]), origin, progress)

    async def cancel(self, reference: str) -> int:
        """Ends the pulls of `reference` under way; how many. Who waits for them gets Unavailable."""
        wanted = str(references.with_default_tag(references.parse(reference)))
        pulls = [pull for pull in self._progress if isinstance(pull, _Pull) and str(pull.wanted) == wanted]
        for pull in pulls:
            self._progress[pull].phase = CANCELLED
            await self._pulls.cancel(pull)
        return len(pulls)

    # ---- load

    async def load(
        self,
        path: Path,
        reference: str | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> tuple[Image, ...]:
        """The images in an OCI layout, an OCI archive or an archive of docker save, under the names it gives them.

        `reference` names the image instead, where there is one only. Errors as for `pull`.
        """
        name = references.with_default_tag(references.parse(reference)) if reference else None
        if name is not None and name.is_short:
            name = references.with_registry(name, references.DOCKER_HUB)
        progress = Progress(str(path), listeners=[on_progress] if on_progress is not None else [])
        self._progress[key := object()] = progress
        scratch = self._settings.root / "layers" / f"load.tmp-{secrets.token_hex(4)}"
        try:
            return await self._load(path, name, scratch, progress)
        finally:
            self._progress.pop(key, None)
            await asyncio.shield(self._layers.discard(scratch))

    async def _load(self, path: Path, name: Reference | None, scratch: Path, progress: Progress) -> tuple[Image, ...]:
        found = await self._workers.call(
            {
                "verb": "inspect",
                "path": str(path),
                "scratch": str(scratch),
                "platform": str(host_platform()),
                "keys_path": self._keys_path,
            }
        )
        if name is not None and len(found["images"]) != 1:
            raise InvalidArgument(f"{path} holds {len(found['images'])} images; one name is not enough for them")
        loaded = []
        for image in found["images"]:
            transport = found["format"]
            await self._acceptance.of_file(path, transport)
            spelled = [name] if name is not None else [_local_name(each) for each in image["names"]]
            names = [pair for each in spelled if each is not None for pair in _names(each, image["manifest_digest"])]
            described = await documents.described(image, f"image in {path}")
            layers = [
                self._requests.local(content, extent)
                for content, extent in zip(described.contents, image["extents"], strict=True)
            ]
            origin = acceptance.origin_of_file(path, transport)
            loaded.append(await self._complete(image, described, layers, names, origin, progress))
        return tuple(loaded)

    async def load_bundle(self, directory: Path | None) -> None:
        """Loads all that lies in `directory`, and pins it; what cannot be loaded is logged. None is no directory."""
        if directory is None:
            return
        try:
            paths = await asyncio.to_thread(lambda: sorted(directory.iterdir()))
        except OSError as error:
            log.error("cannot read the bundle directory %s: %s", directory, error.strerror)
            return
        for path in paths:
            try:
                for image in await self.load(path):
                    await self.pin(image.id, True)
            except (Error, OSError) as error:
                log.error("cannot load %s: %s", path, error)

    # ---- from documents to an image

    async def _complete(
        self,
        found: dict[str, Any],
        described: Described,
        layers: Sequence[WantedLayer],
        names: Sequence[tuple[str, bool]],
        origin: Origin,
        progress: Progress,
    ) -> Image:
        """Has all layers here, then records the image and publishes it."""
        image_id = found["id"]
        by_id = {layer.id: layer for layer in layers}
        with self._layers.claimed(by_id):
            await self._layers.have(tuple(by_id.values()), progress)
            stack = await self._layers.stacked(image_id, [layer.id for layer in layers])
            with self._layers.claimed(stack):
                record = ImageRecord(
                    id=image_id,
                    config=found["config"],
                    manifest=found["manifest"],
                    manifest_digest=found["manifest_digest"],
                    media_type=found["media_type"],
                    size_bytes=sum(layer.size_bytes for layer in layers) + documents.size_bytes(found),
                    layers=stack,
                    pulled_at=time.time_ns(),
                )
                named = [Name(name, image_id, is_digest) for name, is_digest in names]
                image = await self._tasks.finish(self._publish(record, described, named, origin))
        progress.phase = "done"
        progress.changed()
        return image

    async def _publish(self, record: ImageRecord, described: Described, names: Sequence[Name], origin: Origin) -> Image:
        async with self._changing:
            await self._stores.run(self._stores.ours.put_image, record, names, origin)
            return self._catalog.publish(record, described, names)

    # ---- save

    async def save(
        self,
        wanted: Sequence[str],
        path: Path,
        form: str,
        credentials: Credentials | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> tuple[Saved, ...]:
        """Writes images to `path` in a format of save.FORMATS; `path` has them all, or is as it was.

        Layers are fetched again where a registry has them: then the copy is exact. A caller that is cancelled ends it.
        Raises InvalidArgument, NotFound, AlreadyExists, ResourceExhausted, or Error for what cannot be read or written.
        """
        if form not in FORMATS:
            raise InvalidArgument(f"format {form!r}: expected one of {', '.join(FORMATS)}")
        names: dict[str, dict[str, None]] = {}
        for reference in wanted:
            image = self.resolve(reference)
            if image.artifact is not None:
                raise InvalidArgument(f"{reference} is an artifact; only container images can be saved")
            if any(layer_id.startswith("encrypted:") for layer_id in self._catalog.stack(image.id)):
                raise FailedPrecondition(f"{reference} has encrypted layers, which are here in the clear only")
            names.setdefault(image.id, {}).update(dict.fromkeys(self._catalog.names_asked_for(reference, image)))
        if not names:
            raise InvalidArgument("no image to save is named")
        progress = Progress(f"save to {path}", "saving", listeners=[on_progress] if on_progress is not None else [])
        layers = [layer_id for image_id in names for layer_id in self._catalog.stack(image_id)]
        self._progress[key := object()] = progress
        try:
            with self._layers.claimed(layers):
                return await self._save(
                    {image_id: tuple(each) for image_id, each in names.items()}, path, form, credentials, progress
                )
        finally:
            self._progress.pop(key, None)

    async def _save(
        self,
        names: Mapping[str, tuple[str, ...]],
        path: Path,
        form: str,
        credentials: Credentials | None,
        progress: Progress,
    ) -> tuple[Saved, ...]:
        for image_id in names:
            await self.ensure(image_id)
        images = [await self._to_save(image_id, each, credentials) for image_id, each in names.items()]
        progress.layers_total = sum(len(image["layers"]) for image in images)
        temporary = path.with_name(f".{path.name[:200]}.crito-{secrets.token_hex(4)}")

        def progressed(now: dict[str, int]) -> None:
            progress.layers_done = now["layers"]
            progress.bytes_fetched, progress.bytes_total = now["done_bytes"], now["total_bytes"]
            progress.changed()

        request = {
            "verb": "save",
            "path": str(path),
            "temporary": str(temporary),
            "format": form,
            "images": images,
            "paces": self._requests.paces(source for image in images for source in image["sources"]),
        }
        try:
            done = await self._workers.call({**request, **self._timeouts}, progressed)
        except BaseException:  # a worker that was killed has left something
            await asyncio.to_thread(remove_unfinished, temporary)
            raise
        progress.phase = "done"
        progressed(done)
        return tuple(Saved(**{**image, "names": tuple(image["names"])}) for image in done["images"])

    async def _to_save(self, image_id: str, names: Sequence[str], credentials: Credentials | None) -> dict[str, Any]:
        """What the worker needs to write the image, from its registries or from its layers."""
        record, image = await self._stores.image(image_id), self._catalog.image(image_id)
        if record is None or image is None:
            raise NotFound(f"image {image_id} is not on this node any more")
        sources: dict[tuple[str, str], dict[str, Any]] = {}
        for name in self._catalog.names(image_id) if record.manifest else ():
            try:
                found = await self._sources.of(references.parse(name), credentials)
            except Error as error:
                log.info("cannot fetch %s by the name %s to save it: %s", image_id, name, error)
                continue
            sources |= {(each["host"], each["repository"]): each for each in found}
        return {
            "id": image_id,
            "names": list(names),
            "config": record.config,
            "manifest": record.manifest,
            "media_type": record.media_type,
            "sources": list(sources.values()),
            "layers": [
                {
                    "diff_id": diff_id,
                    "tree": str(self._layers.tree(diff_id)),
                    "implied": layer.implied,
                    "size_bytes": layer.size_bytes,
                }
                for diff_id in image.config.diff_ids
                if (layer := self._layers.find(diff_id)) is not None
            ],
        }

    # ---- what may run

    async def allow(self, image: Image, name: str, namespace: str) -> None:
        """Accepts that a container of `namespace` runs or mounts the image, which the pod's author called `name`.

        Raises PermissionDenied ("SignatureValidationFailed…") where the policy of the namespace refuses it now, or
        Unavailable ("RegistryUnavailable…") where it demands signatures that are not here and cannot be fetched.
        """
        origins = await self._stores.origins(image.id) or acceptance.origins_of_names(
            (*image.repo_tags, *image.repo_digests), image.manifest_digest
        )
        run = Run(image.id, acceptance.meant(name, self._sources.local_meanings), image.repo_digests, origins)
        newer = await self._acceptance.of_run(run, namespace, self._sources.of)
        if newer is not None:
            await self._tasks.finish(self._stores.run(self._stores.ours.put_origin, image.id, newer))

    async def allow_file(self, path: Path, transport: str, namespace: str) -> None:
        """Accepts that a container of `namespace` is made of a local file. Raises PermissionDenied as `allow` does."""
        await self._acceptance.of_file(path, transport, namespace)

    # ---- as it was unpacked

    async def ensure(self, image_id: str) -> None:
        """Has the image's layers as they were unpacked; call it before they are used.

        Only after an unclean shutdown there is something to do. Raises Unavailable where a layer is damaged and could
        not be fetched again: the image is not listed then until it is pulled.
        """
        for layer_id in self._catalog.find_stack(image_id) or ():
            await self._repair.ensure(layer_id)

    def verify(self, repair: bool = False) -> AsyncIterator[Damage]:
        """Verifies every layer: tells those found damaged, and with `repair` whether they were healed.

        Without `repair` everything stays as it is.
        """
        return self._repair.verify(repair)

    # ---- use, removal

    def hold(self, image_id: str, holder: str) -> None:
        """`holder` (a container's id) uses the image's layers until `release`, also when the image is removed."""
        self._catalog.stack(image_id)  # raises where there is none
        self._references.hold(image_id, holder)

    def release(self, holder: str) -> None:
        image_id = self._references.release(holder)
        if image_id is not None and not self._catalog.is_ours(image_id):
            self._tasks.start(self._forget_unheld(image_id))

    async def pin(self, reference: str, pinned: bool) -> Image:
        """Keeps the image from kubelet's garbage collection, or leaves it to that, whatever the configuration says."""
        image = our_own(self.resolve(reference))

        async def change() -> Image:
            async with self._changing:
                await self._stores.run(self._stores.ours.pin, image.id, pinned)
                return self._catalog.pin(image.id, pinned)

        return await self._tasks.finish(change())

    async def remove(self, reference: str) -> None:
        """Takes the image away with all its names; what it alone used is freed, at once or with its last container.

        An image that is not there is success (api.proto, RemoveImage). One that an additional store has too goes on
        being there. Raises FailedPrecondition where only such a store has it.
        """
        image = self._catalog.find_any(reference)
        if image is not None:
            await self._tasks.finish(self._remove(our_own(image).id))

    async def _give_up(self, image_id: str) -> None:
        """Removes an image that cannot be made whole; its layers wait for the next pull."""
        await self._tasks.finish(self._remove(image_id, keep_layers=True))

    async def _remove(self, image_id: str, keep_layers: bool = False) -> None:
        async with self._changing:
            if not self._catalog.is_ours(image_id):
                return
            await self._stores.run(self._stores.ours.retire_image, image_id)
            self._catalog.remove(image_id)
        await self._forget_unheld(image_id, keep_layers)

    async def _forget_unheld(self, image_id: str, keep_layers: bool = False) -> None:
        """Ends an image that was removed, unless a container still holds it; its layers may wait for a next pull."""
        async with self._changing:
            if self._references.is_held(image_id) or image_id not in self._catalog.removed():
                return
            layers = self._catalog.forget(image_id)
            await self._stores.run(self._stores.ours.remove_image, image_id)
        if keep_layers:
            self._layers.free_later(layers)
        else:
            self._layers.free(layers)

    async def sweep(self) -> None:
        """Frees what no image and no container needs; call it once the containers that live hold their images.

        Layers of pulls that were cut short still wait for the next try, as after any failed pull.
        """
        for image_id in self._catalog.removed():
            await self._forget_unheld(image_id)
        self._layers.free_later((), always=True)


def _is_being_cancelled() -> bool:
    """Whether the task that runs is itself cancelled, not only what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _names(reference: Reference, digest: str) -> list[tuple[str, bool]]:
    """What an image is called after a pull of `reference`: by digest alone, it has no tag."""
    names = [] if reference.digest or not reference.tag else [(reference.tagged, False)]
    return [*names, (f"{reference.name}@{digest}", True)] if digest else names


def _local_name(text: str) -> Reference | None:
    """The name that an archive gives an image; None for a bare tag or what is no name."""
    if ":" not in text and "/" not in text:
        return None
    try:
        parsed = references.with_default_tag(references.parse(text))
    except InvalidArgument:
        return None
    return references.with_registry(parsed, references.DOCKER_HUB) if parsed.is_short else parsed
