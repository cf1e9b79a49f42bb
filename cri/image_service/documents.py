"""What the documents of an image say, read in a thread where that takes long; contents.py has what follows of them."""

import asyncio
from functools import partial
from typing import Any

from cri.image_service.contents import Content, Described, artifact_contents, artifact_of, image_contents
from cri.image_service.manifest import Descriptor, Manifest, parse
from cri.image_service.store import ImageRecord
from oci.image import ImageConfig, from_json

_LARGE_CONFIG = 1 << 18  # characters, from which parsing is a thread's work


async def described(found: dict[str, Any], subject: str) -> Described:
    """What a worker found. Raises Error where it makes no sense."""
    if found["config"]:
        config = await _config(found["config"], subject)
        layers = [Descriptor(**each) for each in found["layers"]]
        return Described(config, None, image_contents(layers, config, subject))
    artifact = await asyncio.to_thread(artifact_of, found["manifest"], found["media_type"], subject)
    return Described(ImageConfig(), artifact, artifact.files)


async def content(record: ImageRecord, layer_id: str) -> Content:
    """One layer of an image on record, which has a manifest."""
    subject = f"image {record.id}"
    manifest = parse(record.manifest.encode(), record.media_type, subject)
    assert isinstance(manifest, Manifest)  # an index is never recorded
    if record.is_artifact:
        contents = artifact_contents(manifest, subject).files
    else:
        contents = image_contents(manifest.layers, await _config(record.config, subject), subject)
    return next(each for each in contents if each.id == layer_id)


def size_bytes(found: dict[str, Any]) -> int:
    """The size of what describes an image; of an artifact, whose config is no matter, that is its manifest."""
    return len((found["config"] or found["manifest"]).encode())


async def _config(text: str, subject: str) -> ImageConfig:
    parse_config = partial(from_json, text, f"config of {subject}")
    return await asyncio.to_thread(parse_config) if len(text) > _LARGE_CONFIG else parse_config()
