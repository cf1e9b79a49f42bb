"""Verifies one sigstore signature: by a key, by a certificate of Fulcio's that Rekor has logged, or by one's own PKI.

Runs in worker processes. Nothing is fetched: what is trusted is in the policy, the rest lies beside the signature.
Source: cosign, specs/SIGNATURE_SPEC.md; Rekor, hashedrekord 0.0.1; Fulcio, docs/oid-info.md.
"""

import base64
import binascii
import hashlib
import ipaddress
import json
import re
from datetime import UTC, datetime
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID
from cryptography.x509.verification import Criticality, ExtensionPolicy, Policy, PolicyBuilder, Store, VerificationError

from cri.image_service.demands import Fulcio, Pki, SigstoreSigned
from cri.image_service.signature import ANNOTATION, Signature
from cri.image_service.strict_json import Object, parse
from oci.errors import Error

CERTIFICATE = "dev.sigstore.cosign/certificate"
CHAIN = "dev.sigstore.cosign/chain"
BUNDLE = "dev.sigstore.cosign/bundle"
_CHAIN_LIMIT = 10  # certificates
_LARGEST_EXACT = 1 << 53  # integers up to here are the same in every JSON
_ISSUER = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")  # its bytes are the issuer
_ISSUER_V2 = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.8")  # its bytes are DER of a UTF8String
_PEM = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----\s(.*?)-----END \1-----\s*", re.DOTALL)

_PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey


def verified(signature: Signature, wanted: SigstoreSigned, now: datetime) -> bytes:
    """The signature's payload, where one whom `wanted` trusts has signed it. Raises Error saying what is wrong.

    `now` (UTC) is for certificates without a log that tells when they were used.
    """
    encoded = _annotation(signature, ANNOTATION)
    signed = _base64(encoded, "the signature")
    logs = [_log_key(each) for each in wanted.rekor_keys]
    if wanted.fulcio is not None:
        if not logs:
            raise Error("certificates of Fulcio count only with the key of a Rekor log")
        certificate = _annotation(signature, CERTIFICATE)
        moment = _logged_at(signature, logs, signed, _pem_body(certificate, "the certificate"))
        keys = [_fulcio_key(signature, certificate, wanted.fulcio, moment)]
    elif wanted.pki is not None:
        keys = [_pki_key(signature, _annotation(signature, CERTIFICATE), wanted.pki, now)]
    else:
        keys = [_public_key(each, "the policy's key") for each in wanted.keys]
        if logs:
            keys = [_logged_key(signature, logs, signed, keys)]
    if not any(_is_signed(signature.content, signed, key) for key in keys):
        raise Error("no key of the policy made the signature" if wanted.keys else "the certificate's key did not sign")
    return signature.content


# ---- keys


def _is_signed(content: bytes, signed: bytes, key: _PublicKey) -> bool:
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signed, content, ec.ECDSA(SHA256()))
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(signed, content, padding.PKCS1v15(), SHA256())
        else:
            key.verify(signed, content)
    except InvalidSignature:
        return False
    return True


def _public_key(text: bytes, subject: str) -> _PublicKey:
    try:
        return _usable(load_pem_public_key(text.strip()), subject)
    except ValueError as error:
        raise Error(f"{subject} is not a public key in PEM: {error}") from error


def _usable(key: object, subject: str) -> _PublicKey:
    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey):
        raise Error(f"{subject} is a {type(key).__name__}; ECDSA, RSA and Ed25519 are known")
    return key


def _log_key(text: bytes) -> ec.EllipticCurvePublicKey:
    key = _public_key(text, "the Rekor log's key")
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise Error("the Rekor log's key is not one of ECDSA")
    return key


# ---- what a Rekor log promises to have recorded


