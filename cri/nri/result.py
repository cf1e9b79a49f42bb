"""What several plugins' answers come to together: a field belongs to the plugin that set it, a second one is refused.

Every plugin sees what those before it have changed. A key that starts with "-" removes; whoever removes an entry may
set it anew.
"""

from collections.abc import Callable, Iterable, MutableMapping
from operator import attrgetter
from typing import Any

from cri.api.nri.v1alpha1 import api_pb2 as nri
from oci.errors import Error

_REMOVE = "-"
_F = nri.Field.Value

_MEMORY = {
    "limit": _F("MemLimit"),
    "reservation": _F("MemReservation"),
    "swap": _F("MemSwapLimit"),
    "kernel": _F("MemKernelLimit"),
    "kernel_tcp": _F("MemTCPLimit"),
    "swappiness": _F("MemSwappiness"),
    "disable_oom_killer": _F("MemDisableOomKiller"),
    "use_hierarchy": _F("MemUseHierarchy"),
}
_CPU = {
    "shares": _F("CPUShares"),
    "quota": _F("CPUQuota"),
    "period": _F("CPUPeriod"),
    "realtime_runtime": _F("CPURealtimeRuntime"),
    "realtime_period": _F("CPURealtimePeriod"),
    "cpus": _F("CPUSetCPUs"),
    "mems": _F("CPUSetMems"),
}
_CLASSES = {"blockio_class": _F("BlockioClass"), "rdt_class": _F("RdtClass"), "pids": _F("PidsLimit")}
_LINUX = {
    "oom_score_adj": _F("OomScoreAdj"),
    "io_priority": _F("IoPriority"),
    "seccomp_policy": _F("SeccompPolicy"),
    "scheduler": _F("LinuxSched"),
    "memory_policy": _F("MemoryPolicy"),
    "cgroups_path": _F("CgroupsPath"),
}
_RDT = {"clos_id": _F("RdtClosID"), "schemata": _F("RdtSchemata"), "enable_monitoring": _F("RdtEnableMonitoring")}


class Conflict(Error):
    """Two plugins want the same field."""


class Owners:
    """Which plugin has set which field of which container."""

    def __init__(self) -> None:
        self.message = nri.OwningPlugins()

    def claim(self, container_id: str, field: int, plugin: str) -> None:
        """Raises Conflict when another plugin has set or removed it."""
        simple = self.message.owners[container_id].simple
        self._check(simple.get(field), plugin, field, "")
        simple[field] = plugin

    def claim_entry(self, container_id: str, field: int, key: str, plugin: str) -> None:
        """The same for one entry of a list or map."""
        entries = self.message.owners[container_id].compound[field].owners
        self._check(entries.get(key), plugin, field, key)
        entries[key] = plugin

    def release(self, container_id: str, field: int, plugin: str) -> None:
        """`plugin` removes what was set, and alone may set it anew."""
        self.message.owners[container_id].simple[field] = _REMOVE + plugin

    def release_entry(self, container_id: str, field: int, key: str, plugin: str) -> None:
        self.message.owners[container_id].compound[field].owners[key] = _REMOVE + plugin

    def add(self, container_id: str, field: int, plugin: str) -> None:
        """`plugin` has added to a field that all may add to."""
        simple = self.message.owners[container_id].simple
        old = simple.get(field)
        simple[field] = f"{old},{plugin}" if old else plugin

    def _check(self, owner: str | None, plugin: str, field: int, key: str) -> None:
        if owner and owner != _REMOVE + plugin:
            what = f"{nri.Field.Name(nri.Field.ValueType(field))} {key}".rstrip()
            raise Conflict(f"NRI plugins {owner.removeprefix(_REMOVE)!r} and {plugin!r} both set {what}")


