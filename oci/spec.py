"""The OCI runtime-spec of a container, built from what the CRI, the image, the pod and the host say: pure functions.

Sources: OCI runtime-spec, config.md and config-linux.md; api.proto, ContainerConfig. Where both are silent, CRI-O.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from oci.container_spec import (
    ContainerId,
    ContainerSpec,
    IdMapping,
    Mount,
    NamespaceMode,
    PodEnvironment,
    ProfileKind,
    Propagation,
    Resources,
)
from oci.errors import FailedPrecondition, InvalidArgument
from oci.host import HostObjects
from oci.image import ImageConfig
from oci.linux import caps, cgroup, lsm, seccomp
from oci.linux.devices import DeviceNode
from oci.linux.node import DEFAULT_RLIMITS, Node, Rlimit
from oci.linux.passwd import User

OCI_VERSION = "1.0.2"  # of what is always written; runtimes refuse newer ones that they do not know

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_TERM = "xterm"
_PIDS = 4 << 20  # the kernel's PID_MAX_LIMIT: as many as there can be
_MOUNT_OPTIONS = frozenset({"noexec", "nodev", "nosuid"})
_RRO_UNSUPPORTED = "RROUnsupported"  # cri-api's errors: the text starts with it

# Hidden and write-protected besides what the CRI lists, whenever it lists anything: kubelet's own lists lag behind.
_MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/scsi",
    "/proc/sched_debug",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
_READONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

# Capabilities over the node's kernel, which no container in a sandbox reaches; older versions of runsc refuse them.
_OF_THE_NODES_KERNEL = frozenset({"BPF", "CHECKPOINT_RESTORE", "PERFMON"})


@dataclass(frozen=True, slots=True)
class RuntimeFeatures:
    """What a runtime can do beyond what all can, as its `features` command says (runtime-spec, features.md)."""

    recursive_read_only: bool = False
    idmap_mounts: bool = False
    min_memory_bytes: int = 0  # with less its own start-up in the container's cgroup fails


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a container gets that asks for nothing else."""

    capabilities: tuple[str, ...] = caps.DEFAULT
    env: tuple[tuple[str, str], ...] = ()  # under the image's and the pod's
    rlimits: tuple[Rlimit, ...] = DEFAULT_RLIMITS  # as far as this process may hand them on
    seccomp: Mapping[str, Any] | None = None  # the profile RuntimeDefault; None is the built-in one


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one container finds what others have made for it."""

    container_id: ContainerId
    rootfs: Path
    user: User
    cgroups_path: str  # as cgroup.runtime_path gives it
    volumes: Mapping[str, Path] = field(default_factory=dict)  # image VOLUMEs: container path -> host directory
    image_mounts: Mapping[str, Path] = field(default_factory=dict)  # container path -> root or sub path, on the host
    target_pid_ns: str | None = None  # with pid=TARGET; "" is the one that the pod's sandbox itself is in
    annotations: Mapping[str, str] = field(default_factory=dict)  # those of the pod that its handler may see


def build(
    spec: ContainerSpec,
    image: ImageConfig,
    pod: PodEnvironment,
    node: Node,
    *,
    placement: Placement,
    host: HostObjects,
    features: RuntimeFeatures,
    defaults: Defaults = Defaults(),
) -> dict[str, Any]:
    """config.json of the container. Raises InvalidArgument, FailedPrecondition with the field and its value."""
    if pod.runtime_sandbox:
        node = replace(node, capabilities=node.capabilities - _OF_THE_NODES_KERNEL)
    process = _process(spec, image, pod, node, placement, host, defaults)
    mounts, propagation = _mounts(spec, pod, placement, host, features)
    linux: dict[str, Any] = {
        "namespaces": _namespaces(spec, pod, node, placement),
        "cgroupsPath": placement.cgroups_path,
        "resources": _resources(spec, node, features, host.devices),
    }
    if pod.user_ns and pod.user_namespace:
        linux["uidMappings"] = _mappings(pod.user_namespace.uids)
        linux["gidMappings"] = _mappings(pod.user_namespace.gids)
    if host.devices:
        linux["devices"] = [_device(device) for device in host.devices]
    if propagation:
        linux["rootfsPropagation"] = propagation
    if not spec.security.privileged:
        if spec.security.masked_paths:
            linux["maskedPaths"] = _union(spec.security.masked_paths, _MASKED)
        if spec.security.readonly_paths:
            linux["readonlyPaths"] = _union(spec.security.readonly_paths, _READONLY)
        filter = _seccomp(spec, node, host, process["capabilities"]["bounding"], defaults)
        if filter is not None:
            linux["seccomp"] = filter
    if node.has_selinux:
        label = _selinux(spec, pod)
        if label:
            linux["mountLabel"] = label
    return {
        "ociVersion": OCI_VERSION,
        "process": process,
        "root": {"path": str(placement.rootfs), "readonly": spec.security.readonly_rootfs},
        "mounts": mounts,
        "annotations": _annotations(spec, pod, placement),
        "linux": linux,
    }


def arguments(spec: ContainerSpec, image: ImageConfig) -> list[str]:
    """What is run. A command of the pod's replaces the image's entrypoint and cmd, args alone only its cmd."""
    if spec.command:
        return [*spec.command, *spec.args]
    argv = [*image.entrypoint, *(spec.args or image.cmd)]
    if not argv:
        raise InvalidArgument(f"container {spec.name!r}: neither the pod nor the image {spec.image!r} says what to run")
    return argv


def working_directory(spec: ContainerSpec, image: ImageConfig) -> str:
    """Absolute; the rootfs makes it where the image lacks it."""
    return str(PurePosixPath("/", spec.working_dir or image.working_dir or "/"))


def exec_process(
    config: Mapping[str, Any], argv: Sequence[str], *, tty: bool = False, env: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """The runtime-spec's process for one more process in a container, which gets what its first one has."""
    if not argv:
        raise InvalidArgument("exec: the command is empty")
    process = dict(config["process"])
    environment = _environment_of(process.get("env", ()))
    if tty:
        environment.setdefault("TERM", _TERM)
    environment.update(env)
    process.update(args=list(argv), terminal=tty, env=[f"{name}={value}" for name, value in environment.items()])
    process.pop("consoleSize", None)
    return process


