"""Work that goes on to its end, whoever waits for it; the owner waits for all of it before it closes."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Tasks:
    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which also ends when the caller is cancelled."""
        return await asyncio.shield(self.start(work))

    async def ended(self) -> None:
        """Returns when nothing is under way, nor what that has started."""
        while self._running:
            await asyncio.wait(self._running)
