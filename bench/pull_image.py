"""The image that pulls are measured with: about 35,000 of this machine's own files, about 500 MB, in six layers."""

import gzip
import hashlib
import json
import os
import stat
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import zstandard

from tests.e2e.harness.images import CONFIG, MANIFEST, Blob, TestImage

SOURCE = Path("/usr")
FILES = 35_000
BYTES = 500_000_000
LARGEST_FILE_BYTES = 16_000_000
# A base, what is installed on it, and thin layers on top: parts of the whole, by files.
LAYERS = (0.40, 0.25, 0.15, 0.10, 0.07, 0.03)
GZIP_LEVEL = 6


@dataclass(frozen=True, slots=True)
class Plain:
    """One layer as a tar archive."""

    path: Path
    diff_id: str
    size_bytes: int


def plain_layers(folder: Path, files: int = FILES, size_bytes: int = BYTES) -> list[Plain]:
    """The layers, written below `folder`; fewer and smaller where the machine has less."""
    chosen = _choose(files, size_bytes)
    ends = [round(sum(LAYERS[: at + 1]) * len(chosen)) for at in range(len(LAYERS))]
    parts = zip([0, *ends], ends, strict=False)
    return [_write(folder / f"{at}.tar", chosen[first:last]) for at, (first, last) in enumerate(parts)]


def compressed(layers: Sequence[Plain], kind: str) -> TestImage:
    """An OCI image of `layers`; `kind` is gzip or zstd."""
    compress: Callable[[bytes], bytes] = {
        "gzip": lambda plain: gzip.compress(plain, GZIP_LEVEL, mtime=0),
        "zstd": lambda plain: zstandard.ZstdCompressor(3).compress(plain),
    }[kind]
    media_type = f"application/vnd.oci.image.layer.v1.tar+{kind}"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        blobs = tuple(pool.map(lambda layer: Blob(media_type, compress(layer.path.read_bytes())), layers))
    config = Blob(
        CONFIG,
        json.dumps(
            {
                "architecture": "amd64",
                "os": "linux",
                "config": {"Labels": {"compression": kind}},  # each kind an image of its own
                "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
            }
        ).encode(),
    )
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config.descriptor(),
        "layers": [blob.descriptor() for blob in blobs],
    }
    return TestImage(Blob(MANIFEST, json.dumps(manifest).encode()), config, blobs)


def _choose(files: int, size_bytes: int) -> list[Path]:
    """Whole directories in their order, up to `files`; the largest files go, or come, until the size is right."""
    found: list[tuple[Path, int]] = []
    for path in _walk(SOURCE):
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_size <= LARGEST_FILE_BYTES):
            found.append((path, 0 if stat.S_ISLNK(status.st_mode) else status.st_size))
    chosen = dict(found[:: max(1, len(found) // files)][:files])
    rest = sorted((pair for pair in found if pair[0] not in chosen), key=lambda pair: pair[1])
    total = sum(chosen.values())
    by_size = sorted(chosen.items(), key=lambda pair: pair[1])
    while total > size_bytes and by_size:
        path, size = by_size.pop()
        del chosen[path]
        total -= size
    while total < size_bytes * 0.98 and rest:
        path, size = rest.pop()
        if total + size <= size_bytes:
            chosen[path] = size
            total += size
    return sorted(chosen)


def _walk(directory: Path) -> list[Path]:
    return [Path(folder, name) for folder, _, names in os.walk(directory) for name in sorted(names)]


def _write(path: Path, files: Sequence[Path]) -> Plain:
    digest = hashlib.sha256()
    made: set[Path] = set()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for file in files:
            for parent in [each for each in reversed(file.parents) if each not in made and each != Path("/")]:
                made.add(parent)
                archive.add(parent, str(parent)[1:], recursive=False)
            archive.add(file, str(file)[1:], recursive=False)
            archive.inodes.clear()  # type: ignore[attr-defined]  # no hard links: the other name may be in another layer
    with path.open("rb") as written:
        while piece := written.read(1 << 20):
            digest.update(piece)
    return Plain(path, f"sha256:{digest.hexdigest()}", path.stat().st_size)
