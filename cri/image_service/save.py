"""Writes images to a file or directory that other runtimes load: OCI archive, OCI layout, or as `docker save` does.

Runs in worker processes. An image is copied exactly, by fetching its blobs again, where a registry has them; else its
layers are made anew from their trees. What is being written has a temporary name, and goes when it cannot be finished.
Source: OCI image-spec, image-layout.md; moby, image spec v1.2, "Combined Image JSON".
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cri.image_service.decompress import decompressed, gzip_module
from cri.image_service.digest import Digest
from cri.image_service.layer_tar import layer_tar
from cri.image_service.manifest import OCI_INDEX, OCI_MANIFEST, Descriptor, Manifest, check_digest, parse
from cri.image_service.tar_writer import END, member_header, padding
from cri.image_service.unpack import remove_tree, sync_filesystem
from oci.errors import AlreadyExists, Error, NotFound

OCI_ARCHIVE = "oci-archive"
OCI_LAYOUT = "oci-layout"
DOCKER_ARCHIVE = "docker-archive"
FORMATS = (OCI_ARCHIVE, OCI_LAYOUT, DOCKER_ARCHIVE)
_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
# The first is how containerd and we name an image, the second how skopeo and podman do.
_NAME_ANNOTATIONS = ("io.containerd.image.name", "org.opencontainers.image.ref.name")

Blobs = Callable[[Descriptor], Iterator[bytes]]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer as it lies in the store."""

    diff_id: str
    tree: Path
    implied: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """An image to write, with its documents as they were pulled; `manifest` is "" where the source had none."""

    id: str
    names: tuple[str, ...]
    config: str
    manifest: str
    media_type: str
    layers: tuple[Layer, ...]  # one for each diff ID of the config, repeated where that repeats one


@dataclass(frozen=True, slots=True)
class Saved:
    """An image that was written. Where its layers had to be made anew, `regenerated` says why, and `id` is another."""

    id: str
    source_id: str
    names: tuple[str, ...]
    regenerated: str = ""


@dataclass(slots=True)
class Written:
    """How far a save is: layers, and bytes of what was to be fetched or read."""

    layers: int = 0
    done_bytes: int = 0
    total_bytes: int = 0

    def count(self, size: int) -> None:
        self.done_bytes += size

    def counting(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self.count(len(chunk))
            yield chunk


def save(
    images: Iterable[Wanted], path: Path, temporary: Path, form: str, blobs: Mapping[str, Blobs], written: Written
) -> list[Saved]:
    """Writes `images` to `path`; `blobs` fetches those of an image, by its id, where that can be tried.

    An archive replaces a file that is there, a layout nothing. On any error `path` is as before, and nothing is left at
    `temporary`. Raises NotFound where the directory of `path` is missing, AlreadyExists.
    """
    if not path.parent.is_dir():
        raise NotFound(f"cannot save to {path}: there is no directory {path.parent}")
    if os.path.lexists(path) and (form == OCI_LAYOUT or not path.is_file() or path.is_symlink()):
        raise AlreadyExists(f"cannot save to {path}: it is there already, and only a file is replaced by an archive")
    try:
        target: _Directory | _Tar
        with _Directory(temporary) if form == OCI_LAYOUT else _Tar(temporary) as target:
            book = _DockerBook(target) if form == DOCKER_ARCHIVE else _OciBook(target)
            saved = [_saved(image, target, book, blobs.get(image.id), written) for image in images]
            book.finish()
            target.finish()
        temporary.rename(path)
        _sync_directory(path.parent)
    finally:
        remove(temporary)
    return saved


def remove(temporary: Path) -> None:
    """Takes away what an unfinished save has left; nothing is success."""
    if temporary.is_dir():
        remove_tree(temporary)
    else:
        temporary.unlink(missing_ok=True)


def _saved(
    image: Wanted, target: "_Directory | _Tar", book: "_OciBook | _DockerBook", blobs: Blobs | None, written: Written
) -> Saved:
    if not image.manifest:
        return book.anew(image, "it came from an archive without a manifest", written)
    if blobs is None:
        return book.anew(image, "it has no name by which its layers could be fetched", written)
    mark = target.mark()
    before = (written.layers, written.done_bytes, written.total_bytes)
    try:
        return book.exact(image, blobs, written)
    except Error as error:
        target.undo(mark)
        written.layers, written.done_bytes, written.total_bytes = before
        return book.anew(image, f"its layers could not be fetched: {error}", written)


class _OciBook:
    """The documents of a layout, whose layers are as they are transported."""

    def __init__(self, target: "_Directory | _Tar") -> None:
        self._target = target
        self._index: list[dict[str, Any]] = []

    def exact(self, image: Wanted, blobs: Blobs, written: Written) -> Saved:
        manifest = _manifest(image)
        written.total_bytes += sum(layer.size_bytes for layer in manifest.layers)
        for layer in manifest.layers:
            if not self._target.has(_blob_name(layer.digest)):
                digest = Digest(layer.digest)
                self._target.put(_blob_name(layer.digest), digest.of(written.counting(blobs(layer))))
                digest.check("what was fetched")
            written.layers += 1
        self._document(image.config.encode(), manifest.config.digest)
        media_type = json.loads(image.manifest).get("mediaType") or image.media_type.partition(";")[0] or OCI_MANIFEST
        self._add(image.manifest.encode(), media_type, image.names)
        return Saved(image.id, image.id, image.names)

    def anew(self, image: Wanted, why: str, written: Written) -> Saved:
        new_ids: dict[str, str] = {}
        descriptors: dict[str, dict[str, Any]] = {}
        for layer in _each_once(image.layers, written):
            plain, packed = Digest(), Digest()
            archive = plain.of(layer_tar(layer.tree, layer.implied, written.count))
            size = self._target.put_late(_blob_name, packed, _gzip(archive))
            new_ids[layer.diff_id] = str(plain)
            descriptors[layer.diff_id] = _descriptor(_LAYER_TYPE, str(packed), size)
            written.layers += 1
        config = _with_diff_ids(image, new_ids)
        self._document(config, _sha256(config))
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": _descriptor(_CONFIG_TYPE, _sha256(config), len(config)),
            "layers": [descriptors[layer.diff_id] for layer in image.layers],
        }
        names = _tags(image.names)  # a digest names the image as it was
        self._add(json.dumps(manifest).encode(), OCI_MANIFEST, names)
        return Saved(_sha256(config), image.id, names, why)

    def finish(self) -> None:
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": self._index}
        self._target.put("index.json", [json.dumps(index).encode()])
        self._target.put("oci-layout", [b'{"imageLayoutVersion": "1.0.0"}'])

    def _add(self, manifest: bytes, media_type: str, names: tuple[str, ...]) -> None:
        digest = _sha256(manifest)
        self._document(manifest, digest)
        entry = _descriptor(media_type, digest, len(manifest))
        self._index += [{**entry, "annotations": dict.fromkeys(_NAME_ANNOTATIONS, name)} for name in names] or [entry]

    def _document(self, content: bytes, digest: str) -> None:
        check_digest(content, digest, "a document of the image")
        if not self._target.has(_blob_name(digest)):
            self._target.put(_blob_name(digest), [content])


