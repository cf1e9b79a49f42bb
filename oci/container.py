"""One container: what is recorded of it, and what of it lives in this process while it exists."""

import asyncio
from dataclasses import dataclass, replace

from oci.container_spec import ContainerId, ContainerSpec, SandboxId
from oci.linux.passwd import User
from oci.monitor_client import Monitor
from oci.status import ContainerState, ContainerStatus


@dataclass(frozen=True, slots=True)
class ContainerRecord:
    """Everything about a container that survives the daemon; written when it changes."""

    id: ContainerId
    sandbox_id: SandboxId
    spec: ContainerSpec
    image_id: str  # "sha256:…" of the image configuration
    image_ref: str  # how the status names it: "registry/name@sha256:…" where it has such a name
    image_mounts: tuple[tuple[str, str], ...]  # container path and image id of each image volume
    runtime_handler: str  # the handler's name, never ""
    log_path: str  # absolute; "" keeps no log
    cgroup_parent: str  # below which the container's cgroup is made, in the cgroup driver's form
    stop_signal: str
    rootfs: str  # mount point of the root filesystem
    requested_at: int  # ns since the epoch
    user: User | None = None
    status: ContainerStatus = ContainerStatus()
    cgroups_path: str = ""  # as the runtime-spec has it, where a hook has put the container elsewhere
    restored_from: str = ""  # the checkpoint whose processes it has, or will have once started
    in_sandbox: bool = False  # its process is that of the sandbox which the OCI runtime has made for the pod
    is_released: bool = False  # the OCI runtime's state, the cgroup and the mounts are gone
    is_removing: bool = False  # a remove was asked for: not listed any more, to be finished after a crash

    @property
    def state(self) -> ContainerState:
        return self.status.state

    @property
    def full_name(self) -> str:
        """What only one container may be called at a time."""
        return f"{self.sandbox_id}/{self.spec.name}/{self.spec.attempt}"


class Container:
    """A container in memory: its record, its monitor, and who waits for its end."""

    def __init__(self, record: ContainerRecord) -> None:
        self.record = record
        self.monitor: Monitor | None = None
        self.pidfd = -1  # of the init; open while it may be alive
        self.lock = asyncio.Lock()  # held around a transition, never across a wait for the exit
        self.settled = asyncio.Event()  # its creation has succeeded, or has failed and left nothing
        self.exited = asyncio.Event()
        self.released = asyncio.Event()
        self.stop_deadline: float | None = None  # event-loop time at which SIGTERM becomes SIGKILL
        self.stop_changed = asyncio.Event()  # the deadline was shortened
        self.stop_task: asyncio.Task[None] | None = None
        self.watch_task: asyncio.Task[None] | None = None
        if record.state is not ContainerState.CREATING:
            self.settled.set()
        if record.state is ContainerState.EXITED:
            self.exited.set()
        if record.is_released:
            self.released.set()

    @property
    def id(self) -> ContainerId:
        return self.record.id

    @property
    def state(self) -> ContainerState:
        return self.record.state

    @property
    def is_alive(self) -> bool:
        """Whether it has a process, started or not."""
        return self.state in (ContainerState.CREATED, ContainerState.RUNNING)

    @property
    def is_visible(self) -> bool:
        """Whether lists show it: not while it is being made, nor once its removal has begun."""
        return self.state is not ContainerState.CREATING and not self.record.is_removing

    def with_status(self, status: ContainerStatus) -> ContainerRecord:
        return replace(self.record, status=status)
