"""What happens to pods and containers, told to whoever listens, in the order in which it happened."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

T = TypeVar("T")

QUEUE_LENGTH = 4096  # a listener who is further behind has stopped reading


class EventKind(StrEnum):
    CREATED = "created"
    STARTED = "started"
    STOPPED = "stopped"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened to the container `id` of the pod `sandbox_id`, or (both the same) to the pod itself."""

    kind: EventKind
    id: str
    sandbox_id: str
    at: int  # ns since the epoch, rising strictly from event to event


class Bus(Generic[T]):
    """Hands every value to every listener. A listener who does not read is cut off, never waited for."""

    def __init__(self) -> None:
        self._listeners: set[asyncio.Queue[T | None]] = set()

    def publish(self, value: T) -> None:
        for queue in list(self._listeners):
            try:
                queue.put_nowait(value)
            except asyncio.QueueFull:
                self._cut_off(queue)

    async def listen(self) -> AsyncIterator[T]:
        """Every value from now on; ends when this listener was cut off or the bus closed."""
        queue: asyncio.Queue[T | None] = asyncio.Queue(QUEUE_LENGTH)
        self._listeners.add(queue)
        try:
            while (value := await queue.get()) is not None:
                yield value
        finally:
            self._listeners.discard(queue)

    def close(self) -> None:
        for queue in list(self._listeners):
            self._cut_off(queue)

    def _cut_off(self, queue: asyncio.Queue[T | None]) -> None:
        self._listeners.discard(queue)
        while not queue.empty():
            queue.get_nowait()
        queue.put_nowait(None)
