"""What a Container Device Interface description says, checked, and the edits of a runtime-spec that it asks for: pure.

Source: container-device-interface, SPEC.md (versions up to 1.1). Where it is silent, what its Go library does.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any

import msgspec

Config = dict[str, Any]

_Id = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]
_Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]

_HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
_VENDOR_OR_CLASS = re.compile(r"[A-Za-z](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?")
_DEVICE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.:-]*[A-Za-z0-9])?")


def is_kind(text: str) -> bool:
    """Whether this is a VENDOR/CLASS."""
    vendor, slash, class_ = text.partition("/")
    return bool(slash and _VENDOR_OR_CLASS.fullmatch(vendor) and _VENDOR_OR_CLASS.fullmatch(class_))


def is_qualified_name(text: str) -> bool:
    """Whether this is a VENDOR/CLASS=NAME."""
    kind, equals, device = text.partition("=")
    return bool(equals and is_kind(kind) and _DEVICE.fullmatch(device))


def _require_absolute(name: str, path: str) -> None:
    if not path.startswith("/") or "\0" in path or ".." in PurePosixPath(path).parts:
        raise ValueError(f"{name} {path!r}: expected an absolute path")


def _require_variables(lines: Iterable[str]) -> None:
    for line in lines:
        if line.find("=") <= 0 or "\0" in line:
            raise ValueError(f"env {line!r}: expected NAME=VALUE")


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """A description with a field that nobody knows is refused, as its format demands: it may matter."""


class DeviceNode(_Part, frozen=True):
    path: str
    host_path: str = ""
    type: str = ""
    major: _Number = 0
    minor: _Number = 0
    file_mode: _Number | None = None
    permissions: str = ""
    uid: _Id | None = None
    gid: _Id | None = None

    def __post_init__(self) -> None:
        _require_absolute("path", self.path)
        if self.host_path:
            _require_absolute("hostPath", self.host_path)
        if self.type not in ("", "b", "c", "u", "p"):
            raise ValueError(f"type {self.type!r}: expected b, c, u or p")
        if self.permissions != "none" and set(self.permissions) - set("rwm"):
            raise ValueError(f'permissions {self.permissions!r}: expected letters of rwm, or "none"')

    @property
    def is_complete(self) -> bool:
        """Nothing of it is left for the host's node to tell but the mode."""
        return bool(self.type) and (self.major != 0 or self.type == "p")


class NetDevice(_Part, frozen=True):
    host_interface_name: str
    name: str

    def __post_init__(self) -> None:
        if not self.host_interface_name or not self.name:
            raise ValueError("hostInterfaceName and name: expected the names of network interfaces")


class Mount(_Part, frozen=True):
    host_path: str
    container_path: str
    options: tuple[str, ...] = ()
    type: str = ""

    def __post_init__(self) -> None:
        if not self.host_path:
            raise ValueError("hostPath is empty")
        _require_absolute("containerPath", self.container_path)
        if not PurePosixPath(self.container_path).parts[1:]:
            raise ValueError("containerPath is the root, which cannot be replaced")


class Hook(_Part, frozen=True):
    hook_name: str
    path: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    timeout: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)] = 0  # seconds; 0 is none

    def __post_init__(self) -> None:
        if self.hook_name not in _HOOKS:
            raise ValueError(f"hookName {self.hook_name!r}: expected one of {', '.join(_HOOKS)}")
        _require_absolute("path", self.path)
        _require_variables(self.env)


class IntelRdt(_Part, frozen=True, omit_defaults=True):
    clos_id: str = msgspec.field(default="", name="closID")
    l3_cache_schema: str = ""
    mem_bw_schema: str = ""
    schemata: tuple[str, ...] = ()
    enable_monitoring: bool = False

    def __post_init__(self) -> None:
        name = self.clos_id
        if name != "/" and (name in (".", "..") or len(name) >= 4096 or re.search(r"[/\n]", name)):
            raise ValueError(f"closID {name[:100]!r}: expected the name of a directory")


