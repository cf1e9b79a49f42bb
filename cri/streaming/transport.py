"""The bytes of one client's connection, over TCP or TLS, and how one notices that the client has gone."""

import asyncio
import contextlib
import select
import time
from collections.abc import Callable

from cri.streaming.channel import ClientGone

READ_BYTES = 256 * 1024
LINGER_S = 10.0  # for a client to take the end and to close in its turn


class Transport:
    """A connected client. `moved_at` is when something other than keep-alives last went in or out."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._already_read = b""
        self.moved_at = time.monotonic()

    @property
    def fd(self) -> int:
        fd: int = self._writer.get_extra_info("socket").fileno()
        return fd

    def moved(self) -> None:
        self.moved_at = time.monotonic()

    def unread(self, data: bytes) -> None:
        """Let the next `read` return this."""
        self._already_read = data

    async def read(self) -> bytes:
        """The next bytes; b"" at the end, however it came."""
        if self._already_read:
            data, self._already_read = self._already_read, b""
            return data
        try:
            return await self._reader.read(READ_BYTES)
        except OSError:
            return b""

    async def write(self, data: bytes) -> None:
        """Send; waits as long as the client does not read. Raises ClientGone."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise ClientGone(str(error)) from error

    async def finish(self) -> None:
        """Send what is left and close without losing it.

        To close while the client still sends would make the kernel answer with a reset, which throws away what the
        client has not read yet. So: tell the end, read on until the client closes too.
        """
        with contextlib.suppress(TimeoutError, OSError, ClientGone):
            async with asyncio.timeout(LINGER_S):
                if self._writer.can_write_eof():
                    self._writer.write_eof()
                    while await self.read():
                        pass
                else:  # TLS has an end of its own, which waits in the same way
                    self._writer.close()
                    await self._writer.wait_closed()
        self.abort()

    def abort(self) -> None:
        self._writer.transport.abort()


class Hangups:
    """Notices clients that close while nobody reads from them: asyncio sees the end of a stream only by reading it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._loop.add_reader(self._epoll.fileno(), self._on_events)

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call once when the other side of this socket has closed, or has reset it; `forget` before the fd closes."""
        self._callbacks[fd] = callback
        self._epoll.register(fd, select.EPOLLRDHUP | select.EPOLLONESHOT)

    def forget(self, fd: int) -> None:
        if self._callbacks.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def _on_events(self) -> None:
        for fd, _ in self._epoll.poll(0):
            callback = self._callbacks.get(fd)
            if callback is not None:
                callback()

    def close(self) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
