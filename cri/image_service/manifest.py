"""What a registry's documents say: manifests, indexes and descriptors of OCI and Docker; pure parsing and choosing.

Source: OCI image-spec, manifest.md, image-index.md, descriptor.md; distribution, "Image Manifest V 2, Schema 2".
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from oci.errors import Error, InvalidArgument, NotFound, Unimplemented

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
MANIFEST_TYPES = (OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST)
DOCUMENT_LIMIT_BYTES = 4 << 20  # distribution's limit for a manifest
CONFIG_LIMIT_BYTES = 8 << 20
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_CONFIG_TYPES = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)
_VAGUE_CONFIG_TYPES = ("", "application/octet-stream")  # as old Docker registries say
_LAYER_TYPES = ("application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs.")
_EMPTY = "application/vnd.oci.empty.v1+json"
_ENCRYPTED = "+encrypted"
_ARM_VARIANT = re.compile(r"(v?[0-9]{1,2})?")
_ANY_PLATFORM = 100  # a rank behind those of all variants


@dataclass(frozen=True, slots=True)
class Descriptor:
    media_type: str
    digest: str
    size_bytes: int
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_encrypted(self) -> bool:
        """Whether the blob is ciphertext. Source: containers/ocicrypt, spec/spec.go."""
        return self.media_type.endswith(_ENCRYPTED)


@dataclass(frozen=True, slots=True)
class Platform:
    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


@dataclass(frozen=True, slots=True)
class Manifest:
    config: Descriptor
    layers: tuple[Descriptor, ...]  # lowest first
    artifact_type: str = ""  # "" where it is a container image


@dataclass(frozen=True, slots=True)
class Index:
    """The manifests that a list offers, with what each runs on."""

    manifests: tuple[tuple[Descriptor, Platform | None], ...]


def parse(text: bytes, media_type: str, subject: str) -> Manifest | Index:
    """Raises Error naming `subject` and what is wrong; Unimplemented for an image of schema 1."""
    document = _object(text, subject)
    media_type = document.get("mediaType") or media_type.partition(";")[0].strip()
    if document.get("schemaVersion") == 1:
        raise Unimplemented(f"{subject} is an image of the old schema 1, which is not supported; push it anew")
    is_index, is_manifest = "manifests" in document, "layers" in document or "config" in document
    if is_index == is_manifest or document.get("schemaVersion") != 2:
        raise Error(f"{subject} is neither a manifest nor an index of images: media type {media_type!r}")
    if media_type in MANIFEST_TYPES and (media_type in (OCI_INDEX, DOCKER_LIST)) != is_index:
        raise Error(f"{subject} is not what its media type {media_type!r} says")
    return _index(document, subject) if is_index else _manifest(document, subject)


def choose(index: Index, wanted: Platform, subject: str) -> Descriptor:
    """The manifest for `wanted`: its best variant, else the first that names no platform at all.

    Raises NotFound naming the platforms that there are.
    """
    best: tuple[int, Descriptor] | None = None
    for descriptor, platform in index.manifests:
        rank = _rank(platform, wanted)
        if rank is not None and (best is None or rank < best[0]):
            best = rank, descriptor
    if best is None:
        offered = sorted({str(platform) for _, platform in index.manifests if platform is not None})
        raise NotFound(f"{subject} has no image for {wanted}; it has {', '.join(offered) or 'none'}")
    return best[1]


def image_id(manifest: Manifest, text: bytes) -> str:
    """What the node calls it: an image by its config's digest, which decides what it is made of.

    An artifact's config says nothing, and an encrypted image's not which ciphertext it stands for: their manifests do.
    """
    if manifest.artifact_type or any(layer.is_encrypted for layer in manifest.layers):
        return f"sha256:{hashlib.sha256(text).hexdigest()}"
    return manifest.config.digest


def parse_platform(text: str) -> Platform:
    """The platform that "os/architecture[/variant]" spells. Raises InvalidArgument."""
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise InvalidArgument(f"invalid platform {text!r}; expected os/architecture[/variant]")
    platform = Platform(*parts)
    if platform.architecture == "arm" and not _ARM_VARIANT.fullmatch(platform.variant):
        raise InvalidArgument(f"invalid platform {text!r}; expected a variant of arm such as v7")
    return platform


def host_platform() -> Platform:
    machine = os.uname().machine
    known = {
        "x86_64": ("amd64", ""),
        "aarch64": ("arm64", "v8"),
        "armv7l": ("arm", "v7"),
        "armv6l": ("arm", "v6"),
        "i686": ("386", ""),
        "loongarch64": ("loong64", ""),
    }
    return Platform("linux", *known.get(machine, (machine, "")))  # ppc64le, s390x, riscv64 are named alike


def check_digest(content: bytes, digest: str, subject: str) -> None:
    """Raises Error unless `content` has `digest`."""
    algorithm = digest.partition(":")[0]
    found = f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"
    if found != digest:
        raise Error(f"{subject} has the digest {found}, expected {digest}")


def is_digest(text: object) -> bool:
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def _rank(platform: Platform | None, wanted: Platform) -> int | None:
    """How far a platform is from the wanted one, 0 being the best; None where it cannot run."""
    if platform is None:
        return _ANY_PLATFORM
    if (platform.os, platform.architecture) != (wanted.os, wanted.architecture):
        return None
    variants = _variants(wanted)
    return variants.index(platform.variant) if platform.variant in variants else None


def _variants(wanted: Platform) -> list[str]:
    """The variants that run on `wanted`, the best first. A missing one is the architecture's base."""
    if wanted.architecture == "arm":
        level = int(wanted.variant.lstrip("v") or 7)
        return [f"v{older}" for older in range(level, 4, -1)] + [""]
    if wanted.architecture == "arm64":
        return list(dict.fromkeys([wanted.variant or "v8", "v8", ""]))
    if wanted.architecture == "amd64":
        return list(dict.fromkeys([wanted.variant, "", "v1"]))
    return list(dict.fromkeys([wanted.variant, ""]))


