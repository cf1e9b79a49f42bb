"""Makes the Config of a daemon from its file, the drop-ins, the flags and the host, and keeps where each value is from.

Later wins: defaults, the file, `FILE.d/*.toml` in lexical order, flags. A list replaces the list before it as a whole.
Everything that is wrong raises ConfigError with the file (or flag), the key, the value seen and what was expected.
"""

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cri.config import SECTIONS, CgroupDriver, Config, Key, RuntimeHandler, keys
from oci.errors import InvalidArgument

DEFAULT_FILE = Path("/etc/crito/crito.toml")
EXECUTABLE_DIRS = tuple(
    Path(each) for each in ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
)
PAUSE_PROGRAMS = ("catatonit",)
PAUSE_DIRS = (*EXECUTABLE_DIRS, Path("/usr/libexec/podman"), Path("/usr/libexec/catatonit"))
KNOWN_RUNTIMES = ("crun", "runc")

HANDLERS = "handlers"
HANDLER_KEYS = keys(RuntimeHandler)


class ConfigError(InvalidArgument):
    """A setting is wrong; the text names its place, its key, its value and what was expected."""


@dataclass(frozen=True, slots=True)
class Given:
    """A value that somebody has set, parsed."""

    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Host:
    """What the defaults take from the host."""

    has_systemd: bool
    find_executable: Callable[[str, Iterable[Path]], Path | None]


def this_host() -> Host:
    return Host(Path("/run/systemd/system").is_dir(), find_executable)


def find_executable(name: str, directories: Iterable[Path]) -> Path | None:
    """The first file of this name that somebody may execute."""
    for directory in directories:
        path = directory / name
        try:
            if path.is_file() and path.stat().st_mode & 0o111:
                return path
        except OSError:  # a directory that cannot be searched holds nothing for us
            continue
    return None


def load(
    file: Path | None = None,
    drop_ins: Path | None = None,
    flags: Mapping[str, str | list[str]] | None = None,
    host: Host | None = None,
) -> Config:
    """The effective configuration.

    `file` None: /etc/crito/crito.toml if it exists; a file that is named must exist. `drop_ins` None: `FILE.d`.
    `flags` are texts by dotted key ("runtime.cgroup_driver"), lists of texts for keys that are lists;
    those of handlers are "runtime.handlers.NAME.key".
    """
    given: dict[str, Given] = {}
    for path in _files(file, drop_ins):
        given |= _read_file(path)
    given |= _read_flags(flags or {})
    return _build(given, host or this_host())


def _files(file: Path | None, drop_ins: Path | None) -> list[Path]:
    named = file
    file = file or DEFAULT_FILE
    found = [file] if named or file.exists() else []
    directory = drop_ins or file.with_name(file.name + ".d")
    if drop_ins and not drop_ins.is_dir():
        raise ConfigError(f"{drop_ins}: no such directory: expected a directory of *.toml files")
    return found + sorted(directory.glob("*.toml"))


def _read_file(path: Path) -> dict[str, Given]:
    try:
        with path.open("rb") as opened:
            document = tomllib.load(opened)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return _read_document(document, str(path))


def _read_document(document: Mapping[str, Any], place: str) -> dict[str, Given]:
    given: dict[str, Given] = {}
    for section, content in document.items():
        known = SECTIONS.get(section)
        if known is None:
            raise ConfigError(f"{place}: [{section}]: unknown section{_hint(section, SECTIONS)}")
        table = _table(content, section, place)
        if section == "runtime":
            handlers = _table(table.pop(HANDLERS, {}), f"{section}.{HANDLERS}", place)
            for name, handler in handlers.items():
                dotted = f"{section}.{HANDLERS}.{_handler_name(name, place)}"
                # A handler is there even if its table is empty: all its keys have defaults.
                given[dotted] = Given(None, place)
                given |= _read_table(_table(handler, dotted, place), dotted, HANDLER_KEYS, place)
        given |= _read_table(table, section, keys(known), place)
    return given


def _handler_name(name: str, place: str) -> str:
    """RuntimeClass handlers are DNS labels (RFC 1123), and nothing else can name one of ours."""
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name):
        raise ConfigError(f'{place}: runtime.handlers."{name}": expected a DNS label, such as "kata-qemu"')
    return name


