"""images.db: which images, names and layers there are. SQLite with synchronous=FULL, one transaction per change.

Synchronous; `Images` calls it from one thread. A layer's record is written after its data is on the disk, so a record
may be believed. Databases of other stores are read only (see additional.py).
"""

import json
import logging
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

from oci.errors import FailedPrecondition

log = logging.getLogger(__name__)

_SCHEMA_VERSION = 3
_SCHEMA = """
CREATE TABLE layers (
    diff_id TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL, inodes INTEGER NOT NULL, implied TEXT NOT NULL);
CREATE TABLE images (
    id TEXT PRIMARY KEY, config TEXT NOT NULL, manifest TEXT NOT NULL, manifest_digest TEXT NOT NULL,
    media_type TEXT NOT NULL, size_bytes INTEGER NOT NULL, layers TEXT NOT NULL, pulled_at INTEGER NOT NULL,
    removed INTEGER NOT NULL DEFAULT 0);
CREATE TABLE names (
    name TEXT PRIMARY KEY, image TEXT NOT NULL REFERENCES images (id) ON DELETE CASCADE, is_digest INTEGER NOT NULL);
CREATE INDEX names_by_image ON names (image);
"""
# Version 2: layers that an unclean shutdown may have damaged, until they are verified; and pins made at run time.
_SINCE_1 = """
CREATE TABLE suspects (diff_id TEXT PRIMARY KEY);
CREATE TABLE pins (image TEXT PRIMARY KEY, pinned INTEGER NOT NULL);
"""
# Version 3: where images came from, with the signatures found there; of earlier ones their names are all that is known.
_SINCE_2 = """
CREATE TABLE origins (
    image TEXT NOT NULL REFERENCES images (id) ON DELETE CASCADE, transport TEXT NOT NULL, name TEXT NOT NULL,
    manifest_digest TEXT NOT NULL, signatures TEXT, PRIMARY KEY (image, transport, name, manifest_digest));
"""
_SELECT_IMAGES = (
    "SELECT id, config, manifest, manifest_digest, media_type, size_bytes, layers, pulled_at, removed FROM images"
)


@dataclass(frozen=True, slots=True)
class LayerRecord:
    diff_id: str
    size_bytes: int  # on the disk
    inodes: int
    implied: tuple[str, ...] = ()  # directories without an entry of their own


@dataclass(frozen=True, slots=True)
class ImageRecord:
    id: str
    config: str  # JSON, as pulled; "" for an artifact, which has none of interest
    manifest: str  # JSON, as pulled; "" where the source had none
    manifest_digest: str
    media_type: str
    size_bytes: int  # compressed layers and config
    layers: tuple[str, ...]  # lowest first
    pulled_at: int  # ns since the epoch
    removed: bool = False  # kept only for containers that still run from it

    @property
    def is_artifact(self) -> bool:
        return not self.config


@dataclass(frozen=True, slots=True)
class Name:
    """ "name:tag", or "name@digest"."""

    name: str
    image_id: str
    is_digest: bool


@dataclass(frozen=True, slots=True)
class Origin:
    """One way by which an image came to the node: the policy is asked about these."""

    transport: str  # as in containers-policy.json(5): "docker" for a registry
    name: str  # "name:tag" or "name@digest" of a registry; else the path of a local file
    manifest_digest: str  # sha256 of the image's own manifest, not of an index; "" where it has none
    signatures: str | None = None  # JSON of those found there; None: nobody has looked


@dataclass(frozen=True, slots=True)
class Contents:
    layers: tuple[LayerRecord, ...]
    images: tuple[ImageRecord, ...]
    names: tuple[Name, ...]
    suspects: frozenset[str] = frozenset()  # layers to verify before they are used
    pins: Mapping[str, bool] = field(default_factory=dict)  # by image id, over what the configuration says