def update_resources(wanted: Resources, node: Node, features: RuntimeFeatures | None = None) -> dict[str, Any]:
    """The runtime-spec's linux.resources for the runtime's `update`: what is not set stays as it is."""
    return _limits(wanted, node, features or RuntimeFeatures())


def oom_score_adj(resources: Resources, node: Node) -> int:
    """0 unless the CRI says otherwise: the daemon's own protection is not for containers."""
    wanted = resources.oom_score_adj or 0
    if not -1000 <= wanted <= 1000:
        raise InvalidArgument(f"oom_score_adj {wanted}: not between -1000 and 1000")
    return max(wanted, node.lowest_oom_score_adj)


# --- process


def _process(
    spec: ContainerSpec,
    image: ImageConfig,
    pod: PodEnvironment,
    node: Node,
    placement: Placement,
    host: HostObjects,
    defaults: Defaults,
) -> dict[str, Any]:
    user = placement.user
    process: dict[str, Any] = {
        "terminal": spec.tty,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.additional_gids)},
        "args": arguments(spec, image),
        "env": _environment(spec, image, pod, user, defaults),
        "cwd": working_directory(spec, image),
        "capabilities": _capabilities(spec, node, defaults),
        "rlimits": [_rlimit(limit) for limit in defaults.rlimits],
        "noNewPrivileges": spec.security.no_new_privs,
        "oomScoreAdj": oom_score_adj(spec.resources, node),
    }
    profile = _apparmor(spec, node, host)
    if profile:
        process["apparmorProfile"] = profile
    if node.has_selinux and not spec.security.privileged:
        process["selinuxLabel"] = lsm.process_label(spec.security.selinux or pod.selinux, pod.sandbox_id)
    return process


def _rlimit(limit: Rlimit) -> dict[str, Any]:
    """The runtime-spec's numbers are unsigned: RLIM_INFINITY is the greatest of them."""
    infinity = (1 << 64) - 1
    soft, hard = (infinity if value < 0 else value for value in (limit.soft, limit.hard))
    return {"type": limit.name, "soft": soft, "hard": hard}


