"""How far pulls and loads are: per layer and altogether, for those who watch."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

CANCELLED = "cancelled"  # by the node's administrator


class LayerPhase(StrEnum):
    QUEUED = "queued"
    FETCHING = "fetching"  # and unpacking what has come
    UNPACKING = "unpacking"  # all has come
    COMMITTING = "committing"
    DONE = "done"
    FAILED = "failed"


@dataclass(slots=True)
class LayerProgress:
    """One layer that was not here when the pull began."""

    diff_id: str
    digest: str
    size_bytes: int  # compressed
    phase: LayerPhase = LayerPhase.QUEUED
    queue_position: int = 0  # of those that wait, from 1; 0 where it does not
    bytes_fetched: int = 0
    bytes_unpacked: int = 0


@dataclass(slots=True)
class Progress:
    """How far a pull or load is; counts bytes of all its layers together."""

    reference: str
    phase: str = "resolving"  # resolving, fetching, done, or CANCELLED
    layers_total: int = 0
    layers_done: int = 0
    bytes_total: int = 0  # compressed, of the layers that are not there yet
    bytes_fetched: int = 0
    bytes_unpacked: int = 0
    layers: list[LayerProgress] = field(default_factory=list)  # those that are not there yet
    started_at: float = field(default_factory=time.monotonic)
    listeners: list[Callable[["Progress"], None]] = field(default_factory=list, repr=False)

    def changed(self) -> None:
        for listener in self.listeners:
            listener(self)

    def layer(self, diff_id: str, digest: str, size_bytes: int) -> LayerProgress:
        """The layer's entry, added where the pull began without it."""
        for each in self.layers:
            if each.diff_id == diff_id:
                return each
        self.layers.append(LayerProgress(diff_id, digest, size_bytes))
        return self.layers[-1]

    def count(self, layer: LayerProgress, fetched: int, unpacked: int) -> None:
        """What has come of `layer` by now."""
        self.bytes_fetched += fetched - layer.bytes_fetched
        self.bytes_unpacked += unpacked - layer.bytes_unpacked
        layer.bytes_fetched, layer.bytes_unpacked = fetched, unpacked
        self.changed()

    def arrived(self, diff_id: str) -> None:
        """The layer is there, whoever fetched it."""
        for each in self.layers:
            if each.diff_id == diff_id:
                each.phase = LayerPhase.DONE
                self.count(each, each.size_bytes, each.bytes_unpacked)
        self.changed()

    @property
    def rate_bytes_per_s(self) -> float:
        return self.bytes_fetched / max(0.001, time.monotonic() - self.started_at)

    @property
    def eta_s(self) -> float | None:
        """Seconds until all has come, at the rate so far; None where there is none yet."""
        left = self.bytes_total - self.bytes_fetched
        return left / self.rate_bytes_per_s if self.bytes_fetched else None
