"""What a daemon has left on the machine: everything that can be traced to its directories, cgroups, network or ids."""

import os
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.harness.network import BridgeNetwork


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    parent: int
    name: str  # comm
    command: str
    marks: str  # everything by which a process can be traced to a daemon: command, cgroups, working directory, root


def processes() -> Iterator[Process]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
            fields = stat[stat.rindex(")") + 2 :].split()
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            marks = "\n".join([command, (entry / "cgroup").read_text(), *_links(entry)])
        except (FileNotFoundError, ProcessLookupError):
            continue
        name = stat[stat.index("(") + 1 : stat.rindex(")")]
        yield Process(int(entry.name), int(fields[1]), name, command or name, marks)


def _links(entry: Path) -> Iterator[str]:
    for name in ("cwd", "root", "exe"):
        try:
            yield str((entry / name).readlink())
        except OSError:  # a zombie has none, a kernel thread no exe
            continue


@dataclass(frozen=True)
class Owned:
    """By what the things of one daemon are told from those of everybody else."""

    directory: Path
    root: Path
    run_dir: Path
    cgroup_parent: str
    network: BridgeNetwork
    ids: set[str] = field(default_factory=set)  # of every pod and container that a client made

    def is_mark(self, text: str) -> bool:
        marks = (str(self.directory), self.cgroup_parent, *self.ids)
        return any(mark in text for mark in marks if mark)  # an id that was not answered is everybody's mark


Traces = dict[str, set[str]]


def traces(owned: Owned, without: Iterable[int] = ()) -> Traces:
    """Everything of `owned`, by kind; `without` are processes that may live (the daemon and its children)."""
    return {
        "processes": {f"{p.pid} {p.name}: {p.command}" for p in owned_processes(owned, without)},
        "mounts": set(_mounts(owned)),
        "cgroups": set(cgroups(owned)),
        "links": set(owned.network.ports()),
        "leases": set(owned.network.leased()),
        "firewall": set(_firewall_rules(owned)),
        "files": set(_files(owned.root)) | set(_files(owned.run_dir)),
    }


def _mounts(owned: Owned) -> Iterator[str]:
    """Without the numbers by which the same mount, made again, would be another one."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if owned.is_mark(line):
            fields = line.split()
            yield f"{fields[fields.index('-') + 1]} {fields[3]} on {fields[4]}"


def owned_processes(owned: Owned, without: Iterable[int] = ()) -> list[Process]:
    spared = {os.getpid(), *without, *_ancestors(os.getpid())}
    return [each for each in processes() if each.pid not in spared and owned.is_mark(each.marks)]


def _ancestors(pid: int) -> Iterator[int]:
    parents = {each.pid: each.parent for each in processes()}
    while pid := parents.get(pid, 0):
        yield pid


def cgroups(owned: Owned) -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[fields.index("-") + 1] in ("cgroup", "cgroup2"):
            for folder, _, _ in os.walk(fields[4]):
                if owned.cgroup_parent in folder or any(each in folder for each in owned.ids):
                    yield folder


def _firewall_rules(owned: Owned) -> Iterator[str]:
    marks = (owned.network.bridge, owned.network.subnet.removesuffix("0/24"), *owned.ids)
    for program in ("iptables-save", "ip6tables-save"):
        try:
            saved = subprocess.run([program], capture_output=True, text=True, check=False).stdout
        except FileNotFoundError:
            continue
        yield from (line for line in saved.splitlines() if any(mark in line for mark in marks))


def _files(top: Path, depth: int = 4) -> Iterator[str]:
    """Names only, not too deep: the contents of layers and writable layers are not of interest."""
    try:
        entries = list(os.scandir(top))
    except OSError:
        return
    for entry in entries:
        if entry.name.endswith(("-wal", "-shm", "-journal")):
            continue
        yield entry.path
        if depth > 1 and entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path), depth - 1)


def added(before: Traces, after: Traces) -> Traces:
    return {kind: new for kind in after if (new := after[kind] - before[kind])}


def nothing_added(before: Traces, owned: Owned, without: Iterable[int] = (), timeout_s: float = 5.0) -> None:
    """Assert that nothing has come to `before`; what is still going away gets `timeout_s`."""
    without = list(without)
    deadline = time.monotonic() + timeout_s
    while new := added(before, traces(owned, without)):
        if time.monotonic() > deadline:
            listed = "\n".join(f"  {kind}: {each}" for kind, several in new.items() for each in sorted(several))
            raise AssertionError(f"left behind:\n{listed}")
        time.sleep(0.1)
