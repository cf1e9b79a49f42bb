"""Applies what plugins want of a new container to its runtime-spec, and what they want of limits to ours: pure.

Sources: runtime-spec, config.md and config-linux.md; NRI's ContainerAdjustment, whose empty fields change nothing.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cri.api.nri.v1alpha1 import api_pb2 as nri
from cri.nri.to_nri import CPU, HOOKS, MEMORY
from oci.container_spec import Resources
from oci.errors import FailedPrecondition, InvalidArgument, Unimplemented

_REMOVE = "-"
_PROPAGATIONS = ("rslave", "rshared")  # the weaker first

Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Node:
    """What of the host and the OCI runtime decides whether an adjustment can be had."""

    inject_cdi: Callable[[Config, list[str]], None]
    has_swap_limit: bool
    has_unified_cgroups: bool
    hugepage_sizes: frozenset[str]
    lowest_oom_score_adj: int
    min_memory_bytes: int = 0


def adjusted(config: Mapping[str, Any], wanted: nri.ContainerAdjustment, node: Node) -> Config:
    """The runtime-spec with the adjustment, as a new one.

    Raises InvalidArgument, FailedPrecondition, Unimplemented for what the host cannot give.
    """
    result: Config = copy.deepcopy(dict(config))
    process, linux = result["process"], result["linux"]
    _annotations(result, wanted.annotations)
    process["env"] = _env(process["env"], wanted.env)
    if wanted.args:
        process["args"] = list(wanted.args)
    _hooks(result, wanted.hooks)
    if wanted.CDI_devices:
        node.inject_cdi(result, [device.name for device in wanted.CDI_devices])
    _devices(linux, wanted.linux.devices)
    if wanted.linux.cgroups_path:
        linux["cgroupsPath"] = wanted.linux.cgroups_path
    _process(process, wanted, node)
    if wanted.linux.HasField("seccomp_policy"):
        linux["seccomp"] = _seccomp(wanted.linux.seccomp_policy)
    _namespaces(linux, wanted.linux.namespaces)
    _texts(linux, "sysctl", wanted.linux.sysctl)
    _net_devices(linux, wanted.linux.net_devices)
    _memory_policy(linux, wanted.linux)
    _resources(linux.setdefault("resources", {}), wanted.linux.resources, node)
    _rdt(linux, wanted.linux)
    _mounts(result, wanted.mounts)
    return result


def limits(wanted: nri.LinuxResources) -> Resources:
    """The limits as ours, as far as a running container's can be changed."""
    memory, cpu = wanted.memory, wanted.cpu
    return Resources(
        cpu_period=cpu.period.value,
        cpu_quota=cpu.quota.value,
        cpu_shares=cpu.shares.value,
        memory_limit_bytes=memory.limit.value,
        memory_swap_limit_bytes=memory.swap.value,
        cpuset_cpus=cpu.cpus,
        cpuset_mems=cpu.mems,
        hugepage_limits=tuple((each.page_size, each.limit) for each in wanted.hugepage_limits),
        unified=dict(wanted.unified),
    )


# The process


def _annotations(config: Config, wanted: Mapping[str, str]) -> None:
    _texts(config, "annotations", wanted)


def _texts(holder: Config, name: str, wanted: Mapping[str, str]) -> None:
    if not wanted:
        return
    values = holder.setdefault(name, {})
    for key in wanted:
        values.pop(key.removeprefix(_REMOVE), None)
    values.update({key: value for key, value in wanted.items() if not key.startswith(_REMOVE)})


def _env(lines: Iterable[str], wanted: Iterable[nri.KeyValue]) -> list[str]:
    """Variables keep their place; new ones come last."""
    values = {name: value for name, _, value in (line.partition("=") for line in lines)}
    changes = {each.key: each.value for each in wanted}
    for key in changes:
        if key.startswith(_REMOVE) and key[1:] not in changes:
            values.pop(key[1:], None)
    values.update({key: value for key, value in changes.items() if not key.startswith(_REMOVE)})
    return [f"{name}={value}" for name, value in values.items()]


def _process(process: Config, wanted: nri.ContainerAdjustment, node: Node) -> None:
    linux = wanted.linux
    if linux.HasField("oom_score_adj"):
        process["oomScoreAdj"] = max(linux.oom_score_adj.value, node.lowest_oom_score_adj)
    if linux.HasField("io_priority"):
        _io_priority(process, linux.io_priority)
    if linux.HasField("scheduler"):
        _scheduler(process, linux.scheduler)
    for limit in wanted.rlimits:
        others = [each for each in process.get("rlimits", ()) if each["type"] != limit.type]
        process["rlimits"] = [*others, {"type": limit.type, "soft": limit.soft, "hard": limit.hard}]


