"""Capabilities: their names, what this process may hand on, and what a container gets of them."""

from collections.abc import Collection
from pathlib import Path

from oci.container_spec import Capabilities
from oci.errors import FailedPrecondition, InvalidArgument

# In the order of their numbers. Source: include/uapi/linux/capability.h
NAMES = (
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
)

# CRI-O's set: Docker's without NET_RAW, MKNOD, SYS_CHROOT, AUDIT_WRITE and SETFCAP.
DEFAULT = (
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "KILL",
)


def own(field: str = "CapBnd") -> frozenset[str]:
    """The names in one set of this process: CapBnd, CapEff, CapPrm … of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return from_mask(int(line.split()[1], 16))
    return frozenset()


def from_mask(mask: int) -> frozenset[str]:
    """Bits without a name are left out: the runtime would not know them either."""
    return frozenset(name for number, name in enumerate(NAMES) if mask >> number & 1)


def granted(wanted: Capabilities, available: Collection[str], default: Collection[str] = DEFAULT) -> frozenset[str]:
    """What a container is left with: first "ALL", then the names; a drop wins over an add of the same name.

    "ALL" and the defaults mean as many as there are. Raises InvalidArgument for a name that does not exist, and
    FailedPrecondition for one that is asked for by name and that this host cannot give.
    """
    adds, drops = _known(wanted.add), _known(wanted.drop)
    base = frozenset(available) if "ALL" in adds else frozenset(default) & frozenset(available)
    if "ALL" in drops:
        base = frozenset()
    by_name = (adds | _known(wanted.add_ambient)) - drops - {"ALL"}
    missing = sorted(by_name - frozenset(available))
    if missing:
        raise FailedPrecondition(f"capabilities {', '.join(missing)}: the runtime has not got them itself on this host")
    return (base | by_name) - drops


def sets(wanted: Capabilities, available: Collection[str], default: Collection[str] = DEFAULT) -> dict[str, list[str]]:
    """The runtime-spec's process.capabilities.

    Nothing is inheritable but what is ambient: inheritable ones would let a non-root user gain them through files that
    carry them (CVE-2022-24769).
    """
    names = granted(wanted, available, default)
    ambient = (frozenset(available) if "ALL" in wanted.add_ambient else _known(wanted.add_ambient)) & names
    return {
        "bounding": _spelled(names),
        "effective": _spelled(names),
        "permitted": _spelled(names),
        "inheritable": _spelled(ambient),
        "ambient": _spelled(ambient),
    }


def all_of(available: Collection[str]) -> dict[str, list[str]]:
    """process.capabilities of a privileged container."""
    names = _spelled(available)
    return {"bounding": names, "effective": names, "permitted": names, "inheritable": [], "ambient": []}


def _known(names: Collection[str]) -> frozenset[str]:
    known = frozenset(name.upper().removeprefix("CAP_") for name in names)
    unknown = sorted(known - frozenset(NAMES) - {"ALL"})
    if unknown:
        raise InvalidArgument(f"capabilities: unknown name {', '.join(map(repr, unknown))}")
    return known


def _spelled(names: Collection[str]) -> list[str]:
    return [f"CAP_{name}" for name in NAMES if name in names]
