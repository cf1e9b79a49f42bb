"""JSON Web Encryption as ocicrypt writes it: a content key wrapped for RSA or elliptic-curve keys; pure.

Source: RFC 7516 (JWE), RFC 7518 (its algorithms), RFC 7517 and 7518, 6 (JSON Web Keys).
"""

import binascii
import json
from base64 import urlsafe_b64decode
from collections.abc import Mapping, Sequence
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA1, SHA256
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap

from oci.errors import Error, Unimplemented

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey

_RSA_HASHES = {"RSA-OAEP": SHA1, "RSA-OAEP-256": SHA256}
_ECDH_KEY_BYTES = {"ECDH-ES+A128KW": 16, "ECDH-ES+A192KW": 24, "ECDH-ES+A256KW": 32}
_CONTENT_KEY_BYTES = {"A128GCM": 16, "A192GCM": 24, "A256GCM": 32}
_CURVES: Mapping[str, ec.EllipticCurve] = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}
_TAG_BYTES = 16


def decrypt(text: bytes, keys: Sequence[PrivateKey]) -> bytes | None:
    """What the JWE `text`, in any of its serializations, says to the first of `keys` that it is meant for.

    None where it is for none of them. Raises Error for what is no JWE, Unimplemented for algorithms unknown here.
    """
    try:
        parts, recipients = _parsed(text)
        protected = _header(parts.get("protected", ""))
        shared = {**protected, **parts.get("unprotected", {})}
        headers = [{**shared, **each.get("header", {})} for each in recipients]
        for header in headers:
            _check(header)
        content = (_bytes(parts["iv"]), _bytes(parts["ciphertext"]) + _whole_tag(_bytes(parts["tag"])))
        associated = ".".join([parts.get("protected", ""), *([parts["aad"]] if "aad" in parts else [])]).encode()
        for header, recipient in zip(headers, recipients, strict=True):
            wrapped = _bytes(recipient["encrypted_key"])
            for key in keys:
                content_key = _unwrapped(header, wrapped, key)
                if content_key is None or len(content_key) != _CONTENT_KEY_BYTES[header["enc"]]:
                    continue
                try:
                    return AESGCM(content_key).decrypt(*content, associated)
                except InvalidTag:
                    continue
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Error(f"not a JSON Web Encryption: {error!r}") from error
    return None


def from_jwk(document: Mapping[str, Any]) -> PrivateKey:
    """The private key that a JSON Web Key holds. Raises ValueError where it holds none of a known kind."""
    try:
        if document["kty"] == "EC":
            numbers = _point(document)
            return ec.EllipticCurvePrivateNumbers(_number(document["d"]), numbers).private_key()
        if document["kty"] == "RSA":
            public = rsa.RSAPublicNumbers(_number(document["e"]), _number(document["n"]))
            p, q, d, dp, dq, qi = (_number(document[name]) for name in ("p", "q", "d", "dp", "dq", "qi"))
            return rsa.RSAPrivateNumbers(p, q, d, dp, dq, qi, public).private_key()
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a JSON Web Key without a usable {error}") from error
    raise ValueError(f"a JSON Web Key of kind {document['kty']!r}")


def _parsed(text: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The members that all recipients share, and the recipients."""
    if not text.lstrip().startswith(b"{"):
        names = ("protected", "encrypted_key", "iv", "ciphertext", "tag")
        parts: dict[str, Any] = dict(zip(names, text.decode("ascii").strip().split("."), strict=True))
        return parts, [parts]
    parts = json.loads(text)
    recipients = parts.get("recipients", [parts])
    if not isinstance(recipients, list) or not all(isinstance(each, dict) for each in recipients):
        raise ValueError("its recipients are no list of objects")
    return parts, recipients


def _check(header: Mapping[str, Any]) -> None:
    """Raises Unimplemented unless all that the header asks for is known here."""
    if header.get("alg") not in (*_RSA_HASHES, *_ECDH_KEY_BYTES):
        raise Unimplemented(f"a key wrapped by {header.get('alg')!r} is not supported")
    if header.get("enc") not in _CONTENT_KEY_BYTES:
        raise Unimplemented(f"a key encrypted by {header.get('enc')!r} is not supported")
    if asked := [name for name in ("crit", "zip") if name in header]:
        raise Unimplemented(f"a JSON Web Encryption with {', '.join(asked)} is not supported")


def _unwrapped(header: Mapping[str, Any], wrapped: bytes, key: PrivateKey) -> bytes | None:
    """The content key; None where it was not wrapped for `key`."""
    algorithm = header["alg"]
    if isinstance(key, rsa.RSAPrivateKey) and algorithm in _RSA_HASHES:
        kind = _RSA_HASHES[algorithm]
        try:
            return key.decrypt(wrapped, padding.OAEP(padding.MGF1(kind()), kind(), None))
        except ValueError:
            return None
    if isinstance(key, ec.EllipticCurvePrivateKey) and algorithm in _ECDH_KEY_BYTES:
        ephemeral = _point(header["epk"])
        if ephemeral.curve.name != key.curve.name:
            return None
        size = _ECDH_KEY_BYTES[algorithm]
        info = [algorithm.encode(), _bytes(header.get("apu", "")), _bytes(header.get("apv", ""))]
        told = b"".join(len(each).to_bytes(4, "big") + each for each in info) + (size * 8).to_bytes(4, "big")
        secret = key.exchange(ec.ECDH(), ephemeral.public_key())
        try:
            return aes_key_unwrap(ConcatKDFHash(SHA256(), size, told).derive(secret), wrapped)
        except InvalidUnwrap:
            return None
    return None


def _point(jwk: Mapping[str, Any]) -> ec.EllipticCurvePublicNumbers:
    curve = _CURVES.get(jwk["crv"])
    if curve is None:
        raise ValueError(f"the curve {jwk['crv']!r} is not known")
    return ec.EllipticCurvePublicNumbers(_number(jwk["x"]), _number(jwk["y"]), curve)


def _whole_tag(tag: bytes) -> bytes:
    """AESGCM takes the tag from the end of the ciphertext: a short one would shift the boundary."""
    if len(tag) != _TAG_BYTES:
        raise ValueError(f"its tag has {len(tag)} bytes")
    return tag


def _header(text: str) -> dict[str, Any]:
    header = json.loads(_bytes(text)) if text else {}
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header


def _number(text: str) -> int:
    return int.from_bytes(_bytes(text), "big")


def _bytes(text: str) -> bytes:
    try:
        return urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error as error:
        raise ValueError(f"not base64url: {text[:40]!r}") from error
