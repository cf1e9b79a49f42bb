"""The host's cgroup hierarchies: where a container's cgroup lies for either driver, made, listed and removed in all.

A cgroup is named by its path from the root of every hierarchy ("/kubepods/pod1/crito-ab12"), as in /proc/PID/cgroup.
"""

import contextlib
import errno
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from oci.errors import FailedPrecondition, InvalidArgument
from oci.linux import mount

PREFIX = "crito"  # of the last element of every cgroup that Crito has made for a pod or container
DEFAULT_SLICE = "system.slice"

_SLICE = re.compile(r"(?!-)(?!.*--)[A-Za-z0-9:_.\\@-]+(?<!-)\.slice|-\.slice")
_RETRY_S = 0.01


class Driver(StrEnum):
    SYSTEMD = "systemd"
    CGROUPFS = "cgroupfs"


class Version(StrEnum):
    V1 = "v1"
    HYBRID = "hybrid"
    V2 = "v2"


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """One mounted hierarchy; v1 ones name their controllers ("cpu", "name=systemd"), the unified one those it has."""

    mountpoint: Path
    controllers: frozenset[str]
    is_unified: bool


@dataclass(frozen=True, slots=True)
class Cgroups:
    """The hierarchies of this host."""

    hierarchies: tuple[Hierarchy, ...]

    @property
    def version(self) -> Version:
        unified = any(hierarchy.is_unified for hierarchy in self.hierarchies)
        legacy = any(not hierarchy.is_unified for hierarchy in self.hierarchies)
        if unified and legacy:
            return Version.HYBRID
        return Version.V2 if unified else Version.V1

    @property
    def controllers(self) -> frozenset[str]:
        return frozenset().union(*(hierarchy.controllers for hierarchy in self.hierarchies))

    def of_controller(self, controller: str) -> Hierarchy | None:
        """The hierarchy that has this controller."""
        return next((found for found in self.hierarchies if controller in found.controllers), None)

    @property
    def unified(self) -> Hierarchy | None:
        return next((found for found in self.hierarchies if found.is_unified), None)

    def directories(self, path: str) -> list[Path]:
        """The cgroup's directory in each hierarchy, existing or not."""
        return [_directory(hierarchy, path) for hierarchy in self.hierarchies]

    def directory(self, controller: str, path: str) -> Path | None:
        """The cgroup's directory in the hierarchy of this controller; None where the host has no such controller."""
        hierarchy = self.of_controller(controller)
        return _directory(hierarchy, path) if hierarchy else None

    def procs_files(self, path: str) -> list[Path]:
        """The files into which a pid is written so that the process joins the cgroup in every hierarchy."""
        return [directory / "cgroup.procs" for directory in self.directories(path)]

    def exists(self, path: str) -> bool:
        return any(directory.is_dir() for directory in self.directories(path))

    def make(self, path: str) -> None:
        """Make the cgroup and its parents, in every hierarchy; one that is there stays as it is.

        On an error the hierarchies already done keep it: `remove` first, then report.
        """
        for hierarchy in self.hierarchies:
            _make(hierarchy, path)

    def add(self, path: str, pid: int) -> None:
        """Move a process into the cgroup, in every hierarchy."""
        for procs in self.procs_files(path):
            procs.write_text(str(pid))

    def processes(self, path: str) -> set[int]:
        """The processes in the cgroup and below it, in any hierarchy."""
        found: set[int] = set()
        for directory in self.directories(path):
            for below in _tree(directory):
                # ENODEV: removed under the open file; EOPNOTSUPP: a threaded v2 cgroup, its pids show at the domain.
                with contextlib.suppress(OSError):
                    found.update(int(pid) for pid in (below / "cgroup.procs").read_text().split())
        found.discard(0)  # a process of another PID namespace
        return found

    def kill(self, path: str) -> None:
        """SIGKILL all in the cgroup and below it; what forks meanwhile is caught only where there is cgroup.kill."""
        unified = self.unified
        if unified is not None:
            with contextlib.suppress(OSError):  # no such cgroup here, or a kernel before 5.14
                (_directory(unified, path) / "cgroup.kill").write_text("1")
        for pid in self.processes(path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def remove(self, path: str, timeout_s: float = 1.0) -> None:
        """Remove the cgroup with all below it from every hierarchy; that it is gone already is success.

        Raises FailedPrecondition naming the processes that are still in it after `timeout_s`. Blocks: use a pool.
        """
        if path.strip("/") == "":
            raise InvalidArgument("cannot remove the root cgroup")
        deadline = time.monotonic() + timeout_s
        while busy := [left for directory in self.directories(path) if (left := _remove_tree(directory))]:
            if time.monotonic() >= deadline:
                pids = sorted(self.processes(path))
                holders = f"processes {pids} are in it" if pids else "the kernel says it is busy"
                raise FailedPrecondition(f"cannot remove cgroup {path} ({busy[0]}) within {timeout_s:g} s: {holders}")
            # EBUSY: the kernel may still be reaping the last task; rmdir works a moment later.
            time.sleep(_RETRY_S)


def detect(points: Sequence[mount.MountPoint] | None = None) -> Cgroups:
    """The hierarchies mounted below /sys/fs/cgroup (or elsewhere), each once."""
    found: dict[frozenset[str], Hierarchy] = {}
    for point in mount.mountinfo() if points is None else points:
        # A bind mount of a part of a hierarchy, as containers have it, does not show the host's root.
        if point.fstype == "cgroup2":
            hierarchy = Hierarchy(Path(point.target), _unified_controllers(Path(point.target)), True)
            found.setdefault(frozenset({"unified"}), hierarchy)
        elif point.fstype == "cgroup":
            controllers = frozenset(option for option in point.super_options if _is_controller(option))
            found.setdefault(controllers, Hierarchy(Path(point.target), controllers, False))
    return Cgroups(tuple(found.values()))


def check_parent(driver: Driver, parent: str) -> str:
    """The cgroup parent of a pod in the driver's own form: a slice's name, or a path with one leading slash.

    Raises InvalidArgument for the form of the other driver: kubelet and runtime then disagree on the driver. The
    kubelet gives a slice with the path that leads to it; its name alone says the same.
    """
    if ".." in parent.split("/") or any(ord(character) < 32 for character in parent):
        raise InvalidArgument(f"cgroup_parent {parent!r}: not a plain path")
    name = parent.rstrip("/").rpartition("/")[2]
    if driver is Driver.SYSTEMD:
        if not name:
            return DEFAULT_SLICE
        if not _SLICE.fullmatch(name):
            raise InvalidArgument(
                f"cgroup_parent {parent!r}: the cgroup driver is systemd, so a slice is needed (NAME.slice); "
                "is the kubelet's cgroupDriver another one?"
            )
        return name
    if name.endswith(".slice"):
        raise InvalidArgument(
            f"cgroup_parent {parent!r} is a systemd slice, but the cgroup driver is cgroupfs; "
            "is the kubelet's cgroupDriver another one?"
        )
    return "/" + "/".join(part for part in parent.split("/") if part not in ("", "."))


def expand_slice(name: str) -> str:
    """Where a slice lies: "a-b.slice" is "/a.slice/a-b.slice". Source: systemd.slice(5)."""
    if name == "-.slice":
        return "/"
    if not _SLICE.fullmatch(name):
        raise InvalidArgument(f"{name!r} is not the name of a slice")
    parts = name.removesuffix(".slice").split("-")
    return "/" + "/".join("-".join(parts[: count + 1]) + ".slice" for count in range(len(parts)))


def scope_name(id: str) -> str:
    """The systemd unit of one pod or container."""
    return f"{PREFIX}-{id}.scope"


def child_path(driver: Driver, parent: str, id: str) -> str:
    """Where the cgroup `id` below a checked `parent` lies in every hierarchy."""
    if driver is Driver.SYSTEMD:
        return f"{expand_slice(parent).rstrip('/')}/{scope_name(id)}"
    return f"{parent.rstrip('/')}/{PREFIX}-{id}"


def parent_path(driver: Driver, parent: str) -> str:
    """Where a checked `parent` itself lies."""
    return expand_slice(parent) if driver is Driver.SYSTEMD else parent


def runtime_path(driver: Driver, parent: str, id: str) -> str:
    """The runtime-spec's cgroupsPath for the same cgroup; runtimes take "slice:prefix:name" with --systemd-cgroup."""
    if driver is Driver.SYSTEMD:
        return f"{parent}:{PREFIX}:{id}"
    return child_path(driver, parent, id)


def from_runtime_path(driver: Driver, path: str) -> str:
    """Where the cgroup that a runtime-spec names as its cgroupsPath lies in every hierarchy."""
    if driver is not Driver.SYSTEMD:
        return path
    slice, _, rest = path.partition(":")
    prefix, _, name = rest.partition(":")
    unit = name if name.endswith(".slice") else f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
    return f"{expand_slice(slice or 'system.slice').rstrip('/')}/{unit}"


def of_process(pid: int) -> dict[str, str]:
    """The cgroup of a process by controller; "" is the unified hierarchy's. Empty when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/cgroup").read_text(errors="surrogateescape")
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return parse_process(text)


def parse_process(text: str) -> dict[str, str]:
    """Source: cgroups(7), /proc/PID/cgroup."""
    found = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        found.update({controller: path.removesuffix(" (deleted)") for controller in controllers.split(",")})
    return found


def _directory(hierarchy: Hierarchy, path: str) -> Path:
    return hierarchy.mountpoint / path.strip("/")


def _unified_controllers(mountpoint: Path) -> frozenset[str]:
    try:
        return frozenset((mountpoint / "cgroup.controllers").read_text().split())
    except OSError:
        return frozenset()


def _is_controller(option: str) -> bool:
    return option not in ("rw", "ro", "xattr", "clone_children", "noprefix", "cpuset_v2_mode") and (
        option.startswith("name=") or "=" not in option
    )


def _make(hierarchy: Hierarchy, path: str) -> None:
    directory = hierarchy.mountpoint
    for part in path.strip("/").split("/"):
        parent, directory = directory, directory / part
        directory.mkdir(exist_ok=True)
        if "cpuset" in hierarchy.controllers and not hierarchy.is_unified:
            _inherit_cpuset(parent, directory)


def _inherit_cpuset(parent: Path, directory: Path) -> None:
    """A v1 cpuset is born without CPUs and memory nodes, and takes no process until it has some."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        if not (directory / name).read_text().strip():
            (directory / name).write_text((parent / name).read_text())


def _tree(directory: Path) -> Iterator[Path]:
    """The cgroup's directory and all below it, parents first."""
    for found, _, _ in os.walk(directory):
        yield Path(found)


def _remove_tree(directory: Path) -> Path | None:
    """What could not be removed because it is busy; None when all is gone."""
    for below in reversed(list(_tree(directory))):
        try:
            below.rmdir()
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                raise
            return below
    return None
