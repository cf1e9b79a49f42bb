"""GetContainerEvents through a real gRPC server, with a bus of the test's own."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest

from cri.api.runtime.v1 import api_pb2 as api
from cri.api.runtime.v1 import api_pb2_grpc
from cri.runtime_service.events import ContainerEvents
from cri.runtime_service.service import RuntimeService
from cri.server import Server
from cri.tracing import NoTracing
from oci.clock import Clock
from oci.events import Bus, Event, EventKind
from sandbox.sandbox import SandboxRecord
from sandbox.spec import SandboxSpec


class NoObserver:
    def observe(self, method: str, code: str, seconds: float) -> None:
        pass


class NoContainers:
    def of(self, sandbox_id: str) -> list[Any]:
        return []


class OneSandbox:
    """Whatever is asked for has the record of this moment."""

    def __init__(self) -> None:
        self.name = "first"
        self.asked = 0

    def record(self, id: str) -> SandboxRecord:
        self.asked += 1
        spec = SandboxSpec(self.name, "uid", "namespace", annotations={"large": "x" * 4096})
        return SandboxRecord(cast(Any, id), spec, "crun", "", "/", False, requested_at=1, ready_at=2)


def event(number: int) -> Event:
    return Event(EventKind.STARTED, f"c{number}", "pod", at=number + 1, record=None)


Streams = Callable[[], Awaitable[Any]]


@asynccontextmanager
async def serving(directory: Path, bus: Bus[Event], sandboxes: OneSandbox) -> AsyncIterator[Streams]:
    """What opens a stream of events that is listened to from then on."""
    events = ContainerEvents(bus, cast(Any, sandboxes), cast(Any, NoContainers()), Clock())
    service = RuntimeService.__new__(RuntimeService)  # GetContainerEvents needs nothing else
    service._events = events
    server = Server(directory / "s", NoObserver(), NoTracing(), 1 << 20, 1 << 20)
    api_pb2_grpc.add_RuntimeServiceServicer_to_server(service, server.grpc)
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{directory / 's'}") as channel:
        stub: Any = api_pb2_grpc.RuntimeServiceStub(channel)

        async def stream() -> Any:
            call = stub.GetContainerEvents(api.GetEventsRequest())
            await call.initial_metadata()
            return call

        yield stream
    await server.stop(0)


async def read(call: Any, count: int) -> list[api.ContainerEventResponse]:
    return [await call.read() for _ in range(count)]


def run(story: Any) -> None:
    asyncio.run(asyncio.wait_for(story, 60))


def test_an_event_tells_the_pod_as_it_was_however_late_it_is_read(tmp_path: Path) -> None:
    async def story() -> None:
        bus, sandboxes = Bus[Event](), OneSandbox()
        async with serving(tmp_path, bus, sandboxes) as stream:
            call = await stream()
            bus.publish(event(1))
            sandboxes.name = "second"
            bus.publish(event(2))

            found = await read(call, 2)

        assert [each.pod_sandbox_status.metadata.name for each in found] == ["first", "second"]
        assert [(each.container_id, each.created_at) for each in found] == [("c1", 2), ("c2", 3)]

    run(story())


def test_a_slow_listener_is_cut_off_with_an_error_and_a_quick_one_misses_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        bus = Bus[Event](queue_length=64)
        async with serving(tmp_path, bus, OneSandbox()) as stream:
            slow, quick = await stream(), await stream()
            seen = 0
            for number in range(4000):
                bus.publish(event(number))
                assert (await quick.read()).container_id == f"c{number}"
                seen += 1

            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await read(slow, 4000)

        assert seen == 4000
        assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "64 events behind" in (failure.value.details() or "")

    run(story())


def test_a_listener_that_hangs_up_is_forgotten(tmp_path: Path) -> None:
    async def story() -> None:
        bus = Bus[Event]()
        sandboxes = OneSandbox()
        async with serving(tmp_path, bus, sandboxes) as stream:
            call = await stream()
            bus.publish(event(1))
            assert sandboxes.asked == 1
            call.cancel()
            for number in range(100):
                before = sandboxes.asked
                bus.publish(event(number))
                if sandboxes.asked == before:
                    return
                await asyncio.sleep(0.05)
        raise AssertionError("events are still captured for it")

    run(story())


def test_listeners_are_told_that_the_daemon_stops(tmp_path: Path) -> None:
    async def story() -> None:
        bus = Bus[Event]()
        async with serving(tmp_path, bus, OneSandbox()) as stream:
            call = await stream()
            bus.publish(event(1))
            bus.close()

            assert (await call.read()).container_id == "c1"
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await call.read()

        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE

    run(story())
