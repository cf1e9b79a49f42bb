"""Where an image is fetched from: containers-registries.conf(5), versions 2 and 1, with its drop-ins."""

import logging
import threading
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cri.image_service import reference as references
from cri.image_service.reference import DOCKER_HUB, Reference
from oci.errors import Error, FailedPrecondition, InvalidArgument, PermissionDenied

log = logging.getLogger(__name__)

AUTH_FILES = "containers-auth.json"  # the credential helper that stands for auth files


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One physical place to ask for an image: registry host[:port] and repository there."""

    host: str
    repository: str
    insecure: bool = False


@dataclass(frozen=True, slots=True)
class Mirror:
    location: str
    insecure: bool = False
    pull_from_mirror: str = "all"  # all, digest-only, tag-only

    def serves(self, reference: Reference) -> bool:
        wanted = "digest-only" if reference.digest else "tag-only"
        return self.pull_from_mirror in ("all", wanted)


@dataclass(frozen=True, slots=True)
class Registry:
    """One [[registry]] table."""

    prefix: str
    location: str = ""
    insecure: bool = False
    blocked: bool = False
    mirrors: tuple[Mirror, ...] = ()

    def covers(self, reference: Reference) -> int:
        """How many characters of the reference this table's prefix stands for; 0 where it does not apply."""
        text = str(reference)
        if self.prefix.startswith("*."):
            host = reference.registry.partition(":")[0]
            return len(host) if host.endswith(self.prefix[1:]) else 0
        if text == self.prefix or (text.startswith(self.prefix) and text[len(self.prefix)] in "/:@"):
            return len(self.prefix)
        return 0


@dataclass(frozen=True, slots=True)
class RegistriesConf:
    unqualified_search: tuple[str, ...] | None = None  # None: no file says; then Docker Hub, as other runtimes do
    short_name_mode: str = "permissive"
    aliases: Mapping[str, str] = field(default_factory=dict)
    registries: tuple[Registry, ...] = ()
    credential_helpers: tuple[str, ...] = (AUTH_FILES,)  # in the order to ask

    def qualified(self, reference: Reference) -> tuple[Reference, ...]:
        """The full references that a short name may mean, in the order to try; itself where it names a registry.

        Raises InvalidArgument where the configuration gives a short name no meaning, or (enforcing) several.
        """
        if not reference.is_short:
            return (reference,)
        alias = self.aliases.get(reference.repository)
        if alias:
            return (replace(references.parse(alias), tag=reference.tag, digest=reference.digest),)
        registries = (DOCKER_HUB,) if self.unqualified_search is None else self.unqualified_search
        if not registries:
            raise InvalidArgument(
                f"image reference {str(reference)!r} names no registry, and no alias or unqualified-search-registries "
                "in registries.conf tells one"
            )
        if self.short_name_mode == "enforcing" and len(registries) > 1:
            raise InvalidArgument(
                f"image reference {str(reference)!r} names no registry, and short-name-mode enforcing in "
                f"registries.conf does not choose among {', '.join(registries)}"
            )
        return tuple(references.with_registry(reference, registry) for registry in registries)

    def endpoints(self, reference: Reference) -> tuple[Endpoint, ...]:
        """Where to ask for `reference`, in order: the mirrors that serve it, then the primary location.

        Raises PermissionDenied where the registry is blocked.
        """
        registry = self._table(reference)
        if registry is None:
            return (Endpoint(reference.registry, reference.repository),)
        if registry.blocked:
            raise PermissionDenied(f"registry {registry.prefix} of image {reference} is blocked in registries.conf")
        covered = registry.covers(reference)
        mirrors = [
            _rewritten(reference, covered, mirror.location, mirror.insecure)
            for mirror in registry.mirrors
            if mirror.serves(reference)
        ]
        return (*mirrors, _rewritten(reference, covered, registry.location, registry.insecure))

    def _table(self, reference: Reference) -> Registry | None:
        matching = (registry for registry in self.registries if registry.covers(reference))
        return max(matching, key=lambda registry: len(registry.prefix), default=None)


def _rewritten(reference: Reference, covered: int, location: str, insecure: bool) -> Endpoint:
    if not location:
        return Endpoint(reference.registry, reference.repository, insecure)
    name = location + str(reference)[covered:]
    host, _, path = name.partition("/")
    path = path.partition("@")[0]
    path = path.rpartition(":")[0] if ":" in path else path
    if not path:
        raise FailedPrecondition(f"registries.conf: location {location!r} makes no repository of image {reference}")
    return Endpoint(host, path, insecure)


class RegistriesFiles:
    """The configuration in force: main file and drop-ins, read anew when one of them has changed.

    A file that becomes unreadable or wrong leaves the last good configuration in force, with one line in the log.
    """

    def __init__(self, path: Path | None, directory: Path | None) -> None:
        self._path = path
        self._directory = directory
        self._reading = threading.Lock()  # pulls ask from several threads at once
        self._seen: object = None
        self._good: RegistriesConf | None = None
        self._error: Error | None = None

    def current(self) -> RegistriesConf:
        """Raises FailedPrecondition naming file and key where no good configuration was ever read. Reads files."""
        paths = self._paths()
        seen = [(path, _signature(path)) for path in paths]
        with self._reading:
            if seen != self._seen:
                self._read(paths)
                self._seen = seen
        if self._good is None:
            raise self._error or FailedPrecondition("registries.conf was not read")
        return self._good

    def last(self) -> RegistriesConf:
        """What was read last, without looking at the files."""
        return self._good or RegistriesConf()

    def _read(self, paths: list[Path]) -> None:
        try:
            self._good = load(paths)
        except Error as error:
            self._error = error
            if self._good is not None:
                log.error("%s; the last good configuration stays in force", error)

    def _paths(self) -> list[Path]:
        main = [self._path] if self._path is not None and self._path.exists() else []
        if self._directory is None or not self._directory.is_dir():
            return main
        return main + sorted(path for path in self._directory.iterdir() if path.suffix == ".conf" and path.is_file())


