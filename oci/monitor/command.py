"""One run of the OCI runtime's command: started, given its time, and its complaints collected."""

import json
import os

from oci.monitor import kernel, wire
from oci.monitor.processes import TreeKill, exit_code, spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from oci.monitor.loop import Loop
    from oci.monitor.processes import OomScore

COMPLAINTS = 5


class Command:
    """Calls `done(None)` after an exit with 0, else `done(error text)`; `is_late` tells that its time ran out."""

    def __init__(
        self,
        loop: "Loop",
        *,
        runtime: list[str],
        arguments: list[str],
        environment: dict[str, str],
        stdio: tuple[int, int, int],
        log_path: str,
        timeout_s: float,
        oom_score: "OomScore",
        done: "Callable[[str | None], None]",
    ) -> None:
        """Raises OSError when the runtime's program cannot be started."""
        self._loop = loop
        self._name = f"{runtime[0].rpartition('/')[2]} {arguments[0]}"
        self._log_path = log_path
        self._done = done
        self._kill: TreeKill | None = None
        self.is_late = False
        self._log_fd = os.open(log_path, os.O_RDONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with oom_score:
                self.pid = spawn([*runtime, "--log", log_path, *arguments], environment, *stdio)
        except OSError:
            self._remove_log()
            raise
        self._timer = loop.after(timeout_s, self.expire)
        loop.on_exit(self.pid, self._on_exit)

    def expire(self) -> None:
        """Its time is over: kill it and what it has started."""
        self.is_late = True
        self._kill = TreeKill(self._loop, self.pid, lambda left: None)

    def _on_exit(self, status: int) -> None:
        self._timer.cancel()
        complaints = self._complaints() if status or self.is_late else ""
        self._remove_log()
        if self.is_late:
            self._done(f"{self._name}: not done in time, killed; it said: {complaints or 'nothing'}")
        elif status:
            code, number = exit_code(status)
            how = f"killed by signal {number}" if number else f"exit status {code}"
            self._done(f"{self._name}: {complaints or how}")
        else:
            self._done(None)

    def _complaints(self) -> str:
        size = os.fstat(self._log_fd).st_size
        return complaints(os.pread(self._log_fd, wire.TEXT_BYTES, max(0, size - wire.TEXT_BYTES)))

    def _remove_log(self) -> None:
        os.close(self._log_fd)
        kernel.unlink(self._log_path)


def complaints(log: bytes) -> str:
    """What the runtime's log says, errors if it names any; JSON lines (`--log-format json`) or plain ones."""
    errors: list[str] = []
    others: list[str] = []
    for line in log.decode("utf-8", "replace").splitlines():
        text, is_error = _complaint(line)
        (errors if is_error else others).append(text)
    return "; ".join((errors or others)[-COMPLAINTS:])


def _complaint(line: str) -> tuple[str, bool]:
    try:
        entry = json.loads(line)
    except ValueError:
        return line, "level=error" in line
    if not isinstance(entry, dict):
        return line, False
    return str(entry.get("msg", line)), entry.get("level") in ("error", "fatal")
