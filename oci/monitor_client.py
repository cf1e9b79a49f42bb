"""The daemon's side of the fork server and of the monitors: requests and events over their sockets, on the event loop.

Nothing here blocks: sockets are non-blocking and watched, what is read from disk are small files on a tmpfs.
"""

import array
import asyncio
import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import signal as signals
import socket
import struct
import sys
import termios
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from oci.container_spec import IdMapping
from oci.errors import DeadlineExceeded, Error, FailedPrecondition, Unavailable
from oci.monitor import exit as exits
from oci.monitor import kernel, pod, wire
from oci.monitor.forkserver import ORPHANS
from oci.monitor.forkserver import SOCKET as FORKSERVER_SOCKET
from oci.version import VERSION

MONITOR_SOCKET = "monitor.sock"
EXIT_RECORD = exits.RECORD
EXEC_OUTPUT_LIMIT_BYTES = 16 * 1024 * 1024  # per stream. Source: api.proto, ExecSync
ATTACH_PIPE_BYTES = 1024 * 1024
CALL_TIMEOUT_S = 30.0  # of calls that involve no OCI runtime
GRACE_S = 30.0  # over the time that a monitor gives the runtime: for killing it and cleaning up
START_TIMEOUT_S = 30.0
DEFAULT_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}

T = TypeVar("T")

# Requests and answers


@dataclass(frozen=True, slots=True)
class PodRequest:
    """The namespaces of a pod. `pin_dir` exists and is empty; the pins are named like the namespaces."""

    sandbox_id: str
    namespaces: tuple[str, ...]  # of net, ipc, uts, pid, user; what is not here is the node's
    pin_dir: Path
    hostname: str = ""
    sysctls: Mapping[str, str] = field(default_factory=dict)
    uids: tuple[IdMapping, ...] = ()  # with "user"
    gids: tuple[IdMapping, ...] = ()
    pause_path: str = ""  # a static program such as catatonit; "" for the fork server's own
    keep_process: bool = True
    cgroup_procs: tuple[str, ...] = ()  # cgroup.procs files that take the pause
    oom_score_adj: int = -998  # raised to what the kernel permits


@dataclass(frozen=True, slots=True)
class PodProcess:
    """The pause, by pid and start time (clock ticks since boot); pid 0 where none was kept."""

    pid: int
    start_time: int


@dataclass(frozen=True, slots=True)
class MonitorRequest:
    """One container's monitor. `directory` exists; it takes the socket and the exit record."""

    container_id: str
    directory: Path
    bundle: Path
    runtime: tuple[str, ...]  # program and global options, as ("/usr/bin/crun", "--root", …, "--log-format", "json")
    log_path: str = ""  # "" keeps no log
    log_max_bytes: int = 0  # of one file; over it output is dropped until the log is reopened. 0: no limit
    log_line_bytes: int = 16 * 1024  # longer lines are split
    tty: bool = False
    stdin: bool = False
    stdin_once: bool = False
    create_command: tuple[str, ...] = ("create",)  # or the one that restores a checkpoint, with its options
    create_options: tuple[str, ...] = ()  # such as "--no-pivot"
    cgroup_procs: tuple[str, ...] = ()  # cgroup.procs files that take the monitor
    oom_score_adj: int = -999  # raised to what the kernel permits; what the monitor starts does not inherit it
    exec_cgroup: bool = True  # on cgroup v2 an exec gets a sub-cgroup; the runtime must know `exec --cgroup`
    environment: Mapping[str, str] = field(default_factory=lambda: dict(DEFAULT_ENVIRONMENT))  # the runtime's


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
class ExitRecord:
    """How a container ended; the same as `exit.json`."""

    pid: int
    start_time: int
    exit_code: int  # 0-255; 128 + N when signal N killed it
    signal: int  # 0 unless one killed it
    finished_at: int  # ns since the epoch
    oom_killed: bool = False  # the OOM killer took at least one process of its cgroup
    oom_limit: str = ""  # "container", or "above": the pod's limit or the node's memory
    log_bytes: int = 0
    log_dropped: int = 0


@dataclass(frozen=True, slots=True)
class OrphanExit:
    """The exit of a process that had lost its monitor, as the fork server saw it."""

    pid: int
    start_time: int
    exit_code: int
    signal: int
    finished_at: int


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


# The connection


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
        try:
            sock = connect(directory, name)
        except OSError as error:
            raise Unavailable(f"cannot connect to the {peer} at {directory / name}: {error.strerror}") from error
        return cls(sock, peer)

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
        request = next(self._ids)
        answer: asyncio.Future[tuple[wire.Message, list[int]]] = self._loop.create_future()
        self._waiting[request] = answer
        fds = fds or {}
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
        sock.listen(16)
    except BaseException:
        sock.close()
        raise
    return sock