class Edits(_Part, frozen=True):
    """containerEdits: of one device, of all devices of a description, or of several together."""

    env: tuple[str, ...] = ()
    device_nodes: tuple[DeviceNode, ...] = ()
    net_devices: tuple[NetDevice, ...] = ()
    hooks: tuple[Hook, ...] = ()
    mounts: tuple[Mount, ...] = ()
    intel_rdt: IntelRdt | None = None
    additional_gids: tuple[_Id, ...] = ()
    additional_gids_as_specified: tuple[_Id, ...] = msgspec.field(default=(), name="additionalGIDs")  # SPEC.md has both

    def __post_init__(self) -> None:
        _require_variables(self.env)
        for what, names in (
            ("hostInterfaceName", [each.host_interface_name for each in self.net_devices]),
            ("name", [each.name for each in self.net_devices]),
        ):
            if len(set(names)) < len(names):
                raise ValueError(f"netDevices: two have the same {what}")


class Device(_Part, frozen=True):
    name: str
    annotations: Mapping[str, str] = {}
    container_edits: Edits = Edits()

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.name):
            raise ValueError(f"name {self.name!r}: not the name of a device")


class Description(_Part, frozen=True):
    """One file of a vendor's."""

    cdi_version: str
    kind: str
    devices: tuple[Device, ...]
    annotations: Mapping[str, str] = {}
    container_edits: Edits = Edits()

    def __post_init__(self) -> None:
        if not is_kind(self.kind):
            raise ValueError(f"kind {self.kind!r}: expected VENDOR/CLASS")
        if not self.devices:
            raise ValueError("devices: expected at least one")
        names = [device.name for device in self.devices]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"devices: {twice!r} is described twice")
        _check_version(self)


def _check_version(description: Description) -> None:
    """A description may use only what its version has; one of a later minor version is taken if we know its fields."""
    match = re.fullmatch(r"v?(\d{1,9})\.(\d{1,9})\.(\d{1,9})(?:[-+].*)?", description.cdi_version)
    version = tuple(map(int, match.groups())) if match else (0, 0, 0)
    if not (0, 1, 0) <= version < (2, 0, 0):
        raise ValueError(f"cdiVersion {description.cdi_version!r}: expected one from 0.1.0 to 1.1.0")
    least, why = _least_version(description)
    if version < least:
        needed = ".".join(map(str, least))
        raise ValueError(f"cdiVersion {description.cdi_version}: {why} needs {needed} or later")


def _least_version(description: Description) -> tuple[tuple[int, int, int], str]:
    """The first version that has all that is used, and what needs it. Source: SPEC.md, "Released versions"."""
    edits = (description.container_edits, *(device.container_edits for device in description.devices))
    rdts = [each.intel_rdt for each in edits if each.intel_rdt]
    nodes = [node for each in edits for node in each.device_nodes]
    gids = any(each.additional_gids or each.additional_gids_as_specified for each in edits)
    since: tuple[tuple[tuple[int, int, int], str, bool], ...] = (
        ((1, 1, 0), "netDevices", any(each.net_devices for each in edits)),
        ((1, 1, 0), "intelRdt.schemata", any(rdt.schemata or rdt.enable_monitoring for rdt in rdts)),
        ((0, 7, 0), "intelRdt", bool(rdts)),
        ((0, 7, 0), "additionalGids", gids),
        ((0, 6, 0), "annotations", bool(description.annotations or any(d.annotations for d in description.devices))),
        ((0, 6, 0), "a dot in the class of kind", "." in description.kind.partition("/")[2]),
        ((0, 5, 0), "hostPath of a device node", any(node.host_path for node in nodes)),
        ((0, 5, 0), "a device name that begins with a digit", any(d.name[0].isdigit() for d in description.devices)),
        ((0, 4, 0), "type of a mount", any(mount.type for each in edits for mount in each.mounts)),
    )
    return next(((version, what) for version, what, used in since if used), ((0, 0, 0), ""))


# Edits


def merged(all: Sequence[Edits]) -> Edits:
    """Several edits as one: lists one after the other, the last intelRdt counts."""
    rdts = [each.intel_rdt for each in all if each.intel_rdt]
    return Edits(
        env=tuple(line for each in all for line in each.env),
        device_nodes=tuple(node for each in all for node in each.device_nodes),
        # The same interface asked for twice is one wish: the description's own edits come once for each device.
        net_devices=tuple(dict.fromkeys(device for each in all for device in each.net_devices)),
        hooks=tuple(hook for each in all for hook in each.hooks),
        mounts=tuple(mount for each in all for mount in each.mounts),
        intel_rdt=rdts[-1] if rdts else None,
        additional_gids=tuple(
            gid for each in all for gid in (*each.additional_gids, *each.additional_gids_as_specified)
        ),
    )