def _io_priority(process: Config, wanted: nri.LinuxIOPriority) -> None:
    kind = getattr(wanted, "class")  # a keyword of Python's
    if kind == nri.IOPRIO_CLASS_NONE:
        process.pop("ioPriority", None)
    else:
        process["ioPriority"] = {"class": _name(nri.IOPrioClass, kind), "priority": wanted.priority}


def _scheduler(process: Config, wanted: nri.LinuxScheduler) -> None:
    if wanted.policy == nri.SCHED_NONE:
        process.pop("scheduler", None)
        return
    process["scheduler"] = {
        "policy": _name(nri.LinuxSchedulerPolicy, wanted.policy),
        **_set(nice=wanted.nice, priority=wanted.priority),
        **_set(flags=[_name(nri.LinuxSchedulerFlag, flag) for flag in wanted.flags]),
        **_set(runtime=wanted.runtime, deadline=wanted.deadline, period=wanted.period),
    }


def _hooks(config: Config, wanted: nri.Hooks) -> None:
    for kind, name in HOOKS.items():
        added = [_hook(each) for each in getattr(wanted, name)]
        if added:
            hooks = config.setdefault("hooks", {})
            hooks[kind] = [*hooks.get(kind, ()), *added]


def _hook(hook: nri.Hook) -> Config:
    timeout = {"timeout": hook.timeout.value} if hook.HasField("timeout") else {}
    return {"path": hook.path, **_set(args=list(hook.args), env=list(hook.env)), **timeout}


# Mounts and devices


def _mounts(config: Config, wanted: Iterable[nri.Mount]) -> None:
    wanted = list(wanted)
    if not wanted:
        return
    gone = {mount.destination.removeprefix(_REMOVE) for mount in wanted}
    added = {
        mount.destination: {
            "destination": mount.destination,
            **_set(type=mount.type, source=mount.source),
            "options": list(mount.options),
        }
        for mount in wanted
        if not mount.destination.startswith(_REMOVE)
    }
    kept = [mount for mount in config["mounts"] if mount["destination"] not in gone]
    # Parents first; what is equally deep keeps its order.
    config["mounts"] = sorted([*kept, *added.values()], key=lambda mount: _depth(mount["destination"]))
    asked = {option for mount in added.values() for option in mount["options"]}
    for propagation in _PROPAGATIONS:  # a mount propagates no further than the root does
        if propagation in asked and config["linux"].get("rootfsPropagation") not in ("rshared", propagation):
            config["linux"]["rootfsPropagation"] = propagation


def _depth(path: str) -> int:
    return path.rstrip("/").count("/")


def _devices(linux: Config, wanted: Iterable[nri.LinuxDevice]) -> None:
    for device in wanted:
        path = device.path.removeprefix(_REMOVE)
        devices = [each for each in linux.get("devices", ()) if each["path"] != path]
        if path == device.path:
            devices.append(_device(device))
            rule = {"allow": True, "type": device.type, "major": device.major, "minor": device.minor, "access": "rwm"}
            resources = linux.setdefault("resources", {})
            resources["devices"] = [*resources.get("devices", ()), rule]
        linux["devices"] = devices


def _device(device: nri.LinuxDevice) -> Config:
    made: Config = {"path": device.path, "type": device.type, "major": device.major, "minor": device.minor}
    if device.HasField("file_mode"):
        made["fileMode"] = device.file_mode.value
    if device.HasField("uid"):
        made["uid"] = device.uid.value
    if device.HasField("gid"):
        made["gid"] = device.gid.value
    return made


# Linux


def _namespaces(linux: Config, wanted: Iterable[nri.LinuxNamespace]) -> None:
    for namespace in wanted:
        kind = namespace.type.removeprefix(_REMOVE)
        kept = [each for each in linux["namespaces"] if each["type"] != kind]
        if kind == namespace.type:
            kept.append({"type": kind, **_set(path=namespace.path)})
        linux["namespaces"] = kept


def _net_devices(linux: Config, wanted: Mapping[str, nri.LinuxNetDevice]) -> None:
    if not wanted:
        return
    devices = linux.setdefault("netDevices", {})
    for name in wanted:
        devices.pop(name.removeprefix(_REMOVE), None)
    for name, device in wanted.items():
        if not name.startswith(_REMOVE):
            devices[name] = _set(name=device.name)


def _memory_policy(linux: Config, wanted: nri.LinuxContainerAdjustment) -> None:
    if wanted.HasField("memory_policy"):
        policy = wanted.memory_policy
        linux["memoryPolicy"] = {
            "mode": _name(nri.MpolMode, policy.mode),
            **_set(nodes=policy.nodes, flags=[_name(nri.MpolFlag, flag) for flag in policy.flags]),
        }