class Updates:
    """The updates of existing containers that plugins have asked for.

    For an UpdateContainer request, `requested` is the container in question with the limits that the request has.
    """

    def __init__(self, owners: Owners | None = None, created_id: str = "") -> None:
        self.owners = owners or Owners()
        self._created_id = created_id
        self._by_id: dict[str, nri.ContainerUpdate] = {}
        self._requested: nri.UpdateContainerRequest | None = None

    @classmethod
    def of_update(cls, request: nri.UpdateContainerRequest) -> "Updates":
        updates = cls()
        updates._requested = request
        return updates

    def apply(self, wanted: Iterable[nri.ContainerUpdate], plugin: str) -> None:
        """Raises Conflict unless the update may fail, and Error for one of the container that is being made."""
        for update in wanted:
            id = update.container_id
            if id == self._created_id:
                raise Error(f"NRI plugin {plugin!r} asks to update container {id} while it is being made")
            collected = nri.ContainerUpdate()
            collected.CopyFrom(self._limits_so_far(id, update))
            collected.ignore_failure = collected.ignore_failure and update.ignore_failure
            try:
                merge_limits(
                    self.owners, id, update.linux.resources, (collected.linux.resources,), plugin, is_update=True
                )
            except Conflict:
                if not update.ignore_failure:
                    raise
                continue
            self._by_id[id] = collected
            if self._requested is not None and self._requested.container.id == id:
                self._requested.linux_resources.CopyFrom(collected.linux.resources)

    def _limits_so_far(self, id: str, update: nri.ContainerUpdate) -> nri.ContainerUpdate:
        if id in self._by_id:
            return self._by_id[id]
        first = nri.ContainerUpdate(container_id=id, ignore_failure=update.ignore_failure)
        if self._requested is not None and self._requested.container.id == id:
            first.linux.resources.CopyFrom(self._requested.linux_resources)
        return first

    def others(self) -> list[nri.ContainerUpdate]:
        """Those of containers that the request is not about."""
        own = self._requested.container.id if self._requested is not None else ""
        return [update for id, update in self._by_id.items() if id != own]


class Creation:
    """The adjustments of one container that is being made; `request` is what the next plugin gets."""

    def __init__(self, request: nri.CreateContainerRequest) -> None:
        self.request = request
        self.adjustment = nri.ContainerAdjustment()
        self.owners = Owners()
        self.updates = Updates(self.owners, request.container.id)
        self.evictions: list[nri.ContainerEviction] = []
        self._id = request.container.id

    def apply(self, answer: nri.CreateContainerResponse, plugin: str) -> None:
        """Take what `plugin` wants. Raises Conflict, Error."""
        wanted, made, seen = answer.adjust, self.adjustment, self.request.container
        self._map(_F("Annotations"), wanted.annotations, made.annotations, seen.annotations, plugin)
        self._list(_F("Mounts"), wanted.mounts, made.mounts, seen.mounts, _destination, plugin)
        self._env(wanted.env, plugin)
        self._args(wanted.args, plugin)
        self._hooks(wanted, plugin)
        if wanted.HasField("linux"):
            self._linux(wanted.linux, plugin)
        for limit in wanted.rlimits:
            self.owners.claim_entry(self._id, _F("Rlimits"), limit.type, plugin)
            made.rlimits.append(limit)
            _without(seen.rlimits, _type, limit.type)
            seen.rlimits.append(limit)
        for device in wanted.CDI_devices:
            self.owners.claim_entry(self._id, _F("CdiDevices"), device.name, plugin)
            made.CDI_devices.append(device)
        self.updates.apply(answer.update, plugin)
        self.evictions += answer.evict

    def _linux(self, wanted: nri.LinuxContainerAdjustment, plugin: str) -> None:
        made, seen = self.adjustment.linux, self.request.container.linux
        self._list(_F("Devices"), wanted.devices, made.devices, seen.devices, _path, plugin)
        if wanted.HasField("resources"):
            merge_limits(self.owners, self._id, wanted.resources, (made.resources, seen.resources), plugin)
        for name, field in _LINUX.items():
            if _is_set(wanted, name):
                self.owners.claim(self._id, field, plugin)
                _copy(wanted, made, name)
                if name in seen.DESCRIPTOR.fields_by_name:
                    _copy(wanted, seen, name)
        for namespace in wanted.namespaces:
            kind = namespace.type.removeprefix(_REMOVE)
            self.owners.claim_entry(self._id, _F("Namespace"), kind, plugin)
            made.namespaces.append(namespace)
            _without(seen.namespaces, _type, kind)
            if kind == namespace.type:
                seen.namespaces.append(namespace)
        self._map(_F("Sysctl"), wanted.sysctl, made.sysctl, seen.sysctl, plugin)
        self._map(_F("LinuxNetDevices"), wanted.net_devices, made.net_devices, seen.net_devices, plugin)
        if wanted.HasField("rdt"):
            self._rdt(wanted.rdt, plugin)

    def _map(self, field: int, wanted: Any, made: Any, seen: Any, plugin: str) -> None:
        """A map whose values are texts or messages; removals first, so that "-key" and "key" together replace."""
        for marked in wanted:
            key = marked.removeprefix(_REMOVE)
            if key != marked:
                self.owners.release_entry(self._id, field, key, plugin)
                made.pop(key, None)
                seen.pop(key, None)
                _put(made, marked, wanted)
        for key in wanted:
            if not key.startswith(_REMOVE):
                self.owners.claim_entry(self._id, field, key, plugin)
                _put(made, key, wanted)
                _put(seen, key, wanted)

    def _list(self, field: int, wanted: Any, made: Any, seen: Any, key_of: Callable[[Any], str], plugin: str) -> None:
        """A list whose entries have a key; removals first, as in a map."""
        for entry in wanted:
            key = key_of(entry).removeprefix(_REMOVE)
            if key != key_of(entry):
                self.owners.release_entry(self._id, field, key, plugin)
                _without(made, key_of, key)
                _without(seen, key_of, key)
                made.append(entry)
        for entry in wanted:
            key = key_of(entry)
            if not key.startswith(_REMOVE):
                self.owners.claim_entry(self._id, field, key, plugin)
                _without(seen, key_of, key)
                made.append(entry)
                seen.append(entry)

    def _env(self, wanted: Iterable[nri.KeyValue], plugin: str) -> None:
        """The container's own variables are texts, "NAME=VALUE"."""
        seen = self.request.container.env
        variables = [nri.KeyValue(key=each.partition("=")[0], value=each.partition("=")[2]) for each in seen]
        self._list(_F("Env"), wanted, self.adjustment.env, variables, _key, plugin)
        seen[:] = [f"{each.key}={each.value}" for each in variables]

    def _args(self, wanted: Iterable[str], plugin: str) -> None:
        args = list(wanted)
        if not args:
            return
        if args[0] == "":
            self.owners.release(self._id, _F("Args"), plugin)
            args = args[1:]
        self.owners.claim(self._id, _F("Args"), plugin)
        self.adjustment.args[:] = args
        self.request.container.args[:] = args

    def _hooks(self, wanted: nri.ContainerAdjustment, plugin: str) -> None:
        if wanted.hooks.ByteSize():
            self.adjustment.hooks.MergeFrom(wanted.hooks)
            self.request.container.hooks.MergeFrom(wanted.hooks)
            self.owners.add(self._id, _F("OciHooks"), plugin)

    def _rdt(self, wanted: nri.LinuxRdt, plugin: str) -> None:
        made, seen = self.adjustment.linux.rdt, self.request.container.linux.rdt
        if wanted.remove:
            for field in _RDT.values():
                self.owners.release(self._id, field, plugin)
            made.Clear()
            seen.Clear()
            made.remove = True
        for name, field in _RDT.items():
            if _is_set(wanted, name):
                self.owners.claim(self._id, field, plugin)
                _copy(wanted, made, name)
                _copy(wanted, seen, name)
                made.remove = False


