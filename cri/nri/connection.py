"""One plugin's socket: calls its Plugin service, and serves it the Runtime service, until either side ends it."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from cri.api.nri.v1alpha1 import api_pb2 as nri
from cri.api.ttrpc import api_pb2 as envelope
from cri.nri import mux, ttrpc
from cri.nri.mux import ProtocolError
from cri.nri.ttrpc import Frame, Kind
from oci.errors import DeadlineExceeded, Error, Unavailable

_log = logging.getLogger(__name__)

_READ_BYTES = 64 << 10
_REQUESTS_AT_ONCE = 64  # of a plugin; one that asks for more without waiting is broken
_SERVICE = "nri.pkg.api.v1alpha1."
_PLUGIN, _RUNTIME = _SERVICE + "Plugin", _SERVICE + "Runtime"

# gRPC codes, which ttrpc uses too.
_UNKNOWN, _INVALID_ARGUMENT, _DEADLINE_EXCEEDED, _UNIMPLEMENTED = 2, 3, 4, 12

R = TypeVar("R", bound=Message)
Serve = Callable[[Any], Awaitable[Message]]


class Refused(Error):
    """The plugin has answered with an error of its own."""


class NotImplementedByPlugin(Error):
    """The plugin does not know the call."""


class Connection:
    """`serve` answers the plugin's requests, by method: it takes the request and returns the response."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        serve: dict[str, Serve],
        on_close: Callable[[], None],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._serve = serve
        self._on_close = on_close
        self._next_stream = 1
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._serving: set[asyncio.Task[None]] = set()
        self._closed_by = ""  # why; "" while it is open
        self._reading = asyncio.create_task(self._read(), name="NRI connection")

    @property
    def is_open(self) -> bool:
        return not self._closed_by

    async def call(self, method: str, request: Message, answer: type[R], timeout_s: float) -> R:
        """What the plugin answers.

        Raises Refused with its error, NotImplementedByPlugin, and, with the connection closed for good,
        DeadlineExceeded when it has not answered in time, and Unavailable when it has gone.
        """
        try:
            payload = await asyncio.wait_for(self._exchange(method, request, timeout_s), timeout_s)
        except TimeoutError:
            self.close(f"no answer to {method} within {timeout_s:g} s")
            raise DeadlineExceeded(f"{method}: no answer within {timeout_s:g} s") from None
        try:
            response = envelope.Response.FromString(payload)
            result = answer.FromString(response.payload)
        except DecodeError as error:
            self.close(f"the answer to {method} cannot be read")
            raise Unavailable(f"{method}: the answer cannot be read: {error}") from error
        _raise_status(method, response.status)
        return result

    async def _exchange(self, method: str, request: Message, timeout_s: float) -> bytes:
        if not self.is_open:
            raise Unavailable(f"{method}: the connection was closed: {self._closed_by}")
        stream = self._next_stream
        self._next_stream += 2
        called = envelope.Request(
            service=_PLUGIN, method=method, payload=request.SerializeToString(), timeout_nano=int(timeout_s * 1e9)
        )
        data = ttrpc.encode(Frame(stream, Kind.REQUEST, called.SerializeToString()))
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[stream] = answer
        try:
            self._writer.write(mux.frames(mux.PLUGIN_SERVICE, data))
            return await answer
        finally:
            self._waiting.pop(stream, None)

    def close(self, reason: str) -> None:
        """End it; whoever waits for an answer gets Unavailable."""
        if self._closed_by:
            return
        self._closed_by = reason
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(Unavailable(f"the connection was closed: {reason}"))
        self._writer.transport.abort()
        for task in (self._reading, *self._serving):
            if task is not asyncio.current_task():
                task.cancel()
        self._on_close()

    async def wait_closed(self) -> None:
        """Return once nothing of it goes on; only after `close`, and not from a request that it serves."""
        await asyncio.gather(self._reading, *self._serving, return_exceptions=True)

    # What comes in

    async def _read(self) -> None:
        outer = mux.Splitter()
        inner = {
            mux.PLUGIN_SERVICE: (ttrpc.Splitter(Kind.RESPONSE), self._take_response),
            mux.RUNTIME_SERVICE: (ttrpc.Splitter(Kind.REQUEST), self._take_request),
        }
        reason = "the plugin has closed it"
        try:
            while data := await self._reader.read(_READ_BYTES):
                for number, piece in outer.feed(data):
                    if number not in inner:
                        continue  # reserved for others: the protocol lets us drop it
                    splitter, take = inner[number]
                    for frame in splitter.feed(piece):
                        take(frame)
        except ProtocolError as error:
            reason = str(error)
        except OSError as error:
            reason = f"reading from it: {error.strerror}"
        self.close(reason)

    def _take_response(self, frame: Frame) -> None:
        waiting = self._waiting.get(frame.stream)
        if waiting is not None and not waiting.done():
            waiting.set_result(frame.payload)

    def _take_request(self, frame: Frame) -> None:
        if len(self._serving) >= _REQUESTS_AT_ONCE:
            raise ProtocolError(f"more than {_REQUESTS_AT_ONCE} requests at once")
        task = asyncio.create_task(self._answer(frame), name="NRI request")
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _answer(self, frame: Frame) -> None:
        response = await self._response(frame.payload)
        with contextlib.suppress(ProtocolError):  # an answer that is too long stays unsaid: the plugin has its timeout
            data = ttrpc.encode(Frame(frame.stream, Kind.RESPONSE, response.SerializeToString()))
            if self.is_open:
                self._writer.write(mux.frames(mux.RUNTIME_SERVICE, data))
        with contextlib.suppress(OSError):  # it has gone: the reader sees that too
            await self._writer.drain()  # whoever asks and does not read runs out of requests

    async def _response(self, payload: bytes) -> envelope.Response:
        try:
            request = envelope.Request.FromString(payload)
            serve = self._serve.get(request.method) if request.service == _RUNTIME else None
            if serve is None:
                return _status(_UNIMPLEMENTED, f"{request.service}/{request.method}: there is no such call")
            message = _RUNTIME_METHODS[request.method].FromString(request.payload)
        except DecodeError as error:
            return _status(_INVALID_ARGUMENT, f"the request cannot be read: {error}")
        try:
            answer = await serve(message)
        except Error as error:
            return _status(_UNKNOWN, str(error))
        except Exception as error:  # a defect of ours is no reason to leave the plugin waiting
            _log.exception("NRI: serving %s", request.method)
            return _status(_UNKNOWN, f"{type(error).__name__}: {error}")
        return envelope.Response(payload=answer.SerializeToString())


_RUNTIME_METHODS: dict[str, type[Message]] = {
    "RegisterPlugin": nri.RegisterPluginRequest,
    "UpdateContainers": nri.UpdateContainersRequest,
}


def _status(code: int, message: str) -> envelope.Response:
    return envelope.Response(status=envelope.Status(code=code, message=message))


def _raise_status(method: str, status: envelope.Status) -> None:
    if status.code == 0:
        return
    if status.code == _UNIMPLEMENTED:
        raise NotImplementedByPlugin(f"{method}: {status.message}")
    if status.code == _DEADLINE_EXCEEDED:
        raise DeadlineExceeded(f"{method}: {status.message}")
    raise Refused(f"{method}: {status.message or f'code {status.code}'}")