def _environment(
    spec: ContainerSpec, image: ImageConfig, pod: PodEnvironment, user: User, defaults: Defaults
) -> list[str]:
    environment = {"PATH": _PATH, **dict(defaults.env)}
    if spec.tty:
        environment["TERM"] = _TERM
    if pod.hostname:
        environment["HOSTNAME"] = pod.hostname
    if user.home:
        environment["HOME"] = user.home
    environment.update(_environment_of(image.env))
    for name, value in spec.envs:
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise InvalidArgument(f"envs: {name!r} cannot be the name of a variable, or its value holds a NUL")
        environment[name] = value
    return [f"{name}={value}" for name, value in environment.items()]


def _environment_of(lines: Sequence[str]) -> dict[str, str]:
    """Images in the wild hold lines without "=": those are nobody's variable."""
    return {name: value for name, separator, value in (line.partition("=") for line in lines) if separator and name}


def _capabilities(spec: ContainerSpec, node: Node, defaults: Defaults) -> dict[str, list[str]]:
    if spec.security.privileged:
        return caps.all_of(node.capabilities)
    return caps.sets(spec.security.capabilities, node.capabilities, defaults.capabilities)


def _apparmor(spec: ContainerSpec, node: Node, host: HostObjects) -> str:
    if spec.security.privileged:
        return ""
    return lsm.apparmor_profile(spec.security.apparmor, node.has_apparmor, node.apparmor_default, host.apparmor)


def _selinux(spec: ContainerSpec, pod: PodEnvironment) -> str:
    return "" if spec.security.privileged else lsm.mount_label(spec.security.selinux or pod.selinux, pod.sandbox_id)


# --- mounts


def _mounts(
    spec: ContainerSpec, pod: PodEnvironment, placement: Placement, host: HostObjects, features: RuntimeFeatures
) -> tuple[list[dict[str, Any]], str]:
    """The mounts in their order, and rootfsPropagation ("" where the runtime's default does).

    A mount of the CRI's replaces the default one on the same path, and hides those below it. Parents precede children.
    """
    wanted = _cri_mounts(spec, placement, host, features)
    covered = {mounted["destination"] for mounted in wanted}
    image_volumes = [
        _bind(path, str(directory), ("rbind", "rprivate", "rw"))
        for path, directory in placement.volumes.items()
        if path not in covered
    ]
    defaults = [
        mounted
        for mounted in _default_mounts(spec, pod)
        if not covered & {mounted["destination"], *_parents(mounted["destination"])}
    ]
    # Stable: the CRI's order decides between equally deep ones.
    later = sorted([*image_volumes, *wanted], key=lambda mounted: mounted["destination"].count("/"))
    root = next((mounted for mounted in later if mounted["destination"] == "/"), None)
    if root is not None:
        raise InvalidArgument(f"mount of {root['source']!r} at '/': the root cannot be replaced")
    propagations = {mount.propagation for mount in spec.mounts}
    if Propagation.BIDIRECTIONAL in propagations:
        return [*defaults, *later], "rshared"
    return [*defaults, *later], "rslave" if Propagation.HOST_TO_CONTAINER in propagations else ""


def _default_mounts(spec: ContainerSpec, pod: PodEnvironment) -> list[dict[str, Any]]:
    access = "rw" if spec.security.privileged else "ro"
    mounts = [
        _special("/proc", "proc", ("nosuid", "noexec", "nodev")),
        _special("/dev", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
        _special("/dev/pts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5")),
        # Shows the queues of whichever IPC namespace the container is in, the node's too.
        _special("/dev/mqueue", "mqueue", ("nosuid", "noexec", "nodev")),
    ]
    if pod.user_ns and not pod.net_ns:
        # The kernel mounts sysfs only for whoever owns the network namespace.
        mounts.append(_bind("/sys", "/sys", ("rbind", "rprivate", "nosuid", "noexec", "nodev", access)))
    else:
        mounts.append(_special("/sys", "sysfs", ("nosuid", "noexec", "nodev", access)))
        mounts.append(_special("/sys/fs/cgroup", "cgroup", ("nosuid", "noexec", "nodev", "relatime", access)))
    if pod.shm_path:
        mounts.append(_bind("/dev/shm", pod.shm_path, ("rbind", "rprivate", "nosuid", "noexec", "nodev", "rw")))
    files = {
        "/etc/resolv.conf": pod.resolv_conf_path,
        "/etc/hostname": pod.hostname_path,
        "/etc/hosts": pod.hosts_path,
    }
    writable = "ro" if spec.security.readonly_rootfs else "rw"
    options = ("rbind", "rprivate", "nosuid", "noexec", "nodev", writable)
    return [*mounts, *(_bind(path, source, options) for path, source in files.items() if source)]


