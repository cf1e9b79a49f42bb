"""Kubernetes' channels over WebSocket: messages to channels and back, without I/O.

The first byte of a message is the channel's number; the base64 variants send text, with a digit for it. v5 adds
{255, N}: the client sends no more on channel N. Source: RFC 6455; the frames themselves are wsproto's.
"""

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass

from wsproto import events
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

CLOSE_CHANNEL = 255

TUNNEL_PREFIX = "SPDY/3.1+"
V5 = "v5.channel.k8s.io"
V4 = "v4.channel.k8s.io"
V4_BASE64 = "v4.base64.channel.k8s.io"
V1 = "channel.k8s.io"
V1_BASE64 = "base64.channel.k8s.io"

_NORMAL_CLOSURE = 1000
_PROTOCOL_ERROR = 1002


class WebSocketError(Exception):
    """The other side broke the protocol in a way that ends the session."""


@dataclass(frozen=True, slots=True)
class ChannelData:
    channel: int
    data: bytes


@dataclass(frozen=True, slots=True)
class ChannelClose:
    """The client sends no more on this channel (v5)."""

    channel: int


@dataclass(frozen=True, slots=True)
class Reply:
    """Bytes to send back at once: an answer to a ping, or to the close."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Closed:
    """The client has closed the WebSocket."""


Event = ChannelData | ChannelClose | Reply | Closed


class Frames:
    """Binary and text messages of one connection, after the handshake, in the parts in which they come."""

    def __init__(self) -> None:
        self._connection = Connection(ConnectionType.SERVER)

    def feed(self, data: bytes) -> Iterator[events.TextMessage | events.BytesMessage | Reply | Closed]:
        """Raises WebSocketError."""
        try:
            self._connection.receive_data(data)
            for event in self._connection.events():
                if isinstance(event, events.TextMessage | events.BytesMessage):
                    yield event
                elif isinstance(event, events.Ping):
                    yield Reply(self._connection.send(event.response()))
                elif isinstance(event, events.CloseConnection):
                    yield from self._closed(event)
        except (RemoteProtocolError, LocalProtocolError) as error:
            raise WebSocketError(str(error)) from error

    def _closed(self, event: events.CloseConnection) -> Iterator[Reply | Closed]:
        state = self._connection.state
        if state is ConnectionState.OPEN:  # wsproto's way to tell of a frame that is none
            raise WebSocketError(event.reason or f"closed with {event.code}")
        if state is ConnectionState.REMOTE_CLOSING:
            yield Reply(self._connection.send(event.response()))
        yield Closed()

    def message(self, data: bytes) -> bytes:
        return self._connection.send(events.BytesMessage(data))

    def text(self, text: str) -> bytes:
        return self._connection.send(events.TextMessage(text))

    def close(self, broken: bool = False) -> bytes:
        """The closing frame; b"" if it was sent before."""
        try:
            return self._connection.send(events.CloseConnection(_PROTOCOL_ERROR if broken else _NORMAL_CLOSURE))
        except LocalProtocolError:
            return b""


class Channels:
    """Messages of one connection that bear channel numbers, by the rules of one subprotocol."""

    def __init__(self, protocol: str) -> None:
        self._frames = Frames()
        self._is_base64 = protocol in (V4_BASE64, V1_BASE64)
        self._has_close = protocol == V5
        self._channel: int | None = None  # of the message that is coming in
        self._closing = b""  # the message so far, if it is a {255, N}
        self._rest = ""  # base64 text that is no whole group yet

    def feed(self, data: bytes) -> Iterator[Event]:
        """Raises WebSocketError."""
        for event in self._frames.feed(data):
            if isinstance(event, Reply | Closed):
                yield event
            elif isinstance(event, events.TextMessage) and self._is_base64:
                yield from self._take_text(event.data, event.message_finished)
            elif isinstance(event, events.BytesMessage) and not self._is_base64:
                yield from self._take_bytes(bytes(event.data), event.message_finished)
            else:
                raise WebSocketError(f"a {type(event).__name__} is none of this protocol's")

    def _take_bytes(self, data: bytes, finished: bool) -> Iterator[Event]:
        if self._channel is None and data:
            self._channel, data = data[0], data[1:]
        if self._channel == CLOSE_CHANNEL and self._has_close:
            self._closing = (self._closing + data)[:2]
            if finished:
                yield self._close_of(self._closing)
                self._closing = b""
        elif self._channel is not None and data:
            yield ChannelData(self._channel, data)
        if finished:
            self._channel = None

    @staticmethod
    def _close_of(body: bytes) -> ChannelClose:
        if len(body) != 1:
            raise WebSocketError("a close of no channel, or of several")
        return ChannelClose(body[0])

    def _take_text(self, text: str, finished: bool) -> Iterator[Event]:
        if self._channel is None and text:
            self._channel, text = ord(text[0]) - ord("0"), text[1:]
        text = self._rest + text
        whole = len(text) if finished else len(text) // 4 * 4
        text, self._rest = text[:whole], text[whole:]
        if self._channel is not None and text:
            try:
                yield ChannelData(self._channel, base64.b64decode(text, validate=True))
            except (binascii.Error, ValueError) as error:
                raise WebSocketError(f"a message on channel {self._channel} is no base64: {error}") from error
        if finished:
            self._channel = None

    def data(self, channel: int, data: bytes) -> bytes:
        """The frame that carries `data` on `channel`."""
        if self._is_base64:
            return self._frames.text(f"{channel}{base64.b64encode(data).decode()}")
        return self._frames.message(bytes((channel,)) + data)

    def close(self, broken: bool = False) -> bytes:
        return self._frames.close(broken)
