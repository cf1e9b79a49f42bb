"""Everything there is to say about a directory tree, to compare what several programs made of the same archive."""

import os
import stat
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Described:
    """One path of a tree. `content` is a file's bytes or a link's target.

    The mode is "" for what overlayfs lists but does not find: a whiteout in a directory that no other layer has.
    """

    mode: str  # with its kind, octal
    uid: int
    gid: int
    mtime_ns: int
    device: int
    same_as: str  # the first path of the same inode, its own where it is the first or a directory
    xattrs: tuple[tuple[str, bytes], ...]
    content: bytes | str | None

    @property
    def is_directory(self) -> bool:
        return bool(self.mode) and stat.S_ISDIR(int(self.mode, 8))

    def without_time(self) -> "Described":
        return replace(self, mtime_ns=0)


Tree = Mapping[str, Described]


def described(root: Path, with_root: bool = True) -> dict[str, Described]:
    """The tree at `root` by path; "." is the root itself."""
    links: dict[int, str] = {}
    found = {}
    paths = [root] if with_root else []
    for parent, directories, files in os.walk(root):
        paths += [Path(parent, name) for name in directories + files]
    for path in sorted(paths):
        name = str(path.relative_to(root))
        try:
            status = path.lstat()
        except FileNotFoundError:
            found[name] = Described("", 0, 0, 0, 0, name, (), None)
            continue
        content: bytes | str | None = None
        if stat.S_ISLNK(status.st_mode):
            content = str(path.readlink())
        elif stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        found[name] = Described(
            mode=oct(status.st_mode),
            uid=status.st_uid,
            gid=status.st_gid,
            mtime_ns=status.st_mtime_ns,
            device=status.st_rdev,
            same_as=name if stat.S_ISDIR(status.st_mode) else links.setdefault(status.st_ino, name),
            xattrs=tuple(
                (key, os.getxattr(path, key, follow_symlinks=False))
                for key in sorted(os.listxattr(path, follow_symlinks=False))
            ),
            content=content,
        )
    return found


@contextmanager
def mounted_overlay(lower: tuple[Path, ...], at: Path) -> Iterator[Path]:
    """The image of the layers `lower`, lowest first, as a container sees it."""
    at.mkdir()
    options = f"lowerdir={':'.join(str(path) for path in reversed(lower))}"
    if len(lower) == 1:
        options += f":{at.with_name(at.name + '-empty')}"
        at.with_name(at.name + "-empty").mkdir()
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)
