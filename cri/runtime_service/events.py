"""GetContainerEvents: what happens, with the pod's and its containers' states as they are then."""

from collections.abc import AsyncIterator

from cri.api.runtime.v1 import api_pb2 as api
from cri.runtime_service import to_cri
from oci.clock import Clock
from oci.containers import Containers
from oci.events import Bus, Event
from sandbox.sandboxes import Sandboxes


class ContainerEvents:
    def __init__(self, bus: Bus[Event], sandboxes: Sandboxes, containers: Containers, clock: Clock) -> None:
        self._bus = bus
        self._sandboxes = sandboxes
        self._containers = containers
        self._clock = clock

    def now(self) -> int:
        """A time (ns) that is later than every event so far and earlier than all to come."""
        return self._clock.now()

    async def listen(self) -> AsyncIterator[api.ContainerEventResponse]:
        """Every event from now on, in the order in which they happened."""
        async for event in self._bus.listen():
            yield self._response(event)

    def _response(self, event: Event) -> api.ContainerEventResponse:
        sandbox = self._sandboxes.find(event.sandbox_id)
        return api.ContainerEventResponse(
            container_id=event.id,
            container_event_type=to_cri.event_type(event.kind),
            created_at=event.at,
            pod_sandbox_status=to_cri.sandbox_status(sandbox.record) if sandbox else None,
            containers_statuses=self.container_statuses(event.sandbox_id),
        )

    def container_statuses(self, sandbox_id: str) -> list[api.ContainerStatus]:
        return [
            to_cri.container_status(container.record)
            for container in self._containers.all()
            if container.record.sandbox_id == sandbox_id
        ]
