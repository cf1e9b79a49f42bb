"""What happens to pods and containers, told to whoever listens, in the order in which it happened."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

from oci.errors import ResourceExhausted

T = TypeVar("T")
U = TypeVar("U")

QUEUE_LENGTH = 4096  # a listener who is further behind has stopped reading


class EventKind(StrEnum):
    CREATED = "created"
    STARTED = "started"
    STOPPED = "stopped"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened to the container `id` of the pod `sandbox_id`, or (both the same) to the pod itself.

    `record` is what was recorded of that container or pod just then.
    """

    kind: EventKind
    id: str
    sandbox_id: str
    at: int  # ns since the epoch, rising strictly from event to event
    record: object


class Bus(Generic[T]):
    """Hands every value to every listener. A listener who does not read is cut off, never waited for."""

    def __init__(self, queue_length: int = QUEUE_LENGTH) -> None:
        self._queue_length = queue_length
        self._listeners: set[asyncio.Queue[T | _End]] = set()
        self._derived: list[tuple[Callable[[T], Any], Bus[Any]]] = []

    def publish(self, value: T) -> None:
        for queue in list(self._listeners):
            try:
                queue.put_nowait(value)
            except asyncio.QueueFull:
                self._end(queue, _End(behind=queue.qsize()))
        for derive, bus in self._derived:
            if bus.has_listeners:
                bus.publish(derive(value))

    def derived(self, derive: Callable[[T], U]) -> "Bus[U]":
        """A bus of what `derive` makes of each value at the moment of its publication, when anybody listens."""
        bus = Bus[U](self._queue_length)
        self._derived.append((derive, bus))
        return bus

    @property
    def has_listeners(self) -> bool:
        return bool(self._listeners)

    @contextmanager
    def subscribed(self) -> Iterator[AsyncIterator[T]]:
        """Every value from now on, also those published before the first is read; ends when the bus closes.

        Raises ResourceExhausted, while reading, when this listener fell too far behind and was cut off.
        """
        queue: asyncio.Queue[T | _End] = asyncio.Queue(self._queue_length)
        self._listeners.add(queue)
        try:
            yield _values(queue)
        finally:
            self._listeners.discard(queue)

    async def listen(self) -> AsyncIterator[T]:
        """The same for one who need not know from when on."""
        with self.subscribed() as values:
            async for value in values:
                yield value

    def close(self) -> None:
        for queue in list(self._listeners):
            self._end(queue, _End())
        for _, bus in self._derived:
            bus.close()

    def _end(self, queue: "asyncio.Queue[T | _End]", end: "_End") -> None:
        self._listeners.discard(queue)
        while end.behind and not queue.empty():  # what it has not read is old; it must look anew in any case
            queue.get_nowait()
        if queue.full():
            queue.get_nowait()
        queue.put_nowait(end)


@dataclass(frozen=True, slots=True)
class _End:
    """The last thing in a listener's queue; `behind` counts the values it had not read when it was cut off."""

    behind: int = 0


async def _values(queue: "asyncio.Queue[T | _End]") -> AsyncIterator[T]:
    while not isinstance(value := await queue.get(), _End):
        yield value
    if value.behind:
        raise ResourceExhausted(
            f"this listener was {value.behind} events behind and was cut off: list, then listen again"
        )
