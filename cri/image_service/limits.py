"""How many layers are fetched at once: over all pulls, and per registry where the configuration says."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from cri.image_service.progress import LayerProgress
from oci import trace


@dataclass(frozen=True, slots=True)
class RegistryLimit:
    """0 is no limit of its own."""

    parallel_layers: int = 0
    bytes_per_s: int = 0


class Slots:
    """Who asked first is served first, unless its registry is busy."""

    def __init__(self, total: int, limits: Mapping[str, RegistryLimit]) -> None:
        self._total = total
        self._limits = limits
        self._taken: Counter[str] = Counter()
        self._waiting: list[tuple[str, LayerProgress, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def taken(self, registry: str, layer: LayerProgress) -> AsyncIterator[None]:
        """Holds a slot; until there is one, `layer` shows its place in the queue. `registry` is "" for a local file."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (registry, layer, turn)
        self._waiting.append(entry)
        self._serve()
        try:
            with trace.step("wait for a turn"):
                await turn
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
            else:
                self._taken[registry] -= 1
            self._serve()
            raise
        try:
            yield
        finally:
            self._taken[registry] -= 1
            self._serve()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def _serve(self) -> None:
        for entry in tuple(self._waiting):
            registry, layer, turn = entry
            if self._taken.total() >= self._total:
                break
            limit = self._limits.get(registry)
            if limit is not None and 0 < limit.parallel_layers <= self._taken[registry]:
                continue
            self._waiting.remove(entry)
            self._taken[registry] += 1
            layer.queue_position = 0
            if not turn.done():
                turn.set_result(None)
        for position, (_, layer, _turn) in enumerate(self._waiting, 1):
            layer.queue_position = position