def edited(config: Mapping[str, Any], edits: Edits, *, idmap_mounts: bool = False) -> Config:
    """The runtime-spec with the edits in it; `config` stays as it is.

    All device nodes must be complete. With `idmap_mounts` (what the OCI runtime can do) the bind mounts of a container
    with a user namespace show the owners that the files have.
    """
    made: Config = {**config, "process": dict(config["process"]), "linux": dict(config["linux"])}
    process, linux = made["process"], made["linux"]
    if edits.env:
        process["env"] = _with_variables(process.get("env", ()), edits.env)
    for node in edits.device_nodes:
        _add_node(process, linux, node)
    if edits.net_devices:
        added = {each.host_interface_name: {"name": each.name} for each in edits.net_devices}
        linux["netDevices"] = {**linux.get("netDevices", {}), **added}
    if edits.mounts:
        mapped = idmap_mounts and any(each["type"] == "user" for each in linux.get("namespaces", ()))
        made["mounts"] = _with_mounts(config.get("mounts", ()), edits.mounts, mapped)
    for hook in edits.hooks:
        add_hook(made, hook.hook_name, _hook(hook))
    if edits.intel_rdt:
        linux["intelRdt"] = msgspec.json.decode(msgspec.json.encode(edits.intel_rdt))
    gids = [gid for gid in edits.additional_gids if gid]  # SPEC.md: 0 is ignored
    if gids:
        user = process["user"]
        process["user"] = {**user, "additionalGids": list(dict.fromkeys((*user.get("additionalGids", ()), *gids)))}
    return made


def add_hook(config: Config, stage: str, hook: Config) -> None:
    """Put one more hook behind those of its stage, without touching lists that others may hold."""
    hooks = config.get("hooks") or {}
    config["hooks"] = {**hooks, stage: [*hooks.get(stage, ()), hook]}


def _with_variables(present: Sequence[str], added: Sequence[str]) -> list[str]:
    values = {name: value for name, _, value in (line.partition("=") for line in (*present, *added))}
    return [f"{name}={value}" for name, value in values.items()]


def _add_node(process: Config, linux: Config, node: DeviceNode) -> None:
    made: Config = {"path": node.path, "type": node.type, "major": node.major, "minor": node.minor}
    if node.file_mode is not None:
        made["fileMode"] = node.file_mode
    for name, value in (("uid", node.uid), ("gid", node.gid)):
        own = process["user"].get(name, 0)
        if value is not None or own:  # a process that is not root could not open root's
            made[name] = own if value is None else value
    linux["devices"] = [*(each for each in linux.get("devices", ()) if each["path"] != node.path), made]
    if node.type in ("b", "c"):
        access = "" if node.permissions == "none" else node.permissions or "rwm"
        rule = {"allow": True, "type": node.type, "major": node.major, "minor": node.minor, "access": access}
        resources = dict(linux.get("resources", {}))
        resources["devices"] = [*resources.get("devices", ()), rule]
        linux["resources"] = resources


def _with_mounts(present: Sequence[Config], added: Sequence[Mount], mapped: bool) -> list[Config]:
    mounts = list(present)
    for mount in added:
        destination = "/" + "/".join(PurePosixPath(mount.container_path).parts[1:])
        mounts = [each for each in mounts if each["destination"] != destination]
        mounts.append(_mount(mount, destination, mapped))
    return sorted(mounts, key=lambda each: str(each["destination"]).rstrip("/").count("/"))  # stable; parents first


def _mount(mount: Mount, destination: str, mapped: bool) -> Config:
    options = list(mount.options) or ([] if mount.type else ["rbind", "rprivate"])
    is_bind = bool({"bind", "rbind"} & set(options))
    kind = mount.type or "bind"
    if mapped and (is_bind or kind == "bind") and not {"idmap", "ridmap"} & set(options):
        options.append("ridmap" if "rbind" in options else "idmap")
    return {"destination": destination, "type": kind, "source": mount.host_path, "options": options}


def _hook(hook: Hook) -> Config:
    made: Config = {"path": hook.path}
    if hook.args:
        made["args"] = list(hook.args)
    if hook.env:
        made["env"] = list(hook.env)
    if hook.timeout:
        made["timeout"] = hook.timeout
    return made
