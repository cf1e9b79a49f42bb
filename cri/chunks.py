"""Cuts what the Stream* calls send into messages that fit every client, whatever the size of the items."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from google.protobuf.message import Message

M = TypeVar("M", bound=Message)

CHUNK_BYTES = 3 << 20  # below gRPC's default limit of 4 MiB, with room for the framing of the items
CHUNK_ITEMS = 1000  # so that the first items do not wait for the last


def chunks(items: Iterable[M], limit_bytes: int = CHUNK_BYTES, limit_items: int = CHUNK_ITEMS) -> Iterator[list[M]]:
    """The items in their order; an item that is larger than the limit goes alone. Nothing for no items."""
    chunk: list[M] = []
    size = 0
    for item in items:
        item_size = item.ByteSize() + 8  # its tag and length
        if chunk and (size + item_size > limit_bytes or len(chunk) >= limit_items):
            yield chunk
            chunk, size = [], 0
        chunk.append(item)
        size += item_size
    if chunk:
        yield chunk
