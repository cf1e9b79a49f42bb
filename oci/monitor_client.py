"""The daemon's side of a container's monitor: its orders and events over its socket, on the event loop."""

import asyncio
import contextlib
import fcntl
import json
import os
import struct
import termios
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from oci.errors import DeadlineExceeded, Error, FailedPrecondition, Unavailable
from oci.exit_records import ExitRecord, read_exit_record
from oci.monitor import wire
from oci.monitor_connection import GRACE_S, Connection

MONITOR_SOCKET = "monitor.sock"
EXEC_OUTPUT_LIMIT_BYTES = 16 * 1024 * 1024  # per stream. Source: api.proto, ExecSync
ATTACH_PIPE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class InitProcess:
    pid: int
    start_time: int  # clock ticks since boot
    cgroups: tuple[tuple[str, str], ...]  # (controllers, path) per hierarchy; ("", path) is cgroup v2


@dataclass(frozen=True, slots=True)
class MonitorStatus:
    state: str  # new, creating, created (also when running), exited, failed
    init: InitProcess | None
    attached: int
    execs: int
    log_bytes: int
    log_dropped: int


@dataclass(frozen=True, slots=True)
class ExecRequest:
    process: Mapping[str, Any]  # an OCI process object; `terminal` decides about a terminal
    timeout_s: float | None = None  # then its whole process tree is killed


@dataclass(frozen=True, slots=True)
class ExecExit:
    exit_code: int
    timed_out: bool
    left: int = 0  # processes that could not be killed within ten seconds


@dataclass(frozen=True, slots=True)
class ExecResult:
    exit_code: int
    stdout: bytes
    stderr: bytes


