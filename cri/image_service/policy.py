"""Which images may be taken: containers-policy.json(5), of which this build knows what needs no signature."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cri.image_service.reference import Reference
from oci.errors import PermissionDenied

SYSTEM_POLICY = Path("/etc/containers/policy.json")  # where containers-policy.json(5) says; nodes may have none
_KNOWN_TYPES = ("insecureAcceptAnything", "reject", "signedBy", "sigstoreSigned")


def check(path: Path | None, transport: str, scopes: list[str], subject: str) -> None:
    """Raises PermissionDenied starting "SignatureValidationFailed" unless the policy at `path` accepts the image.

    `scopes` are the image's own, most specific first. No path means that nothing is required, and so does a node
    without the system's file; a file elsewhere that is missing, any that is wrong or asks for signatures, refuses.
    """
    if path is None or (path == SYSTEM_POLICY and not os.path.lexists(path)):
        return
    for requirement in _requirements(path, _read(path), transport, scopes):
        kind = requirement.get("type") if isinstance(requirement, dict) else None
        if kind == "insecureAcceptAnything":
            continue
        if kind == "reject":
            raise _denied(f"{path} rejects {subject}")
        if kind in _KNOWN_TYPES:
            raise _denied(f"{path} requires {kind} for {subject}, which is not supported by this build")
        raise _denied(f"{path} has a requirement of unknown type {kind!r}")


def registry_scopes(reference: Reference) -> list[str]:
    """The scopes of a registry's image, most specific first: reference, repository, namespaces, host, wildcards."""
    scopes = [f"{reference.name}@{reference.digest}"] if reference.digest else []
    if reference.tag and not reference.digest:
        scopes.append(reference.tagged)
    parts = reference.name.split("/")
    scopes += ["/".join(parts[:length]) for length in range(len(parts), 0, -1)]
    labels = reference.registry.partition(":")[0].split(".")
    scopes += ["*." + ".".join(labels[start:]) for start in range(1, len(labels))]
    return scopes


def file_scopes(path: Path) -> list[str]:
    """The scopes of an image from a local file or directory: its path and the directories above it."""
    resolved = path.resolve()
    return [str(resolved), *(str(parent) for parent in resolved.parents if str(parent) != "/")]


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(), object_pairs_hook=_without_duplicates)
    except (OSError, ValueError) as error:
        raise _denied(f"cannot read policy {path}: {error}") from error
    if not isinstance(content, dict) or set(content) - {"default", "transports"} or "default" not in content:
        raise _denied(f'policy {path} must be an object of "default" and, if wanted, "transports"')
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"a key is there twice among {', '.join(map(repr, keys))}")
    return dict(pairs)


def _requirements(path: Path, content: Mapping[str, Any], transport: str, scopes: list[str]) -> list[Any]:
    transports = content.get("transports", {})
    by_scope = transports.get(transport, {}) if isinstance(transports, dict) else None
    if not isinstance(by_scope, dict):
        raise _denied(f"policy {path}: transports must be objects of scopes")
    for scope in (*scopes, ""):
        if scope in by_scope:
            found = by_scope[scope]
            break
    else:
        found = content["default"]
    if not isinstance(found, list) or not found:
        raise _denied(f"policy {path}: requirements must be a list that is not empty")
    return found


def _denied(why: str) -> PermissionDenied:
    return PermissionDenied(f"SignatureValidationFailed: {why}")
