"""What a worker does about signatures: fetches what lies there, verifies what is demanded, speaks JSON of both.

What is asked: {"identity": the image's meant name, "demands": …, "registries_d": the directory, "" for none}.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from cri.image_service import signature_storage, verification
from cri.image_service.demands import Demands
from cri.image_service.policy import registry_scopes
from cri.image_service.reference import Reference
from cri.image_service.refusal import refusal
from cri.image_service.signature import Signature
from oci.errors import Error, Unavailable

if TYPE_CHECKING:
    from cri.image_service.registry import Registry

Asked = dict[str, Any]


def asked(identity: str, demands: Demands, registries_d: Path | None) -> Asked:
    return {
        "identity": identity,
        "demands": msgspec.to_builtins(demands),
        "registries_d": str(registries_d) if registries_d is not None else "",
    }


def encoded(signatures: Sequence[Signature]) -> list[Any]:
    """JSON of signatures, as `decoded` reads it."""
    made: list[Any] = msgspec.to_builtins(list(signatures))
    return made


def decoded(value: Any) -> list[Signature]:
    return msgspec.convert(value, list[Signature])


def of_pull(
    registry: "Registry", source: dict[str, Any], reference: str, asked: Asked, digest: str
) -> list[Signature] | None:
    """The manifest's signatures, after they have met what is demanded; None where nothing is and none can be had.

    Raises PermissionDenied ("SignatureValidationFailed…"), or Unavailable where a server does not answer.
    """
    demands = msgspec.convert(asked["demands"], Demands)
    try:
        found = _fetched(registry, source, reference, asked, digest)
    except Error:
        if demands:
            raise
        return None  # they were to be kept for another namespace's pods, which may ask again
    verification.check(demands, asked["identity"], digest, found)
    return found


def newer(registry: "Registry", source: dict[str, Any], asked: Asked, digest: str) -> list[Signature]:
    """The signatures that there are now for a manifest that is on the node, after they have met what is demanded."""
    found = _fetched(registry, source, digest, asked, digest)
    verification.check(msgspec.convert(asked["demands"], Demands), asked["identity"], digest, found)
    return found


def verify(asked: Asked, digest: str, signatures: Any) -> None:
    """Raises PermissionDenied ("SignatureValidationFailed…") unless the signatures meet what is demanded."""
    verification.check(msgspec.convert(asked["demands"], Demands), asked["identity"], digest, decoded(signatures))


def _fetched(
    registry: "Registry", source: dict[str, Any], reference: str, asked: Asked, digest: str
) -> list[Signature]:
    """What lies where the source's own name says, which for a mirror is the mirror's (as containers/image does)."""
    tag, by_digest = ("", reference) if ":" in reference else (reference, "")
    place = Reference(source["host"], source["repository"], tag, by_digest)
    directory = Path(asked["registries_d"]) if asked["registries_d"] else None
    try:
        storage = signature_storage.load(directory, registry_scopes(place))
        return signature_storage.fetch(registry, storage, source["repository"], digest)
    except Unavailable:
        raise
    except (Error, OSError) as error:
        raise refusal(f"cannot read the signatures of image {asked['identity']}: {error}") from error
