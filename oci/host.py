"""What a container wants of the host's files, looked up for its runtime-spec: mount sources, devices, profiles.

A volume of a dead server makes every look at it hang for ever, in the kernel. So what lies on a network file system is
looked up by a process of its own, which is killed at the deadline; the error names the volume.
"""

import asyncio
import contextlib
import errno
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from oci.container_spec import ContainerSpec, Mount, ProfileKind, Propagation
from oci.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument
from oci.linux import devices, lsm, mount
from oci.linux.devices import DeviceNode
from oci.linux.mount import MountPoint

_WORDS = str.split
_LOCAL = frozenset(
    _WORDS(
        """
    bcachefs bpf btrfs cgroup cgroup2 configfs debugfs devpts devtmpfs efivarfs erofs exfat ext2 ext3 ext4 f2fs
    fusectl hugetlbfs iso9660 mqueue nilfs2 ntfs3 nsfs overlay proc pstore ramfs reiserfs securityfs squashfs sysfs
    tmpfs tracefs udf vfat xfs zfs
    """
    )
)
_LINKS = 40  # as many as the kernel follows

# Runs alone, by `python -I -S -c`: prints the real path, or the errno and its text.
_RESOLVER = """
import os, sys
try:
    print("0", os.path.realpath(sys.argv[1], strict=True))
except OSError as error:
    print(error.errno, error.strerror)
"""


@dataclass(frozen=True, slots=True)
class HostObjects:
    """What was found for one container; the keys of `sources` are the CRI's host paths."""

    sources: Mapping[str, str] = field(default_factory=dict)  # host path -> real path
    devices: tuple[DeviceNode, ...] = ()
    seccomp: Mapping[str, Any] | None = None  # a localhost profile as its file says it
    apparmor: frozenset[str] | None = (
        None  # the names of the profiles that are loaded; None: it does not matter, or the
    )
    # host does not tell


async def look_up(spec: ContainerSpec, *, privileged_devices: bool = True, timeout_s: float = 10.0) -> HostObjects:
    """All host objects of one container. Errors name the field and the path.

    Raises InvalidArgument for what is missing or malformed, DeadlineExceeded for a volume that does not answer.
    """
    found = await asyncio.to_thread(_look_up_local, spec, privileged_devices)
    sources: dict[str, str] = {}
    for wanted in spec.mounts:
        if not wanted.image:
            sources[wanted.host_path] = await _source(wanted, found.reached[wanted.host_path], found.points, timeout_s)
    return HostObjects(sources, found.devices, found.seccomp, found.apparmor)


@dataclass(frozen=True, slots=True)
class _Reached:
    """How far a path could be followed without asking anybody: to the end when `rest` is empty."""

    path: str
    rest: str


@dataclass(frozen=True, slots=True)
class _Local:
    """What one thread has found without waiting for anybody."""

    points: tuple[MountPoint, ...]
    reached: Mapping[str, _Reached | OSError]  # by host path
    devices: tuple[DeviceNode, ...]
    seccomp: Mapping[str, Any] | None
    apparmor: frozenset[str] | None


def _look_up_local(spec: ContainerSpec, privileged_devices: bool) -> _Local:
    points = tuple(mount.mountinfo()) if spec.mounts else ()
    reached: dict[str, _Reached | OSError] = {}
    for wanted in spec.mounts:
        if wanted.host_path.startswith("/"):
            reached[wanted.host_path] = _attempt(wanted.host_path, points)
        elif not wanted.image:
            raise InvalidArgument(f"{_named(wanted)}: host_path is not absolute")
    return _Local(points, reached, *_files(spec, privileged_devices), _apparmor_profiles(spec))


def _attempt(path: str, points: Sequence[MountPoint]) -> _Reached | OSError:
    try:
        return _follow_local(path, points)
    except OSError as error:
        return error


async def _source(wanted: Mount, reached: _Reached | OSError, points: Sequence[MountPoint], timeout_s: float) -> str:
    what = _named(wanted)
    try:
        real = await _rest(reached, points, timeout_s)
    except DeadlineExceeded as error:
        raise DeadlineExceeded(f"{what}: {error}") from error
    except OSError as error:
        # api.proto, Mount.host_path: if it does not exist, runtimes should report an error.
        raise InvalidArgument(f"{what}: host_path: {error.strerror}") from error
    _check_propagation(what, wanted, real, points)
    return real


def _named(wanted: Mount) -> str:
    return f"mount of {wanted.host_path!r} at {wanted.container_path!r}"


