"""An image store of a test's own, which finds example.test at the fake registry over plain HTTP."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from cri.image_service.images import Images, ImageSettings
from tests.fakes.registry import FakeRegistry


def settings(tmp_path: Path, registry: FakeRegistry | None = None, extra: str = "", **changes: Any) -> ImageSettings:
    """`extra` is more of registries.conf, before what it says of `registry`."""
    conf = tmp_path / "registries.conf"
    if registry is not None:
        extra += f'[[registry]]\nprefix = "example.test"\nlocation = "{registry.address}"\ninsecure = true\n'
    if extra:
        conf.write_text(extra)
    usual = {"root": tmp_path / "images", "registries_conf": conf, "read_timeout_s": 5}
    return ImageSettings(**{**usual, **changes})


def run(with_settings: ImageSettings, story: Callable[[Images], Awaitable[Any]]) -> Any:
    """What the story tells; the store is open as long as it lasts."""

    async def whole() -> Any:
        images = await Images.open(with_settings)
        try:
            return await story(images)
        finally:
            await images.close()

    return asyncio.run(whole())
