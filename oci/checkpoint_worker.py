"""Reads and writes checkpoint archives: a program of its own, because it moves as many bytes as a container has memory.

One request as JSON on stdin, one answer as JSON on stdout: {"done": …} or {"error": …, "kind": …}. Stdlib only.

The layout is that of containers/common, which CRI-O, Podman and checkpointctl share:

    config.dump  spec.dump  bind.mounts    JSON: the container, its runtime-spec, what is mounted from outside
    checkpoint/                            CRIU's images
    rootfs-diff.tar  deleted.files         what the container has changed in its root filesystem
    volumes/PATH.tar                       the image's VOLUMEs, by their quoted paths in the container
    container.log  dump.log  stats-dump    its log until then, and CRIU's own words
"""

import contextlib
import errno
import io
import json
import os
import shutil
import stat
import struct
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import quote

CONFIG, SPEC, BIND_MOUNTS = "config.dump", "spec.dump", "bind.mounts"
IMAGES, ROOTFS_DIFF, DELETED, LOG, VOLUMES = (
    "checkpoint",
    "rootfs-diff.tar",
    "deleted.files",
    "container.log",
    "volumes",
)
OWN_WORDS = ("dump.log", "stats-dump")
DOCUMENT_BYTES = 16 << 20  # a runtime-spec is some kilobytes; more than this is no checkpoint
XATTR = "SCHILY.xattr."
OPAQUE = "trusted.overlay.opaque"


class BadArchiveError(Exception):
    """What was given is no checkpoint, or one that would reach outside of where it is unpacked."""


# Saving


def capture(request: dict[str, Any]) -> None:
    """What the container has written, into the staging directory; the container is paused meanwhile."""
    staging = Path(request["staging"])
    upper, layers = Path(request["upper"]), [Path(layer) for layer in request["layers"]]
    with (staging / ROOTFS_DIFF).open("wb") as file:
        deleted = write_diff(file, upper, layers)
    (staging / DELETED).write_text(json.dumps(deleted))
    (staging / VOLUMES).mkdir()
    for path, directory in request["volumes"].items():
        with (staging / VOLUMES / volume_name(path)).open("wb") as file:
            write_diff(file, Path(directory), [])
    with contextlib.suppress(FileNotFoundError):
        if request["log"]:
            shutil.copyfile(request["log"], staging / LOG)


def write_diff(file: BinaryIO, upper: Path, layers: list[Path]) -> list[str]:
    """Write what an overlay's upper directory has as a tar; the paths that it takes away from `layers` come back."""
    deleted: list[str] = []
    seen: dict[tuple[int, int], str] = {}
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in _walk(upper):
            name, found = str(path.relative_to(upper)), path.lstat()
            if stat.S_ISCHR(found.st_mode) and found.st_rdev == 0:  # overlayfs's whiteout
                deleted.append(f"/{name}")
                continue
            if stat.S_ISSOCK(found.st_mode):
                continue
            if stat.S_ISDIR(found.st_mode) and _is_opaque(path):
                deleted += (f"/{name}/{each}" for each in sorted(_hidden(path, name, layers)))
            _add(tar, path, name, found, seen)
    return deleted


def _add(tar: tarfile.TarFile, path: Path, name: str, found: os.stat_result, seen: dict[tuple[int, int], str]) -> None:
    info = tar.gettarinfo(path, name)
    identity = (found.st_dev, found.st_ino)
    if info.isreg() or info.islnk():
        info.type, info.linkname, info.size = tarfile.REGTYPE, "", found.st_size
        if identity in seen:
            info.type, info.linkname, info.size = tarfile.LNKTYPE, seen[identity], 0
        seen[identity] = name
    headers: dict[str, str] = {}
    for attribute in os.listxattr(path, follow_symlinks=False):
        if not attribute.startswith(("trusted.", "security.selinux")):
            value = os.getxattr(path, attribute, follow_symlinks=False)
            headers[f"{XATTR}{attribute}"] = value.decode("utf-8", "surrogateescape")
    info.pax_headers = headers
    if info.isreg():
        with path.open("rb") as file:
            tar.addfile(info, file)
    else:
        tar.addfile(info)


