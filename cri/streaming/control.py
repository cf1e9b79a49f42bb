"""The stream server's control socket: what the daemon asks of it, and when it ends.

The same messages as a monitor's (oci/monitor/wire.py). Verbs: `register` (fd `target`: a file of JSON) answers with a
URL, `retire` with the number of sessions that are left, `status` with numbers.
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from cri.streaming.server import StreamServer
from cri.streaming.targets import KINDS, Target
from oci.errors import ResourceExhausted
from oci.monitor import wire

_log = logging.getLogger(__name__)

SOCKET = "streaming.sock"
LONELY_S = 60.0  # without a daemon and without a session it is of no use
LOOK_S = 0.1


class Control:
    def __init__(self, listener: socket.socket, path: Path, program: str, server: StreamServer) -> None:
        self._listener: socket.socket | None = listener
        self._path = path
        self._program = program
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._clients: set[Any] = set()
        self._is_retired = False
        listener.setblocking(False)
        self._loop.add_reader(listener.fileno(), self._on_connect)

    async def until_unneeded(self) -> None:
        """Wait until it is retired and its last session has ended, or nobody has needed it for a minute."""
        lonely_since = self._loop.time()
        while not (self._is_retired and not self._server.is_busy):
            await asyncio.sleep(LOOK_S)
            if self._clients or self._server.is_busy:
                lonely_since = self._loop.time()
            if self._loop.time() - lonely_since > LONELY_S:
                self._stop_listening()
                return

    def _on_connect(self) -> None:
        assert self._listener is not None
        client = wire.accept(self._listener)
        if client is None:
            return
        self._clients.add(client)
        self._loop.add_reader(client.fileno(), self._on_message, client)
        hello = {
            "protocol": wire.PROTOCOL,
            "program": self._program,
            "pid": os.getpid(),
            "url": self._server.url,
        }
        self._tell(client, {"hello": hello})

    def _tell(self, client: Any, message: wire.Message) -> None:
        try:
            wire.send(client, message)
        except OSError:
            self._drop(client)

    def _drop(self, client: Any) -> None:
        if client in self._clients:
            self._clients.discard(client)
            self._loop.remove_reader(client.fileno())
            client.close()

    def _on_message(self, client: Any) -> None:
        try:
            message, fds = wire.receive(client)
        except BlockingIOError:
            return
        except (OSError, wire.ProtocolError):
            self._drop(client)
            return
        if message is None:
            self._drop(client)
            return
        with contextlib.ExitStack() as stack:
            stack.callback(wire.close_all, fds)
            self._tell(client, {"id": message.get("id", 0), **self._answer(message, fds)})

    def _answer(self, message: wire.Message, fds: list[int]) -> wire.Message:
        verbs: dict[str, Callable[[wire.Message, list[int]], wire.Message]] = {
            "register": self._register,
            "retire": self._retire,
            "status": self._status,
        }
        verb = verbs.get(message.get("verb", ""))
        if verb is None:
            return {"error": f"unknown verb {message.get('verb')!r}"}
        try:
            return verb(message, fds)
        except Exception as error:
            _log.exception("verb %s", message.get("verb"))
            return {"error": f"{type(error).__name__}: {error}"}

    def _register(self, message: wire.Message, fds: list[int]) -> wire.Message:
        with open(fds[0], "rb", closefd=False) as file:
            file.seek(0)
            target = decode_target(file.read())
        try:
            return {"url": self._server.register(target)}
        except ResourceExhausted as error:
            return {"exhausted": str(error)}

    def _retire(self, _message: wire.Message, _fds: list[int]) -> wire.Message:
        self._is_retired = True
        self._stop_listening()
        self._server.stop_listening()
        return {"sessions": self._server.session_count}

    def _status(self, _message: wire.Message, _fds: list[int]) -> wire.Message:
        return {"sessions": self._server.session_count}

    def _stop_listening(self) -> None:
        """Make room for a successor on the same path."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
            self._path.unlink(missing_ok=True)


def encode_target(kind: str, target: Target) -> bytes:
    return msgspec.json.encode({"kind": kind, "target": target})


def decode_target(data: bytes) -> Target:
    """Raises ValueError (of which msgspec's errors are kinds) or KeyError for what is no target."""
    message = json.loads(data)
    return msgspec.convert(message["target"], KINDS[message["kind"]])