# The fork server


def program() -> str:
    """What makes one fork server another: our version, the text of its modules, and the Python that runs it."""
    digest = hashlib.sha256(sys.version.encode())
    for module in sorted((Path(__file__).parent / "monitor").glob("*.py")):
        digest.update(module.read_bytes())
    return f"{VERSION}-{digest.hexdigest()[:16]}"


class ForkServer:
    """The daemon's fork server; started where there is none, replaced where it is another version's.

    After its death the next call starts a new one. Its children do not mind either.
    """

    def __init__(self, run_dir: Path, own_program: str) -> None:
        self._run_dir = run_dir
        self._program = own_program
        self._connection: Connection | None = None
        self._connecting = asyncio.Lock()
        self.pid = 0

    @classmethod
    async def ensure(cls, run_dir: Path) -> "ForkServer":
        """Raises Unavailable when it cannot be started; its last words are in the text."""
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        server = cls(run_dir, program())
        await server._connected()
        return server

    async def make_pod(self, request: PodRequest) -> PodProcess:
        """The pod's namespaces, made and pinned. On an error, which names the step, nothing of them stays."""
        asked = {
            "namespaces": list(request.namespaces),
            "pin_dir": str(request.pin_dir),
            "hostname": request.hostname,
            "sysctls": dict(request.sysctls),
            "uid_maps": [[m.container_id, m.host_id, m.length] for m in request.uids],
            "gid_maps": [[m.container_id, m.host_id, m.length] for m in request.gids],
            "pause_path": request.pause_path,
            "keep_process": request.keep_process,
            "cgroup_procs": list(request.cgroup_procs),
            "oom_score_adj": request.oom_score_adj,
        }
        try:
            answer, _ = await (await self._connected()).call("make_pod", timeout_s=60.0, pod=asked)
        except NotSent:
            answer, _ = await (await self._connected()).call("make_pod", timeout_s=60.0, pod=asked)
        return PodProcess(answer["pid"], answer["start_time"])

    async def spawn_monitor(self, request: MonitorRequest) -> "Monitor":
        """A monitor that awaits its orders, connected. It ends by itself if none come."""
        try:
            await self._fork_monitor(request)
        except Unavailable:  # the fork server has just died: a new one can do it; a monitor unused ends by itself
            await self._fork_monitor(request)
        return await Monitor.connect(request.directory)

    async def _fork_monitor(self, request: MonitorRequest) -> None:
        connection = await self._connected()
        listener = listen(request.directory, MONITOR_SOCKET)
        with listener:
            config = {
                "container_id": request.container_id,
                "directory": str(request.directory),
                "bundle": str(request.bundle),
                "runtime": list(request.runtime),
                "environment": dict(request.environment),
                "log_path": request.log_path,
                "log_max_bytes": request.log_max_bytes,
                "log_line_bytes": request.log_line_bytes,
                "tty": request.tty,
                "stdin": request.stdin,
                "stdin_once": request.stdin_once,
                "create_command": list(request.create_command),
                "create_options": list(request.create_options),
                "cgroup_procs": list(request.cgroup_procs),
                "oom_score_adj": request.oom_score_adj,
                "exec_cgroup": request.exec_cgroup,
            }
            await connection.call("monitor", fds={"listener": listener.fileno()}, config=config)

    async def children(self) -> tuple[int, ...]:
        """The pids of the pauses, monitors and orphans below it."""
        answer, _ = await (await self._connected()).call("status")
        return tuple(answer["children"])

    async def shutdown(self) -> tuple[int, ...]:
        """Tell it to end: at once, or as soon as these processes, its children, have ended. Starts none to do so."""
        if self._connection is None or not self._connection.is_open:
            return ()
        answer, _ = await self._connection.call("retire")
        children = tuple(answer["children"])
        if not children:
            await _wait_gone(self.pid, 10.0)
        await self.close()
        return children

    async def close(self) -> None:
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
            connection = await Connection.open(self._run_dir, FORKSERVER_SOCKET, "fork server")
            greeting = await connection.hello()
        except Unavailable:
            pass
        else:
            if greeting["program"] == self._program:
                self.pid = greeting["pid"]
                return connection
            await connection.call("retire")  # any version knows this; it stays on for its children
            connection.close()
        await self._start()
        connection = await Connection.open(self._run_dir, FORKSERVER_SOCKET, "fork server")
        self.pid = (await connection.hello())["pid"]
        return connection

    async def _start(self) -> None:
        main = Path(__file__).parent / "monitor" / "__main__.py"
        log_path = self._run_dir / "forkserver.log"
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-OO", str(main), str(self._run_dir), self._program),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=log,
                env={**DEFAULT_ENVIRONMENT, "LC_ALL": "C.UTF-8", "LD_BIND_NOW": "1"},  # bound once, not per fork
                start_new_session=True,
            )
        finally:
            os.close(log)
        try:
            status = await asyncio.wait_for(process.wait(), START_TIMEOUT_S)
        except TimeoutError as error:
            process.kill()
            raise Unavailable(f"the fork server did not start within {START_TIMEOUT_S:g} s; see {log_path}") from error
        if status != 0:
            raise Unavailable(f"the fork server ended with {status}: {_last_line(log_path)}")


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


