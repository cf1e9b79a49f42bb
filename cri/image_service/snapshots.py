"""Layers on the disk, and who needs them: images, containers, and pulls under way. What nobody needs goes.

root/layers/<hex of the diff ID>/diff   a committed layer, with a record in images.db
root/layers/<kind>-<hex>/diff           one that is known otherwise than by its diff ID: see contents.py, implied.py
root/layers/<hex>.tmp-<random>/         being unpacked, or left by a crash: swept at the next start
root/trash/<random>                     on its way out
root/partial/<digest or id>             what has come of a blob, for the next try should this one be cut short
root/pace/<registry>                    how far ahead of a registry's rate its workers are
root/running                            the boot id of the daemon at work; gone after a clean end
"""

import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from cri.image_service.store import LayerRecord
from cri.image_service.unpack import is_opaque
from oci.errors import NotFound

_KNOWN_ALGORITHMS = ("sha256", "sha512", "implied", "encrypted", "artifact")


class LayerDirectory:
    """Where layers lie; synchronous, for a worker thread."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._layers = root / "layers"
        self._trash = root / "trash"
        self._partial = root / "partial"
        self._pace = root / "pace"
        self._running = root / "running"

    def prepare(self) -> None:
        for directory in (self._layers, self._trash, self._partial, self._pace):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def unended(self) -> str | None:
        """The boot of a daemon that began here and did not end; None where there was none."""
        try:
            return self._running.read_text()
        except FileNotFoundError:
            return None

    def begin(self, boot_id: str) -> None:
        """Marks the store as in use."""
        with self._running.open("w") as file:
            file.write(boot_id)
            file.flush()
            os.fsync(file.fileno())
        _fsync_directory(self._running.parent)

    def end(self) -> None:
        """Takes the mark away."""
        self._running.unlink(missing_ok=True)

    def layer(self, diff_id: str) -> Path:
        """The layer's directory: its tree, and the list of its files."""
        return self._layers / directory_name(diff_id)

    def partial(self, name: str) -> Path:
        return self._partial / name.replace(":", "-")

    def pace(self, host: str) -> Path:
        return self._pace / host.replace("/", "-")

    def drop_partials(self, wanted: Iterable[str]) -> None:
        """Removes what has come of blobs, except of those with these names."""
        keep = {self.partial(name) for name in wanted}
        for path in self._partial.iterdir():
            if path not in keep:
                path.unlink(missing_ok=True)

    def path(self, diff_id: str) -> Path:
        """The tree that is mounted as a lower directory."""
        return self._layers / directory_name(diff_id) / "diff"

    def new_temporary(self, name: str) -> Path:
        return self._layers / f"{directory_name(name)}.tmp-{secrets.token_hex(4)}"

    def commit(self, temporary: Path, diff_id: str) -> None:
        """Gives a layer its final name, durably. Its data has been synced."""
        final = self._layers / directory_name(diff_id)
        if final.exists():
            self.discard(final)  # a crash came between name and record
        unpacked_path(temporary).unlink(missing_ok=True)
        temporary.rename(final)
        _fsync_directory(self._layers)

    def discard(self, path: Path) -> Path | None:
        """Moves a directory out of sight, at once; where to, for the slow removal. None where there was none."""
        gone = self._trash / secrets.token_hex(8)
        try:
            path.rename(gone)
        except FileNotFoundError:
            return None
        return gone

    def discard_layer(self, diff_id: str) -> Path | None:
        return self.discard(self._layers / directory_name(diff_id))

    def unpacked(self) -> list[tuple[Path, LayerRecord]]:
        """What a killed daemon had unpacked and verified but not committed. Only true in the same boot."""
        found = []
        for path in self._layers.glob("*.tmp-*"):
            with suppress(FileNotFoundError, ValueError, KeyError):
                done = json.loads(unpacked_path(path).read_text())
                found.append(
                    (path, LayerRecord(done["diff_id"], done["size_bytes"], done["inodes"], tuple(done["implied"])))
                )
        return found

    def sweep(self, known: Iterable[str]) -> None:
        """Discards every directory that is no layer of `known`."""
        wanted = {directory_name(diff_id) for diff_id in known}
        for path in self._layers.iterdir():
            if path.name not in wanted:
                self.discard(path)

    def trash(self) -> list[Path]:
        return list(self._trash.iterdir())


def unpacked_path(directory: Path) -> Path:
    """Where a worker tells that a layer is whole, before it is committed."""
    return directory / "unpacked.json"


def directory_name(diff_id: str) -> str:
    """A layer's directory: the hex alone for sha256, which practically all are."""
    algorithm, _, encoded = diff_id.partition(":")
    if algorithm not in _KNOWN_ALGORITHMS or not encoded.isalnum():
        raise NotFound(f"{diff_id!r} is not a layer's diff ID")
    return encoded if algorithm == "sha256" else f"{algorithm}-{encoded}"


def _fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class References:
    """Who needs which layer: counted from live objects alone, in memory, never stored."""

    def __init__(self) -> None:
        self._layers_of: dict[str, tuple[str, ...]] = {}  # by image id
        self._holders: dict[str, str] = {}  # holder -> image id
        self._claims: Counter[str] = Counter()  # layers that pulls under way will use

    def images(self) -> tuple[str, ...]:
        """All images there are, also removed ones that are held."""
        return tuple(self._layers_of)

    def layers_of(self, image_id: str) -> tuple[str, ...] | None:
        """Lowest first; None where there is no such image."""
        return self._layers_of.get(image_id)

    def set_image(self, image_id: str, layers: tuple[str, ...]) -> None:
        self._layers_of[image_id] = layers

    def drop_image(self, image_id: str) -> tuple[str, ...]:
        """The layers that the image has needed."""
        return self._layers_of.pop(image_id, ())

    def hold(self, image_id: str, holder: str) -> None:
        self._holders[holder] = image_id

    def release(self, holder: str) -> str | None:
        """The image that `holder` held."""
        return self._holders.pop(holder, None)

    def is_held(self, image_id: str) -> bool:
        return image_id in self._holders.values()

    def claim(self, layers: Iterable[str]) -> None:
        self._claims.update(list(layers))

    def unclaim(self, layers: Iterable[str]) -> None:
        self._claims.subtract(list(layers))
        self._claims += Counter()  # forgets what nobody claims

    def unneeded(self, layers: Iterable[str]) -> list[str]:
        """Those of `layers` that no image, container or pull needs."""
        needed = {layer for each in self._layers_of.values() for layer in each}
        return [layer for layer in layers if layer not in needed and not self._claims[layer]]


def total(layers: Iterable[LayerRecord]) -> tuple[int, int]:
    """Bytes and inodes of `layers` together."""
    sizes = [(layer.size_bytes, layer.inodes) for layer in layers]
    return sum(size for size, _ in sizes), sum(inodes for _, inodes in sizes)


def visible(diff_ids: Sequence[str], tree: Callable[[str], Path]) -> tuple[str, ...]:
    """Of layers, lowest first, the highest whose root is opaque and those above it; all where there is none.

    `tree` tells where each is unpacked. overlayfs merges the roots of all layers that it is given, whatever they say
    themselves.
    """
    opaque = [at for at, diff_id in enumerate(diff_ids) if is_opaque(tree(diff_id))]
    return tuple(diff_ids[opaque[-1] if opaque else 0 :])
