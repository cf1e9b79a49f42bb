"""The story of an image: pulled or loaded, found by its names, held by containers, removed.

Lists and look-ups answer from memory. Bulk bytes stay in worker processes; a layer is fetched and unpacked once,
whoever wants it and however many at once.
"""

import asyncio
import contextlib
import logging
import secrets
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import oci.image
from cri.image_service import acceptance, auth
from cri.image_service import reference as references
from cri.image_service.acceptance import Acceptance, PolicyFiles, Run
from cri.image_service.additional import AdditionalStores, State, open_stores
from cri.image_service.auth import AuthFile, Credentials, NamespacedAuth
from cri.image_service.contents import (
    Artifact,
    Content,
    Described,
    artifact_contents,
    artifact_of,
    described_by,
    image_contents,
)
from cri.image_service.group_sync import GroupSync
from cri.image_service.implied import make_implied_layer
from cri.image_service.joined import Joined
from cri.image_service.limits import RegistryLimit, Slots
from cri.image_service.manifest import Descriptor, Manifest, host_platform, parse, parse_platform
from cri.image_service.progress import LayerPhase, LayerProgress, Progress
from cri.image_service.reference import Reference
from cri.image_service.registries_conf import RegistriesFiles
from cri.image_service.save import FORMATS, Saved
from cri.image_service.save import remove as remove_unfinished
from cri.image_service.snapshots import LayerDirectory, References, total, visible
from cri.image_service.store import Contents, ImageRecord, LayerRecord, Name, Origin, Store
from cri.image_service.unpack import sync_filesystem
from cri.image_service.workers import Workers
from oci.errors import Error, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unavailable
from oci.image import ImageConfig
from oci.linux import proc

log = logging.getLogger(__name__)
T = TypeVar("T")

_ID_PREFIX_LENGTH = 4
_SETTLE_S = 10.0
_LARGE_CONFIG = 1 << 18  # characters, from which parsing is a thread's work


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
class Image:
    id: str  # "sha256:<digest of the config>"; of the manifest, for artifacts and encrypted images
    repo_tags: tuple[str, ...]
    repo_digests: tuple[str, ...]
    size_bytes: int
    config: ImageConfig
    pinned: bool = False
    manifest_digest: str = ""
    pulled_at: int = 0  # ns since the epoch
    artifact: Artifact | None = None  # None: it is a container image
    store: Path | None = None  # the additional store that alone has it; None: ours

    @property
    def uid(self) -> int | None:
        """The numeric user of the config; None where it is a name or not set."""
        user = self.config.user.partition(":")[0]
        return int(user) if user.isdecimal() and user.isascii() else None

    @property
    def username(self) -> str:
        user = self.config.user.partition(":")[0]
        return "" if self.uid is not None else user


@dataclass(slots=True)
class Totals:
    """What has happened since the start, for metrics."""

    fetched_bytes: int = 0
    layers: int = 0  # fetched, unpacked and committed
    failed_layers: int = 0
    damaged_layers: int = 0


@dataclass(frozen=True, slots=True)
class Damage:
    """A layer that is not as it was unpacked."""

    diff_id: str
    images: tuple[str, ...]
    found: str
    outcome: str = ""  # of the repair, where one was asked for


@dataclass(frozen=True, slots=True)
class FsUsage:
    path: Path
    used_bytes: int
    inodes_used: int
    timestamp: int  # ns since the epoch


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer to have: what it shall be, and the worker's request that gets it."""

    content: Content
    request: dict[str, Any]
    registry: str = ""

    @property
    def id(self) -> str:
        return self.content.id

    @property
    def size_bytes(self) -> int:
        return self.content.blob.size_bytes

    @property
    def digest(self) -> str:
        """Of the blob; "" where nothing tells it."""
        return self.content.blob.digest


