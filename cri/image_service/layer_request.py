"""What a worker is asked for, to have a layer: of a registry, or of an archive."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cri.image_service.contents import Content
from cri.image_service.limits import RegistryLimit
from cri.image_service.snapshots import LayerDirectory


@dataclass(frozen=True, slots=True)
class WantedLayer:
    """A layer to have: what it shall be, and the worker's request that gets it."""

    content: Content
    request: dict[str, Any]
    registry: str = ""  # the host that is asked first, in whose queue the layer waits

    @property
    def id(self) -> str:
        return self.content.id

    @property
    def size_bytes(self) -> int:
        return self.content.blob.size_bytes

    @property
    def digest(self) -> str:
        """Of the blob; "" where nothing tells it."""
        return self.content.blob.digest


class LayerRequests:
    def __init__(
        self,
        directory: LayerDirectory,
        limits: Mapping[str, RegistryLimit],
        keys_path: str,
        timeouts: Mapping[str, Any],
    ) -> None:
        self._directory = directory
        self._limits = limits
        self._keys_path = keys_path
        self._timeouts = timeouts

    def remote(self, content: Content, sources: Sequence[dict[str, Any]], session: dict[str, Any]) -> WantedLayer:
        """The layer from `sources`, the first to be asked first, in a session that the same registry has begun."""
        request = {
            **self._request(content),
            "sources": sources,
            "session": session,
            "paces": self.paces(sources),
            "size_bytes": content.blob.size_bytes,
            "partial": str(self._directory.partial(content.partial)),
            **self._timeouts,
        }
        return WantedLayer(content, request, sources[0]["host"])

    def paces(self, sources: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """By host, what the worker keeps the rate with of those of `sources` that have one."""
        limited = {host: limit for each in sources if (limit := self._limits.get(host := each["host"])) is not None}
        return {
            host: {"path": str(self._directory.pace(host)), "bytes_per_s": limit.bytes_per_s}
            for host, limit in limited.items()
            if limit.bytes_per_s
        }

    def local(self, content: Content, extent: dict[str, Any]) -> WantedLayer:
        """The layer from where it lies in a file."""
        return WantedLayer(content, {**self._request(content), "extent": extent})

    def _request(self, content: Content) -> dict[str, Any]:
        """What a worker must know of a layer, wherever its bytes come from."""
        blob = content.blob
        encryption = {"annotations": dict(blob.annotations), "keys_path": self._keys_path}
        return {
            "verb": "layer",
            "id": content.id,
            "digest": blob.digest,
            "diff_id": content.diff_id,
            "file": content.file,
            "encryption": encryption if blob.is_encrypted else None,
        }
