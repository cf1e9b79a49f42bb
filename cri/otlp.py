"""Traces requests with OpenTelemetry, and sends their spans to a collector by OTLP over gRPC.

A request whose caller sends a W3C trace context becomes part of that trace, if the caller keeps it; of the others the
configured share is kept. Sending is the library's, from a thread of its own: OTEL_EXPORTER_OTLP_HEADERS,
OTEL_EXPORTER_OTLP_CERTIFICATE and OTEL_RESOURCE_ATTRIBUTES count as everywhere.
"""

import asyncio
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cri.tracing import NOT_TRACED, Request, subject
from oci import trace
from oci.version import VERSION

QUEUED_SPANS = 1024  # while the collector is away; the oldest go first
SPANS_AT_ONCE = 128  # some milliseconds of the thread's work
SEND_EVERY_MS = 1000
SEND_TIMEOUT_S = 5.0
FLUSH_S = 2.0  # at the end


class OtlpTracing:
    def __init__(self, endpoint: str, rate_per_million: int) -> None:
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)  # else it tells of each of its tries
        self._exporter = OTLPSpanExporter(endpoint, timeout=SEND_TIMEOUT_S)
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(rate_per_million / 1_000_000)),
            resource=Resource.create({"service.name": "crito", "service.version": VERSION}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(self._exporter, QUEUED_SPANS, SEND_EVERY_MS, SPANS_AT_ONCE)
        )
        self._tracer = self._provider.get_tracer("crito", VERSION)
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def request(self, method: str, metadata: Mapping[str, str]) -> Iterator[Request]:
        attributes = {"rpc.system.name": "grpc", "rpc.method": method}
        span = self._tracer.start_span(method, self._propagator.extract(metadata), SpanKind.SERVER, attributes)
        if not span.is_recording():
            yield NOT_TRACED
            return
        with trace.within(_Span(self._tracer, span)):
            yield _Request(span)

    async def close(self) -> None:
        ending = asyncio.create_task(asyncio.to_thread(self._provider.shutdown))
        await asyncio.wait([ending], timeout=FLUSH_S)
        if not ending.done():
            self._exporter.shutdown()  # gives up what it is sending, which `ending` waits for
        await ending


class _Request:
    def __init__(self, span: Span) -> None:
        self._span = span

    @property
    def trace_id(self) -> str:
        return format_trace_id(self._span.get_span_context().trace_id)

    def about(self, message: Any) -> None:
        self._span.set_attributes(subject(message))

    def answered(self, code: str, text: str = "") -> None:
        self._span.set_attribute("rpc.response.status_code", code)
        if code != "OK":
            self._span.set_status(Status(StatusCode.ERROR, text))


class _Span:
    """A span of OpenTelemetry's, as oci/trace.py wants it."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span

    @property
    def is_open(self) -> bool:
        return self._span.is_recording()

    def begin(self, name: str, facts: trace.Facts) -> "_Span":
        return _Span(self._tracer, self._tracer.start_span(name, set_span_in_context(self._span), attributes=facts))

    def end(self, error: BaseException | None) -> None:
        if isinstance(error, Exception):
            self._span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"))
        elif error is not None:
            self._span.set_attribute("crito.cancelled", True)
        self._span.end()
