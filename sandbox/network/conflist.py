"""Reads CNI network configurations from a directory and says of each what is wrong with it; runs nothing.

Source: CNI specification 1.1, section 1 "Network configuration format".
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oci.errors import InvalidArgument

JsonObject = Mapping[str, Any]
FolderPlugins = Callable[[str], list[JsonObject]]  # the network's name -> its plugins kept outside of its list

SPOKEN_VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")  # before 0.3.0 a result had another shape
SUFFIXES = (".conflist", ".conf", ".json")
NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """One network: the plugins that an attachment to it runs through, and the version of CNI they are spoken to in."""

    name: str
    version: str  # the one in use
    versions: tuple[str, ...]  # all that the file allows and Crito speaks, highest first
    plugins: tuple[JsonObject, ...]
    disable_check: bool = False
    disable_gc: bool = False

    def speaks(self, version: str) -> bool:
        """Whether this network's version is `version` or a later one."""
        return version_key(self.version) >= version_key(version)

    def to_json(self) -> str:
        """The network as a CNI configuration list that allows only the version in use."""
        return json.dumps(
            {
                "cniVersion": self.version,
                "name": self.name,
                "disableCheck": self.disable_check,
                "disableGC": self.disable_gc,
                "loadOnlyInlinedPlugins": True,
                "plugins": self.plugins,
            }
        )


@dataclass(frozen=True, slots=True)
class Directory:
    """A configuration directory: its networks in the order of their file names, and what could not be used."""

    networks: tuple[NetworkConfig, ...] = ()
    problems: tuple[str, ...] = ()


def read_directory(conf_dir: Path) -> Directory:
    """The networks of `conf_dir`; a file that is wrong becomes a problem and does not hide the others."""
    networks: dict[str, NetworkConfig] = {}
    problems: list[str] = []
    try:
        paths = sorted(path for path in conf_dir.iterdir() if path.suffix in SUFFIXES and not path.is_dir())
    except FileNotFoundError:
        return Directory(problems=(f"{conf_dir} does not exist",))
    except OSError as error:
        return Directory(problems=(f"{conf_dir} cannot be read: {error.strerror}",))
    for path in paths:
        try:
            network = read_file(path)
        except InvalidArgument as error:
            problems.append(str(error))
            continue
        if network.name in networks:
            problems.append(f'{path}: an earlier file already defines the network "{network.name}"')
        networks.setdefault(network.name, network)
    return Directory(tuple(networks.values()), tuple(problems))


def read_file(path: Path) -> NetworkConfig:
    """The network that a .conflist, .conf or .json file defines, with the plugins of its folder beside the file.

    Raises InvalidArgument, which names the file and what is wrong in it.
    """
    document = _read_object(path)
    try:
        return parse(document, lambda name: _folder_plugins(path.parent / name))
    except InvalidArgument as error:
        raise InvalidArgument(f"{path}: {error}") from error


def from_json(text: str) -> NetworkConfig:
    """The network that `NetworkConfig.to_json` wrote."""
    return parse(json.loads(text))


def parse(document: JsonObject, folder_plugins: FolderPlugins = lambda name: []) -> NetworkConfig:
    """The network that a configuration list, or a single plugin's configuration, defines.

    Raises InvalidArgument.
    """
    name = document.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidArgument(f'"name" is {name!r}; expected letters, digits, "_", "." and "-"')
    versions = _versions(document)
    return NetworkConfig(
        name=name,
        version=versions[0],
        versions=versions,
        plugins=_plugins(document, name, folder_plugins),
        disable_check=_flag(document, "disableCheck"),
        disable_gc=_flag(document, "disableGC"),
    )


def version_key(version: str) -> tuple[int, ...]:
    """Orders versions; one that is not made of numbers is before all others."""
    parts = version.split(".")
    return tuple(int(part) for part in parts) if all(part.isdecimal() for part in parts) else ()


def _versions(document: JsonObject) -> tuple[str, ...]:
    """The versions that the document allows and Crito speaks, highest first (section 1, "Version considerations")."""
    asked = [document.get("cniVersion"), *_list(document, "cniVersions")]
    spoken = {version for version in asked if version in SPOKEN_VERSIONS}
    if not spoken:
        said = ", ".join(str(version) for version in asked if version is not None) or "nothing"
        raise InvalidArgument(
            f'"cniVersion" and "cniVersions" say {said}; Crito speaks CNI {SPOKEN_VERSIONS[0]} to {SPOKEN_VERSIONS[-1]}'
        )
    return tuple(sorted(spoken, key=version_key, reverse=True))


def _plugins(document: JsonObject, name: str, folder_plugins: FolderPlugins) -> tuple[JsonObject, ...]:
    if "type" in document and "plugins" not in document:  # the older form: one plugin's configuration is the network
        common = ("name", "cniVersion", "cniVersions", "disableCheck", "disableGC")
        return _checked([{key: value for key, value in document.items() if key not in common}])
    inlined = _list(document, "plugins")
    if _flag(document, "loadOnlyInlinedPlugins"):
        if not inlined:
            raise InvalidArgument('"loadOnlyInlinedPlugins" is true and "plugins" is empty')
        return _checked(inlined)
    plugins = _checked([*inlined, *folder_plugins(name)])
    if not plugins:
        raise InvalidArgument('there is neither a "type" nor a "plugins" list with a plugin in it')
    return plugins


def _checked(plugins: Iterable[Any]) -> tuple[JsonObject, ...]:
    checked: list[JsonObject] = []
    for number, plugin in enumerate(plugins, 1):
        if not isinstance(plugin, dict):
            raise InvalidArgument(f"plugin {number} is not an object")
        plugin_type = plugin.get("type")
        if not isinstance(plugin_type, str) or plugin_type in ("", ".", "..") or "/" in plugin_type:
            raise InvalidArgument(f'plugin {number}: "type" is {plugin_type!r}; expected the name of an executable')
        if not isinstance(plugin.get("capabilities", {}), dict):
            raise InvalidArgument(f'plugin {number} ({plugin_type}): "capabilities" is not an object')
        checked.append(plugin)
    return tuple(checked)


def _folder_plugins(folder: Path) -> list[JsonObject]:
    """The plugins in the folder called like the network (section 1, "loadOnlyInlinedPlugins")."""
    if not folder.is_dir():
        return []
    return [_read_object(path) for path in sorted(folder.glob("*.conf"))]


def _read_object(path: Path) -> JsonObject:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise InvalidArgument(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidArgument(f"{path} is not a JSON object")
    return document


def _list(document: JsonObject, key: str) -> list[Any]:
    value = document.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidArgument(f'"{key}" is not a list')
    return value


def _flag(document: JsonObject, key: str) -> bool:
    """libcni also takes the words "true" and "false", so files with them exist."""
    value = document.get(key, False)
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise InvalidArgument(f'"{key}" is {value!r}; expected true or false')