class _DockerBook:
    """The documents of what `docker save` writes, whose layers are plain archives named by their content."""

    def __init__(self, target: "_Directory | _Tar") -> None:
        self._target = target
        self._entries: list[dict[str, Any]] = []

    def exact(self, image: Wanted, blobs: Blobs, written: Written) -> Saved:
        described = _manifest(image).layers
        written.total_bytes += sum(layer.size_bytes for layer in described)
        for blob, layer in zip(described, image.layers, strict=True):
            if not self._target.has(_layer_name(layer.diff_id)):
                packed, plain = Digest(blob.digest), Digest(layer.diff_id)
                fetched = packed.of(written.counting(blobs(blob)))
                self._target.put(_layer_name(layer.diff_id), plain.of(decompressed(fetched)))
                for _ in fetched:
                    pass  # what follows the archive counts for the digest too
                packed.check("what was fetched")
                plain.check("what was fetched, unpacked,")
            written.layers += 1
        return self._add(image, image.config.encode(), [layer.diff_id for layer in image.layers], "")

    def anew(self, image: Wanted, why: str, written: Written) -> Saved:
        new_ids: dict[str, str] = {}
        for layer in _each_once(image.layers, written):
            plain = Digest()
            archive = layer_tar(layer.tree, layer.implied, written.count)
            self._target.put_late(_layer_name, plain, archive)
            new_ids[layer.diff_id] = str(plain)
            written.layers += 1
        return self._add(image, _with_diff_ids(image, new_ids), [new_ids[layer.diff_id] for layer in image.layers], why)

    def finish(self) -> None:
        self._target.put("manifest.json", [json.dumps(self._entries).encode()])

    def _add(self, image: Wanted, config: bytes, diff_ids: list[str], why: str) -> Saved:
        digest = _sha256(config)
        name = f"{digest.removeprefix('sha256:')}.json"
        if not self._target.has(name):
            self._target.put(name, [config])
        names = _tags(image.names)  # the format has nothing for digests
        layers = [_layer_name(each) for each in diff_ids]
        self._entries.append({"Config": name, "RepoTags": names or None, "Layers": layers})
        return Saved(digest, image.id, names, why)


