"""A stream server in the test's own event loop, and a "pod" to forward ports to on the node's loopback."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

from cri.streaming.server import StreamServer
from cri.streaming.settings import StreamSettings
from cri.streaming.targets import PortForwardTarget

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def serving(settings: StreamSettings | None = None) -> AsyncIterator[StreamServer]:
    """Ends with it, and nothing of it is left."""
    before = asyncio.all_tasks()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    server = StreamServer(settings or StreamSettings("127.0.0.1"), listener)
    try:
        yield server
    finally:
        await server.close()
        async with asyncio.timeout(5):
            while left := asyncio.all_tasks() - before - {asyncio.current_task()}:
                await asyncio.wait(left, timeout=0.1)
        assert server.session_count == 0


@contextlib.asynccontextmanager
async def pod(handler: Handler, address: str = "127.0.0.1") -> AsyncIterator[int]:
    """The port on which `handler` serves."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await handler(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(serve, address, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


def node(*ports: int) -> PortForwardTarget:
    """A pod on the node's own network."""
    return PortForwardTarget("sandbox", "", ports)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Raises TimeoutError."""
    for _ in range(int(timeout_s / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError
