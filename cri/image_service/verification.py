"""Decides whether an image's signatures meet what a policy demands. Runs in worker processes."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial

from cri.image_service import openpgp
from cri.image_service.demands import Demands, SignedBy, SigstoreSigned
from cri.image_service.refusal import refusal
from cri.image_service.signature import Format, Signature, claim
from oci.errors import Error

_SHOWN_REASONS = 5


def check(demands: Demands, identity: str, manifest_digest: str, signatures: Sequence[Signature]) -> None:
    """Raises PermissionDenied ("SignatureValidationFailed…", with all reasons) unless each demand is met.

    A demand is met by one signature of its format whose signer is trusted, and whose payload names `manifest_digest`
    (sha256) and an identity that the demand accepts for the image that is meant by `identity`.
    """
    subject = f"image {identity or manifest_digest}"
    for signed_by in demands.signed_by:
        verify = partial(_check_signed_by, signed_by, identity, manifest_digest)
        _check_one(verify, Format.SIMPLE, signatures, f"{subject}: signedBy")
    for sigstore_signed in demands.sigstore_signed:
        verify = partial(_check_sigstore_signed, sigstore_signed, identity, manifest_digest)
        _check_one(verify, Format.SIGSTORE, signatures, f"{subject}: sigstoreSigned")


def _check_one(
    verify: Callable[[Signature], None], wanted: Format, signatures: Sequence[Signature], subject: str
) -> None:
    """Raises PermissionDenied unless one of the signatures passes."""
    reasons: list[str] = []
    for signature in signatures:
        if signature.format is not wanted:
            continue
        try:
            verify(signature)
            return
        except Error as error:
            reasons.append(str(error))
        except Exception as error:  # a stranger wrote these bytes: whatever a parser stumbles over rejects them
            reasons.append(f"it cannot be read: {error!r}")
    others = len(signatures) - len(reasons)
    if not reasons:
        seen = f" ({others} of another format)" if others else ""
        raise refusal(f"{subject}: a signature is required, but there is none{seen}")
    told = list(dict.fromkeys(reasons))
    more = f"; and {len(told) - _SHOWN_REASONS} more" if len(told) > _SHOWN_REASONS else ""
    raise refusal(f"{subject}: none of {len(reasons)} signatures counts: {'; '.join(told[:_SHOWN_REASONS])}{more}")


def _check_signed_by(wanted: SignedBy, identity: str, manifest_digest: str, signature: Signature) -> None:
    payload = openpgp.verified(signature.content, wanted.keyrings)
    _check_claim(wanted, identity, manifest_digest, payload, Format.SIMPLE)


def _check_sigstore_signed(wanted: SigstoreSigned, identity: str, manifest_digest: str, signature: Signature) -> None:
    from cri.image_service import sigstore  # noqa: PLC0415 (a policy may do without it, and it takes a while to load)

    payload = sigstore.verified(signature, wanted, datetime.now(UTC))
    _check_claim(wanted, identity, manifest_digest, payload, Format.SIGSTORE)


def _check_claim(
    wanted: SignedBy | SigstoreSigned, identity: str, manifest_digest: str, payload: bytes, signed_as: Format
) -> None:
    claimed = claim(payload, signed_as)
    if claimed.manifest_digest != manifest_digest:
        raise Error(f"it is for the manifest {claimed.manifest_digest}, not {manifest_digest}")
    if not wanted.identity.accepts(identity, claimed.reference):
        raise Error(f"it is for {claimed.reference!r}, which {wanted.identity.match} does not accept")
