"""Clients of the stream server as kubelet and kubectl are: SPDY/3.1 and WebSocket, over one connection each."""

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from wsproto import ConnectionType, events
from wsproto.connection import Connection

from cri.streaming import spdy

PATIENCE_S = 10.0


class Refused(Exception):
    """The server's answer was no upgrade."""

    def __init__(self, status: int, headers: Mapping[str, list[str]], body: str) -> None:
        super().__init__(f"{status}: {body}")
        self.status = status
        self.headers = headers
        self.body = body


class Socket:
    """A connection after its upgrade."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: Mapping[str, list[str]]):
        self.reader = reader
        self.writer = writer
        self.headers = headers

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def abort(self) -> None:
        self.writer.transport.abort()


async def upgrade(
    url: str,
    headers: Sequence[tuple[str, str]],
    method: str = "POST",
    tls: ssl.SSLContext | None = None,
    limit: int = 2**16,
) -> Socket:
    """Raises Refused for any answer but 101."""
    parts = urlsplit(url)
    assert parts.hostname and parts.port
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=tls, limit=limit)
    lines = [f"{method} {parts.path} HTTP/1.1", f"Host: {parts.netloc}", *(f"{n}: {v}" for n, v in headers)]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    status_line = (await reader.readline()).decode()
    status = int(status_line.split()[1])
    answer: dict[str, list[str]] = {}
    while line := (await reader.readline()).decode().strip():
        name, _, value = line.partition(":")
        answer.setdefault(name.lower(), []).append(value.strip())
    if status != 101:
        body = (await reader.read()).decode()
        writer.close()
        raise Refused(status, answer, body)
    return Socket(reader, writer, answer)


class Stream:
    """A SPDY stream that this side has opened."""

    def __init__(self, client: "SpdyClient", stream_id: int) -> None:
        self._client = client
        self.id = stream_id
        self.received = bytearray()
        self.replied = asyncio.Event()
        self.ended = asyncio.Event()
        self.reset_status: int | None = None
        self.changed = asyncio.Condition()

    async def write(self, data: bytes, fin: bool = False) -> None:
        await self._client.socket.send(spdy.data(self.id, data, fin))

    async def close(self) -> None:
        await self.write(b"", fin=True)

    async def reset(self) -> None:
        await self._client.socket.send(spdy.rst_stream(self.id, spdy.Reset.CANCEL))

    async def read_all(self) -> bytes:
        """Everything until the other side ends the stream, or resets it."""
        async with asyncio.timeout(PATIENCE_S):
            await self.ended.wait()
        return bytes(self.received)

    async def read_until(self, text: bytes) -> bytes:
        async with asyncio.timeout(PATIENCE_S), self.changed:
            await self.changed.wait_for(lambda: text in self.received or self.ended.is_set())
        assert text in self.received, f"{text!r} is not in {bytes(self.received)!r}"
        return bytes(self.received)


class SpdyClient:
    def __init__(self, socket: Socket) -> None:
        self.socket = socket
        self.encoder = spdy.Encoder()
        self._decoder = spdy.Decoder()
        self.streams: dict[int, Stream] = {}
        self.pings: list[int] = []
        self.went_away = asyncio.Event()
        self.closed = asyncio.Event()
        self._next_id = 1
        self.listen()

    def listen(self) -> None:
        """Take what comes; again, after it was cancelled."""
        self._pump = asyncio.create_task(self._receive())

    def stop_listening(self) -> None:
        """Read no more."""
        self._pump.cancel()

    async def open(self, headers: Mapping[str, str], fin: bool = False) -> Stream:
        """A new stream; returns once the server has answered, or has reset it."""
        stream = await self.open_unanswered(headers, fin)
        async with asyncio.timeout(PATIENCE_S):
            await stream.replied.wait()
        return stream

    async def open_unanswered(self, headers: Mapping[str, str], fin: bool = False) -> Stream:
        stream = self.streams[self._next_id] = Stream(self, self._next_id)
        self._next_id += 2
        await self.socket.send(self.encoder.syn_stream(stream.id, headers, fin))
        return stream

    async def close(self) -> None:
        self.socket.abort()
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)

    async def _receive(self) -> None:
        with contextlib.suppress(OSError):
            while data := await self.read():
                for frame in self._decoder.feed(data):
                    await self._take(frame)
        self.closed.set()
        for stream in self.streams.values():
            stream.replied.set()
            stream.ended.set()

    async def read(self) -> bytes:
        return await self.socket.reader.read(65536)

    async def _take(self, frame: spdy.Frame) -> None:
        match frame:
            case spdy.SynReply():
                self.streams[frame.stream_id].replied.set()
            case spdy.Data():
                stream = self.streams[frame.stream_id]
                assert stream.replied.is_set(), "data before the answer"
                stream.received += frame.data
                if frame.fin:
                    stream.ended.set()
                async with stream.changed:
                    stream.changed.notify_all()
            case spdy.RstStream():
                stream = self.streams[frame.stream_id]
                stream.reset_status = frame.status
                stream.replied.set()
                stream.ended.set()
            case spdy.Ping():
                self.pings.append(frame.id)
            case spdy.GoAway():
                self.went_away.set()


V4 = "v4.channel.k8s.io"


@contextlib.asynccontextmanager
async def spdy_client(
    url: str, protocols: Sequence[str] = (V4,), method: str = "POST", tls: ssl.SSLContext | None = None
) -> AsyncIterator[SpdyClient]:
    offered = [("X-Stream-Protocol-Version", each) for each in protocols]
    socket = await upgrade(url, [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"), *offered], method, tls)
    client = SpdyClient(socket)
    try:
        yield client
    finally:
        await client.close()


class Command:
    """The streams of one exec or attach, by name."""

    def __init__(self, client: SpdyClient, streams: Mapping[str, Stream]) -> None:
        self.client = client
        self.streams = streams

    def __getitem__(self, name: str) -> Stream:
        return self.streams[name]

    async def status(self) -> dict[str, Any]:
        decoded: dict[str, Any] = json.loads(await self.streams["error"].read_all())
        return decoded


@contextlib.asynccontextmanager
async def spdy_command(url: str, *names: str, protocols: Sequence[str] = (V4,)) -> AsyncIterator[Command]:
    """A remote command whose streams (beside "error") are open."""
    async with spdy_client(url, protocols) as client:
        yield Command(client, {name: await client.open({"streamType": name}) for name in ("error", *names)})


class WebSocketClient:
    """Messages both ways. `channels` collects, by its first byte, what has come."""

    def __init__(self, socket: Socket) -> None:
        self.socket = socket
        self._connection = Connection(ConnectionType.CLIENT)
        self.messages: list[bytes | str] = []
        self.close_code: int | None = None
        self.pongs: list[bytes] = []
        self.closed = asyncio.Event()
        self.changed = asyncio.Condition()
        self._pump = asyncio.create_task(self._receive())

    @property
    def protocol(self) -> str:
        return "".join(self.socket.headers.get("sec-websocket-protocol", []))

    async def send(self, data: bytes | str) -> None:
        event = events.BytesMessage(data) if isinstance(data, bytes) else events.TextMessage(data)
        await self.socket.send(self._connection.send(event))

    async def ping(self, payload: bytes) -> None:
        await self.socket.send(self._connection.send(events.Ping(payload)))

    def channel(self, number: int) -> bytes:
        return b"".join(each[1:] for each in self.messages if isinstance(each, bytes) and each[:1] == bytes((number,)))

    async def until(self, number: int, text: bytes) -> None:
        async with asyncio.timeout(PATIENCE_S), self.changed:
            await self.changed.wait_for(lambda: text in self.channel(number) or self.closed.is_set())
        assert text in self.channel(number), f"{text!r} is not in {self.channel(number)!r}"

    async def until_closed(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self.closed.wait()

    async def close(self) -> None:
        self.socket.abort()
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)

    async def _receive(self) -> None:
        message: bytes | str = b""
        try:
            while self.close_code is None and (data := await self.socket.reader.read(65536)):
                self._connection.receive_data(data)
                for event in self._connection.events():
                    if isinstance(event, events.BytesMessage):
                        assert isinstance(message, bytes)
                        message += bytes(event.data)
                    elif isinstance(event, events.TextMessage):
                        message = (message if isinstance(message, str) else "") + event.data
                    elif isinstance(event, events.CloseConnection):
                        self.close_code = event.code
                    elif isinstance(event, events.Pong):
                        self.pongs.append(bytes(event.payload))
                    if isinstance(event, events.Message) and event.message_finished:
                        self.messages.append(message)
                        message = b""
                async with self.changed:
                    self.changed.notify_all()
        except OSError:
            pass
        finally:
            self.closed.set()
            async with self.changed:
                self.changed.notify_all()


@contextlib.asynccontextmanager
async def websocket_client(url: str, protocols: Sequence[str]) -> AsyncIterator[WebSocketClient]:
    headers = [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
        *([("Sec-WebSocket-Protocol", ", ".join(protocols))] if protocols else []),
    ]
    client = WebSocketClient(await upgrade(url, headers, "GET"))
    try:
        yield client
    finally:
        await client.close()


class TunnelSocket(Socket):
    """SPDY's bytes in a WebSocket's messages, as kubectl forwards ports."""

    def __init__(self, websocket: WebSocketClient) -> None:
        super().__init__(websocket.socket.reader, websocket.socket.writer, websocket.socket.headers)
        self.websocket = websocket

    async def send(self, data: bytes) -> None:
        await self.websocket.send(data)


class TunnelClient(SpdyClient):
    async def read(self) -> bytes:
        socket = self.socket
        assert isinstance(socket, TunnelSocket)
        async with socket.websocket.changed:
            await socket.websocket.changed.wait_for(
                lambda: socket.websocket.messages or socket.websocket.closed.is_set()
            )
        if not socket.websocket.messages:
            return b""
        message = socket.websocket.messages.pop(0)
        assert isinstance(message, bytes)
        return message


@contextlib.asynccontextmanager
async def tunnel_client(url: str) -> AsyncIterator[TunnelClient]:
    async with websocket_client(url, ["SPDY/3.1+portforward.k8s.io"]) as websocket:
        client = TunnelClient(TunnelSocket(websocket))
        try:
            yield client
        finally:
            await client.close()


async def open_port(client: SpdyClient, port: int, request: str = "0") -> tuple[Stream, Stream]:
    """The data and the error stream of one forwarded connection, as client-go opens them."""
    headers = {"port": str(port), "requestID": request}
    error = await client.open({**headers, "streamType": "error"})
    await error.close()
    return await client.open({**headers, "streamType": "data"}), error
