"""Signers of images: gpg with a home of its own, keys as cosign's, an authority as Fulcio, a log as Rekor."""

import base64
import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cri.image_service.signature import ANNOTATION, SIGSTORE_MEDIA_TYPE, Format, Signature
from cri.image_service.sigstore import BUNDLE, CERTIFICATE, CHAIN
from tests.fakes.layers import OCI_MANIFEST, digest
from tests.fakes.registry import FakeRegistry

SIMPLE = "atomic container signature"
COSIGN = "cosign container image signature"
ISSUER = "https://issuer.test"
EMAIL = "dev@example.test"
SIGNED_AT = datetime(2024, 3, 1, 12, tzinfo=UTC)

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


def payload(manifest_digest: str, reference: str, kind: str, optional: Any = None) -> bytes:
    critical = {
        "type": kind,
        "image": {"docker-manifest-digest": manifest_digest},
        "identity": {"docker-reference": reference},
    }
    return json.dumps({"critical": critical, "optional": optional or {}}).encode()


# ---- OpenPGP


class OpenPgp:
    """A home of gpg's with one key a name. Use with `with`: it takes its agent and its directory along."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def __enter__(self) -> "OpenPgp":
        self.home = Path(tempfile.mkdtemp(prefix="gpg-", dir="/tmp"))  # short: the agent's socket lies in it
        for name in self._names:
            self.run("--passphrase", "", "--quick-gen-key", name, "ed25519", "sign", "never")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        subprocess.run(["gpgconf", "--homedir", str(self.home), "--kill", "all"], check=False, capture_output=True)
        while self.home.exists():  # the agent takes its sockets away as it ends
            shutil.rmtree(self.home, ignore_errors=True)

    def key(self, name: str, *, armored: bool = False) -> bytes:
        return self.run(*(["--armor"] if armored else []), "--export", name)

    def fingerprint(self, name: str) -> str:
        listed = self.run("--list-keys", "--with-colons", name).decode().splitlines()
        return next(line for line in listed if line.startswith("fpr:")).split(":")[9]

    def sign(self, content: bytes, *names: str, options: Sequence[str] = ("--sign",)) -> bytes:
        return self.run(*(f"--local-user={name}" for name in names), *options, given=content)

    def simple_signature(self, manifest_digest: str, reference: str, name: str) -> bytes:
        return self.sign(payload(manifest_digest, reference, SIMPLE), name)

    def run(self, *words: str, given: bytes = b"") -> bytes:
        command = ["gpg", "--homedir", str(self.home), "--batch", "--quiet", "--pinentry-mode", "loopback", *words]
        return subprocess.run(command, input=given, capture_output=True, check=True).stdout


# ---- sigstore


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def public_pem(key: PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def sign(key: PrivateKey, content: bytes) -> bytes:
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(content, ec.ECDSA(SHA256()))
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(content, padding.PKCS1v15(), SHA256())
    return key.sign(content)


def signature(key: PrivateKey, content: bytes, annotations: Mapping[str, str] | None = None) -> Signature:
    encoded = base64.b64encode(sign(key, content)).decode()
    return Signature(Format.SIGSTORE, content, {ANNOTATION: encoded, **(annotations or {})})


@dataclass(frozen=True)
class Log:
    """Signs that it has recorded, as Rekor does."""

    key: ec.EllipticCurvePrivateKey = field(default_factory=new_key)

    def recorded(
        self,
        signature: Signature,
        key_or_certificate: bytes,
        moment: datetime = SIGNED_AT,
        entry: Mapping[str, Any] | None = None,
        payload: Mapping[str, Any] | None = None,
    ) -> Signature:
        """`signature` with the log's bundle; `entry` and `payload` replace what the log would say."""
        body = entry or {
            "apiVersion": "0.0.1",
            "kind": "hashedrekord",
            "spec": {
                "data": {"hash": {"algorithm": "sha256", "value": sha256(signature.content).hexdigest()}},
                "signature": {
                    "content": signature.annotations[ANNOTATION],
                    "publicKey": {"content": base64.b64encode(key_or_certificate).decode()},
                },
            },
        }
        said = {
            "body": base64.b64encode(json.dumps(body).encode()).decode(),
            "integratedTime": int(moment.timestamp()),
            "logIndex": 7,
            "logID": "c0d23d6a",
        }
        canonical = json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
        bundle = {
            "SignedEntryTimestamp": base64.b64encode(sign(self.key, canonical)).decode(),
            "Payload": {**said, **(payload or {})},
        }
        return replace(signature, annotations={**signature.annotations, BUNDLE: json.dumps(bundle)})


