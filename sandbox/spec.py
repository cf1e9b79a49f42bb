"""What a pod sandbox shall be: plain frozen values made from the CRI's PodSandboxConfig.

The same conventions as `oci/container_spec.py`: 0, "" and () mean "not set".
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from oci.container_spec import NamespaceMode, Profile, Resources, SELinuxLabel, UserNamespace


class Protocol(StrEnum):
    TCP = "tcp"
    UDP = "udp"
    SCTP = "sctp"


@dataclass(frozen=True, slots=True)
class PortMapping:
    protocol: Protocol
    container_port: int
    host_port: int  # 0: not mapped
    host_ip: str = ""


@dataclass(frozen=True, slots=True)
class DnsConfig:
    servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SandboxSecurity:
    network: NamespaceMode = NamespaceMode.POD
    pid: NamespaceMode = NamespaceMode.POD  # POD: shared by all containers; CONTAINER: one each
    ipc: NamespaceMode = NamespaceMode.POD
    user_namespace: UserNamespace | None = None
    privileged: bool = False
    run_as_user: int | None = None
    run_as_group: int | None = None
    readonly_rootfs: bool = False
    supplemental_groups: tuple[int, ...] = ()
    seccomp: Profile | None = None
    apparmor: Profile | None = None
    selinux: SELinuxLabel | None = None


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """One pod sandbox, as the CRI's PodSandboxConfig says it."""

    name: str
    uid: str
    namespace: str
    attempt: int = 0
    hostname: str = ""
    log_directory: str = ""
    dns: DnsConfig | None = None  # None: the node's resolv.conf
    port_mappings: tuple[PortMapping, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    cgroup_parent: str = ""
    sysctls: Mapping[str, str] = field(default_factory=dict)
    security: SandboxSecurity = SandboxSecurity()
    overhead: Resources = Resources()
    resources: Resources = Resources()
    runtime_handler: str = ""  # "" is the default handler