class Monitor:
    """One container's monitor, by a connection of its own. Several may be connected to the same one."""

    def __init__(self, connection: Connection, directory: Path, pid: int) -> None:
        self._connection = connection
        self._directory = directory
        self._sessions: dict[int, ExecSession] = {}
        self._early: dict[int, ExecExit] = {}  # exits told before the session was made
        self._attachments: dict[int, Attachment] = {}
        self._exit: ExitRecord | None = None
        self._ended = asyncio.Event()
        self.pid = pid
        connection.on_event = self._on_event
        connection.on_lost = self._on_lost
        if not connection.is_open:
            self._on_lost()

    @classmethod
    async def connect(cls, directory: Path) -> "Monitor":
        """Raises Unavailable when the monitor is gone; then the exit record, if there is one, tells how it ended."""
        connection = await Connection.open(directory, MONITOR_SOCKET, "monitor")
        try:
            greeting = await connection.hello()
        except BaseException:
            connection.close()
            raise
        return cls(connection, directory, greeting["pid"])

    async def create(self, timeout_s: float) -> InitProcess:
        """The OCI runtime's `create`. After an error nothing of the container stays, the monitor included."""
        answer, _ = await self._connection.call("create", timeout_s=timeout_s + 2 * GRACE_S, patience_s=timeout_s)
        return _init(answer)

    async def start(self, timeout_s: float) -> None:
        """The OCI runtime's `start`."""
        await self._connection.call("start", timeout_s=timeout_s + GRACE_S, patience_s=timeout_s)

    async def exec(
        self, request: ExecRequest, stdin_fd: int = -1, stdout_fd: int = -1, stderr_fd: int = -1
    ) -> "ExecSession":
        """Start a process in the container. Its stdio are these fds (-1: the null device), which stay the caller's.

        With a terminal the fds are not used: the session has the terminal's master. Raises Error with the runtime's
        text where it cannot be started, FailedPrecondition if the container has exited.
        """
        stdio = {"stdin": stdin_fd, "stdout": stdout_fd, "stderr": stderr_fd}
        tty = bool(request.process.get("terminal"))
        given = {} if tty else {name: fd for name, fd in stdio.items() if fd >= 0}
        fds = {"process": os.memfd_create("process.json", os.MFD_CLOEXEC)}
        os.write(fds["process"], _to_json(request.process))
        fds |= {name: os.dup(fd) for name, fd in given.items()}
        starting = asyncio.get_running_loop().create_task(self._start_exec(request, tty, fds))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(_abandon)
            raise

    async def _start_exec(self, request: ExecRequest, tty: bool, fds: Mapping[str, int]) -> "ExecSession":
        try:
            answer, received = await self._connection.call(
                "exec",
                timeout_s=(request.timeout_s or 120.0) + GRACE_S,
                fds=fds,
                tty=tty,
                patience_s=request.timeout_s,
            )
        finally:
            wire.close_all(list(fds.values()))
        session = ExecSession(self, answer["exec"], answer["pid"], received[0] if received else -1)
        self._sessions[session.number] = session
        if session.number in self._early:
            self._exec_ended(session.number, self._early.pop(session.number))
        elif not self._connection.is_open:
            session.lost()
        return session

    async def exec_sync(
        self,
        process: Mapping[str, Any],
        timeout_s: float | None,
        limit_bytes: int = EXEC_OUTPUT_LIMIT_BYTES,
    ) -> ExecResult:
        """Run a process to its end and return what it wrote, at most `limit_bytes` of each stream.

        Raises DeadlineExceeded once its time is over and its whole tree is gone. What it leaves running is not waited
        for. If the caller is cancelled the process is killed.
        """
        async with _collector(limit_bytes) as stdout, _collector(limit_bytes) as stderr:
            try:
                session = await self.exec(
                    ExecRequest(process, timeout_s), stdout_fd=stdout.write_fd, stderr_fd=stderr.write_fd
                )
            finally:
                stdout.close_write()
                stderr.close_write()
            try:
                ended = await session.exit()
            except asyncio.CancelledError:
                session.abandon()
                raise
            if ended.timed_out:
                left = f"; {ended.left} of its processes cannot be killed" if ended.left else ""
                raise DeadlineExceeded(f"exec {_argv(process)}: not done after {timeout_s or 0:g} s, killed{left}")
            return ExecResult(ended.exit_code, stdout.take(), stderr.take())

    async def kill(self, signal: int, everyone: bool = False) -> None:
        """Signal the container's init; with `everyone` SIGKILL to each process of its cgroup as well."""
        await self._connection.call("kill", signal=int(signal), all=everyone)

    async def resize(self, rows: int, columns: int) -> None:
        """Raises FailedPrecondition where the container has no terminal."""
        await self._connection.call("resize", rows=rows, columns=columns)

    async def reopen_log(self) -> None:
        await self._connection.call("reopen_log")

    async def status(self) -> MonitorStatus:
        answer, _ = await self._connection.call("status")
        init = _init(answer) if answer["init"] else None
        return MonitorStatus(
            answer["state"],
            init,
            answer["attached"],
            answer["execs"],
            answer["log_bytes"],
            answer["log_dropped"],
        )

    async def attach(self, stdin_fd: int = -1, stdout_fd: int = -1, stderr_fd: int = -1) -> "Attachment":
        """Copy the container's output to these fds, from now on, and what is read from `stdin_fd` to its stdin.

        The fds (pipes or sockets) stay the caller's, who closes them; the monitor has its own copies, non-blocking.
        It lets go of a reader that falls more than its pipe and 256 KiB behind: give pipes of ATTACH_PIPE_BYTES.
        """
        given = {"stdin": stdin_fd, "stdout": stdout_fd, "stderr": stderr_fd}
        answer, _ = await self._connection.call("attach", fds={name: fd for name, fd in given.items() if fd >= 0})
        attachment = Attachment(self, answer["attachment"])
        self._attachments[attachment.number] = attachment
        return attachment

    async def wait_exit(self) -> ExitRecord:
        """The exit, when it comes. Raises Unavailable("monitor lost …") if the monitor ended without a record."""
        await self._ended.wait()
        if self._exit is None:
            raise Unavailable(f"monitor lost: process {self.pid} ended without a record in {self._directory}")
        return self._exit

    async def shutdown(self) -> None:
        """End it, if its container was never created or has exited; FailedPrecondition otherwise."""
        await self._connection.call("shutdown")

    def close(self) -> None:
        """Let go of it; it goes on. Whoever waits on it gets Unavailable."""
        self._connection.close()

    def _on_event(self, message: wire.Message) -> None:
        match message["event"]:
            case "exit":
                self._exit = msgspec.convert(message["record"], ExitRecord)
                self._ended.set()
            case "exec_exit":
                ended = ExecExit(message["exit_code"], message["timed_out"], message.get("left", 0))
                self._exec_ended(message["exec"], ended)
            case "detached":
                attachment = self._attachments.pop(message["attachment"], None)
                if attachment is not None:
                    attachment.ended(message["reason"])

    def _exec_ended(self, number: int, ended: ExecExit) -> None:
        session = self._sessions.pop(number, None)
        if session is None:
            self._early[number] = ended
        else:
            session.ended(ended)

    def _on_lost(self) -> None:
        if self._exit is None:
            self._exit = read_exit_record(self._directory)
        self._ended.set()
        for session in self._sessions.values():
            session.lost()
        for attachment in self._attachments.values():
            attachment.ended("the monitor is gone")
        self._sessions.clear()
        self._attachments.clear()


