"""One stream of a session as exec, attach and port-forward see it, whatever the client's protocol; and its inbox."""

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Protocol

INBOX_BYTES = 256 * 1024


class ClientGone(Exception):
    """The client has closed, or reset, what was to be written to."""


class Channel(Protocol):
    """Bytes in both directions."""

    @property
    def headers(self) -> Mapping[str, str]:
        """What the client says about the stream; names in lower case."""

    async def read(self) -> bytes:
        """What the client has sent next; b"" when it sends no more."""

    def stop_reading(self) -> None:
        """What the client still sends is of no interest, and does not hold up anything."""

    async def write(self, data: bytes) -> None:
        """Send it; waits as long as the client does not read. Raises ClientGone."""

    async def close(self) -> None:
        """Tell the client that nothing more comes; idempotent."""

    async def reset(self) -> None:
        """End both directions at once; idempotent."""

    @property
    def was_reset(self) -> bool:
        """Whether the client has ended both directions at once."""

    async def until_reset(self) -> None:
        """Wait for the client to do so."""


class Inbox:
    """What the client has sent and nobody has taken yet; bounded: who puts waits for who takes."""

    def __init__(self, limit_bytes: int = INBOX_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._parts: deque[bytes] = deque()
        self._held = 0
        self._ended = False
        self._unwanted = False
        self._changed: asyncio.Future[None] | None = None

    async def put(self, data: bytes) -> None:
        while self._held >= self._limit_bytes and not self._unwanted:
            await self._change()
        if data and not self._unwanted and not self._ended:
            self._parts.append(data)
            self._held += len(data)
            self._wake()

    def end(self) -> None:
        """Nothing more comes."""
        self._ended = True
        self._wake()

    async def get(self) -> bytes:
        while not self._parts and not self._ended:
            await self._change()
        if not self._parts:
            return b""
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._held = 0
        self._wake()
        return data

    def refuse(self) -> None:
        """What is here, and what still comes, is of no interest."""
        self._unwanted = self._ended = True
        self._parts.clear()
        self._held = 0
        self._wake()

    async def _change(self) -> None:
        """One side waits at a time: full and empty exclude each other."""
        self._changed = asyncio.get_running_loop().create_future()
        await self._changed

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)
