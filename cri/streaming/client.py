"""The daemon's side of the stream server: started where there is none, replaced where it is another version's."""

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
from oci.monitor_connection import Connection
from oci.version import VERSION
from sandbox.network import interfaces

PEER = "stream server"
LOG = "streaming.log"
LOG_BYTES = 1024 * 1024  # a longer one is begun anew when a server starts
BACKLOG = 128
RETIRE_S = 5.0


class Streams:
    """Registers what streams are for. After the server's death the next call starts a new one."""

    def __init__(self, run_dir: Path, settings: StreamSettings) -> None:
        self._run_dir = run_dir
        self._settings = settings
        self._program = program(settings)
        self._connection: Connection | None = None
        self._connecting = asyncio.Lock()
        self.pid = 0

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

    def close(self) -> None:
        """Let go of it; it goes on."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _connected(self) -> Connection:
        async with self._connecting:
            if self._connection is None or not self._connection.is_open:
                self._connection = await self._connect()
            return self._connection

    async def _connect(self) -> Connection:
        try:
            connection = await Connection.open(self._run_dir, SOCKET, PEER)
            greeting = await connection.hello()
        except Unavailable:
            pass
        else:
            if greeting["program"] == self._program:
                self.pid = greeting["pid"]
                return connection
            await connection.call("retire", timeout_s=RETIRE_S)  # any version knows this; it stays for its sessions
            connection.close()
        await self._start()
        connection = await Connection.open(self._run_dir, SOCKET, PEER)
        try:
            self.pid = (await connection.hello())["pid"]
        except Unavailable as error:
            connection.close()
            raise Unavailable(f"the stream server did not start: {_last_line(self._run_dir / LOG)}") from error
        return connection

    async def _start(self) -> None:
        main = Path(__file__).with_name("__main__.py")
        with self._listen() as listener, monitor_connection.listen(self._run_dir, SOCKET) as control:
            log = _open_log(self._run_dir / LOG)
            try:
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
            finally:
                os.close(log)

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


def _open_log(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    if path.exists() and path.stat().st_size > LOG_BYTES:
        flags |= os.O_TRUNC
    return os.open(path, flags, 0o600)


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
