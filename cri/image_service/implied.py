"""Directories that a layer's archive implies without describing: in an image they look as the layers below say.

Layers are unpacked without knowing what will lie below them, so such a directory is made with plain attributes, which
would hide the right ones in the overlay. An image that has any gets a small layer of its own on top, of these
directories only: overlayfs merges them, and takes the attributes of the uppermost.
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cri.image_service.unpack import is_opaque, sync_filesystem


@dataclass(frozen=True, slots=True)
class _Attributes:
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True)
class _Layer:
    tree: Path
    implied: frozenset[str]  # "" is the root


def make_implied_layer(layers: Sequence[tuple[Path, Sequence[str]]], directory: Path) -> int:
    """Makes `directory`/diff for an image of `layers` (tree and implied directories, lowest first), and syncs it.

    Returns the inodes made; 0, and nothing is there, where every directory looks right already.
    """
    stack = [_Layer(tree, frozenset(implied)) for tree, implied in reversed(layers)]  # highest first
    wrong = _wrong_directories(stack)
    if not wrong:
        return 0
    top = directory / "diff"
    top.mkdir(parents=True, mode=0o755)
    needed = sorted({way for path in wrong for way in _ways(path)})
    for path in needed:
        (top / path).mkdir()
    for path in ["", *needed][::-1]:
        _apply(top / path, wrong.get(path) or _shown(stack, path))
    sync_filesystem(top)
    return len(needed) + 1


def _wrong_directories(stack: Sequence[_Layer]) -> dict[str, _Attributes]:
    """The directories that would show other attributes than the image says, and what it says."""
    wrong = {}
    for path in {path for layer in stack for path in layer.implied}:
        said = _described(stack, path)
        if said is not None and not _alike(said, _shown(stack, path), path):
            wrong[path] = said
    return wrong


def _described(stack: Sequence[_Layer], path: str) -> _Attributes | None:
    """What the highest layer that describes the directory says; None where none does that the image still shows."""
    for layer in stack:
        state = _state(layer.tree, path)
        if state == "directory" and path not in layer.implied:
            return _attributes(layer.tree / path)
        if state == "other" or _hides_below(layer.tree, path):
            return None
    return None


def _shown(stack: Sequence[_Layer], path: str) -> _Attributes:
    """What the overlay would show: the highest layer's."""
    tree = next(layer.tree for layer in stack if _state(layer.tree, path) == "directory")
    return _attributes(tree / path)


def _alike(said: _Attributes, shown: _Attributes, path: str) -> bool:
    """The root's time alone is not worth a layer: most archives leave the root out."""
    return said == (shown if path else replace(shown, mtime_ns=said.mtime_ns))


def _state(tree: Path, path: str) -> str:
    """ "directory", "absent", or "other" where a file, link or whiteout is in the way of a directory from below."""
    for way in _ways(path):
        try:
            found = os.lstat(tree / way)
        except FileNotFoundError:
            return "absent"
        if not stat.S_ISDIR(found.st_mode):
            return "other"
    return "directory"


def _hides_below(tree: Path, path: str) -> bool:
    """Whether a directory above `path` hides what lower layers have in it; an opaque `path` still is the same one."""
    return any(is_opaque(tree / way) for way in _ways(path)[:-1])


def _ways(path: str) -> list[str]:
    """ "a", "a/b", "a/b/c" for "a/b/c"."""
    parts = path.split("/") if path else []
    return ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _attributes(path: Path) -> _Attributes:
    found = os.lstat(path)
    xattrs = tuple(
        (name, os.getxattr(path, name))
        for name in sorted(os.listxattr(path))
        if not name.startswith(("trusted.overlay.", "security.selinux"))
    )
    return _Attributes(stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_mtime_ns, xattrs)


def _apply(path: Path, attributes: _Attributes) -> None:
    os.chown(path, attributes.uid, attributes.gid)
    path.chmod(attributes.mode)
    for name, value in attributes.xattrs:
        os.setxattr(path, name, value)
    os.utime(path, ns=(attributes.mtime_ns, attributes.mtime_ns))
