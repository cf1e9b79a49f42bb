"""Container Device Interface: finds the devices that vendors describe on the node.

Source: container-device-interface, SPEC.md. Directories are read anew at every use, as device plugins write to them at
any time; files that have not changed are not parsed again. What a description asks for is `oci/cdi_edits.py`.
"""

import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from oci.cdi_edits import Description, Device, DeviceNode, Edits, edited, is_qualified_name, merged
from oci.errors import FailedPrecondition, InvalidArgument
from oci.parsed_files import ParsedFiles

ANNOTATION_PREFIX = "cdi.k8s.io/"  # of annotations whose values name devices, as older device plugins set them

_SUFFIXES = (".json", ".yaml")
_LARGEST_FILE = 16 << 20
_MOST_VALUES = 1_000_000  # in one description, with what YAML's aliases repeat

Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Found:
    """One device, and the description that it stands in."""

    file: Path
    description: Description
    device: Device


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
    """The descriptions in `directories`; where two have the same device, that in the later directory counts.

    Its methods read files, so they are not for the event loop; any number of threads may call them.
    """

    def __init__(self, directories: Sequence[Path]) -> None:
        self._directories = tuple(directories)
        self._files = ParsedFiles(_parse, _SUFFIXES, _LARGEST_FILE)

    def resolve(self, names: Sequence[str]) -> Edits:
        """All that these devices ask for; what a description leaves to the host's device nodes is filled in.

        Raises InvalidArgument for what is no device name, and for a device that no description has or that two of one
        directory have; FailedPrecondition for a device whose node is not there.
        """
        for name in names:
            if not is_qualified_name(name):
                raise InvalidArgument(f"CDI device {name!r}: expected VENDOR/CLASS=NAME")
        if not names:
            return Edits()
        found, broken = self._devices()
        wanted = {name: self._one(name, found, broken) for name in names}
        edits, seen = [], set()
        for name, each in wanted.items():
            if each.file not in seen:  # what all devices of a description need comes once
                seen.add(each.file)
                edits.append(_completed(each.description.container_edits, f"CDI description {each.file}"))
            edits.append(_completed(each.device.container_edits, f"CDI device {name} of {each.file}"))
        return merged(edits)

    def inject(self, config: Config, names: Sequence[str], *, idmap_mounts: bool = False) -> None:
        """Edit the devices into `config`, in place; raises as `resolve` does."""
        config.update(edited(config, self.resolve(names), idmap_mounts=idmap_mounts))

    def unusable(self) -> dict[Path, str]:
        """The files that are no descriptions, with the reasons."""
        return self._devices()[1]

    def _one(self, name: str, found: Mapping[str, list[_Found]], broken: Mapping[Path, str]) -> _Found:
        devices = found.get(name, [])
        if len(devices) == 1:
            return devices[0]
        if devices:
            files = ", ".join(str(device.file) for device in devices)
            raise InvalidArgument(f"CDI device {name}: it is described more than once: {files}")
        places = ", ".join(map(str, self._directories)) or "no directory"
        unread = "".join(f"; {file} cannot be used: {reason}" for file, reason in broken.items())
        raise InvalidArgument(f"CDI device {name}: no description in {places} has it{unread}")

    def _devices(self) -> tuple[dict[str, list[_Found]], dict[Path, str]]:
        """All devices by full name, and the files that are no descriptions, with the reasons."""
        found: dict[str, list[_Found]] = {}
        broken: dict[Path, str] = {}
        listed = {directory: self._files.listed(directory, broken) for directory in self._directories}
        parsed = self._files.read(file for files in listed.values() for file in files)
        for files in listed.values():
            here: dict[str, list[_Found]] = {}
            for file in files:
                description = parsed.get(file)
                if isinstance(description, str):
                    broken[file] = description
                elif description is not None:
                    for device in description.devices:
                        here.setdefault(f"{description.kind}={device.name}", []).append(
                            _Found(file, description, device)
                        )
            found |= here
        return found, broken


def _parse(file: Path, text: bytes) -> Description | str:
    try:
        document = json.loads(text) if file.suffix == ".json" else _yaml(text)
    except (ValueError, RecursionError) as error:
        return f"not {file.suffix[1:].upper()}: {str(error)[:200]}"
    try:
        return msgspec.convert(_without_nulls(document, [_MOST_VALUES]), Description)
    except msgspec.ValidationError as error:
        return str(error)[:500]
    except RecursionError:
        return "nested too deeply"


def _yaml(text: bytes) -> Any:
    import yaml  # noqa: PLC0415  most nodes have no description in YAML

    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _without_nulls(value: Any, left: list[int]) -> Any:
    """The document without fields that are null, which mean "not set"; raises when it has more values than `left`."""
    left[0] -= 1
    if left[0] < 0:
        raise msgspec.ValidationError(f"more than {_MOST_VALUES} values")
    if isinstance(value, dict):
        return {str(name): _without_nulls(each, left) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each, left) for each in value]
    return value


# What descriptions leave to the host


def _completed(edits: Edits, what: str) -> Edits:
    nodes = tuple(_node_as_on_host(node, what) for node in edits.device_nodes)
    return msgspec.structs.replace(edits, device_nodes=nodes)


def _node_as_on_host(node: DeviceNode, what: str) -> DeviceNode:
    """Type, numbers and mode: as described, else those of the node on the host."""
    host_path = node.host_path or node.path
    try:
        seen = os.stat(host_path)  # noqa: PTH116  beside os.major
    except OSError as error:
        if node.is_complete:
            return node
        raise FailedPrecondition(f"{what}: device node {host_path}: {error.strerror}") from error
    mode = stat.S_IMODE(seen.st_mode) if node.file_mode is None else node.file_mode
    if node.is_complete:
        return msgspec.structs.replace(node, file_mode=mode)
    kinds = {stat.S_IFBLK: "b", stat.S_IFCHR: "c", stat.S_IFIFO: "p"}
    kind = kinds.get(stat.S_IFMT(seen.st_mode))
    if kind is None or node.type not in ("", kind, "u" if kind == "c" else kind):
        raise FailedPrecondition(f"{what}: {host_path} is not a device node of type {node.type or 'b, c or p'}")
    return msgspec.structs.replace(
        node, type=kind, major=os.major(seen.st_rdev), minor=os.minor(seen.st_rdev), file_mode=mode
    )