def _cri_mounts(
    spec: ContainerSpec, placement: Placement, host: HostObjects, features: RuntimeFeatures
) -> list[dict[str, Any]]:
    made: dict[str, dict[str, Any]] = {}
    for mount in spec.mounts:
        destination = str(PurePosixPath("/", mount.container_path))
        if not mount.container_path or ".." in PurePosixPath(destination).parts:
            raise InvalidArgument(f"mount of {mount.host_path!r}: container_path {mount.container_path!r}")
        made[destination] = _cri_mount(mount, destination, placement, host, features)
    return list(made.values())


def _cri_mount(
    mount: Mount, destination: str, placement: Placement, host: HostObjects, features: RuntimeFeatures
) -> dict[str, Any]:
    what = f"mount at {destination!r}"
    if mount.image and mount.host_path:
        raise InvalidArgument(f"{what}: host_path {mount.host_path!r} and an image exclude one another")
    source = placement.image_mounts.get(mount.container_path) if mount.image else host.sources.get(mount.host_path)
    if source is None:
        raise InvalidArgument(f"{what}: its source {mount.host_path or mount.image!r} was not found")
    unknown = sorted(set(mount.options) - _MOUNT_OPTIONS)
    if unknown:
        raise InvalidArgument(f"{what}: mount_options {', '.join(unknown)}: not of {', '.join(sorted(_MOUNT_OPTIONS))}")
    options = ["rbind", str(mount.propagation), *mount.options]
    options.append(_access(mount, what, features))
    bound = _bind(destination, str(source), options)
    if mount.uid_mappings or mount.gid_mappings:
        if not features.idmap_mounts:
            raise FailedPrecondition(f"{what}: uidMappings: the OCI runtime has no id-mapped mounts")
        bound["options"].append("idmap")
        bound.update(uidMappings=_mappings(mount.uid_mappings), gidMappings=_mappings(mount.gid_mappings))
    return bound


def _access(mount: Mount, what: str, features: RuntimeFeatures) -> str:
    if not mount.recursive_read_only:
        return "ro" if mount.readonly or mount.image else "rw"
    if not mount.readonly:
        raise InvalidArgument(f"{what}: recursive_read_only needs readonly")
    if mount.propagation is not Propagation.PRIVATE:
        raise InvalidArgument(f"{what}: recursive_read_only needs private propagation, not {mount.propagation}")
    if not features.recursive_read_only:
        raise FailedPrecondition(f"{_RRO_UNSUPPORTED}: {what}: the OCI runtime has no recursive read-only mounts")
    return "rro"


def _special(destination: str, kind: str, options: Sequence[str]) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": kind, "options": list(options)}


def _bind(destination: str, source: str, options: Sequence[str]) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": source, "options": list(options)}


def _parents(path: str) -> list[str]:
    return [str(parent) for parent in PurePosixPath(path).parents if str(parent) != "/"]


# --- linux


def _namespaces(spec: ContainerSpec, pod: PodEnvironment, node: Node, placement: Placement) -> list[dict[str, str]]:
    namespaces = [{"type": "mount"}]
    if pod.runtime_sandbox:
        return [*namespaces, *_namespaces_in_sandbox(spec.security.pid, pod, placement)]
    for kind, path in (("network", pod.net_ns), ("ipc", pod.ipc_ns), ("uts", pod.uts_ns), ("user", pod.user_ns)):
        if path:
            namespaces.append({"type": kind, "path": path})
    namespaces.extend(_pid_namespace(spec.security.pid, pod, placement))
    if node.cgroups.version is cgroup.Version.V2:
        namespaces.append({"type": "cgroup"})
    return namespaces


