"""Port forwarding: each of a client's connections joined with one to a port on the pod's loopback addresses.

A connection that fails, or breaks, takes its own two streams with it and nothing else. Its reason goes to our log and
not to its error stream: a client in Go closes the whole session when it finds a text there. Only what makes the
session useless, such as a pod whose network is gone, is told that way.
"""

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Sequence

from cri.streaming.channel import Channel, ClientGone
from cri.streaming.spdy_session import Refused, SpdyStream
from cri.streaming.targets import PortForwardTarget
from sandbox.network.interfaces import in_netns

_log = logging.getLogger(__name__)

CONNECT_S = 10.0
PAIR_WAIT_S = 30.0  # between a connection's first stream and its second
CHUNK_BYTES = 128 * 1024
LOOPBACKS = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class PortForward:
    """One session: pairs of a SPDY client's streams, and the connections that are made for them."""

    def __init__(self, target: PortForwardTarget) -> None:
        self._target = target
        self._halves: dict[str, dict[str, SpdyStream]] = {}  # by request: what waits for the other stream
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, stream: SpdyStream) -> None:
        """A new stream; with its pair's second one the connection is made."""
        kind, port = stream.headers.get("streamtype", ""), _port(stream.headers.get("port", ""))
        request = _request(stream, kind)
        if kind not in ("data", "error") or not port or not request:
            raise Refused
        pair = self._halves.setdefault(request, {})
        if kind in pair:
            raise Refused
        pair[kind] = stream
        if len(pair) == 2:
            del self._halves[request]
            self.start(port, pair["data"], pair["error"])
        else:
            self._start(self._expire(request, pair), f"port-forward {request}")

    def start(self, port: int, data: Channel, error: Channel) -> None:
        self._start(forward(self._target, port, data, error), f"port-forward to port {port}")

    async def close(self) -> None:
        """End all connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def all_ended(self) -> None:
        """Wait for the connections that there are."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _start(self, work: "asyncio._CoroutineLike[None]", name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s ended by a defect", task.get_name(), exc_info=error)

    async def _expire(self, request: str, pair: dict[str, SpdyStream]) -> None:
        await asyncio.sleep(PAIR_WAIT_S)
        if self._halves.get(request) is pair:
            del self._halves[request]
            for stream in pair.values():
                await stream.reset()


def _port(text: str) -> int:
    """0 where it is none."""
    return int(text) if text.isascii() and text.isdigit() and 0 < int(text[:6]) < 65536 and len(text) < 6 else 0


def _request(stream: SpdyStream, kind: str) -> str:
    """What both streams of a connection have in common.

    Clients before Kubernetes 1.2 send no request ID: they open the error stream and, next, the data stream.
    """
    return stream.headers.get("requestid", "") or f"stream {stream.id if kind == 'error' else stream.id - 2}"


async def forward(target: PortForwardTarget, port: int, data: Channel, error: Channel) -> None:
    """One connection, to its end."""
    try:
        sock = await connect(target.netns, port, target.ips)
    except FileNotFoundError:
        _log.warning("port-forward to pod sandbox %s: its network namespace is gone", target.sandbox_id)
        with contextlib.suppress(ClientGone):
            await error.write(f"pod sandbox {target.sandbox_id} has no network any more".encode())
        await error.close()
        await data.reset()
        return
    except (OSError, TimeoutError) as problem:
        _log.info("port-forward to port %d of pod sandbox %s: %s", port, target.sandbox_id, problem)
        await error.close()
        await data.reset()
        return
    with sock:
        try:
            await _join(sock, data)
        except (OSError, ClientGone) as problem:
            if isinstance(problem, OSError):  # that clients reset their streams is how they close
                _log.info("port-forward to port %d of pod sandbox %s broke: %s", port, target.sandbox_id, problem)
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            await data.reset()
    await data.close()
    await error.close()


async def connect(netns: str, port: int, ips: Sequence[str] = ()) -> socket.socket:
    """A connection to `port` on the loopback addresses of a network namespace ("" is ours), else on `ips` from here.

    Raises OSError: the one of 127.0.0.1 where no other answers; FileNotFoundError when the namespace is gone.
    """
    first: OSError | None = None
    for where, family, address in _addresses(netns, ips):
        try:
            return await _connect(where, family, address, port)
        except FileNotFoundError:
            raise
        except OSError as error:
            first = first or error
    assert first is not None
    raise first


def _addresses(netns: str, ips: Sequence[str]) -> list[tuple[str, socket.AddressFamily, str]]:
    """Network namespace, family and address, in the order in which they are tried."""
    within = [(netns, family, address) for family, address in LOOPBACKS]
    return [*within, *(("", socket.AF_INET6 if ":" in ip else socket.AF_INET, ip) for ip in ips)]


async def _connect(netns: str, family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    def make() -> socket.socket:
        return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)

    # A socket belongs to the namespace in which it was made, whoever connects it.
    sock = await asyncio.to_thread(in_netns, netns, make) if netns else make()
    try:
        async with asyncio.timeout(CONNECT_S):
            await asyncio.get_running_loop().sock_connect(sock, (address, port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


async def _join(sock: socket.socket, data: Channel) -> None:
    """Both directions, each with its own end. Raises OSError or ClientGone where one breaks."""
    loop = asyncio.get_running_loop()

    async def to_pod() -> None:
        while content := await data.read():
            await loop.sock_sendall(sock, content)
        if data.was_reset:
            raise ClientGone("the client has reset its stream")
        sock.shutdown(socket.SHUT_WR)

    async def from_pod() -> None:
        while content := await loop.sock_recv(sock, CHUNK_BYTES):
            await data.write(content)
            await asyncio.sleep(0)
        await data.close()

    async def both() -> None:
        await asyncio.gather(*directions)

    directions = [asyncio.create_task(to_pod()), asyncio.create_task(from_pod())]
    waits = [asyncio.create_task(both()), asyncio.create_task(data.until_reset())]
    try:
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if waits[0] not in done:
            raise ClientGone("the client has reset its stream")
        waits[0].result()
    finally:
        for task in (*waits, *directions):
            task.cancel()
        await asyncio.gather(*waits, *directions, return_exceptions=True)


async def announce(ports: Sequence[int], channels: Sequence[Channel]) -> None:
    """In the WebSocket protocol each channel begins with its port: two for each, data and error. Little endian."""
    for number, channel in enumerate(channels):
        await channel.write(struct.pack("<H", ports[number // 2]))
