"""Makes a layer's directory tree from its tar entries, in the form that overlayfs takes as a lower directory.

Runs in worker processes. Nothing an entry says leads out of the tree: every parent directory is opened with openat2 and
RESOLVE_IN_ROOT, the last component is never followed. Whiteouts become overlayfs' own: a character device 0/0, and the
xattr trusted.overlay.opaque. Source: OCI image-spec, layer.md; kernel, filesystems/overlayfs.rst.
"""

import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

from cri.image_service.layer_files import FileList, crc32
from cri.image_service.tar import Archive, Entry, Kind, Stream
from oci.errors import Error

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
_FOREIGN_WHITEOUT = b".wh..wh."  # AUFS' own files, such as .wh..wh.plnk
OPAQUE_XATTR = "trusted.overlay.opaque"
_BLOCK_BYTES = 4096
_OPEN_DIRECTORIES = 64
_PLAIN_PATH_BYTES = 2048  # far from PATH_MAX, where paths are left to openat2 to refuse
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_SYMLINKS = 40


@dataclass(slots=True)
class Usage:
    size_bytes: int = 0
    inodes: int = 0


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What was made. `implied` are directories that no entry describes, by path from the layer's root: what they look
    like is for the layers below to say."""

    size_bytes: int
    inodes: int
    implied: tuple[str, ...]


@dataclass(slots=True)
class _Attributes:
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


def unpack(stream: Stream, directory: Path) -> Unpacked:
    """Makes `directory`/diff from the archive in `stream`, which is read to its end, and the list of its files.

    Uses `directory`/trash for what entries replace. Errors name the entry; the caller removes `directory` then.
    """
    os.umask(0)
    (directory / "trash").mkdir()
    (directory / "diff").mkdir(mode=0o755)
    with FileList(directory) as files, _Tree(directory, files) as tree:
        archive = Archive(stream)
        for entry in archive:
            with _told(entry):
                tree.add(entry, archive.data())
        stream.drain()
        tree.finish()
    remove_tree(directory / "trash")
    return Unpacked(tree.usage.size_bytes, tree.usage.inodes, tree.implied())


@contextmanager
def _told(subject: object) -> Iterator[None]:
    """What the kernel refuses of `subject` is the archive's fault, unless the node lacks something."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE):
            raise
        raise Error(f"cannot unpack {subject}: {error.strerror}") from error
    except (ValueError, OverflowError) as error:  # a NUL byte in a name; a number that the kernel has no room for
        raise Error(f"cannot unpack {subject}: {error}") from error


_NEW_DIRECTORY = _Attributes(0o755, 0, 0, 0)


class _Directory(NamedTuple):
    fd: int
    path: bytes  # from the root, without symbolic links


