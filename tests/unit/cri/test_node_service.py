"""The daemon's own service, over a real socket: what it tells of a pull, and what a caller's end means."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from cri.changes import Changes
from cri.image_service.catalog import Image
from cri.image_service.progress import Progress
from cri.image_service.save import Saved
from cri.node_messages import (
    SERVICE,
    ImageEvent,
    Inspect,
    LoadImage,
    PullImage,
    SavedImage,
    SaveImages,
    decoder,
    encode,
)
from cri.node_service import NodeService
from cri.server import Edge
from cri.tracing import NoTracing
from oci.errors import NotFound
from oci.image import ImageConfig

IMAGE = Image("sha256:1", ("a.test/b:1",), ("a.test/b@sha256:2",), 7, ImageConfig())


class SlowImages:
    """Pulls in three steps of 150 ms; what fails is called "missing"."""

    def __init__(self) -> None:
        self.cancelled = False
        self.credentials: Any = None

    async def pull(self, reference: str, credentials: Any, *, on_progress: Callable[[Progress], None]) -> Image:
        self.credentials = credentials
        if "missing" in reference:
            raise NotFound(f"{reference}: no such image")
        progress = Progress(reference, "fetching", 1, 0, 300)
        try:
            for _ in range(3):
                await asyncio.sleep(0.15)
                progress.bytes_fetched += 100
                on_progress(progress)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return IMAGE

    async def load(
        self, path: Path, reference: str | None, on_progress: Callable[[Progress], None]
    ) -> tuple[Image, ...]:
        return (IMAGE, IMAGE)

    async def save(
        self, references: Any, path: Path, form: str, credentials: Any, on_progress: Callable[[Progress], None]
    ) -> tuple[Saved, ...]:
        self.credentials = credentials
        on_progress(Progress(f"save to {path}", "done", 1, 1, 300, 300))
        return tuple(Saved("sha256:3", "sha256:1", (each,), f"as {form}") for each in references)


class Uncounted:
    def observe(self, method: str, code: str, seconds: float) -> None:
        pass


@contextlib.asynccontextmanager
async def served(directory: Path, images: Any) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=[Edge(Uncounted(), NoTracing())])
    service = NodeService(images, Changes(), lambda: {"pid": 1})
    server.add_generic_rpc_handlers((service.handler(),))
    server.add_insecure_port(f"unix:{directory}/s")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"unix:{directory}/s") as channel:
            yield channel
    finally:
        await server.stop(0)


def events(channel: grpc.aio.Channel, method: str, request: Any) -> Any:
    return channel.unary_stream(f"/{SERVICE}/{method}", encode, decoder(ImageEvent))(request)


def test_progress_comes_while_the_pull_goes_on(tmp_path: Path) -> None:
    async def pulled() -> list[ImageEvent]:
        async with served(tmp_path, SlowImages()) as channel:
            return [event async for event in events(channel, "PullImage", PullImage("a.test/b:1"))]

    got = asyncio.run(pulled())

    assert [each.progress.fetched_bytes for each in got if each.progress] == [100, 200, 300]
    assert [image.id for image in got[-1].images] == ["sha256:1"]
    assert all(not event.images for event in got[:-1])


def test_credentials_reach_the_pull(tmp_path: Path) -> None:
    images = SlowImages()

    async def pull() -> None:
        async with served(tmp_path, images) as channel:
            async for _ in events(channel, "PullImage", PullImage("a.test/b:1", "user", "secret")):
                pass

    asyncio.run(pull())

    assert (images.credentials.username, images.credentials.password) == ("user", "secret")
    assert "secret" not in repr(PullImage("a", "user", "secret"))


def test_a_caller_that_goes_away_ends_its_pull(tmp_path: Path) -> None:
    images = SlowImages()

    async def give_up() -> None:
        async with served(tmp_path, images) as channel:
            call = events(channel, "PullImage", PullImage("a.test/b:1"))
            await call.read()
            call.cancel()
            for _ in range(100):
                if images.cancelled:
                    return
                await asyncio.sleep(0.02)

    asyncio.run(give_up())

    assert images.cancelled


def test_a_save_tells_progress_and_then_what_was_saved(tmp_path: Path) -> None:
    images = SlowImages()

    async def saved() -> list[ImageEvent]:
        async with served(tmp_path, images) as channel:
            request = SaveImages(("a.test/b:1",), "/out", "oci-archive", "user", "secret")
            return [event async for event in events(channel, "SaveImages", request)]

    *_, told, last = asyncio.run(saved())

    assert told.progress is not None
    assert told.progress.phase == "done"
    assert last.saved == (SavedImage("sha256:3", "sha256:1", ("a.test/b:1",), "as oci-archive"),)
    assert images.credentials.password == "secret"
    assert "secret" not in repr(SaveImages((), "/", "x", "user", "secret"))


def test_an_error_arrives_with_its_code_and_text(tmp_path: Path) -> None:
    async def pull() -> None:
        async with served(tmp_path, SlowImages()) as channel:
            async for _ in events(channel, "PullImage", PullImage("a.test/missing:1")):
                pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(pull())

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == "a.test/missing:1: no such image"


def test_a_load_names_all_images_and_wants_an_absolute_path(tmp_path: Path) -> None:
    async def loaded(path: str) -> list[ImageEvent]:
        async with served(tmp_path, SlowImages()) as channel:
            return [event async for event in events(channel, "LoadImage", LoadImage(path))]

    assert len(asyncio.run(loaded("/a.tar"))[-1].images) == 2
    with pytest.raises(grpc.aio.AioRpcError, match="expected an absolute path"):
        asyncio.run(loaded("a.tar"))


def test_the_daemon_describes_itself(tmp_path: Path) -> None:
    async def inspected() -> Any:
        async with served(tmp_path, SlowImages()) as channel:
            return await channel.unary_unary(f"/{SERVICE}/Inspect", encode, decoder(dict[str, Any]))(Inspect())

    assert asyncio.run(inspected()) == {"pid": 1}
