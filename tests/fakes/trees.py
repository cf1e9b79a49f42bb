"""Layers that have everything a layer can have, and what a mounted image looks like, to compare with."""

import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.fakes.layers import directory, entry, file, hard_link, symlink, tar

CAPABILITY = b"\x01\0\0\x02\0\4\0\0\0\0\0\0\0\0\0\0\0\0\0\0".decode("latin-1")
LOWER = tar(
    [
        directory("./", 0o755, mtime=1000),
        directory("etc", 0o750, uid=1, gid=2, mtime=1001),
        file("etc/passwd", b"root", 0o640, uid=3, gid=4, mtime=1002),
        directory("usr", 0o755, mtime=1003),
        directory("usr/lib", 0o711, uid=9, mtime=1004),
        file("usr/lib/lib.so.1", b"elf" * 5000, 0o755),
        symlink("usr/lib/lib.so", "lib.so.1"),
        symlink("lib", "usr/lib", mtime=1005),
        hard_link("usr/lib/same", "usr/lib/lib.so.1"),
        file("usr/suid", b"s", 0o6755, uid=7, gid=7),
        file("usr/capable", b"c", 0o755, pax_headers={"SCHILY.xattr.security.capability": CAPABILITY}),
        directory("gone", mtime=1006),
        file("gone/a", b"a"),
        directory("opaque", mtime=1007),
        file("opaque/hidden", b"h"),
        directory("becomes-file", mtime=1008),
        file("becomes-file/x", b"x"),
        file("becomes-dir", b"f"),
        file("n" * 200, b"long", pax_headers={"mtime": "1234567890.123456789"}),
        entry("fifo", type=tarfile.FIFOTYPE, mode=0o622),
        entry("tty", type=tarfile.CHRTYPE, devmajor=5, devminor=0, mode=0o620, gid=5),
    ]
)
UPPER = tar(
    [
        file("usr/lib/new", b"new", mtime=2000),  # without entries for usr and usr/lib
        file(".wh.gone"),
        directory("opaque", 0o700, mtime=2001),
        file("opaque/.wh..wh..opq"),
        file("opaque/shown", b"s"),
        file("becomes-file", b"now a file"),
        directory("becomes-dir", 0o751, mtime=2002),
        file("becomes-dir/y", b"y"),
        file("usr/capable", b"changed", 0o700),
    ]
)
TOP = tar([file("usr/.wh.suid"), file("etc/hosts", b"hosts", mtime=3000), directory("var", mtime=3001)])
TREES = [LOWER, UPPER, TOP]


@contextmanager
def mounted(lower: tuple[Path, ...], at: Path) -> Iterator[Path]:
    """The image as a container sees it."""
    at.mkdir()
    options = f"lowerdir={':'.join(str(path) for path in reversed(lower))}"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


def described(root: Path, with_root: bool = True) -> dict[str, tuple[Any, ...]]:
    """Everything there is to say about each path: kind, mode, owner, size, time, device, links, xattrs, content."""
    links: dict[int, str] = {}
    found = {}
    paths = [root] if with_root else []
    for parent, directories, files in os.walk(root):
        paths += [Path(parent, name) for name in directories + files]
    for path in sorted(paths):
        status = path.lstat()
        name = str(path.relative_to(root))
        xattrs = tuple(
            (key, os.getxattr(path, key, follow_symlinks=False))
            for key in sorted(os.listxattr(path, follow_symlinks=False))
        )
        content: Any = None
        if stat.S_ISLNK(status.st_mode):
            content = path.readlink()
        elif stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        first = links.setdefault(status.st_ino, name) if stat.S_ISREG(status.st_mode) else name
        owner = (status.st_uid, status.st_gid)
        found[name] = (oct(status.st_mode), *owner, status.st_mtime_ns, status.st_rdev, first, xattrs, content)
    return found
