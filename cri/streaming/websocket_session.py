"""A client's WebSocket: channels with back-pressure both ways, or a tunnel for another protocol's bytes."""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence

from wsproto import events

from cri.streaming import websocket
from cri.streaming.channel import ClientGone, Inbox
from cri.streaming.transport import Transport


class WebSocketChannel:
    """One numbered channel; a Channel. A WebSocket cannot end one channel towards the client: `close` sends nothing."""

    def __init__(self, session: "WebSocketSession", number: int) -> None:
        self._session = session
        self._number = number
        self.inbox = Inbox()
        self._is_closed = False

    @property
    def headers(self) -> Mapping[str, str]:
        return {}

    @property
    def was_reset(self) -> bool:
        return False

    async def until_reset(self) -> None:
        await asyncio.Event().wait()  # a WebSocket ends as a whole

    async def read(self) -> bytes:
        return await self.inbox.get()

    def stop_reading(self) -> None:
        self.inbox.refuse()

    async def write(self, data: bytes) -> None:
        if self._is_closed:
            raise ClientGone(f"channel {self._number} is closed")
        await self._session.send(self._number, data)

    async def close(self) -> None:
        self._is_closed = True

    async def reset(self) -> None:
        self._is_closed = True
        self.inbox.refuse()


class WebSocketSession:
    """`count` channels. What comes for others is passed over."""

    def __init__(self, transport: Transport, protocol: str, count: int) -> None:
        self._transport = transport
        self._codec = websocket.Channels(protocol)
        self.channels: Sequence[WebSocketChannel] = [WebSocketChannel(self, number) for number in range(count)]

    async def run(self) -> None:
        """Serve what the client sends until it closes. Raises WebSocketError for one that breaks the protocol."""
        try:
            while data := await self._transport.read():
                for event in self._codec.feed(data):
                    if isinstance(event, websocket.Closed):
                        return
                    await self._take(event)
        except websocket.WebSocketError:
            await self.close(broken=True)
            raise
        except ClientGone:
            return
        finally:
            for channel in self.channels:
                channel.inbox.end()

    async def send(self, channel: int, data: bytes) -> None:
        self._transport.moved()
        await self._transport.write(self._codec.data(channel, data))

    async def close(self, broken: bool = False) -> None:
        """Tell the client that the session is over."""
        with contextlib.suppress(ClientGone):
            await self._transport.write(self._codec.close(broken))

    async def _take(self, event: websocket.Event) -> None:
        match event:
            case websocket.Reply():
                await self._transport.write(event.data)
            case websocket.ChannelData() if 0 <= event.channel < len(self.channels):
                self._transport.moved()
                await self.channels[event.channel].inbox.put(event.data)
            case websocket.ChannelClose() if event.channel < len(self.channels):
                self._transport.moved()
                self.channels[event.channel].inbox.end()


class Tunnel:
    """A WebSocket whose messages are another protocol's bytes, wherever they are cut; a Carrier for SPDY."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._frames = websocket.Frames()
        self._is_closed = False

    async def read(self) -> bytes:
        """Raises WebSocketError for a client that breaks the protocol, ClientGone when it cannot be answered."""
        while not self._is_closed:
            data = await self._transport.read()
            if not data:
                return b""
            parts: list[bytes] = []
            for event in self._frames.feed(data):
                if isinstance(event, events.BytesMessage):
                    parts.append(bytes(event.data))
                elif isinstance(event, websocket.Reply):
                    await self._transport.write(event.data)
                elif isinstance(event, websocket.Closed):
                    self._is_closed = True
                else:
                    raise websocket.WebSocketError("a text message in a tunnel")
            if content := b"".join(parts):
                return content
        return b""

    async def write(self, data: bytes) -> None:
        await self._transport.write(self._frames.message(data))

    def moved(self) -> None:
        self._transport.moved()

    async def close(self) -> None:
        with contextlib.suppress(ClientGone):
            await self._transport.write(self._frames.close())
