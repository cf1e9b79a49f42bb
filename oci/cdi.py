"""Container Device Interface: finds the devices that vendors describe on the node, and edits them into a runtime-spec.

Source: container-device-interface, SPEC.md (versions up to 1.1). Directories are read anew at every use, as device
plugins write to them at any time; files that have not changed are not parsed again.
"""

import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oci.errors import FailedPrecondition, InvalidArgument

ANNOTATION_PREFIX = "cdi.k8s.io/"  # of annotations whose values name devices, as older device plugins set them

_HOOKS = frozenset({"prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"})
_SUFFIXES = (".json", ".yaml")

Config = dict[str, Any]
Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Device:
    """One device, and the description that it stands in."""

    file: Path
    document: Document
    edits: Mapping[str, Any]


def requested(field: Iterable[str], annotations: Mapping[str, str]) -> tuple[str, ...]:
    """The devices that a container asks for, each once: those of the CRI's field, then those of annotations."""
    annotated = [
        name.strip()
        for key, value in sorted(annotations.items())
        if key.startswith(ANNOTATION_PREFIX)
        for name in value.split(",")
    ]
    return tuple(dict.fromkeys(name for name in (*field, *annotated) if name))


class Cdi:
    """The descriptions in `directories`; where two have the same device, that in the later directory counts."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self._directories = tuple(directories)
        self._parsed: dict[Path, tuple[tuple[int, int], Document | str]] = {}

    def inject(self, config: Config, names: Sequence[str]) -> None:
        """Edit the devices into `config`, in place; reads files and looks at device nodes, so not in the event loop.

        Raises InvalidArgument for what is no device name, FailedPrecondition for a device that no description has or
        that two have, or whose node is not there.
        """
        for name in names:
            kind, equals, device = name.partition("=")
            if "/" not in kind or not equals or not device:
                raise InvalidArgument(f"CDI device {name!r}: expected VENDOR/CLASS=NAME")
        if not names:
            return
        found, broken = self._devices()
        used = [self._one(name, found, broken) for name in names]
        files = dict.fromkeys(device.file for device in used)
        documents = {device.file: device.document for device in used}
        for file in files:  # what all devices of a description need comes once
            _apply(config, documents[file].get("containerEdits") or {}, str(file))
        for each, name in zip(used, names, strict=True):
            _apply(config, each.edits, f"CDI device {name}")

    def _one(self, name: str, found: Mapping[str, list[_Device]], broken: Mapping[Path, str]) -> _Device:
        devices = found.get(name, [])
        if len(devices) == 1:
            return devices[0]
        if devices:
            files = ", ".join(str(device.file) for device in devices)
            raise FailedPrecondition(f"CDI device {name}: it is described more than once: {files}")
        places = ", ".join(map(str, self._directories)) or "no directory"
        unread = "".join(f"; {file} cannot be used: {reason}" for file, reason in broken.items())
        raise FailedPrecondition(f"CDI device {name}: no description in {places} has it{unread}")

    def _devices(self) -> tuple[dict[str, list[_Device]], dict[Path, str]]:
        """All devices by full name, and the files that are no descriptions, with the reasons."""
        found: dict[str, list[_Device]] = {}
        broken: dict[Path, str] = {}
        for directory in self._directories:
            here: dict[str, list[_Device]] = {}
            for file in _files(directory):
                document = self._read(file)
                if isinstance(document, str):
                    broken[file] = document
                    continue
                for device in document["devices"]:
                    edits = device.get("containerEdits") or {}
                    name = f"{document['kind']}={device['name']}"
                    here.setdefault(name, []).append(_Device(file, document, edits))
            found |= here
        self._parsed = {file: parsed for file, parsed in self._parsed.items() if file.parent in self._directories}
        return found, broken

    def _read(self, file: Path) -> Document | str:
        """The description, or why it is none."""
        try:
            seen = file.stat()
            version = (seen.st_mtime_ns, seen.st_size)
            if self._parsed.get(file, (None,))[0] != version:
                self._parsed[file] = (version, _parse(file))
        except OSError as error:
            return error.strerror or str(error)
        return self._parsed[file][1]


def _files(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.suffix in _SUFFIXES)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _parse(file: Path) -> Document | str:
    text = file.read_bytes()
    try:
        document = json.loads(text) if file.suffix == ".json" else _yaml(text)
    except (ValueError, RecursionError) as error:
        return f"not {file.suffix[1:].upper()}: {str(error)[:200]}"
    if not isinstance(document, dict) or not isinstance(document.get("kind"), str):
        return "it has no kind"
    devices = document.get("devices")
    if not isinstance(devices, list) or not all(isinstance(each, dict) and each.get("name") for each in devices):
        return "it has no list of devices with names"
    return document


def _yaml(text: bytes) -> Any:
    import yaml  # noqa: PLC0415  most nodes have no description in YAML

    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


# Edits


def _apply(config: Config, edits: Mapping[str, Any], what: str) -> None:
    process, linux = config["process"], config["linux"]
    try:
        _env(process, edits.get("env") or ())
        for node in edits.get("deviceNodes") or ():
            _device_node(process, linux, node, what)
        for device in edits.get("netDevices") or ():
            linux.setdefault("netDevices", {})[device["hostInterfaceName"]] = {"name": device["name"]}
        for mount in edits.get("mounts") or ():
            _mount(config, mount)
        for hook in edits.get("hooks") or ():
            _hook(config, hook, what)
        if edits.get("additionalGids"):
            user = process["user"]
            user["additionalGids"] = sorted({*user.get("additionalGids", ()), *edits["additionalGids"]} - {0})
        if edits.get("intelRdt"):
            linux["intelRdt"] = dict(edits["intelRdt"])
    except (KeyError, TypeError, AttributeError) as error:
        raise FailedPrecondition(f"{what}: its containerEdits lack or misuse {error}") from error


def _env(process: Config, lines: Iterable[str]) -> None:
    both = (line.partition("=") for line in (*process.get("env", ()), *lines))
    values = {name: value for name, _, value in both}
    process["env"] = [f"{name}={value}" for name, value in values.items()]


def _device_node(process: Config, linux: Config, node: Mapping[str, Any], what: str) -> None:
    path = node["path"]
    made: Config = {"path": path, **_numbers(node, what)}
    if node.get("fileMode") is not None:
        made["fileMode"] = node["fileMode"]
    for name in ("uid", "gid"):
        value = node.get(name)
        own = process["user"].get(name, 0)
        if value is not None or own:  # a process that is not root could not open root's
            made[name] = value if value is not None else own
    linux["devices"] = [*(each for each in linux.get("devices", ()) if each["path"] != path), made]
    resources = linux.setdefault("resources", {})
    rule = {
        "allow": True,
        "type": made["type"],
        "major": made["major"],
        "minor": made["minor"],
        "access": node.get("permissions") or "rwm",
    }
    if made["type"] in ("b", "c"):
        resources["devices"] = [*resources.get("devices", ()), rule]


def _numbers(node: Mapping[str, Any], what: str) -> Config:
    """Type, major and minor: as described, else of the node on the host."""
    if node.get("type") and (node["type"] == "p" or node.get("major")):
        return {"type": node["type"], "major": node.get("major", 0), "minor": node.get("minor", 0)}
    host_path = node.get("hostPath") or node["path"]
    try:
        seen = os.stat(host_path)  # noqa: PTH116  beside os.major
    except OSError as error:
        raise FailedPrecondition(f"{what}: device node {host_path}: {error.strerror}") from error
    kinds = {stat.S_IFBLK: "b", stat.S_IFCHR: "c", stat.S_IFIFO: "p"}
    kind = kinds.get(stat.S_IFMT(seen.st_mode))
    if kind is None or node.get("type") not in (None, "", kind):
        raise FailedPrecondition(f"{what}: {host_path} is not a device node of type {node.get('type') or 'b, c or p'}")
    return {"type": kind, "major": os.major(seen.st_rdev), "minor": os.minor(seen.st_rdev)}


def _mount(config: Config, mount: Mapping[str, Any]) -> None:
    destination = mount["containerPath"]
    made = {
        "destination": destination,
        "type": mount.get("type") or "bind",
        "source": mount["hostPath"],
        "options": list(mount.get("options") or ("rbind", "rprivate")),
    }
    kept = [each for each in config["mounts"] if each["destination"] != destination]
    config["mounts"] = sorted([*kept, made], key=lambda each: str(each["destination"]).rstrip("/").count("/"))


def _hook(config: Config, hook: Mapping[str, Any], what: str) -> None:
    if hook["hookName"] not in _HOOKS:
        raise FailedPrecondition(f"{what}: hook {hook['hookName']!r}: expected one of {', '.join(sorted(_HOOKS))}")
    made = {name: hook[name] for name in ("path", "args", "env", "timeout") if hook.get(name)}
    hooks = config.setdefault("hooks", {})
    hooks[hook["hookName"]] = [*hooks.get(hook["hookName"], ()), made]
