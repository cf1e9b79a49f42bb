"""Our store and the additional ones, asked from the one thread that uses them."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

from cri.image_service.additional import AdditionalStores
from cri.image_service.store import ImageRecord, Origin, Store

T = TypeVar("T")


class Stores:
    """What `additional` answers from memory may be asked for without the thread."""

    def __init__(self, thread: Executor, ours: Store, additional: AdditionalStores) -> None:
        self._thread = thread
        self.ours = ours
        self.additional = additional

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """What `function` returns, in the thread, after all that was asked for before."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(function, *args))

    async def image(self, image_id: str) -> ImageRecord | None:
        return await self.run(self.ours.image, image_id) or await self.run(self.additional.record, image_id)

    async def origins(self, image_id: str) -> tuple[Origin, ...]:
        return await self.run(self.ours.origins, image_id) or await self.run(self.additional.origins, image_id)

    async def close(self) -> None:
        await self.run(self.ours.close)
        await self.run(self.additional.close)
