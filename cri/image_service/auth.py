"""Who we are to a registry: the CRI's AuthConfig, and auth files as in containers-auth.json(5)."""

import asyncio
import base64
import binascii
import hashlib
import json
import logging
import re
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cri.image_service import reference as references
from cri.image_service.reference import Reference
from cri.image_service.registries_conf import AUTH_FILES, Endpoint
from oci import environment
from oci.errors import FailedPrecondition, InvalidArgument

log = logging.getLogger(__name__)

_HELPER_TIMEOUT_S = 30
# By which a helper says that it knows nothing of a server; whatever else it says when it fails is an error.
_NOT_FOUND = "credentials not found in native keychain"
_DOCKER_HUB_KEYS = ("docker.io", "index.docker.io", "registry-1.docker.io")
_DOCKER_HUB_URL = "https://index.docker.io/v1/"  # the key under which Docker's own helpers keep it
_NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_LEFT_BEHIND_S = 60.0


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the CRI's AuthConfig carries; the secret fields never appear in a repr, hence in no log."""

    username: str = ""
    password: str = field(default="", repr=False)
    auth: str = field(default="", repr=False)  # base64 of "username:password"
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)
    server_address: str = ""

    @property
    def is_empty(self) -> bool:
        return not (self.username or self.password or self.auth or self.identity_token or self.registry_token)

    def basic(self) -> tuple[str, str]:
        """Username and password, decoded from `auth` where only that is set; ("", "") for none.

        Raises InvalidArgument, without the secret in its text, where `auth` cannot be decoded.
        """
        if self.username or not self.auth:
            return self.username, self.password
        return _decoded(self.auth, "the pull's AuthConfig")

    def to_json(self) -> dict[str, str]:
        """The form that a worker reads."""
        username, password = self.basic()
        return {
            "username": username,
            "password": password,
            "identity_token": self.identity_token,
            "registry_token": self.registry_token,
        }


@dataclass(frozen=True, slots=True)
class AuthFile:
    """What a containers-auth.json(5) says; the content never appears in a repr."""

    path: Path
    content: Mapping[str, Any] = field(repr=False)


async def for_endpoint(
    endpoint: Endpoint,
    registry: str,
    given: Credentials | None,
    auth_file: AuthFile | Path | None,
    helpers: Sequence[str] = (AUTH_FILES,),
) -> Credentials | None:
    """The credentials to use at `endpoint` for an image of `registry`; None is anonymous.

    Those that came with the pull are for the image's own registry, or for the server address that they name; they are
    never shown to a mirror on another host. Else `helpers` are asked in turn (registries.conf, credential-helpers),
    among which AUTH_FILES is the auth file: there the longest match is taken.
    """
    if given is not None and not given.is_empty:
        meant_for = _host_of(given.server_address) if given.server_address else registry
        if _same_registry(meant_for, endpoint.host):
            return given
    for helper in helpers:
        if helper != AUTH_FILES:
            found = await _ask_helper(helper, endpoint.host)
        elif auth_file is not None:
            read = await asyncio.to_thread(_read, auth_file) if isinstance(auth_file, Path) else auth_file
            found = await _from_file(read, endpoint)
        else:
            found = None
        if found is not None:
            return found
    return None


async def _from_file(file: AuthFile, endpoint: Endpoint) -> Credentials | None:
    """A helper for this registry decides alone; else an entry with a secret in it, else the store of all secrets."""
    helper = _longest(file.content.get("credHelpers", {}), endpoint)
    if isinstance(helper, str) and helper:
        return await _ask_helper(helper, endpoint.host)
    entry = _longest(file.content.get("auths", {}), endpoint)
    known = _from_entry(entry, file.path) if isinstance(entry, dict) else None
    store = file.content.get("credsStore")
    if known is not None or not store:
        return known
    if shutil.which(f"docker-credential-{store}") is None:  # as of a config.json from where there is one
        log.warning("%s names the store docker-credential-%s, which is not in PATH: it is not asked", file.path, store)
        return None
    return await _ask_helper(store, endpoint.host)


