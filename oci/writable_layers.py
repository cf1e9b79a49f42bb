"""How much containers have written: by the file system's own account where it has project quotas, else counted in the
background. Either way asking costs nothing, and walks no tree."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from oci.container_spec import ContainerId
from oci.linux.tree import Usage
from oci.rootfs import Rootfs

_log = logging.getLogger(__name__)

INTERVAL_S = 10.0  # the kubelet looks for eviction as often
REST_RATIO = 20  # at least this many times as long as a round took passes before the next one


@dataclass(frozen=True, slots=True)
class LayerUsage:
    used_bytes: int
    inodes: int
    timestamp: int  # ns since the epoch at which it was counted


class WritableLayers:
    """`alive` names the containers that can write now; the others keep their last count until `forget`."""

    def __init__(self, directory: Path, rootfs: Rootfs, alive: Callable[[], Iterable[ContainerId]]) -> None:
        self.directory = directory
        self._rootfs = rootfs
        self._alive = alive
        self._usage: dict[ContainerId, LayerUsage] = {}
        self._ended: set[ContainerId] = set()  # to be counted a last time
        self._pool = ThreadPoolExecutor(1, "usage")
        self._accounts = ThreadPoolExecutor(1, "usage-accounts")  # never behind a walk
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._count_for_ever(), name="writable layers")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._accounts.shutdown(wait=False, cancel_futures=True)

    async def usage(self, id: ContainerId) -> LayerUsage:
        """What there is now where the file system keeps account. Else the last count; one that was never made is made
        now, on a container that is new and has written little."""
        if self._rootfs.is_accounted:
            now = await asyncio.get_running_loop().run_in_executor(self._accounts, self._rootfs.accounted_usage, id)
            if now is not None:
                return self._noted(id, now)
        found = self._usage.get(id)
        return found if found is not None else await self._count(id)

    def total(self) -> LayerUsage:
        """All layers together, as last counted."""
        counts = self._usage.values()
        return LayerUsage(sum(each.used_bytes for each in counts), sum(each.inodes for each in counts), time.time_ns())

    def ended(self, id: ContainerId) -> None:
        """The container can write no more: what it wrote last is counted in the next round."""
        self._ended.add(id)

    def forget(self, id: ContainerId) -> None:
        self._usage.pop(id, None)
        self._ended.discard(id)

    async def _count(self, id: ContainerId) -> LayerUsage:
        usage: Usage = await asyncio.get_running_loop().run_in_executor(self._pool, self._rootfs.usage, id)
        return self._noted(id, usage)

    def _noted(self, id: ContainerId, usage: Usage) -> LayerUsage:
        result = self._usage[id] = LayerUsage(usage.bytes, usage.inodes, time.time_ns())
        return result

    def _gone(self, ids: Iterable[ContainerId]) -> list[ContainerId]:
        return [id for id in ids if not self._rootfs.writable_layer(id).exists()]

    async def _count_for_ever(self) -> None:
        while True:
            started = time.monotonic()
            for id in [*self._alive(), *self._ended]:
                self._ended.discard(id)
                try:
                    await self._count(id)
                except OSError as error:
                    _log.warning("cannot count what container %s has written: %s", id, error)
            for id in await asyncio.get_running_loop().run_in_executor(self._pool, self._gone, list(self._usage)):
                self.forget(id)  # it was asked for while it was being removed
            took_s = time.monotonic() - started
            await asyncio.sleep(max(INTERVAL_S, REST_RATIO * took_s))