class _Tree:
    """The tree under construction. Directories get their mode, owner and times at the end: until then they are written
    into, which changes times, and a set-group-id directory would hand its group on."""

    def __init__(self, directory: Path, files: FileList) -> None:
        self._files = files
        self._root = _Directory(os.open(directory / "diff", _DIRECTORY_FLAGS), b"")
        self._root_path = _path_of(self._root.fd)
        self._trash = directory / "trash"
        self._trashed = 0
        self._open: dict[bytes, _Directory] = {}  # by the path as entries spell it
        self._stale: list[int] = []  # fds that the entry being added may still use
        self._directories: dict[bytes, _Attributes | None] = {b"": None}  # by real path; None: implied
        self._whiteouts: set[bytes] = set()
        self.usage = Usage(_BLOCK_BYTES, 1)

    def __enter__(self) -> "_Tree":
        return self

    def __exit__(self, *_: object) -> None:
        self._forget_directories()
        self._close_stale()
        os.close(self._root.fd)

    def add(self, entry: Entry, data: Iterator[memoryview]) -> None:
        self._close_stale()
        path = clean_path(entry.name)
        parent_path, _, name = path.rpartition(b"/")
        if not path:
            if entry.kind is Kind.DIRECTORY:
                self._directories[b""] = _attributes(entry)
            return
        if name.startswith(_FOREIGN_WHITEOUT) and name != OPAQUE:
            return
        parent = self._parent(parent_path)
        if name.startswith(WHITEOUT):
            self._white_out(parent, name)
        elif entry.kind is Kind.DIRECTORY:
            self._add_directory(entry, parent, name)
        elif entry.kind is Kind.FILE:
            self._add_file(entry, parent, name, data)
        elif entry.kind is Kind.HARD_LINK:
            self._add_hard_link(entry, parent, name)
        else:
            self._add_special(entry, parent, name)

    def finish(self) -> None:
        """Gives the directories their attributes."""
        for path, attributes in self._directories.items():
            fd = openat2(self._root.fd, path or b".", _DIRECTORY_FLAGS | os.O_NOFOLLOW)
            try:
                with _told(f"{Kind.DIRECTORY.value} {path.decode(errors='backslashreplace')!r}"):
                    _set_attributes(fd, attributes or _NEW_DIRECTORY, 0o755)
            finally:
                os.close(fd)

    def implied(self) -> tuple[str, ...]:
        return tuple(os.fsdecode(path) for path, known in self._directories.items() if known is None)

    def _add_directory(self, entry: Entry, parent: _Directory, name: bytes) -> None:
        try:
            self._make_directory(parent, name)
        except FileExistsError:
            found = os.stat(name, dir_fd=parent.fd, follow_symlinks=False)
            if not stat.S_ISDIR(found.st_mode):
                self._replace(parent, name)
                self._make_directory(parent, name)
        path = _joined(parent.path, name)
        self._directories[path] = _attributes(entry)

    def _make_directory(self, parent: _Directory, name: bytes) -> None:
        """A new directory, opaque where this layer has whited out the lower one: nothing of that shines through."""
        os.mkdir(name, 0o755, dir_fd=parent.fd)
        self._count(0)
        path = _joined(parent.path, name)
        self._files.directory(path)
        self._directories[path] = None
        if path in self._whiteouts:
            self._whiteouts.discard(path)
            self._directories[path] = _NEW_DIRECTORY
            os.setxattr(self._directory(path).fd, OPAQUE_XATTR, b"y")

    def _add_file(self, entry: Entry, parent: _Directory, name: bytes, data: Iterator[memoryview]) -> None:
        mode = entry.mode if entry.mode < 0o1000 else 0o600  # a write, or a change of owner, takes the upper bits away
        try:
            fd = os.open(name, _FILE_FLAGS, mode, dir_fd=parent.fd)
        except FileExistsError:
            self._replace(parent, name)
            fd = os.open(name, _FILE_FLAGS, mode, dir_fd=parent.fd)
        try:
            path = _joined(parent.path, name)
            if entry.segments is None:
                self._files.file(path, entry.size_bytes, _write_all(fd, data))
            else:
                _write_sparse(fd, entry, data)
                self._files.sparse_file(path, entry.size_bytes)
            _set_attributes(fd, _attributes(entry), mode)
        finally:
            os.close(fd)
        self._count(entry.stored_bytes)

    def _add_hard_link(self, entry: Entry, parent: _Directory, name: bytes) -> None:
        source_path, _, source_name = clean_path(entry.link).rpartition(b"/")
        try:
            source = self._directory(source_path)
            try:
                os.link(source_name, name, src_dir_fd=source.fd, dst_dir_fd=parent.fd, follow_symlinks=False)
            except FileExistsError:
                if _same_file(source.fd, source_name, parent.fd, name):
                    return
                self._replace(parent, name)
                os.link(source_name, name, src_dir_fd=source.fd, dst_dir_fd=parent.fd, follow_symlinks=False)
            self._files.hard_link(_joined(parent.path, name), _joined(source.path, source_name))
        except FileNotFoundError as error:
            raise Error(
                f"cannot unpack {entry}: its target {os.fsdecode(entry.link)!r} is not in this layer"
            ) from error

    def _add_special(self, entry: Entry, parent: _Directory, name: bytes) -> None:
        try:
            _make_special(entry, parent.fd, name)
        except FileExistsError:
            self._replace(parent, name)
            _make_special(entry, parent.fd, name)
        self._count(None)
        path = _joined(parent.path, name)
        if entry.kind is Kind.SYMLINK:
            self._files.symlink(path, entry.link)
        else:
            self._files.special(path, _SPECIAL[entry.kind])
        os.chown(name, entry.uid, entry.gid, dir_fd=parent.fd, follow_symlinks=False)
        if entry.kind is not Kind.SYMLINK:
            os.chmod(name, entry.mode, dir_fd=parent.fd)
        for key, value in wanted_xattrs(entry.xattrs).items():
            with _unsupported_ignored():
                os.setxattr(b"/proc/self/fd/%d/%s" % (parent.fd, name), key, value, follow_symlinks=False)
        os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=parent.fd, follow_symlinks=False)

    def _white_out(self, parent: _Directory, name: bytes) -> None:
        if name == OPAQUE:
            os.setxattr(parent.fd, OPAQUE_XATTR, b"y")
            return
        hidden = name[len(WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            raise Error(f"whiteout {os.fsdecode(_joined(parent.path, name))!r} names no file")
        path = _joined(parent.path, hidden)
        try:
            os.mknod(hidden, stat.S_IFCHR, os.makedev(0, 0), dir_fd=parent.fd)
        except FileExistsError:
            # A whiteout hides what lies below, never what its own layer has; a directory of its own starts empty then.
            found = os.stat(hidden, dir_fd=parent.fd, follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                os.setxattr(self._directory(path).fd, OPAQUE_XATTR, b"y")
        else:
            self._count(None)
            self._files.special(path, stat.S_IFCHR)
            self._whiteouts.add(path)

    def _replace(self, parent: _Directory, name: bytes) -> None:
        """Takes away what an earlier entry of the same layer put at `name`."""
        found = os.stat(name, dir_fd=parent.fd, follow_symlinks=False)
        self._files.removed(_joined(parent.path, name))
        if not stat.S_ISDIR(found.st_mode):
            os.unlink(name, dir_fd=parent.fd)
            if found.st_nlink == 1:
                self.usage.inodes -= 1
                self.usage.size_bytes -= _blocks(found.st_size) if stat.S_ISREG(found.st_mode) else 0
            self._forget_directories()  # it may have been a symbolic link on the way to one of them
            return
        self._trashed += 1
        gone = self._trash / str(self._trashed)
        os.rename(name, gone, src_dir_fd=parent.fd)
        self._forget_directories()
        removed = remove_tree(gone)
        self.usage.inodes -= removed.inodes
        self.usage.size_bytes -= removed.size_bytes
        path = _joined(parent.path, name)
        for known in [each for each in self._directories if each == path or each.startswith(path + b"/")]:
            del self._directories[known]
        self._whiteouts = {each for each in self._whiteouts if not each.startswith(path + b"/")}

    def _parent(self, path: bytes) -> _Directory:
        """A directory to put an entry in; made, with its parents, where no entry came before."""
        try:
            return self._directory(path)
        except FileNotFoundError:
            self._make_implied(path, 0)
        except NotADirectoryError:
            self._clear_way(path)
            self._make_implied(path, 0)
        return self._directory(path)

    def _directory(self, path: bytes) -> _Directory:
        """The directory at `path`, with symbolic links on the way resolved inside the root."""
        if not path:
            return self._root
        known = self._open.get(path)
        if known is None:
            if (known := self._directory_below_open(path)) is not None:
                return known
            fd = openat2(self._root.fd, path, _DIRECTORY_FLAGS)
            self._make_room()
            self._stale.append(fd)  # until it is known where it leads, which fails for paths over PATH_MAX
            known = self._open[path] = _Directory(fd, _path_of(fd)[len(self._root_path) + 1 :])
            self._stale.remove(fd)
        return known

    def _directory_below_open(self, path: bytes) -> _Directory | None:
        """A directory right below one that is open, where no link is on the way: then its real path is known."""
        above, _, name = path.rpartition(b"/")
        parent = self._open.get(above) if above else self._root
        if parent is None or len(parent.path) + len(name) > _PLAIN_PATH_BYTES:
            return None
        try:
            fd = os.open(name, _DIRECTORY_FLAGS | os.O_NOFOLLOW, dir_fd=parent.fd)
        except OSError:
            return None
        self._make_room()
        known = self._open[path] = _Directory(fd, _joined(parent.path, name))
        return known

    def _make_room(self) -> None:
        if len(self._open) >= _OPEN_DIRECTORIES:
            self._stale.append(self._open.pop(next(iter(self._open))).fd)

    def _make_implied(self, path: bytes, depth: int) -> None:
        """Makes `path` and its parents, through symbolic links whose target is not there yet."""
        if depth > _MAX_SYMLINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        made = b""
        for component in path.split(b"/"):
            parent, made = self._directory(made), _joined(made, component)
            with suppress(FileNotFoundError):
                self._directory(made)
                continue
            try:
                self._make_directory(parent, component)
            except FileExistsError:
                link = os.readlink(component, dir_fd=parent.fd)
                self._make_implied(clean_path(link if link.startswith(b"/") else _joined(parent.path, link)), depth + 1)

    def _clear_way(self, path: bytes) -> None:
        """Takes away the file that stands where an entry's parent directory must be: later entries win."""
        way = b""
        for component in path.split(b"/"):
            parent, way = self._directory(way), _joined(way, component)
            try:
                self._directory(way)
            except FileNotFoundError:
                return
            except NotADirectoryError:
                self._replace(parent, component)
                return

    def _count(self, size: int | None) -> None:
        """One more inode; a directory has the size 0, None is what takes no block."""
        self.usage.inodes += 1
        if size is not None:
            self.usage.size_bytes += _blocks(size) if size else _BLOCK_BYTES

    def _forget_directories(self) -> None:
        self._stale.extend(directory.fd for directory in self._open.values())
        self._open.clear()

    def _close_stale(self) -> None:
        while self._stale:
            os.close(self._stale.pop())


def clean_path(name: bytes) -> bytes:
    """`name` from the tree's root: no leading slash, no "." and no ".." (which ends at the root, as chdir does)."""
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)


def is_opaque(directory: Path) -> bool:
    """Whether a directory of an unpacked layer hides what lower layers have in it; not so what is none."""
    try:
        return os.getxattr(directory, OPAQUE_XATTR, follow_symlinks=False) == b"y"
    except OSError:
        return False


def remove_tree(path: Path, usage: Usage | None = None) -> Usage:
    """Removes a tree of any depth that nobody else uses, and says what it held. A missing one is empty.

    A `usage` that is given grows by that while the work goes on.
    Each directory is first moved up beside `path`: so no path grows long, and depth needs neither fds nor recursion.
    """
    usage = usage or Usage()
    waiting = [path]
    moved = 0
    while waiting:
        directory = waiting.pop()
        try:
            with os.scandir(directory) as scan:
                for entry in list(scan):
                    found = entry.stat(follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        moved += 1
                        aside = path.with_name(f"{path.name}.{moved}")
                        Path(entry.path).rename(aside)
                        waiting.append(aside)
                        continue
                    Path(entry.path).unlink()
                    if found.st_nlink == 1:
                        usage.inodes += 1
                        usage.size_bytes += _blocks(found.st_size) if stat.S_ISREG(found.st_mode) else 0
            directory.rmdir()
        except FileNotFoundError:
            continue
        usage.inodes += 1
        usage.size_bytes += _BLOCK_BYTES
    return usage


def sync_filesystem(directory: Path) -> None:
    """Writes what is in memory of the file system that holds `directory`. Source: syncfs(2)."""
    fd = os.open(directory, _DIRECTORY_FLAGS)
    try:
        if _libc.syncfs(fd) != 0:
            _raise_errno(directory)
    finally:
        os.close(fd)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_libc = ctypes.CDLL(None, use_errno=True)
_SYS_OPENAT2 = 437  # on every architecture
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_IN_ROOT = 0x10


def openat2(root: int, path: bytes, flags: int) -> int:
    """Opens `path` below the directory `root` as if that were "/". Source: openat2(2)."""
    how = _OpenHow(flags, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    while True:
        fd: int = _libc.syscall(_SYS_OPENAT2, root, path, ctypes.byref(how), ctypes.sizeof(how))
        if fd >= 0:
            return fd
        if ctypes.get_errno() != errno.EAGAIN:  # a rename elsewhere raced with a ".." on the way
            _raise_errno(path)


def _raise_errno(path: Path | bytes) -> NoReturn:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), os.fsdecode(path))


def _path_of(fd: int) -> bytes:
    return os.fsencode(os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115 (bytes as the kernel has them)


def _joined(parent: bytes, name: bytes) -> bytes:
    return parent + b"/" + name if parent else name


def _blocks(size: int) -> int:
    return -(-size // _BLOCK_BYTES) * _BLOCK_BYTES


def _attributes(entry: Entry) -> _Attributes:
    return _Attributes(entry.mode, entry.uid, entry.gid, entry.mtime_ns, entry.xattrs)


def _set_attributes(fd: int, attributes: _Attributes, made_with: int) -> None:
    """Owner before mode, and both before xattrs: chown takes away set-user-id bits and file capabilities.

    What we have made is root's, with the mode `made_with`: directories hand no group on before they are finished.
    """
    if attributes.uid or attributes.gid:
        os.fchown(fd, attributes.uid, attributes.gid)
    if attributes.mode != made_with:
        os.fchmod(fd, attributes.mode)
    for key, value in wanted_xattrs(attributes.xattrs).items():
        with _unsupported_ignored():
            os.setxattr(fd, key, value)
    os.utime(fd, ns=(attributes.mtime_ns, attributes.mtime_ns))


def wanted_xattrs(xattrs: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Without overlayfs' own, which would let an archive redirect the mount, and without the node's SELinux labels."""
    if not xattrs:
        return xattrs
    refused = (b"trusted.overlay.", b"user.overlay.", b"security.selinux")
    return {key: value for key, value in xattrs.items() if not key.startswith(refused)}


@contextmanager
def _unsupported_ignored() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOTSUP:  # the file system has no such xattrs; other runtimes go on as well
            raise


_SPECIAL = {Kind.CHARACTER: stat.S_IFCHR, Kind.BLOCK_DEVICE: stat.S_IFBLK, Kind.FIFO: stat.S_IFIFO}


def _write_all(fd: int, data: Iterator[memoryview]) -> int:
    """The checksum of what was written."""
    checksum = 0
    for piece in data:
        _write(fd, piece)
        checksum = crc32(piece, checksum)
    return checksum


def _write(fd: int, piece: memoryview) -> None:
    written = os.write(fd, piece)
    while written < len(piece):
        written += os.write(fd, piece[written:])


def _write_sparse(fd: int, entry: Entry, data: Iterator[memoryview]) -> None:
    segments = iter(entry.segments or ())
    offset, left = next(segments, (0, 0))
    for whole in data:
        piece = whole
        while piece:
            while not left:
                offset, left = next(segments)
            part = piece[:left]
            os.lseek(fd, offset, os.SEEK_SET)
            _write(fd, part)
            offset, left, piece = offset + len(part), left - len(part), piece[len(part) :]
    os.ftruncate(fd, entry.size_bytes)


def _make_special(entry: Entry, parent: int, name: bytes) -> None:
    if entry.kind is Kind.SYMLINK:
        os.symlink(entry.link, name, dir_fd=parent)
    elif entry.kind is Kind.FIFO:
        os.mkfifo(name, 0o600, dir_fd=parent)
    else:
        os.mknod(name, _SPECIAL[entry.kind] | 0o600, os.makedev(entry.major, entry.minor), dir_fd=parent)


def _same_file(one: int, one_name: bytes, other: int, other_name: bytes) -> bool:
    first = os.stat(one_name, dir_fd=one, follow_symlinks=False)
    second = os.stat(other_name, dir_fd=other, follow_symlinks=False)
    return (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)
