"""One container's monitor: its stdio, its log, its processes and its exit, at the command of whoever connects."""

import _socket as socket
import array
import errno
import gc
import os
import signal
import sys
import time

from oci.monitor import exit as exits
from oci.monitor import kernel, wire
from oci.monitor.attach import Attachments
from oci.monitor.command import Command
from oci.monitor.exec import Exec
from oci.monitor.log_file import LINE_BYTES, LogFile
from oci.monitor.loop import READABLE, Loop
from oci.monitor.processes import OomScore, TreeKill, exit_code
from oci.monitor.stdio import Stdio
from oci.monitor.wait import Wait

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

NAME = "crito-mon-awake"
REST_S = 1.0  # without anything to do
READ, PRIORITY, NOTHING = b"rp-"  # what the keeper waits for on an fd
FDS_AT_REST = 200
UNUSED_S = 30.0  # a monitor without a container and without a client is of no use
DRAIN_BYTES = 2 * 1024 * 1024  # more than a pipe can hold
FLUSH_S = 5.0  # attached clients have this long to read the end
KILL_S = 10.0  # for the runtime's kill
DELETE_S = 5.0  # the daemon tries again, and in the end without the runtime


class Client:
    """One connection: from the daemon, or from whoever serves streams."""

    def __init__(self, loop: Loop, sock: socket.socket, on_gone: "Callable[[Client], None]") -> None:
        self._loop = loop
        self._on_gone = on_gone
        self.sock = sock

    def tell(self, message: wire.Message, fds: tuple[int, ...] = ()) -> None:
        """Send it; a client that does not read is let go."""
        if self.sock.fileno() < 0:
            return
        try:
            wire.send(self.sock, message, fds)
        except OSError:
            self.close()

    def refuse(self, request: int, error: str, kind: str = "") -> None:
        self.tell({"id": request, "error": error, "kind": kind})

    def close(self) -> None:
        if self.sock.fileno() >= 0:
            self._loop.forget(self.sock.fileno())
            self.sock.close()
            self._on_gone(self)


class Surroundings:
    """What the fork server found when it started."""

    def __init__(self, mounts: exits.Mounts, oom_score_adj: int) -> None:
        self.mounts = mounts
        self.oom_score_adj = oom_score_adj


class Link:
    """To the keeper, who reaps all but the OCI runtime's own commands for us."""

    def __init__(self, channel: socket.socket, keeper: int, ended: list[str]) -> None:
        self._channel = channel
        self._ended = ended  # before this half was there
        self._heard = 0
        self.keeper = keeper

    def begin(self, loop: Loop) -> None:
        self._channel.setblocking(False)
        loop.watch(self._channel.fileno(), READABLE, lambda _events: self._on_readable(loop))
        for end in self._ended:
            loop.ended_elsewhere(*map(int, end.split()))

    def _on_readable(self, loop: Loop) -> None:
        self.hear(loop)

    def hear(self, loop: Loop) -> bool:
        """Whether somebody has ended."""
        try:
            data = self._channel.recv(64)
        except BlockingIOError:
            return False
        if not data:
            os._exit(1)  # the keeper is gone
        self._heard += 1
        loop.ended_elsewhere(*map(int, data.split()))
        return True

    def rest(self, init: int, facts: "dict[str, Any]", fds: "list[tuple[str, int]]") -> "NoReturn":
        """Hand everything to the keeper and end. `facts` must be small, and say which fds there are."""
        masks = bytes(_WAITED_FOR.get(name, NOTHING) for name, _ in fds)
        head = b"%d %d %s " % (self._heard, init, masks)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd for _, fd in fds]))]
        self._channel.setblocking(True)
        self._channel.sendmsg([head, wire.encode({**facts, "fds": [name for name, _ in fds]})], ancillary)
        os._exit(0)


_WAITED_FOR = {"client": READ, "stdout": READ, "stderr": READ, exits.OWN: PRIORITY, exits.ABOVE: PRIORITY}


class Refusal(Exception):
    """A request that cannot be granted in this state."""


