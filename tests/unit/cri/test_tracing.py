"""What a collector gets to see of requests, over real sockets."""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from cri.api.runtime.v1 import api_pb2 as api
from cri.api.runtime.v1.api_pb2_grpc import (
    RuntimeServiceServicer,
    RuntimeServiceStub,
    add_RuntimeServiceServicer_to_server,
)
from cri.otlp import FLUSH_S, OtlpTracing
from cri.server import Server
from cri.tracing import NoTracing, Tracing, subject, tracing
from oci import trace
from oci.errors import NotFound
from oci.version import VERSION
from tests.fakes.collector import Collector, SilentCollector

ALL = 1_000_000
PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Uncounted:
    def observe(self, method: str, code: str, seconds: float) -> None:
        pass


class Pods(RuntimeServiceServicer):  # type: ignore[misc]  # generated without types
    """Takes two steps to stop a pod; of "missing" there is none, "stuck" never stops."""

    def __init__(self) -> None:
        self.stopping = asyncio.Event()

    async def StopPodSandbox(self, request: api.StopPodSandboxRequest, context: Any) -> api.StopPodSandboxResponse:
        with trace.step("detach", {"cni.plugin": "bridge"}):
            pass
        if request.pod_sandbox_id == "missing":
            raise NotFound("pod sandbox 'missing': there is none")
        self.stopping.set()
        with trace.step("end"):
            await asyncio.sleep(3600 if request.pod_sandbox_id == "stuck" else 0)
        return api.StopPodSandboxResponse()


async def stop_pods(directory: Path, traces: Tracing, *ids: str, metadata: Mapping[str, str] | None = None) -> None:
    service = Pods()
    server = Server(directory / "s", Uncounted(), traces, 1 << 20, 1 << 20)
    add_RuntimeServiceServicer_to_server(service, server.grpc)
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{directory / 's'}") as channel:
        stub: Any = RuntimeServiceStub(channel)
        for id in ids:
            call = stub.StopPodSandbox(
                api.StopPodSandboxRequest(pod_sandbox_id=id), metadata=tuple((metadata or {}).items())
            )
            if id == "stuck":
                await service.stopping.wait()
                call.cancel()
            await asyncio.wait([asyncio.ensure_future(call.code())])
    await server.stop(1)
    await traces.close()


def traced(directory: Path, *ids: str, rate: int = ALL, metadata: Mapping[str, str] | None = None) -> Collector:
    with Collector() as collector:

        async def run() -> None:
            await stop_pods(directory, OtlpTracing(collector.endpoint, rate), *ids, metadata=metadata)

        asyncio.run(run())
    return collector


def test_a_request_is_a_span_with_its_steps(tmp_path: Path) -> None:
    collector = traced(tmp_path, "web")

    request = collector.of("StopPodSandbox")
    assert request.name == "runtime.v1.RuntimeService/StopPodSandbox"
    assert request.parent_id == "" and request.error is None
    assert request.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": "runtime.v1.RuntimeService/StopPodSandbox",
        "crito.pod_sandbox.id": "web",
        "rpc.response.status_code": "OK",
    }
    assert request.resource["service.name"] == "crito" and request.resource["service.version"] == VERSION
    detach, end = collector.below(request)
    assert (detach.name, detach.parent_id, detach.attributes) == ("detach", request.id, {"cni.plugin": "bridge"})
    assert (end.name, end.parent_id) == ("end", request.id)
    assert request.started_at <= detach.started_at <= detach.ended_at <= end.ended_at <= request.ended_at


def test_a_failed_request_tells_its_code_and_text(tmp_path: Path) -> None:
    request = traced(tmp_path, "missing").of("StopPodSandbox")

    assert request.attributes["rpc.response.status_code"] == "NOT_FOUND"
    assert request.error == "pod sandbox 'missing': there is none"


def test_a_request_whose_caller_gave_up_says_where_it_was(tmp_path: Path) -> None:
    collector = traced(tmp_path, "stuck")

    request = collector.of("StopPodSandbox")
    assert request.attributes["rpc.response.status_code"] == "CANCELLED" and request.error == ""
    assert collector.below(request)[-1].name == "end"
    assert collector.below(request)[-1].attributes == {"crito.cancelled": True}


def test_a_caller_s_trace_goes_on_here(tmp_path: Path) -> None:
    trace_id, span_id = PARENT
    collector = traced(tmp_path, "web", rate=0, metadata={"traceparent": f"00-{trace_id}-{span_id}-01"})

    request = collector.of("StopPodSandbox")
    assert (request.trace_id, request.parent_id) == PARENT
    assert {span.trace_id for span in collector.spans} == {trace_id}


@pytest.mark.parametrize("metadata", [{}, {"traceparent": "00-{}-{}-01x".format(*PARENT)}])
def test_the_rate_decides_where_no_caller_does(tmp_path: Path, metadata: dict[str, str]) -> None:
    assert traced(tmp_path, "web", rate=0, metadata=metadata).spans == []
    assert len(traced(tmp_path, "web", rate=ALL, metadata=metadata).spans) == 3


def test_what_the_caller_does_not_keep_is_not_kept_here(tmp_path: Path) -> None:
    metadata = {"traceparent": "00-{}-{}-00".format(*PARENT)}

    assert traced(tmp_path, "web", rate=ALL, metadata=metadata).spans == []


def test_a_collector_that_never_answers_delays_neither_requests_nor_the_end(tmp_path: Path) -> None:
    with SilentCollector() as collector:

        async def run() -> float:
            traces = OtlpTracing(collector.endpoint, ALL)
            started = time.monotonic()
            await stop_pods(tmp_path, traces, *["web"] * 600)
            return time.monotonic() - started

        took_s = asyncio.run(run())

    assert took_s < FLUSH_S + 8


def test_without_an_endpoint_nothing_is_traced() -> None:
    traces = tracing("", ALL)

    assert isinstance(traces, NoTracing)
    with traces.request("runtime.v1.RuntimeService/Version", {}) as request:
        assert request.trace_id == ""


POD = api.PodSandboxConfig(metadata=api.PodSandboxMetadata(name="web", uid="u1", namespace="shop"))
OF_POD = {"k8s.pod.name": "web", "k8s.namespace.name": "shop", "k8s.pod.uid": "u1"}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (api.VersionRequest(), {}),
        (api.RunPodSandboxRequest(config=POD), OF_POD),
        (api.RunPodSandboxResponse(pod_sandbox_id="p1"), {"crito.pod_sandbox.id": "p1"}),
        (
            api.CreateContainerRequest(
                pod_sandbox_id="p1",
                config=api.ContainerConfig(
                    metadata=api.ContainerMetadata(name="main"), image=api.ImageSpec(image="shop:1")
                ),
                sandbox_config=POD,
            ),
            {**OF_POD, "crito.pod_sandbox.id": "p1", "k8s.container.name": "main", "container.image.name": "shop:1"},
        ),
        (api.StopContainerRequest(container_id="c1", timeout=3), {"container.id": "c1"}),
        (api.PullImageRequest(image=api.ImageSpec(image="shop:1")), {"container.image.name": "shop:1"}),
        (api.PullImageResponse(image_ref="sha256:1"), {"container.image.id": "sha256:1"}),
        (object(), {}),
    ],
)
def test_a_span_says_whom_it_is_about(message: Any, expected: dict[str, str]) -> None:
    assert subject(message) == expected
