"""Processes of this host as /proc shows them; a pid is believed only together with its start time."""

import contextlib
import errno
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """The fields of /proc/PID/stat that Crito reads."""

    pid: int
    comm: str
    state: str
    parent: int
    start_time: int  # clock ticks since boot, field 22


def stat(pid: int) -> ProcessStat | None:
    """None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH):
            return None
        raise
    return parse_stat(text.decode(errors="surrogateescape"))


def parse_stat(text: str) -> ProcessStat:
    """The name may hold blanks and parentheses: the fields after it start behind the last ")"."""
    before, _, after = text.rpartition(")")
    pid, _, comm = before.partition("(")
    fields = after.split()
    return ProcessStat(int(pid), comm, fields[0], int(fields[1]), int(fields[19]))


def start_time(pid: int) -> int | None:
    """Clock ticks from boot to the process's start; None when there is no such process."""
    found = stat(pid)
    return found.start_time if found else None


def is_alive(pid: int, start_time: int) -> bool:
    """Whether that very process still runs; one that is dead and not yet reaped does not."""
    if pid <= 0:
        return False
    found = stat(pid)
    return found is not None and found.start_time == start_time and found.state not in "ZX"


def pidfd(pid: int, start_time: int) -> int:
    """A pidfd of that very process (which may be a zombie). Raises ProcessLookupError when it is gone."""
    try:
        fd = os.pidfd_open(pid)
    except OSError as error:
        if error.errno == errno.EINVAL:  # no pid, or one that is a thread's by now
            raise ProcessLookupError(errno.ESRCH, f"process {pid} is gone") from error
        raise
    found = stat(pid)
    if found is None or found.start_time != start_time:
        os.close(fd)
        raise ProcessLookupError(errno.ESRCH, f"process {pid} started at {start_time} is gone")
    return fd


def children(pid: int) -> list[int]:
    """The direct children of all threads of the process; empty when it is gone."""
    found: list[int] = []
    try:
        tasks = [task.name for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return found
    for task in tasks:
        try:
            found.extend(int(child) for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split())
        except FileNotFoundError:
            if not Path("/proc/self/task", str(os.getpid()), "children").exists():
                return _children_by_parent(pid)  # a kernel without CONFIG_PROC_CHILDREN
        except ProcessLookupError:
            continue
    return found


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, parents before their children."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children(waiting.pop())
        found.extend(below)
        waiting.extend(below)
    return found


def kill_below(pid: int) -> None:
    """SIGKILL to everything that a process has started and that is still below it."""
    for each in descendants(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def adjust_oom_scores(pids: Iterable[int], score: int) -> None:
    """Write the oom_score_adj of processes; those that have ended meanwhile are passed over.

    Raises OSError: without CAP_SYS_RESOURCE a score cannot go below the one that the process was given with it.
    """
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            Path(f"/proc/{pid}/oom_score_adj").write_text(str(score))


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _children_by_parent(pid: int) -> list[int]:
    stats = (stat(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    return [found.pid for found in stats if found and found.parent == pid]
