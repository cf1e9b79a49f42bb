"""The gRPC server on the UNIX socket: what every call passes through before and after the service's own method.

Per call: the log context (method, trace), its time and outcome for the metrics, its span for the traces, and the
translation of our errors to codes.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio

from cri import errors, log
from cri.tracing import Tracing
from oci.errors import InvalidArgument

SOCKET_MODE = 0o660
SOCKET_PATH_LIMIT = 107  # sun_path, less the final NUL

_log = logging.getLogger(__name__)


class CallObserver(Protocol):
    """Who counts the calls."""

    def observe(self, method: str, code: str, seconds: float) -> None: ...


class Edge(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Wraps every method of every service with what the module's docstring says."""

    def __init__(self, observer: CallObserver, tracing: Tracing) -> None:
        self._observer = observer
        self._tracing = tracing

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any]"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        handler = await continuation(handler_call_details)
        method = handler_call_details.method.removeprefix("/")
        if handler is not None and handler.unary_unary:
            behaviour = self._unary(method, handler.unary_unary, handler.request_deserializer)
            return grpc.unary_unary_rpc_method_handler(behaviour, None, handler.response_serializer)
        if handler is not None and handler.unary_stream:
            behaviour = self._stream(method, handler.unary_stream, handler.request_deserializer)
            return grpc.unary_stream_rpc_method_handler(behaviour, None, handler.response_serializer)
        return handler

    def _unary(self, full_name: str, behaviour: Any, decode: Any) -> Any:
        method = _short(full_name)

        async def call(raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            with (
                self._tracing.request(full_name, _metadata(context)) as span,
                log.bound(method=method, trace_id=span.trace_id),
            ):
                started = time.monotonic()
                try:
                    request = _decoded(method, raw, decode)
                    span.about(request)
                    response = await behaviour(request, context)
                except Exception as error:
                    code, text = self._failed(method, error, started), errors.text_of(error)
                    span.answered(code.name, text)
                except asyncio.CancelledError:
                    span.answered(grpc.StatusCode.CANCELLED.name)
                    self._observer.observe(method, grpc.StatusCode.CANCELLED.name, time.monotonic() - started)
                    raise
                else:
                    span.about(response)
                    span.answered(grpc.StatusCode.OK.name)
                    self._observer.observe(method, grpc.StatusCode.OK.name, time.monotonic() - started)
                    return response
            await context.abort(code, text)

        return call

    def _stream(self, full_name: str, behaviour: Any, decode: Any) -> Any:
        method = _short(full_name)

        async def call(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            started = time.monotonic()
            try:
                async for response in behaviour(_decoded(method, request, decode), context):
                    yield response
            except Exception as error:
                code = self._failed(method, error, started)
                await context.abort(code, errors.text_of(error))
            self._observer.observe(method, grpc.StatusCode.OK.name, time.monotonic() - started)

        return call

    def _failed(self, method: str, error: Exception, started: float) -> grpc.StatusCode:
        """Log and count a failed call: here the error stops. A defect of ours is logged with its traceback."""
        code = errors.code_of(error)
        self._observer.observe(method, code.name, time.monotonic() - started)
        if not errors.is_expected(error):
            _log.error("%s failed by a defect", method, exc_info=error)
        elif code is grpc.StatusCode.NOT_FOUND:
            _log.debug("%s: %s", method, error)
        else:
            _log.warning("%s: %s: %s", method, code.name, error)
        return code


def _short(full_name: str) -> str:
    return full_name.rpartition("/")[2]


def _metadata(context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def _decoded(method: str, request: bytes, decode: Any) -> Any:
    """The request's message. gRPC itself would answer a malformed one with UNKNOWN, as if the defect were ours."""
    try:
        return decode(request)
    except Exception as error:
        raise InvalidArgument(f"{method}: {len(request)} bytes that are not its request: {error}") from error


class Server:
    """A gRPC server that listens on one UNIX socket."""

    def __init__(
        self, listen: Path, observer: CallObserver, tracing: Tracing, max_recv_bytes: int, max_send_bytes: int
    ) -> None:
        self._listen = listen
        self.grpc = grpc.aio.server(
            interceptors=[Edge(observer, tracing)],
            options=[
                ("grpc.max_receive_message_length", max_recv_bytes),
                ("grpc.max_send_message_length", max_send_bytes),
            ],
        )

    async def start(self) -> None:
        """Listen and answer. The caller holds the run directory's lock: a socket found here is a dead daemon's.

        Raises InvalidArgument where the path cannot be a socket's.
        """
        if len(str(self._listen).encode()) > SOCKET_PATH_LIMIT:
            raise InvalidArgument(f"api.listen: {self._listen} is longer than a socket's {SOCKET_PATH_LIMIT} bytes")
        self._listen.parent.mkdir(parents=True, exist_ok=True)
        self._listen.unlink(missing_ok=True)
        try:
            self.grpc.add_insecure_port(f"unix:{self._listen}")
        except RuntimeError as error:
            raise InvalidArgument(f"api.listen: cannot listen on {self._listen}: {error}") from error
        self._listen.chmod(SOCKET_MODE)
        await self.grpc.start()

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, give those under way `grace_s`, and remove the socket."""
        await self.grpc.stop(grace_s)
        self._listen.unlink(missing_ok=True)
