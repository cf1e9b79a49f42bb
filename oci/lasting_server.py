"""The daemon's side of a server that outlives it: taken over, started if there is none, replaced by its successor."""

import asyncio
import os
from abc import ABC, abstractmethod
from pathlib import Path

from oci.errors import Unavailable
from oci.monitor_connection import Connection

LOG_BYTES = 1024 * 1024  # a longer log is begun anew when a server starts


class LastingServer(ABC):
    """After the server's death the next call starts a new one; one that runs another `program` is told to retire.

    `name` is what errors call it; `socket` is its name in `run_dir`, where its log lies beside it.
    """

    def __init__(self, run_dir: Path, socket: str, name: str, program: str) -> None:
        self.pid = 0
        self._run_dir = run_dir
        self._socket = socket
        self._name = name
        self._program = program
        self._log = (run_dir / socket).with_suffix(".log")
        self._connection: Connection | None = None
        self._connecting = asyncio.Lock()

    @abstractmethod
    async def _start(self, log: int) -> None:
        """Start a process that will listen on the socket, with `log` as its stderr. Raises Unavailable."""

    def close(self) -> None:
        """Let go of it; it goes on."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _connected(self) -> Connection:
        """Raises Unavailable, with its last words, when it cannot be started."""
        async with self._connecting:
            if self._connection is None or not self._connection.is_open:
                self._connection = await self._connect()
            return self._connection

    async def _connect(self) -> Connection:
        try:
            connection, program = await self._greeted()
        except Unavailable:
            pass
        else:
            if program == self._program:
                return connection
            await connection.call("retire")  # any version knows this; it stays while somebody needs it
            connection.close()
        log = _open_log(self._log)
        try:
            await self._start(log)
        finally:
            os.close(log)
        try:
            connection, _ = await self._greeted()
        except Unavailable as error:
            raise Unavailable(f"the {self._name} did not start: {self._last_words()}") from error
        return connection

    async def _greeted(self) -> tuple[Connection, str]:
        """A connection to whoever serves, and which program that is."""
        connection = await Connection.open(self._run_dir, self._socket, self._name)
        try:
            greeting = await connection.hello()
        except Unavailable:
            connection.close()
            raise
        self.pid = greeting["pid"]
        return connection, greeting["program"]

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def _open_log(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    if path.exists() and path.stat().st_size > LOG_BYTES:
        flags |= os.O_TRUNC
    return os.open(path, flags, 0o600)
