"""The kinds of value that a setting can have: how each is read from TOML or a flag, checked, and written back."""

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)

# sockaddr_un: 108 bytes with the final NUL; gRPC binds by path and has no way around it.
SOCKET_PATH_MAX = 107


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """How one kind of value is read and written; `parse` raises ValueError for what is not of this kind."""

    expected: str  # completes "expected …"
    parse: Callable[[Any], T]  # from a TOML value
    from_text: Callable[[str], Any]  # from a flag's text to a TOML value
    to_toml: Callable[[T], Any]
    is_list: bool = False


@dataclass(frozen=True, slots=True)
class Ulimit:
    """One resource limit; -1 is unlimited."""

    name: str  # as prlimit has it: "nofile"
    soft: int
    hard: int

    def __str__(self) -> str:
        return f"{self.name}={self.soft}:{self.hard}"


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError
        return value

    return parse


def _number(text: str) -> Any:
    """A flag's text as the integer that it is, else the text, for `parse` to refuse."""
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _flag_text(text: str) -> Any:
    return {"true": True, "false": False}.get(text.lower(), text)


def _path(value: Any) -> Path:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value or ".." in PurePosixPath(value).parts:
        raise ValueError
    return Path(value)


def _optional_path(value: Any) -> Path | None:
    return None if value == "" else _path(value)


def _socket_path(value: Any) -> Path:
    path = _path(str(value).removeprefix("unix://") if isinstance(value, str) else value)
    if len(bytes(path)) > SOCKET_PATH_MAX:
        raise ValueError
    return path


_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def _duration(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, int | float):
        seconds = float(value)
    elif isinstance(value, str) and re.fullmatch(r"(\d+(\.\d+)?(ms|s|m|h))+", value):
        seconds = sum(float(n) * _UNITS_S[unit] for n, _, unit in re.findall(r"(\d+(\.\d+)?)(ms|s|m|h)", value))
    else:
        raise ValueError
    if not 0 <= seconds <= 10**9:
        raise ValueError
    return seconds


def _timeout(value: Any) -> float:
    seconds = _duration(value)
    if seconds == 0:
        raise ValueError
    return seconds


def _duration_toml(seconds: float) -> str:
    for unit, size in (("h", 3600), ("m", 60), ("s", 1)):
        if seconds and seconds % size == 0:
            return f"{int(seconds // size)}{unit}"
    return f"{seconds:g}s"


_UNITS_BYTES = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def _size(value: Any) -> int:
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+) ?(B|KiB|MiB|GiB|TiB)", value)):
        value = int(match[1]) * _UNITS_BYTES[match[2]]
    return _whole(0, 2**62)(value)


def _size_toml(size: int) -> Any:
    for unit in ("GiB", "MiB", "KiB"):
        if size and size % _UNITS_BYTES[unit] == 0:
            return f"{size // _UNITS_BYTES[unit]}{unit}"
    return size


def _log_size(value: Any) -> int:
    size = _size(value)
    if size and size < 8192:
        raise ValueError
    return size


def _grpc_size(value: Any) -> int:
    size = _size(value)
    if not 1 << 20 <= size <= 2**31 - 1:
        raise ValueError
    return size


def _address(value: Any) -> str:
    return str(ipaddress.ip_address(_text(value)))


def _listen(value: Any) -> str:
    text = _text(value)
    if text == "":
        return text
    if text.startswith("/"):
        return str(_socket_path(text))
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError
    ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    return text


def _http_url(value: Any) -> str:
    text = _text(value)
    if text and (urlsplit(text).scheme not in ("http", "https") or not urlsplit(text).hostname):
        raise ValueError
    return text


def _cgroup(value: Any) -> str:
    return "" if value == "" else str(_path(value))


def _list(value: Any, parse: Callable[[Any], T]) -> tuple[T, ...]:
    if not isinstance(value, list):
        raise ValueError
    return tuple(parse(each) for each in value)


def _nonempty(value: Any) -> str:
    if not _text(value):
        raise ValueError
    return str(value)


def _capability(value: Any) -> str:
    name = _text(value).upper().removeprefix("CAP_")
    if not re.fullmatch(r"[A-Z][A-Z_]*", name):
        raise ValueError
    return name


def _pair(value: Any) -> tuple[str, str]:
    name, equals, content = _text(value).partition("=")
    if not equals or not name or "\0" in value:
        raise ValueError
    return name, content


def _sysctl(value: Any) -> tuple[str, str]:
    name, content = _pair(value)
    if not re.fullmatch(r"[A-Za-z0-9_.\-/]+", name) or ".." in name:
        raise ValueError
    return name.strip(), content.strip()


ULIMIT_NAMES = frozenset(
    {
        "as",
        "core",
        "cpu",
        "data",
        "fsize",
        "locks",
        "memlock",
        "msgqueue",
        "nice",
        "nofile",
        "nproc",
        "rss",
        "rtprio",
        "rttime",
        "sigpending",
        "stack",
    }
)


def _ulimit(value: Any) -> Ulimit:
    match = re.fullmatch(r"([a-z]+)=(-1|\d+):(-1|\d+)", _text(value))
    if not match or match[1] not in ULIMIT_NAMES:
        raise ValueError
    soft, hard = int(match[2]), int(match[3])
    if hard != -1 and (soft == -1 or soft > hard):
        raise ValueError
    return Ulimit(match[1], soft, hard)


