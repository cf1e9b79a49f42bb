"""The end of a container that lives in another process, told by the OCI runtime's own `wait`.

All containers of a gVisor pod are one process of the host, their sandbox: no exit of theirs reaches a parent.
"""

import json
import os

from oci.monitor import kernel
from oci.monitor.processes import spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from oci.monitor.loop import Loop
    from oci.monitor.processes import OomScore

RETRY_S = 0.2
OUTPUT = "wait.json"
KILLED = 9  # the wait status of whoever was killed: the sandbox's death is each container's


class Wait:
    """Asks until it is told, or the sandbox is gone; then calls `ended(wait status, whether the sandbox is gone)`."""

    def __init__(
        self,
        loop: "Loop",
        *,
        runtime: list[str],
        container_id: str,
        environment: dict[str, str],
        directory: str,
        oom_score: "OomScore",
        sandbox: tuple[int, int],
        ended: "Callable[[int, bool], None]",
    ) -> None:
        """`sandbox`: the pid and start time of the process that the container lives in."""
        self._loop = loop
        self._argv = [*runtime, "wait", container_id]
        self._environment = environment
        self._output = f"{directory}/{OUTPUT}"
        self._oom_score = oom_score
        self._sandbox = sandbox
        self._ended = ended
        self.pid = 0  # of the runtime's command, while it runs

    def begin(self) -> None:
        """To be called once the container was started: until then the runtime has nothing to wait for."""
        try:
            self.resume(self._spawn())
        except OSError:
            self._loop.after(RETRY_S, self._again)

    def _spawn(self) -> int:
        fd = os.open(self._output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with self._oom_score:
                return spawn(self._argv, self._environment, 0, fd, 1)
        finally:
            os.close(fd)

    def resume(self, pid: int) -> None:
        """Go on with a command that an earlier working half has started."""
        self.pid = pid
        self._loop.on_exit(pid, self._on_exit)

    def _on_exit(self, _status: int) -> None:
        self.pid = 0
        code = exit_status(_text(self._output))
        if code is not None:
            kernel.unlink(self._output)
            self._ended(code << 8, False)
        else:
            self._loop.after(RETRY_S, self._again)

    def _again(self) -> None:
        """The command was killed, or the sandbox has died: then nobody can tell more."""
        pid, start_time = self._sandbox
        try:
            lives = kernel.start_time(pid) == start_time
        except OSError:
            lives = False
        if lives:
            self.begin()
        else:
            kernel.unlink(self._output)
            self._ended(KILLED, True)


def exit_status(output: str) -> int | None:
    """The exit code (128 + N for signal N) that `wait` has printed; None where it has told none."""
    try:
        told = json.loads(output)
        return int(told["exitStatus"]) & 0xFF
    except (ValueError, KeyError, TypeError):
        return None


def _text(path: str) -> str:
    """A file's text; empty where there is none."""
    try:
        return kernel.read_file(path)
    except OSError:
        return ""
