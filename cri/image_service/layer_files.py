"""A layer's list of its own files, with sizes and checksums: written while it is unpacked, believed when it is checked.

It lies beside the tree, as `files`: NUL-ended records "KIND SIZE CRC32 PATH", later ones over earlier ones, and at the
end the checksum of all that came before. Runs in worker processes.
"""

import os
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_READ_BYTES = 1 << 20
_KINDS = {
    stat.S_IFREG: b"f",
    stat.S_IFDIR: b"d",
    stat.S_IFLNK: b"l",
    stat.S_IFCHR: b"c",
    stat.S_IFBLK: b"b",
    stat.S_IFIFO: b"p",
}


def _crc32_function() -> Callable[[Any, int], int]:
    try:
        from isal.isal_zlib import crc32  # noqa: PLC0415  zlib's value in a tenth of its time
    except ImportError:
        return zlib.crc32
    return crc32


crc32 = _crc32_function()


def list_path(directory: Path) -> Path:
    """Where the list of the layer in `directory` lies, beside diff/."""
    return directory / "files"


class FileList:
    """Writes the list. Use with `with`; what ends in an exception lacks its last line, and is no list."""

    def __init__(self, directory: Path) -> None:
        self._file = list_path(directory).open("wb", buffering=1 << 16)
        self._crc = 0

    def __enter__(self) -> "FileList":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._file:
            if kind is None:
                self._file.write(b"= 0 %d \0" % self._crc)

    def file(self, path: bytes, size: int, checksum: int) -> None:
        self._add(b"f %d %d %s\0" % (size, checksum, path))

    def sparse_file(self, path: bytes, size: int) -> None:
        """Its size is all that is verified: reading holes could take for ever."""
        self._add(b"s %d 0 %s\0" % (size, path))

    def directory(self, path: bytes) -> None:
        self._add(b"d 0 0 %s\0" % path)

    def symlink(self, path: bytes, target: bytes) -> None:
        self._add(b"l 0 %d %s\0" % (zlib.crc32(target), path))

    def special(self, path: bytes, kind: int) -> None:
        """`kind` is one of stat's S_IFCHR, S_IFBLK, S_IFIFO."""
        self._add(b"%s 0 0 %s\0" % (_KINDS[kind], path))

    def hard_link(self, path: bytes, source: bytes) -> None:
        self._add(b"h 0 0 %s\0%s\0" % (path, source))

    def removed(self, path: bytes) -> None:
        """Also with all below it."""
        self._add(b"- 0 0 %s\0" % path)

    def _add(self, record: bytes) -> None:
        self._crc = zlib.crc32(record, self._crc)
        self._file.write(record)


@dataclass(frozen=True, slots=True)
class _Listed:
    kind: bytes
    size: int
    checksum: int


def find_damage(directory: Path, count: Callable[[int], None]) -> str:
    """What is wrong with the layer in `directory`: the first thing found, or "". `count` is told of bytes read."""
    try:
        listed = _read(list_path(directory).read_bytes())
    except FileNotFoundError:
        return "it has no list of its files"
    if listed is None:
        return "the list of its files is damaged"
    root = os.fsencode(directory / "diff")
    for path, each in listed.items():
        if trouble := _trouble(os.path.join(root, path), each, count):  # noqa: PTH118 (bytes)
            return f"{os.fsdecode(path)}: {trouble}"
    there = sum(1 for _ in _below(root))
    return "" if there == len(listed) else f"it has {there} files and directories, {len(listed)} are listed"


def _read(text: bytes) -> dict[bytes, _Listed] | None:
    """What is listed, by path; None where the list is not whole."""
    body, _, last = text[:-1].rpartition(b"\0")
    body = body + b"\0" if body else b""
    end = last.split(b" ")
    if not text.endswith(b"\0") or len(end) != 4 or end[0] != b"=" or end[2] != b"%d" % zlib.crc32(body):
        return None
    listed: dict[bytes, _Listed] = {}
    records = iter(body[:-1].split(b"\0") if body else ())
    for record in records:
        kind, size, checksum, path = record.split(b" ", 3)
        if kind == b"-":
            for gone in [each for each in listed if each == path or each.startswith(path + b"/")]:
                del listed[gone]
        elif kind == b"h":
            listed[path] = listed[next(records)]
        else:
            listed[path] = _Listed(kind, int(size), int(checksum))
    return listed


def _trouble(path: bytes, listed: _Listed, count: Callable[[int], None]) -> str:
    try:
        found = os.lstat(path)
    except OSError as error:
        return str(error.strerror)
    kind = _KINDS.get(stat.S_IFMT(found.st_mode), b"?")
    if kind != (b"f" if listed.kind == b"s" else listed.kind):
        return "another kind of file than was unpacked"
    if kind == b"f" and found.st_size != listed.size:
        return f"{found.st_size} bytes, {listed.size} were unpacked"
    try:
        if listed.kind == b"f" and _content_checksum(path, count) != listed.checksum:
            return "other content than was unpacked"
        if kind == b"l" and zlib.crc32(os.readlink(path)) != listed.checksum:  # noqa: PTH115 (bytes)
            return "leads elsewhere than was unpacked"
    except OSError as error:  # a bad sector
        return str(error.strerror)
    return ""


def _content_checksum(path: bytes, count: Callable[[int], None]) -> int:
    checksum = 0
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        while piece := os.read(fd, _READ_BYTES):
            checksum = crc32(piece, checksum)
            count(len(piece))
    finally:
        os.close(fd)
    return checksum


def _below(directory: bytes) -> Iterator[bytes]:
    waiting = [directory]
    while waiting:
        with os.scandir(waiting.pop()) as scan:
            for entry in scan:
                yield entry.path
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
