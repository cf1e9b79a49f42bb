"""Images in local files: OCI layout directories, OCI archives, and the archives that `docker save` writes.

Runs in worker processes. Source: OCI image-spec, image-layout.md; moby, image spec v1.2, "Combined Image JSON".
"""

import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cri.image_service.decompress import decompressed
from cri.image_service.manifest import (
    CONFIG_LIMIT_BYTES,
    DOCUMENT_LIMIT_BYTES,
    Descriptor,
    Index,
    Manifest,
    Platform,
    check_digest,
    choose,
    image_id,
    parse,
)
from oci.errors import Error, InvalidArgument, NotFound

_COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")
_CHUNK_BYTES = 1 << 18
_NAME_ANNOTATIONS = ("io.containerd.image.name", "org.opencontainers.image.ref.name")
_NESTED_INDEXES = 4


@dataclass(frozen=True, slots=True)
class Extent:
    """Where bytes lie: a piece of a file."""

    path: Path
    offset: int
    size_bytes: int

    def read(self, limit: int) -> bytes:
        if self.size_bytes > limit:
            raise Error(f"{self.path} holds a document of {self.size_bytes} bytes; at most {limit} are accepted")
        return b"".join(self.chunks())

    def chunks(self) -> Iterator[bytes]:
        """Raises Error where the file is shorter than it was said to be."""
        left = self.size_bytes
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while left:
                chunk = file.read(min(_CHUNK_BYTES, left))
                if not chunk:
                    raise Error(f"{self.path} ends {left} bytes too early")
                left -= len(chunk)
                yield chunk


@dataclass(frozen=True, slots=True)
class LocalImage:
    names: tuple[str, ...]  # as the archive spells them
    manifest: bytes  # b"" where the format has none
    media_type: str
    manifest_digest: str
    config: bytes  # b"" of an artifact
    id: str
    layers: tuple[tuple[Extent, Descriptor], ...]  # with the digest to verify, "" for none


class Members:
    """The files of a layout, in a directory or in a tar archive."""

    def __init__(self, path: Path, scratch: Path, count: Callable[[int], None]) -> None:
        self.path = path
        self._found: dict[str, Extent] | None = None
        if not path.is_dir():
            self._found = _tar_index(_plain(path, scratch, count))

    def find(self, name: str) -> Extent | None:
        if self._found is not None:
            return self._found.get(str(PurePosixPath(name)))
        if ".." in PurePosixPath(name).parts or name.startswith("/"):
            return None
        path = self.path / name
        return Extent(path, 0, path.stat().st_size) if path.is_file() else None

    def get(self, name: str) -> Extent:
        found = self.find(name)
        if found is None:
            raise NotFound(f"{self.path} has no {name}")
        return found

    def blob(self, digest: str) -> Extent:
        algorithm, _, encoded = digest.partition(":")
        return self.get(f"blobs/{algorithm}/{encoded}")

    def layer(self, descriptor: Descriptor) -> Extent:
        found = self.blob(descriptor.digest)
        if found.size_bytes != descriptor.size_bytes:
            said = f"its manifest says {descriptor.size_bytes}"
            raise Error(f"blob {descriptor.digest} in {self.path} has {found.size_bytes} bytes, {said}")
        return found

    def document(self, descriptor: Descriptor, limit: int) -> bytes:
        content = self.blob(descriptor.digest).read(limit)
        check_digest(content, descriptor.digest, f"blob in {self.path}")
        return content


def read(
    path: Path, scratch: Path, platform: Platform, count: Callable[[int], None] = lambda _: None
) -> list[LocalImage]:
    """The images in `path` that run on `platform`. A compressed archive is first decompressed below `scratch`.

    `count` is told how many bytes that makes, as they come.
    Raises NotFound where there is no such path, InvalidArgument where it holds no images in a known format.
    """
    if not path.exists():
        raise NotFound(f"there is no {path}")
    members = Members(path, scratch, count)
    if members.find("index.json") is not None and members.find("oci-layout") is not None:
        return _oci_images(members, platform)
    if members.find("manifest.json") is not None:
        return _docker_images(members)
    raise InvalidArgument(f"{path} is neither an OCI layout or archive nor an archive as docker save writes it")