# Monitors


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


# Records


def read_exit_record(directory: Path) -> ExitRecord | None:
    """What the monitor wrote about the container's end; None if it has not ended, or its monitor was lost."""
    return _read(directory / EXIT_RECORD, ExitRecord)


def read_orphan_exit(run_dir: Path, pid: int, start_time: int) -> OrphanExit | None:
    """How a process ended whose monitor had died before it; None if the fork server has not seen that."""
    return _read(run_dir / ORPHANS / f"{pid}-{start_time}.json", OrphanExit)


def forget_orphan_exits(run_dir: Path, kept: Collection[tuple[int, int]]) -> None:
    """Remove the exits of processes, by pid and start time, that nobody will ask about any more."""
    names = {f"{pid}-{start_time}.json" for pid, start_time in kept}
    for path in (run_dir / ORPHANS).glob("*.json"):
        if path.name not in names:
            path.unlink(missing_ok=True)


def read_pod_process(pin_dir: Path) -> PodProcess | None:
    """The pause that was made for these pins; also of a make_pod whose answer never arrived."""
    return _read(pin_dir / pod.RECORD, PodProcess)


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None


async def wait_orphan_exit(run_dir: Path, pid: int, start_time: int) -> OrphanExit:
    """The exit of a container's init that lives on without its monitor. Unavailable if nobody can tell it any more."""
    await _wait_process(pid, start_time)
    for _ in range(50):  # the fork server writes it while the process is a zombie: now, or in a moment
        found = read_orphan_exit(run_dir, pid, start_time)
        if found is not None:
            return found
        await asyncio.sleep(0.02)
    raise Unavailable(f"process {pid} has ended, and its exit code went with its monitor and fork server")


# Processes and pins


async def kill_pause(pid: int, start_time: int, timeout_s: float = 10.0) -> None:
    """Kill exactly this process and wait for its end. A process that is gone already is fine.

    Raises DeadlineExceeded if it has not ended by then.
    """
    fd = _pidfd(pid, start_time)
    if fd < 0:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            signals.pidfd_send_signal(fd, signals.SIGKILL)
        await asyncio.wait_for(_pidfd_readable(fd), timeout_s)
    except TimeoutError as error:
        raise DeadlineExceeded(f"process {pid} was killed but has not ended after {timeout_s:g} s") from error
    finally:
        os.close(fd)


def remove_pins(pin_dir: Path) -> None:
    """Unmount and remove the pins of a pod and their directory; blocking, idempotent. Raises OSError."""
    pod.remove_pins(str(pin_dir))


def is_alive(pid: int, start_time: int) -> bool:
    """Whether exactly this process is there, and no zombie."""
    stat = kernel.process_stat(pid) if pid > 0 else None
    return stat is not None and stat.start_time == start_time and stat.state not in "ZX"


def _pidfd(pid: int, start_time: int) -> int:
    """A pidfd of exactly this process; -1 if it is gone."""
    if pid <= 0:
        return -1
    try:
        fd = os.pidfd_open(pid)
    except OSError as error:
        if error.errno not in (errno.ESRCH, errno.EINVAL):
            raise
        return -1
    if kernel.start_time(pid) != start_time:
        os.close(fd)
        return -1
    return fd


async def _pidfd_readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, _resolve, ended)
    try:
        await ended
    finally:
        loop.remove_reader(fd)


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


async def _wait_process(pid: int, start_time: int) -> None:
    fd = _pidfd(pid, start_time)
    if fd >= 0:
        try:
            await _pidfd_readable(fd)
        finally:
            os.close(fd)


async def _wait_gone(pid: int, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(_wait_process(pid, kernel.start_time(pid)), timeout_s)
