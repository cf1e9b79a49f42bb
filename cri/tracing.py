"""Traces of requests: who makes them, and whom a request is about. That they are made and sent is otlp.py's.

Without an endpoint nothing is traced, and OpenTelemetry's libraries are not loaded.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

# What OpenTelemetry calls what the CRI's messages say; `crito` for what it has no word for.
_IDS = {
    "pod_sandbox_id": "crito.pod_sandbox.id",
    "container_id": "container.id",
    "image_ref": "container.image.id",
}


class Request(Protocol):
    """One call of the CRI, as its trace needs to know it."""

    @property
    def trace_id(self) -> str:
        """32 hex digits; "" where the request is not traced."""

    def about(self, message: Any) -> None:
        """Note whom a request, or a response, is about."""

    def answered(self, code: str, text: str = "") -> None:
        """Note how it ended: with this gRPC code, such as "NOT_FOUND"."""


class Tracing(Protocol):
    def request(self, method: str, metadata: Mapping[str, str]) -> AbstractContextManager[Request]:
        """A call of `method`, as "runtime.v1.RuntimeService/Version", that lasts as long as the block."""

    async def close(self) -> None:
        """Send what is left, if that goes quickly."""


def tracing(endpoint: str, rate_per_million: int) -> Tracing:
    """What sends to `endpoint` ("http://HOST:4317", or https); what does nothing where it is empty."""
    if not endpoint:
        return NoTracing()
    from cri.otlp import OtlpTracing  # noqa: PLC0415  who does not use it does not load it

    return OtlpTracing(endpoint, rate_per_million)


class NoTracing:
    def request(self, method: str, metadata: Mapping[str, str]) -> AbstractContextManager[Request]:
        return nullcontext(NOT_TRACED)

    async def close(self) -> None: ...


class _NotTraced:
    trace_id = ""

    def about(self, message: Any) -> None: ...

    def answered(self, code: str, text: str = "") -> None: ...


NOT_TRACED: Request = _NotTraced()


def subject(message: Any) -> dict[str, str]:
    """Whom a request or a response of the CRI is about, as attributes of a span; what it leaves empty is not there."""
    found: dict[str, str] = {}
    descriptor = getattr(message, "DESCRIPTOR", None)  # the node service's messages are none of protobuf's
    for field in descriptor.fields if descriptor is not None else ():
        value = getattr(message, field.name)
        match field.message_type.name if field.message_type is not None else "":
            case "PodSandboxConfig":
                pod = value.metadata
                found |= {"k8s.pod.name": pod.name, "k8s.namespace.name": pod.namespace, "k8s.pod.uid": pod.uid}
            case "ContainerConfig":
                found |= {"k8s.container.name": value.metadata.name, "container.image.name": value.image.image}
            case "ImageSpec":
                found["container.image.name"] = value.image
            case "" if field.name in _IDS:
                found[_IDS[field.name]] = value
    return {attribute: value for attribute, value in found.items() if value}
