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
class SaveImages:
    """Asks for images in a file: a stream of ImageEvent that ends with what was saved."""

    references: tuple[str, ...]
    path: str  # as the daemon sees it
    format: str  # oci-archive, oci-layout, docker-archive
    username: str = ""
    password: str = field(default="", repr=False)


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
class Pulls:
    """Asks for the pulls and loads under way: a list of PullStatus."""


@dataclass(frozen=True, slots=True)
class LayerStatus:
    """A layer that was not here when its pull began."""

    digest: str
    phase: str  # queued, fetching, unpacking, committing, done, failed
    queue_position: int  # from 1; 0 where it does not wait
    fetched_bytes: int
    total_bytes: int
    unpacked_bytes: int


@dataclass(frozen=True, slots=True)
class PullStatus:
    reference: str
    seconds: float
    progress: Progress
    rate_bytes_per_s: float
    eta_seconds: float | None
    layers: tuple[LayerStatus, ...]


@dataclass(frozen=True, slots=True)
class CancelPull:
    """Asks to end the pulls of an image; how many there were is the answer."""

    reference: str


@dataclass(frozen=True, slots=True)
class PinImage:
    reference: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class VerifyImages:
    """Asks for each layer of the store that is damaged: a stream of DamagedLayer."""

    repair: bool = False


@dataclass(frozen=True, slots=True)
class DamagedLayer:
    diff_id: str
    images: tuple[str, ...]
    found: str
    outcome: str = ""  # of the repair, where one was asked for


@dataclass(frozen=True, slots=True)
class ImageSummary:
    id: str
    repo_tags: tuple[str, ...]
    repo_digests: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class SavedImage:
    """An image that was written to a file: `id` as it is there, `source_id` as it is here."""

    id: str
    source_id: str
    names: tuple[str, ...]
    regenerated: str = ""  # why its layers were made anew and its id is another; "" where it is an exact copy


@dataclass(frozen=True, slots=True)
class ImageEvent:
    """One message of a pull, load or save: its progress, or at the end the images."""

    progress: Progress | None = None
    images: tuple[ImageSummary, ...] = ()
    saved: tuple[SavedImage, ...] = ()


def encode(message: Any) -> bytes:
    return msgspec.json.encode(message)


def decoder(kind: type[T]) -> Any:
    """A function from bytes to `kind`, for gRPC; what is not such a message raises msgspec.ValidationError."""
    return msgspec.json.Decoder(kind).decode