class Monitor:
    """The container's life: new → creating → created (and running) → exited; the process ends after that."""

    def __init__(
        self,
        loop: Loop,
        listener: socket.socket,
        config: wire.Message,
        surroundings: Surroundings,
        link: Link | None = None,
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._config = config
        self._mounts = surroundings.mounts
        self._link = link
        self._own_pid = link.keeper if link else os.getpid()
        self._id: str = config["container_id"]
        self._runtime: list[str] = config["runtime"]
        self._environment: dict[str, str] = config["environment"]
        self._directory: str = config["directory"]
        self._directory_fd = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._oom_score = OomScore(config.get("oom_score_adj", -999), surroundings.oom_score_adj)
        self._clients: list[Client] = []
        self._state = "new"
        self._commands = 0  # create, start, kill and exec commands under way: a stray child may be theirs
        self._strays: dict[int, int] = {}
        self._execs: dict[int, tuple[Exec, Client]] = {}
        self._last_exec = 0
        self._owners: dict[int, Client] = {}  # attachment -> who asked for it
        self._pid = 0
        self._start_time = 0
        self._status: int | None = None
        self._groups: list[tuple[str, str]] = []
        self._cgroup: exits.Cgroup | None = None
        self._log: LogFile | None = None
        self._attachments = Attachments(loop, self._attachment_ended)
        self._stdio: Stdio | None = None
        self._in_sandbox = bool(config.get("in_sandbox"))  # its process is its pod's sandbox, not our child
        self._is_started = False
        self._is_stdio_begun = False
        self._their_stdio = (0, 1, 1)
        self._wait: Wait | None = None
        self._is_sandbox_gone = False
        self._record: wire.Message | None = None
        self._ending = False
        self.has_ended = False
        loop.on_stray = self._stray
        loop.watch(listener.fileno(), READABLE, self._on_connect)

    def begin(self) -> None:
        """For a monitor that is new."""
        self._loop.after(UNUSED_S, self._end_if_unused)
        for path in self._config.get("cgroup_procs", []):
            for pid in {self._own_pid, os.getpid()}:
                kernel.write_file(path, str(pid))
        if self._link is not None:
            kernel.set_oom_score_adj(self._own_pid, self._config.get("oom_score_adj", -999))
            self._loop.after(REST_S, lambda: self._rest_if_idle(0))

    # Rest

    def _rest_if_idle(self, busy_turns: int) -> None:
        """Leave the waiting to the keeper when nothing has happened since `busy_turns` and nothing is under way."""
        assert self._link is not None
        now = self._loop.busy_turns
        if now == busy_turns and self._can_rest() and not self._link.hear(self._loop):
            self._rest()
        self._loop.after(REST_S, lambda: self._rest_if_idle(now))

    def _can_rest(self) -> bool:
        if self._state != "created" or self._status is not None or self._stdio is None:
            return False
        if self._in_sandbox and not (self._wait and self._wait.pid):
            return False
        under_way = self._commands or self._execs or len(self._attachments)
        return not under_way and self._stdio.can_rest and len(self._clients) < FDS_AT_REST - 10

    def _rest(self) -> None:
        assert self._link is not None and self._stdio is not None and self._log is not None and self._cgroup is not None
        log_fd, log = self._log.at_rest()
        events, cgroup = self._cgroup.at_rest()
        fds, lines = self._stdio.at_rest()
        fds += [("client", client.sock.fileno()) for client in self._clients]
        fds += [(name, fd) for name, fd in {"log": log_fd, **events}.items() if fd >= 0]
        facts = {
            "pid": self._pid,
            "start_time": self._start_time,
            "cgroups": self._groups,
            "log": log,
            "cgroup": cgroup,
            "lines": lines,
            "last_exec": self._last_exec,
            "wait": self._wait.pid if self._wait else 0,
        }
        self._link.rest(self._wait.pid if self._wait else self._pid, facts, fds)

    def resume(self, facts: wire.Message, numbers: list[int]) -> None:
        """Go on where another working half of this monitor stopped."""
        assert self._link is not None
        names = facts["fds"]
        fds = {name: fd for name, fd in zip(names, numbers, strict=True) if name != "client"}
        config = self._config
        self._state = "created"
        self._pid, self._start_time, self._groups = facts["pid"], facts["start_time"], facts["cgroups"]
        self._last_exec = facts["last_exec"]
        if self._in_sandbox:
            self._is_started = True
            self._await_in_sandbox().resume(facts["wait"])
        else:
            self._loop.on_exit(self._pid, self._init_ended)
        max_bytes = config.get("log_max_bytes", 0)
        self._log = LogFile.resume(config.get("log_path", ""), max_bytes, _complain, fds.get("log", -1), facts["log"])
        self._cgroup = exits.Cgroup.resume(self._loop, fds, facts["cgroup"])
        line_bytes = config.get("log_line_bytes", LINE_BYTES)
        self._stdio = Stdio(self._loop, self._log, self._attachments, line_bytes)
        self._stdio.resume(fds, facts["lines"], config["stdin_once"], self._end_if_done)
        for name, fd in zip(names, numbers, strict=True):
            if name == "client":
                self._add_client(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK, 0, fd))
        self._loop.after(REST_S, lambda: self._rest_if_idle(0))

    # Clients

    def _on_connect(self, _events: int) -> None:
        sock = wire.accept(self._listener)
        if sock is None:
            return
        client = self._add_client(sock)
        client.tell({"hello": {"protocol": wire.PROTOCOL, "pid": self._own_pid, **self._facts()}})

    def _add_client(self, sock: socket.socket) -> Client:
        client = Client(self._loop, sock, self._client_gone)
        self._clients.append(client)
        self._loop.watch(sock.fileno(), READABLE, lambda _events: self._on_message(client))
        return client

    def _client_gone(self, client: Client) -> None:
        self._clients.remove(client)
        self._end_if_done()
        if self._state == "new":
            self._loop.after(UNUSED_S, self._end_if_unused)

    def _on_message(self, client: Client) -> None:
        try:
            message, fds = wire.receive(client.sock)
        except BlockingIOError:
            return
        except (OSError, wire.ProtocolError):
            client.close()
            return
        if message is None:
            client.close()
            return
        self._serve(client, message, fds)

    def _serve(self, client: Client, message: wire.Message, fds: list[int]) -> None:
        request = message.get("id", 0)
        verb = _VERBS.get(message.get("verb", ""))
        try:
            named = wire.named_fds(message, fds)
        except wire.ProtocolError as error:
            client.refuse(request, str(error))
            return
        try:
            if verb is None:
                raise Refusal(f"unknown verb {message.get('verb')!r}")
            verb(self, client, request, message, named)
        except Refusal as refusal:
            client.refuse(request, str(refusal), "precondition")
        except Exception as error:
            kernel.report_exception()
            client.refuse(request, f"{message.get('verb')}: {type(error).__name__}: {error}")
        finally:
            wire.close_all(list(named.values()))

    def _broadcast(self, message: wire.Message) -> None:
        for client in list(self._clients):
            client.tell(message)

    def _facts(self) -> "dict[str, Any]":
        return {
            "state": self._state,
            "init": self._pid,
            "start_time": self._start_time,
            "cgroups": self._groups,
            "attached": len(self._attachments),
            "execs": len(self._execs),
            "log_bytes": self._log.written if self._log else 0,
            "log_dropped": self._log.dropped if self._log else 0,
        }

    # Creating and starting

    def create(self, client: Client, request: int, message: wire.Message, _fds: dict[str, int]) -> None:
        if self._state != "new":
            raise Refusal(f"the container is {self._state} already")
        config = self._config
        pid_file = f"{self._directory}/init.pid"
        command_line = config.get("create_command") or ["create"]
        arguments = [*command_line, "--bundle", config["bundle"], "--pid-file", pid_file]
        arguments += config.get("create_options", [])
        try:
            self._log = LogFile(config.get("log_path", ""), config.get("log_max_bytes", 0), _complain)
        except OSError as error:
            client.refuse(request, f"cannot open the log {config.get('log_path')}: {error.strerror}")
            return
        stdio = Stdio(self._loop, self._log, self._attachments, config.get("log_line_bytes", LINE_BYTES))
        self._stdio = stdio
        if config["tty"]:
            console, fds = stdio.open_console(self._directory_fd)
            arguments += ["--console-socket", console]
        else:
            fds = stdio.open_pipes(config["stdin"], config["stdin_once"])
        self._state = "creating"
        self._commands += 1

        def done(error: str | None) -> None:
            self._created(client, request, error, command.is_late, pid_file)

        try:
            command = self._command([*arguments, self._id], fds, "create.log", message["patience_s"], done)
        except OSError as error:
            self._state = "new"
            self._commands -= 1
            stdio.close()
            client.refuse(request, f"cannot run {self._runtime[0]}: {error.strerror}")
            return
        if self._in_sandbox:
            self._their_stdio = fds  # for the runtime's start, which hands them to the sandbox
        else:
            stdio.close_theirs()

    def _command(
        self,
        arguments: list[str],
        stdio: tuple[int, int, int],
        log: str,
        patience_s: float,
        done: "Callable[[str | None], None]",
    ) -> Command:
        return Command(
            self._loop,
            runtime=self._runtime,
            arguments=arguments,
            environment=self._environment,
            stdio=stdio,
            log_path=f"{self._directory}/{log}",
            timeout_s=patience_s,
            oom_score=self._oom_score,
            done=done,
        )

    def _created(self, client: Client, request: int, error: str | None, late: bool, pid_file: str) -> None:
        assert self._stdio is not None
        error = self._adopt(pid_file) if error is None else self._with_stderr(error)
        if error is None and not self._in_sandbox:
            error = self._begin_stdio()
        if error is not None:
            self._undo_create(client, request, error, "deadline" if late else "")
            return
        self._state = "created"
        client.tell({"id": request, **self._facts()})
        self._command_ended()

    def _with_stderr(self, error: str) -> str:
        """The error with what the failed command has written to the container's stderr, which it had."""
        assert self._stdio is not None
        said = wire.last_bytes(self._stdio.error_text())
        if not said or said in error:
            return error
        return f"{error}: {said}" if ": exit status" in error else f"{error}; stderr: {said}"

    def _begin_stdio(self) -> str | None:
        """Read what the container writes: it has its ends by now, or never will. What is wrong, if anything."""
        assert self._stdio is not None
        self._stdio.close_theirs()
        has_begun = self._stdio.begin(self._config["stdin"], self._config["stdin_once"], self._end_if_done)
        return None if has_begun else "the runtime has made no terminal"

    def _adopt(self, pid_file: str) -> str | None:
        """Take the container's init, now our child: its pid, start time and cgroups. What is wrong, if anything."""
        try:
            pid = int(kernel.read_file(pid_file))
            self._start_time = kernel.start_time(pid)
            self._groups = exits.memberships(pid)
            self._cgroup = exits.Cgroup.of_process(self._loop, pid, self._mounts)
            os.unlink(pid_file)  # noqa: PTH108
        except (OSError, ValueError) as error:
            return f"the runtime has left no init process: {error}"
        if pid in self._strays:
            return f"the init process {pid} ended before it was started"
        self._pid = pid
        if not self._in_sandbox:
            self._loop.on_exit(pid, self._init_ended)
        return None

    def _undo_create(self, client: Client, request: int, error: str, kind: str) -> None:
        """Leave nothing: the runtime's own cleanup, then every process below this one, then this one."""

        def deleted(_error: str | None) -> None:
            TreeKill(self._loop, self._own_pid, killed, (self._own_pid, os.getpid()))

        def killed(_left: int) -> None:
            client.refuse(request, error, kind)
            self._state = "failed"
            self._end()

        self._pid = 0
        try:
            self._command(["delete", "--force", self._id], (0, 1, 1), "delete.log", DELETE_S, deleted)
        except OSError:
            deleted(None)

    def start(self, client: Client, request: int, message: wire.Message, _fds: dict[str, int]) -> None:
        if self._state != "created":
            raise Refusal(f"the container is {self._state}")
        self._commands += 1

        def done(error: str | None) -> None:
            if self._in_sandbox:
                error = self._started_in_sandbox(error)
            if error is None:
                client.tell({"id": request})
            else:
                client.refuse(request, error, "deadline" if command.is_late else "")
            self._command_ended()

        try:
            command = self._command(["start", self._id], self._their_stdio, "start.log", message["patience_s"], done)
        except OSError as error:
            self._commands -= 1
            client.refuse(request, f"cannot run {self._runtime[0]}: {error.strerror}")

    def _started_in_sandbox(self, error: str | None) -> str | None:
        """After the runtime's start, which has handed the streams to the sandbox. What is wrong, if anything."""
        if error is not None:
            error = self._with_stderr(error)
        self._is_stdio_begun, self._their_stdio = True, (0, 1, 1)
        problem = self._begin_stdio()
        if error is None:
            self._is_started = True
            self._await_in_sandbox().begin()
        return error or problem

    def _await_in_sandbox(self) -> Wait:
        self._wait = Wait(
            self._loop,
            runtime=self._runtime,
            container_id=self._id,
            environment=self._environment,
            directory=self._directory,
            oom_score=self._oom_score,
            sandbox=(self._pid, self._start_time),
            ended=self._ended_in_sandbox,
        )
        return self._wait

    def _ended_in_sandbox(self, status: int, is_sandbox_gone: bool) -> None:
        self._is_sandbox_gone = is_sandbox_gone
        self._init_ended(status)

    def _command_ended(self) -> None:
        self._commands -= 1
        if not self._commands:
            self._strays.clear()
        self._maybe_exited()

    def _stray(self, pid: int, status: int) -> None:
        """An unknown child was reaped: an orphan of the container, or a process whose pid is yet to be told."""
        if self._commands:
            self._strays[pid] = status

    # Processes in the container

    def exec(self, client: Client, request: int, message: wire.Message, fds: dict[str, int]) -> None:
        if self._state != "created" or self._status is not None:
            raise Refusal(f"the container is {'exited' if self._status is not None else self._state}")
        self._last_exec += 1
        self._commands += 1
        process = fds.pop("process")

        def on_start(one: Exec, error: str | None, master: int) -> None:
            os.close(process)  # the runtime has read it through /proc/PID/fd
            if error is not None:
                del self._execs[one.number]
                client.refuse(request, error, "deadline" if one.is_late else "")
            else:
                answer = {"id": request, "exec": one.number, "pid": one.pid}
                client.tell({**answer, "fds": ["console"]} if master >= 0 else answer, (master,) if master >= 0 else ())
                self._await_exec(one)
            if master >= 0:
                os.close(master)
            self._command_ended()

        one = Exec(self._last_exec, self._loop, on_start, self._exec_ended)
        self._execs[one.number] = (one, client)
        one.run(
            runtime=self._runtime,
            container_id=self._id,
            environment=self._environment,
            directory=self._directory,
            directory_fd=self._directory_fd,
            fds={**fds, "process": process},
            tty=bool(message.get("tty")),
            timeout_s=message.get("patience_s"),
            cgroup=self._cgroup_for_execs(),
            in_sandbox=self._in_sandbox,
            oom_score=self._oom_score,
        )

    def _cgroup_for_execs(self) -> str:
        """The container's cgroup v2 directory where each exec shall get a cgroup below it, else ""."""
        if self._cgroup is None or self._in_sandbox or not self._config.get("exec_cgroup"):
            return ""
        return self._cgroup.directory if self._cgroup.is_unified and self._cgroup.is_own else ""

    def _await_exec(self, one: Exec) -> None:
        if one.pid in self._strays:
            one.ended(self._strays.pop(one.pid))
        else:
            self._loop.on_exit(one.pid, one.ended)

    def _exec_ended(self, one: Exec, result: "dict[str, Any]") -> None:
        _, client = self._execs.pop(one.number)
        client.tell({"event": "exec_exit", "exec": one.number, **result})
        self._end_if_done()

    def exec_kill(self, client: Client, request: int, message: wire.Message, _fds: dict[str, int]) -> None:
        found = self._execs.get(message["exec"])
        if found is not None:
            found[0].expire()
        client.tell({"id": request})

    def kill(self, client: Client, request: int, message: wire.Message, _fds: dict[str, int]) -> None:
        """The init is our child and reaped here alone: its pid cannot be another process's."""
        if self._state != "created":
            raise Refusal(f"the container is {self._state}")
        if self._in_sandbox:
            self._kill_in_sandbox(client, request, message["signal"])
            return
        if message.get("all") and self._cgroup is not None:
            self._cgroup.kill_all()
        if self._status is None:
            os.kill(self._pid, message["signal"])
        client.tell({"id": request})

    def _kill_in_sandbox(self, client: Client, request: int, number: int) -> None:
        if self._status is not None or not self._is_started:
            client.tell({"id": request})
            if self._status is None and number == signal.SIGKILL:
                self._end_unstarted()
            return

        def done(error: str | None) -> None:
            if error is None:
                client.tell({"id": request})
            else:
                client.refuse(request, error)
            self._command_ended()

        everyone = ["--all"] if number == signal.SIGKILL else []
        log = f"kill-{request}.log"
        self._command(["kill", *everyone, self._id, str(number)], (0, 1, 1), log, KILL_S, done)
        self._commands += 1

    def _end_unstarted(self) -> None:
        """There is no process yet; the daemon lets the runtime forget the container."""
        if not self._is_stdio_begun:
            self._is_stdio_begun = True
            self._begin_stdio()
        self._init_ended(signal.SIGKILL)

    # Streams

    def resize(self, client: Client, request: int, message: wire.Message, _fds: dict[str, int]) -> None:
        if self._stdio is None or not self._stdio.resize(message["rows"], message["columns"]):
            raise Refusal("the container has no terminal")
        client.tell({"id": request})

    def reopen_log(self, client: Client, request: int, _message: wire.Message, _fds: dict[str, int]) -> None:
        if self._log is None or self._state != "created":
            raise Refusal(f"the container is {self._state}")
        try:
            self._log.reopen()
        except OSError as error:
            client.refuse(request, f"cannot reopen the log {self._config['log_path']}: {error.strerror}")
            return
        client.tell({"id": request})

    def attach(self, client: Client, request: int, _message: wire.Message, fds: dict[str, int]) -> None:
        if self._stdio is None or self._state != "created":
            raise Refusal(f"the container is {self._state}")
        number = self._attachments.add(dict(fds), self._stdio.stdin)
        fds.clear()
        self._owners[number] = client
        client.tell({"id": request, "attachment": number})

    def detach(self, client: Client, request: int, message: wire.Message, _fds: dict[str, int]) -> None:
        self._attachments.remove(message["attachment"], "detached", self._stdio.stdin if self._stdio else None)
        client.tell({"id": request})

    def _attachment_ended(self, number: int, reason: str) -> None:
        client = self._owners.pop(number, None)
        if client is not None:
            client.tell({"event": "detached", "attachment": number, "reason": reason})

    # The end

    def _init_ended(self, status: int) -> None:
        self._status = status
        self._finished_at = time.time_ns()
        self._maybe_exited()

    def _maybe_exited(self) -> None:
        """The exit is told once, and not before the answer to a create or start that is under way."""
        if self._status is None or self._record is not None or self._commands or self._state != "created":
            return
        assert self._stdio is not None and self._log is not None and self._cgroup is not None
        self._stdio.drain(DRAIN_BYTES)
        code, number = exit_code(self._status)
        # The cgroup of a container in a sandbox is that of the whole pod's.
        kills, limit = self._cgroup.oom() if not self._in_sandbox or self._is_sandbox_gone else (0, "")
        self._record = {
            "pid": self._pid,
            "start_time": self._start_time,
            "exit_code": code,
            "signal": number,
            "finished_at": self._finished_at,
            "oom_killed": kills > 0,
            "oom_limit": limit,
            "log_bytes": self._log.written,
            "log_dropped": self._log.dropped,
        }
        self._state = "exited"
        self._write_record()
        self._broadcast({"event": "exit", "record": self._record})
        self._kill_leftovers()
        self._end_if_done()

    def _write_record(self) -> None:
        assert self._record is not None
        try:
            exits.write_record(self._directory, self._record)
        except OSError as error:  # the directory was removed, or tmpfs is full: try on, clients know it already
            _complain(f"exit record in {self._directory}: {error.strerror}")
            if error.errno != errno.ENOENT:
                self._loop.after(1.0, self._write_record)

    def _kill_leftovers(self) -> None:
        """Where the PID namespace is shared, processes outlive their init: end them, they hold its streams."""
        assert self._cgroup is not None
        if not self._in_sandbox and self._cgroup.kill_all():
            self._loop.after(0.05, self._kill_leftovers)

    def _end_if_done(self) -> None:
        if self._state != "exited" or self._ending:
            return
        assert self._stdio is not None
        if self._execs or self._stdio.is_open:
            return
        self._ending = True
        self._flush(time.monotonic() + FLUSH_S)

    def _flush(self, deadline: float) -> None:
        is_done = self._attachments.are_flushed and not self._has_helpers()
        if is_done or time.monotonic() > deadline:
            self._attachments.remove_all("the container has exited")
            self._end()
        else:
            self._loop.after(0.02, lambda: self._flush(deadline))

    def _has_helpers(self) -> bool:
        """Whether processes of the runtime's own are still there, such as runsc's gofer: a delete ends them."""
        if not self._config.get("has_helpers"):
            return False
        ours = (self._own_pid, os.getpid())
        return any(stat.parent in ours and stat.pid not in ours for stat in kernel.processes())

    def _end_if_unused(self) -> None:
        if self._state == "new" and not self._clients:
            self._end()

    def shutdown(self, client: Client, request: int, _message: wire.Message, _fds: dict[str, int]) -> None:
        if self._state not in ("new", "exited"):
            raise Refusal(f"the container is {self._state}")
        client.tell({"id": request})
        self._end()

    def report(self, client: Client, request: int, _message: wire.Message, _fds: dict[str, int]) -> None:
        client.tell({"id": request, **self._facts()})

    def _end(self) -> None:
        self.has_ended = True
        self._loop.stop()

    def close(self) -> None:
        """Let go of everything, for a process that lives on."""
        for client in list(self._clients):
            client.close()
        self._loop.forget(self._listener.fileno())
        if self._stdio is not None:
            self._stdio.close()
        if self._log is not None:
            self._log.close()
        if self._cgroup is not None:
            self._cgroup.close()
        os.close(self._directory_fd)