def _read(path: Path) -> AuthFile:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return AuthFile(path, {})
    except (OSError, ValueError) as error:
        raise FailedPrecondition(f"cannot read auth file {path}: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise FailedPrecondition(f"auth file {path} must be an object")
    for section in ("auths", "credHelpers"):
        if not isinstance(content.get(section, {}), dict):
            raise FailedPrecondition(f"auth file {path}: {section} must be an object")
    if not isinstance(content.get("credsStore", ""), str):
        raise FailedPrecondition(f"auth file {path}: credsStore must be a text")
    return AuthFile(path, content)


class NamespacedAuth:
    """Auth files for one pull each: directory/NAMESPACE-<sha256 of the image's name>.json, as CRI-O takes them.

    A credential provider of kubelet's writes one before each pull. Taking a file removes it from the disk. Synchronous.
    Source: CRI-O, crio.conf(5), namespaced_auth_dir; crio-credential-provider, "auth.FilePath".
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._taken = directory / "in-use"

    def path(self, namespace: str, image: Reference) -> Path:
        """The name is without tag and digest, and Docker Hub's where it names no registry."""
        full = references.with_registry(image, references.DOCKER_HUB) if image.is_short else image
        return self._directory / f"{namespace}-{hashlib.sha256(full.name.encode()).hexdigest()}.json"

    def take(self, namespace: str, image: Reference) -> AuthFile | None:
        """The file for a pull of `image` in `namespace`; None where there is none. It is gone then, also when broken.

        Raises FailedPrecondition where it makes no sense.
        """
        if not _NAMESPACE.fullmatch(namespace):
            return None
        path = self.path(namespace, image)
        if not path.exists():
            return None
        self._taken.mkdir(mode=0o700, exist_ok=True)
        mine = self._taken / f"{path.stem}-{secrets.token_hex(8)}.json"
        try:
            path.rename(mine)
        except FileNotFoundError:  # another pull was faster
            return None
        try:
            return replace(_read(mine), path=path)
        finally:
            mine.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes what a daemon that was killed amid `take` has left."""
        with suppress(OSError):
            for path in self._taken.iterdir():
                if time.time() - path.lstat().st_ctime > _LEFT_BEHIND_S:
                    path.unlink()


def _longest(entries: Mapping[str, Any], endpoint: Endpoint) -> object:
    """The entry for the repository, its namespaces, or its registry: the longest match wins."""
    by_key = {_normalized(key): value for key, value in entries.items()}
    parts = endpoint.repository.split("/")
    for length in range(len(parts), -1, -1):
        for host in _names_of(endpoint.host):
            found = by_key.get("/".join([host, *parts[:length]]))
            if found is not None:
                return found
    return None


def _normalized(key: str) -> str:
    """An auth file's key as host[:port][/path]; Docker's config.json writes URLs, such as https://index.docker.io/v1/."""
    if "://" not in key:
        return key.rstrip("/")
    return _host_of(key)


def _host_of(address: str) -> str:
    return address.partition("://")[2].partition("/")[0] if "://" in address else address.partition("/")[0]


def _names_of(host: str) -> tuple[str, ...]:
    return _DOCKER_HUB_KEYS if host in _DOCKER_HUB_KEYS else (host,)


def _same_registry(one: str, other: str) -> bool:
    return other in _names_of(one)


def _from_entry(entry: Mapping[str, Any], path: Path) -> Credentials | None:
    username, password = entry.get("username", ""), entry.get("password", "")
    if entry.get("auth"):
        username, password = _decoded(str(entry["auth"]), f"auth file {path}")
    found = Credentials(
        username=username,
        password=password,
        identity_token=entry.get("identitytoken", ""),
        registry_token=entry.get("registrytoken", ""),
    )
    return None if found.is_empty else found


def _decoded(auth: str, source: str) -> tuple[str, str]:
    try:
        username, colon, password = base64.b64decode(auth, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        raise InvalidArgument(f"{source}: auth is not base64 of username:password") from None
    if not colon:
        raise InvalidArgument(f"{source}: auth is not base64 of username:password")
    return username, password.rstrip("\0")


async def _ask_helper(name: str, host: str) -> Credentials | None:
    """What `docker-credential-<name> get` says of `host`; raises FailedPrecondition with its words where it fails.

    Source: docker-credential-helpers, the "get" protocol and credentials/error.go.
    """
    program = shutil.which(f"docker-credential-{name}")
    if program is None or "/" in name:
        raise FailedPrecondition(f"credential helper docker-credential-{name} for registry {host} is not in PATH")
    found = await _helper_says(program, host)
    if found is None and host in _DOCKER_HUB_KEYS:
        found = await _helper_says(program, _DOCKER_HUB_URL)
    return found


async def _helper_says(program: str, server: str) -> Credentials | None:
    process = await asyncio.create_subprocess_exec(
        program,
        "get",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment.inherited(),
    )
    try:
        async with asyncio.timeout(_HELPER_TIMEOUT_S):
            answer, complaints = await process.communicate(server.encode())
    except TimeoutError as error:
        raise FailedPrecondition(
            f"credential helper {program} did not answer for {server} in {_HELPER_TIMEOUT_S} s"
        ) from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        said = (answer.strip() or complaints.strip()).decode(errors="replace")
        if said == _NOT_FOUND:
            return None
        raise FailedPrecondition(
            f"credential helper {program} failed for {server}: {said[:500] or 'it does not say why'}"
        )
    try:
        content = json.loads(answer)
        username, secret = str(content["Username"]), str(content["Secret"])
    except (ValueError, KeyError, TypeError):
        raise FailedPrecondition(f"credential helper {program} answered no Username and Secret for {server}") from None
    if username == "<token>":
        return Credentials(identity_token=secret)
    return Credentials(username=username, password=secret)
