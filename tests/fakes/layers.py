"""Layers, images and layouts for tests, made in memory; the same arguments make the same bytes."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def directory(name: str, mode: int = 0o755, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=tarfile.DIRTYPE, mode=mode, **fields)


def file(name: str, content: bytes = b"", mode: int = 0o644, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, content, mode=mode, **fields)


def symlink(name: str, target: str, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=tarfile.SYMTYPE, linkname=target, **fields)


def hard_link(name: str, target: str, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=tarfile.LNKTYPE, linkname=target, **fields)


def entry(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mtime = 1_700_000_000
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def tar(entries: Iterable[tuple[tarfile.TarInfo, bytes]], tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@dataclass(frozen=True)
class Built:
    """An image with everything a registry needs to serve it."""

    config: bytes
    manifest: bytes
    layers: tuple[bytes, ...]  # as stored
    media_type: str = OCI_MANIFEST

    @property
    def id(self) -> str:
        return digest(self.config)

    @property
    def digest(self) -> str:
        return digest(self.manifest)

    @property
    def blobs(self) -> dict[str, bytes]:
        return {digest(blob): blob for blob in (self.config, *self.layers)}


def image(
    tars: Iterable[bytes],
    config: Mapping[str, Any] | None = None,
    compress: Any = lambda plain: gzip.compress(plain, mtime=0),
    architecture: str = "amd64",
    diff_ids: list[str] | None = None,
) -> Built:
    plain = tuple(tars)
    document = {
        "architecture": architecture,
        "os": "linux",
        "config": dict(config or {}),
        "rootfs": {"type": "layers", "diff_ids": diff_ids or [digest(each) for each in plain]},
    }
    config_bytes = json.dumps(document, sort_keys=True).encode()
    layers = tuple(compress(each) for each in plain)
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": _descriptor(config_bytes, "application/vnd.oci.image.config.v1+json"),
        "layers": [_descriptor(layer, "application/vnd.oci.image.layer.v1.tar+gzip") for layer in layers],
    }
    return Built(config_bytes, json.dumps(manifest).encode(), layers)


EMPTY = "application/vnd.oci.empty.v1+json"
TITLE = "org.opencontainers.image.title"


def artifact(
    files: Iterable[tuple[str | None, bytes]],
    artifact_type: str = "application/vnd.example.model",
    media_type: str = "application/octet-stream",
    annotation: str = TITLE,
) -> Built:
    """An artifact of files by title; None is a file without one."""
    given = tuple(files)
    described = [
        {**_descriptor(content, media_type), **({"annotations": {annotation: name}} if name is not None else {})}
        for name, content in given
    ]
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": artifact_type,
        "config": _descriptor(b"{}", EMPTY),
        "layers": described,
    }
    return Built(b"{}", json.dumps(manifest).encode(), tuple(content for _, content in given))


def index(images: Mapping[str, Built]) -> bytes:
    """An OCI index of images by "os/architecture[/variant]", or "" for an entry that names no platform."""
    entries: list[dict[str, Any]] = []
    for platform, built in images.items():
        if not platform:
            entries.append(_descriptor(built.manifest, OCI_MANIFEST))
            continue
        os_name, architecture, *variant = platform.split("/")
        described = {"os": os_name, "architecture": architecture, **({"variant": variant[0]} if variant else {})}
        entries.append({**_descriptor(built.manifest, OCI_MANIFEST), "platform": described})
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()


def write_oci_layout(path: Path, built: Built, name: str = "") -> None:
    (path / "blobs/sha256").mkdir(parents=True)
    for key, blob in {**built.blobs, built.digest: built.manifest}.items():
        (path / "blobs/sha256" / key.removeprefix("sha256:")).write_bytes(blob)
    top = _descriptor(built.manifest, OCI_MANIFEST)
    if name:
        top["annotations"] = {"org.opencontainers.image.ref.name": name}
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def docker_archive(built: Built, plain_layers: Iterable[bytes], tags: Iterable[str]) -> bytes:
    names = [f"{at}/layer.tar" for at, _ in enumerate(built.layers)]
    manifest = [{"Config": "config.json", "RepoTags": list(tags), "Layers": names}]
    files = {"manifest.json": json.dumps(manifest).encode(), "config.json": built.config}
    return tar([file(name, content) for name, content in {**files, **dict(zip(names, plain_layers))}.items()])  # noqa: B905


def _descriptor(content: bytes, media_type: str) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest(content), "size": len(content)}
