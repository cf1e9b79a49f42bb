"""One sync for many layers: a layer waits until no other is being unpacked, or long enough, then all go together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

LONGEST_WAIT_S = 10.0


class GroupSync:
    """Syncing a file system writes everything of it, so that twice in a row costs twice for the same use."""

    def __init__(self, sync: Callable[[], Awaitable[object]]) -> None:
        self._sync = sync
        self._unpacking = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._next: asyncio.Task[None] | None = None
        self._running: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def unpacking(self) -> AsyncIterator[None]:
        """Around the making of what will be synced."""
        self._unpacking += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._unpacking -= 1
            if not self._unpacking:
                self._idle.set()

    async def synced(self) -> None:
        """Returns when what was written before this call is on the disk; raises what the sync raises."""
        if self._next is None:
            self._next = asyncio.create_task(self._together(self._running))
            self._next.add_done_callback(_seen)
        await asyncio.shield(self._next)

    async def close(self) -> None:
        for task in (self._next, self._running):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])

    async def _together(self, before: asyncio.Task[None] | None) -> None:
        try:
            if before is not None:
                await asyncio.wait([before])
            with contextlib.suppress(TimeoutError):  # one large layer shall not keep all others from being safe
                await asyncio.wait_for(self._idle.wait(), LONGEST_WAIT_S)
        finally:
            self._running, self._next = self._next, None
        await self._sync()


def _seen(task: asyncio.Task[None]) -> None:
    """All who waited may be gone: then nobody else takes the error."""
    if not task.cancelled():
        task.exception()