def _logged_key(
    signature: Signature, logs: list[ec.EllipticCurvePublicKey], signed: bytes, keys: list[_PublicKey]
) -> _PublicKey:
    """The one of `keys` that the log entry names."""
    troubles = []
    for key in keys:
        try:
            _logged_at(signature, logs, signed, key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
            return key
        except Error as error:
            troubles.append(str(error))
    raise Error("; ".join(dict.fromkeys(troubles)))


def _logged_at(
    signature: Signature, logs: list[ec.EllipticCurvePublicKey], signed: bytes, key_or_certificate: bytes
) -> datetime:
    """When one of `logs` took in the signature with just this payload and this key or certificate (DER)."""
    subject = "the Rekor bundle"
    bundle = Object(parse(_annotation(signature, BUNDLE), subject), subject, ("SignedEntryTimestamp", "Payload"))
    payload = Object(bundle.raw("Payload"), subject, ("body", "integratedTime", "logIndex", "logID"))
    body, moment = payload.text("body"), payload.integer("integratedTime")
    entry = {"body": body, "integratedTime": moment, "logIndex": payload.integer("logIndex")}
    if any(isinstance(each, int) and not 0 <= each <= _LARGEST_EXACT for each in entry.values()):
        raise Error(f"{subject}: integratedTime or logIndex is out of range")
    # Canonical JSON (RFC 8785), which for texts and whole numbers is sorted, compact, and escapes no more than it must.
    canonical = json.dumps(
        {**entry, "logID": payload.text("logID")}, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    promise = _base64(bundle.text("SignedEntryTimestamp"), subject)
    if not any(_is_signed(canonical.encode(), promise, key) for key in logs):
        raise Error(f"{subject} is not signed by the log's key")
    _check_entry(parse(_base64(body, subject), f"{subject}'s entry"), signature.content, signed, key_or_certificate)
    return datetime.fromtimestamp(moment, UTC)


def _check_entry(entry: Any, payload: bytes, signed: bytes, key_or_certificate: bytes) -> None:
    """Raises Error unless the log's entry is of this payload, signature, and key or certificate."""
    subject = "the Rekor log's entry"
    top = Object(entry, subject, ("kind", "apiVersion", "spec"), None)
    kind = (top.text("kind"), top.text("apiVersion"))
    if kind != ("hashedrekord", "0.0.1"):
        raise Error(f"{subject} is {' '.join(kind)}, expected hashedrekord 0.0.1")
    spec = Object(top.raw("spec"), subject, ("data", "signature"), None)
    made = Object(spec.raw("signature"), subject, ("content", "publicKey"), None)
    recorded = Object(made.raw("publicKey"), subject, ("content",), None)
    if _pem_body(_base64(recorded.text("content"), subject).decode(), subject) != key_or_certificate:
        raise Error(f"{subject} is of another key or certificate")
    if _base64(made.text("content"), subject) != signed:
        raise Error(f"{subject} is of another signature")
    data = Object(spec.raw("data"), subject, ("hash",), None)
    hashed = Object(data.raw("hash"), subject, ("algorithm", "value"), None)
    if hashed.text("algorithm") != "sha256" or hashed.text("value") != hashlib.sha256(payload).hexdigest():
        raise Error(f"{subject} is of another payload")


# ---- certificates


def _fulcio_key(signature: Signature, text: str, wanted: Fulcio, moment: datetime) -> _PublicKey:
    leaf = _certificate(text)
    _check_chain(leaf, _chain(signature), _certificates(wanted.authorities, "the policy's Fulcio CA"), moment)
    issuer = _oidc_issuer(leaf)
    if issuer != wanted.oidc_issuer:
        raise Error(f"the certificate was given by the OIDC issuer {issuer!r}, expected {wanted.oidc_issuer!r}")
    _check_email(leaf, wanted.subject_email)
    return _usable(leaf.public_key(), "the certificate's key")


def _pki_key(signature: Signature, text: str, wanted: Pki, now: datetime) -> _PublicKey:
    leaf = _certificate(text)
    own = _certificates(wanted.intermediates, "the policy's intermediate CA") if wanted.intermediates else []
    _check_chain(leaf, [*own, *_chain(signature)], _certificates(wanted.roots, "the policy's root CA"), now)
    if wanted.subject_email:
        _check_email(leaf, wanted.subject_email)
    if wanted.subject_hostname and not _is_for_host(leaf, wanted.subject_hostname):
        raise Error(f"the certificate is not for the host {wanted.subject_hostname!r}")
    return _usable(leaf.public_key(), "the certificate's key")


def _check_chain(
    leaf: x509.Certificate, between: list[x509.Certificate], roots: list[x509.Certificate], moment: datetime
) -> None:
    """Raises Error unless `leaf`, for signing code, leads to one of `roots`, all of them being valid at `moment`."""
    any_way = Criticality.AGNOSTIC
    authorities = (
        ExtensionPolicy.webpki_defaults_ca()
        .may_be_present(x509.KeyUsage, any_way, _signs_certificates)
        .may_be_present(x509.ExtendedKeyUsage, any_way, _signs_code)
    )
    leaves = ExtensionPolicy.permit_all().may_be_present(x509.ExtendedKeyUsage, any_way, _signs_code)
    builder = PolicyBuilder().store(Store(roots)).time(moment.astimezone(UTC).replace(tzinfo=None))
    try:
        verifier = builder.extension_policies(ca_policy=authorities, ee_policy=leaves).build_client_verifier()
        verifier.verify(leaf, between)
    except VerificationError as error:
        raise Error(f"the certificate is not trusted: {str(error).partition(' (encountered')[0]}") from error


def _signs_certificates(_: Policy, __: x509.Certificate, usage: x509.KeyUsage | None) -> None:
    if usage is not None and not usage.key_cert_sign:
        raise ValueError("an authority's key is not for signing certificates")


def _signs_code(_: Policy, __: x509.Certificate, usage: x509.ExtendedKeyUsage | None) -> None:
    """A certificate without this extension is for everything (RFC 5280, 4.2.1.12)."""
    accepted = {ExtendedKeyUsageOID.CODE_SIGNING, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
    if usage is not None and accepted.isdisjoint(usage):
        raise ValueError("a certificate is not for code signing")


def _oidc_issuer(certificate: x509.Certificate) -> str:
    found = {
        each.oid: each.value.value
        for each in certificate.extensions
        if isinstance(each.value, x509.UnrecognizedExtension)
    }
    issuers = {found[_ISSUER].decode()} if _ISSUER in found else set()
    if _ISSUER_V2 in found:
        issuers.add(_utf8_string(found[_ISSUER_V2]))
    if len(issuers) != 1:
        raise Error("the certificate names no OIDC issuer" if not issuers else "the certificate names two OIDC issuers")
    return issuers.pop()


def _utf8_string(der: bytes) -> str:
    """The text of a DER UTF8String, and nothing after it."""
    if len(der) >= 2 and der[0] == 0x0C:
        size, start = der[1], 2
        if size & 0x80:
            start += size & 0x7F
            size = int.from_bytes(der[2:start])
        if start + size == len(der):
            return der[start:].decode()
    raise Error("the certificate's OIDC issuer is not a DER UTF8String")


def _check_email(certificate: x509.Certificate, wanted: str) -> None:
    names = _names(certificate)
    emails = names.get_values_for_type(x509.RFC822Name) if names is not None else []
    if wanted not in emails:
        raise Error(f"the certificate is for {', '.join(emails) or 'no email address'}, expected {wanted}")


def _is_for_host(certificate: x509.Certificate, host: str) -> bool:
    """Whether a name of the certificate is the host: an address as it is, a DNS name also by a wildcard label."""
    names = _names(certificate)
    if names is None:
        return False
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        wanted = host.rstrip(".").lower()
        _, _, parent = wanted.partition(".")
        known = [name.lower() for name in names.get_values_for_type(x509.DNSName)]
        return wanted in known or bool(parent and f"*.{parent}" in known)
    return address in names.get_values_for_type(x509.IPAddress)


def _names(certificate: x509.Certificate) -> x509.SubjectAlternativeName | None:
    try:
        found = certificate.extensions.get_extension_for_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME).value
    except x509.ExtensionNotFound:
        return None
    assert isinstance(found, x509.SubjectAlternativeName)  # what the oid is for
    return found


def _certificate(text: str) -> x509.Certificate:
    found = _certificates(text.encode(), "the signature's certificate")
    if len(found) != 1:
        raise Error(f"the signature has {len(found)} certificates, expected 1")
    return found[0]


def _chain(signature: Signature) -> list[x509.Certificate]:
    text = signature.annotations.get(CHAIN, "")
    found = _certificates(text.encode(), "the signature's certificate chain") if text.strip() else []
    if len(found) > _CHAIN_LIMIT:
        raise Error(f"the signature's certificate chain has {len(found)} certificates, more than {_CHAIN_LIMIT}")
    return found


def _certificates(text: bytes, subject: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(text)
    except ValueError as error:
        raise Error(f"{subject} is not a certificate in PEM: {error}") from error


# ---- small steps


def _annotation(signature: Signature, name: str) -> str:
    found = signature.annotations.get(name)
    if not found:
        raise Error(f"the signature has no {name}")
    return found


def _base64(text: str, subject: str) -> bytes:
    try:
        return base64.b64decode(text.replace("\n", "").replace("\r", ""), validate=True)  # signers may break lines
    except (binascii.Error, ValueError) as error:
        raise Error(f"{subject} is not base64") from error


def _pem_body(text: str, subject: str) -> bytes:
    """The bytes of the only block in `text`."""
    found = _PEM.fullmatch(text)
    if found is None:
        raise Error(f"{subject} is not a single key or certificate in PEM")
    return _base64(found.group(2), subject)
