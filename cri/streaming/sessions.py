"""A session from its handshake to its end: which protocol, which work, and who ends it first."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from typing import Any

from cri.streaming import http, portforward, remotecommand, spdy, websocket
from cri.streaming.channel import Channel, ClientGone
from cri.streaming.remotecommand import Client, SpdyStreams
from cri.streaming.spdy_session import SpdySession
from cri.streaming.targets import AttachTarget, ExecTarget, PortForwardTarget, Target
from cri.streaming.transport import Hangups, Transport
from cri.streaming.websocket_session import Tunnel, WebSocketSession

_log = logging.getLogger(__name__)

HANGUP_S = 10.0  # to work off what a client sent before it closed
PORT_FORWARD = "portforward.k8s.io"
REMOTE_COMMAND_SPDY = ("v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io")
REMOTE_COMMAND_WEBSOCKET = (
    websocket.V5,
    websocket.V4,
    websocket.V4_BASE64,
    websocket.V1,
    websocket.V1_BASE64,
    "",
)
PORT_FORWARD_WEBSOCKET = (websocket.TUNNEL_PREFIX + PORT_FORWARD, websocket.V4, websocket.V4_BASE64, "")
_JSON_STATUS = ("v4.channel.k8s.io", websocket.V5, websocket.V4_BASE64)
_RESIZABLE_SPDY = ("v4.channel.k8s.io", "v3.channel.k8s.io")

Work = Coroutine[Any, Any, None]


class Session:
    """One client's, after its request. `run` returns when it has ended, and the connection is closed then."""

    def __init__(
        self,
        transport: Transport,
        exchange: http.Exchange,
        request: http.Request,
        hangups: Hangups,
        idle_timeout_s: float,
    ) -> None:
        self._transport = transport
        self._exchange = exchange
        self._request = request
        self._hangups = hangups
        self._idle_timeout_s = idle_timeout_s

    async def run(self, target: Target) -> None:
        """Raises http.Rejected before anything is answered."""
        upgrade = self._request.wants_upgrade_to
        if upgrade not in (http.SPDY.lower(), "websocket"):
            raise http.Rejected(400, f"unable to upgrade: expected {http.SPDY} or websocket, not {upgrade!r}")
        is_spdy = upgrade != "websocket"
        if isinstance(target, PortForwardTarget):
            await (self._ports_spdy(target) if is_spdy else self._ports_websocket(target))
        else:
            await (self._command_spdy(target) if is_spdy else self._command_websocket(target))

    # SPDY

    async def _command_spdy(self, target: ExecTarget | AttachTarget) -> None:
        protocol = http.negotiated_spdy(self._request, REMOTE_COMMAND_SPDY)
        streams = SpdyStreams(remotecommand.wanted(target, protocol in _RESIZABLE_SPDY))
        await self._upgraded(http.spdy_headers(protocol))
        session = SpdySession(self._transport, streams.take)

        async def work() -> None:
            try:
                opened = await streams.all()
            except TimeoutError:
                _log.warning("a client of container %s did not open its streams", target.container_id)
                return
            await remotecommand.serve(target, Client(opened, protocol in _JSON_STATUS))

        await self._until_first(session.run(), work())
        await session.go_away()
        await self._transport.finish()

    async def _ports_spdy(self, target: PortForwardTarget) -> None:
        protocol = http.negotiated_spdy(self._request, (PORT_FORWARD,))
        await self._upgraded(http.spdy_headers(protocol))
        ports = portforward.PortForward(target)
        session = SpdySession(self._transport, ports.take)
        try:
            await self._until_first(session.run())
        finally:
            await ports.close()

    # WebSocket

    async def _command_websocket(self, target: ExecTarget | AttachTarget) -> None:
        protocol = http.negotiated_websocket(self._request, REMOTE_COMMAND_WEBSOCKET)
        await self._upgraded(http.websocket_headers(self._request, protocol))
        session = WebSocketSession(self._transport, protocol, len(remotecommand.NAMES))
        wanted = remotecommand.wanted(target, True)
        streams: dict[str, Channel] = {}
        for name, channel in zip(remotecommand.NAMES, session.channels, strict=True):
            if name in wanted:
                streams[name] = channel
            else:
                channel.stop_reading()

        async def work() -> None:
            if protocol != websocket.V5:  # older clients wait for a message that tells them that it works
                first = next(name for name in ("stdout", "stderr", "error") if name in wanted)
                await streams[first].write(b"")
            await remotecommand.serve(target, Client(streams, protocol in _JSON_STATUS))

        await self._until_first(session.run(), work())
        await session.close()
        await self._transport.finish()

    async def _ports_websocket(self, target: PortForwardTarget) -> None:
        protocol = http.negotiated_websocket(self._request, PORT_FORWARD_WEBSOCKET)
        if protocol.startswith(websocket.TUNNEL_PREFIX):
            await self._ports_tunnel(target, protocol)
            return
        if not target.ports:
            raise http.Rejected(400, "port forwarding by WebSocket channels needs ports in the PortForwardRequest")
        await self._upgraded(http.websocket_headers(self._request, protocol))
        session = WebSocketSession(self._transport, protocol, 2 * len(target.ports))
        ports = portforward.PortForward(target)

        async def work() -> None:
            await portforward.announce(target.ports, session.channels)
            for number, port in enumerate(target.ports):
                ports.start(port, session.channels[2 * number], session.channels[2 * number + 1])
            await ports.all_ended()

        try:
            await self._until_first(session.run(), work())
        finally:
            await ports.close()
        await session.close()
        await self._transport.finish()

    async def _ports_tunnel(self, target: PortForwardTarget, protocol: str) -> None:
        await self._upgraded(http.websocket_headers(self._request, protocol))
        tunnel = Tunnel(self._transport)
        ports = portforward.PortForward(target)
        session = SpdySession(tunnel, ports.take)
        try:
            await self._until_first(session.run())
        finally:
            await ports.close()
        await tunnel.close()
        await self._transport.finish()

    # Both

    async def _upgraded(self, headers: list[tuple[str, str]]) -> None:
        self._transport.unread(await self._exchange.upgrade(headers))

    async def _until_first(self, pump: Work, work: Work | None = None) -> None:
        """Until the work is done, the client has gone (`pump` returns), or nothing has moved for too long."""
        fd = self._transport.fd
        hung_up = asyncio.Event()
        self._hangups.watch(fd, hung_up.set)
        waits = [asyncio.create_task(each) for each in (pump, self._idle(), _hangup(hung_up))]
        if work is not None:
            waits.append(asyncio.create_task(work))
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._hangups.forget(fd)
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        for task in done:
            with contextlib.suppress(ClientGone):
                task.result()

    async def _idle(self) -> None:
        while True:
            if not self._idle_timeout_s:
                await asyncio.Event().wait()
            left = self._transport.moved_at + self._idle_timeout_s - time.monotonic()
            if left <= 0:
                _log.info("a session was idle for %g s: closed", self._idle_timeout_s)
                return
            await asyncio.sleep(left)


async def _hangup(hung_up: asyncio.Event) -> None:
    await hung_up.wait()
    await asyncio.sleep(HANGUP_S)


BROKEN = (spdy.SpdyError, websocket.WebSocketError)  # what a client's breach of protocol raises out of `run`
