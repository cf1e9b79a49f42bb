"""What this host lets a container have: found out once, when the daemon starts."""

import os
import resource
from dataclasses import dataclass
from pathlib import Path

from oci.linux import caps, cgroup, lsm, seccomp


@dataclass(frozen=True, slots=True)
class Rlimit:
    """One resource limit; `name` is the runtime-spec's ("RLIMIT_NOFILE"), RLIM_INFINITY is -1."""

    name: str
    soft: int
    hard: int


# systemd's own default, which programs are used to: without a limit some allocate for every fd there could be.
DEFAULT_RLIMITS = (Rlimit("RLIMIT_NOFILE", 1024, 524288),)


@dataclass(frozen=True, slots=True)
class Node:
    """Facts of the host and of this process that decide what a runtime-spec may ask for."""

    cgroups: cgroup.Cgroups
    capabilities: frozenset[str]  # those that can be handed on
    lowest_oom_score_adj: int
    has_apparmor: bool
    has_selinux: bool
    has_swap_limit: bool
    hugepage_sizes: frozenset[str]  # "2MB" …, empty where hugetlb cannot be limited
    architecture: seccomp.Architecture
    apparmor_default: str = lsm.APPARMOR_DEFAULT  # "" where it could not be loaded


def detect(root: Path = Path("/")) -> Node:
    """This host, with /sys and /proc below `root`."""
    cgroups = cgroup.detect()
    own = caps.own()
    return Node(
        cgroups=cgroups,
        capabilities=own,
        lowest_oom_score_adj=_lowest_oom_score_adj(own, root),
        has_apparmor=lsm.has_apparmor(root / "sys"),
        has_selinux=lsm.has_selinux(root / "sys"),
        has_swap_limit=_has_swap_limit(cgroups),
        hugepage_sizes=_hugepage_sizes(cgroups, root),
        architecture=seccomp.architecture(),
        apparmor_default=lsm.APPARMOR_DEFAULT if lsm.APPARMOR_DEFAULT in lsm.apparmor_profiles(root / "sys") else "",
    )


def permitted(wanted: Rlimit, root: Path = Path("/")) -> Rlimit:
    """The limit as far as this process may hand it on: below its own hard limit, or what the kernel takes at all.

    Raises ValueError for a name that this host does not know.
    """
    number = getattr(resource, wanted.name, None)
    if number is None:
        raise ValueError(f"{wanted.name} is not a resource limit of this host")
    ceiling = -1 if "SYS_RESOURCE" in caps.own() else resource.getrlimit(number)[1]
    if wanted.name == "RLIMIT_NOFILE":
        ceiling = _least(ceiling, int((root / "proc/sys/fs/nr_open").read_text()))
    hard = _least(wanted.hard, ceiling)
    return Rlimit(wanted.name, _least(wanted.soft, hard), hard)


def _least(one: int, other: int) -> int:
    """The smaller of two limits, where a negative one is none."""
    if one < 0 or other < 0:
        return max(one, other)
    return min(one, other)


def _lowest_oom_score_adj(own: frozenset[str], root: Path) -> int:
    """Without CAP_SYS_RESOURCE nobody gets below what the daemon has."""
    if "SYS_RESOURCE" in own:
        return -1000
    return int((root / "proc/self/oom_score_adj").read_text())


def _has_swap_limit(cgroups: cgroup.Cgroups) -> bool:
    memory = cgroups.of_controller("memory")
    if memory is None:
        return False
    if not memory.is_unified:
        return (memory.mountpoint / "memory.memsw.limit_in_bytes").exists()
    # The root has no memory.swap.max: any cgroup below it that has the controller tells.
    own = cgroup.of_process(os.getpid()).get("", "/")
    if (memory.mountpoint / own.strip("/") / "memory.swap.max").exists():
        return True
    return any(True for _ in memory.mountpoint.glob("*/memory.swap.max"))


def _hugepage_sizes(cgroups: cgroup.Cgroups, root: Path) -> frozenset[str]:
    hierarchy = cgroups.of_controller("hugetlb")
    if hierarchy is None or (hierarchy.is_unified and cgroups.version is cgroup.Version.HYBRID):
        return frozenset()  # on hybrid hosts the runtimes use the v1 hierarchies alone
    directory = root / "sys/kernel/mm/hugepages"
    return frozenset(_size(entry.name) for entry in directory.glob("hugepages-*kB"))


def _size(name: str) -> str:
    kilobytes = int(name.removeprefix("hugepages-").removesuffix("kB"))
    for unit in ("KB", "MB", "GB"):
        if kilobytes < 1024:
            return f"{kilobytes}{unit}"
        kilobytes //= 1024
    return f"{kilobytes}TB"
