"""Keeps a file for each attachment from before its ADD until after its DEL, so that none can be lost.

The sandbox's record holds the same facts; this one outlives it, and tells our attachments from those of other runtimes.

    STATE_DIR/SANDBOX_ID-IFNAME.json    an Entry; written to .new and renamed

It is not synced: what a power failure takes away is younger than what it takes from the records themselves.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import msgspec

from oci.container_spec import SandboxId

from .attachment import Attachment, PodNetworkRequest

log = logging.getLogger(__name__)

Key = tuple[SandboxId, str]  # the sandbox and the interface's name in it


@dataclass(frozen=True, slots=True)
class Entry:
    """Without a result the ADD was not finished."""

    request: PodNetworkRequest
    attachment: Attachment

    @property
    def key(self) -> Key:
        return self.request.sandbox_id, self.attachment.ifname


class Ledger:
    """Synchronous: its files are small, but the disk may be slow."""

    def __init__(self, state_dir: Path) -> None:
        self._dir = state_dir

    def write(self, entry: Entry) -> None:
        path = self._path(entry.key)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = path.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(entry))
        new.replace(path)

    def forget(self, key: Key) -> None:
        self._path(key).unlink(missing_ok=True)

    def read(self) -> tuple[Entry, ...]:
        """All entries; to be called while nobody writes.

        One that is unreadable is logged and dropped: nothing can be released by it.
        """
        for unfinished in self._dir.glob("*.new"):
            unfinished.unlink()
        return tuple(entry for path in sorted(self._dir.glob("*.json")) if (entry := self._entry(path)))

    def _entry(self, path: Path) -> Entry | None:
        try:
            return msgspec.json.decode(path.read_bytes(), type=Entry)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as error:
            log.error("the network attachment in %s is unreadable and forgotten: %s", path, error)
            path.unlink(missing_ok=True)
            return None

    def _path(self, key: Key) -> Path:
        return self._dir / f"{key[0]}-{key[1]}.json"