def _signature(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def load(paths: list[Path]) -> RegistriesConf:
    """The configuration of `paths`, later ones winning. Raises FailedPrecondition with file, key and expectation."""
    conf = RegistriesConf()
    for path in paths:
        try:
            conf = _merged(conf, _Table(path, "", tomllib.loads(path.read_text())))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise FailedPrecondition(f"cannot read {path}: {error}") from error
    return conf


def _merged(conf: RegistriesConf, table: "_Table") -> RegistriesConf:
    if table.has("registries"):
        return _merged_v1(conf, table.table("registries"))
    mode = table.text("short-name-mode") or conf.short_name_mode
    if mode not in ("enforcing", "permissive", "disabled"):
        raise table.wrong("short-name-mode", "enforcing, permissive or disabled")
    search = table.places("unqualified-search-registries") if table.has("unqualified-search-registries") else None
    by_prefix = {registry.prefix: registry for registry in conf.registries}
    for each in table.tables("registry"):
        registry = _registry(each)
        by_prefix[registry.prefix] = registry
    return RegistriesConf(
        unqualified_search=conf.unqualified_search if search is None else search,
        short_name_mode=mode,
        aliases=_aliases(conf.aliases, table.table("aliases")) if table.has("aliases") else conf.aliases,
        registries=tuple(by_prefix.values()),
        credential_helpers=table.texts("credential-helpers") or conf.credential_helpers,
    )


def _merged_v1(conf: RegistriesConf, table: "_Table") -> RegistriesConf:
    def listed(name: str) -> tuple[str, ...]:
        return table.table(name).texts("registries") if table.has(name) else ()

    insecure, blocked = listed("insecure"), listed("block")
    made = tuple(
        Registry(name, name, insecure=name in insecure, blocked=name in blocked)
        for name in dict.fromkeys(insecure + blocked)
    )
    return replace(conf, unqualified_search=listed("search"), registries=conf.registries + made)


def _registry(table: "_Table") -> Registry:
    location = table.place("location")
    prefix = table.place("prefix") or location
    if not prefix:
        raise table.wrong("location", "prefix or location, one of them not empty")
    if "*" in prefix and (not prefix.startswith("*.") or "*" in prefix[1:] or any(c in prefix for c in "/:@")):
        raise table.wrong("prefix", "a wildcard only as in *.example.com")
    if not location and not prefix.startswith("*."):
        raise table.wrong("location", "host[:port][/path] (only a wildcard prefix may go without)")
    digest_only = table.flag("mirror-by-digest-only")
    return Registry(
        prefix=prefix,
        location=location,
        insecure=table.flag("insecure"),
        blocked=table.flag("blocked"),
        mirrors=tuple(_mirror(each, digest_only) for each in table.tables("mirror")),
    )


def _mirror(table: "_Table", digest_only: bool) -> Mirror:
    location = table.place("location")
    if not location:
        raise table.wrong("location", "host[:port][/path]")
    use = table.text("pull-from-mirror")
    if use and digest_only:
        raise table.wrong("pull-from-mirror", "nothing where the registry has mirror-by-digest-only")
    if use not in ("", "all", "digest-only", "tag-only"):
        raise table.wrong("pull-from-mirror", "all, digest-only or tag-only")
    return Mirror(location, table.flag("insecure"), "digest-only" if digest_only else use or "all")


def _aliases(known: Mapping[str, str], table: "_Table") -> dict[str, str]:
    aliases = dict(known)
    for name in table:
        value = table.text(name)
        if not value:
            aliases.pop(name, None)
            continue
        try:
            target = references.parse(value)
        except InvalidArgument as error:
            raise table.wrong(name, f"a full image name without tag and digest ({error})") from error
        if target.is_short or target.tag or target.digest:
            raise table.wrong(name, "a full image name without tag and digest")
        aliases[name] = value
    return aliases


class _Table:
    """A TOML table that knows where it stands, for errors that name file and key."""

    def __init__(self, path: Path, where: str, values: Mapping[str, Any]) -> None:
        self._path = path
        self._where = where
        self._values = values

    def has(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def text(self, key: str) -> str:
        value = self._values.get(key, "")
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def place(self, key: str) -> str:
        """A text that names a registry, or a part of one, as host[:port][/path]."""
        return self._place(key, self.text(key))

    def places(self, key: str) -> tuple[str, ...]:
        return tuple(self._place(key, value) for value in self.texts(key))

    def _place(self, key: str, value: str) -> str:
        if "://" in value:
            raise self.wrong(key, "host[:port][/path] without a scheme")
        return value.rstrip("/")

    def flag(self, key: str) -> bool:
        value = self._values.get(key, False)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.wrong(key, "a list of texts")
        return tuple(value)

    def table(self, key: str) -> "_Table":
        value = self._values.get(key, {})
        if not isinstance(value, dict):
            raise self.wrong(key, "a table")
        return _Table(self._path, f"{self._where}{key}.", value)

    def tables(self, key: str) -> "list[_Table]":
        value = self._values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise self.wrong(key, f"tables, as in [[{key}]]")
        return [_Table(self._path, f"{self._where}{key}[{index}].", each) for index, each in enumerate(value)]

    def wrong(self, key: str, expectation: str) -> FailedPrecondition:
        seen = self._values.get(key)
        return FailedPrecondition(f"{self._path}: {self._where}{key} is {seen!r}; expected {expectation}")
