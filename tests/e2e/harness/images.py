"""Small test images made from the host's static busybox, without any tool or network."""

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

BUSYBOX = Path("/bin/busybox")  # Debian's busybox-static
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"

PASSWD = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\nweb:x:1000:1000::/:/bin/sh\n"
GROUP = "root:x:0:\nweb:x:1000:\nextra:x:2000:web\nnobody:x:65534:\n"


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, slots=True)
class Blob:
    media_type: str
    data: bytes

    @property
    def digest(self) -> str:
        return sha256(self.data)

    def descriptor(self) -> dict[str, Any]:
        return {"mediaType": self.media_type, "size": len(self.data), "digest": self.digest}


@dataclass(frozen=True, slots=True)
class TestImage:
    """A manifest with what it refers to."""

    __test__ = False  # not a class of tests, whatever its name says to pytest

    manifest: Blob
    config: Blob
    layers: tuple[Blob, ...]

    @property
    def id(self) -> str:
        return self.config.digest


@dataclass(frozen=True, slots=True)
class Entry:
    """One member of a layer."""

    name: str
    data: bytes = b""
    mode: int = 0o644
    kind: bytes = tarfile.REGTYPE
    link: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)


def layer(entries: Sequence[Entry]) -> tuple[Blob, str]:
    """The compressed layer, and its diff ID."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for entry in entries:
            member = tarfile.TarInfo(entry.name)
            member.type, member.mode, member.linkname, member.size = entry.kind, entry.mode, entry.link, len(entry.data)
            archive.addfile(member, io.BytesIO(entry.data) if entry.data else None)
    plain = buffer.getvalue()
    return Blob(LAYER, gzip.compress(plain, 1, mtime=0)), sha256(plain)


@cache
def busybox_layer() -> tuple[Blob, str]:
    applets = subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout.split()
    folders = ("bin", "etc", "tmp", "root", "var", "home")
    entries = [Entry(name, mode=0o1777 if name == "tmp" else 0o755, kind=tarfile.DIRTYPE) for name in folders]
    entries.append(Entry("bin/busybox", BUSYBOX.read_bytes(), 0o755))
    entries += [
        Entry(f"bin/{a}", mode=0o755, kind=tarfile.LNKTYPE, link="bin/busybox") for a in applets if a != "busybox"
    ]
    entries += [Entry("etc/passwd", PASSWD.encode()), Entry("etc/group", GROUP.encode())]
    return layer(entries)


def busybox_image(label: str = "", config: Mapping[str, Any] | None = None) -> TestImage:
    """An image of busybox; another `label` makes another image id."""
    blob, diff_id = busybox_layer()
    content = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"], "Labels": {"label": label}, **(config or {})},
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
    }
    return image(content, (blob,))


def image(
    config: Mapping[str, Any], layers: tuple[Blob, ...], annotations: Mapping[str, str] | None = None
) -> TestImage:
    config_blob = Blob(CONFIG, json.dumps(config).encode())
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config_blob.descriptor(),
        "layers": [each.descriptor() for each in layers],
        **({"annotations": dict(annotations)} if annotations else {}),
    }
    return TestImage(Blob(MANIFEST, json.dumps(manifest).encode()), config_blob, layers)


def artifact(files: Mapping[str, bytes], artifact_type: str = "application/vnd.example.model") -> TestImage:
    """An OCI artifact of files by title; its id is the manifest's digest."""
    blobs = tuple(Blob("application/octet-stream", content) for content in files.values())
    config = Blob("application/vnd.oci.empty.v1+json", b"{}")
    described = [
        {**blob.descriptor(), "annotations": {"org.opencontainers.image.title": title}}
        for title, blob in zip(files, blobs, strict=True)
    ]
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": artifact_type,
        "config": config.descriptor(),
        "layers": described,
    }
    return TestImage(Blob(MANIFEST, json.dumps(manifest).encode()), config, blobs)
