"""What the command line and the daemon say to each other beside the CRI: the service `crito.v1.Node`, in JSON.

It is served on the CRI's socket. It exists for what the CRI has no words for: pull progress, loading from a file, and
the daemon's own view of itself. It is not for others: its messages may change with any version.
"""

from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

SERVICE = "crito.v1.Node"


@dataclass(frozen=True, slots=True)
class PullImage:
    reference: str
    username: str = ""
    password: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class LoadImage:
    path: str  # as the daemon sees it
    reference: str = ""


@dataclass(frozen=True, slots=True)
class Inspect:
    """Asks for a `dict` that describes the daemon."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a pull or load is; bytes are those of all layers that are not there yet."""

    phase: str
    layers_done: int
    layers_total: int
    fetched_bytes: int  # compressed, of total_bytes
    total_bytes: int
    unpacked_bytes: int


@dataclass(frozen=True, slots=True)
class ImageSummary:
    id: str
    repo_tags: tuple[str, ...]
    repo_digests: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ImageEvent:
    """One message of a pull or load: its progress, or at the end the images."""

    progress: Progress | None = None
    images: tuple[ImageSummary, ...] = ()


def encode(message: Any) -> bytes:
    return msgspec.json.encode(message)


def decoder(kind: type[T]) -> Any:
    """A function from bytes to `kind`, for gRPC; what is not such a message raises msgspec.ValidationError."""
    return msgspec.json.Decoder(kind).decode
