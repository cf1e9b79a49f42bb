"""`crito check --images`: verifies every layer of the store against the list made when it was unpacked, and heals it.

The running daemon does it; where none runs it is done here, with the store locked.
"""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict

from cri.config import Config
from cri.node_client import connected
from cri.node_messages import DamagedLayer
from oci.errors import Unavailable


def main(config: Config, *, repair: bool, as_json: bool) -> int:
    """1 where damage stays, or was found without being asked to repair it."""
    left = 0
    for layer in _verified(config, repair):
        left += layer.outcome != "repaired"
        if as_json:
            print(json.dumps(asdict(layer)), flush=True)
        else:
            images = ", ".join(layer.images) or "no image"
            print(f"✗ layer {layer.diff_id} of {images}: {layer.found}", flush=True)
            if layer.outcome:
                print(f"  → {layer.outcome}", flush=True)
    if not as_json:
        print("Damage stays." if left else "All image layers are as they were unpacked.")
    return 1 if left else 0


def _verified(config: Config, repair: bool) -> Iterator[DamagedLayer]:
    if config.api.listen.exists():
        with contextlib.suppress(Unavailable), connected(config.api.listen) as daemon:
            daemon.inspect()  # whether there is one
            yield from daemon.verify(repair)
            return
    yield from asyncio.run(_verified_here(config, repair))


async def _verified_here(config: Config, repair: bool) -> list[DamagedLayer]:
    from cri.daemon import image_settings, locked  # noqa: PLC0415  much to load
    from cri.image_service.images import Images  # noqa: PLC0415

    async with locked(config.crito.root, config.crito.run_dir):
        images = await Images.open(image_settings(config))
        try:
            return [
                DamagedLayer(each.diff_id, each.images, each.found, each.outcome)
                async for each in images.verify(repair)
            ]
        finally:
            await images.close()
