"""The daemon's side of the stream server."""

import asyncio
import contextlib
import hashlib
import json
import os
import socket
import sys
from pathlib import Path

import msgspec

from cri.streaming.control import SOCKET, encode_target
from cri.streaming.settings import StreamSettings
from cri.streaming.targets import Target, kind_of
from oci import monitor_client, monitor_connection
from oci.errors import Error, ResourceExhausted, Unavailable
from oci.fork_server import DEFAULT_ENVIRONMENT
from oci.lasting_server import LastingServer
from oci.monitor_connection import Connection
from oci.version import VERSION
from sandbox.network import interfaces

BACKLOG = 128
RETIRE_S = 5.0


class Streams(LastingServer):
    """Registers what streams are for."""

    def __init__(self, run_dir: Path, settings: StreamSettings) -> None:
        super().__init__(run_dir, SOCKET, "stream server", program(settings))
        self._settings = settings

    async def start(self) -> None:
        """Take over the server of an earlier daemon, or start one. Raises Unavailable with its last words."""
        await self._connected()

    async def register(self, target: Target) -> str:
        """The URL for the caller's caller: good for one session, and for a minute. Unavailable, ResourceExhausted."""
        file = os.memfd_create("target.json", os.MFD_CLOEXEC)
        try:
            os.write(file, encode_target(kind_of(target), target))
            try:
                answer, _ = await (await self._connected()).call("register", fds={"target": file})
            except Unavailable:  # it has just died: a new one can do it
                answer, _ = await (await self._connected()).call("register", fds={"target": file})
        finally:
            os.close(file)
        if "exhausted" in answer:
            raise ResourceExhausted(answer["exhausted"])
        url: str = answer["url"]
        return url

    async def retire(self) -> None:
        """Let it end: at once, or after its last session. Starts none to do so."""
        async with self._connecting:  # one that is just being started is ended, too
            if self._connection is not None and self._connection.is_open:
                with contextlib.suppress(Error, TimeoutError):
                    await _retire(self._connection)
            self.close()

    async def _start(self, log: int) -> None:
        main = Path(__file__).with_name("__main__.py")
        with self._listen() as listener, monitor_connection.listen(self._run_dir, SOCKET) as control:
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", str(main), str(self._run_dir), self._program),
                msgspec.json.encode(self._settings).decode(),
                *(str(control.fileno()), str(listener.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=log,
                pass_fds=(control.fileno(), listener.fileno()),
                env={**DEFAULT_ENVIRONMENT, "LC_ALL": "C.UTF-8"},
                start_new_session=True,
            )

    def _listen(self) -> socket.socket:
        """Raises Unavailable where the address cannot be had."""
        address, port = self._settings.address, self._settings.port
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise Unavailable(f"streams cannot be served on {address} port {port}: {error.strerror}") from error
        return listener


async def _retire(connection: Connection) -> None:
    """Returns when it has gone; at once where sessions keep it. Raises Error or TimeoutError."""
    gone = asyncio.Event()
    connection.on_lost = gone.set
    answer, _ = await connection.call("retire", timeout_s=RETIRE_S)
    if not answer["sessions"]:
        async with asyncio.timeout(RETIRE_S):
            await gone.wait()


def program(settings: StreamSettings) -> str:
    """What makes one server another: our version, its modules' text, the Python that runs it, and its settings."""
    digest = hashlib.sha256(sys.version.encode())
    sources = [
        *sorted(Path(__file__).parent.glob("*.py")),
        Path(monitor_client.__file__),
        Path(monitor_connection.__file__),
        Path(interfaces.__file__),
    ]
    for source in sources:
        digest.update(source.read_bytes())
    digest.update(json.dumps(msgspec.to_builtins(settings), sort_keys=True).encode())
    return f"{VERSION}-{digest.hexdigest()[:16]}"
