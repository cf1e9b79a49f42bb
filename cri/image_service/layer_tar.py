"""Makes a layer's archive again from its unpacked tree: the reverse of `unpack`, as far as there is one.

Runs in worker processes. What comes out unpacks to the same tree, and is the same for the same tree. It is not the
archive that the tree was made from: nobody keeps its order of entries, its spelling of names, its dialect of headers.
Source: OCI image-spec, layer.md.
"""

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from cri.image_service.tar import BLOCK, Entry, Kind
from cri.image_service.tar_writer import END, header, padding
from cri.image_service.unpack import OPAQUE, OPAQUE_XATTR, WHITEOUT, wanted_xattrs
from oci.errors import Error

_READ_BYTES = 1 << 20
_KINDS = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFCHR: Kind.CHARACTER,
    stat.S_IFBLK: Kind.BLOCK_DEVICE,
    stat.S_IFIFO: Kind.FIFO,
}


def layer_tar(tree: Path, implied: Collection[str], count: Callable[[int], None]) -> Iterator[bytes]:
    """The archive, in pieces. `implied` are the directories without an entry of their own, "" the root; `count` is told
    of bytes read."""
    root = os.fsencode(tree)
    without_entry = {os.fsencode(path) for path in implied}
    linked: dict[tuple[int, int], bytes] = {}
    waiting = [b""]
    while waiting:
        directory = waiting.pop()
        if directory not in without_entry:
            yield header(_entry(directory or b".", Kind.DIRECTORY, _joined(root, directory)))
        if _is_opaque(_joined(root, directory)):
            yield header(_empty(_joined(directory, OPAQUE)))
        below = []
        for name in sorted(os.listdir(_joined(root, directory))):  # noqa: PTH208 (bytes)
            path = _joined(directory, name)
            found = os.lstat(_joined(root, path))
            if stat.S_ISDIR(found.st_mode):
                below.append(path)
            elif stat.S_ISCHR(found.st_mode) and found.st_rdev == 0:
                yield header(_empty(_joined(directory, WHITEOUT + name)))
            elif (first := linked.get((found.st_dev, found.st_ino))) is not None:
                yield header(_link(path, first))
            else:
                if found.st_nlink > 1:
                    linked[found.st_dev, found.st_ino] = path
                yield from _file(root, path, found, count)
        waiting += reversed(below)
    yield END


def _file(root: bytes, path: bytes, found: os.stat_result, count: Callable[[int], None]) -> Iterator[bytes]:
    kind = _KINDS.get(stat.S_IFMT(found.st_mode))
    if kind is None:
        raise Error(f"{os.fsdecode(path)} is of a kind that no layer can hold")
    real = _joined(root, path)
    entry = _entry(path, kind, real)
    if kind is not Kind.FILE:
        yield header(entry)
        return
    fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        whole = [(0, found.st_size)] if found.st_size else []
        segments = _segments(fd, found.st_size) if found.st_blocks * 512 < found.st_size else whole
        entry.size_bytes = found.st_size
        entry.stored_bytes = sum(length for _, length in segments)
        entry.segments = segments if segments != whole else None
        yield header(entry)
        for offset, length in segments:
            yield from _range(fd, offset, length, path, count)
        yield padding(entry.stored_bytes)
    finally:
        os.close(fd)


def _range(fd: int, offset: int, length: int, path: bytes, count: Callable[[int], None]) -> Iterator[bytes]:
    os.lseek(fd, offset, os.SEEK_SET)
    while length:
        piece = os.read(fd, min(length, _READ_BYTES))
        if not piece:
            raise Error(f"{os.fsdecode(path)} ends {length} bytes too early")
        count(len(piece))
        length -= len(piece)
        yield piece


def _segments(fd: int, size: int) -> list[tuple[int, int]]:
    """Where a sparse file has data. Segments are of whole blocks, as GNU tar reads them; an empty one tells the end."""
    segments: list[tuple[int, int]] = []
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole is left
                break
            raise
        at = min(-(-os.lseek(fd, start, os.SEEK_HOLE) // BLOCK) * BLOCK, size)
        start -= start % BLOCK
        if segments and sum(segments[-1]) == start:
            start = segments.pop()[0]
        segments.append((start, at - start))
    if not segments or sum(segments[-1]) < size:
        segments.append((size, 0))
    return segments


def _entry(name: bytes, kind: Kind, path: bytes) -> Entry:
    found = os.lstat(path)
    is_device = kind in (Kind.CHARACTER, Kind.BLOCK_DEVICE)
    return Entry(
        name=name,
        kind=kind,
        mode=stat.S_IMODE(found.st_mode),
        uid=found.st_uid,
        gid=found.st_gid,
        mtime_ns=found.st_mtime_ns,
        stored_bytes=0,
        size_bytes=0,
        link=os.readlink(path) if kind is Kind.SYMLINK else b"",  # noqa: PTH115 (bytes)
        major=os.major(found.st_rdev) if is_device else 0,
        minor=os.minor(found.st_rdev) if is_device else 0,
        xattrs=_xattrs(path),
    )


def _link(name: bytes, target: bytes) -> Entry:
    return Entry(name, Kind.HARD_LINK, 0o644, 0, 0, 0, 0, 0, link=target)


def _empty(name: bytes) -> Entry:
    return Entry(name, Kind.FILE, 0o600, 0, 0, 0, 0, 0)


def _xattrs(path: bytes) -> dict[bytes, bytes]:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return {}
        raise
    found = {os.fsencode(name): os.getxattr(path, name, follow_symlinks=False) for name in sorted(names)}
    return wanted_xattrs(found)


def _is_opaque(path: bytes) -> bool:
    try:
        return os.getxattr(path, OPAQUE_XATTR) == b"y"
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return False
        raise


def _joined(parent: bytes, name: bytes) -> bytes:
    return parent + b"/" + name if parent and name else parent or name
