"""Work that several callers want at once is done once: it ends early only when the last of them stops waiting."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Joined(Generic[K, T]):
    def __init__(self) -> None:
        self._running: dict[K, tuple[asyncio.Task[T], set[object]]] = {}

    async def run(self, key: K, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of `work` for `key`, started unless it is already under way.

        A caller that is cancelled stops waiting; when none is left the work is cancelled, and its clean-up awaited.
        """
        task, waiting = self._running.get(key, (None, set()))
        if task is None or not self.is_running(key):
            task, waiting = asyncio.create_task(work()), set()
            self._running[key] = task, waiting
            task.add_done_callback(lambda done: self._forget(key, done))
        me = object()
        waiting.add(me)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if waiting == {me} and not task.done():
                task.cancel()
                await asyncio.wait([task])
            raise
        finally:
            waiting.discard(me)

    def is_running(self, key: K) -> bool:
        """Whether a `run` of it now would join work that is under way, rather than start it."""
        task, _ = self._running.get(key, (None, None))
        return task is not None and not task.done() and not task.cancelling()

    async def cancel(self, key: K) -> None:
        """Ends the work for `key`, whoever waits for it, and awaits its clean-up."""
        task, _ = self._running.get(key, (None, None))
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def cancel_all(self) -> None:
        tasks = [task for task, _ in self._running.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _forget(self, key: K, task: asyncio.Task[T]) -> None:
        running = self._running.get(key)
        if running is not None and running[0] is task:
            del self._running[key]
        if not task.cancelled():
            task.exception()  # whoever waits has it; nobody may be waiting
