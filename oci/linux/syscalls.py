"""The Linux system calls that Python does not have, under the kernel's names; failures are OSError with errno and path.

Numbers from 424 on are the same on every architecture that Crito runs on (the kernel's unified table).
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_NR_OPEN_TREE = 428
_NR_MOVE_MOUNT = 429
_NR_FSOPEN = 430
_NR_FSCONFIG = 431
_NR_FSMOUNT = 432
_NR_OPENAT2 = 437
_NR_MOUNT_SETATTR = 442

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20

MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x4
FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_IDMAP = 0x00100000

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

PR_SET_CHILD_SUBREAPER = 36
PR_CAPBSET_READ = 23

PathText = str | bytes | PurePath


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def mount(source: PathText, target: PathText, fstype: str = "", flags: int = 0, data: str = "") -> None:
    _checked(
        _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            fstype.encode() or None,
            ctypes.c_ulong(flags),
            os.fsencode(data) or None,
        ),
        target,
    )


def umount2(target: PathText, flags: int = 0) -> None:
    _checked(_libc.umount2(os.fsencode(target), ctypes.c_int(flags)), target)


def open_tree(dirfd: int, path: PathText, flags: int) -> int:
    return syscall(path, _NR_OPEN_TREE, ctypes.c_int(dirfd), os.fsencode(path), ctypes.c_uint(flags))


def move_mount(from_fd: int, from_path: PathText, to_fd: int, to_path: PathText, flags: int) -> None:
    syscall(
        to_path or from_path,
        _NR_MOVE_MOUNT,
        ctypes.c_int(from_fd),
        os.fsencode(from_path),
        ctypes.c_int(to_fd),
        os.fsencode(to_path),
        ctypes.c_uint(flags),
    )


def fsopen(fstype: str, flags: int = FSOPEN_CLOEXEC) -> int:
    return syscall(fstype, _NR_FSOPEN, fstype.encode(), ctypes.c_uint(flags))


def fsconfig(fd: int, command: int, key: str | None = None, value: PathText | None = None, aux: int = 0) -> None:
    """The error's path is `value`, its text what the file system logged on `fd`, if anything."""
    try:
        syscall(
            value or key or "",
            _NR_FSCONFIG,
            ctypes.c_int(fd),
            ctypes.c_uint(command),
            key.encode() if key is not None else None,
            os.fsencode(value) if value is not None else None,
            ctypes.c_int(aux),
        )
    except OSError as error:
        logged = fs_log(fd)
        if not logged:
            raise
        raise OSError(error.errno, f"{error.strerror} ({'; '.join(logged)})", error.filename) from None


def fs_log(fd: int) -> list[str]:
    """The messages that the kernel kept for this fsopen context, each without its severity letter."""
    lines: list[str] = []
    while True:
        try:
            raw = os.read(fd, 1024)
        except OSError:  # ENODATA: no more
            return lines
        lines.append(raw.decode(errors="replace").strip().removeprefix("e ").removeprefix("w ").removeprefix("i "))


def fsmount(fd: int, flags: int = FSMOUNT_CLOEXEC, attributes: int = 0) -> int:
    try:
        return syscall("", _NR_FSMOUNT, ctypes.c_int(fd), ctypes.c_uint(flags), ctypes.c_uint(attributes))
    except OSError as error:
        raise OSError(error.errno, "; ".join([error.strerror or "", *fs_log(fd)])) from None


def mount_setattr(
    dirfd: int,
    path: PathText,
    flags: int,
    *,
    attr_set: int = 0,
    attr_clr: int = 0,
    propagation: int = 0,
    userns_fd: int = 0,
) -> None:
    attributes = _MountAttr(attr_set, attr_clr, propagation, userns_fd)
    syscall(
        path,
        _NR_MOUNT_SETATTR,
        ctypes.c_int(dirfd),
        os.fsencode(path),
        ctypes.c_uint(flags),
        ctypes.byref(attributes),
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )


def openat2(dirfd: int, path: PathText, flags: int, *, mode: int = 0, resolve: int = 0) -> int:
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    return syscall(
        path,
        _NR_OPENAT2,
        ctypes.c_int(dirfd),
        os.fsencode(path),
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )


@contextmanager
def opened_in_root(root_fd: int, path: PathText, flags: int, *, mode: int = 0) -> Iterator[int]:
    """`path` opened as a process with its root at `root_fd` would see it: links cannot lead out."""
    fd = openat2(root_fd, path, flags, mode=mode, resolve=RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def opened(path: PathText, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def syncfs(fd: int) -> None:
    _checked(_libc.syncfs(ctypes.c_int(fd)), f"/proc/self/fd/{fd}")


class _Statfs(ctypes.Structure):
    # Glibc's struct statfs on 64-bit architectures; only s390x has a narrower f_type, which Crito does not read there.
    _fields_ = (
        ("f_type", ctypes.c_long),
        ("f_bsize", ctypes.c_long),
        ("f_blocks", ctypes.c_ulong),
        ("f_bfree", ctypes.c_ulong),
        ("f_bavail", ctypes.c_ulong),
        ("f_files", ctypes.c_ulong),
        ("f_ffree", ctypes.c_ulong),
        ("f_fsid", ctypes.c_int * 2),
        ("f_namelen", ctypes.c_long),
        ("f_frsize", ctypes.c_long),
        ("f_flags", ctypes.c_long),
        ("f_spare", ctypes.c_long * 4),
    )


@dataclass(frozen=True, slots=True)
class Statfs:
    f_type: int
    f_bsize: int
    f_blocks: int
    f_bfree: int
    f_bavail: int
    f_files: int
    f_ffree: int


def statfs(path: PathText) -> Statfs:
    raw = _Statfs()
    _checked(_libc.statfs(os.fsencode(path), ctypes.byref(raw)), path)
    return Statfs(raw.f_type, raw.f_bsize, raw.f_blocks, raw.f_bfree, raw.f_bavail, raw.f_files, raw.f_ffree)


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    arguments = (ctypes.c_ulong(argument) for argument in (arg2, arg3, arg4, arg5))
    result: int = _libc.prctl(ctypes.c_int(option), *arguments)
    return _checked(result, "prctl")


def syscall(path: PathText, number: int, *arguments: object) -> int:
    """Any call by its number; a failure is an OSError with `path`."""
    return _checked(_libc.syscall(ctypes.c_long(number), *arguments), path)


def _checked(result: int, path: PathText) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(path))
    return result