def _init(answer: wire.Message) -> InitProcess:
    return InitProcess(answer["init"], answer["start_time"], tuple((c, p) for c, p in answer["cgroups"]))


def _to_json(process: Mapping[str, Any]) -> bytes:
    """As UTF-8, but for bytes of an environment that are none: these are passed on as they are."""
    try:
        return msgspec.json.encode(process)
    except UnicodeEncodeError:
        return json.dumps(process, ensure_ascii=False).encode("utf-8", "surrogateescape")


def _abandon(starting: "asyncio.Task[ExecSession]") -> None:
    """Whoever wanted the process has gone while it was being started."""
    if not starting.cancelled() and starting.exception() is None:
        starting.result().abandon()


def _argv(process: Mapping[str, Any]) -> str:
    return " ".join(process.get("args", ()))[:200]


class ExecSession:
    """A process started in the container. With a terminal `console_fd` is its master, and the session's to close."""

    def __init__(self, monitor: Monitor, number: int, pid: int, console_fd: int) -> None:
        self._monitor = monitor
        self._ended: asyncio.Future[ExecExit] = asyncio.get_running_loop().create_future()
        self._killing: asyncio.Task[None] | None = None
        self.number = number
        self.pid = pid
        self.console_fd = console_fd

    async def exit(self) -> ExecExit:
        """How it ended; after a timeout, not before its whole tree is gone. Unavailable if the monitor is lost."""
        return await asyncio.shield(self._ended)

    async def kill(self) -> None:
        """Kill its whole process tree; `exit` then tells it as timed out."""
        await self._monitor._connection.call("exec_kill", exec=self.number)

    def abandon(self) -> None:
        """Kill it without waiting for anything."""
        self._killing = asyncio.get_running_loop().create_task(self._kill_quietly())

    async def _kill_quietly(self) -> None:
        with contextlib.suppress(Error):
            await self.kill()

    def resize(self, rows: int, columns: int) -> None:
        """Raises FailedPrecondition without a terminal."""
        if self.console_fd < 0:
            raise FailedPrecondition(f"exec process {self.pid} has no terminal here")
        fcntl.ioctl(self.console_fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def take_console(self) -> int:
        """The terminal's master, now the caller's."""
        fd, self.console_fd = self.console_fd, -1
        return fd

    def close(self) -> None:
        if self.console_fd >= 0:
            os.close(self.console_fd)
            self.console_fd = -1

    def ended(self, how: ExecExit) -> None:
        if not self._ended.done():
            self._ended.set_result(how)

    def lost(self) -> None:
        if not self._ended.done():
            self._ended.set_exception(Unavailable(f"monitor lost while exec process {self.pid} was running"))
            self._ended.exception()


class Attachment:
    """An attached set of fds."""

    def __init__(self, monitor: Monitor, number: int) -> None:
        self._monitor = monitor
        self._reason: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.number = number

    async def end(self) -> str:
        """Wait until the monitor lets go of the fds; why it did."""
        return await asyncio.shield(self._reason)

    async def detach(self) -> None:
        await self._monitor._connection.call("detach", attachment=self.number)

    def ended(self, reason: str) -> None:
        if not self._reason.done():
            self._reason.set_result(reason)


class _Collector:
    """Reads a pipe as far as it is wanted, and on, so that the writer never waits."""

    def __init__(self, limit_bytes: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit_bytes = limit_bytes
        self._data = bytearray()
        self._read_fd, self.write_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read_fd, False)
        self._loop.add_reader(self._read_fd, self._read)

    def _read(self) -> bool:
        """Whether there may be more."""
        try:
            data = os.read(self._read_fd, 256 * 1024)
        except BlockingIOError:
            return False
        self._data += data[: self._limit_bytes - len(self._data)]
        if not data:
            self._loop.remove_reader(self._read_fd)
        return bool(data)

    def take(self) -> bytes:
        """All that was written until now: something that goes on writing is not waited for."""
        for _ in range(64):  # more than a pipe holds
            if not self._read():
                break
        return bytes(self._data)

    def close_write(self) -> None:
        if self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1

    def close(self) -> None:
        self.close_write()
        self._loop.remove_reader(self._read_fd)
        os.close(self._read_fd)


@contextlib.asynccontextmanager
async def _collector(limit_bytes: int) -> AsyncIterator[_Collector]:
    collector = _Collector(limit_bytes)
    try:
        yield collector
    finally:
        collector.close()
