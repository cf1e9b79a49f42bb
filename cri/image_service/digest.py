"""Digests of bytes that stream by."""

import hashlib
from collections.abc import Iterable, Iterator

from oci.errors import Error


class Digest:
    """`expected` is "ALGORITHM:HEX"; "" is a digest that nobody knows yet, by SHA-256."""

    def __init__(self, expected: str = "") -> None:
        self._expected = expected
        self._algorithm = expected.partition(":")[0] or "sha256"
        self._hash = hashlib.new(self._algorithm)
        self.is_whole = False

    def __str__(self) -> str:
        """That of the bytes so far."""
        return f"{self._algorithm}:{self._hash.hexdigest()}"

    def of(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """The same chunks."""
        for chunk in chunks:
            self._hash.update(chunk)
            yield chunk
        self.is_whole = True

    @property
    def is_wrong(self) -> bool:
        """Whether all bytes have come, and are not those that were expected."""
        return self.is_whole and self._expected not in ("", str(self))

    def check(self, subject: str) -> None:
        """Raises Error where another digest was expected."""
        if self._expected not in ("", str(self)):
            raise Error(f"{subject} has the digest {self}, expected {self._expected}")
