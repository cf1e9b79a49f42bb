"""An image's signatures as they are found, and what a signed payload claims. Nothing here is believed yet.

Source: containers/image, docs/containers-signature.5.md; cosign, specs/SIGNATURE_SPEC.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from cri.image_service.manifest import is_digest
from cri.image_service.strict_json import Object, parse
from oci.errors import Error

ANNOTATION = "dev.cosignproject.cosign/signature"
SIGSTORE_MEDIA_TYPE = "application/vnd.dev.cosign.simplesigning.v1+json"


class Format(StrEnum):
    SIMPLE = "simple signing"  # an OpenPGP message that holds its payload
    SIGSTORE = "sigstore"  # a payload, signed by an annotation beside it


_TYPES = {Format.SIMPLE: "atomic container signature", Format.SIGSTORE: "cosign container image signature"}


@dataclass(frozen=True, slots=True)
class Signature:
    format: Format
    content: bytes
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Claim:
    """What a payload says was signed."""

    manifest_digest: str
    reference: str


def claim(payload: bytes, signed_as: Format) -> Claim:
    """What the payload of a verified signature claims. Raises Error where it is not exactly as the format says."""
    subject = "the signed payload"
    top = Object(parse(payload, subject), subject, ("critical", "optional"))
    if not (signed_as is Format.SIGSTORE and top.raw("optional") is None):  # null is what cosign writes for nothing
        optional = Object(top.raw("optional"), f"{subject}: optional", (), None)
        if "creator" in optional:
            optional.text("creator")
        if "timestamp" in optional and not _is_whole(optional.raw("timestamp")):
            raise Error(f"{subject}: optional: timestamp must be an integer")
    critical = Object(top.raw("critical"), f"{subject}: critical", ("type", "image", "identity"))
    if critical.text("type") != _TYPES[signed_as]:
        raise Error(f"{subject} is of type {critical.text('type')!r}, expected {_TYPES[signed_as]!r}")
    image = Object(critical.raw("image"), f"{subject}: image", ("docker-manifest-digest",))
    identity = Object(critical.raw("identity"), f"{subject}: identity", ("docker-reference",))
    digest = image.text("docker-manifest-digest")
    if not is_digest(digest):
        raise Error(f"{subject}: docker-manifest-digest {digest!r} is not a digest")
    return Claim(digest, identity.text("docker-reference"))


def _is_whole(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == int(value)
