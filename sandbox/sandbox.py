"""One pod sandbox: what is recorded of it, and what of it lives in this process while it exists."""

import asyncio
from dataclasses import dataclass
from enum import StrEnum

from oci.container_spec import Resources, SandboxId
from sandbox.network.pod_network import Attachment
from sandbox.spec import SandboxSpec


class SandboxState(StrEnum):
    CREATING = "creating"  # not shown to anybody: its record exists so that a crash can be undone
    READY = "ready"
    NOT_READY = "not ready"


@dataclass(frozen=True, slots=True)
class SandboxRecord:
    """Everything about a pod sandbox that survives the daemon; written when it changes.

    Times are nanoseconds since the Unix epoch; None means "not yet".
    """

    id: SandboxId
    spec: SandboxSpec
    runtime_handler: str  # the handler's name, never ""
    hostname: str
    cgroup_parent: str  # where the pod's containers go; our own where the spec names none
    owns_cgroup_parent: bool
    requested_at: int
    pause_pid: int = 0  # 0 where no pause is kept
    pause_start_time: int = 0
    attachments: tuple[Attachment, ...] = ()
    ips: tuple[str, ...] = ()
    resources: Resources = Resources()  # the pod's, as last told by kubelet
    overhead: Resources = Resources()
    ready_at: int | None = None
    lost_at: int | None = None  # its pause ended, or the node rebooted
    stopped_at: int | None = None  # no process, no network any more; files and records stay until the removal
    is_removing: bool = False
    runtime_sandbox: bool = False  # the OCI runtime makes it, and its process stands for the pause

    @property
    def state(self) -> SandboxState:
        if self.stopped_at is not None or self.lost_at is not None:
            return SandboxState.NOT_READY
        return SandboxState.CREATING if self.ready_at is None else SandboxState.READY

    @property
    def full_name(self) -> str:
        """What only one pod sandbox may be called at a time."""
        return f"{self.spec.namespace}/{self.spec.name}/{self.spec.uid}/{self.spec.attempt}"


class Sandbox:
    """A pod sandbox in memory: its record, and what watches its pause."""

    def __init__(self, record: SandboxRecord) -> None:
        self.record = record
        self.lock = asyncio.Lock()  # held around a transition
        self.pause_pidfd = -1  # open while the pause may be alive

    @property
    def id(self) -> SandboxId:
        return self.record.id

    @property
    def state(self) -> SandboxState:
        return self.record.state

    @property
    def is_visible(self) -> bool:
        """Whether lists show it: not while it is being made, nor once its removal has begun."""
        return self.state is not SandboxState.CREATING and not self.record.is_removing
