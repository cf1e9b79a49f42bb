"""What a container shall be, as decided by whoever asks for it: plain frozen values, no protobuf, no host facts.

`cri/runtime_service/from_cri.py` makes these from CRI messages, `oci/spec.py` turns them into an OCI runtime-spec.
A number of 0, an empty text and an empty tuple mean "not set", as in the CRI, unless a field says otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

ContainerId = NewType("ContainerId", str)  # 64 hex digits
SandboxId = NewType("SandboxId", str)  # 64 hex digits


class NamespaceMode(StrEnum):
    """Whose namespace a process lives in (CRI NamespaceMode)."""

    POD = "pod"
    CONTAINER = "container"
    NODE = "node"
    TARGET = "target"


class Propagation(StrEnum):
    """Mount propagation, by the names of the runtime-spec's mount options."""

    PRIVATE = "rprivate"
    HOST_TO_CONTAINER = "rslave"
    BIDIRECTIONAL = "rshared"


class ProfileKind(StrEnum):
    RUNTIME_DEFAULT = "runtime/default"
    UNCONFINED = "unconfined"
    LOCALHOST = "localhost"


@dataclass(frozen=True, slots=True)
class Profile:
    """A seccomp or AppArmor profile; `localhost` is a path (seccomp) or a loaded profile's name (AppArmor)."""

    kind: ProfileKind
    localhost: str = ""


@dataclass(frozen=True, slots=True)
class SELinuxLabel:
    user: str = ""
    role: str = ""
    type: str = ""
    level: str = ""


@dataclass(frozen=True, slots=True)
class IdMapping:
    """Like one line of /proc/PID/uid_map."""

    container_id: int
    host_id: int
    length: int


@dataclass(frozen=True, slots=True)
class UserNamespace:
    """A user namespace of the pod's own; no UserNamespace at all means the node's."""

    uids: tuple[IdMapping, ...]
    gids: tuple[IdMapping, ...]


@dataclass(frozen=True, slots=True)
class Mount:
    container_path: str
    host_path: str = ""  # empty for an image volume
    readonly: bool = False
    recursive_read_only: bool = False
    propagation: Propagation = Propagation.PRIVATE
    selinux_relabel: bool = False
    uid_mappings: tuple[IdMapping, ...] = ()
    gid_mappings: tuple[IdMapping, ...] = ()
    image: str = ""  # image volume: what to mount instead of a host path
    image_name: str = ""  # as the pod's author wrote it, where that is another one
    image_sub_path: str = ""
    options: tuple[str, ...] = ()  # of noexec, nodev, nosuid (CRI mount_options)


@dataclass(frozen=True, slots=True)
class Device:
    container_path: str
    host_path: str  # a device node, or a directory of them
    permissions: str  # a subset of "rwm"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Names without the CAP_ prefix, upper case; "ALL" is allowed in add and drop."""

    add: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    add_ambient: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SecurityContext:
    privileged: bool = False
    capabilities: Capabilities = Capabilities()
    network: NamespaceMode = NamespaceMode.POD
    pid: NamespaceMode = NamespaceMode.POD
    ipc: NamespaceMode = NamespaceMode.POD
    target_id: str = ""  # with pid=TARGET: the container whose PID namespace is joined
    user_namespace: UserNamespace | None = None
    run_as_user: int | None = None
    run_as_username: str = ""
    run_as_group: int | None = None
    supplemental_groups: tuple[int, ...] = ()
    strict_supplemental_groups: bool = False  # leave out the groups that the image's /etc/group names
    readonly_rootfs: bool = False
    no_new_privs: bool = False
    seccomp: Profile | None = None  # None: unconfined, as the CRI says
    apparmor: Profile | None = None  # None: the runtime's default where AppArmor is there
    selinux: SELinuxLabel | None = None
    masked_paths: tuple[str, ...] = ()
    readonly_paths: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Resources:
    """CRI LinuxContainerResources. oom_score_adj is the exception to "0 is not set": None is."""

    cpu_period: int = 0  # microseconds
    cpu_quota: int = 0  # microseconds; negative is unlimited
    cpu_shares: int = 0  # cgroup v1 scale, 2 to 262144
    memory_limit_bytes: int = 0
    memory_swap_limit_bytes: int = 0  # memory and swap together, as on cgroup v1; -1 is unlimited
    oom_score_adj: int | None = None
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    hugepage_limits: tuple[tuple[str, int], ...] = ()  # ("2MB", bytes); a limit of 0 is a limit
    unified: Mapping[str, str] = field(default_factory=dict)  # cgroup v2 file -> value


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """One container of a pod, as the CRI's ContainerConfig says it."""

    name: str
    attempt: int = 0
    image: str = ""  # as the pod's author wrote it
    image_annotations: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()  # over the image's entrypoint
    args: tuple[str, ...] = ()  # over the image's cmd
    working_dir: str = ""
    envs: tuple[tuple[str, str], ...] = ()
    mounts: tuple[Mount, ...] = ()
    devices: tuple[Device, ...] = ()
    cdi_devices: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    log_path: str = ""  # relative to the pod's log directory, as the CRI gives it
    stdin: bool = False
    stdin_once: bool = False
    tty: bool = False
    stop_signal: str = ""  # "SIGTERM"; over the image's
    resources: Resources = Resources()
    security: SecurityContext = SecurityContext()


@dataclass(frozen=True, slots=True)
class PodEnvironment:
    """What a pod gives each of its containers: namespaces to join, files to mount, a place in the cgroup tree.

    A namespace path is a pinned nsfs file; "" means the node's own namespace is used. The CRI's modes were already
    applied to net, ipc and uts; `pid` is the pod's shared one and only joined by containers whose mode is POD.
    """

    sandbox_id: SandboxId
    hostname: str
    net_ns: str
    ipc_ns: str
    uts_ns: str
    pid_ns: str
    user_ns: str
    cgroup_parent: str  # below which the container's cgroup is made; a slice's name with the systemd driver
    resolv_conf_path: str  # "" where nothing is mounted
    hostname_path: str
    hosts_path: str
    shm_path: str  # the pod's /dev/shm, or the node's with host IPC
    log_directory: str
    privileged: bool
    user_namespace: UserNamespace | None = None
    selinux: SELinuxLabel | None = None
    runtime_sandbox: bool = False  # its containers live in a sandbox that the OCI runtime has made
    annotations: Mapping[str, str] = field(default_factory=dict)
