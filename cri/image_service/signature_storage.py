"""Where an image's signatures lie, by containers-registries.d(5), and fetching them from there.

Runs in worker processes. Signatures lie beside the image in its registry (a tag of cosign's), or in a lookaside
storage: files, or a web server. Every size and number has a bound. Source: containers-registries.d(5);
containers/image, docs/signature-protocols.md; cosign, specs/SIGNATURE_SPEC.md.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from cri.image_service.manifest import is_digest
from cri.image_service.signature import SIGSTORE_MEDIA_TYPE, Format, Signature
from cri.image_service.strict_json import Object, parse
from oci.errors import Error, NotFound

if TYPE_CHECKING:
    from cri.image_service.registry import Registry

DEFAULT_LOOKASIDE = "file:///var/lib/containers/sigstore"
LIMIT_BYTES = 1 << 20  # of all signatures of an image; a usual one has a few thousand
NUMBER_LIMIT = 128
_TEXTS = ("lookaside", "lookaside-staging", "sigstore", "sigstore-staging")


@dataclass(frozen=True, slots=True)
class Storage:
    """Where to look for the signatures of one image."""

    lookaside: str = DEFAULT_LOOKASIDE  # URL, above the repository
    attachments: bool = False  # in the registry, too


def load(directory: Path | None, scopes: Sequence[str]) -> Storage:
    """Where `directory` says that the signatures of the image with these scopes lie; the most specific that says wins.

    Raises Error naming file and key for what is wrong; a directory that is not there says nothing.
    """
    import yaml  # noqa: PLC0415 (only where signatures are wanted)

    default: dict[str, Any] = {}
    docker: dict[str, dict[str, Any]] = {}
    seen: dict[str, Path] = {}
    for path in _files(directory):
        try:
            content = yaml.safe_load(path.read_bytes()) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise Error(f"cannot read {path}: {error}") from error
        if not isinstance(content, dict):
            raise Error(f"{path} must be a mapping")
        entries = {"": content["default-docker"]} if content.get("default-docker") else {}
        entries |= _mapping(content.get("docker") or {}, f"{path}: docker")
        for scope, value in entries.items():
            subject = f"{path}: docker: {scope}" if scope else f"{path}: default-docker"
            if scope in seen:
                raise Error(f"{subject} is also in {seen[scope]}")
            seen[scope] = path
            entry = _entry(value, subject)
            if scope:
                docker[scope] = entry
            else:
                default = entry
    found = [docker[scope] for scope in scopes if scope in docker] + [default]
    lookaside = next((url for each in found if (url := each.get("lookaside") or each.get("sigstore"))), "")
    attachments = next((each[key] for each in found if (key := "use-sigstore-attachments") in each), False)
    return Storage(lookaside or DEFAULT_LOOKASIDE, attachments)


def fetch(registry: "Registry", storage: Storage, repository: str, digest: str) -> list[Signature]:
    """All signatures that there are for the manifest `digest` (sha256) in `repository`.

    Raises Unavailable where a server does not answer, Error where it answers what cannot be, or too much.
    """
    total = _Total()
    found = _from_lookaside(registry, storage.lookaside, repository, digest, total)
    if storage.attachments:
        found += _attached(registry, digest, total)
    return found


class _Total:
    """Counts what signatures take."""

    def __init__(self) -> None:
        self._bytes = 0
        self._number = 0

    def add(self, size: int, where: str) -> None:
        self._bytes += size
        self._number += 1
        if self._number > NUMBER_LIMIT:
            raise Error(f"{where}: there are more than {NUMBER_LIMIT} signatures")
        if self._bytes > LIMIT_BYTES:
            raise Error(f"{where}: the signatures have more than {LIMIT_BYTES} bytes")


# ---- lookaside storage


def _from_lookaside(registry: "Registry", base: str, repository: str, digest: str, total: _Total) -> list[Signature]:
    found: list[Signature] = []
    while True:
        url = f"{base}/{repository}@{digest.replace(':', '=')}/signature-{len(found) + 1}"
        blob = _read(registry, url)
        if blob is None:
            return found
        total.add(len(blob), url)
        found.append(_signature(blob, url))


def _read(registry: "Registry", url: str) -> bytes | None:
    """What `url` holds, None where there is nothing."""
    parts = urlsplit(url)
    if parts.scheme in ("http", "https"):
        return registry.outside(url, LIMIT_BYTES)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise Error(f"lookaside storage {url}: only file, http and https are known")
    try:
        with Path(unquote(parts.path)).open("rb") as file:
            content = file.read(LIMIT_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Error(f"cannot read {url}: {error.strerror}") from error
    if len(content) > LIMIT_BYTES:
        raise Error(f"{url} is longer than {LIMIT_BYTES} bytes")
    return content


def _signature(blob: bytes, where: str) -> Signature:
    """The signature in a lookaside file: an OpenPGP message, or behind a zero byte the name of another format."""
    if blob[:1] and blob[0] & 0x80:  # the first bit of every OpenPGP packet
        return Signature(Format.SIMPLE, blob)
    name, newline, content = blob[1:].partition(b"\n")
    if blob[:1] == b"\0" and newline and name == b"simple-signing":
        return Signature(Format.SIMPLE, content)
    if blob[:1] == b"\0" and newline and name == b"sigstore-json":
        fields = Object(parse(content, where), where, ("payload", "annotations"), None)
        payload = base64.b64decode(fields.text("payload"))
        return Signature(Format.SIGSTORE, payload, _texts(fields.raw("annotations")))
    raise Error(f"{where} is no signature in a known format: it begins with {blob[:20]!r}")


# ---- attachments in the registry


def _attached(registry: "Registry", digest: str, total: _Total) -> list[Signature]:
    tag = f"{digest.replace(':', '-')}.sig"
    try:
        text, _ = registry.manifest(tag)
    except NotFound:
        return []
    subject = f"the signatures under tag {tag}"
    layers = Object(parse(text, subject), subject, ("layers",), None).raw("layers")
    if not isinstance(layers, list):
        raise Error(f"{subject}: layers must be a list")
    listed = []
    for layer in layers:
        fields = Object(layer, subject, ("mediaType", "digest", "size"), None)
        if fields.text("mediaType") != SIGSTORE_MEDIA_TYPE:
            continue  # an attestation, or another thing that signs nothing
        size = fields.integer("size")
        if not is_digest(fields.raw("digest")) or not 0 <= size <= LIMIT_BYTES:
            raise Error(f"{subject}: one has no digest, or more than {LIMIT_BYTES} bytes")
        annotations = _texts(fields.raw("annotations"))
        total.add(size + sum(map(len, annotations.values())), subject)
        listed.append((fields.text("digest"), size, annotations))
    return [
        Signature(Format.SIGSTORE, registry.document(found, size), annotations) for found, size, annotations in listed
    ]


def _texts(value: object) -> dict[str, str]:
    """Those annotations that are texts."""
    if not isinstance(value, dict):
        return {}
    return {key: text for key, text in value.items() if isinstance(text, str)}


# ---- registries.d


def _files(directory: Path | None) -> list[Path]:
    if directory is None:
        return []
    try:
        return sorted(path for path in directory.iterdir() if path.suffix == ".yaml")
    except FileNotFoundError:
        return []


def _mapping(value: object, subject: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) and key for key in value):
        raise Error(f"{subject} must be a mapping of scopes")
    return value


def _entry(value: object, subject: str) -> dict[str, Any]:
    entry = _mapping(value or {}, subject)
    for key in _TEXTS:
        if not isinstance(entry.get(key, ""), str):
            raise Error(f"{subject}: {key} must be a URL")
    if not isinstance(entry.get("use-sigstore-attachments", False), bool):
        raise Error(f"{subject}: use-sigstore-attachments must be true or false")
    return entry
