"""Encrypted layers, as ocicrypt makes them: finds the private key that opens one, and decrypts its bytes as they come.

Runs in worker processes, and only where a layer is encrypted: nothing else needs `cryptography`. The private keys of
the node lie in one directory, which is read anew for each layer. Source: containers/ocicrypt, encryption.go and
blockcipher_aes_ctr.go; OCI image-spec, annotations "org.opencontainers.image.enc.…".
"""

import hashlib
import hmac
import json
import os
from base64 import b64decode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.serialization import load_der_private_key, load_pem_private_key

from cri.image_service import jwe
from oci.errors import Error, FailedPrecondition, Unimplemented

ENCRYPTION_ANNOTATIONS = "org.opencontainers.image.enc."
_WRAPPED_KEYS = f"{ENCRYPTION_ANNOTATIONS}keys."
_PUBLIC_OPTIONS = f"{ENCRYPTION_ANNOTATIONS}pubopts"
_CIPHER = "AES_256_CTR_HMAC_SHA256"
_KEY_BYTES = 32
_NONCE_BYTES = 16
_KEY_FILE_LIMIT_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class LayerKey:
    """What decrypts one layer."""

    key: bytes
    nonce: bytes
    mac: bytes  # HMAC-SHA256 of the ciphertext

    def decryption(self) -> "Decryption":
        return Decryption(self)


class Decryption:
    """One layer's way from ciphertext to plain bytes. What came is to be believed once `check` has passed."""

    def __init__(self, layer_key: LayerKey) -> None:
        self._cipher = Cipher(algorithms.AES(layer_key.key), modes.CTR(layer_key.nonce)).decryptor()
        self._mac = hmac.new(layer_key.key, digestmod=hashlib.sha256)
        self._expected = layer_key.mac

    def of(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self._mac.update(chunk)
            yield self._cipher.update(chunk)

    def check(self, subject: str) -> None:
        """Raises Error unless all the ciphertext that was encrypted has passed, and nothing else."""
        if not hmac.compare_digest(self._mac.digest(), self._expected):
            raise Error(f"{subject}: the ciphertext is not what was encrypted: its HMAC is {self._mac.hexdigest()}")


def open_layer(annotations: Mapping[str, str], keys_path: str, subject: str) -> LayerKey:
    """What decrypts the layer with these annotations, wrapped for a private key in the directory `keys_path`.

    Raises FailedPrecondition where no key there fits, Unimplemented where the layer's way of encryption is not known,
    Error where its annotations make no sense; all name `subject`.
    """
    wrapped = {
        name.removeprefix(_WRAPPED_KEYS): value
        for name, value in sorted(annotations.items())
        if name.startswith(_WRAPPED_KEYS) and value
    }
    schemes = ", ".join(wrapped)
    if not wrapped:
        raise Error(f"{subject} is encrypted, and no annotation {_WRAPPED_KEYS}* says for whom")
    if "jwe" not in wrapped:
        raise Unimplemented(f"{subject} is encrypted by {schemes}; only jwe is supported")
    if not keys_path:
        raise FailedPrecondition(f"{subject} is encrypted ({schemes}), and image.decryption_keys_path is not set")
    found = _read_keys(Path(keys_path))
    for text in wrapped["jwe"].split(","):
        try:
            opened = jwe.decrypt(b64decode(text, validate=True), found.keys)
        except (Error, ValueError) as error:
            kind = type(error) if isinstance(error, Error) else Error
            raise kind(f"{subject} is encrypted ({schemes}): {error}") from error
        if opened is not None:
            return _layer_key(opened, annotations.get(_PUBLIC_OPTIONS, ""), subject)
    raise FailedPrecondition(
        f"{subject} is encrypted ({schemes}), and {found.described}: it needs a private key that this node has not"
    )


@dataclass(frozen=True, slots=True)
class _Keys:
    directory: Path
    keys: tuple[jwe.PrivateKey, ...]
    unusable: tuple[str, ...]  # "path: why"

    @property
    def described(self) -> str:
        if not self.keys:
            text = f"there is no private key in {self.directory}"
        else:
            text = f"none of the {len(self.keys)} private keys in {self.directory} opens it"
        return f"{text} ({'; '.join(self.unusable)})" if self.unusable else text


def _read_keys(directory: Path) -> _Keys:
    """The private keys in all files below `directory`, which need not exist; a file that holds none is told."""
    keys: list[jwe.PrivateKey] = []
    unusable = []
    for parent, _, names in os.walk(directory):
        for path in sorted(Path(parent, name) for name in names):
            try:
                keys.append(_read_key(path))
            except OSError as error:
                unusable.append(f"{path}: {error.strerror}")
            except ValueError as error:
                unusable.append(f"{path}: {error}")
    return _Keys(directory, tuple(keys), tuple(unusable))


def _read_key(path: Path) -> jwe.PrivateKey:
    """Raises OSError or ValueError where the file has no private key that layers are encrypted for."""
    if not path.is_file():
        raise ValueError("not a file")
    with path.open("rb") as file:
        content = file.read(_KEY_FILE_LIMIT_BYTES + 1)
    if len(content) > _KEY_FILE_LIMIT_BYTES:
        raise ValueError("too large for a key")
    try:
        if content.lstrip().startswith(b"{"):
            return jwe.from_jwk(json.loads(content))
        load = load_pem_private_key if b"-----BEGIN" in content else load_der_private_key
        key = load(content, None)
    except TypeError as error:
        raise ValueError("a private key with a passphrase") from error
    except (ValueError, UnsupportedAlgorithm, RecursionError) as error:
        raise ValueError("no private key in PEM, DER or JWK form") from error
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        raise ValueError("neither an RSA nor an elliptic-curve key")
    return key


def _layer_key(private: bytes, public: str, subject: str) -> LayerKey:
    """From the options that were encrypted and those that were not; Go writes bytes in JSON as base64."""
    try:
        secret: dict[str, Any] = json.loads(private)
        options: dict[str, Any] = json.loads(b64decode(public, validate=True))
        cipher = options.get("cipher")
        # What was encrypted comes first: the HMAC does not cover the nonce, and in the open anybody may change it.
        nonces = [each.get("nonce") for each in (secret.get("cipheroptions"), options.get("cipheroptions")) if each]
        nonce = next(filter(None, nonces), "")
        found = LayerKey(b64decode(secret["symkey"]), b64decode(nonce), b64decode(options["hmac"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Error(f"{subject} is encrypted, and its annotations do not say how: {error!r}") from error
    if cipher != _CIPHER:
        raise Unimplemented(f"{subject} is encrypted with the cipher {cipher!r}; only {_CIPHER} is supported")
    sizes = (len(found.key), len(found.nonce), len(found.mac))
    if sizes != (_KEY_BYTES, _NONCE_BYTES, hashlib.sha256().digest_size):
        raise Error(f"{subject} is encrypted with key, nonce and HMAC of {sizes} bytes, which {_CIPHER} has not")
    return found
