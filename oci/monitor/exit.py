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
OWN, ABOVE = "events", "events_above"

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


def above_scope(directory: str) -> str:
    """The cgroup that holds the outermost systemd scope on the path; "" where there is no scope."""
    parts = directory.split("/")
    scopes = [index for index, part in enumerate(parts) if part.endswith(".scope")]
    return "/".join(parts[: scopes[0]]) if scopes else ""


def counters(text: str) -> dict[str, int]:
    """The `name number` lines of memory.events or memory.oom_control."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}


class Cgroup:
    """The container's cgroup: what the kernel counted in it, and an end for whoever is left in it.

    systemd removes a scope as soon as it is empty, and its counters with it, perhaps before anybody has read them: the
    kernel tells of changes at most every 10 ms. So the counters are read at every change, and so are those of the
    cgroup above the scope, which stays and counts what is below it: what it has counted since the scope's were read
    last was the scope's own.
    """

    def __init__(self, loop: "Loop", directory: str, is_unified: bool, is_own: bool) -> None:
        self._loop = loop
        self._fds = {OWN: -1, ABOVE: -1}  # of memory.events
        self._kills = {OWN: 0, ABOVE: -1}  # as of when both could be read last; -1: never
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
            cgroup.watch({name: _open_events(at) for name, at in ((OWN, directory), (ABOVE, above_scope(directory)))})
        return cgroup

    def at_rest(self) -> "tuple[dict[str, int], list[Any]]":
        """The fds of its events, which are to be waited on, and what `resume` wants to know."""
        facts = [self.directory, self.is_unified, self.is_own, self._kills]
        return {name: fd for name, fd in self._fds.items() if fd >= 0}, facts

    @classmethod
    def resume(cls, loop: "Loop", fds: "dict[str, int]", facts: "list[Any]") -> "Cgroup":
        directory, is_unified, is_own, kills = facts
        cgroup = cls(loop, directory, is_unified, is_own)
        cgroup._kills = kills
        cgroup.watch({name: fds.get(name, -1) for name in (OWN, ABOVE)})
        return cgroup

    def watch(self, fds: "dict[str, int]") -> None:
        """Count by these files from now on, which `close` closes."""
        self._fds = fds
        self._read_events(0)
        for fd in self._fds.values():
            if fd >= 0:
                self._loop.watch(fd, PRIORITY, self._read_events)

    def _read_events(self, _events: int) -> None:
        above = self._kills_now(ABOVE)  # first: what is counted in between is then found in both
        own = self._kills_now(OWN)
        if own is None:
            self._close(OWN)
        else:
            self._kills = {OWN: own, ABOVE: above or 0}

    def _kills_now(self, name: str) -> int | None:
        """None when the cgroup is gone (ENODEV), or has no such file."""
        try:
            events = counters(os.pread(self._fds[name], 4096, 0).decode())
        except OSError:
            return None
        return events.get("oom_kill", 0) + events.get("oom_group_kill", 0)

    def oom(self) -> tuple[int, str]:
        """(how many of its processes the OOM killer took, which limit: "container", "above" or "").

        Of a cgroup that was gone too soon it is only known that there were kills, not by which limit.
        """
        if not self.is_own:
            return 0, ""
        if self.is_unified:
            self._read_events(0)
            kills = self._kills[OWN]
            if self._fds[OWN] < 0 and not kills and self._kills[ABOVE] >= 0:
                return max(0, (self._kills_now(ABOVE) or 0) - self._kills[ABOVE]), ""
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
        groups = [directory for directory, _, _ in os.walk(self.directory)]  # privileged ones make more below their own
        pids = [int(line) for directory in groups for line in _text(directory + "/cgroup.procs").split()]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return bool(pids)

    def close(self) -> None:
        for name in self._fds:
            self._close(name)

    def _close(self, name: str) -> None:
        fd, self._fds[name] = self._fds[name], -1
        if fd >= 0:
            self._loop.forget(fd)
            os.close(fd)


def _open_events(directory: str) -> int:
    """A cgroup's memory.events; -1 where there is none."""
    try:
        return os.open(directory + "/memory.events", os.O_RDONLY | os.O_CLOEXEC) if directory else -1
    except OSError:
        return -1


def _text(path: str) -> str:
    """A cgroup file's text; empty when the cgroup is gone, or the kernel has no such file."""
    try:
        return kernel.read_file(path)
    except OSError:
        return ""


def write_record(directory: str, record: "dict[str, Any]") -> None:
    kernel.write_record(directory, RECORD, json.dumps(record))
