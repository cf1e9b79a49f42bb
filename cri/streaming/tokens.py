"""One-use tokens: what stands between a URL and a session."""

import secrets
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from oci.errors import ResourceExhausted

LIFE_S = 60.0
LIMIT = 1000  # unused at once: callers use a URL at once, so more of them are a defect somewhere

T = TypeVar("T")


class Tokens(Generic[T]):
    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._by_token: dict[str, tuple[float, T]] = {}  # oldest first

    def __len__(self) -> int:
        self._forget_expired()
        return len(self._by_token)

    def issue(self, value: T) -> str:
        """A token that nobody can guess. Raises ResourceExhausted when too many are unused."""
        self._forget_expired()
        if len(self._by_token) >= LIMIT:
            raise ResourceExhausted(f"{LIMIT} streaming URLs are issued and not used; they expire after {LIFE_S:g} s")
        token = secrets.token_urlsafe(24)
        self._by_token[token] = (self._now() + LIFE_S, value)
        return token

    def take(self, token: str) -> T | None:
        """What the token stands for, once; None for one that is unknown, used or expired."""
        self._forget_expired()
        found = self._by_token.pop(token, None)
        return None if found is None else found[1]

    def _forget_expired(self) -> None:
        now = self._now()
        while self._by_token:
            oldest = next(iter(self._by_token))
            if self._by_token[oldest][0] > now:
                return
            del self._by_token[oldest]