@dataclass(frozen=True)
class Authority:
    """A root and an intermediate that certify for ten minutes, as Fulcio does."""

    name: str = "sigstore"
    root_key: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    key: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    starts: datetime = SIGNED_AT - timedelta(days=100)
    ends: datetime = SIGNED_AT + timedelta(days=100)

    @property
    def root(self) -> bytes:
        made = _certificate(self.name, self.root_key, self.name, self.root_key, self.starts, self.ends, authority=True)
        return made.public_bytes(Encoding.PEM)

    @property
    def intermediate(self) -> bytes:
        name = f"{self.name}-intermediate"
        made = _certificate(name, self.key, self.name, self.root_key, self.starts, self.ends, authority=True)
        return made.public_bytes(Encoding.PEM)

    @property
    def chain(self) -> str:
        return (self.intermediate + self.root).decode()

    def certificate(
        self,
        key: PrivateKey,
        *,
        names: Sequence[x509.GeneralName] = (x509.RFC822Name(EMAIL),),
        issuer: str = ISSUER,
        issuer_v2: str | None = None,
        starts: datetime = SIGNED_AT - timedelta(minutes=5),
        ends: datetime = SIGNED_AT + timedelta(minutes=5),
        usage: x509.ObjectIdentifier | None = ExtendedKeyUsageOID.CODE_SIGNING,
    ) -> bytes:
        extensions: list[tuple[x509.ExtensionType, bool]] = [(x509.SubjectAlternativeName(names), True)]
        if issuer:
            oid = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
            extensions.append((x509.UnrecognizedExtension(oid, issuer.encode()), False))
        if issuer_v2 is not None:
            oid = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.8")
            text = issuer_v2.encode()
            size = bytes([len(text)]) if len(text) < 128 else bytes([0x81, len(text)])
            extensions.append((x509.UnrecognizedExtension(oid, b"\x0c" + size + text), False))
        made = _certificate(
            "", key, f"{self.name}-intermediate", self.key, starts, ends, usage=usage, extensions=extensions
        )
        return made.public_bytes(Encoding.PEM)


def certified(authority: Authority, key: PrivateKey, content: bytes, certificate: bytes) -> Signature:
    """A signature with its certificate and the chain above that."""
    return signature(key, content, {CERTIFICATE: certificate.decode(), CHAIN: authority.chain})


def attach(registry: FakeRegistry, repository: str, manifest_digest: str, signatures: Sequence[Signature]) -> None:
    """Puts sigstore signatures beside the image, where cosign does."""
    layers = []
    for each in signatures:
        registry.blobs[digest(each.content)] = each.content
        layers.append(
            {
                "mediaType": SIGSTORE_MEDIA_TYPE,
                "digest": digest(each.content),
                "size": len(each.content),
                "annotations": dict(each.annotations),
            }
        )
    manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": {}, "layers": layers}
    tag = f"{manifest_digest.replace(':', '-')}.sig"
    registry.manifests[f"{repository}:{tag}"] = (json.dumps(manifest).encode(), OCI_MANIFEST)


def _certificate(
    subject: str,
    key: PrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    starts: datetime,
    ends: datetime,
    *,
    authority: bool = False,
    usage: x509.ObjectIdentifier | None = ExtendedKeyUsageOID.CODE_SIGNING,
    extensions: Sequence[tuple[x509.ExtensionType, bool]] = (),
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(starts)
        .not_valid_after(ends)
    )
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), False)
    if authority:
        builder = builder.add_extension(x509.BasicConstraints(True, None), True)
        builder = builder.add_extension(
            x509.KeyUsage(False, False, False, False, False, True, True, False, False), True
        )
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(issuer_key, SHA256())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)] if text else [])
