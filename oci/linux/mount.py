"""Mounts on this host: made, taken away and listed; what is mounted where is decided by the callers."""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from oci.linux import syscalls
from oci.linux.syscalls import opened

# The kernel copies at most 256 bytes of a string given to fsconfig, NUL included, and one page of classic options.
_FSCONFIG_STRING = 255
_CLASSIC_OPTIONS = 4095
_STACKED = 64  # mounts on top of one another that one unmount takes away


@dataclass(frozen=True, slots=True)
class MountPoint:
    """One line of /proc/PID/mountinfo."""

    id: int
    parent_id: int
    device: str  # "major:minor"
    root: str
    target: str
    options: tuple[str, ...]
    is_shared: bool
    is_slave: bool
    fstype: str
    source: str
    super_options: tuple[str, ...]


def overlay(
    target: Path,
    lowers: Sequence[Path],
    upper: Path | None = None,
    work: Path | None = None,
    options: Sequence[str] = (),
    *,
    readonly: bool = False,
) -> None:
    """Mount an overlay of `lowers` (lowest first) on `target`; without an upper directory it is read-only.

    `options` are overlayfs options, "name" or "name=value". Any number of layers up to the kernel's 500 works: they go
    one by one through the new mount API, and where the kernel has no "lowerdir+" (before 6.8), by short names.
    """
    readonly = readonly or upper is None
    directories: list[tuple[str, Path]] = []
    if upper is not None and work is not None:
        directories = [("upperdir", upper), ("workdir", work)]
    try:
        _overlay_by_fsconfig(target, lowers, directories, options, readonly)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EPERM):
            raise
        try:
            _overlay_classic(target, lowers, directories, options, readonly)
        except OSError as classic:
            # The new API says why (its log is in the text); the old one only that it will not.
            raise (error if classic.errno == error.errno else classic) from None


def bind(source: Path, target: Path, *, readonly: bool = False, recursive: bool = False) -> None:
    """Mount `source` also on `target`, privately; nothing stays when the read-only remount fails."""
    syscalls.mount(source, target, flags=syscalls.MS_BIND | (syscalls.MS_REC if recursive else 0))
    try:
        make_private(target)
        if readonly:
            flags = syscalls.AT_RECURSIVE if recursive else 0
            syscalls.mount_setattr(syscalls.AT_FDCWD, target, flags, attr_set=syscalls.MOUNT_ATTR_RDONLY)
    except OSError:
        unmount(target)
        raise


def tmpfs(target: Path, size_bytes: int = 0, mode: int = 0o755, *, source: str = "tmpfs", options: str = "") -> None:
    """Mount a tmpfs without set-uid files and devices; a size of 0 is the kernel's default, half of the memory."""
    data = f"mode={mode:o}" + (f",size={size_bytes}" if size_bytes else "") + (f",{options}" if options else "")
    syscalls.mount(source, target, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, data)


def idmapped(source: Path, target: Path, user_namespace_fd: int) -> None:
    """Mount `source` also on `target` with owners shifted as the user namespace maps them."""
    tree = syscalls.open_tree(syscalls.AT_FDCWD, source, syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC)
    try:
        syscalls.mount_setattr(
            tree, "", syscalls.AT_EMPTY_PATH, attr_set=syscalls.MOUNT_ATTR_IDMAP, userns_fd=user_namespace_fd
        )
        syscalls.move_mount(tree, "", syscalls.AT_FDCWD, target, syscalls.MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(tree)
    make_private(target)


def make_private(target: Path, *, recursive: bool = True) -> None:
    syscalls.mount("none", target, flags=syscalls.MS_PRIVATE | (syscalls.MS_REC if recursive else 0))


def make_shared(target: Path, *, recursive: bool = True) -> None:
    syscalls.mount("none", target, flags=syscalls.MS_SHARED | (syscalls.MS_REC if recursive else 0))


def make_private_mountpoint(directory: Path) -> None:
    """Let mounts below `directory` stay in this mount namespace: elsewhere a copy would keep them busy."""
    if not is_mountpoint(directory):
        bind(directory, directory)


def unmount(target: Path) -> None:
    """Take away everything mounted on `target`, lazily when it is busy; that nothing is mounted there is success."""
    for _ in range(_STACKED):
        try:
            _unmount_one(target)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):  # not a mount point, not there
                return
            raise


def unmount_below(directory: Path) -> None:
    """Take away every mount below `directory` and on it, deepest first."""
    for point in sorted(mounts_below(directory), key=lambda point: point.id, reverse=True):
        unmount(Path(point.target))
    unmount(directory)


def is_mountpoint(path: Path) -> bool:
    """Whether something is mounted on `path` itself, a file or a directory; False where it does not exist."""
    try:
        return path == Path("/") or _mount_id(path) != _mount_id(path.parent)
    except FileNotFoundError:
        return False


def mounts_below(directory: Path) -> list[MountPoint]:
    """The mounts below `directory` (not on it), in the order in which they were made."""
    prefix = f"{str(directory).rstrip('/')}/"
    return [point for point in mountinfo() if point.target.startswith(prefix)]