class Images:
    """Use `open`."""

    def __init__(
        self, settings: ImageSettings, store: Store, additional: AdditionalStores, database: ThreadPoolExecutor
    ) -> None:
        self._settings = settings
        self._store = store
        self._additional = additional
        self._database = database
        self._directory = LayerDirectory(settings.root)
        self._registries = RegistriesFiles(settings.registries_conf, settings.registries_conf_dir)
        directory = settings.namespaced_auth_dir
        self._namespaced_auth = NamespacedAuth(directory) if directory is not None else None
        self._workers = Workers(settings.max_parallel_layers, settings.progress_timeout_s)
        files = PolicyFiles(settings.policy, settings.policy_dir, settings.registries_d)
        self._acceptance = Acceptance(files, self._workers, self._timeouts())
        self._slots = Slots(settings.max_parallel_layers, settings.registry_limits)
        self._syncs = GroupSync(partial(self._workers.call, {"verb": "sync", "path": str(settings.root)}))
        self._partials: Counter[str] = Counter()  # names of the blobs that are being fetched
        self._suspects: set[str] = set()  # layers to verify before they are used
        self._checks: Joined[str, str] = Joined()
        self._pins: dict[str, bool] = {}
        self._cancelled: set[object] = set()  # pulls that were ended by `cancel`
        self._catalog = asyncio.Lock()  # held while database and memory take in one change of images or names
        self._pulls: Joined[object, Image] = Joined()
        self._layer_work: Joined[str, None] = Joined()
        self._progress: dict[object, Progress] = {}
        self._images: dict[str, Image] = {}
        self._names: dict[str, Name] = {}
        self._layers: dict[str, LayerRecord] = {}
        self._layers_of: dict[str, tuple[str, ...]] = {}  # also of images removed but held
        self._references = References()
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._settling: dict[str, asyncio.Task[None]] = {}  # layers on their way to the disk
        self._tasks: set[asyncio.Task[Any]] = set()
        self._later: asyncio.TimerHandle | None = None
        self.totals = Totals()

    # ---- life

    @classmethod
    async def open(cls, settings: ImageSettings) -> "Images":
        """The images under `settings.root`; an image that lacks a layer is dropped, what a crash left is discarded.

        Containers that live must `hold` their image anew, then call `sweep`.
        """
        database = ThreadPoolExecutor(1, thread_name_prefix="images.db")
        loop = asyncio.get_running_loop()
        try:
            directory = LayerDirectory(settings.root)
            await loop.run_in_executor(database, directory.prepare)
            store = await loop.run_in_executor(database, Store, settings.root / "images.db")
            boot_id = proc.boot_id()
            additional = await loop.run_in_executor(
                database, open_stores, settings.additional_stores, settings.root, boot_id
            )
            for path, trouble in additional.troubles.items():
                log.error("additional image store %s: %s", path, trouble)
            contents = await loop.run_in_executor(database, _recover, store, directory, additional, boot_id)
        except BaseException:
            database.shutdown()
            raise
        images = cls(settings, store, additional, database)
        images._take(contents)
        if images._namespaced_auth is not None:
            await asyncio.to_thread(images._namespaced_auth.sweep)
        images._empty_trash(directory.trash())
        return images

    async def close(self) -> None:
        """Ends pulls and workers; what they were making is swept at the next start."""
        if self._later is not None:
            self._later.cancel()
        await self._pulls.cancel_all()
        await self._layer_work.cancel_all()
        await self._checks.cancel_all()
        if self._settling:  # whole layers are worth the wait for the disk
            await asyncio.wait(self._settling.values(), timeout=_SETTLE_S)
        await self._syncs.close()
        await self._workers.close()
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._db(self._store.close)
        await self._db(self._additional.close)
        await self._db(self._directory.end)
        self._database.shutdown()

    # ---- look-ups, from memory

    def list(self, reference: str = "") -> tuple[Image, ...]:
        """All images, or the one that `reference` names."""
        if not reference:
            return tuple(image for image in self._all() if self._is_whole(image))
        found = self.find(reference)
        return () if found is None else (found,)

    def find(self, reference: str) -> Image | None:
        """The image with this id (or a unique prefix of it), tag or digest; None also for what is no reference."""
        found = self._find(reference)
        return found if found is not None and self._is_whole(found) else None

    def _is_whole(self, image: Image) -> bool:
        """Whether all its layers are here: one that was found damaged is not until it has been fetched again."""
        return all(self._layer(diff_id) is not None for diff_id in self._stack(image.id) or ())

    def _find(self, reference: str) -> Image | None:
        if references.is_image_id(reference):
            return self._known(f"sha256:{reference.removeprefix('sha256:')}")
        if (known := self._known(reference)) is not None:
            return known
        try:
            parsed = references.with_default_tag(references.parse(reference))
        except InvalidArgument:
            return self._by_id_prefix(reference)
        for candidate in self._local_meanings(parsed):
            name = self._name(f"{candidate.name}@{candidate.digest}" if candidate.digest else candidate.tagged)
            if name is not None:
                return self._known(name.image_id)
            if candidate.digest and (found := self._by_manifest(candidate)) is not None:
                return found
        return self._by_id_prefix(reference)

    def resolve(self, reference: str) -> Image:
        """As `find`; raises NotFound."""
        found = self.find(reference)
        if found is None:
            raise NotFound(f"image {reference} is not on this node")
        return found

    def layer_paths(self, image_id: str) -> tuple[Path, ...]:
        """The trees to mount, lowest first; also of an image that was removed while a container held it."""
        layers = self._stack(image_id)
        if layers is None:
            raise NotFound(f"image {image_id} is not on this node")
        return tuple(self._tree(diff_id) for diff_id in layers)

    def pulls(self) -> tuple[Progress, ...]:
        """How far each pull and load under way is."""
        return tuple(self._progress.values())

    @property
    def waiting(self) -> int:
        """How many layers wait for their turn."""
        return self._slots.waiting

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """The worker processes there are now, idle ones too."""
        return tuple(self._workers.pids)

    async def raw_documents(self, image_id: str) -> tuple[str, str]:
        """Config and manifest as they were pulled; "" where the source had none, as config also of an artifact."""
        record = await self._record(image_id)
        if record is None:
            raise NotFound(f"image {image_id} is not on this node")
        return record.config, record.manifest

    @property
    def additional_stores(self) -> tuple[State, ...]:
        """What each additional store has to offer, and what is wrong with it."""
        return self._additional.states

    async def fs_usage(self) -> FsUsage:
        used, inodes = total(self._layers.values())
        return FsUsage(self._settings.root, used, inodes, time.time_ns())

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
        key = (str(parsed), credentials, platform, namespace, policy)
        progress = self._progress.setdefault(key, Progress(str(parsed)))
        if on_progress is not None:
            progress.listeners.append(on_progress)
        try:
            return await self._pulls.run(
                key, lambda: self._pull(key, parsed, credentials, platform, namespace, policy, progress)
            )
        except asyncio.CancelledError as error:
            if key in self._cancelled and not _is_being_cancelled():
                raise Unavailable(f"the pull of {parsed} was cancelled by the node's administrator") from error
            raise
        finally:
            if on_progress is not None:
                progress.listeners.remove(on_progress)

    async def _pull(
        self,
        key: object,
        parsed: Reference,
        credentials: Credentials | None,
        platform: str | None,
        namespace: str,
        policy: Path | None,
        progress: Progress,
    ) -> Image:
        self._cancelled.discard(key)
        try:
            auth_file = await self._auth_file(namespace, parsed)
            conf = await asyncio.to_thread(self._registries.current)
            meanings = conf.qualified(parsed)
            for at, meaning in enumerate(meanings):
                try:
                    return await self._pull_qualified(meaning, credentials, auth_file, platform, policy, progress)
                except (NotFound, PermissionDenied, Unavailable) as error:
                    if at == len(meanings) - 1:
                        raise
                    log.info("%s is not at %s: %s", parsed, meaning.registry, error)
            raise NotFound(f"image {parsed} has no place to be asked for")
        finally:
            self._progress.pop(key, None)

    async def _auth_file(self, namespace: str, image: Reference) -> AuthFile | Path | None:
        """The namespace's own for this pull, where there is one: then the node's is not asked."""
        if self._namespaced_auth is not None and namespace:
            own = await asyncio.to_thread(self._namespaced_auth.take, namespace, image)
            if own is not None:
                log.info("pulling %s with the credentials of namespace %s", image, namespace)
                return own
        return self._settings.auth_file

    async def _pull_qualified(
        self,
        wanted: Reference,
        credentials: Credentials | None,
        auth_file: AuthFile | Path | None,
        platform: str | None,
        policy: Path | None,
        progress: Progress,
    ) -> Image:
        asked = await self._acceptance.of_pull(wanted, policy)
        sources = await self._sources(wanted, credentials, auth_file)
        resolved = await self._workers.call(
            {
                "verb": "resolve",
                "name": str(wanted),
                "reference": wanted.digest or wanted.tag,
                "platform": platform or str(host_platform()),
                "sources": sources,
                "keys_path": self._keys_path,
                **asked,
                **self._timeouts(),
            }
        )
        described = await self._described(resolved, f"image {wanted}")
        best = [sources[resolved["source"]], *(each for each in sources if each is not sources[resolved["source"]])]
        layers = [self._remote_layer(content, best, resolved["session"]) for content in described.contents]
        origin = acceptance.origin_of_pull(wanted, resolved)
        return await self._complete(resolved, described, layers, _names(wanted, resolved["digest"]), origin, progress)

    def _remote_layer(self, content: Content, sources: Sequence[dict[str, Any]], session: dict[str, Any]) -> _Layer:
        host = sources[0]["host"]
        limit = self._slots.limit(host)
        request = {
            **self._layer_request(content),
            "sources": sources,
            "session": session,
            "size_bytes": content.blob.size_bytes,
            "partial": str(self._directory.partial(content.partial)),
            **self._timeouts(),
        }
        if limit is not None and limit.bytes_per_s:
            request["pace"] = {"path": str(self._directory.pace(host)), "bytes_per_s": limit.bytes_per_s}
        return _Layer(content, request, host)

    def _layer_request(self, content: Content) -> dict[str, Any]:
        """What a worker must know of a layer, wherever its bytes come from."""
        blob = content.blob
        encryption = {"annotations": dict(blob.annotations), "keys_path": self._keys_path}
        return {
            "verb": "layer",
            "id": content.id,
            "digest": blob.digest,
            "diff_id": content.diff_id,
            "file": content.file,
            "encryption": encryption if blob.is_encrypted else None,
        }

    @property
    def _keys_path(self) -> str:
        return str(self._settings.decryption_keys_path or "")

    async def _sources(
        self, wanted: Reference, credentials: Credentials | None, auth_file: AuthFile | Path | None
    ) -> Sequence[dict[str, Any]]:
        conf = await asyncio.to_thread(self._registries.current)
        sources = []
        for endpoint in conf.endpoints(wanted):
            known = await auth.for_endpoint(endpoint, wanted.registry, credentials, auth_file, conf.credential_helpers)
            sources.append(
                {
                    "host": endpoint.host,
                    "repository": endpoint.repository,
                    "insecure": endpoint.insecure,
                    "certs_dir": str(self._settings.certs_dir or ""),
                    "credentials": known.to_json() if known is not None else None,
                }
            )
        return sources

    def _timeouts(self) -> dict[str, Any]:
        settings = self._settings
        return {"timeouts": {"connect_s": settings.connect_timeout_s, "read_s": settings.read_timeout_s}}

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
            await asyncio.shield(self._discard(scratch))

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
            described = await self._described(image, f"image in {path}")
            layers = [
                _Layer(content, {**self._layer_request(content), "extent": extent})
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
            if any(layer_id.startswith("encrypted:") for layer_id in self._stack(image.id) or ()):
                raise FailedPrecondition(f"{reference} has encrypted layers, which are here in the clear only")
            names.setdefault(image.id, {}).update(dict.fromkeys(self._names_asked_for(reference, image)))
        if not names:
            raise InvalidArgument("no image to save is named")
        progress = Progress(f"save to {path}", "saving", listeners=[on_progress] if on_progress is not None else [])
        layers = [diff_id for image_id in names for diff_id in self._stack(image_id) or ()]
        self._progress[key := object()] = progress
        self._references.claim(layers)
        try:
            return await self._save(
                {image_id: tuple(each) for image_id, each in names.items()}, path, form, credentials, progress
            )
        finally:
            self._references.unclaim(layers)
            self._progress.pop(key, None)
            self._free_later(layers)

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

        request = {"verb": "save", "path": str(path), "temporary": str(temporary), "format": form, "images": images}
        try:
            done = await self._workers.call({**request, **self._timeouts()}, progressed)
        except BaseException:  # a worker that was killed has left something
            await asyncio.to_thread(remove_unfinished, temporary)
            raise
        progress.phase = "done"
        progressed(done)
        return tuple(Saved(**{**image, "names": tuple(image["names"])}) for image in done["images"])

    async def _to_save(self, image_id: str, names: Sequence[str], credentials: Credentials | None) -> dict[str, Any]:
        """What the worker needs to write the image, from its registries or from its layers."""
        record, image = await self._record(image_id), self._known(image_id)
        if record is None or image is None:
            raise NotFound(f"image {image_id} is not on this node any more")
        sources: dict[tuple[str, str], dict[str, Any]] = {}
        for name in self._image_names(image_id) if record.manifest else ():
            try:
                found = await self._sources(references.parse(name), credentials, self._settings.auth_file)
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
                    "tree": str(self._tree(diff_id)),
                    "implied": layer.implied,
                    "size_bytes": layer.size_bytes,
                }
                for diff_id in image.config.diff_ids
                if (layer := self._layer(diff_id)) is not None
            ],
        }

    def _names_asked_for(self, reference: str, image: Image) -> tuple[str, ...]:
        """The name that `reference` is, in full; where it is an id, all tags, or digests where there is no tag."""
        with contextlib.suppress(InvalidArgument):
            for candidate in self._local_meanings(references.with_default_tag(references.parse(reference))):
                if candidate.tagged in image.repo_tags and not candidate.digest:
                    return (candidate.tagged,)
                if candidate.digest and (name := f"{candidate.name}@{candidate.digest}") in image.repo_digests:
                    return (name,)
        return image.repo_tags or image.repo_digests

    # ---- what may run

    async def allow(self, image: Image, name: str, namespace: str) -> None:
        """Accepts that a container of `namespace` runs or mounts the image, which the pod's author called `name`.

        Raises PermissionDenied ("SignatureValidationFailed…") where the policy of the namespace refuses it now, or
        Unavailable ("RegistryUnavailable…") where it demands signatures that are not here and cannot be fetched.
        """
        origins = await self._origins(image.id) or acceptance.origins_of_names(
            (*image.repo_tags, *image.repo_digests), image.manifest_digest
        )
        run = Run(image.id, acceptance.meant(name, self._local_meanings), image.repo_digests, origins)
        newer = await self._acceptance.of_run(
            run, namespace, lambda wanted: self._sources(wanted, None, self._settings.auth_file)
        )
        if newer is not None:
            await self._finished(self._db(self._store.put_origin, image.id, newer))

    async def allow_file(self, path: Path, transport: str, namespace: str) -> None:
        """Accepts that a container of `namespace` is made of a local file. Raises PermissionDenied as `allow` does."""
        await self._acceptance.of_file(path, transport, namespace)

    # ---- from documents to an image

    async def _described(self, found: dict[str, Any], subject: str) -> Described:
        if found["config"]:
            config = await self._config(found["config"], subject)
            layers = [Descriptor(**each) for each in found["layers"]]
            return Described(config, None, image_contents(layers, config, subject))
        artifact = await asyncio.to_thread(artifact_of, found["manifest"], found["media_type"], subject)
        return Described(ImageConfig(), artifact, artifact.files)

    async def _complete(
        self,
        found: dict[str, Any],
        described: Described,
        layers: Sequence[_Layer],
        names: Iterable[tuple[str, bool]],
        origin: Origin,
        progress: Progress,
    ) -> Image:
        """Has all layers here, then records the image and publishes it."""
        by_id = {layer.id: layer for layer in layers}
        missing = [layer for layer_id, layer in by_id.items() if self._layer(layer_id) is None]
        progress.phase = "fetching"
        progress.layers_total += len(by_id)
        progress.layers_done += len(by_id) - len(missing)
        progress.bytes_total += sum(layer.size_bytes for layer in missing)
        progress.layers += [LayerProgress(layer.id, layer.digest, layer.size_bytes) for layer in missing]
        progress.changed()
        self._references.claim(by_id)
        try:
            # The largest first: what is left at the end shall be small.
            by_size = sorted(by_id.values(), key=lambda layer: -layer.size_bytes)
            await _all(self._have_layer(layer, progress) for layer in by_size)
            image_id = found["id"]
            stack = await self._with_implied(image_id, tuple(layer.id for layer in layers))
            self._references.claim(stack)
            try:
                record = ImageRecord(
                    id=image_id,
                    config=found["config"],
                    manifest=found["manifest"],
                    manifest_digest=found["manifest_digest"],
                    media_type=found["media_type"],
                    size_bytes=sum(layer.size_bytes for layer in layers) + _document_bytes(found),
                    layers=stack,
                    pulled_at=time.time_ns(),
                )
                named = [Name(name, image_id, is_digest) for name, is_digest in names]
                image = await self._finished(self._publish(record, described, named, origin))
            finally:
                self._references.unclaim(stack)
        finally:
            self._references.unclaim(by_id)
            self._free_later(by_id, always=sys.exc_info()[0] is not None)
        progress.phase = "done"
        progress.changed()
        return image

    async def _publish(self, record: ImageRecord, described: Described, names: Sequence[Name], origin: Origin) -> Image:
        async with self._catalog:
            await self._db(self._store.put_image, record, names, origin)
            return self._published(record, described, names)

    def _published(self, record: ImageRecord, described: Described, names: Sequence[Name]) -> Image:
        moved_from = {known.image_id for name in names if (known := self._name(name.name)) is not None}
        for name in names:
            self._names[name.name] = name
        self._layers_of[record.id] = record.layers
        self._references.set_image(record.id, record.layers)
        self._images[record.id] = self._image(record, described)
        for image_id in moved_from - {record.id}:
            if image_id in self._images:
                self._images[image_id] = self._renamed(self._images[image_id])
        return self._images[record.id]

    def _rename(self, name: Name | None) -> None:
        """The image that has `name` again is called so."""
        if name is not None and name.image_id in self._images:
            self._images[name.image_id] = self._renamed(self._images[name.image_id])

    async def _have_layer(self, layer: _Layer, progress: Progress) -> None:
        tried = False

        def fetch() -> Coroutine[Any, Any, None]:
            nonlocal tried
            tried = True
            return self._fetch(layer, progress)

        if self._is_suspect(layer.id):
            await self._check(layer.id)
        while self._layer(layer.id) is None:
            if (leaving := self._leaving.get(layer.id)) is not None:
                await asyncio.shield(leaving)
            if (settling := self._settling.get(layer.id)) is not None:
                await asyncio.wait([settling])
                continue
            try:
                await self._layer_work.run(layer.id, fetch)
            except Error:
                if tried:
                    raise
                continue  # another pull's source failed it; ours may not
            progress.layers_done += 1
            progress.arrived(layer.id)

    async def _fetch(self, layer: _Layer, progress: Progress) -> None:
        """Fetches and unpacks one layer in a worker, then commits it. On any error nothing of it stays in sight."""
        shown = progress.layer(layer.id, layer.digest, layer.size_bytes)

        def progressed(now: dict[str, int]) -> None:
            self.totals.fetched_bytes += max(0, now["fetched"] - shown.bytes_fetched)
            shown.phase = LayerPhase.FETCHING if now["fetched"] < layer.size_bytes else LayerPhase.UNPACKING
            progress.count(shown, now["fetched"], now["unpacked"])

        temporary = self._directory.new_temporary(layer.id)
        self._partials[layer.content.partial] += 1
        try:
            async with self._slots.taken(layer.registry, shown), self._syncs.unpacking():
                shown.phase = LayerPhase.FETCHING
                made = await self._workers.call({**layer.request, "directory": str(temporary)}, progressed)
                progressed({"fetched": layer.size_bytes, "unpacked": made["unpacked_bytes"]})
            shown.phase = LayerPhase.COMMITTING
            progress.changed()
            record = LayerRecord(layer.id, made["size_bytes"], made["inodes"], tuple(made["implied"]))
            settling = self._settling[layer.id] = self._spawn(self._settle(temporary, record))
            settling.add_done_callback(lambda _: self._settling.pop(layer.id, None))
            await asyncio.shield(settling)
        except BaseException as error:
            shown.phase = LayerPhase.FAILED
            self.totals.failed_layers += not isinstance(error, asyncio.CancelledError)
            if layer.id not in self._settling:  # what is whole is kept, also of a pull that fails
                self._discard(temporary)
            raise
        finally:
            self._partials[layer.content.partial] -= 1
        self.totals.layers += 1
        shown.phase = LayerPhase.DONE

    async def _settle(self, temporary: Path, record: LayerRecord) -> None:
        """Has an unpacked layer on the disk and on record, also when nobody waits for it any more."""
        try:
            await self._syncs.synced()
            await self._commit(temporary, record)
        except BaseException:
            self._discard(temporary)
            raise

    async def _commit(self, temporary: Path, record: LayerRecord) -> None:
        def commit() -> None:
            self._directory.commit(temporary, record.diff_id)
            self._store.add_layer(record)

        await self._db(commit)
        self._suspects.discard(record.diff_id)
        self._layers[record.diff_id] = record

    async def _with_implied(self, image_id: str, diff_ids: tuple[str, ...]) -> tuple[str, ...]:
        """The image's layers; on top a small one of its own where directories need attributes from lower layers.

        Layers below one that hides all of them are left out.
        """
        diff_ids = await asyncio.to_thread(visible, _without_repeats(diff_ids), self._tree)
        implied = [layer.implied for diff_id in diff_ids if (layer := self._layer(diff_id)) is not None]
        if len(diff_ids) < 2 or not any(implied[1:]):
            return diff_ids  # the lowest has nothing below that could know better
        own = f"implied:{image_id.rpartition(':')[2]}"
        if self._layer(own) is not None:
            return (*diff_ids, own)
        stack = [(self._tree(diff_id), each) for diff_id, each in zip(diff_ids, implied, strict=True)]
        temporary = self._directory.new_temporary(own)
        try:
            inodes = await asyncio.to_thread(make_implied_layer, stack, temporary)
            if not inodes:
                self._discard(temporary)
                return diff_ids
            await self._finished(self._commit(temporary, LayerRecord(own, inodes * 4096, inodes)))
        except BaseException:
            self._discard(temporary)
            raise
        return (*diff_ids, own)

    # ---- pins, cancellation

    async def pin(self, reference: str, pinned: bool) -> Image:
        """Keeps the image from kubelet's garbage collection, or leaves it to that, whatever the configuration says."""
        image = self._ours(self.resolve(reference))

        async def change() -> Image:
            async with self._catalog:
                await self._db(self._store.pin, image.id, pinned)
                self._pins[image.id] = pinned
                self._images[image.id] = self._renamed(self._images[image.id])
                return self._images[image.id]

        return await self._finished(change())

    async def cancel(self, reference: str) -> int:
        """Ends the pulls of `reference` under way; how many. Who waits for them gets Unavailable."""
        wanted = str(references.with_default_tag(references.parse(reference)))
        keys = [key for key, progress in self._progress.items() if progress.reference == wanted]
        for key in keys:
            self._cancelled.add(key)
            await self._pulls.cancel(key)
        return len(keys)

    # ---- damage

    @property
    def suspects(self) -> int:
        """How many layers an unclean shutdown may have damaged that nobody has verified since."""
        return len(self._suspects) + len(self._additional.suspects)

    async def ensure(self, image_id: str) -> None:
        """Has the image's layers as they were unpacked; call it before they are used.

        Only after an unclean shutdown there is something to do. Raises Unavailable where a layer is damaged and could
        not be fetched again: the image is not listed then until it is pulled.
        """
        for diff_id in self._stack(image_id) or ():
            if self._is_suspect(diff_id):
                await self._healed(diff_id)

    async def verify(self, repair: bool = False) -> AsyncIterator[Damage]:
        """Verifies every layer: tells those found damaged, and with `repair` whether they were healed.

        Without `repair` everything stays as it is.
        """
        for diff_id in dict.fromkeys((*self._layers, *self._additional.layers())):
            if self._layer(diff_id) is None or diff_id.startswith("implied:"):
                continue
            names = self._names_with(diff_id)
            damage = await self._damage(diff_id)
            if not damage:
                if self._is_suspect(diff_id):
                    await self._cleared(diff_id)
                continue
            outcome = ""
            if repair and diff_id not in self._layers:
                outcome = f"not repaired: it is in an additional store, {self._tree(diff_id).parents[2]}"
            elif repair and self._is_mounted(diff_id):
                outcome = "not repaired: containers run from it"
            elif repair:
                try:
                    await self._lose(diff_id, damage)
                    await self._heal(diff_id)
                    outcome = "repaired"
                except Error as error:
                    outcome = f"not repaired: {error}; no longer listed, to be pulled again"
            yield Damage(diff_id, names, damage, outcome)

    async def _healed(self, diff_id: str) -> None:
        await self._check(diff_id)
        if self._layer(diff_id) is None:
            await self._heal(diff_id)

    async def _check(self, diff_id: str) -> None:
        """Verifies a suspect; a damaged layer is no longer there, and images with it are not listed."""
        damage = await self._checks.run(diff_id, lambda: self._damage(diff_id))
        if not self._is_suspect(diff_id):
            return  # another caller has drawn the conclusion
        if damage:
            await self._finished(self._lose(diff_id, damage))
        else:
            await self._cleared(diff_id)

    async def _damage(self, diff_id: str) -> str:
        if diff_id.startswith("implied:"):
            return ""  # directories alone: that they are there is all there is to verify, and the start did
        done = await self._workers.call({"verb": "verify", "directory": str(self._tree(diff_id).parent)}, _ignored)
        damage: str = done["damage"]
        return damage

    async def _cleared(self, diff_id: str) -> None:
        if diff_id not in self._layers:
            self._additional.suspects.discard(diff_id)
            return
        self._suspects.discard(diff_id)
        await self._db(self._store.clear, diff_id)

    async def _lose(self, diff_id: str, damage: str) -> None:
        log.error("layer %s is damaged and will be fetched again: %s", diff_id, damage)
        self.totals.damaged_layers += 1
        if diff_id not in self._layers:
            self._additional.lose(diff_id)
            return
        self._suspects.discard(diff_id)
        self._layers.pop(diff_id, None)
        await self._drop_layers([diff_id])

    async def _heal(self, diff_id: str) -> None:
        """Fetches a lost layer for the images that have it; those of which nobody has it any more go."""
        troubles = []
        for image_id in self._images_with(diff_id):
            for name in self._image_names(image_id):
                try:
                    layer = await self._layer_of(image_id, diff_id, references.parse(name))
                    await self._have_layer(layer, Progress(f"repair of {name}"))
                    if image_id not in self._layers_of:
                        self._references.claim([diff_id])  # an additional store's image needs it from now on
                    return
                except Error as error:
                    troubles.append(str(error))
        for image_id in self._images_with(diff_id):
            if image_id in self._images:
                await self._finished(self._remove(image_id, keep_layers=True))
        reason = troubles[0] if troubles else "none of its images has a name to fetch it by"
        raise Unavailable(
            f"layer {diff_id} was damaged by an unclean shutdown and could not be fetched again: {reason}"
        )

    async def _layer_of(self, image_id: str, layer_id: str, name: Reference) -> _Layer:
        """How to fetch one layer of an image that is here, from where `name` points to."""
        record = await self._record(image_id)
        if record is None or not record.manifest:
            raise NotFound(f"image {image_id} has no manifest that tells its layers' digests")
        subject = f"image {image_id}"
        manifest = parse(record.manifest.encode(), record.media_type, subject)
        assert isinstance(manifest, Manifest)  # an index is never recorded
        if record.is_artifact:
            found = artifact_contents(manifest, subject).files
        else:
            found = image_contents(manifest.layers, await self._config(record.config, subject), subject)
        wanted = next(content for content in found if content.id == layer_id)
        return self._remote_layer(wanted, await self._sources(name, None, self._settings.auth_file), {})

    def _image_names(self, image_id: str) -> tuple[str, ...]:
        image = self._known(image_id)
        return () if image is None else (*image.repo_digests, *image.repo_tags)

    def _names_with(self, diff_id: str) -> tuple[str, ...]:
        """The images that have the layer, by name, else by id."""
        return tuple((*self._image_names(image_id), image_id)[0] for image_id in self._images_with(diff_id))

    def _is_mounted(self, diff_id: str) -> bool:
        return any(self._references.is_held(image_id) for image_id in self._images_with(diff_id))

    def _images_with(self, diff_id: str) -> Sequence[str]:
        known = dict.fromkeys((*self._layers_of, *self._additional.images))
        return [image_id for image_id in known if diff_id in (self._stack(image_id) or ())]

    # ---- removal

    async def remove(self, reference: str) -> None:
        """Takes the image away with all its names; what it alone used is freed, at once or with its last container.

        An image that is not there is success (api.proto, RemoveImage). One that an additional store has too goes on
        being there. Raises FailedPrecondition where only such a store has it.
        """
        image = self._find(reference)
        if image is not None:
            await self._finished(self._remove(self._ours(image).id))

    async def _remove(self, image_id: str, keep_layers: bool = False) -> None:
        async with self._catalog:
            if image_id not in self._images:
                return
            await self._db(self._store.retire_image, image_id)
            del self._images[image_id]
            for name in [name for name in self._names.values() if name.image_id == image_id]:
                del self._names[name.name]
                self._rename(self._name(name.name))
        await self._forget_unheld(image_id, keep_layers)

    async def _forget_unheld(self, image_id: str, keep_layers: bool = False) -> None:
        """Ends an image that was removed, unless a container still holds it; its layers may wait for a next pull."""
        async with self._catalog:
            if self._references.is_held(image_id) or image_id in self._images or image_id not in self._layers_of:
                return
            layers = self._layers_of.pop(image_id)
            self._references.drop_image(image_id)
            await self._db(self._store.remove_image, image_id)
        if keep_layers:
            self._free_later(layers)
        else:
            self._free(layers)

    def hold(self, image_id: str, holder: str) -> None:
        """`holder` (a container's id) uses the image's layers until `release`, also when the image is removed."""
        if self._stack(image_id) is None:
            raise NotFound(f"image {image_id} is not on this node")
        self._references.hold(image_id, holder)

    def release(self, holder: str) -> None:
        image_id = self._references.release(holder)
        if image_id is not None and image_id not in self._images:
            self._spawn(self._forget_unheld(image_id))

    async def sweep(self) -> None:
        """Frees what no image and no container needs; call it once the containers that live hold their images.

        Layers of pulls that were cut short still wait for the next try, as after any failed pull.
        """
        for image_id in [image_id for image_id in self._layers_of if image_id not in self._images]:
            await self._forget_unheld(image_id)
        self._free_later(self._layers, always=True)

    def _free_later(self, layers: Iterable[str], always: bool = False) -> None:
        """Layers of a pull that failed wait a while, so that the next try need not fetch them again."""
        if self._later is None and (always or self._references.unneeded(layers)):
            loop = asyncio.get_running_loop()
            self._later = loop.call_later(self._settings.keep_partial_s, self._free_now)

    def _free_now(self) -> None:
        self._later = None
        self._free(self._layers)
        self._spawn(self._db(self._directory.drop_partials, [name for name, count in self._partials.items() if count]))

    def _free(self, layers: Iterable[str]) -> None:
        unneeded = [diff_id for diff_id in self._references.unneeded(tuple(layers)) if diff_id in self._layers]
        if not unneeded:
            return
        for diff_id in unneeded:
            del self._layers[diff_id]
        task = self._spawn(self._drop_layers(unneeded))
        self._leaving.update(dict.fromkeys(unneeded, task))

    async def _drop_layers(self, diff_ids: Sequence[str]) -> None:
        def drop() -> Sequence[Path]:
            self._store.remove_layers(diff_ids)  # first: a record without its layer would be a lie
            return [gone for diff_id in diff_ids if (gone := self._directory.discard_layer(diff_id)) is not None]

        try:
            gone = await self._db(drop)
        finally:
            for diff_id in diff_ids:
                self._leaving.pop(diff_id, None)
        self._empty_trash(gone)

    def _discard(self, path: Path) -> asyncio.Task[None]:
        async def discard() -> None:
            gone = await self._db(self._directory.discard, path)
            if gone is not None:
                self._empty_trash([gone])

        return self._spawn(discard())

    def _empty_trash(self, paths: Sequence[Path]) -> None:
        async def remove() -> None:
            with contextlib.suppress(Unavailable):  # closing: the next start does it
                await self._workers.call({"verb": "remove", "paths": [str(path) for path in paths]})

        if paths:
            self._spawn(remove())

    # ---- inside

    def _take(self, contents: Contents) -> None:
        self._layers = {layer.diff_id: layer for layer in contents.layers}
        self._suspects = set(contents.suspects)
        self._pins = dict(contents.pins)
        self._names = {name.name: name for name in contents.names}
        for record in contents.images:
            self._layers_of[record.id] = record.layers
            self._references.set_image(record.id, record.layers)
            if not record.removed:
                self._images[record.id] = self._image(record, described_by(record))

    def _image(self, record: ImageRecord, described: Described) -> Image:
        return self._renamed(
            Image(
                id=record.id,
                repo_tags=(),
                repo_digests=(),
                size_bytes=record.size_bytes,
                config=described.config,
                manifest_digest=record.manifest_digest,
                pulled_at=record.pulled_at,
                artifact=described.artifact,
            )
        )

    def _renamed(self, image: Image) -> Image:
        """`image` with the names that point to it now."""
        names = [name for name in self._names.values() if name.image_id == image.id]
        shared = [name for name in self._additional.names.values() if name.image_id == image.id]
        names += [name for name in shared if name.name not in self._names]
        tags = tuple(name.name for name in names if not name.is_digest)
        digests = tuple(name.name for name in names if name.is_digest)
        return replace(
            image,
            repo_tags=tags,
            repo_digests=digests,
            pinned=image.store is not None or self._pins.get(image.id, self._is_pinned((*tags, *digests))),
        )

    def _is_pinned(self, names: tuple[str, ...]) -> bool:
        return any(fnmatchcase(name, pattern) for name in names for pattern in self._settings.pinned_images)

    def _local_meanings(self, parsed: Reference) -> tuple[Reference, ...]:
        """What a short name may mean, by the configuration that was read last, and Docker Hub's rule."""
        if not parsed.is_short:
            return (parsed,)
        try:
            meanings = self._registries.last().qualified(parsed)
        except Error:
            meanings = ()
        return (*meanings, references.with_registry(parsed, references.DOCKER_HUB))

    def _by_id_prefix(self, text: str) -> Image | None:
        prefix = "sha256:" + text.removeprefix("sha256:")
        if len(prefix) < len("sha256:") + _ID_PREFIX_LENGTH:
            return None
        found = [image for image in self._all() if image.id.startswith(prefix)]
        return found[0] if len(found) == 1 else None

    def _by_manifest(self, wanted: Reference) -> Image | None:
        """The image whose own manifest has the digest, where it was pulled through an index of the same repository."""
        for image in self._all():
            if image.manifest_digest == wanted.digest:
                names = (*image.repo_tags, *image.repo_digests)
                if any(name.startswith((f"{wanted.name}:", f"{wanted.name}@")) for name in names):
                    return image
        return None

    # ---- ours, else an additional store's

    def _all(self) -> Iterator[Image]:
        yield from self._images.values()
        for image_id in self._additional.images:
            if image_id not in self._images:
                yield self._resolved(image_id)

    def _known(self, image_id: str) -> Image | None:
        if image_id in self._images:
            return self._images[image_id]
        return self._resolved(image_id) if image_id in self._additional.images else None

    def _resolved(self, image_id: str) -> Image:
        """An additional store's image, with the names that no image of ours has; pinned, so that kubelet leaves it."""
        found = self._additional.images[image_id]
        return self._renamed(
            Image(
                id=found.id,
                repo_tags=(),
                repo_digests=(),
                size_bytes=found.size_bytes,
                config=found.config,
                manifest_digest=found.manifest_digest,
                pulled_at=found.pulled_at,
                artifact=found.artifact,
                store=found.store,
            )
        )

    def _ours(self, image: Image) -> Image:
        """`image`, which is to be changed. Raises FailedPrecondition where only an additional store has it."""
        if image.store is not None:
            raise FailedPrecondition(f"image {image.id} is in the additional store {image.store}, which is read-only")
        return image

    def _name(self, name: str) -> Name | None:
        return self._names.get(name) or self._additional.names.get(name)

    def _stack(self, image_id: str) -> tuple[str, ...] | None:
        """The image's layers, lowest first."""
        if image_id in self._layers_of:
            return self._layers_of[image_id]
        found = self._additional.images.get(image_id)
        return None if found is None else found.layers

    def _layer(self, diff_id: str) -> LayerRecord | None:
        return self._layers.get(diff_id) or self._additional.layer(diff_id)

    def _tree(self, diff_id: str) -> Path:
        """What is mounted of the layer; where ours would be, if nobody has it."""
        directory = None if diff_id in self._layers else self._additional.directory(diff_id)
        return self._directory.path(diff_id) if directory is None else directory / "diff"

    def _is_suspect(self, diff_id: str) -> bool:
        return diff_id in (self._suspects if diff_id in self._layers else self._additional.suspects)

    async def _record(self, image_id: str) -> ImageRecord | None:
        return await self._db(self._store.image, image_id) or await self._db(self._additional.record, image_id)

    async def _origins(self, image_id: str) -> tuple[Origin, ...]:
        return await self._db(self._store.origins, image_id) or await self._db(self._additional.origins, image_id)

    async def _config(self, text: str, subject: str) -> ImageConfig:
        parse = partial(oci.image.from_json, text, f"config of {subject}")
        return await asyncio.to_thread(parse) if len(text) > _LARGE_CONFIG else parse()

    async def _db(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._database, partial(function, *args))

    async def _finished(self, change: Coroutine[Any, Any, T]) -> T:
        """Runs a change of the store to its end, also when the caller is cancelled."""
        return await asyncio.shield(self._spawn(change))

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _recover(store: Store, directory: LayerDirectory, additional: AdditionalStores, boot_id: str) -> Contents:
    """What is whole: layers with record and directory, images with all their layers. The rest goes.

    An image whose layers may be in an additional store that cannot be used now stays on record, unlisted.
    """
    unended = directory.unended()
    if unended is not None and unended != boot_id:
        log.warning("the last daemon ended with the machine: image layers are verified before they are used")
        store.suspect_all()
    directory.begin(boot_id)  # not before the suspects are on record: a start that is cut short here must not lose them
    if unended == boot_id:
        for temporary, unpacked in directory.unpacked():  # whole in memory: a killed daemon takes nothing of that along
            sync_filesystem(temporary)
            directory.commit(temporary, unpacked.diff_id)
            store.add_layer(unpacked)
    contents = store.load()
    layers = [layer for layer in contents.layers if directory.path(layer.diff_id).is_dir()]
    known = {layer.diff_id for layer in layers}
    if lost := [layer.diff_id for layer in contents.layers if layer.diff_id not in known]:
        store.remove_layers(lost)
    images = []
    for image in contents.images:
        missing = [diff_id for diff_id in image.layers if diff_id not in known and additional.layer(diff_id) is None]
        may_return = additional.troubles and not set(missing).intersection(lost)
        if (not missing or may_return) and _is_readable(image):
            images.append(image)
        else:
            log.error("image %s lacks a layer or has a broken config; it must be pulled again", image.id)
            store.remove_image(image.id)
    directory.sweep(known)
    ids = {image.id for image in images}
    names = tuple(name for name in contents.names if name.image_id in ids)
    return Contents(tuple(layers), tuple(images), names, contents.suspects & known, contents.pins)


def _is_being_cancelled() -> bool:
    """Whether the task that runs is itself cancelled, not only what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _ignored(_: dict[str, int]) -> None:
    """Progress that nobody is shown."""


def _is_readable(image: ImageRecord) -> bool:
    try:
        described_by(image)
    except Error:
        return False
    return True


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


def _document_bytes(found: dict[str, Any]) -> int:
    """The size of what describes an image; of an artifact, whose config is no matter, that is its manifest."""
    return len((found["config"] or found["manifest"]).encode())


def _without_repeats(diff_ids: tuple[str, ...]) -> tuple[str, ...]:
    """Each layer once, where it comes last: what it has hides its earlier self, and overlayfs takes none twice."""
    return tuple(dict.fromkeys(reversed(diff_ids)))[::-1]


async def _all(work: Iterable[Awaitable[None]]) -> None:
    """Waits for all; the first error ends the others, and is raised as it is."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
