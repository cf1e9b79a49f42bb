"""What NRI's messages say of our pods, containers and limits: pure translation."""

from collections.abc import Mapping
from typing import Any

from cri.api.nri.v1alpha1 import api_pb2 as nri
from oci.container import ContainerRecord
from oci.container_spec import PodEnvironment, Profile, ProfileKind, Resources
from oci.status import ContainerState
from sandbox.sandbox import SandboxRecord, SandboxState

_STATES = {
    ContainerState.CREATING: nri.CONTAINER_CREATED,
    ContainerState.CREATED: nri.CONTAINER_CREATED,
    ContainerState.RUNNING: nri.CONTAINER_RUNNING,
    ContainerState.EXITED: nri.CONTAINER_STOPPED,
    ContainerState.UNKNOWN: nri.CONTAINER_UNKNOWN,
}
_PROFILES = {
    ProfileKind.RUNTIME_DEFAULT: nri.SecurityProfile.RUNTIME_DEFAULT,
    ProfileKind.UNCONFINED: nri.SecurityProfile.UNCONFINED,
    ProfileKind.LOCALHOST: nri.SecurityProfile.LOCALHOST,
}
HOOKS = {  # runtime-spec's name -> NRI's
    "prestart": "prestart",
    "createRuntime": "create_runtime",
    "createContainer": "create_container",
    "startContainer": "start_container",
    "poststart": "poststart",
    "poststop": "poststop",
}


# Pods


def pod_sandbox(record: SandboxRecord, environment: PodEnvironment) -> nri.PodSandbox:
    """The pod as it is now."""
    spec = record.spec
    return nri.PodSandbox(
        id=record.id,
        name=text(spec.name),
        uid=text(spec.uid),
        namespace=text(spec.namespace),
        labels=texts(spec.labels),
        annotations=texts(spec.annotations),
        runtime_handler=record.runtime_handler,
        pid=record.pause_pid if record.state is not SandboxState.NOT_READY else 0,
        ips=record.ips,
        linux=nri.LinuxPodSandbox(
            pod_overhead=resources(record.overhead),
            pod_resources=resources(record.resources),
            cgroup_parent=record.cgroup_parent,
            cgroups_path=record.cgroup_parent,
            namespaces=_pod_namespaces(environment) if record.stopped_at is None else (),
        ),
    )


def _pod_namespaces(pod: PodEnvironment) -> list[nri.LinuxNamespace]:
    kinds = {
        "network": pod.net_ns,
        "ipc": pod.ipc_ns,
        "uts": pod.uts_ns,
        "pid": pod.pid_ns,
        "user": pod.user_ns,
    }
    return [nri.LinuxNamespace(type=kind, path=path) for kind, path in kinds.items() if path]


# Containers


def container(record: ContainerRecord, config: Mapping[str, Any], *, seccomp: bool = False) -> nri.Container:
    """The container as it is now, with what its runtime-spec `config` says ({} where there is none any more).

    The seccomp policy, which is long, is left out unless it is asked for.
    """
    status, spec = record.status, record.spec
    process = config.get("process", {})
    message = nri.Container(
        id=record.id,
        pod_sandbox_id=record.sandbox_id,
        name=text(spec.name),
        state=_STATES[record.state],
        labels=texts(spec.labels),
        annotations=texts(spec.annotations),
        args=[text(each) for each in process.get("args", ())],
        env=[text(each) for each in process.get("env", ())],
        mounts=[_mount(each) for each in config.get("mounts", ())],
        hooks=_hooks(config.get("hooks", {})),
        linux=_linux(record, config, seccomp),
        pid=status.pid if record.state in (ContainerState.CREATED, ContainerState.RUNNING) else 0,
        rlimits=[_rlimit(each) for each in process.get("rlimits", ())],
        created_at=status.created_at or 0,
        started_at=status.started_at or 0,
        finished_at=status.finished_at or 0,
        exit_code=status.exit_code,
        status_reason=text(status.reason),
        status_message=text(status.message),
        CDI_devices=[nri.CDIDevice(name=text(name)) for name in spec.cdi_devices],
        image=_image(record),
    )
    user = process.get("user")
    if user:
        message.user.CopyFrom(
            nri.User(uid=user["uid"], gid=user["gid"], additional_gids=user.get("additionalGids", ()))
        )
    return message


