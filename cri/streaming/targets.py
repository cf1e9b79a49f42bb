"""What the daemon registers with the stream server: whose streams a URL is for. Plain values, sent as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ExecTarget:
    """A process to start in a container, by its monitor."""

    container_id: str
    monitor_directory: str
    process: Mapping[str, Any]  # an OCI process object; its `terminal` is `tty`
    tty: bool
    stdin: bool
    stdout: bool
    stderr: bool


@dataclass(frozen=True, slots=True)
class AttachTarget:
    """The streams of a container's own process."""

    container_id: str
    monitor_directory: str
    tty: bool  # the container's
    stdin: bool
    stdout: bool
    stderr: bool


@dataclass(frozen=True, slots=True)
class PortForwardTarget:
    """TCP ports of a pod, on its loopback addresses.

    `ips` are tried next, from the node: for a pod whose sandbox has a network stack of its own, behind its namespace.
    """

    sandbox_id: str
    netns: str  # path; "" is the node's network
    ports: tuple[int, ...]  # for clients whose protocol names none per connection
    ips: tuple[str, ...] = ()


Target = ExecTarget | AttachTarget | PortForwardTarget
KINDS: Mapping[str, type[Target]] = {"exec": ExecTarget, "attach": AttachTarget, "portforward": PortForwardTarget}


def kind_of(target: Target) -> str:
    """The path element of its URL."""
    return next(name for name, kind in KINDS.items() if isinstance(target, kind))