def _namespaces_in_sandbox(mode: NamespaceMode, pod: PodEnvironment, placement: Placement) -> list[dict[str, str]]:
    """Of a container whose namespaces its runtime makes, within the pod's sandbox.

    The paths of PID namespaces are mere names to it: containers with the same one share. Those without are in the one
    of the sandbox, whose pause reaps. Source: gVisor, runsc/boot/loader.go.
    """
    namespaces = [{"type": "ipc"}, {"type": "uts"}]
    if pod.net_ns:
        namespaces.append({"type": "network", "path": pod.net_ns})
    match mode:
        case NamespaceMode.CONTAINER:
            namespaces.append({"type": "pid", "path": f"/crito/pid/{placement.container_id}"})
        case NamespaceMode.TARGET:
            namespaces += _target_pid_namespace(placement)
    return namespaces


def _target_pid_namespace(placement: Placement) -> list[dict[str, str]]:
    if placement.target_pid_ns is None:
        raise InvalidArgument("namespace_options: pid is TARGET, but target_id names no running container")
    return [{"type": "pid", "path": placement.target_pid_ns}] if placement.target_pid_ns else []


def _pid_namespace(mode: NamespaceMode, pod: PodEnvironment, placement: Placement) -> list[dict[str, str]]:
    match mode:
        case NamespaceMode.NODE:
            return []
        case NamespaceMode.TARGET:
            return _target_pid_namespace(placement)
        case NamespaceMode.POD if pod.pid_ns:
            return [{"type": "pid", "path": pod.pid_ns}]
        case _:  # the container's own; also where the pod shares none, since the node's would be a way out
            return [{"type": "pid"}]


def _mappings(mappings: Sequence[IdMapping]) -> list[dict[str, int]]:
    return [
        {"containerID": mapping.container_id, "hostID": mapping.host_id, "size": mapping.length} for mapping in mappings
    ]


def _device(device: DeviceNode) -> dict[str, Any]:
    return {
        "path": device.path,
        "type": device.type,
        "major": device.major,
        "minor": device.minor,
        "fileMode": device.mode,
        "uid": device.uid,
        "gid": device.gid,
    }


def _resources(
    spec: ContainerSpec, node: Node, features: RuntimeFeatures, devices: Sequence[DeviceNode]
) -> dict[str, Any]:
    """The limits, and which devices may be used: all for the privileged, else the runtime's few and those asked for."""
    if spec.security.privileged:
        rules: list[dict[str, Any]] = [{"allow": True, "access": "rwm"}]
    else:
        rules = [{"allow": False, "access": "rwm"}]
        rules.extend(
            {"allow": True, "type": node_.type, "major": node_.major, "minor": node_.minor, "access": node_.permissions}
            for node_ in devices
        )
    limits = _limits(spec.resources, node, features)
    is_v2 = node.cgroups.version is cgroup.Version.V2  # on v1, crun writes the -1 as it is, and the kernel refuses it
    if is_v2 and "pids" in node.cgroups.controllers and "pids.max" not in spec.resources.unified:
        # Kubelet limits the pod; systemd would give each scope its DefaultTasksMax.
        limits["pids"] = {"limit": _PIDS}
    return {"devices": rules, **limits}


def _limits(wanted: Resources, node: Node, features: RuntimeFeatures) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    memory = _memory(wanted, node, features)
    if memory:
        limits["memory"] = memory
    cpu = {
        "shares": wanted.cpu_shares,
        "quota": wanted.cpu_quota,
        "period": wanted.cpu_period,
        "cpus": wanted.cpuset_cpus,
        "mems": wanted.cpuset_mems,
    }
    cpu = {key: value for key, value in cpu.items() if value}
    if cpu:
        limits["cpu"] = cpu
    hugepages = _hugepages(wanted, node)
    if hugepages:
        limits["hugepageLimits"] = hugepages
    if wanted.unified:
        if node.cgroups.version is not cgroup.Version.V2:
            raise FailedPrecondition(
                f"unified {', '.join(sorted(wanted.unified))}: the host has cgroup {node.cgroups.version}, not v2"
            )
        limits["unified"] = dict(wanted.unified)
    return limits


