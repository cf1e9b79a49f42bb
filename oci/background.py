"""Work that nobody waits for: kept until it is done, its defects logged, cut short together at the end."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

from oci.errors import Error

_log = logging.getLogger(__name__)

RETRY_S = (0.1, 0.5, 2.0, 10.0, 60.0)


class Background:
    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def close(self) -> None:
        """Cancel what is under way and wait until it has stopped."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s ended by an error", task.get_name(), exc_info=error)


async def until_done(what: str, step: Callable[[], Awaitable[None]], pauses: Iterable[float] = RETRY_S) -> None:
    """Try `step` again and again, with growing pauses, until it neither raises an Error nor an OSError."""
    for pause_s in with_last_repeated(tuple(pauses)):
        try:
            await step()
        except (Error, OSError) as error:
            _log.warning("%s: not done yet, next try in %s s: %s", what, pause_s, error)
            await asyncio.sleep(pause_s)
        else:
            return


def with_last_repeated(pauses: tuple[float, ...]) -> Iterable[float]:
    yield from pauses
    while True:
        yield pauses[-1]