def _complain(text: str) -> None:
    print(f"monitor {os.getpid()}: {text}", file=sys.stderr, flush=True)


_VERBS: "dict[str, Callable[[Monitor, Client, int, wire.Message, dict[str, int]], None]]" = {
    "create": Monitor.create,
    "start": Monitor.start,
    "exec": Monitor.exec,
    "exec_kill": Monitor.exec_kill,
    "kill": Monitor.kill,
    "resize": Monitor.resize,
    "reopen_log": Monitor.reopen_log,
    "attach": Monitor.attach,
    "detach": Monitor.detach,
    "shutdown": Monitor.shutdown,
    "status": Monitor.report,
}


def run(
    link: Link, listener_fd: int, config: bytes, surroundings: Surroundings, rest: bytes, fds: list[int]
) -> "NoReturn":
    """Be the working half from here on. `rest` and `fds` are what the last one left, if there was one."""
    try:
        kernel.die_with_parent()
        if os.getppid() != link.keeper:
            os._exit(1)
        gc.enable()  # what was there before the fork is frozen, so its pages stay shared
        kernel.set_name(NAME)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK, 0, listener_fd)
        loop = Loop()
        monitor = Monitor(loop, listener, wire.decode(config), surroundings, link)
        if rest:
            monitor.resume(wire.decode(rest.split(b" ", 3)[3]), fds)
        else:
            monitor.begin()
        link.begin(loop)
        loop.run()
    except BaseException:
        kernel.report_exception()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
