"""Directories that a layer's archive implies without describing: in an image they look as the layers below say.

Layers are unpacked without knowing what will lie below them, so such a directory is made with plain attributes, which
would hide the right ones in the overlay. An image that has any gets a small layer of its own on top, of these
directories only: overlayfs merges them, and takes the attributes of the uppermost.
"""

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cri.image_service.unpack import sync_filesystem

_OPAQUE_XATTR = "trusted.overlay.opaque"


@dataclass(frozen=True, slots=True)
class _Attributes:
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: tuple[tuple[str, bytes], ...]


def make_implied_layer(layers: Sequence[tuple[Path, Sequence[str]]], directory: Path) -> int:
    """Makes `directory`/diff for an image of `layers` (tree and implied directories, lowest first), and syncs it.

    Returns the inodes made; 0, and nothing is there, where every directory looks right already.
    """
    wrong = _wrong_directories(layers)
    if not wrong:
        return 0
    top = directory / "diff"
    top.mkdir(parents=True, mode=0o755)
    needed = sorted({way for path in wrong for way in _ways(path)})
    for path in needed:
        (top / path).mkdir(exist_ok=True)
    for path in ["", *needed][::-1]:
        seen = _seen(layers, len(layers), path)
        if seen is not None:
            _apply(top / path, wrong.get(path, seen))
    sync_filesystem(top)
    return len(needed) + 1


def _wrong_directories(layers: Sequence[tuple[Path, Sequence[str]]]) -> dict[str, _Attributes]:
    wrong = {}
    for at, (tree, implied) in enumerate(layers):
        for path in implied:
            below = _described(layers, at, path)
            if below is None or not _shows(layers, at, path):
                continue
            if below != _attributes(tree / path):
                wrong[path] = below
    return wrong


def _described(layers: Sequence[tuple[Path, Sequence[str]]], end: int, path: str) -> _Attributes | None:
    """What the layers below number `end` say of the directory; None where they have none, or it is hidden there."""
    if _is_opaque_on_the_way(layers[end][0], path):
        return None
    for tree, implied in reversed(layers[:end]):
        state = _state(tree, path)
        if state == "other":
            return None
        if state == "directory" and path not in implied:
            return _attributes(tree / path)
        if _is_opaque_on_the_way(tree, path):
            return None
    return None


def _shows(layers: Sequence[tuple[Path, Sequence[str]]], at: int, path: str) -> bool:
    """Whether the directory of layer `at` is what the image shows: no layer above hides or describes it."""
    for tree, implied in layers[at + 1 :]:
        state = _state(tree, path)
        if state == "other" or (state == "directory" and path not in implied) or _is_opaque_on_the_way(tree, path):
            return False
    return True


def _seen(layers: Sequence[tuple[Path, Sequence[str]]], end: int, path: str) -> _Attributes | None:
    for tree, _ in reversed(layers[:end]):
        if _state(tree, path) == "directory":
            return _attributes(tree / path)
    return None


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


def _is_opaque_on_the_way(tree: Path, path: str) -> bool:
    for way in _ways(path):
        with suppress(OSError):
            if os.getxattr(tree / way, _OPAQUE_XATTR, follow_symlinks=False) == b"y":
                return True
    return False


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