def _walk(top: Path) -> Iterator[Path]:
    for directory, directories, files in os.walk(top):
        directories.sort()
        yield from (Path(directory, name) for name in sorted([*directories, *files]))


def _is_opaque(directory: Path) -> bool:
    try:
        return os.getxattr(directory, OPAQUE, follow_symlinks=False) == b"y"
    except OSError:
        return False


def _hidden(directory: Path, name: str, layers: Iterable[Path]) -> set[str]:
    """What the layers have in a directory that was removed and made anew."""
    hidden: set[str] = set()
    for layer in layers:
        with contextlib.suppress(OSError):
            hidden |= {each.name for each in (layer / name).iterdir()}
    return hidden - {each.name for each in directory.iterdir()}


def volume_name(path: str) -> str:
    return f"{quote(path, safe='')}.tar"


def archive(request: dict[str, Any]) -> None:
    """Write the archive: it is at its place when it is whole, and no trace of it before."""
    staging, location = Path(request["staging"]), Path(request["location"])
    with _appearing(location) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, document in request["documents"].items():
            data = json.dumps(document, ensure_ascii=False).encode(errors="surrogateescape")
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o600
            tar.addfile(info, io.BytesIO(data))
        for name in (DELETED, *OWN_WORDS, LOG, IMAGES, ROOTFS_DIFF, VOLUMES):
            if (staging / name).exists():
                tar.add(staging / name, name)


