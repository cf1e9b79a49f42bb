"""Image stores that are there to be used and not to be changed: baked into the node's image, or mounted from elsewhere.

Each is the `images` directory of another daemon's root: images.db and layers/. None is ever written to; what is wrong
with one is told, and the node goes on with the others. What reads files is synchronous, for a worker thread; look-ups
answer from memory.
"""

import fcntl
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir

from cri.image_service.contents import Artifact, described_by
from cri.image_service.snapshots import LayerDirectory
from cri.image_service.store import Contents, ImageRecord, LayerRecord, Name, Origin, opened_read_only
from oci.errors import Error, FailedPrecondition
from oci.image import ImageConfig


@dataclass(frozen=True, slots=True)
class State:
    """What a store has to offer, and why not."""

    path: Path
    images: int = 0
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class AdditionalImage:
    """An image of one of the stores, without its documents."""

    store: Path
    id: str
    config: ImageConfig
    artifact: Artifact | None
    manifest_digest: str
    size_bytes: int
    layers: tuple[str, ...]
    pulled_at: int


@dataclass(frozen=True, slots=True)
class _Layer:
    record: LayerRecord
    directory: Path


@dataclass(slots=True)
class AdditionalStores:
    """All of them as one; where two have the same image, layer or name, the first one's counts. Use `open_stores`."""

    states: tuple[State, ...] = ()
    images: dict[str, AdditionalImage] = field(default_factory=dict)
    names: dict[str, Name] = field(default_factory=dict)
    suspects: set[str] = field(default_factory=set)  # layers to verify before they are used, after each start
    _layers: dict[str, _Layer] = field(default_factory=dict)
    _locks: ExitStack = field(default_factory=ExitStack)
    _scratch: Path = Path("/")

    @property
    def troubles(self) -> Mapping[Path, str]:
        return {state.path: state.trouble for state in self.states if state.trouble}

    def layer(self, diff_id: str) -> LayerRecord | None:
        found = self._layers.get(diff_id)
        return None if found is None else found.record

    def directory(self, diff_id: str) -> Path | None:
        """The layer's directory: its tree, and the list of its files."""
        found = self._layers.get(diff_id)
        return None if found is None else found.directory

    def layers(self) -> tuple[str, ...]:
        return tuple(self._layers)

    def lose(self, diff_id: str) -> None:
        """The layer is damaged: it is not used any more."""
        self.suspects.discard(diff_id)
        self._layers.pop(diff_id, None)

    def record(self, image_id: str) -> ImageRecord | None:
        """The image with its documents, read anew. Raises FailedPrecondition where the store is gone meanwhile."""
        known = self.images.get(image_id)
        if known is None:
            return None
        with opened_read_only(known.store / "images.db", self._scratch) as reader:
            return reader.image(image_id)

    def origins(self, image_id: str) -> tuple[Origin, ...]:
        """Where the image came from, read anew. Raises FailedPrecondition where the store is gone meanwhile."""
        known = self.images.get(image_id)
        if known is None:
            return ()
        with opened_read_only(known.store / "images.db", self._scratch) as reader:
            return reader.origins(image_id)

    def close(self) -> None:
        self._locks.close()

    def _take(self, path: Path, contents: Contents, is_whole: bool) -> State:
        directory = LayerDirectory(path)
        known = {each.diff_id for each in contents.layers if directory.path(each.diff_id).is_dir()}
        for layer in contents.layers:
            if layer.diff_id in known and layer.diff_id not in self._layers:
                self._layers[layer.diff_id] = _Layer(layer, directory.layer(layer.diff_id))
                if not is_whole or layer.diff_id in contents.suspects:
                    self.suspects.add(layer.diff_id)
        wanted = [each for each in contents.images if not each.removed]
        images = [made for each in wanted if known.issuperset(each.layers) and (made := _image(path, each))]
        for image in images:
            self.images.setdefault(image.id, image)
        ids = {image.id for image in images}
        for name in contents.names:
            if name.image_id in ids:
                self.names.setdefault(name.name, name)
        broken = len(wanted) - len(images)
        return State(path, len(images), f"{broken} of its images lack layers or have a broken config" if broken else "")


def open_stores(paths: Iterable[Path], scratch: Path, boot_id: str) -> AdditionalStores:
    """The stores at `paths`. While they are open no daemon can begin to change one on this machine.

    `scratch` is a directory of ours for copies of what cannot be read without writing.
    """
    stores = AdditionalStores(_scratch=scratch)
    states = []
    for path in paths:
        try:
            state = _open(stores, path, boot_id)
        except Error as error:
            state = State(path, trouble=str(error))
        except (OSError, ValueError, TypeError) as error:  # a bad sector; rows that none of ours has written
            state = State(path, trouble=f"cannot be read: {error}")
        states.append(state)
    stores.states = tuple(states)
    return stores


def examine(paths: Iterable[Path]) -> tuple[State, ...]:
    """What there is to say about the stores at `paths`, with nothing kept open."""
    stores = open_stores(paths, Path(gettempdir()), "")
    stores.close()
    return stores.states


def _open(stores: AdditionalStores, path: Path, boot_id: str) -> State:
    database = path / "images.db"
    if not database.exists():
        hint = f"; is {path / 'images'} meant?" if (path / "images/images.db").exists() else ""
        raise FailedPrecondition(f"there is no {database}{hint}")
    _lock(path, stores._locks)
    with opened_read_only(database, stores._scratch) as reader:
        contents = reader.load()
    return stores._take(path, contents, _ended_well(path, boot_id))


def _lock(path: Path, locks: ExitStack) -> None:
    """Keeps daemons of this machine from the root whose store it is. Raises FailedPrecondition where one is at work."""
    with suppress(FileNotFoundError):
        fd = os.open(path.parent / "crito.lock", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise FailedPrecondition(f"a daemon is at work in {path.parent}") from error
        locks.callback(os.close, fd)


def _ended_well(path: Path, boot_id: str) -> bool:
    """Whether all data is there that is on record: not where a daemon's end was the machine's, or the copy's time."""
    try:
        return (path / "running").read_text() == boot_id
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _image(path: Path, record: ImageRecord) -> AdditionalImage | None:
    """None where its documents cannot be read."""
    try:
        described = described_by(record)
    except Error:
        return None
    return AdditionalImage(
        path,
        record.id,
        described.config,
        described.artifact,
        record.manifest_digest,
        record.size_bytes,
        record.layers,
        record.pulled_at,
    )
