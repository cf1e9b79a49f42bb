"""Who we are to a registry: the CRI's AuthConfig, and auth files as in containers-auth.json(5)."""

import asyncio
import base64
import binascii
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cri.image_service.registries_conf import Endpoint
from oci.errors import FailedPrecondition, InvalidArgument

_HELPER_TIMEOUT_S = 30
_DOCKER_HUB_KEYS = ("docker.io", "index.docker.io", "registry-1.docker.io")


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


async def for_endpoint(
    endpoint: Endpoint, registry: str, given: Credentials | None, auth_file: Path | None
) -> Credentials | None:
    """The credentials to use at `endpoint` for an image of `registry`; None is anonymous.

    Those that came with the pull are for the image's own registry, or for the server address that they name; they are
    never shown to a mirror on another host. Else the auth file's longest match is taken.
    """
    if given is not None and not given.is_empty:
        meant_for = _host_of(given.server_address) if given.server_address else registry
        if _same_registry(meant_for, endpoint.host):
            return given
    if auth_file is None:
        return None
    entries = await asyncio.to_thread(_read, auth_file)
    helper = _longest(entries.get("credHelpers", {}), endpoint)
    if isinstance(helper, str) and helper:
        return await _ask_helper(helper, endpoint.host)
    entry = _longest(entries.get("auths", {}), endpoint)
    return _from_entry(entry, auth_file) if isinstance(entry, dict) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise FailedPrecondition(f"cannot read auth file {path}: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise FailedPrecondition(f"auth file {path} must be an object")
    for section in ("auths", "credHelpers"):
        if not isinstance(content.get(section, {}), dict):
            raise FailedPrecondition(f"auth file {path}: {section} must be an object")
    return content


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
    """What `docker-credential-<name> get` says of `host`. Source: docker-credential-helpers, the "get" protocol."""
    program = shutil.which(f"docker-credential-{name}")
    if program is None or "/" in name:
        raise FailedPrecondition(f"credential helper docker-credential-{name} for registry {host} is not in PATH")
    process = await asyncio.create_subprocess_exec(
        program,
        "get",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ},
    )
    try:
        async with asyncio.timeout(_HELPER_TIMEOUT_S):
            answer, _ = await process.communicate(host.encode())
    except TimeoutError as error:
        raise FailedPrecondition(
            f"credential helper {program} did not answer for {host} in {_HELPER_TIMEOUT_S} s"
        ) from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        return None  # the helper's way to say that it knows nothing of this host
    try:
        content = json.loads(answer)
        username, secret = str(content["Username"]), str(content["Secret"])
    except (ValueError, KeyError, TypeError):
        raise FailedPrecondition(f"credential helper {program} answered no Username and Secret for {host}") from None
    if username == "<token>":
        return Credentials(identity_token=secret)
    return Credentials(username=username, password=secret)
