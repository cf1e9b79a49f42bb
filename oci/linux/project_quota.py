"""Project quotas, for accounting alone: whose project a directory's files are, and what a project takes. No limits.

ext4 (feature `project`) and xfs have them, mounted with prjquota. Source: quotactl(2); linux/fs.h, struct fsxattr;
quotactl_fd is in Linux 5.14 and newer, and has the same number on every architecture.
"""

import ctypes
import errno
import fcntl
import os
import struct
from pathlib import Path

from oci.linux import syscalls
from oci.linux.tree import Usage

_NR_QUOTACTL_FD = 443
_PRJQUOTA = 2
_Q_GETQUOTA = 0x800007
_FSXATTR = struct.Struct("=IIIII8s")  # xflags, extsize, nextents, projid, cowextsize, padding
_XFLAG_PROJINHERIT = 0x200
_IS_POWERPC = os.uname().machine.startswith("ppc")  # which has other bits for the direction of an ioctl
_FS_IOC_FSGETXATTR = 0x401C581F if _IS_POWERPC else 0x801C581F
_FS_IOC_FSSETXATTR = 0x801C5820 if _IS_POWERPC else 0x401C5820
# What the kernel says where there is nothing to ask: no such call, no quotas on this file system, or not of projects.
_NOT_HERE = (errno.ENOSYS, errno.ESRCH, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.ENOTTY)


class _Dqblk(ctypes.Structure):
    _fields_ = (
        ("bhardlimit", ctypes.c_uint64),
        ("bsoftlimit", ctypes.c_uint64),
        ("curspace", ctypes.c_uint64),  # bytes
        ("ihardlimit", ctypes.c_uint64),
        ("isoftlimit", ctypes.c_uint64),
        ("curinodes", ctypes.c_uint64),
        ("btime", ctypes.c_uint64),
        ("itime", ctypes.c_uint64),
        ("valid", ctypes.c_uint32),
    )


def usage(path: Path, project: int) -> Usage | None:
    """What the files of `project` take on the file system of `path`; None where nobody keeps account of projects."""
    found = _Dqblk()
    with syscalls.opened(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        try:
            syscalls.syscall(
                path,
                _NR_QUOTACTL_FD,
                ctypes.c_uint(fd),
                ctypes.c_uint(_Q_GETQUOTA << 8 | _PRJQUOTA),
                ctypes.c_uint(project),
                ctypes.byref(found),
            )
        except OSError as error:
            if error.errno == errno.ENOENT:  # xfs: nothing was ever charged to it
                return Usage(0, 0)
            if error.errno in _NOT_HERE:
                return None
            raise
    return Usage(found.curspace, found.curinodes)


def project_of(directory: Path) -> int:
    """The project that what is made in `directory` will belong to; 0 is none."""
    with syscalls.opened(directory, os.O_RDONLY | os.O_DIRECTORY) as fd:
        try:
            flags, _, _, project, _, _ = _attributes(fd)
        except OSError as error:
            if error.errno in _NOT_HERE:
                return 0
            raise
    return project if flags & _XFLAG_PROJINHERIT else 0


def give(directory: Path, project: int) -> None:
    """Makes an empty directory, and all that will be made below it, belong to `project`."""
    with syscalls.opened(directory, os.O_RDONLY | os.O_DIRECTORY) as fd:
        flags, extsize, extents, _, cow_extsize, padding = _attributes(fd)
        new = _FSXATTR.pack(flags | _XFLAG_PROJINHERIT, extsize, extents, project, cow_extsize, padding)
        try:
            fcntl.ioctl(fd, _FS_IOC_FSSETXATTR, new)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(directory)) from None


def _attributes(fd: int) -> tuple[int, int, int, int, int, bytes]:
    found: tuple[int, int, int, int, int, bytes] = _FSXATTR.unpack(
        fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, bytes(_FSXATTR.size))
    )
    return found