class Reader:
    """What is on record, by a connection to a database of our schema."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def load(self) -> Contents:
        layers = [
            LayerRecord(diff_id, size, inodes, tuple(json.loads(implied)))
            for diff_id, size, inodes, implied in self._db.execute(
                "SELECT diff_id, size_bytes, inodes, implied FROM layers"
            )
        ]
        images = [_image_record(row) for row in self._db.execute(f"{_SELECT_IMAGES} ORDER BY pulled_at")]
        names = [
            Name(name, image, bool(is_digest))
            for name, image, is_digest in self._db.execute("SELECT name, image, is_digest FROM names ORDER BY rowid")
        ]
        suspects = frozenset(diff_id for (diff_id,) in self._db.execute("SELECT diff_id FROM suspects"))
        pins = {image: bool(pinned) for image, pinned in self._db.execute("SELECT image, pinned FROM pins")}
        return Contents(tuple(layers), tuple(images), tuple(names), suspects, pins)

    def image(self, image_id: str) -> ImageRecord | None:
        row = self._db.execute(f"{_SELECT_IMAGES} WHERE id = ?", (image_id,)).fetchone()
        return None if row is None else _image_record(row)

    def origins(self, image_id: str) -> tuple[Origin, ...]:
        """All ways by which the image came, the first one first; none of one that an earlier version took in."""
        rows = self._db.execute(
            "SELECT transport, name, manifest_digest, signatures FROM origins WHERE image = ? ORDER BY rowid",
            (image_id,),
        )
        return tuple(Origin(*row) for row in rows)


class Store(Reader):
    def __init__(self, path: Path) -> None:
        super().__init__(sqlite3.connect(path, isolation_level=None, check_same_thread=False))
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA foreign_keys=ON")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version < _SCHEMA_VERSION:
            missing = "".join((_SCHEMA, _SINCE_1, _SINCE_2)[version:])
            self._db.executescript(f"BEGIN; {missing} PRAGMA user_version={_SCHEMA_VERSION}; COMMIT;")

    def close(self) -> None:
        self._db.close()

    def suspect_all(self) -> None:
        """Every layer there is now is to be verified before it is used."""
        self._db.execute("INSERT OR IGNORE INTO suspects SELECT diff_id FROM layers")

    def clear(self, diff_id: str) -> None:
        """The layer has been verified."""
        self._db.execute("DELETE FROM suspects WHERE diff_id = ?", (diff_id,))

    def pin(self, image_id: str, pinned: bool) -> None:
        self._db.execute("INSERT OR REPLACE INTO pins VALUES (?, ?)", (image_id, pinned))

    def add_layer(self, layer: LayerRecord) -> None:
        with self._db:
            self._db.execute("BEGIN")
            self._db.execute(
                "INSERT OR REPLACE INTO layers VALUES (?, ?, ?, ?)",
                (layer.diff_id, layer.size_bytes, layer.inodes, json.dumps(layer.implied)),
            )
            self.clear(layer.diff_id)

    def remove_layers(self, diff_ids: Iterable[str]) -> None:
        with self._db:
            self._db.execute("BEGIN")
            gone = [(diff_id,) for diff_id in diff_ids]
            self._db.executemany("DELETE FROM layers WHERE diff_id = ?", gone)
            self._db.executemany("DELETE FROM suspects WHERE diff_id = ?", gone)

    def put_image(self, image: ImageRecord, names: Iterable[Name], origin: Origin | None = None) -> None:
        """The image, and names that point to it from now on, whatever they pointed to before, and where it came from.

        An origin without signatures leaves those that were found there before.
        """
        with self._db:
            self._db.execute("BEGIN")
            self._db.execute(
                "INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                "config=excluded.config, manifest=excluded.manifest, manifest_digest=excluded.manifest_digest, "
                "media_type=excluded.media_type, size_bytes=excluded.size_bytes, layers=excluded.layers, "
                "pulled_at=excluded.pulled_at, removed=excluded.removed",
                (
                    image.id,
                    image.config,
                    image.manifest,
                    image.manifest_digest,
                    image.media_type,
                    image.size_bytes,
                    json.dumps(image.layers),
                    image.pulled_at,
                    image.removed,
                ),
            )
            self._db.executemany(
                "INSERT INTO names VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET image=excluded.image",
                [(name.name, name.image_id, name.is_digest) for name in names],
            )
            if origin is not None:
                self._put_origin(image.id, origin)

    def put_origin(self, image_id: str, origin: Origin) -> None:
        """What was found out of an image that is here; nothing where it is gone meanwhile."""
        with self._db:
            self._db.execute("BEGIN")
            self._put_origin(image_id, origin)

    def _put_origin(self, image_id: str, origin: Origin) -> None:
        self._db.execute(
            "INSERT INTO origins SELECT id, ?, ?, ?, ? FROM images WHERE id = ? "
            "ON CONFLICT (image, transport, name, manifest_digest) "
            "DO UPDATE SET signatures=coalesce(excluded.signatures, signatures)",
            (origin.transport, origin.name, origin.manifest_digest, origin.signatures, image_id),
        )

    def retire_image(self, image_id: str) -> None:
        """Takes its names and marks it as removed, for containers still run from it."""
        with self._db:
            self._db.execute("BEGIN")
            self._db.execute("DELETE FROM names WHERE image = ?", (image_id,))
            self._db.execute("DELETE FROM origins WHERE image = ?", (image_id,))
            self._db.execute("UPDATE images SET removed = 1 WHERE id = ?", (image_id,))

    def remove_image(self, image_id: str) -> None:
        with self._db:
            self._db.execute("BEGIN")
            self._db.execute("DELETE FROM images WHERE id = ?", (image_id,))
            self._db.execute("DELETE FROM pins WHERE image = ?", (image_id,))


@contextmanager
def opened_read_only(path: Path, scratch: Path) -> Iterator[Reader]:
    """The database of a store that is not ours and that nobody writes to now. Nothing is written beside it.

    Transactions that a daemon which was killed has left in the write-ahead log count: they are read from a copy, which
    is made below `scratch`. Raises FailedPrecondition for what is no such database, or has another schema.
    """
    log_file = path.with_name(f"{path.name}-wal")
    with ExitStack() as stack:
        try:
            if log_file.exists() and log_file.stat().st_size:
                copy = Path(stack.enter_context(TemporaryDirectory(prefix="images-", dir=scratch)))
                for each in (path, log_file):
                    shutil.copyfile(each, copy / each.name)
                uri = f"file:{quote(str(copy / path.name))}"
            else:
                uri = f"file:{quote(str(path))}?mode=ro&immutable=1"
            db = stack.enter_context(closing(sqlite3.connect(uri, uri=True, isolation_level=None)))
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version != _SCHEMA_VERSION:
                raise FailedPrecondition(f"{path} has the schema {version}; this version reads {_SCHEMA_VERSION}")
            yield Reader(db)
        except (OSError, sqlite3.Error) as error:
            raise FailedPrecondition(f"cannot read {path}: {error}") from error


def _image_record(row: tuple[Any, ...]) -> ImageRecord:
    image_id, config, manifest, manifest_digest, media_type, size_bytes, layers, pulled_at, removed = row
    return ImageRecord(
        image_id,
        config,
        manifest,
        manifest_digest,
        media_type,
        size_bytes,
        tuple(json.loads(layers)),
        pulled_at,
        bool(removed),
    )