async def real_path(path: str, points: Sequence[MountPoint], timeout_s: float) -> str:
    """`path` without symbolic links. Raises OSError when it does not exist, DeadlineExceeded when its server hangs."""
    return await _rest(await asyncio.to_thread(_attempt, path, points), points, timeout_s)


async def _rest(reached: _Reached | OSError, points: Sequence[MountPoint], timeout_s: float) -> str:
    if isinstance(reached, OSError):
        raise reached
    if not reached.rest:
        return reached.path
    return await _follow_remote(f"{reached.path.rstrip('/')}/{reached.rest}", points, timeout_s)


def _follow_local(path: str, points: Sequence[MountPoint]) -> _Reached:
    """Follow the path as far as it lies on local file systems, link by link."""
    asking = [point for point in points if point.fstype not in _LOCAL]
    reached, parts, links = "/", list(reversed(PurePosixPath(path).parts[1:])), 0
    while parts:
        part = parts.pop()
        if part == "..":
            reached = str(PurePosixPath(reached).parent)
            continue
        inner = f"{reached.rstrip('/')}/{part}"
        if asking and mount.mount_of(Path(inner), asking) and is_remote(inner, points):
            return _Reached(reached, "/".join([part, *reversed(parts)]))
        try:
            pointed = os.readlink(inner)  # noqa: PTH115
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: there, and no link
                raise
            reached = inner
            continue
        links += 1
        if links > _LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        if pointed.startswith("/"):
            reached = "/"
        parts.extend(reversed([part for part in pointed.split("/") if part not in ("", ".")]))
    return _Reached(reached, "")


def is_remote(path: str, points: Sequence[MountPoint]) -> bool:
    """Whether looking at `path` may ask a server or another process, told from the mount table alone."""
    point = mount.mount_of(Path(path), points)
    return point is not None and point.fstype not in _LOCAL


async def _follow_remote(path: str, points: Sequence[MountPoint], timeout_s: float) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        "-S",
        "-c",
        _RESOLVER,
        path,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:surrogateescape"},
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), timeout_s)
    except TimeoutError:
        point = mount.mount_of(Path(path), points)
        volume = f"{point.source} ({point.fstype}) mounted at {point.target}" if point else path
        raise DeadlineExceeded(f"volume {volume} does not answer within {timeout_s:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()  # one that is stuck in the kernel dies when the server comes back; nobody waits for it
    number, _, text = output.decode(errors="surrogateescape").rstrip("\n").partition(" ")
    if number != "0":
        raise OSError(int(number or errno.EIO), text or "the look-up ended without an answer", path)
    return text


def _check_propagation(what: str, wanted: Mount, real: str, points: Sequence[MountPoint]) -> None:
    if wanted.propagation is Propagation.PRIVATE:
        return
    point = mount.mount_of(Path(real), points)
    if point is None:
        return
    if wanted.propagation is Propagation.BIDIRECTIONAL and not point.is_shared:
        raise FailedPrecondition(f"{what}: Bidirectional propagation: the mount at {point.target} is not shared")
    if wanted.propagation is Propagation.HOST_TO_CONTAINER and not (point.is_shared or point.is_slave):
        raise FailedPrecondition(f"{what}: HostToContainer propagation: {point.target} is neither shared nor a slave")


def _files(spec: ContainerSpec, privileged_devices: bool) -> tuple[tuple[DeviceNode, ...], Mapping[str, Any] | None]:
    found: dict[str, DeviceNode] = {}
    if spec.security.privileged and privileged_devices:
        found = {node.path: node for node in devices.all_nodes()}
    for device in spec.devices:
        found.update({node.path: node for node in devices.nodes(device)})
    seccomp = spec.security.seccomp
    if seccomp is None or seccomp.kind is not ProfileKind.LOCALHOST or spec.security.privileged:
        return tuple(found.values()), None
    return tuple(found.values()), _seccomp_file(seccomp.localhost)


def _apparmor_profiles(spec: ContainerSpec) -> frozenset[str] | None:
    wanted = spec.security.apparmor
    is_asked_for = wanted is not None and wanted.kind is ProfileKind.LOCALHOST
    return lsm.apparmor_profiles() or None if is_asked_for else None


def _seccomp_file(path: str) -> Mapping[str, Any]:
    if not path.startswith("/"):
        raise InvalidArgument(f"seccomp profile {path!r}: localhost_ref is not an absolute path")
    try:
        profile = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InvalidArgument(f"seccomp profile {path!r}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidArgument(f"seccomp profile {path!r}: not JSON: {error}") from error
    if not isinstance(profile, dict):
        raise InvalidArgument(f"seccomp profile {path!r}: not a JSON object")
    return profile
