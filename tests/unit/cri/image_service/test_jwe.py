"""A JSON Web Encryption is opened by the key it is for, in each of its forms, and garbage is an error."""

import json
import os
import subprocess
import sys
from base64 import urlsafe_b64encode
from contextlib import suppress
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA1, SHA256
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.keywrap import aes_key_wrap
from hypothesis import given
from hypothesis import strategies as st

from cri.image_service import jwe
from oci.errors import Error

RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
SAID = b'{"symkey": "secret"}'


def text(content: bytes) -> str:
    return urlsafe_b64encode(content).rstrip(b"=").decode()


def wrapped_for_rsa(content_key: bytes, algorithm: str) -> tuple[dict[str, Any], bytes]:
    kind = {"RSA-OAEP": SHA1, "RSA-OAEP-256": SHA256}[algorithm]
    oaep = padding.OAEP(padding.MGF1(kind()), kind(), None)
    return {"alg": algorithm}, RSA_KEY.public_key().encrypt(content_key, oaep)


def wrapped_for_ec(content_key: bytes, algorithm: str) -> tuple[dict[str, Any], bytes]:
    """As RFC 7518, 4.6, has it, with both parties named."""
    ephemeral = ec.generate_private_key(ec.SECP256R1())
    size = int(algorithm[-5:-2]) // 8
    info = b"".join(len(each).to_bytes(4, "big") + each for each in (algorithm.encode(), b"Alice", b"Bob"))
    secret = ephemeral.exchange(ec.ECDH(), EC_KEY.public_key())
    key = ConcatKDFHash(SHA256(), size, info + (size * 8).to_bytes(4, "big")).derive(secret)
    point = ephemeral.public_key().public_numbers()
    header = {
        "alg": algorithm,
        "epk": {
            "kty": "EC",
            "crv": "P-256",
            "x": text(point.x.to_bytes(32, "big")),
            "y": text(point.y.to_bytes(32, "big")),
        },
        "apu": text(b"Alice"),
        "apv": text(b"Bob"),
    }
    return header, aes_key_wrap(key, content_key)


def encrypted(algorithms: list[str], encryption: str = "A256GCM", **more: str) -> dict[str, Any]:
    """A JWE in its general form, for the RSA or the elliptic-curve key by each of `algorithms`."""
    content_key = os.urandom(int(encryption[1:4]) // 8)
    recipients = []
    for algorithm in algorithms:
        wrap = wrapped_for_rsa if algorithm.startswith("RSA") else wrapped_for_ec
        header, key = wrap(content_key, algorithm)
        recipients.append({"header": header, "encrypted_key": text(key)})
    protected, iv = text(json.dumps({"enc": encryption}).encode()), os.urandom(12)
    associated = ".".join([protected, *more.values()]).encode()
    sealed = AESGCM(content_key).encrypt(iv, SAID, associated)
    parts = {"iv": text(iv), "ciphertext": text(sealed[:-16]), "tag": text(sealed[-16:])}
    return {"protected": protected, "recipients": recipients, **parts, **more}


def opened(document: dict[str, Any], *keys: jwe.PrivateKey) -> bytes | None:
    return jwe.decrypt(json.dumps(document).encode(), keys)


@pytest.mark.parametrize("encryption", ["A128GCM", "A192GCM", "A256GCM"])
@pytest.mark.parametrize(
    "algorithm", ["RSA-OAEP", "RSA-OAEP-256", "ECDH-ES+A128KW", "ECDH-ES+A192KW", "ECDH-ES+A256KW"]
)
def test_every_algorithm_is_opened_by_the_key_it_is_for_and_no_other(algorithm: str, encryption: str) -> None:
    document = encrypted([algorithm], encryption)
    mine = RSA_KEY if algorithm.startswith("RSA") else EC_KEY
    others: list[jwe.PrivateKey] = [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP256R1())]
    others.append(ec.generate_private_key(ec.SECP384R1()))

    assert opened(document, *others, mine) == SAID
    assert opened(document, *others) is None
    assert opened(document) is None


def test_any_recipient_of_several_may_open_it() -> None:
    document = encrypted(["RSA-OAEP", "ECDH-ES+A256KW"])

    assert opened(document, RSA_KEY) == opened(document, EC_KEY) == SAID


def test_additional_data_is_authenticated_too() -> None:
    document = encrypted(["RSA-OAEP"], aad=text(b"more"))

    assert opened(document, RSA_KEY) == SAID
    assert opened({**document, "aad": text(b"other")}, RSA_KEY) is None


def test_a_flattened_one_has_its_only_recipient_beside_the_rest() -> None:
    document = encrypted(["RSA-OAEP"])
    [recipient] = document.pop("recipients")

    assert opened({**document, **recipient}, RSA_KEY) == SAID


@given(st.binary(max_size=200) | st.text(alphabet='{}.":,abcAB_-=\\', max_size=60).map(str.encode))
def test_garbage_is_an_error(garbage: bytes) -> None:
    with pytest.raises(Error):
        jwe.decrypt(garbage, [RSA_KEY])


@given(st.sampled_from(["protected", "recipients", "iv", "ciphertext", "tag"]), st.none() | st.integers() | st.text())
def test_a_changed_part_opens_nothing(name: str, value: object) -> None:
    document = {**encrypted(["ECDH-ES+A256KW"]), name: value}

    with suppress(Error):
        assert opened(document, EC_KEY) is None


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"kty": "oct", "k": "AAAA"},
        {"kty": "EC", "crv": "P-256", "x": "AAAA", "y": "AAAA", "d": "AAAA"},
        {"kty": "EC", "crv": "P-1", "x": "AAAA", "y": "AAAA", "d": "AAAA"},
        {"kty": "RSA", "n": "AAAA", "e": "AQAB", "d": "AAAA", "p": "AA", "q": "AA", "dp": "AA", "dq": "AA", "qi": "A"},
        {"kty": "RSA", "n": 7},
    ],
)
def test_a_json_web_key_without_a_usable_private_key_is_a_value_error(document: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        jwe.from_jwk(document)


def test_a_worker_that_meets_no_encrypted_layer_does_not_load_cryptography() -> None:
    program = "import sys, cri.image_service.worker, cri.image_service.images; print('cryptography' in sys.modules)"

    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert said == "False\n"