def _memory(wanted: Resources, node: Node, features: RuntimeFeatures) -> dict[str, int]:
    limit, swap = wanted.memory_limit_bytes, wanted.memory_swap_limit_bytes
    if 0 < limit < features.min_memory_bytes:
        raise InvalidArgument(
            f"memory_limit_in_bytes {limit}: the OCI runtime needs {features.min_memory_bytes} to start a container"
        )
    memory = {"limit": limit} if limit else {}
    if not node.has_swap_limit:
        return memory
    if swap > 0 and limit > swap:
        raise InvalidArgument(f"memory_swap_limit_in_bytes {swap}: less than memory_limit_in_bytes {limit}")
    if swap:
        memory["swap"] = swap
    elif limit > 0:
        memory["swap"] = limit  # no swap, as CRI-O: a limit that swapping eludes is none
    return memory


def _hugepages(wanted: Resources, node: Node) -> list[dict[str, Any]]:
    limits = []
    for size, limit in wanted.hugepage_limits:
        if size in node.hugepage_sizes:
            limits.append({"pageSize": size, "limit": limit})
        elif limit:  # the kubelet sends a limit of 0 for every size, whatever the host has
            raise FailedPrecondition(f"hugepage_limits {size}={limit}: this host cannot limit huge pages of that size")
    return limits


def _seccomp(
    spec: ContainerSpec, node: Node, host: HostObjects, capabilities: Sequence[str], defaults: Defaults
) -> dict[str, Any] | None:
    wanted = spec.security.seccomp
    if wanted is None or wanted.kind is ProfileKind.UNCONFINED:
        return None
    if wanted.kind is ProfileKind.RUNTIME_DEFAULT and defaults.seccomp is not None:
        return seccomp.from_profile(defaults.seccomp, capabilities, node.architecture, name="runtime.seccomp_profile")
    if wanted.kind is ProfileKind.RUNTIME_DEFAULT:
        return seccomp.default_profile(capabilities, node.architecture)
    if host.seccomp is None:
        raise InvalidArgument(f"seccomp profile {wanted.localhost!r} was not found")
    return seccomp.from_profile(host.seccomp, capabilities, node.architecture, name=wanted.localhost)


def pod_annotations(kind: str, sandbox_id: str, name: str, namespace: str, uid: str) -> dict[str, str]:
    """What runtimes that make sandboxes look for, under the names of containerd and of CRI-O.

    `kind` is "sandbox" or "container".
    """
    return {
        "io.kubernetes.cri.container-type": kind,
        "io.kubernetes.cri.sandbox-id": sandbox_id,
        "io.kubernetes.cri.sandbox-name": name,
        "io.kubernetes.cri.sandbox-namespace": namespace,
        "io.kubernetes.cri.sandbox-uid": uid,
        "io.kubernetes.cri-o.ContainerType": kind,
        "io.kubernetes.cri-o.SandboxID": sandbox_id,
    }


def _annotations(spec: ContainerSpec, pod: PodEnvironment, placement: Placement) -> dict[str, str]:
    """What tells the runtime which pod the container is of.

    The pod's own annotations are not for the runtime (crun's `run.oci.*` change what it does): only those that the
    handler lists come with the placement.
    """
    name, namespace, uid = (spec.labels.get(f"io.kubernetes.pod.{each}", "") for each in ("name", "namespace", "uid"))
    ours = {
        **pod_annotations("container", pod.sandbox_id, name, namespace, uid),
        "io.kubernetes.cri.container-name": spec.name,
        "io.kubernetes.cri.image-name": spec.image,
    }
    if ".slice:" in placement.cgroups_path and "pids.max" not in spec.resources.unified:
        # A scope of systemd's, which crun leaves at DefaultTasksMax whatever the pids limit is.
        ours["org.systemd.property.TasksMax"] = f"uint64 {_PIDS}"
    return {**placement.annotations, **{name: value for name, value in ours.items() if value}}


def _union(given: Sequence[str], own: Sequence[str]) -> list[str]:
    return list(dict.fromkeys((*given, *own)))