def _image(record: ContainerRecord) -> nri.Image:
    digest = record.image_ref.rpartition("@")[2] if "@" in record.image_ref else ""
    return nri.Image(name=text(record.spec.image), digest=digest, config_digest=record.image_id)


def _linux(record: ContainerRecord, config: Mapping[str, Any], seccomp: bool) -> nri.LinuxContainer:
    linux, process = config.get("linux", {}), config.get("process", {})
    message = nri.LinuxContainer(
        namespaces=[
            nri.LinuxNamespace(type=each["type"], path=each.get("path", "")) for each in linux.get("namespaces", ())
        ],
        devices=[_device(each) for each in linux.get("devices", ())],
        resources=spec_resources(linux.get("resources", {})),
        cgroups_path=linux.get("cgroupsPath", ""),
        sysctl=texts(linux.get("sysctl", {})),
        net_devices={
            name: nri.LinuxNetDevice(name=each.get("name", "")) for name, each in linux.get("netDevices", {}).items()
        },
    )
    if record.state is not ContainerState.CREATING:  # what it was created with may have been changed since
        message.resources.MergeFrom(resources(record.status.resources))
    if "oomScoreAdj" in process:
        message.oom_score_adj.value = process["oomScoreAdj"]
    if priority := process.get("ioPriority"):
        message.io_priority.CopyFrom(
            nri.LinuxIOPriority(
                **{"class": nri.IOPrioClass.Value(priority["class"])}, priority=priority.get("priority", 0)
            )
        )
    message.seccomp_profile.CopyFrom(_profile(record.spec.security.seccomp))
    if seccomp and "seccomp" in linux:
        message.seccomp_policy.CopyFrom(_seccomp(linux["seccomp"]))
    if rdt := linux.get("intelRdt"):
        message.rdt.clos_id.value = rdt.get("closID", "")
    return message


def _profile(profile: Profile | None) -> nri.SecurityProfile:
    if profile is None:
        return nri.SecurityProfile(profile_type=nri.SecurityProfile.UNCONFINED)
    return nri.SecurityProfile(profile_type=_PROFILES[profile.kind], localhost_ref=text(profile.localhost))


def _mount(mount: Mapping[str, Any]) -> nri.Mount:
    return nri.Mount(
        destination=text(mount["destination"]),
        type=mount.get("type", ""),
        source=text(mount.get("source", "")),
        options=mount.get("options", ()),
    )


def _hooks(hooks: Mapping[str, Any]) -> nri.Hooks:
    return nri.Hooks(**{HOOKS[kind]: [_hook(each) for each in given] for kind, given in hooks.items() if kind in HOOKS})


def _hook(hook: Mapping[str, Any]) -> nri.Hook:
    message = nri.Hook(path=hook["path"], args=hook.get("args", ()), env=hook.get("env", ()))
    if "timeout" in hook:
        message.timeout.value = hook["timeout"]
    return message


def _device(device: Mapping[str, Any]) -> nri.LinuxDevice:
    message = nri.LinuxDevice(
        path=text(device["path"]), type=device["type"], major=device.get("major", 0), minor=device.get("minor", 0)
    )
    for name, ours in (("file_mode", "fileMode"), ("uid", "uid"), ("gid", "gid")):
        if device.get(ours) is not None:
            getattr(message, name).value = device[ours]
    return message


def _rlimit(limit: Mapping[str, Any]) -> nri.POSIXRlimit:
    unlimited = (1 << 64) - 1
    return nri.POSIXRlimit(type=limit["type"], hard=limit["hard"] & unlimited, soft=limit["soft"] & unlimited)