def _table(value: Any, name: str, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: {name} = {_shown(value)}: expected a table, [{name}]")
    return dict(value)


def _read_table(table: Mapping[str, Any], section: str, known: Mapping[str, Key], place: str) -> dict[str, Given]:
    given = {}
    for name, value in table.items():
        key = known.get(name)
        if key is None:
            raise ConfigError(f"{place}: {section}.{name}: unknown key{_hint(name, known)}")
        given[f"{section}.{name}"] = Given(_parse(key, f"{section}.{name}", value, place), place)
    return given


def _read_flags(flags: Mapping[str, str | list[str]]) -> dict[str, Given]:
    given: dict[str, Given] = {}
    for dotted, text in flags.items():
        section, _, name = dotted.rpartition(".")
        place = flag_name(dotted)
        known = HANDLER_KEYS if section.startswith(f"runtime.{HANDLERS}.") else keys(SECTIONS[section])
        if name not in known:
            raise ConfigError(f"{place}: unknown key{_hint(name, known)}")
        if known is HANDLER_KEYS:
            _handler_name(section.removeprefix(f"runtime.{HANDLERS}."), place)
            given.setdefault(section, Given(None, place))
        given[dotted] = Given(_parse(known[name], dotted, _flag_value(known[name], text), place), place)
    return given


def flag_name(dotted: str) -> str:
    """The flag of `serve` that sets a key."""
    prefix = f"runtime.{HANDLERS}."
    if dotted.startswith(prefix):
        return f"--runtime-handler {dotted.removeprefix(prefix)}"
    return "--" + dotted.replace(".", "-").replace("_", "-")


def _flag_value(key: Key, text: str | list[str]) -> Any:
    if key.kind.is_list:
        texts = [text] if isinstance(text, str) else text
        return [] if texts == [""] else texts
    return key.kind.from_text(text if isinstance(text, str) else text[-1])


def _parse(key: Key, dotted: str, value: Any, place: str) -> Any:
    try:
        return key.kind.parse(value)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{place}: {dotted} = {_shown(value)}: expected {key.kind.expected}") from error


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f': did you mean "{close[0]}"?' if close else ": expected one of " + ", ".join(known)


def _build(given: Mapping[str, Given], host: Host) -> Config:
    origins: dict[str, str] = {}
    config = Config(**{name: _section(section, name, given, origins) for name, section in SECTIONS.items()})
    config = _with_host_defaults(config, given, origins, host)
    handlers = _handlers(config, given, origins, host)
    config = replace(config, runtime=replace(config.runtime, handlers=handlers), origins=origins)
    _check_together(config)
    return config


def _section(section: type[Any], name: str, given: Mapping[str, Given], origins: dict[str, str]) -> Any:
    values = {}
    for key in keys(section):
        found = given.get(f"{name}.{key}")
        origins[f"{name}.{key}"] = found.origin if found else "default"
        if found:
            values[key] = found.value
    return section(**values)


def _with_host_defaults(config: Config, given: Mapping[str, Given], origins: dict[str, str], host: Host) -> Config:
    """Fills in the defaults that follow from other keys or from the host."""
    if "api.listen" not in given:
        origins["api.listen"] = origins["crito.run_dir"]
        listen = _parse(
            keys(SECTIONS["api"])["listen"], "api.listen", str(config.crito.run_dir / "crito.sock"), "default"
        )
        config = replace(config, api=replace(config.api, listen=listen))
    if "nri.listen" not in given:
        origins["nri.listen"] = origins["crito.run_dir"]
        # A run_dir that leaves no room for this name is refused where the socket is wanted, not here.
        config = replace(config, nri=replace(config.nri, listen=config.crito.run_dir / "nri.sock"))
    if "runtime.cgroup_driver" not in given and host.has_systemd:
        origins["runtime.cgroup_driver"] = "host: /run/systemd/system exists"
        config = replace(config, runtime=replace(config.runtime, cgroup_driver=CgroupDriver.SYSTEMD))
    if "runtime.pause_path" not in given:
        pause = next(filter(None, (host.find_executable(name, PAUSE_DIRS) for name in PAUSE_PROGRAMS)), None)
        origins["runtime.pause_path"] = "host: found" if pause else "host: none found"
        config = replace(config, runtime=replace(config.runtime, pause_path=pause))
    return config


def _handlers(
    config: Config, given: Mapping[str, Given], origins: dict[str, str], host: Host
) -> dict[str, RuntimeHandler]:
    prefix = f"runtime.{HANDLERS}."
    named = {
        name.removeprefix(prefix): each.origin
        for name, each in given.items()
        if name.startswith(prefix) and each.value is None and "." not in name.removeprefix(prefix)
    }
    found = {name: "host: found" for name in KNOWN_RUNTIMES if host.find_executable(name, EXECUTABLE_DIRS)}
    handlers = {}
    for name, origin in (found | named).items():
        values = _handler_values(name, config, given, origins, host)
        if values["path"] is None:
            raise ConfigError(
                f"{origin}: runtime.handlers.{name}.path: not set, and no executable {name} in "
                f"{', '.join(map(str, EXECUTABLE_DIRS))}: expected the path of an OCI runtime"
            )
        handlers[name] = RuntimeHandler(**values)
    return handlers


def _handler_values(
    name: str, config: Config, given: Mapping[str, Given], origins: dict[str, str], host: Host
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key in HANDLER_KEYS.values():
        dotted = f"runtime.{HANDLERS}.{name}.{key.name}"
        if dotted in given:
            values[key.name], origins[dotted] = given[dotted].value, given[dotted].origin
        elif key.name == "path":
            values["path"], origins[dotted] = host.find_executable(name, EXECUTABLE_DIRS), "host: found"
        elif key.name == "root":
            values["root"], origins[dotted] = config.crito.run_dir / "runtimes" / name, origins["crito.run_dir"]
        else:
            values[key.name], origins[dotted] = key.default, "default"
    return values


def _check_together(config: Config) -> None:
    """Checks what no key can check alone."""
    default, handlers = config.runtime.default_handler, config.runtime.handlers
    if default and default not in handlers:
        raise ConfigError(
            f'{config.origins["runtime.default_handler"]}: runtime.default_handler = "{default}": '
            f"expected a configured runtime handler: {', '.join(handlers) or 'there is none'}"
        )
    streaming = config.streaming
    if (streaming.tls_cert is None) != (streaming.tls_key is None):
        missing, there = ("tls_key", "tls_cert") if streaming.tls_key is None else ("tls_cert", "tls_key")
        raise ConfigError(
            f"{config.origins[f'streaming.{there}']}: streaming.{there} is set and streaming.{missing} is not: "
            "expected both or neither"
        )
    if streaming.tls_ca and not streaming.tls_cert:
        raise ConfigError(
            f"{config.origins['streaming.tls_ca']}: streaming.tls_ca is set and streaming.tls_cert is not: "
            "expected a certificate too, because callers are asked for theirs only over TLS"
        )
    if config.crito.root == config.crito.run_dir:
        raise ConfigError(
            f"{config.origins['crito.run_dir']}: crito.run_dir = {config.crito.run_dir}: "
            "expected another directory than crito.root"
        )