@dataclass(frozen=True, slots=True)
class RegistryLimit:
    """How much of a registry this node takes at once; 0 is no limit."""

    host: str
    layers: int = 0
    rate: int = 0  # bytes per second

    def __str__(self) -> str:
        rate = f" rate={self.rate}" if self.rate else ""
        return self.host + (f" layers={self.layers}" if self.layers else "") + rate


def _registry_limit(value: Any) -> RegistryLimit:
    match = re.fullmatch(r"([A-Za-z0-9.:\[\]-]+)(?: layers=(\d{1,3}))?(?: rate=(\d+)([KMGT]iB|B|))?", _text(value))
    if match is None or match[2] is match[3] is None:
        raise ValueError
    rate = int(match[3] or 0) * (_UNITS_BYTES[match[4]] if match[3] else 1)
    return RegistryLimit(match[1], int(match[2] or 0), rate)


def _scalar(expected: str, parse: Callable[[Any], T], to_toml: Callable[[T], Any] = lambda value: value) -> Kind[T]:
    return Kind(expected, parse, lambda text: text, to_toml)


def _texts(expected: str, parse: Callable[[Any], T], to_text: Callable[[T], str] = str) -> Kind[tuple[T, ...]]:
    return Kind(
        expected,
        lambda value: _list(value, parse),
        lambda text: text,
        lambda values: [to_text(each) for each in values],
        is_list=True,
    )


def _joined(pair: tuple[str, str]) -> str:
    return "=".join(pair)


def _sized(expected: str, parse: Callable[[Any], int]) -> Kind[int]:
    return Kind(expected, parse, _number, _size_toml)


def choice(enum: type[E]) -> Kind[E]:
    """One word of a closed set."""

    def parse(value: Any) -> E:
        return enum(_text(value))

    return Kind("one of " + ", ".join(f'"{each}"' for each in enum), parse, lambda text: text, str)


TEXT: Kind[str] = _scalar("a text", _text)
FLAG: Kind[bool] = Kind("true or false", _flag, _flag_text, lambda value: value)
COUNT: Kind[int] = Kind("a whole number from 1 to 1000", _whole(1, 1000), _number, lambda value: value)
COUNT_OR_ALL: Kind[int] = Kind("a whole number from 0 to 1000", _whole(0, 1000), _number, lambda value: value)
PER_MILLION: Kind[int] = Kind("a whole number from 0 to 1000000", _whole(0, 1_000_000), _number, lambda value: value)
PORT: Kind[int] = Kind("a port, 0 to 65535", _whole(0, 65535), _number, lambda value: value)
PATH: Kind[Path] = _scalar("an absolute path", _path, str)
OPTIONAL_PATH: Kind[Path | None] = _scalar(
    "an absolute path, or an empty text", _optional_path, lambda path: "" if path is None else str(path)
)
SOCKET_PATH: Kind[Path] = _scalar(f"an absolute path of at most {SOCKET_PATH_MAX} bytes", _socket_path, str)
DURATION: Kind[float] = Kind(
    'seconds as a number, or a text such as "90s", "4h", "1m30s"', _duration, _number, _duration_toml
)
TIMEOUT: Kind[float] = Kind(
    'seconds above 0 as a number, or a text such as "90s", "4h", "1m30s"', _timeout, _number, _duration_toml
)
SIZE: Kind[int] = _sized('bytes as a number, or a text such as "16MiB"', _size)
GRPC_SIZE: Kind[int] = _sized("a size from 1MiB to 2GiB less a byte", _grpc_size)
LOG_SIZE: Kind[int] = _sized("0, or a size of 8192 bytes or more", _log_size)
ADDRESS: Kind[str] = _scalar("an IP address", _address)
LISTEN: Kind[str] = _scalar('"IP:PORT", "[IPv6]:PORT", an absolute path, or an empty text', _listen)
HTTP_URL: Kind[str] = _scalar('a URL such as "http://127.0.0.1:4317", or an empty text', _http_url)
CGROUP: Kind[str] = _scalar('an absolute path below the cgroup root such as "/crito", or an empty text', _cgroup)
TEXTS: Kind[tuple[str, ...]] = _texts("a list of texts that are not empty", _nonempty)
PATHS: Kind[tuple[Path, ...]] = _texts("a list of absolute paths", _path)
CAPABILITIES: Kind[tuple[str, ...]] = _texts('a list of capabilities such as "NET_RAW"', _capability)
ENVIRONMENT: Kind[tuple[tuple[str, str], ...]] = _texts('a list of "NAME=VALUE"', _pair, _joined)
SYSCTLS: Kind[tuple[tuple[str, str], ...]] = _texts('a list of "SYSCTL=VALUE"', _sysctl, _joined)
ULIMITS: Kind[tuple[Ulimit, ...]] = _texts('a list of "NAME=SOFT:HARD" such as "nofile=1024:524288"', _ulimit)
REGISTRY_LIMITS: Kind[tuple[RegistryLimit, ...]] = _texts(
    'a list of "HOST[:PORT] layers=COUNT rate=SIZE", one of the two at least', _registry_limit
)