def _oci_images(members: Members, platform: Platform) -> list[LocalImage]:
    top = json.loads(members.get("index.json").read(DOCUMENT_LIMIT_BYTES))
    images: dict[str, LocalImage] = {}
    for entry in top.get("manifests", []) if isinstance(top, dict) else []:
        descriptor = _descriptor(entry, members.path)
        annotations = entry.get("annotations") or {}
        name = next((annotations[key] for key in _NAME_ANNOTATIONS if annotations.get(key)), "")
        known = images.get(descriptor.digest)
        if known is None:
            known = _oci_image(members, descriptor, platform)
        names = known.names + ((str(name),) if name and name not in known.names else ())
        images[descriptor.digest] = LocalImage(
            names,
            known.manifest,
            known.media_type,
            known.manifest_digest,
            known.config,
            known.id,
            known.layers,
        )
    if not images:
        raise NotFound(f"{members.path} holds no image")
    return list(images.values())


def _oci_image(members: Members, descriptor: Descriptor, platform: Platform) -> LocalImage:
    """The image that `descriptor` leads to; its digest is that of the index, where there is one, as for a pull."""
    top = descriptor
    for _ in range(_NESTED_INDEXES):
        text = members.document(descriptor, DOCUMENT_LIMIT_BYTES)
        subject = f"manifest {descriptor.digest} in {members.path}"
        found = parse(text, descriptor.media_type, subject)
        if isinstance(found, Manifest):
            layers = tuple((members.layer(layer), layer) for layer in found.layers)
            config = b"" if found.artifact_type else members.document(found.config, CONFIG_LIMIT_BYTES)
            return LocalImage((), text, descriptor.media_type, top.digest, config, image_id(found, text), layers)
        descriptor = choose(found, platform, subject)
    raise Error(f"{members.path}: indexes in indexes, more than {_NESTED_INDEXES} deep")


def _descriptor(entry: object, path: Path) -> Descriptor:
    text = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    found = parse(text, "", f"index.json in {path}")
    assert isinstance(found, Index)  # "manifests" makes it one
    return found.manifests[0][0]


def _docker_images(members: Members) -> list[LocalImage]:
    try:
        entries: list[dict[str, Any]] = json.loads(members.get("manifest.json").read(DOCUMENT_LIMIT_BYTES))
        return [_docker_image(members, entry) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Error(f"manifest.json in {members.path} is not as docker save writes it: {error!r}") from error


def _docker_image(members: Members, entry: dict[str, Any]) -> LocalImage:
    import hashlib  # noqa: PLC0415 (the digest of a document without one)

    config = members.get(entry["Config"]).read(CONFIG_LIMIT_BYTES)
    digest = f"sha256:{hashlib.sha256(config).hexdigest()}"
    extents = [members.get(name) for name in entry["Layers"]]
    layers = tuple((extent, Descriptor("", "", extent.size_bytes)) for extent in extents)
    return LocalImage(tuple(entry.get("RepoTags") or ()), b"", "", "", config, digest, layers)


def _plain(path: Path, scratch: Path, count: Callable[[int], None]) -> Path:
    with path.open("rb") as file:
        start = file.read(6)
    if not start.startswith(_COMPRESSED):
        return path
    plain = scratch / "archive.tar"
    with plain.open("wb") as file:
        for piece in decompressed(Extent(path, 0, path.stat().st_size).chunks()):
            count(file.write(piece))
    return plain


def _tar_index(path: Path) -> dict[str, Extent]:
    """Where each file of the archive lies, links followed (old docker save links equal layers)."""
    found: dict[str, Extent] = {}
    links: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = str(PurePosixPath(member.name))
                if member.isreg():
                    found[name] = Extent(path, member.offset_data, member.size)
                elif member.issym():
                    links[name] = _normalized(PurePosixPath(name).parent / member.linkname)
                elif member.islnk():
                    links[name] = str(PurePosixPath(member.linkname))
    except tarfile.TarError as error:
        raise InvalidArgument(f"{path} is not a tar archive: {error}") from error
    for name, target in links.items():
        if target in found:
            found[name] = found[target]
    return found


def _normalized(path: PurePosixPath) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            del parts[-1:]
        else:
            parts.append(part)
    return "/".join(parts)
