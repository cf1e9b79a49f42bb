"""Serves `crito.v1.Node` (see node_messages.py): the command line's image work, and how the daemon is."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from cri.changes import Changes
from cri.image_service.auth import Credentials
from cri.image_service.images import Image, Images
from cri.image_service.progress import Progress as ImagesProgress
from cri.node_messages import (
    SERVICE,
    CancelPull,
    DamagedLayer,
    ImageEvent,
    ImageSummary,
    Inspect,
    LayerStatus,
    LoadImage,
    PinImage,
    Progress,
    PullImage,
    Pulls,
    PullStatus,
    SavedImage,
    SaveImages,
    VerifyImages,
    decoder,
    encode,
)
from oci.errors import InvalidArgument

Context = grpc.aio.ServicerContext[Any, Any]

PROGRESS_INTERVAL_S = 0.1


class NodeService:
    def __init__(self, images: Images, changes: Changes, inspect: Callable[[], Mapping[str, Any]]) -> None:
        self._images = images
        self._changes = changes
        self._inspect = inspect

    def handler(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """What `grpc.aio.Server.add_generic_rpc_handlers` takes."""
        methods = {
            "PullImage": grpc.unary_stream_rpc_method_handler(self.PullImage, decoder(PullImage), encode),
            "LoadImage": grpc.unary_stream_rpc_method_handler(self.LoadImage, decoder(LoadImage), encode),
            "SaveImages": grpc.unary_stream_rpc_method_handler(self.SaveImages, decoder(SaveImages), encode),
            "Pulls": grpc.unary_unary_rpc_method_handler(self.Pulls, decoder(Pulls), encode),
            "CancelPull": grpc.unary_unary_rpc_method_handler(self.CancelPull, decoder(CancelPull), encode),
            "PinImage": grpc.unary_unary_rpc_method_handler(self.PinImage, decoder(PinImage), encode),
            "VerifyImages": grpc.unary_stream_rpc_method_handler(self.VerifyImages, decoder(VerifyImages), encode),
            "Inspect": grpc.unary_unary_rpc_method_handler(self.Inspect, decoder(Inspect), encode),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def PullImage(self, request: PullImage, context: Context) -> AsyncIterator[ImageEvent]:
        async def pull(told: "_Told") -> ImageEvent:
            image = await self._images.pull(request.reference, _credentials(request), on_progress=told.tell)
            return ImageEvent(images=(_summary(image),))

        async for event in _events(pull):
            yield event

    async def LoadImage(self, request: LoadImage, context: Context) -> AsyncIterator[ImageEvent]:
        path = _absolute(request.path)

        async def load(told: "_Told") -> ImageEvent:
            images = await self._changes.run(
                f"load {path}", lambda: self._images.load(path, request.reference or None, on_progress=told.tell)
            )
            return ImageEvent(images=tuple(_summary(image) for image in images))

        async for event in _events(load):
            yield event

    async def SaveImages(self, request: SaveImages, context: Context) -> AsyncIterator[ImageEvent]:
        path = _absolute(request.path)

        async def save(told: "_Told") -> ImageEvent:
            saved = await self._images.save(
                request.references, path, request.format, _credentials(request), on_progress=told.tell
            )
            return ImageEvent(
                saved=tuple(SavedImage(each.id, each.source_id, each.names, each.regenerated) for each in saved)
            )

        async for event in _events(save):
            yield event

    async def Pulls(self, request: Pulls, context: Context) -> list[PullStatus]:
        return [_status(each) for each in self._images.pulls()]

    async def CancelPull(self, request: CancelPull, context: Context) -> int:
        return await self._images.cancel(request.reference)

    async def PinImage(self, request: PinImage, context: Context) -> ImageSummary:
        return _summary(await self._images.pin(request.reference, request.pinned))

    async def VerifyImages(self, request: VerifyImages, context: Context) -> AsyncIterator[DamagedLayer]:
        async for damage in self._images.verify(request.repair):
            yield DamagedLayer(damage.diff_id, damage.images, damage.found, damage.outcome)

    async def Inspect(self, request: Inspect, context: Context) -> Mapping[str, Any]:
        return self._inspect()


class _Told:
    """The latest that was said of a pull, load or save and not yet passed on."""

    def __init__(self) -> None:
        self._latest: Progress | None = None

    def tell(self, progress: ImagesProgress) -> None:
        self._latest = _progress(progress)

    def take(self) -> Progress | None:
        latest, self._latest = self._latest, None
        return latest


async def _events(work: Callable[[_Told], Coroutine[Any, Any, ImageEvent]]) -> AsyncIterator[ImageEvent]:
    """Progress while `work` runs, then its last event; a caller that goes away cancels it."""
    told = _Told()
    task = asyncio.create_task(work(told))
    try:
        while not task.done():
            await asyncio.wait([task], timeout=PROGRESS_INTERVAL_S)
            if progress := told.take():
                yield ImageEvent(progress=progress)
        last = task.result()
        if progress := told.take():  # the last word: that all has come
            yield ImageEvent(progress=progress)
        yield last
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])


def _absolute(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute():
        raise InvalidArgument(f"path {text!r}: expected an absolute path")
    return path


def _credentials(request: PullImage | SaveImages) -> Credentials | None:
    return Credentials(username=request.username, password=request.password) if request.username else None


def _progress(progress: ImagesProgress) -> Progress:
    return Progress(
        progress.phase,
        progress.layers_done,
        progress.layers_total,
        progress.bytes_fetched,
        progress.bytes_total,
        progress.bytes_unpacked,
    )


def _status(pull: ImagesProgress) -> PullStatus:
    layers = tuple(
        LayerStatus(
            layer.digest or layer.diff_id,
            str(layer.phase),
            layer.queue_position,
            layer.bytes_fetched,
            layer.size_bytes,
            layer.bytes_unpacked,
        )
        for layer in pull.layers
    )
    seconds = time.monotonic() - pull.started_at
    return PullStatus(pull.reference, seconds, _progress(pull), pull.rate_bytes_per_s, pull.eta_s, layers)


def _summary(image: Image) -> ImageSummary:
    return ImageSummary(image.id, image.repo_tags, image.repo_digests, image.size_bytes)
