"""The HTTP/1.1 part of a session: one request that asks for an upgrade, and its answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import h11
from wsproto.utilities import generate_accept_token

from cri.streaming.transport import Transport

HEAD_BYTES = 16 * 1024
BODY_BYTES = 16 * 1024  # clients send none; what proxies may add is passed over
SPDY = "SPDY/3.1"
STREAM_PROTOCOL = "X-Stream-Protocol-Version"


class Rejected(Exception):
    """The request gets this answer, and nothing else."""

    def __init__(self, status: int, text: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = headers


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, Sequence[str]]  # by name in lower case

    def words(self, name: str) -> list[str]:
        """The comma-separated values of all headers of this name, in their order."""
        return [word.strip() for value in self.headers.get(name.lower(), ()) for word in value.split(",")]

    @property
    def wants_upgrade_to(self) -> str:
        """In lower case; "" for none."""
        if "upgrade" not in (word.lower() for word in self.words("Connection")):
            return ""
        return next(iter(self.words("Upgrade")), "").lower()


class Exchange:
    """The one request of a connection."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)

    async def request(self) -> Request:
        """Raises Rejected for what is no proper request; ConnectionError when the client closes before."""
        try:
            head = await self._event()
            if not isinstance(head, h11.Request):
                raise ConnectionError("closed before a request")
            body = 0
            while isinstance(event := await self._event(), h11.Data):
                body += len(event.data)
                if body > BODY_BYTES:
                    raise Rejected(413, "a request for streams has no body")
        except h11.RemoteProtocolError as error:
            raise Rejected(error.error_status_hint, str(error)) from error
        headers: dict[str, list[str]] = {}
        for name, value in head.headers:
            headers.setdefault(name.decode("ascii").lower(), []).append(value.decode("latin-1"))
        return Request(head.method.decode("ascii"), urlsplit(head.target.decode("ascii")).path, headers)

    async def _event(self) -> h11.Event | type[h11.PAUSED]:
        while True:
            event = self._connection.next_event()
            if event is not h11.NEED_DATA:
                return cast("h11.Event | type[h11.PAUSED]", event)
            self._connection.receive_data(await self._transport.read())

    async def upgrade(self, headers: Sequence[tuple[str, str]]) -> bytes:
        """Answer that the protocol changes; what the client has sent of the new one already."""
        answer = h11.InformationalResponse(status_code=101, headers=[("Connection", "Upgrade"), *headers])
        sent = self._connection.send(answer)
        assert sent is not None
        await self._transport.write(sent)
        return self._connection.trailing_data[0]

    async def reject(self, rejection: Rejected) -> None:
        if self._connection.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        text = (rejection.text + "\n").encode()
        headers = [
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Content-Length", str(len(text))),
            ("Connection", "close"),
            *rejection.headers,
        ]
        sent = self._connection.send(h11.Response(status_code=rejection.status, headers=headers)) or b""
        sent += self._connection.send(h11.Data(data=text)) or b""
        await self._transport.write(sent)


def negotiated_spdy(request: Request, supported: Sequence[str]) -> str:
    """The first that the client offers and we know; "" where it offers none. Raises Rejected where none fits."""
    offered = request.words(STREAM_PROTOCOL)
    for protocol in offered:
        if protocol in supported:
            return protocol
    if not offered:
        return ""
    accepted = [("X-Accepted-Stream-Protocol-Versions", each) for each in supported]
    raise Rejected(403, f"unable to upgrade: none of {', '.join(offered)} is supported", accepted)


def negotiated_websocket(request: Request, supported: Sequence[str]) -> str:
    """The first subprotocol that the client offers and we know; "" where it offers none. Raises Rejected."""
    offered = request.words("Sec-WebSocket-Protocol")
    for protocol in offered:
        if protocol in supported:
            return protocol
    if not offered and "" in supported:
        return ""
    raise Rejected(403, f"unable to upgrade: none of {', '.join(offered) or 'no subprotocols'} is supported")


def spdy_headers(protocol: str) -> list[tuple[str, str]]:
    return [("Upgrade", SPDY), *([(STREAM_PROTOCOL, protocol)] if protocol else [])]


def websocket_headers(request: Request, protocol: str) -> list[tuple[str, str]]:
    """Raises Rejected where the handshake is not RFC 6455's."""
    keys = request.headers.get("sec-websocket-key", ())
    if request.method != "GET" or len(keys) != 1 or request.words("Sec-WebSocket-Version") != ["13"]:
        raise Rejected(400, "not a WebSocket handshake of version 13", [("Sec-WebSocket-Version", "13")])
    accept = generate_accept_token(keys[0].encode("latin-1"))
    accept_text = accept if isinstance(accept, str) else bytes(accept).decode("ascii")
    answer = [("Upgrade", "websocket"), ("Sec-WebSocket-Accept", accept_text)]
    return [*answer, *([("Sec-WebSocket-Protocol", protocol)] if protocol else [])]
