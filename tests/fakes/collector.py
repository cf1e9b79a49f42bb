"""A collector of traces on loopback: takes OTLP over gRPC, and keeps what it is sent."""

import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)


@dataclass(frozen=True, slots=True)
class Taken:
    """One span. Ids are hex digits, times nanoseconds since the epoch; `error` is None unless the status is ERROR."""

    name: str
    trace_id: str
    id: str
    parent_id: str
    started_at: int
    ended_at: int
    attributes: dict[str, Any]
    error: str | None
    resource: dict[str, Any]


@dataclass
class Collector(TraceServiceServicer):
    """Use with `with`."""

    spans: list[Taken] = field(default_factory=list)

    def __enter__(self) -> "Collector":
        self._server = grpc.server(ThreadPoolExecutor(2))
        add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.stop(0).wait()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def Export(self, request: Any, context: Any) -> Any:
        for group in request.resource_spans:
            resource = _plain(group.resource.attributes)
            self.spans += [_taken(span, resource) for scope in group.scope_spans for span in scope.spans]
        return otlp.ExportTraceServiceResponse()

    def of(self, method: str) -> Taken:
        """The span of the only call of an RPC, as "RunPodSandbox"."""
        (found,) = [span for span in self.spans if span.name.endswith(f"/{method}")]
        return found

    def below(self, span: Taken) -> list[Taken]:
        """The steps of a span and theirs, in the order of their ends."""
        ids = {span.id}
        while more := {each.id for each in self.spans if each.parent_id in ids} - ids:
            ids |= more
        return sorted((each for each in self.spans if each.id in ids and each is not span), key=lambda it: it.ended_at)


class SilentCollector:
    """Takes connections and never says a word."""

    def __enter__(self) -> "SilentCollector":
        self._socket = socket.create_server(("127.0.0.1", 0))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._socket.close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


def _taken(span: Any, resource: dict[str, Any]) -> Taken:
    return Taken(
        name=span.name,
        trace_id=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        started_at=span.start_time_unix_nano,
        ended_at=span.end_time_unix_nano,
        attributes=_plain(span.attributes),
        error=span.status.message if span.status.code == span.status.STATUS_CODE_ERROR else None,
        resource=resource,
    )
