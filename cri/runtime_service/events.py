"""GetContainerEvents: what happens, with the pod's and its containers' states as they are then."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cri.api.runtime.v1 import api_pb2 as api
from cri.runtime_service import to_cri
from oci.clock import Clock
from oci.container import ContainerRecord
from oci.container_spec import SandboxId
from oci.containers import Containers
from oci.errors import Unavailable
from oci.events import Bus, Event
from oci.status import ContainerState
from sandbox.sandbox import SandboxRecord
from sandbox.sandboxes import Sandboxes


@dataclass(frozen=True, slots=True)
class _Moment:
    """An event with what was recorded of the whole pod just then; records are frozen, so this copies nothing."""

    event: Event
    sandbox: SandboxRecord | None
    containers: tuple[ContainerRecord, ...]


class ContainerEvents:
    def __init__(self, bus: Bus[Event], sandboxes: Sandboxes, containers: Containers, clock: Clock) -> None:
        self._sandboxes = sandboxes
        self._containers = containers
        self._clock = clock
        self._moments = bus.derived(self._capture)

    def now(self) -> int:
        """A time (ns) that is later than every event so far and earlier than all to come."""
        return self._clock.now()

    @contextmanager
    def subscribed(self) -> Iterator[AsyncIterator[api.ContainerEventResponse]]:
        """Every event from now on, in the order in which they happened.

        Raises, while reading, ResourceExhausted when the reader fell too far behind, Unavailable when the daemon stops.
        """
        with self._moments.subscribed() as moments:
            yield _responses(moments)

    def container_statuses(self, sandbox_id: SandboxId) -> list[api.ContainerStatus]:
        """The pod's containers as lists show them now."""
        return [to_cri.container_status(each.record) for each in self._containers.of(sandbox_id) if each.is_visible]

    def _capture(self, event: Event) -> _Moment:
        """Containers count from their creation to their deletion, also while they are being removed.

        So a pod's STOPPED and DELETED events come with the pod's status, without which kubelet drops them.
        """
        sandbox_id = SandboxId(event.sandbox_id)
        if isinstance(event.record, SandboxRecord):
            sandbox: SandboxRecord | None = event.record
        else:
            sandbox = self._sandboxes.record(sandbox_id)
        containers = (each.record for each in self._containers.of(sandbox_id))
        return _Moment(event, sandbox, tuple(each for each in containers if each.state is not ContainerState.CREATING))


async def _responses(moments: AsyncIterator[_Moment]) -> AsyncIterator[api.ContainerEventResponse]:
    async for moment in moments:
        yield api.ContainerEventResponse(
            container_id=moment.event.id,
            container_event_type=to_cri.event_type(moment.event.kind),
            created_at=moment.event.at,
            pod_sandbox_status=to_cri.sandbox_status(moment.sandbox) if moment.sandbox else None,
            containers_statuses=[to_cri.container_status(each) for each in moment.containers],
        )
    raise Unavailable("the daemon is stopping: list, then listen again")