@contextlib.contextmanager
def _appearing(location: Path) -> Iterator[BinaryIO]:
    """A file without a name until all is in it and on the disk; then it takes the place of what was there."""
    parent = os.open(location.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    fd = os.open(location.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        yield file
        file.flush()
        os.fsync(fd)
        try:
            _name(fd, parent, location.name)
        except FileExistsError:
            location.unlink()
            _name(fd, parent, location.name)
    os.close(parent)


def _name(fd: int, parent: int, name: str) -> None:
    """With a directory's fd this is linkat(2), which follows the link to the nameless file; link(2) does not."""
    os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=parent, follow_symlinks=True)


# Restoring


def read(request: dict[str, Any]) -> dict[str, Any]:
    """The documents of a checkpoint, which is an archive or a directory with the same names."""
    found: dict[str, Any] = {}
    for name, file in _members(Path(request["source"])):
        if name in (CONFIG, SPEC, BIND_MOUNTS):
            data = file.read(DOCUMENT_BYTES + 1)
            if len(data) > DOCUMENT_BYTES:
                raise BadArchiveError(f"{name} is larger than {DOCUMENT_BYTES} bytes")
            found[name] = json.loads(data)
        if len(found) == 3:
            break
    for name in (CONFIG, SPEC):
        if not isinstance(found.get(name), dict):
            raise BadArchiveError(f"it has no {name}")
    return found


def unpack(request: dict[str, Any]) -> None:
    """Bring a checkpoint's parts to where a new container has them; its root filesystem is mounted."""
    staging, source = Path(request["staging"]), Path(request["source"])
    (staging / IMAGES).mkdir(parents=True, exist_ok=True)
    (staging / VOLUMES).mkdir(exist_ok=True)
    for name, file in _members(source):
        if _is_wanted(name):
            with (staging / name).open("xb") as target:
                shutil.copyfileobj(file, target, 1 << 20)
    if not (staging / IMAGES / "inventory.img").exists():
        raise BadArchiveError("it has none of CRIU's images")
    for uts in (staging / IMAGES).glob("utsns-*.img"):
        uts.write_bytes(with_hostname(uts.read_bytes(), request["hostname"]))
    for path, directory in request["volumes"].items():
        if (volume := staging / VOLUMES / volume_name(path)).exists():
            _in_root(directory, volume, [])
    deleted = json.loads((staging / DELETED).read_text() or "[]") if (staging / DELETED).exists() else []
    if (staging / ROOTFS_DIFF).exists():
        _in_root(request["rootfs"], staging / ROOTFS_DIFF, deleted or [])
    if request["log"] and (staging / LOG).exists():
        _put_log_before(Path(request["log"]), staging / LOG)
    for name in (ROOTFS_DIFF, DELETED, LOG):
        (staging / name).unlink(missing_ok=True)
    shutil.rmtree(staging / VOLUMES)


def with_hostname(image: bytes, hostname: str) -> bytes:
    """CRIU's image of a UTS namespace with another nodename: CRIU writes it into the pod's own.

    Two magic numbers, a length, and the fields by number: nodename = 1, domainname = 2. Source: criu, utsns.proto.
    """
    fields, rest = {}, image[12:]
    while len(rest) > 1 and rest[0] & 7 == 2 and rest[1] < 128:
        fields[rest[0] >> 3] = rest[2 : 2 + rest[1]]
        rest = rest[2 + rest[1] :]
    if rest or set(fields) != {1, 2}:
        raise BadArchiveError("its utsns image is not as CRIU writes them")
    fields[1] = hostname.encode()[:64]
    message = b"".join(bytes([number << 3 | 2, len(text)]) + text for number, text in sorted(fields.items()))
    return image[:8] + struct.pack("<I", len(message)) + message


def _is_wanted(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return name in (ROOTFS_DIFF, DELETED, LOG) or (
        len(parts) == 2 and parts[0] in (IMAGES, VOLUMES) and parts[1] not in (".", "..")
    )


def _members(source: Path) -> Iterator[tuple[str, BinaryIO]]:
    """The regular files of an archive or a directory, by their names without a leading "./"."""
    if source.is_dir():
        for path in _walk(source):
            if stat.S_ISREG(path.lstat().st_mode):
                with path.open("rb") as file:
                    yield str(path.relative_to(source)), file
        return
    try:
        with tarfile.open(source) as tar:
            for info in tar:
                if info.isreg() and (member := tar.extractfile(info)) is not None:
                    yield str(PurePosixPath(info.name)).lstrip("/"), member  # type: ignore[misc]
    except tarfile.TarError as error:
        raise BadArchiveError(f"it is no tar archive: {error}") from error


def _put_log_before(log: Path, earlier: Path) -> None:
    """The new container's log begins with the old one's, unless somebody has written to it already."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError), log.open("xb") as target, earlier.open("rb") as source:
        os.fchmod(target.fileno(), 0o640)
        shutil.copyfileobj(source, target, 1 << 20)


def _in_root(root: str, tar_path: Path, deleted: list[str]) -> None:
    """Apply a tar while `root` is this process's "/": no link in the container leads out of it."""
    outside = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with tar_path.open("rb") as file:
            os.chroot(root)
            os.chdir("/")
            try:
                _apply(file, deleted)
            finally:
                os.fchdir(outside)
                os.chroot(".")
    except (tarfile.TarError, FileNotFoundError, NotADirectoryError, FileExistsError) as error:
        raise BadArchiveError(f"{tar_path.name} cannot be unpacked: {error}") from error
    finally:
        os.close(outside)


def _apply(file: BinaryIO, deleted: list[str]) -> None:
    for name in deleted:
        path = Path("/", name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    directories = []
    with tarfile.open(fileobj=file) as tar:
        tar.extraction_filter = staticmethod(lambda member, _path: member)
        for info in tar:
            target = Path("/", info.name)
            if os.path.lexists(target) and not (info.isdir() and target.is_dir() and not target.is_symlink()):
                shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink()
            tar.extract(info, "/", numeric_owner=True)
            for header, value in info.pax_headers.items():
                if header.startswith(XATTR):
                    _set_xattr(target, header.removeprefix(XATTR), value.encode("utf-8", "surrogateescape"))
            if info.isdir():
                directories.append((target, info.mtime))
    for target, mtime in reversed(directories):
        os.utime(target, (mtime, mtime))


def _set_xattr(target: Path, name: str, value: bytes) -> None:
    try:
        os.setxattr(target, name, value, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise


_VERBS = {"capture": capture, "archive": archive, "read": read, "unpack": unpack}


def main() -> None:
    request = json.load(sys.stdin)
    try:
        answer: dict[str, Any] = {"done": _VERBS[request["verb"]](request)}
    except (BadArchiveError, ValueError) as error:
        answer = {"error": str(error), "kind": "bad"}
    except FileNotFoundError as error:
        answer = {"error": f"{error.filename}: {error.strerror}", "kind": "missing"}
    except OSError as error:
        kind = "full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "failed"
        answer = {"error": f"{error.filename or ''}: {error.strerror}", "kind": kind}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
