"""One connection to the fork server or to a monitor: requests matched with answers, on the event loop.

Nothing here blocks: sockets are non-blocking and watched.
"""

import array
import asyncio
import contextlib
import errno
import itertools
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from oci import trace
from oci.errors import DeadlineExceeded, Error, FailedPrecondition, Unavailable
from oci.monitor import wire

CALL_TIMEOUT_S = 30.0  # of calls that involve no OCI runtime
BACKLOG = 128
BACKLOG_RETRY_S = 0.01
GRACE_S = 30.0  # over the time that a monitor gives the runtime: for killing it and cleaning up


class NotSent(Unavailable):
    """The other side was gone before the request reached it: it can be tried anew."""


class Connection:
    """One SEQPACKET connection: requests matched with answers by id, everything else handed to `on_event`."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self._sock = sock
        self._peer = peer
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[tuple[wire.Message, list[int]]]] = {}
        self._sending = asyncio.Lock()
        self._hello: asyncio.Future[wire.Message] = self._loop.create_future()
        self.on_event: Callable[[wire.Message], None] = lambda message: None
        self.on_lost: Callable[[], None] = lambda: None
        self._loop.add_reader(sock.fileno(), self._on_readable)

    @classmethod
    async def open(cls, directory: Path, name: str, peer: str) -> "Connection":
        """Raises Unavailable when nobody listens there."""
        deadline = asyncio.get_running_loop().time() + CALL_TIMEOUT_S
        while True:
            try:
                return cls(connect(directory, name), peer)
            except OSError as error:
                # EAGAIN: more are connecting at once than the listener has room for; it will come to them.
                if error.errno != errno.EAGAIN or asyncio.get_running_loop().time() > deadline:
                    text = f"cannot connect to the {peer} at {directory / name}: {error.strerror}"
                    raise Unavailable(text) from error
            await asyncio.sleep(BACKLOG_RETRY_S)

    async def hello(self) -> wire.Message:
        """The server's greeting. Raises Unavailable if it speaks a later protocol, or none."""
        try:
            greeting = await asyncio.wait_for(asyncio.shield(self._hello), CALL_TIMEOUT_S)
        except TimeoutError as error:
            raise Unavailable(f"the {self._peer} did not greet within {CALL_TIMEOUT_S:g} s") from error
        if greeting["protocol"] > wire.PROTOCOL:
            raise Unavailable(f"the {self._peer} speaks protocol {greeting['protocol']}, this is {wire.PROTOCOL}")
        return greeting

    @property
    def is_open(self) -> bool:
        return self._sock.fileno() >= 0

    async def call(
        self, verb: str, *, timeout_s: float = CALL_TIMEOUT_S, fds: Mapping[str, int] | None = None, **fields: Any
    ) -> tuple[wire.Message, list[int]]:
        """The answer and its fds, now the caller's. An error in it is raised as the kind that it names."""
        with trace.step(f"{self._peer}: {verb}"):
            return await self._call(verb, timeout_s, fds or {}, fields)

    async def _call(
        self, verb: str, timeout_s: float, fds: Mapping[str, int], fields: Mapping[str, Any]
    ) -> tuple[wire.Message, list[int]]:
        request = next(self._ids)
        answer: asyncio.Future[tuple[wire.Message, list[int]]] = self._loop.create_future()
        self._waiting[request] = answer
        message = {"id": request, "verb": verb, **fields, "fds": list(fds)}
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(msgspec.json.encode(message), tuple(fds.values()))
                result, received = await answer
        except TimeoutError as error:
            raise DeadlineExceeded(f"the {self._peer} did not answer {verb} within {timeout_s:g} s") from error
        finally:
            self._waiting.pop(request, None)
        if "error" in result:
            wire.close_all(received)
            raise _error(result, verb)
        return result, received

    async def _send(self, data: bytes, fds: tuple[int, ...]) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        if len(data) > wire.MESSAGE_BYTES:
            raise Error(f"request to the {self._peer}: {len(data)} bytes, at most {wire.MESSAGE_BYTES} are possible")
        async with self._sending:
            while True:
                try:
                    self._sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
                    return
                except BlockingIOError:
                    await self._writable()
                except OSError as error:
                    self.close(error.strerror or str(error))
                    raise NotSent(f"the {self._peer} is gone: {error.strerror}") from error

    async def _writable(self) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()
        fd = self._sock.fileno()
        self._loop.add_writer(fd, _resolve, ready)
        try:
            await ready
        finally:
            self._loop.remove_writer(fd)

    def _on_readable(self) -> None:
        try:
            message, fds = wire.receive(self._sock)
        except BlockingIOError:
            return
        except (OSError, wire.ProtocolError) as error:
            self.close(str(error))
            return
        if message is None:
            self.close("connection closed")
            return
        if "id" in message:
            waiting = self._waiting.pop(message["id"], None)
            if waiting is None or waiting.done():
                wire.close_all(fds)  # nobody waits any more
            else:
                waiting.set_result((message, fds))
            return
        wire.close_all(fds)
        if "hello" in message:
            if not self._hello.done():
                self._hello.set_result(message["hello"])
        else:
            self.on_event(message)

    def close(self, reason: str = "closed") -> None:
        """Idempotent. Whoever waits for an answer gets Unavailable."""
        if not self.is_open:
            return
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        lost = Unavailable(f"the {self._peer} is gone: {reason}")
        futures: list[asyncio.Future[Any]] = [*self._waiting.values(), self._hello]
        for waiting in futures:
            if not waiting.done():
                waiting.set_exception(lost)
                waiting.exception()  # seen: nobody needs to wait for it
        self._waiting.clear()
        self.on_lost()


def _error(answer: wire.Message, verb: str) -> Error:
    kinds: dict[str, type[Error]] = {"deadline": DeadlineExceeded, "precondition": FailedPrecondition}
    return kinds.get(answer.get("kind", ""), Error)(f"{verb}: {answer['error']}")


@contextlib.contextmanager
def _short_path(directory: Path, name: str) -> Iterator[str]:
    """`directory/name` as an address that fits a UNIX socket's 107 bytes however long the directory's path is."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def connect(directory: Path, name: str) -> socket.socket:
    """A connection to the socket `directory/name`. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        with _short_path(directory, name) as address:
            sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def listen(directory: Path, name: str) -> socket.socket:
    """A listening socket, mode 0600, at `directory/name`, whatever was there before. Raises OSError."""
    (directory / name).unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        with _short_path(directory, name) as address:
            os.fchmod(sock.fileno(), 0o600)  # what the file is then made with
            sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
