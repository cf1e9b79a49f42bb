"""A client's SPDY session: its streams over one transport, with back-pressure in both directions."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Protocol

from cri.streaming import spdy
from cri.streaming.channel import ClientGone, Inbox

STREAMS = 1024  # open at once; more are refused, one by one


class Carrier(Protocol):
    """What carries the frames: the connection itself, or a WebSocket on it."""

    async def read(self) -> bytes: ...

    async def write(self, data: bytes) -> None: ...

    def moved(self) -> None: ...


class Refused(Exception):
    """A new stream is not wanted."""


class SpdyStream:
    """A stream that the client has opened; a Channel."""

    def __init__(self, session: "SpdySession", stream_id: int, headers: Mapping[str, str]) -> None:
        self._session = session
        self.id = stream_id
        self._headers = headers
        self.inbox = Inbox()
        self.ended_here = False
        self.ended_there = False
        self._reset_by_client = asyncio.Event()

    @property
    def headers(self) -> Mapping[str, str]:
        return self._headers

    @property
    def was_reset(self) -> bool:
        return self._reset_by_client.is_set()

    async def until_reset(self) -> None:
        await self._reset_by_client.wait()

    async def read(self) -> bytes:
        return await self.inbox.get()

    def stop_reading(self) -> None:
        self.inbox.refuse()

    async def write(self, data: bytes) -> None:
        if self.ended_here:
            raise ClientGone(f"stream {self.id} is closed")
        await self._session.send(spdy.data(self.id, data))

    async def close(self) -> None:
        if self.ended_here:
            return
        self.ended_here = True
        self._session.forget_if_done(self)
        with contextlib.suppress(ClientGone):
            await self._session.send(spdy.data(self.id, b"", fin=True))

    async def reset(self) -> None:
        self.inbox.refuse()
        if self.ended_here and self.ended_there:
            return
        self.ended_here = self.ended_there = True
        self._session.forget_if_done(self)
        with contextlib.suppress(ClientGone):
            await self._session.send(spdy.rst_stream(self.id, spdy.Reset.CANCEL))

    def was_ended(self) -> None:
        """The client sends no more."""
        self.ended_there = True
        self.inbox.end()
        self._session.forget_if_done(self)

    def was_cancelled(self) -> None:
        """The client wants no more of either direction."""
        self._reset_by_client.set()
        self.ended_here = self.ended_there = True
        self.inbox.end()
        self._session.forget_if_done(self)


class SpdySession:
    """`on_stream` takes each new stream before its first byte; it must not wait, and may raise Refused."""

    def __init__(self, carrier: Carrier, on_stream: Callable[[SpdyStream], None]) -> None:
        self._carrier = carrier
        self._on_stream = on_stream
        self._decoder = spdy.Decoder()
        self._encoder = spdy.Encoder()
        self._streams: dict[int, SpdyStream] = {}
        self._last_id = 0
        self._is_going_away = False

    async def run(self) -> None:
        """Serve what the client sends, until it closes. Raises SpdyError for a client that breaks the protocol."""
        try:
            while data := await self._carrier.read():
                for frame in self._decoder.feed(data):
                    await self._take(frame)
        except spdy.SpdyError:
            await self.go_away(spdy.GoAwayStatus.PROTOCOL_ERROR)
            raise
        except ClientGone:
            return
        finally:
            for stream in list(self._streams.values()):
                stream.was_cancelled()

    async def go_away(self, status: spdy.GoAwayStatus = spdy.GoAwayStatus.OK) -> None:
        """Tell the client that the session is over."""
        self._is_going_away = True
        with contextlib.suppress(ClientGone):
            await self.send(spdy.goaway(self._last_id, status))

    async def send(self, frame: bytes) -> None:
        self._carrier.moved()
        await self._carrier.write(frame)

    def forget_if_done(self, stream: SpdyStream) -> None:
        if stream.ended_here and stream.ended_there:
            self._streams.pop(stream.id, None)

    async def _take(self, frame: spdy.Frame) -> None:
        if isinstance(frame, spdy.Ping):
            if frame.id % 2:  # a client's pings are odd; even ones are answers to ours, and we send none
                await self._carrier.write(spdy.ping(frame.id))
            return
        self._carrier.moved()
        match frame:
            case spdy.Data():
                await self._take_data(frame)
            case spdy.SynStream():
                await self._open(frame)
            case spdy.RstStream():
                if stream := self._streams.get(frame.stream_id):
                    stream.was_cancelled()
            case spdy.GoAway():
                self._is_going_away = True
            case _:
                return  # replies and more headers: nothing that we have asked for

    async def _take_data(self, frame: spdy.Data) -> None:
        stream = self._streams.get(frame.stream_id)
        if stream is None or stream.ended_there:
            if frame.stream_id > self._last_id:
                raise spdy.SpdyError(f"data for stream {frame.stream_id}, which was never opened")
            return  # it has ended here, and the client does not know yet
        await stream.inbox.put(frame.data)
        if frame.fin:
            stream.was_ended()

    async def _open(self, frame: spdy.SynStream) -> None:
        if frame.stream_id % 2 == 0 or frame.stream_id <= self._last_id:
            raise spdy.SpdyError(f"a new stream {frame.stream_id} after stream {self._last_id}")
        self._last_id = frame.stream_id
        if self._is_going_away or len(self._streams) >= STREAMS:
            await self._carrier.write(spdy.rst_stream(frame.stream_id, spdy.Reset.REFUSED_STREAM))
            return
        stream = SpdyStream(self, frame.stream_id, frame.headers)
        stream.ended_here = frame.unidirectional
        self._streams[stream.id] = stream
        try:
            self._on_stream(stream)
        except Refused:
            self._streams.pop(stream.id, None)
            await self._carrier.write(spdy.rst_stream(stream.id, spdy.Reset.REFUSED_STREAM))
            return
        # A client in Go writes to a stream only after the answer, and takes data only after it. on_stream's tasks run
        # after this method's next wait: the answer is the first that is written.
        await self._carrier.write(self._encoder.syn_reply(stream.id))
        if frame.fin:
            stream.was_ended()