def _seccomp(policy: nri.LinuxSeccomp) -> Config:
    errno = {"defaultErrnoRet": policy.default_errno.value} if policy.HasField("default_errno") else {}
    return {
        "defaultAction": policy.default_action,
        **errno,
        **_set(architectures=list(policy.architectures), flags=list(policy.flags)),
        **_set(listenerPath=policy.listener_path, listenerMetadata=policy.listener_metadata),
        **_set(syscalls=[_syscall(each) for each in policy.syscalls]),
    }


def _syscall(rule: nri.LinuxSyscall) -> Config:
    errno = {"errnoRet": rule.errno_ret.value} if rule.HasField("errno_ret") else {}
    args = [{"index": each.index, "value": each.value, "valueTwo": each.value_two, "op": each.op} for each in rule.args]
    return {"names": list(rule.names), "action": rule.action, **errno, **_set(args=args)}


def _rdt(linux: Config, wanted: nri.LinuxContainerAdjustment) -> None:
    name = wanted.resources.rdt_class.value
    if name and name != "/PodQos":  # that is the pod's own class, which Crito does not have
        linux["intelRdt"] = {"closID": name}
    if not wanted.HasField("rdt"):
        return
    rdt = wanted.rdt
    if rdt.remove:
        linux.pop("intelRdt", None)
    made = linux.get("intelRdt", {})
    if rdt.HasField("clos_id"):
        made["closID"] = rdt.clos_id.value
    if rdt.HasField("schemata"):
        made["schemata"] = list(rdt.schemata.value)
    if rdt.HasField("enable_monitoring"):
        made["enableMonitoring"] = rdt.enable_monitoring.value
    if made:
        linux["intelRdt"] = made


# Limits


def _resources(made: Config, wanted: nri.LinuxResources, node: Node) -> None:
    _memory(made, wanted.memory, node)
    _present(made, "cpu", wanted.cpu, CPU)
    for name, cpus in (("cpus", wanted.cpu.cpus), ("mems", wanted.cpu.mems)):
        if cpus:
            made.setdefault("cpu", {})[name] = cpus
    _hugepages(made, wanted, node)
    if wanted.unified:
        if not node.has_unified_cgroups:
            names = ", ".join(sorted(wanted.unified))
            raise FailedPrecondition(f"NRI: unified {names}: the host's controllers are not on cgroup v2")
        made.setdefault("unified", {}).update(wanted.unified)
    if wanted.HasField("pids") and wanted.pids.limit > 0:
        made["pids"] = {"limit": wanted.pids.limit}
    if wanted.blockio_class.value:
        raise Unimplemented(f"NRI: blockio_class {wanted.blockio_class.value!r}: Crito knows no block I/O classes")
    if wanted.devices:
        made["devices"] = [*made.get("devices", ()), *(_device_rule(rule) for rule in wanted.devices)]


def _memory(made: Config, wanted: nri.LinuxMemory, node: Node) -> None:
    limit = wanted.limit.value
    if 0 < limit < node.min_memory_bytes:
        raise InvalidArgument(
            f"NRI: memory limit {limit}: the OCI runtime needs {node.min_memory_bytes} to start a container"
        )
    _present(made, "memory", wanted, MEMORY)
    if not node.has_swap_limit:
        made.get("memory", {}).pop("swap", None)
    elif limit > 0 and not wanted.HasField("swap"):
        made["memory"]["swap"] = limit  # as for limits of the CRI's: one that swapping eludes is none


def _present(made: Config, part: str, wanted: Any, names: Mapping[str, str]) -> None:
    for name, ours in names.items():
        if wanted.HasField(name):
            made.setdefault(part, {})[ours] = getattr(wanted, name).value


def _hugepages(made: Config, wanted: nri.LinuxResources, node: Node) -> None:
    for limit in wanted.hugepage_limits:
        if limit.page_size not in node.hugepage_sizes:
            if not limit.limit:  # as kubelet says it of sizes that the host does not have
                continue
            raise FailedPrecondition(f"NRI: huge pages of {limit.page_size}: this host cannot limit that size")
        others = [each for each in made.get("hugepageLimits", ()) if each["pageSize"] != limit.page_size]
        made["hugepageLimits"] = [*others, {"pageSize": limit.page_size, "limit": limit.limit}]


def _device_rule(rule: nri.LinuxDeviceCgroup) -> Config:
    made: Config = {"allow": rule.allow, **_set(type=rule.type, access=rule.access)}
    if rule.HasField("major"):
        made["major"] = rule.major.value
    if rule.HasField("minor"):
        made["minor"] = rule.minor.value
    return made


def _set(**values: Any) -> Config:
    """Those that are not empty: the runtime-spec leaves out what is not set."""
    return {name: value for name, value in values.items() if value}


def _name(enum: Any, number: int) -> str:
    try:
        return str(enum.Name(number))
    except ValueError:
        raise InvalidArgument(f"NRI: {enum.DESCRIPTOR.name} {number}: there is no such value") from None
