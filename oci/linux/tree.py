"""Directory trees with owners and modes kept: copied, measured, removed, and directories made within a root."""
# ruff: noqa: PTH101, PTH102, PTH104, PTH115, PTH211
# Walks over millions of files use plain text paths: a Path for each would double their time.

import errno
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from oci.linux import syscalls

# What lies deeper, in levels (rmtree holds an fd for each) or bytes of path (PATH_MAX), is pulled up before removal.
_DEEP_LEVELS = 100
_DEEP_BYTES = 3500


@dataclass(frozen=True, slots=True)
class Usage:
    bytes: int  # as the disk counts them, blocks of 512
    inodes: int


def make_directory(root: Path, path: str, *, mode: int = 0o755, uid: int = 0, gid: int = 0) -> None:
    """Make `path` and what leads to it below `root`, whatever links lie there: none leads out.

    What exists stays as it is. Raises NotADirectoryError when a file is in the way.
    """
    with syscalls.opened(root, os.O_PATH | os.O_DIRECTORY) as root_fd:
        reached = PurePosixPath("/")
        for part in PurePosixPath("/", path).parts[1:]:
            parent, reached = reached, reached / part
            _make_one(root_fd, parent / part, mode, (uid, gid))


def copy(source: Path, target: Path) -> None:
    """Copy what is in `source` into the existing directory `target`, and its owner, mode, times and attributes too.

    Links are copied as links. Nobody may be changing either tree meanwhile.
    """
    hard_links: dict[tuple[int, int], str] = {}
    for directory, names, files in os.walk(source):
        within = f"{target}{directory[len(str(source)) :]}"
        for name in names + files:
            _copy_one(f"{directory}/{name}", f"{within}/{name}", hard_links)
    for directory, _, _ in os.walk(source, topdown=False):  # times last: each entry made changes its directory's
        _copy_attributes(directory, f"{target}{directory[len(str(source)) :]}", os.lstat(directory))


def usage(path: Path) -> Usage:
    """What the tree takes on its disk; entries that vanish meanwhile do not count, hard links count once."""
    size = inodes = 0
    linked: set[tuple[int, int]] = set()
    pending = [str(path)]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    try:
                        found = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if stat.S_ISDIR(found.st_mode):
                        pending.append(entry.path)
                    elif found.st_nlink > 1:
                        if (found.st_dev, found.st_ino) in linked:
                            continue
                        linked.add((found.st_dev, found.st_ino))
                    size += found.st_blocks * 512
                    inodes += 1
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:  # deeper than any path: nobody gets there but step by step
                raise
    return Usage(size, inodes)


def remove(path: Path) -> None:
    """Remove the tree, however deep; that it is not there is success. Nothing may be mounted in it."""
    while True:
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            if not os.path.lexists(path):  # else somebody else removes it too: again
                return
        except NotADirectoryError:
            path.unlink(missing_ok=True)
            return
        except (RecursionError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.ENAMETOOLONG, errno.EMFILE):
                raise
            _flatten(path)
        else:
            return


def _make_one(root_fd: int, path: PurePosixPath, mode: int, owner: tuple[int, int]) -> None:
    parent, name = path.parent, path.name
    try:
        with syscalls.opened_in_root(root_fd, path, os.O_PATH | os.O_DIRECTORY):
            return
    except FileNotFoundError:
        pass
    with syscalls.opened_in_root(root_fd, parent, os.O_PATH | os.O_DIRECTORY) as parent_fd:
        # A dangling link: what it points to is made, still within the root.
        try:
            pointed = os.readlink(name, dir_fd=parent_fd)
        except FileNotFoundError:
            os.mkdir(name, mode, dir_fd=parent_fd)
            os.chown(name, *owner, dir_fd=parent_fd, follow_symlinks=False)
            os.chmod(f"/proc/self/fd/{parent_fd}/{name}", mode)  # whatever the umask
            return
    outcome = parent / pointed
    current = PurePosixPath("/")
    for part in outcome.parts[1:]:
        if part == "..":
            current = current.parent
            continue
        _make_one(root_fd, current / part, mode, owner)
        current = current / part


def _copy_one(source: str, target: str, hard_links: dict[tuple[int, int], str]) -> None:
    found = os.lstat(source)
    if stat.S_ISDIR(found.st_mode):
        os.mkdir(target, 0o700)
        return
    identity = (found.st_dev, found.st_ino)
    if found.st_nlink > 1 and identity in hard_links:
        os.link(hard_links[identity], target, follow_symlinks=False)
        return
    hard_links[identity] = target
    if stat.S_ISLNK(found.st_mode):
        os.symlink(os.readlink(source), target)
    elif stat.S_ISREG(found.st_mode):
        shutil.copyfile(source, target, follow_symlinks=False)
    elif stat.S_ISSOCK(found.st_mode):
        return
    else:
        os.mknod(target, found.st_mode, found.st_rdev)
    _copy_attributes(source, target, found)


def _copy_attributes(source: str, target: str, found: os.stat_result) -> None:
    os.chown(target, found.st_uid, found.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(found.st_mode):
        os.chmod(target, stat.S_IMODE(found.st_mode))  # after chown, which clears set-uid
    for name in os.listxattr(source, follow_symlinks=False):
        if name.startswith(("trusted.overlay.", "security.selinux")):
            continue
        try:
            os.setxattr(target, name, os.getxattr(source, name, follow_symlinks=False), follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENODATA):
                raise
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns), follow_symlinks=False)


def _flatten(path: Path) -> None:
    """Move directories that lie too deep for one recursion up to the top, where the next one finds them."""
    moved = 0
    pending = [(str(path), 0)]
    while pending:
        directory, depth = pending.pop()
        with os.scandir(directory) as entries:
            below = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        for inner in below:
            if depth >= _DEEP_LEVELS or len(os.fsencode(inner)) > _DEEP_BYTES:
                while os.path.lexists(f"{path}/.crito-flat-{moved}"):
                    moved += 1
                raised = f"{path}/.crito-flat-{moved}"
                os.rename(inner, raised)
                pending.append((raised, 1))
            else:
                pending.append((inner, depth + 1))