class _Directory:
    """Where files of a layout go; what came after a mark can be taken back. Use with `with`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: list[str] = []

    def __enter__(self) -> "_Directory":
        self._path.mkdir(mode=0o755)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def has(self, name: str) -> bool:
        return name in self._names

    def put(self, name: str, chunks: Iterable[bytes]) -> int:
        """How many bytes there were."""
        return self._put(lambda: name, chunks)

    def put_late(self, name: Callable[[str], str], digest: Digest, chunks: Iterable[bytes]) -> int:
        """A file named by its digest, once that is known; one of that name that is there already stays."""
        return self._put(lambda: name(str(digest)), digest.of(chunks))

    def mark(self) -> int:
        return len(self._names)

    def undo(self, mark: int) -> None:
        (self._path / "unnamed").unlink(missing_ok=True)
        for name in self._names[mark:]:
            (self._path / name).unlink()
        del self._names[mark:]

    def finish(self) -> None:
        sync_filesystem(self._path)

    def _put(self, name: Callable[[], str], chunks: Iterable[bytes]) -> int:
        unnamed = self._path / "unnamed"
        with _created(unnamed) as file:
            size = _write(file, chunks)
        final = name()
        if self.has(final):
            unnamed.unlink()
            return size
        (self._path / final).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        unnamed.rename(self._path / final)
        self._names.append(final)
        return size


class _Tar:
    """Where members of an archive go; as `_Directory`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at: dict[str, int] = {}  # where each member begins

    def __enter__(self) -> "_Tar":
        self._file = _created(self._path)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def has(self, name: str) -> bool:
        return name in self._at

    def put(self, name: str, chunks: Iterable[bytes]) -> int:
        """How many bytes there were."""
        return self._put(len(member_header(name.encode(), 0)), lambda: name, chunks)

    def put_late(self, name: Callable[[str], str], digest: Digest, chunks: Iterable[bytes]) -> int:
        """A member named by its digest, once that is known; one of that name that is there already stays."""
        return self._put(len(member_header(b"", 0)), lambda: name(str(digest)), digest.of(chunks))

    def mark(self) -> int:
        return self._file.tell()

    def undo(self, mark: int) -> None:
        self._file.seek(mark)
        self._file.truncate()
        self._at = {name: at for name, at in self._at.items() if at < mark}

    def finish(self) -> None:
        self._file.write(END)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _put(self, header_bytes: int, name: Callable[[], str], chunks: Iterable[bytes]) -> int:
        start = self._file.tell()
        self._file.write(bytes(header_bytes))
        size = _write(self._file, chunks)
        self._file.write(padding(size))
        end, final = self._file.tell(), name()
        if self.has(final):
            self.undo(start)
            return size
        self._file.seek(start)
        self._file.write(member_header(final.encode(), size))
        self._file.seek(end)
        self._at[final] = start
        return size


def _created(path: Path) -> BinaryIO:
    """For root alone, because images hold what their makers put into them."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w+b")


def _write(file: BinaryIO, chunks: Iterable[bytes]) -> int:
    return sum(file.write(chunk) for chunk in chunks)


def _gzip(chunks: Iterable[bytes]) -> Iterator[bytes]:
    packer = gzip_module().compressobj(wbits=zlib.MAX_WBITS | 16)
    for chunk in chunks:
        yield packer.compress(chunk)
    yield packer.flush()


def _each_once(layers: tuple[Layer, ...], written: Written) -> list[Layer]:
    once = list({layer.diff_id: layer for layer in layers}.values())
    written.total_bytes += sum(layer.size_bytes for layer in once)
    written.layers += len(layers) - len(once)
    return once


def _manifest(image: Wanted) -> Manifest:
    found = parse(image.manifest.encode(), image.media_type, f"manifest of {image.id}")
    assert isinstance(found, Manifest)  # an index is never recorded
    return found


def _with_diff_ids(image: Wanted, new_ids: Mapping[str, str]) -> bytes:
    """The image's config for layers with other diff IDs; the same where they are the same."""
    if all(old == new for old, new in new_ids.items()):
        return image.config.encode()
    document = json.loads(image.config)
    document["rootfs"]["diff_ids"] = [new_ids[layer.diff_id] for layer in image.layers]
    return json.dumps(document, separators=(",", ":")).encode()


def _tags(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names if "@" not in name)


def _blob_name(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def _layer_name(diff_id: str) -> str:
    return f"{diff_id.partition(':')[2][:64]}.tar"


def _descriptor(media_type: str, digest: str, size_bytes: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest, "size": size_bytes}


def _sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