def _seccomp(policy: Mapping[str, Any]) -> nri.LinuxSeccomp:
    message = nri.LinuxSeccomp(
        default_action=policy["defaultAction"],
        architectures=policy.get("architectures", ()),
        flags=policy.get("flags", ()),
        listener_path=policy.get("listenerPath", ""),
        listener_metadata=policy.get("listenerMetadata", ""),
        syscalls=[_syscall(each) for each in policy.get("syscalls", ())],
    )
    if policy.get("defaultErrnoRet") is not None:
        message.default_errno.value = policy["defaultErrnoRet"]
    return message


def _syscall(rule: Mapping[str, Any]) -> nri.LinuxSyscall:
    message = nri.LinuxSyscall(
        names=rule["names"],
        action=rule["action"],
        args=[
            nri.LinuxSeccompArg(
                index=each["index"], value=each["value"], value_two=each.get("valueTwo", 0), op=each["op"]
            )
            for each in rule.get("args") or ()
        ],
    )
    if rule.get("errnoRet") is not None:
        message.errno_ret.value = rule["errnoRet"]
    return message


# Limits


def resources(given: Resources) -> nri.LinuxResources:
    """What is set of the CRI's limits."""
    message = nri.LinuxResources(
        hugepage_limits=[nri.HugepageLimit(page_size=size, limit=limit) for size, limit in given.hugepage_limits],
        unified=texts(given.unified),
    )
    message.memory.SetInParent()
    message.cpu.SetInParent()
    numbers = (
        (message.memory.limit, given.memory_limit_bytes),
        (message.memory.swap, given.memory_swap_limit_bytes),
        (message.cpu.shares, given.cpu_shares),
        (message.cpu.quota, given.cpu_quota),
        (message.cpu.period, given.cpu_period),
    )
    for field, value in numbers:
        if value:
            field.value = value
    message.cpu.cpus, message.cpu.mems = given.cpuset_cpus, given.cpuset_mems
    return message


def spec_resources(given: Mapping[str, Any]) -> nri.LinuxResources:
    """The limits of a runtime-spec."""
    message = nri.LinuxResources(
        hugepage_limits=[
            nri.HugepageLimit(page_size=each["pageSize"], limit=each["limit"])
            for each in given.get("hugepageLimits", ())
        ],
        unified=texts(given.get("unified", {})),
        devices=[_device_rule(each) for each in given.get("devices", ())],
    )
    _set_present(message.memory, given.get("memory", {}), MEMORY)
    _set_present(message.cpu, given.get("cpu", {}), CPU)
    message.cpu.cpus = given.get("cpu", {}).get("cpus", "")
    message.cpu.mems = given.get("cpu", {}).get("mems", "")
    if "pids" in given:
        message.pids.limit = given["pids"]["limit"]
    return message


MEMORY = {  # NRI's name -> runtime-spec's
    "limit": "limit",
    "reservation": "reservation",
    "swap": "swap",
    "kernel": "kernel",
    "kernel_tcp": "kernelTCP",
    "swappiness": "swappiness",
    "disable_oom_killer": "disableOOMKiller",
    "use_hierarchy": "useHierarchy",
}
CPU = {
    "shares": "shares",
    "quota": "quota",
    "period": "period",
    "realtime_runtime": "realtimeRuntime",
    "realtime_period": "realtimePeriod",
}


def _set_present(message: Any, given: Mapping[str, Any], names: Mapping[str, str]) -> None:
    message.SetInParent()
    for name, ours in names.items():
        if given.get(ours) is not None:
            getattr(message, name).value = given[ours]


def _device_rule(rule: Mapping[str, Any]) -> nri.LinuxDeviceCgroup:
    message = nri.LinuxDeviceCgroup(allow=rule["allow"], type=rule.get("type", ""), access=rule.get("access", ""))
    for name in ("major", "minor"):
        if rule.get(name) is not None:
            getattr(message, name).value = rule[name]
    return message


# Texts


def text(given: str) -> str:
    """protobuf's texts are UTF-8; what came as other bytes (surrogates) is replaced."""
    return given.encode(errors="replace").decode()


def texts(given: Mapping[str, str]) -> dict[str, str]:
    return {text(name): text(value) for name, value in given.items()}
