"""Runs each change of state once, to its end, whoever waits for it and for however long.

A change is a task keyed by what it changes. A caller who gives up stops waiting; the change goes on, and a retry of
the same request joins it. What a crash interrupts is found in the records (a pod or container that is still being
made, or is to be removed) and rolled back or forward at the next start.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from cri.errors import is_expected
from oci import trace

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Running:
    """A change under way: what it changes and for how long it has run."""

    key: str
    seconds: float


class Changes:
    def __init__(self) -> None:
        self._running: dict[str, tuple[asyncio.Task[Any], float]] = {}

    async def run(self, key: str, change: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of the change `key`: joined where it runs already, else started from `change`."""
        entry = self._running.get(key)
        if entry is None:
            task = asyncio.create_task(_traced(key, change), name=key)
            entry = self._running[key] = (task, time.monotonic())
            task.add_done_callback(self._finished)  # forgets the task, logs its error: nobody may be waiting
        result: T = await asyncio.shield(entry[0])
        return result

    def running(self) -> list[Running]:
        now = time.monotonic()
        return [Running(key, now - since) for key, (_, since) in self._running.items()]

    async def finish(self, timeout_s: float) -> list[str]:
        """Wait for what is under way; the keys of the changes that are still not done after `timeout_s`."""
        tasks = [task for task, _ in self._running.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)
        return sorted(self._running)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        del self._running[task.get_name()]
        if task.cancelled():
            return
        error = task.exception()  # marks it as seen
        if error is not None and not is_expected(error):
            _log.error("%s failed by a defect", task.get_name(), exc_info=error)


async def _traced(key: str, change: Callable[[], Coroutine[Any, Any, T]]) -> T:
    with trace.step("change", {"crito.change": key}):  # of the caller who started it; it may outlast that one's request
        return await change()
