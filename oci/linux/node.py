"""What this host lets a container have: found out once, when the daemon starts."""

import os
import resource
from dataclasses import dataclass
from pathlib import Path

from oci.linux import caps, cgroup, lsm, seccomp

_NOFILE_DEFAULT = (1024, 524288)  # systemd's own default, which programs are used to


@dataclass(frozen=True, slots=True)
class Node:
    """Facts of the host and of this process that decide what a runtime-spec may ask for."""

    cgroups: cgroup.Cgroups
    capabilities: frozenset[str]  # those that can be handed on
    nofile: tuple[int, int]  # soft and hard default for containers
    lowest_oom_score_adj: int
    has_apparmor: bool
    has_selinux: bool
    has_swap_limit: bool
    hugepage_sizes: frozenset[str]  # "2MB" …, empty where hugetlb cannot be limited
    architecture: seccomp.Architecture
    apparmor_default: str = lsm.APPARMOR_DEFAULT


def detect(root: Path = Path("/")) -> Node:
    """This host, with /sys and /proc below `root`."""
    cgroups = cgroup.detect()
    own = caps.own()
    return Node(
        cgroups=cgroups,
        capabilities=own,
        nofile=_nofile(own, root),
        lowest_oom_score_adj=_lowest_oom_score_adj(own, root),
        has_apparmor=lsm.has_apparmor(root / "sys"),
        has_selinux=lsm.has_selinux(root / "sys"),
        has_swap_limit=_has_swap_limit(cgroups),
        hugepage_sizes=_hugepage_sizes(cgroups, root),
        architecture=seccomp.architecture(),
    )


def _nofile(own: frozenset[str], root: Path) -> tuple[int, int]:
    soft, hard = _NOFILE_DEFAULT
    if "SYS_RESOURCE" in own:
        limit = int((root / "proc/sys/fs/nr_open").read_text())
    else:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        limit = hard if limit == resource.RLIM_INFINITY else limit
    hard = min(hard, limit)
    return min(soft, hard), hard


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
