"""Starting the OCI runtime as a child, and ending whole trees of processes."""

import os
import signal
import time

from oci.monitor import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from oci.monitor.loop import Loop

_DEFAULTED = [
    number
    for number in (signal.SIGPIPE, signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGXFSZ)
    if number
]
GIVE_UP_S = 10.0  # a task in uninterruptible sleep cannot be killed, and nobody should wait for it for ever


class OomScore:
    """This process's own oom_score_adj, which the programs that it starts shall not inherit."""

    def __init__(self, wanted: int, inherited: int) -> None:
        self._inherited = inherited
        kernel.set_oom_score_adj(os.getpid(), wanted)
        self._own = int(kernel.read_file("/proc/self/oom_score_adj"))

    def __enter__(self) -> None:
        if self._own != self._inherited:
            kernel.set_oom_score_adj(os.getpid(), self._inherited)

    def __exit__(self, *_: object) -> None:
        if self._own != self._inherited:
            kernel.set_oom_score_adj(os.getpid(), self._own)


def spawn(argv: list[str], environment: dict[str, str], stdin: int, stdout: int, stderr: int) -> int:
    """Start a program with just these three fds, by vfork: no page of this process is copied."""
    actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate((stdin, stdout, stderr))]
    return os.posix_spawn(argv[0], argv, environment, file_actions=actions, setsigmask=[], setsigdef=_DEFAULTED)


def kill(stat: kernel.ProcessStat, number: int) -> None:
    """Signal exactly the process that `stat` was read from, never another one with its pid."""
    try:
        fd = os.pidfd_open(stat.pid)
    except ProcessLookupError:
        return
    try:
        if kernel.start_time(stat.pid) == stat.start_time:
            signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return
    finally:
        os.close(fd)


def exit_code(status: int) -> tuple[int, int]:
    """A wait status as (exit code, signal); the code is 128 + N when signal N ended the process, as shells say it."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return 128 + number, number
    return os.WEXITSTATUS(status), 0


class TreeKill:
    """Kills a process, its descendants and its session, again and again until none is left; then calls `done(left)`.

    Members found once stay members when their parent dies. What escapes is a process that both left the session and
    was re-parented before the first look; with a cgroup of its own (see exec.py) not even that.
    """

    def __init__(self, loop: "Loop", root: int, done: "Callable[[int], None]", spared: tuple[int, ...] = ()) -> None:
        """With some spared, `root` among them, it is their descendants only, and no session."""
        self._loop = loop
        self._root = root
        self._spared = spared
        self._done = done
        self._members: dict[int, int] = {}  # pid -> start time
        self._deadline = time.monotonic() + GIVE_UP_S
        self._pause_s = 0.002
        loop.after(0.0, self._round)

    def _round(self) -> None:
        alive = self._find()
        for stat in alive:
            kill(stat, signal.SIGKILL)
        if not alive or time.monotonic() > self._deadline:
            self._done(len(alive))
            return
        self._loop.after(self._pause_s, self._round)
        self._pause_s = min(0.1, self._pause_s * 2)

    def _find(self) -> list[kernel.ProcessStat]:
        stats = kernel.processes()
        members = {stat.pid for stat in stats if self._members.get(stat.pid) == stat.start_time}
        if self._spared:
            members.update(self._spared)
        else:
            members.update(stat.pid for stat in stats if self._root in (stat.pid, stat.session))
        size = -1
        while size != len(members):
            size = len(members)
            members.update(stat.pid for stat in stats if stat.parent in members)
        members.difference_update(self._spared)
        found = [stat for stat in stats if stat.pid in members]
        self._members = {stat.pid: stat.start_time for stat in found}
        return [stat for stat in found if stat.state not in "ZX"]