def mountinfo(path: Path = Path("/proc/self/mountinfo")) -> list[MountPoint]:
    return list(parse_mountinfo(path.read_text(errors="surrogateescape")))


def parse_mountinfo(text: str) -> Iterator[MountPoint]:
    """Source: proc_pid_mountinfo(5). A line that a racing unmount left half-written is skipped."""
    for line in text.splitlines():
        before, separator, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if not separator or len(fields) < 6 or len(kind) < 3:
            continue
        yield MountPoint(
            id=int(fields[0]),
            parent_id=int(fields[1]),
            device=fields[2],
            root=_unescaped(fields[3]),
            target=_unescaped(fields[4]),
            options=tuple(fields[5].split(",")),
            is_shared=any(tag.startswith("shared:") for tag in fields[6:]),
            is_slave=any(tag.startswith("master:") for tag in fields[6:]),
            fstype=kind[0],
            source=_unescaped(kind[1]),
            super_options=tuple(kind[2].split(",")),
        )


def mount_of(path: Path, points: Sequence[MountPoint]) -> MountPoint | None:
    """The mount that holds the absolute `path`, by its text alone: the file system is not asked."""
    found = None
    text = f"{str(path).rstrip('/')}/"
    for point in points:
        target = f"{point.target.rstrip('/')}/"
        # The later line of two equally long ones lies on top.
        if text.startswith(target) and (found is None or len(point.target) >= len(found.target)):
            found = point
    return found


def _overlay_by_fsconfig(
    target: Path,
    lowers: Sequence[Path],
    directories: Sequence[tuple[str, Path]],
    options: Sequence[str],
    readonly: bool,
) -> None:
    with _ShortNames() as names:
        context = syscalls.fsopen("overlay")
        try:
            syscalls.fsconfig(context, syscalls.FSCONFIG_SET_STRING, "source", "overlay")
            for lower in reversed(lowers):  # overlayfs wants the topmost first
                syscalls.fsconfig(context, syscalls.FSCONFIG_SET_STRING, "lowerdir+", names.of(lower))
            for key, path in directories:
                syscalls.fsconfig(context, syscalls.FSCONFIG_SET_STRING, key, names.of(path))
            for option in options:
                name, separator, value = option.partition("=")
                if separator:
                    syscalls.fsconfig(context, syscalls.FSCONFIG_SET_STRING, name, value)
                else:
                    syscalls.fsconfig(context, syscalls.FSCONFIG_SET_FLAG, name)
            syscalls.fsconfig(context, syscalls.FSCONFIG_CMD_CREATE)
            mounted = syscalls.fsmount(context, attributes=syscalls.MOUNT_ATTR_RDONLY if readonly else 0)
        finally:
            os.close(context)
        try:
            syscalls.move_mount(mounted, "", syscalls.AT_FDCWD, target, syscalls.MOVE_MOUNT_F_EMPTY_PATH)
        finally:
            os.close(mounted)


def _overlay_classic(
    target: Path,
    lowers: Sequence[Path],
    directories: Sequence[tuple[str, Path]],
    options: Sequence[str],
    readonly: bool,
) -> None:
    with _ShortNames() as names:
        for short in (False, True):
            layers = ":".join(names.of(lower, always=short) for lower in reversed(lowers))
            data = ",".join([f"lowerdir={layers}", *(f"{key}={names.of(path)}" for key, path in directories), *options])
            if len(os.fsencode(data)) <= _CLASSIC_OPTIONS:
                break
        else:
            raise OSError(
                errno.E2BIG, f"the names of {len(lowers)} layers exceed the kernel's mount options", str(target)
            )
        syscalls.mount("overlay", target, "overlay", syscalls.MS_RDONLY if readonly else 0, data)


class _ShortNames:
    """Names for directories that overlayfs takes whatever their length and characters: links of open O_PATH fds."""

    def __init__(self) -> None:
        self._fds: list[int] = []
        # The shorter the name, the more layers: 340 instead of 220 where only classic options are known.
        self._directory = "/dev/fd" if Path("/dev/fd").is_dir() else "/proc/self/fd"

    def __enter__(self) -> "_ShortNames":
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds:
            os.close(fd)

    def of(self, path: Path, *, always: bool = False) -> str:
        if not always and len(os.fsencode(path)) < _FSCONFIG_STRING and not re.search(r"[:,\\]", str(path)):
            return str(path)
        self._fds.append(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        return f"{self._directory}/{self._fds[-1]}"


def _unmount_one(target: Path) -> None:
    try:
        syscalls.umount2(target, syscalls.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        syscalls.umount2(target, syscalls.UMOUNT_NOFOLLOW | syscalls.MNT_DETACH)


def _mount_id(path: Path) -> int:
    with opened(path, os.O_PATH | os.O_NOFOLLOW) as fd:
        for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
            if line.startswith("mnt_id:"):
                return int(line.split()[1])
    raise OSError(errno.ENODATA, "no mnt_id in /proc/self/fdinfo", str(path))


def _unescaped(field: str) -> str:
    """Blanks, tabs, newlines and backslashes are octal escapes of bytes in mountinfo."""
    if "\\" not in field:
        return field
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
