"""What a policy demands of an image's signatures, with all keys read: what a worker verifies by."""

from dataclasses import dataclass

from cri.image_service.signed_identity import SignedIdentity


@dataclass(frozen=True, slots=True)
class SignedBy:
    """An OpenPGP signature by a key of these keyrings."""

    keyrings: tuple[bytes, ...]  # binary or armored
    identity: SignedIdentity


@dataclass(frozen=True, slots=True)
class Fulcio:
    """A certificate that was given to someone whom an OpenID issuer knows."""

    authorities: bytes  # PEM
    oidc_issuer: str
    subject_email: str


@dataclass(frozen=True, slots=True)
class Pki:
    """A certificate of one's own authority; at least one of the subjects is set, and all that are set must be there."""

    roots: bytes  # PEM
    intermediates: bytes = b""  # PEM
    subject_email: str = ""
    subject_hostname: str = ""


@dataclass(frozen=True, slots=True)
class SigstoreSigned:
    """A sigstore signature by one of the keys, or by a certificate: exactly one of these three is set."""

    identity: SignedIdentity
    keys: tuple[bytes, ...] = ()  # PEM
    fulcio: Fulcio | None = None
    pki: Pki | None = None
    rekor_keys: tuple[bytes, ...] = ()  # PEM; where any is given, a log with one of them must have recorded it


@dataclass(frozen=True, slots=True)
class Demands:
    """Each must be met, by one signature at least."""

    signed_by: tuple[SignedBy, ...] = ()
    sigstore_signed: tuple[SigstoreSigned, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.signed_by or self.sigstore_signed)
