"""Which namespaces a pod has of its own, and where they are pinned. Pure."""

from dataclasses import dataclass
from pathlib import Path

from oci.container_spec import NamespaceMode
from oci.errors import FailedPrecondition, InvalidArgument
from sandbox.spec import SandboxSpec

# The sysctls that the kernel keeps per namespace. Source: kernel documentation, admin-guide/sysctl; runc's own list.
_IPC_SYSCTLS = {
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
}
HOSTNAME_LIMIT = 64  # __NEW_UTS_LEN
_IPC_PREFIX = "fs.mqueue."
_NET_PREFIX = "net."
_UTS_SYSCTLS = {"kernel.domainname", "kernel.hostname"}


@dataclass(frozen=True, slots=True)
class PodNamespaces:
    """Paths of the pod's pinned namespaces; "" where the node's own is used, or (pid) where none is shared."""

    net: str = ""
    ipc: str = ""
    uts: str = ""
    pid: str = ""
    user: str = ""


def wanted(spec: SandboxSpec, *, runtime_sandbox: bool = False) -> tuple[str, ...]:
    """The kinds of namespaces to make for the pod, by the names of /proc/PID/ns.

    An OCI runtime that makes the sandbox itself needs the network only: the others are of its own making.
    """
    security = spec.security
    if runtime_sandbox:
        return ("net",) if security.network is NamespaceMode.POD else ()
    kinds = []
    if security.user_namespace is not None:
        kinds.append("user")
    if security.network is NamespaceMode.POD:
        kinds += ["net", "uts"]  # a pod on the node's network has the node's hostname too
    if security.ipc is NamespaceMode.POD:
        kinds.append("ipc")
    if security.pid is NamespaceMode.POD:
        kinds.append("pid")
    return tuple(kinds)


def pinned(spec: SandboxSpec, pin_dir: Path, *, runtime_sandbox: bool = False) -> PodNamespaces:
    """Where the namespaces of `spec` are pinned once they were made."""
    return PodNamespaces(**{kind: str(pin_dir / kind) for kind in wanted(spec, runtime_sandbox=runtime_sandbox)})


def require_possible(spec: SandboxSpec, handler: str) -> None:
    """Raises FailedPrecondition for what a sandbox that its OCI runtime makes cannot be."""
    if spec.security.user_namespace is not None:
        raise FailedPrecondition(
            f"userns_options: runtime handler {handler!r} makes pod sandboxes itself, without user namespaces"
        )
    others = [name for name in normal_sysctls(spec) if not name.startswith(_NET_PREFIX)]
    if others:
        raise FailedPrecondition(
            f"linux.sysctls: runtime handler {handler!r} makes pod sandboxes itself, without {', '.join(others)}"
        )


def normal_sysctls(spec: SandboxSpec) -> dict[str, str]:
    """The pod's sysctls with dots between their parts.

    Raises InvalidArgument for one that would change the node: not kept per namespace, or of a namespace that the pod
    shares with the node. Both separators are allowed, as in sysctl(8): whichever comes first is the separator.
    """
    kinds = wanted(spec)
    result = {}
    for name, value in spec.sysctls.items():
        dotted = _dotted(name.strip())
        kind = kind_of_sysctl(dotted)
        if not kind:
            raise InvalidArgument(f"linux.sysctls: {name!r} is not kept per namespace: it would change the node")
        if kind not in kinds:
            raise InvalidArgument(
                f"linux.sysctls: {name!r} needs a {kind} namespace of the pod's own, it has the node's"
            )
        result[dotted] = value.strip()
    return result


def kind_of_sysctl(dotted: str) -> str:
    """The kind of namespace that keeps a sysctl; "" where none does."""
    if dotted.startswith(_NET_PREFIX):
        return "net"
    if dotted in _IPC_SYSCTLS or dotted.startswith(_IPC_PREFIX):
        return "ipc"
    return "uts" if dotted in _UTS_SYSCTLS else ""


def _dotted(name: str) -> str:
    slash, dot = name.find("/"), name.find(".")
    if slash >= 0 and (dot < 0 or slash < dot):
        return name.translate(str.maketrans("/.", "./"))
    return name
