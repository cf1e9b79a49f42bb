"""Pipes and terminals read and written on the event loop, a chunk at a time."""

import asyncio
import contextlib
import errno
import fcntl
import functools
import os
import socket
import struct
import termios
from collections.abc import Callable
from typing import Any

CHUNK_BYTES = 128 * 1024
_SO_SNDBUFFORCE = 32  # asm-generic/socket.h
PIPE_BYTES = 1024 * 1024
_PIPE_BYTES_WITHOUT_CAPABILITY = 256 * 1024
BURST_BYTES = 8 * 1024 * 1024  # what a fast writer may be ahead of a reader for whom it does not wait


class End:
    """One end of a pipe, or a terminal's master; ours to close."""

    def __init__(self, fd: int, held_bytes: int = PIPE_BYTES) -> None:
        self.fd = fd
        self.held_bytes = held_bytes  # at most, between a writer that has gone and us
        os.set_blocking(fd, False)

    async def read(self, until: "asyncio.Future[Any]") -> bytes | None:
        """The next bytes; b"" when nobody holds the other end; None when `until` is done and there are none."""
        while (data := self.read_now()) is None and not until.done():
            loop = asyncio.get_running_loop()
            await _ready(self.fd, loop.add_reader, loop.remove_reader, until)
        return data

    def read_now(self) -> bytes | None:
        """The same without waiting: None when there is nothing yet."""
        if self.fd < 0:
            return b""
        try:
            return os.read(self.fd, CHUNK_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.EIO:  # a terminal that no process has open any more
                return b""
            raise

    async def write(self, data: bytes) -> bool:
        """Write all of it; False when nobody holds the other end any more."""
        rest = memoryview(data)
        while rest:
            if self.fd < 0:
                return False
            try:
                rest = rest[os.write(self.fd, rest) :]
            except BlockingIOError:
                loop = asyncio.get_running_loop()
                await _ready(self.fd, loop.add_writer, loop.remove_writer)
            except OSError as error:
                if error.errno in (errno.EPIPE, errno.EIO, errno.ECONNRESET):
                    return False
                raise
        return True

    def resize(self, rows: int, columns: int) -> None:
        """Of a terminal."""
        if self.fd >= 0:
            fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def close(self) -> None:
        """Idempotent. Nobody may be waiting on it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


async def _ready(
    fd: int, add: Callable[..., None], remove: Callable[[int], bool], until: "asyncio.Future[Any] | None" = None
) -> None:
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    wake = functools.partial(_resolve, ready)
    add(fd, _resolve, ready)
    if until is not None:
        until.add_done_callback(wake)
    try:
        await ready
    finally:
        remove(fd)
        if until is not None:
            until.remove_done_callback(wake)


def _resolve(future: "asyncio.Future[None]", _done: object = None) -> None:
    if not future.done():
        future.set_result(None)


def pipe() -> tuple[int, int]:
    """A pipe (read end, write end), as large as may be. The ends are blocking: a container gets one of them."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    for size in (PIPE_BYTES, _PIPE_BYTES_WITHOUT_CAPABILITY):
        with contextlib.suppress(PermissionError):  # over /proc/sys/fs/pipe-user-pages-soft
            fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, size)
            break
    return read_fd, write_fd


def burst_pipe() -> tuple[int, int]:
    """The same for a writer that does not wait: a pair of sockets that holds BURST_BYTES, where we may have that."""
    reader, writer = socket.socketpair()
    with reader, writer:
        try:
            writer.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, BURST_BYTES)
        except PermissionError:
            return pipe()
        return reader.detach(), writer.detach()