def merge_limits(
    owners: Owners,
    id: str,
    wanted: nri.LinuxResources,
    targets: Iterable[nri.LinuxResources],
    plugin: str,
    *,
    is_update: bool = False,
) -> None:
    """Copy the limits that are set into every target. Raises Conflict. Device rules are no matter of updates."""
    targets = tuple(targets)
    for part, names in (("memory", _MEMORY), ("cpu", _CPU)):
        for name, field in names.items():
            if _is_set(getattr(wanted, part), name):
                owners.claim(id, field, plugin)
                for target in targets:
                    _copy(getattr(wanted, part), getattr(target, part), name)
    for name, field in _CLASSES.items():
        if _is_set(wanted, name):
            owners.claim(id, field, plugin)
            for target in targets:
                _copy(wanted, target, name)
    for limit in wanted.hugepage_limits:
        owners.claim_entry(id, _F("HugepageLimits"), limit.page_size, plugin)
        for target in targets:
            _without(target.hugepage_limits, _page_size, limit.page_size)
            target.hugepage_limits.append(limit)
    for key, value in wanted.unified.items():
        owners.claim_entry(id, _F("CgroupsUnified"), key, plugin)
        for target in targets:
            target.unified[key] = value
    if not is_update:
        for target in targets:
            target.devices.extend(wanted.devices)


def _is_set(message: Any, name: str) -> bool:
    if message.DESCRIPTOR.fields_by_name[name].message_type is None:
        return bool(getattr(message, name))  # a text: "" is not set
    return bool(message.HasField(name))


def _copy(source: Any, target: Any, name: str) -> None:
    if source.DESCRIPTOR.fields_by_name[name].message_type is None:
        setattr(target, name, getattr(source, name))
    else:
        getattr(target, name).CopyFrom(getattr(source, name))


def _put(target: MutableMapping[str, Any], key: str, source: Any) -> None:
    value = source[key]
    if isinstance(value, str):
        target[key] = value
    else:
        target[key].CopyFrom(value)


def _without(entries: Any, key_of: Callable[[Any], str], key: str) -> None:
    """Take the entries with this key out of a list, in place."""
    for index in reversed(range(len(entries))):
        if key_of(entries[index]) == key:
            del entries[index]


_destination: Callable[[Any], str] = attrgetter("destination")
_path: Callable[[Any], str] = attrgetter("path")
_key: Callable[[Any], str] = attrgetter("key")
_type: Callable[[Any], str] = attrgetter("type")
_page_size: Callable[[Any], str] = attrgetter("page_size")
