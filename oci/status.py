"""What has happened to one container, as facts; its state follows from them."""

from dataclasses import dataclass, replace
from enum import StrEnum

from oci.container_spec import Resources
from oci.errors import FailedPrecondition

REASON_COMPLETED = "Completed"
REASON_ERROR = "Error"
REASON_OOM_KILLED = "OOMKilled"  # the CRI demands this very word
REASON_START_FAILED = "StartError"
REASON_MONITOR_LOST = "MonitorLost"
REASON_NODE_REBOOTED = "NodeRebooted"

EXIT_CODE_START_FAILED = 128
EXIT_CODE_UNKNOWN = 255


class ContainerState(StrEnum):
    CREATING = "creating"  # not shown to anybody: its record exists so that a crash can be undone
    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"
    UNKNOWN = "unknown"  # its record cannot be read: listed, to be stopped and removed


@dataclass(frozen=True, slots=True)
class ContainerStatus:
    """The facts of one container.

    Times are nanoseconds since the Unix epoch, the CRI's unit. None means "not yet".
    """

    created_at: int | None = None
    started_at: int | None = None
    finished_at: int | None = None
    pid: int = 0  # of the container's init, in the node's PID namespace; 0 before it was created
    pid_start_time: int = 0  # clock ticks after boot, /proc/PID/stat field 22: a pid is believed only with it
    exit_code: int = 0  # 0-255; 128 + N when signal N killed it
    reason: str = ""
    message: str = ""
    resources: Resources = Resources()  # those in force now
    is_unknown: bool = False

    @property
    def state(self) -> ContainerState:
        if self.finished_at is not None:
            return ContainerState.EXITED
        if self.is_unknown:
            return ContainerState.UNKNOWN
        if self.started_at is not None:
            return ContainerState.RUNNING
        if self.created_at is not None:
            return ContainerState.CREATED
        return ContainerState.CREATING


def with_creation(status: ContainerStatus, now: int, pid: int, pid_start_time: int) -> ContainerStatus:
    """The status once the OCI runtime has created the container's init."""
    return replace(status, created_at=now, pid=pid, pid_start_time=pid_start_time)


def with_start(status: ContainerStatus, now: int) -> ContainerStatus:
    """The status after a start at `now` (ns).

    Raises FailedPrecondition unless the state is CREATED: a container runs once.
    Source: OCI runtime-spec, runtime.md, "Start".
    """
    if status.state is not ContainerState.CREATED:
        raise FailedPrecondition(f"cannot start a container that is {status.state}")
    return replace(status, started_at=now)


def with_failed_start(status: ContainerStatus, now: int, message: str) -> ContainerStatus:
    """The status after the OCI runtime refused to start it: over, with the runtime's own words."""
    return replace(
        status, finished_at=now, exit_code=EXIT_CODE_START_FAILED, reason=REASON_START_FAILED, message=message
    )


def with_exit(
    status: ContainerStatus, finished_at: int, exit_code: int, oom_killed: bool = False, message: str = ""
) -> ContainerStatus:
    """The status after its init ended. The first end that is known stands: an exited container stays as it is."""
    if status.finished_at is not None:
        return status
    ended_by_itself = REASON_COMPLETED if exit_code == 0 else REASON_ERROR
    reason = REASON_OOM_KILLED if oom_killed else ended_by_itself
    return replace(status, finished_at=finished_at, exit_code=exit_code, reason=reason, message=message)


def with_lost_exit(status: ContainerStatus, now: int, reason: str, message: str) -> ContainerStatus:
    """The status after an end that nobody saw."""
    if status.finished_at is not None:
        return status
    return replace(status, finished_at=now, exit_code=EXIT_CODE_UNKNOWN, reason=reason, message=message)