def _manifest(document: dict[str, Any], subject: str) -> Manifest:
    layers = document.get("layers")
    if not isinstance(layers, list):
        raise Error(f"{subject}: layers must be a list")
    config = _descriptor(document.get("config"), f"{subject}: config")
    described = tuple(_descriptor(each, f"{subject}: layer {at}") for at, each in enumerate(layers))
    artifact_type = _artifact_type(document.get("artifactType"), config, described)
    if artifact_type:
        described = tuple(layer for layer in described if not _is_placeholder(layer))
    return Manifest(config, described, artifact_type)


def _is_placeholder(layer: Descriptor) -> bool:
    """What an artifact has that has no layers. Source: OCI image-spec, manifest.md, "Guidelines for Artifact Usage"."""
    return layer.media_type == _EMPTY and not layer.annotations


def _artifact_type(said: object, config: Descriptor, layers: tuple[Descriptor, ...]) -> str:
    """ "" for a container image: with an image's config, and layers of an image where anything speaks against it.

    Source: OCI image-spec, manifest.md, "Guidelines for Artifact Usage".
    """
    said = said if isinstance(said, str) else ""
    is_sure = config.media_type in _CONFIG_TYPES and not said
    is_possible = config.media_type in _CONFIG_TYPES + _VAGUE_CONFIG_TYPES
    if is_sure or (is_possible and all(layer.media_type.startswith(_LAYER_TYPES) for layer in layers)):
        return ""
    return said or config.media_type or "unknown"


def _index(document: dict[str, Any], subject: str) -> Index:
    manifests = document["manifests"]
    if not isinstance(manifests, list):
        raise Error(f"{subject}: manifests must be a list")
    return Index(
        tuple(
            (_descriptor(each, f"{subject}: manifest {at}"), _platform(each.get("platform")))
            for at, each in enumerate(manifests)
        )
    )


def _platform(value: object) -> Platform | None:
    if not isinstance(value, dict):
        return None
    texts = [value.get(key, "") for key in ("os", "architecture", "variant")]
    return Platform(*map(str, texts))


def _descriptor(value: object, subject: str) -> Descriptor:
    if not isinstance(value, dict) or not is_digest(value.get("digest")):
        raise Error(f"{subject} has no sha256 or sha512 digest: {str(value)[:200]}")
    size = value.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise Error(f"{subject} has the size {size!r}")
    return Descriptor(str(value.get("mediaType") or ""), value["digest"], size, _annotations(value.get("annotations")))


def _annotations(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        return {}
    return {name: text for name, text in value.items() if isinstance(text, str)}


def _object(text: bytes, subject: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Error(f"{subject} is not JSON: {text[:60]!r}") from error
    if not isinstance(document, dict):
        raise Error(f"{subject} is not a JSON object: {text[:60]!r}")
    return document
