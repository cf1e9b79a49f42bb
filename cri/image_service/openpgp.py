"""Verifies OpenPGP messages by gpgv, which checks against given keys alone and trusts all of them.

Runs in worker processes. Everything passes through memory: a worker that is killed leaves no file. Source: gpgv(1);
GnuPG, doc/DETAILS, "Format of the --status-fd output".
"""

import base64
import binascii
import os
import re
import selectors
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from oci.errors import Error

PAYLOAD_LIMIT_BYTES = 1 << 20  # a message is compressed, and may hold far more than its size
_DEADLINE_S = 30.0
_STATUS_LIMIT_BYTES = 1 << 16
_ARMORED = re.compile(rb"-----BEGIN PGP PUBLIC KEY BLOCK-----(.*?)-----END PGP PUBLIC KEY BLOCK-----", re.DOTALL)
_RESULTS = ("GOODSIG", "EXPSIG", "EXPKEYSIG", "REVKEYSIG", "BADSIG", "ERRSIG")
_MEANINGS = {
    "EXPSIG": "the signature has expired",
    "EXPKEYSIG": "the key has expired",
    "REVKEYSIG": "the key was revoked",
    "BADSIG": "the signature is wrong",
    "ERRSIG": "no key of the policy made it",
}


def verified(message: bytes, keyrings: Sequence[bytes]) -> bytes:
    """What `message` holds, where exactly one signature is on it and a key of `keyrings` made that.

    Raises Error saying what was seen otherwise, and where gpgv is not installed.
    """
    program = shutil.which("gpgv", path=f"{os.environ.get('PATH', '')}:/usr/local/bin:/usr/bin:/bin")
    if program is None:
        raise Error("gpgv, which verifies OpenPGP signatures, is not installed (Debian: package gpgv)")
    with ExitStack() as stack:
        signed, status = stack.enter_context(_memory(message)), stack.enter_context(_memory(b""))
        keys = [stack.enter_context(_memory(dearmored(each))) for each in keyrings]
        payload = _run(program, signed, status, keys)
        said = os.pread(status, _STATUS_LIMIT_BYTES + 1, 0)
    if len(said) > _STATUS_LIMIT_BYTES:
        raise Error("gpgv has more to say than one signature needs")
    # Lines end with "\n" alone: a signer chose some of the texts, and Unicode has line ends that gpgv does not escape.
    lines = [line.decode(errors="replace") for line in said.split(b"\n") if line.startswith(b"[GNUPG:] ")]
    words = [line.split(" ")[1:] for line in lines]
    results = [each[0] for each in words if each and each[0] in _RESULTS]
    if results != ["GOODSIG"]:
        if len(results) > 1:
            raise Error(f"there are {len(results)} OpenPGP signatures in one, expected 1")
        raise Error(f"gpgv: {_MEANINGS[results[0]] if results else 'this is no signed message'}{_signer(words)}")
    valid = [each for each in words if each and each[0] == "VALIDSIG"]
    if payload is None or len(valid) != 1 or sum(each[:1] == ["PLAINTEXT"] for each in words) != 1:
        raise Error("gpgv found no single signed text")
    return payload


def dearmored(keyring: bytes) -> bytes:
    """A keyring as gpgv reads it. Raises Error for what is no OpenPGP key at all."""
    blocks = [match.group(1) for match in _ARMORED.finditer(keyring)]
    if blocks:
        return b"".join(_block(each) for each in blocks)
    if not keyring or not keyring[0] & 0x80:  # the first bit of every packet
        raise Error(f"the policy's key is neither an armored nor a binary OpenPGP key: it begins with {keyring[:20]!r}")
    return keyring


def _block(text: bytes) -> bytes:
    """The bytes of one armored block: after its headers, before the checksum."""
    headers, blank, body = text.replace(b"\r", b"").lstrip(b" \t").partition(b"\n\n")
    lines = (body if blank else headers).split(b"\n")
    encoded = b"".join(line.strip() for line in lines if not line.startswith(b"="))
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Error("the policy's armored OpenPGP key is broken") from error


def _run(program: str, signed: int, status: int, keys: Sequence[int]) -> bytes | None:
    """The message's text, None where gpgv does not accept it. Raises Error where that is too long or takes too long."""
    options = ["--homedir", "/nonexistent", "--status-fd", str(status), "--output", "-"]
    options += [f"--keyring=/proc/self/fd/{fd}" for fd in keys]
    process = subprocess.Popen(
        [program, *options, "--", f"/proc/self/fd/{signed}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=(signed, status, *keys),
        env={"LC_ALL": "C"},
        cwd="/",
    )
    try:
        payload = _read(process)
        return payload if process.wait(_DEADLINE_S) == 0 else None
    except subprocess.TimeoutExpired as error:
        raise Error(f"gpgv did not end in {_DEADLINE_S:.0f} s") from error
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None  # a pipe
        process.stdout.close()


def _read(process: "subprocess.Popen[bytes]") -> bytes:
    assert process.stdout is not None  # a pipe
    deadline = time.monotonic() + _DEADLINE_S
    parts: list[bytes] = []
    size = 0
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise Error(f"gpgv did not end in {_DEADLINE_S:.0f} s")
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                return b"".join(parts)
            parts.append(part)
            size += len(part)
            if size > PAYLOAD_LIMIT_BYTES:
                raise Error(f"the signed text is longer than {PAYLOAD_LIMIT_BYTES} bytes")


def _signer(words: Sequence[Sequence[str]]) -> str:
    """The fingerprint, else the id, of the key that is said to have signed."""
    for each in words:
        if each[:1] == ["ERRSIG"]:
            return f" (key {each[8] if len(each) > 8 else each[1]})"
        if each and each[0] in _RESULTS and len(each) > 1:
            return f" (key {each[1]})"
    return ""


@contextmanager
def _memory(content: bytes) -> Iterator[int]:
    fd = os.memfd_create("openpgp")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        yield fd
    finally:
        os.close(fd)
