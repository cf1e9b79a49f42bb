"""The stream server: takes connections, holds them to its limits, and gives each that has a token its session."""

import asyncio
import contextlib
import logging
import socket

from cri.streaming import http
from cri.streaming.channel import ClientGone
from cri.streaming.sessions import BROKEN, Session
from cri.streaming.settings import StreamSettings
from cri.streaming.targets import KINDS, Target, kind_of
from cri.streaming.tls import TlsContexts
from cri.streaming.tokens import Tokens
from cri.streaming.transport import READ_BYTES, Hangups, Transport

_log = logging.getLogger(__name__)

HANDSHAKE_S = 10.0  # TLS and the request together
HANDSHAKES = 256  # unfinished at once; a newer one ends the oldest
SESSIONS = 1000
ACCEPT_PAUSE_S = 0.5  # when no fd is left
REJECT_S = 2.0
KEEPALIVE_S = (30, 10, 6)  # idle, interval, probes: a client that vanished is noticed after a minute and a half


class StreamServer:
    def __init__(self, settings: StreamSettings, listener: socket.socket) -> None:
        """Raises OSError or ssl.SSLError where the certificate is not usable."""
        self._settings = settings
        self._listener: socket.socket | None = listener
        self._tls = TlsContexts(settings.tls) if settings.tls else None
        self._tokens: Tokens[Target] = Tokens()
        self._hangups = Hangups()
        self._handshakes: dict[asyncio.Task[None], None] = {}  # oldest first
        self._sessions: set[asyncio.Task[None]] = set()
        host, port = listener.getsockname()[:2]
        scheme = "https" if settings.tls else "http"
        self.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        self._accepting = asyncio.create_task(self._accept(listener), name="accept")

    @property
    def session_count(self) -> int:
        return len(self._sessions)

    @property
    def is_busy(self) -> bool:
        """Whether somebody is served, or may come with a token."""
        return bool(self._sessions or self._handshakes or (self._listener is not None and len(self._tokens)))

    def register(self, target: Target) -> str:
        """The URL at which the target's streams can be had once, within a minute. Raises ResourceExhausted."""
        return f"{self.url}/{kind_of(target)}/{self._tokens.issue(target)}"

    def stop_listening(self) -> None:
        """Take nobody new; who is here is served on."""
        self._accepting.cancel()
        if self._listener is not None:
            # The cancelled accept forgets its fd a turn of the loop later: somebody else's by then.
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None

    async def close(self) -> None:
        """End everything."""
        self.stop_listening()
        tasks = [self._accepting, *self._handshakes, *self._sessions]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._hangups.close()

    # Connections

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(listener)
            except OSError as error:
                _log.error("cannot take a connection: %s", error)
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            if len(self._handshakes) >= HANDSHAKES:
                next(iter(self._handshakes)).cancel()
            task = asyncio.create_task(self._serve(client), name="connection")
            self._handshakes[task] = None
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._handshakes.pop(task, None)
        self._sessions.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a session ended by a defect", exc_info=error)

    async def _serve(self, client: socket.socket) -> None:
        transport: Transport | None = None
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                transport = await self._connect(client)
                exchange = http.Exchange(transport)
                try:
                    request = await exchange.request()
                    session, target = self._admit(transport, exchange, request)
                except http.Rejected as rejection:
                    await _reject(transport, exchange, rejection)
                    return
            await self._run(session, target, transport, exchange)
        except (OSError, TimeoutError, ClientGone, EOFError):
            return  # it went away, was too slow, or speaks something else
        except BROKEN as error:
            _log.warning("a client broke the protocol: %s", error)
        finally:
            if transport is not None:
                transport.abort()
            else:
                client.close()

    async def _connect(self, client: socket.socket) -> Transport:
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        for option, value in zip(options, KEEPALIVE_S, strict=True):
            client.setsockopt(socket.IPPROTO_TCP, option, value)
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=READ_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        context = self._tls.current() if self._tls else None
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, client, ssl=context)
        return Transport(reader, asyncio.StreamWriter(transport, protocol, reader, loop))

    def _admit(self, transport: Transport, exchange: http.Exchange, request: http.Request) -> tuple[Session, Target]:
        """Raises Rejected. The token is spent from here on."""
        kind, _, token = request.path.removeprefix("/").partition("/")
        if kind not in KINDS:
            raise http.Rejected(404, "not found")
        if request.method not in ("GET", "POST"):
            raise http.Rejected(405, f"{request.method} is not allowed", [("Allow", "GET, POST")])
        if len(self._sessions) >= SESSIONS:
            raise http.Rejected(503, f"{SESSIONS} sessions are open already")
        target = self._tokens.take(token)
        if target is None or kind_of(target) != kind:
            raise http.Rejected(404, "not found: the URL was used already, or has expired")
        return Session(transport, exchange, request, self._hangups, self._settings.idle_timeout_s), target

    async def _run(self, session: Session, target: Target, transport: Transport, exchange: http.Exchange) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handshakes.pop(task, None)
        self._sessions.add(task)
        try:
            await session.run(target)
        except http.Rejected as rejection:
            await _reject(transport, exchange, rejection)


async def _reject(transport: Transport, exchange: http.Exchange, rejection: http.Rejected) -> None:
    with contextlib.suppress(TimeoutError, ClientGone):
        async with asyncio.timeout(REJECT_S):
            await exchange.reject(rejection)
            await transport.finish()
