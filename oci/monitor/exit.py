"""How a container ended: the evidence of its cgroup, read before that is gone, and the one record of its exit."""

import json
import os
import signal

from oci.monitor import kernel
from oci.monitor.loop import PRIORITY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci.monitor.loop import Loop

RECORD = "exit.json"
UNIFIED = ""
CHARGE_BATCH_BYTES = 256 * 1024

# controller ("" for v2) -> (root of the mount within the hierarchy, mount point)
Mounts = dict[str, tuple[str, str]]


def cgroup_mounts(mountinfo: str) -> Mounts:
    """Where each cgroup hierarchy is mounted, from the text of /proc/PID/mountinfo. Source: proc(5)."""
    mounts: Mounts = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fstype = after.split(" ", 1)[0]
        if fstype not in ("cgroup", "cgroup2"):
            continue
        root, mount_point = before.split(" ")[3:5]
        names = [UNIFIED] if fstype == "cgroup2" else after.split(" ")[2].split(",")
        for name in names:
            mounts.setdefault(name, (root, mount_point))
    return mounts


def memberships(pid: int) -> list[tuple[str, str]]:
    """(controllers, path) for each line of /proc/PID/cgroup; ("", path) is v2."""
    lines = kernel.read_file(f"/proc/{pid}/cgroup").splitlines()
    return [(controllers, path) for _, controllers, path in (line.split(":", 2) for line in lines)]


def cgroup_directory(groups: list[tuple[str, str]], controller: str, mounts: Mounts) -> str:
    """The directory of a process's cgroup in the hierarchy of `controller`; "" where there is none."""
    for controllers, path in groups:
        if controller in controllers.split(",") and controller in mounts:
            root, mount_point = mounts[controller]
            return mount_point + (path.removeprefix(root) if root != "/" else path)
    return ""


def counters(text: str) -> dict[str, int]:
    """The `name number` lines of memory.events or memory.oom_control."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}


class Cgroup:
    """The container's cgroup: what the kernel counted in it, and an end for whoever is left in it.

    A systemd scope is removed as soon as it is empty, perhaps before the exit is seen here; so the v2 counters are
    read whenever the kernel reports a change, which is before the killed process is gone.
    """

    def __init__(self, loop: "Loop", directory: str, is_unified: bool, is_own: bool) -> None:
        self._loop = loop
        self._events_fd = -1
        self._last: dict[str, int] = {}
        self.directory = directory
        self.is_unified = is_unified
        self.is_own = is_own  # the container's alone, so that its processes may be killed

    @classmethod
    def of_process(cls, loop: "Loop", pid: int, mounts: Mounts) -> "Cgroup":
        groups, own = memberships(pid), memberships(os.getpid())
        unified = cgroup_directory(groups, UNIFIED, mounts)
        is_unified = bool(unified) and os.access(unified + "/memory.events", os.R_OK)
        directory = unified if is_unified else cgroup_directory(groups, "memory", mounts)
        mine = cgroup_directory(own, UNIFIED if is_unified else "memory", mounts)
        cgroup = cls(loop, directory, is_unified, bool(directory) and directory != mine and groups != own)
        if is_unified:
            cgroup._open_events()
        return cgroup

    def at_rest(self) -> "tuple[int, list[Any]]":
        """The fd of its events (-1: none), to be waited on, and what `resume` wants to know."""
        return self._events_fd, [self.directory, self.is_unified, self.is_own, self._last]

    @classmethod
    def resume(cls, loop: "Loop", events_fd: int, facts: "list[Any]") -> "Cgroup":
        directory, is_unified, is_own, last = facts
        cgroup = cls(loop, directory, is_unified, is_own)
        cgroup._last = last
        cgroup._events_fd = events_fd
        if events_fd >= 0:
            cgroup._watch()
        return cgroup

    def _open_events(self) -> None:
        try:
            self._events_fd = os.open(self.directory + "/memory.events", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        self._watch()

    def _watch(self) -> None:
        self._read_events(0)
        self._loop.watch(self._events_fd, PRIORITY, self._read_events)

    def _read_events(self, _events: int) -> None:
        try:
            self._last = counters(os.pread(self._events_fd, 4096, 0).decode())
        except OSError:  # ENODEV: removed; what was read last counts
            self._loop.forget(self._events_fd)

    def oom(self) -> tuple[int, str]:
        """(how many of its processes the OOM killer took, which limit: "container", "above" or "")."""
        if not self.is_own:
            return 0, ""
        if self.is_unified:
            self._read_events(0)
            kills = self._last.get("oom_kill", 0) + self._last.get("oom_group_kill", 0)
            hit = counters(_text(self.directory + "/memory.events.local")).get("oom", 0)
        else:
            kills = counters(_text(self.directory + "/memory.oom_control")).get("oom_kill", 0)
            hit = self._was_full("memory") or self._was_full("memory.memsw")
        if not kills:
            return 0, ""
        return kills, "container" if hit else "above"

    def _was_full(self, counter: str) -> bool:
        """Whether a v1 cgroup came as near to its limit as its charges, made in batches, ever come.

        Its failcnt tells nothing: the kernel does not count failures of memsw, which is hit first if both are alike.
        """
        used = int(_text(f"{self.directory}/{counter}.max_usage_in_bytes") or 0)
        limit = int(_text(f"{self.directory}/{counter}.limit_in_bytes") or 0)
        return used > 0 and used >= limit - CHARGE_BATCH_BYTES

    def kill_all(self) -> bool:
        """SIGKILL to whoever is left; whether somebody was. Only where the cgroup is the container's alone."""
        if not self.is_own:
            return False
        pids = [int(line) for line in _text(self.directory + "/cgroup.procs").split()]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return bool(pids)

    def close(self) -> None:
        if self._events_fd >= 0:
            self._loop.forget(self._events_fd)
            os.close(self._events_fd)
            self._events_fd = -1


def _text(path: str) -> str:
    """A cgroup file's text; empty when the cgroup is gone, or the kernel has no such file."""
    try:
        return kernel.read_file(path)
    except OSError:
        return ""


def write_record(directory: str, record: "dict[str, Any]") -> None:
    kernel.write_record(directory, RECORD, json.dumps(record))
