"""What the blobs of a manifest become on this node, and under which id the store has each; pure.

A layer is known by its diff ID: whoever has an image with that layer may have it. Two kinds are known otherwise:
"encrypted:…" layers, by ciphertext and diff ID, because a diff ID is no secret and proves no key; and "artifact:…"
layers, by digest and path, each of one file that is a blob as it came.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cri.image_service.manifest import Descriptor, Manifest, is_digest, parse
from cri.image_service.snapshots import directory_name
from cri.image_service.store import ImageRecord
from cri.image_service.unpack import clean_path
from oci.errors import Error
from oci.image import ImageConfig, from_json

# The second is the CNCF model specification's.
_PATH_ANNOTATIONS = ("org.opencontainers.image.title", "org.cncf.model.filepath")
_NAME_LIMIT_BYTES = 255
_PATH_LIMIT_BYTES = 4095
_MOST_FILES = 500  # overlayfs' limit of layers


@dataclass(frozen=True, slots=True)
class Content:
    """One layer of an image or artifact."""

    id: str  # in the store
    blob: Descriptor
    diff_id: str = ""  # of the unpacked bytes; "" where nothing tells it
    file: str = ""  # of an artifact: the path of the file that the blob is

    @property
    def partial(self) -> str:
        """Under which name the part of the blob is kept that has come: two at once shall not write one file."""
        return self.blob.digest if self.id == self.diff_id else self.id


@dataclass(frozen=True, slots=True)
class Artifact:
    """An OCI artifact: no container image, but files to mount."""

    type: str
    files: tuple[Content, ...]


@dataclass(frozen=True, slots=True)
class Described:
    """What an image's documents say: a config, or an artifact; and what its layers become."""

    config: ImageConfig
    artifact: Artifact | None
    contents: tuple[Content, ...] = ()


def described_by(record: ImageRecord) -> Described:
    """Without contents. Raises Error where the documents are broken."""
    if record.is_artifact:
        return Described(ImageConfig(), artifact_of(record.manifest, record.media_type, f"image {record.id}"))
    return Described(from_json(record.config), None)


def artifact_of(manifest: str, media_type: str, subject: str) -> Artifact:
    """Raises Error where the manifest is not an artifact's."""
    found = parse(manifest.encode(), media_type, subject)
    if not isinstance(found, Manifest):
        raise Error(f"{subject} is an index, not an artifact")
    if not found.artifact_type:
        raise Error(f"{subject}: its config is empty")
    return artifact_contents(found, subject)


def image_contents(layers: Sequence[Descriptor], config: ImageConfig, subject: str) -> tuple[Content, ...]:
    """An image's layers, lowest first. Raises Error where its config does not tell the diff ID of each."""
    for diff_id in config.diff_ids:
        if not is_digest(diff_id):
            raise Error(f"{subject}: its config has the diff ID {diff_id!r}, not a digest")
        directory_name(diff_id)
    if len(config.diff_ids) != len(layers):
        raise Error(f"{subject} has {len(layers)} layers, but its config tells {len(config.diff_ids)} diff IDs")
    return tuple(
        Content(_derived("encrypted", layer.digest, diff_id) if layer.is_encrypted else diff_id, layer, diff_id)
        for layer, diff_id in zip(layers, config.diff_ids, strict=True)
    )


def artifact_contents(manifest: Manifest, subject: str) -> Artifact:
    """An artifact's files, in its own order; of those with the same path the last counts.

    Raises Error where there are more files than can be mounted, or one has no possible name.
    """
    files = []
    for layer in manifest.layers:
        path = _path(layer.annotations) or layer.digest.replace(":", "-")
        _check_path(path, f"{subject}: layer {layer.digest}")
        files.append(Content(_derived("artifact", layer.digest, path), layer, file=path))
    if len(files) > _MOST_FILES:
        raise Error(f"{subject} is an artifact of {len(files)} files; at most {_MOST_FILES} can be mounted")
    return Artifact(manifest.artifact_type, tuple(files))


def _path(annotations: Mapping[str, str]) -> str:
    """The path within the artifact, as a container with that as its "/" would find it; "" where there is none."""
    titled = next((annotations[name] for name in _PATH_ANNOTATIONS if name in annotations), "")
    return clean_path(titled.encode()).decode()


def _check_path(path: str, subject: str) -> None:
    encoded = path.encode()
    if b"\0" in encoded or len(encoded) > _PATH_LIMIT_BYTES:
        raise Error(f"{subject} is a file of the name {path[:100]!r}, which no file can have")
    if any(len(part) > _NAME_LIMIT_BYTES for part in encoded.split(b"/")):
        raise Error(f"{subject} is a file of the name {path[:100]!r}, which is too long")


def _derived(kind: str, *parts: str) -> str:
    return f"{kind}:{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}"
