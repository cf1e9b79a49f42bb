"""Processes started in the running container: by the runtime's detached `exec`, then awaited and killed from here."""

import os

from oci.monitor import kernel, processes
from oci.monitor.command import Command
from oci.monitor.stdio import Console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from oci.monitor.loop import Loop, Timer
    from oci.monitor.processes import OomScore

FOR_EVER_S = 365 * 24 * 3600.0
KILL_S = 10.0  # for the runtime's kill
NO_TIMEOUT_START_S = 120.0  # the runtime's own time where the caller sets none


class Exec:
    """One process. `on_start(error, master)` is called once, then, unless there was an error, `on_exit(code, late)`."""

    def __init__(
        self,
        number: int,
        loop: "Loop",
        on_start: "Callable[[Exec, str | None, int], None]",
        on_exit: "Callable[[Exec, dict[str, Any]], None]",
    ) -> None:
        self.number = number
        self.pid = 0
        self.is_late = False
        self._loop = loop
        self._on_start = on_start
        self._on_exit = on_exit
        self._command: Command | None = None
        self._console: Console | None = None
        self._cgroup = ""
        self._pid_file = ""
        self._inner_pid_file = ""  # of an exec in a sandbox
        self._end_inside: Callable[[str, Callable[[str | None], None]], Command] | None = None
        self._is_ending = False
        self._timer: Timer | None = None
        self._kill: processes.TreeKill | None = None
        self._status: int | None = None
        self._left = 0

    def run(
        self,
        *,
        runtime: list[str],
        container_id: str,
        environment: dict[str, str],
        directory: str,
        directory_fd: int,
        fds: dict[str, int],
        tty: bool,
        timeout_s: float | None,
        cgroup: str,
        in_sandbox: bool,
        oom_score: "OomScore",
    ) -> None:
        """`fds`: `process` (the OCI process object's file), stdin, stdout, stderr; they stay the caller's.

        `cgroup`: the container's cgroup v2 directory, "" to go without one of the process's own. `in_sandbox`: our
        child only stands for the process, which lives in the pod's sandbox and is killed there, by its pid within.
        """
        self._pid_file = f"{directory}/exec-{self.number}.pid"
        arguments = ["exec", "--detach", "--pid-file", self._pid_file]
        arguments += ["--process", f"/proc/{os.getpid()}/fd/{fds['process']}"]
        if tty:
            self._console = Console(self._loop, directory_fd, f"exec-{self.number}.sock")
            arguments += ["--console-socket", self._console.path]
        if cgroup:
            arguments += self._make_cgroup(cgroup)
        if in_sandbox:
            self._inner_pid_file = f"{directory}/exec-{self.number}.inner"
            arguments += ["--internal-pid-file", self._inner_pid_file]

            def end_inside(pid: str, done: "Callable[[str | None], None]") -> Command:
                return Command(
                    self._loop,
                    runtime=runtime,
                    arguments=["kill", "--pid", pid, container_id, "9"],
                    environment=environment,
                    stdio=(0, 1, 1),
                    log_path=f"{directory}/exec-{self.number}.log",
                    timeout_s=KILL_S,
                    oom_score=oom_score,
                    done=done,
                )

            self._end_inside = end_inside
        if timeout_s is not None:
            self._timer = self._loop.after(timeout_s, self.expire)
        try:
            self._command = Command(
                self._loop,
                runtime=runtime,
                arguments=[*arguments, container_id],
                environment=environment,
                stdio=(fds.get("stdin", 0), fds.get("stdout", 1), fds.get("stderr", 1)),
                log_path=f"{directory}/exec-{self.number}.log",
                timeout_s=NO_TIMEOUT_START_S if timeout_s is None else FOR_EVER_S,
                oom_score=oom_score,
                done=self._started,
            )
        except OSError as error:
            self._started(f"{runtime[0]}: {error.strerror}")

    def _make_cgroup(self, container: str) -> list[str]:
        name = f"exec-{self.number}"
        try:
            os.mkdir(f"{container}/{name}")  # noqa: PTH102
        except OSError:
            return []  # read-only or delegated away: the process tree will do
        self._cgroup = f"{container}/{name}"
        return ["--cgroup", name]

    def _started(self, error: str | None) -> None:
        """The runtime has ended: its pid file names the process, now our child, which may even have ended too."""
        master = self._console.take_master() if self._console is not None else -1
        if error is None:
            try:
                self.pid = int(kernel.read_file(self._pid_file))
            except (OSError, ValueError) as problem:
                error = f"runtime exec gave no pid: {problem}"
        kernel.unlink(self._pid_file)
        if error is not None:
            self._cancel_timer()
            self._remove_cgroup()
            if self._inner_pid_file:
                kernel.unlink(self._inner_pid_file)
        self._on_start(self, error, master)
        if error is None and self.is_late:
            self.expire()

    def ended(self, status: int) -> None:
        """The process itself was reaped."""
        self._status = status
        if self._kill is None and not self._is_ending:
            self._finish()

    def expire(self) -> None:
        """Its time is over, or nobody wants it any more: kill all of its tree, then report."""
        self.is_late = True
        self._cancel_timer()
        if self._kill is not None or self._is_ending:
            return
        if self.pid:
            self._kill_cgroup()
            self._kill_inside(self._kill_tree)
        elif self._command is not None:  # the runtime itself hangs
            self._command.expire()

    def _kill_inside(self, then: "Callable[[], None]") -> None:
        """Kill the process in the sandbox, if that is where it lives; then go on, whether that has worked or not."""
        inner = _text(self._inner_pid_file).strip()
        if self._end_inside is None or not inner:
            then()
            return

        def done(_error: str | None) -> None:
            self._is_ending = False
            then()

        self._is_ending = True
        try:
            self._end_inside(inner, done)
        except OSError:
            done(None)

    def _kill_tree(self) -> None:
        if self._status is None:
            self._kill = processes.TreeKill(self._loop, self.pid, self._killed)
        else:
            self._finish()

    def _kill_cgroup(self) -> None:
        if self._cgroup:
            try:
                kernel.write_file(self._cgroup + "/cgroup.kill", "1")
            except OSError:
                return  # before Linux 5.14

    def _killed(self, left: int) -> None:
        self._left = left
        if self._status is not None:
            self._finish()
        elif left:  # in uninterruptible sleep: say so now, it is reaped whenever it ends
            self._status = 9
            self._finish()
        else:
            self._kill = None  # dead, and about to be reaped

    def _finish(self) -> None:
        assert self._status is not None
        self._cancel_timer()
        self._remove_cgroup()
        if self._inner_pid_file:
            kernel.unlink(self._inner_pid_file)
        code, _ = processes.exit_code(self._status)
        self._on_exit(self, {"exit_code": code, "timed_out": self.is_late, "left": self._left})

    def _remove_cgroup(self) -> None:
        if self._cgroup:
            try:
                os.rmdir(self._cgroup)  # noqa: PTH106
            except OSError:
                return  # something that it started lives on; it goes with the container's cgroup

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _text(path: str) -> str:
    """A file's text; empty where there is none."""
    try:
        return kernel.read_file(path) if path else ""
    except OSError:
        return ""
