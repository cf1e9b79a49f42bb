"""The layers that images are made of: each fetched and unpacked once, whoever wants it, and freed when nobody does.

Which are here is answered from memory. One that may have been damaged is verified before it is used; where it can be
had again is for repair.py to know.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cri.image_service.group_sync import GroupSync
from cri.image_service.implied import make_implied_layer
from cri.image_service.joined import Joined
from cri.image_service.layer_request import WantedLayer
from cri.image_service.limits import Slots
from cri.image_service.progress import LayerPhase, LayerProgress, Progress
from cri.image_service.snapshots import LayerDirectory, References, total, visible
from cri.image_service.store import Contents, LayerRecord
from cri.image_service.stores import Stores
from cri.image_service.tasks import Tasks
from cri.image_service.workers import Workers
from oci import trace
from oci.background import RETRY_S, with_last_repeated
from oci.errors import Error

log = logging.getLogger(__name__)

_SETTLE_S = 10.0


@dataclass(slots=True)
class Totals:
    """What has happened since the start, for metrics."""

    fetched_bytes: int = 0
    layers: int = 0  # fetched, unpacked and committed
    failed_layers: int = 0
    damaged_layers: int = 0


@dataclass(frozen=True, slots=True)
class FsUsage:
    path: Path
    used_bytes: int
    inodes_used: int
    timestamp: int  # ns since the epoch


class Layers:
    """`references` tells who needs what; layers of work that failed wait `keep_partial_s` for the next try."""

    def __init__(
        self,
        directory: LayerDirectory,
        stores: Stores,
        references: References,
        workers: Workers,
        tasks: Tasks,
        slots: Slots,
        keep_partial_s: float,
    ) -> None:
        self._directory = directory
        self._stores = stores
        self._additional = stores.additional
        self._references = references
        self._workers = workers
        self._tasks = tasks
        self._slots = slots
        self._keep_partial_s = keep_partial_s
        self._syncs = GroupSync(partial(workers.call, {"verb": "sync", "path": str(directory.root)}))
        self._ours: dict[str, LayerRecord] = {}
        self._suspects: set[str] = set()  # of ours: to verify before they are used
        self._checks: Joined[str, str] = Joined()
        self._work: Joined[str, None] = Joined()
        self._settling: dict[str, asyncio.Task[None]] = {}  # on their way to the disk
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._partials: Counter[str] = Counter()  # names of the blobs that are being fetched
        self._later: asyncio.TimerHandle | None = None
        self._closing = asyncio.Event()
        self.totals = Totals()

    def take(self, contents: Contents) -> None:
        """What the store has at the start. What the last daemon has thrown away is removed."""
        self._ours = {layer.diff_id: layer for layer in contents.layers}
        self._suspects = set(contents.suspects)
        self._empty_trash(self._directory.trash())

    async def close(self) -> None:
        """Ends what is under way, but for layers that are whole: they get some time to be on the disk."""
        self._closing.set()
        if self._later is not None:
            self._later.cancel()
        await self._work.cancel_all()
        await self._checks.cancel_all()
        if self._settling:  # whole layers are worth the wait for the disk
            await asyncio.wait(self._settling.values(), timeout=_SETTLE_S)
        await self._syncs.close()

    # ---- ours, else an additional store's

    def all(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self._ours, *self._additional.layers())))

    def find(self, layer_id: str) -> LayerRecord | None:
        return self._ours.get(layer_id) or self._additional.layer(layer_id)

    def has(self, layer_id: str) -> bool:
        return self.find(layer_id) is not None

    def is_ours(self, layer_id: str) -> bool:
        return layer_id in self._ours

    def tree(self, layer_id: str) -> Path:
        """What is mounted of the layer; where ours would be, if nobody has it."""
        directory = None if layer_id in self._ours else self._additional.directory(layer_id)
        return self._directory.path(layer_id) if directory is None else directory / "diff"

    def usage(self) -> FsUsage:
        """Of ours."""
        used, inodes = total(self._ours.values())
        return FsUsage(self._directory.root, used, inodes, time.time_ns())

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return self._slots.waiting

    # ---- to have layers

    @contextmanager
    def claimed(self, layer_ids: Iterable[str]) -> Iterator[None]:
        """Meanwhile the layers stay, whoever else needs them."""
        claimed = tuple(layer_ids)
        self._references.claim(claimed)
        try:
            yield
        finally:
            self._references.unclaim(claimed)
            self.free_later(claimed)

    async def have(self, layers: Sequence[WantedLayer], progress: Progress) -> None:
        """Has all of `layers` here, which the caller has claimed; the first error ends the work for the others."""
        missing = [layer for layer in layers if not self.has(layer.id)]
        progress.phase = "fetching"
        progress.layers_total += len(layers)
        progress.layers_done += len(layers) - len(missing)
        progress.bytes_total += sum(layer.size_bytes for layer in missing)
        progress.layers += [LayerProgress(layer.id, layer.digest, layer.size_bytes) for layer in missing]
        progress.changed()
        # The largest first: what is left at the end shall be small.
        by_size = sorted(layers, key=lambda layer: -layer.size_bytes)
        try:
            await _all(self.have_one(layer, progress) for layer in by_size)
        except BaseException:
            self.free_later((), always=True)  # parts of blobs, too, wait for the next try
            raise

    async def have_one(self, layer: WantedLayer, progress: Progress) -> None:
        """Has the layer here; where another caller is fetching it already, that is waited for."""
        tried = False

        def fetch() -> Coroutine[Any, Any, None]:
            nonlocal tried
            tried = True
            return self._fetch(layer, progress)

        if self.is_suspect(layer.id):
            await self.check(layer.id)
        while not self.has(layer.id):
            if (leaving := self._leaving.get(layer.id)) is not None:
                await asyncio.shield(leaving)
            if (settling := self._settling.get(layer.id)) is not None:
                await asyncio.wait([settling])
                continue
            try:
                with trace.step("layer", {"crito.layer": layer.digest or layer.id, "crito.bytes": layer.size_bytes}):
                    await self._work.run(layer.id, fetch)
            except Error:
                if tried:
                    raise
                continue  # another pull's source failed it; ours may not
            progress.layers_done += 1
            progress.arrived(layer.id)

    async def _fetch(self, layer: WantedLayer, progress: Progress) -> None:
        """Fetches and unpacks one layer in a worker, then commits it. On any error nothing of it stays in sight."""
        shown = progress.layer(layer.id, layer.digest, layer.size_bytes)

        def progressed(now: dict[str, int]) -> None:
            self.totals.fetched_bytes += max(0, now["fetched"] - shown.bytes_fetched)
            shown.phase = LayerPhase.FETCHING if now["fetched"] < layer.size_bytes else LayerPhase.UNPACKING
            progress.count(shown, now["fetched"], now["unpacked"])

        temporary = self._directory.new_temporary(layer.id)
        self._partials[layer.content.partial] += 1
        try:
            async with self._slots.taken(layer.registry, shown), self._syncs.unpacking():
                shown.phase = LayerPhase.FETCHING
                made = await self._workers.call({**layer.request, "directory": str(temporary)}, progressed)
                progressed({"fetched": layer.size_bytes, "unpacked": made["unpacked_bytes"]})
            shown.phase = LayerPhase.COMMITTING
            progress.changed()
            record = LayerRecord(layer.id, made["size_bytes"], made["inodes"], tuple(made["implied"]))
            settling = self._settling[layer.id] = self._tasks.start(self._settle(temporary, record))
            settling.add_done_callback(lambda _: self._settling.pop(layer.id, None))
            with trace.step("commit layer"):
                await asyncio.shield(settling)
        except BaseException as error:
            shown.phase = LayerPhase.FAILED
            self.totals.failed_layers += not isinstance(error, asyncio.CancelledError)
            if layer.id not in self._settling:  # what is whole is kept, also of a pull that fails
                self.discard(temporary)
            raise
        finally:
            self._partials[layer.content.partial] -= 1
        self.totals.layers += 1
        shown.phase = LayerPhase.DONE

    async def _settle(self, temporary: Path, record: LayerRecord) -> None:
        """Has an unpacked layer on the disk and on record, also when nobody waits for it any more."""
        try:
            await self._syncs.synced()
            await self._commit(temporary, record)
        except BaseException:
            self.discard(temporary)
            raise

    async def _commit(self, temporary: Path, record: LayerRecord) -> None:
        def commit() -> None:
            self._directory.commit(temporary, record.diff_id)
            self._stores.ours.add_layer(record)

        await self._stores.run(commit)
        self._suspects.discard(record.diff_id)
        self._ours[record.diff_id] = record

    async def stacked(self, image_id: str, layer_ids: Sequence[str]) -> tuple[str, ...]:
        """What is to be mounted of an image that has these layers, lowest first.

        Layers below one that hides all of them are left out. On top is a small one of its own where directories need
        attributes from lower layers.
        """
        stack = await asyncio.to_thread(visible, _without_repeats(layer_ids), self.tree)
        implied = [layer.implied for layer_id in stack if (layer := self.find(layer_id)) is not None]
        if len(stack) < 2 or not any(implied[1:]):
            return stack  # the lowest has nothing below that could know better
        own = f"implied:{image_id.rpartition(':')[2]}"
        if self.has(own):
            return (*stack, own)
        trees = [(self.tree(layer_id), each) for layer_id, each in zip(stack, implied, strict=True)]
        temporary = self._directory.new_temporary(own)
        try:
            inodes = await asyncio.to_thread(make_implied_layer, trees, temporary)
            if not inodes:
                self.discard(temporary)
                return stack
            await self._tasks.finish(self._commit(temporary, LayerRecord(own, inodes * 4096, inodes)))
        except BaseException:
            self.discard(temporary)
            raise
        return (*stack, own)

    # ---- damage

    @property
    def suspects(self) -> int:
        """How many layers an unclean shutdown may have damaged that nobody has verified since."""
        return len(self._suspects) + len(self._additional.suspects)

    def is_suspect(self, layer_id: str) -> bool:
        return layer_id in (self._suspects if layer_id in self._ours else self._additional.suspects)

    async def check(self, layer_id: str) -> None:
        """Verifies a suspect; a damaged layer is no longer there, and images with it are not listed."""
        damage = await self._checks.run(layer_id, lambda: self.damage(layer_id))
        if not self.is_suspect(layer_id):
            return  # another caller has drawn the conclusion
        if damage:
            await self._tasks.finish(self.lose(layer_id, damage))
        else:
            await self.clear(layer_id)

    async def damage(self, layer_id: str) -> str:
        """What is not as it was unpacked; "" where all is."""
        if layer_id.startswith("implied:"):
            return ""  # directories alone: that they are there is all there is to verify, and the start did
        done = await self._workers.call({"verb": "verify", "directory": str(self.tree(layer_id).parent)}, _ignored)
        damage: str = done["damage"]
        return damage

    async def clear(self, layer_id: str) -> None:
        """The layer has been verified."""
        if layer_id not in self._ours:
            self._additional.suspects.discard(layer_id)
            return
        self._suspects.discard(layer_id)
        await self._stores.run(self._stores.ours.clear, layer_id)

    async def lose(self, layer_id: str, damage: str) -> None:
        """A damaged layer is no longer there."""
        log.error("layer %s is damaged and will be fetched again: %s", layer_id, damage)
        self.totals.damaged_layers += 1
        if layer_id not in self._ours:
            self._additional.lose(layer_id)
            return
        self._suspects.discard(layer_id)
        self._ours.pop(layer_id, None)
        await self._drop([layer_id])

    # ---- to be rid of them

    def free(self, layer_ids: Iterable[str]) -> None:
        """Removes those that nobody needs."""
        unneeded = [layer_id for layer_id in self._references.unneeded(tuple(layer_ids)) if layer_id in self._ours]
        if not unneeded:
            return
        for layer_id in unneeded:
            del self._ours[layer_id]
        task = self._tasks.start(self._drop(unneeded))
        self._leaving.update(dict.fromkeys(unneeded, task))

    def free_later(self, layer_ids: Iterable[str], always: bool = False) -> None:
        """Layers of a pull that failed wait a while, so that the next try need not fetch them again.

        Then all goes that nobody needs, parts of blobs too; with `always` also where it is none of `layer_ids`.
        """
        if self._later is None and (always or self._references.unneeded(layer_ids)):
            loop = asyncio.get_running_loop()
            self._later = loop.call_later(self._keep_partial_s, self._free_now)

    def _free_now(self) -> None:
        self._later = None
        self.free(self._ours)
        wanted = [name for name, count in self._partials.items() if count]
        self._tasks.start(self._stores.run(self._directory.drop_partials, wanted))

    async def _drop(self, layer_ids: Sequence[str]) -> None:
        def drop() -> Sequence[Path]:
            self._stores.ours.remove_layers(layer_ids)  # first: a record without its layer would be a lie
            return [gone for layer_id in layer_ids if (gone := self._directory.discard_layer(layer_id)) is not None]

        try:
            gone = await self._stores.run(drop)
        finally:
            for layer_id in layer_ids:
                self._leaving.pop(layer_id, None)
        self._empty_trash(gone)

    def discard(self, path: Path) -> asyncio.Task[None]:
        """Removes a directory that is no layer; who waits for the task knows it out of sight."""

        async def discard() -> None:
            gone = await self._stores.run(self._directory.discard, path)
            if gone is not None:
                self._empty_trash([gone])

        return self._tasks.start(discard())

    def _empty_trash(self, paths: Sequence[Path]) -> None:
        async def remove() -> None:
            for pause_s in with_last_repeated(RETRY_S):
                try:
                    await self._workers.call({"verb": "remove", "paths": [str(path) for path in paths]})
                    return
                except (Error, OSError) as error:
                    if self._closing.is_set():
                        return  # the next start does it
                    log.warning("layers are not removed yet, next try in %s s: %s", pause_s, error)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), pause_s)

        if paths:
            self._tasks.start(remove())


def _ignored(_: dict[str, int]) -> None:
    """Progress that nobody is shown."""


def _without_repeats(layer_ids: Sequence[str]) -> tuple[str, ...]:
    """Each layer once, where it comes last: what it has hides its earlier self, and overlayfs takes none twice."""
    return tuple(dict.fromkeys(reversed(layer_ids)))[::-1]


async def _all(work: Iterable[Awaitable[None]]) -> None:
    """Waits for all; the first error ends the others, and is raised as it is."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
