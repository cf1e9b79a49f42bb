"""What containers and pods use, read from their cgroups (v1 and v2): the kernel's counters in the CRI's units.

A value that the host does not count is None, never 0.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from oci.errors import NotFound
from oci.linux import cgroup_files
from oci.linux.cgroup import Cgroups, Hierarchy
from oci.runtime import Usage

# From here on a v1 limit is "none": the kernel's page counter at its end, whatever the page size.
_UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True)
class PsiData:
    total_ns: int
    avg10: float  # percent
    avg60: float
    avg300: float


@dataclass(frozen=True, slots=True)
class Psi:
    full: PsiData
    some: PsiData


@dataclass(frozen=True, slots=True)
class Cpu:
    usage_core_ns: int
    psi: Psi | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    usage_bytes: int
    working_set_bytes: int  # what the kernel could not free at once
    available_bytes: int | None  # below the limit; None without one
    rss_bytes: int
    page_faults: int
    major_page_faults: int
    psi: Psi | None = None


@dataclass(frozen=True, slots=True)
class Swap:
    usage_bytes: int
    available_bytes: int | None


@dataclass(frozen=True, slots=True)
class Io:
    read_bytes: int
    write_bytes: int
    psi: Psi | None = None


@dataclass(frozen=True, slots=True)
class CgroupStats:
    """One look at one cgroup, everything below it included."""

    timestamp: int  # ns since the epoch
    cpu: Cpu | None
    memory: Memory | None
    swap: Swap | None
    io: Io | None
    processes: int | None  # tasks, as the kernel's pids controller counts them


def read(cgroups: Cgroups, path: str) -> CgroupStats:
    """Raises NotFound when there is no such cgroup (any more). A controller that the host lacks is None."""
    if not cgroups.exists(path):
        raise NotFound(f"stats of cgroup {path}: there is no such cgroup")
    now = time.time_ns()
    unified = counting_hierarchy(cgroups)
    if unified is not None:
        return _read_unified(now, unified.mountpoint / path.strip("/"))
    return _read_v1(now, cgroups, path)


def of_usage(usage: Usage) -> CgroupStats:
    """The same of a container in a sandbox, as far as its runtime counts; it cannot tell what memory could be freed."""
    memory = usage.memory_bytes
    return CgroupStats(
        timestamp=time.time_ns(),
        cpu=None if usage.cpu_ns is None else Cpu(usage.cpu_ns),
        memory=None if memory is None else Memory(memory, memory, None, memory, 0, 0),
        swap=None,
        io=None,
        processes=usage.processes,
    )


def cpu_usage(cgroups: Cgroups, path: str) -> tuple[int, int] | None:
    """A time (ns since the epoch) and the CPU time (ns) until then, by one file's read; None where nothing counts."""
    unified = counting_hierarchy(cgroups)
    if unified is not None:
        microseconds = cgroup_files.table(unified.mountpoint / path.strip("/") / "cpu.stat").get("usage_usec")
        usage = None if microseconds is None else microseconds * 1000
    else:
        directory = cgroups.directory("cpuacct", path)
        usage = cgroup_files.number(directory / "cpuacct.usage") if directory else None
    return None if usage is None else (time.time_ns(), usage)


def counting_hierarchy(cgroups: Cgroups) -> Hierarchy | None:
    """The unified hierarchy where it is the one that counts what containers use; None where v1 hierarchies do."""
    memory = cgroups.of_controller("memory")
    return cgroups.unified if memory is None or memory.is_unified else None


def total(parts: Sequence[CgroupStats]) -> CgroupStats:
    """Several cgroups as one: what one of them does not count is left out of the sum, averages are not told."""
    cpus = [part.cpu.usage_core_ns for part in parts if part.cpu]
    memories = [part.memory for part in parts if part.memory]
    processes = [part.processes for part in parts if part.processes is not None]
    return CgroupStats(
        timestamp=max((part.timestamp for part in parts), default=time.time_ns()),
        cpu=Cpu(sum(cpus)) if cpus else None,
        memory=_total_memory(memories) if memories else None,
        swap=None,
        io=None,
        processes=sum(processes) if processes else None,
    )


def _total_memory(memories: Iterable[Memory]) -> Memory:
    rows = [
        (each.usage_bytes, each.working_set_bytes, each.rss_bytes, each.page_faults, each.major_page_faults)
        for each in memories
    ]
    usage, working_set, rss, faults, major = map(sum, zip(*rows, strict=True))
    return Memory(usage, working_set, None, rss, faults, major)


class CpuRates:
    """Turns counters of CPU time into nano-cores: the average since the sample before, at least `window_s` ago.

    Every reader may call at any time: samples that come too fast do not shorten the window.
    """

    def __init__(self, window_s: float = 1.0) -> None:
        self._window_ns = int(window_s * 1e9)
        self._samples: dict[str, tuple[int, int]] = {}  # id -> timestamp, usage
        self._rates: dict[str, int] = {}

    def usage_nano_cores(self, id: str, timestamp: int, usage_core_ns: int, since: int) -> int:
        """The rate until `timestamp`; `since` is when the counter began at 0, from which the first rate is reckoned.

        While the window has not passed it is the rate before; so it is where the counter has gone back.
        """
        if id not in self._samples:
            self._samples[id] = (timestamp, usage_core_ns)
            self._rates[id] = usage_core_ns * 1_000_000_000 // max(timestamp - since, 1_000_000)
            return self._rates[id]
        sampled_at, used = self._samples[id]
        elapsed, more = timestamp - sampled_at, usage_core_ns - used
        if elapsed < 0 or more < 0:
            self._samples[id] = (timestamp, usage_core_ns)
        elif elapsed >= self._window_ns:
            self._samples[id] = (timestamp, usage_core_ns)
            self._rates[id] = more * 1_000_000_000 // elapsed
        return self._rates[id]

    def keep_only(self, ids: Iterable[str]) -> None:
        """Let go of what is remembered of all others."""
        gone = self._samples.keys() - set(ids)
        for id in gone:
            del self._samples[id], self._rates[id]


# --- v2


def _read_unified(now: int, directory: Path) -> CgroupStats:
    return CgroupStats(
        timestamp=now,
        cpu=_unified_cpu(directory),
        memory=_unified_memory(directory),
        swap=_unified_swap(directory),
        io=_unified_io(directory),
        processes=cgroup_files.number(directory / "pids.current"),
    )


def _unified_cpu(directory: Path) -> Cpu | None:
    usage = cgroup_files.table(directory / "cpu.stat").get("usage_usec")
    return None if usage is None else Cpu(usage * 1000, psi(directory / "cpu.pressure"))


def _unified_memory(directory: Path) -> Memory | None:
    usage, stat = cgroup_files.number(directory / "memory.current"), cgroup_files.table(directory / "memory.stat")
    if usage is None:
        return None
    working_set = max(0, usage - stat.get("inactive_file", 0))
    return Memory(
        usage_bytes=usage,
        working_set_bytes=working_set,
        available_bytes=_left(cgroup_files.number(_limited(directory) / "memory.max"), working_set),
        rss_bytes=stat.get("anon", 0),
        page_faults=stat.get("pgfault", 0),
        major_page_faults=stat.get("pgmajfault", 0),
        psi=psi(directory / "memory.pressure"),
    )


def _unified_swap(directory: Path) -> Swap | None:
    usage = cgroup_files.number(directory / "memory.swap.current")
    return (
        None
        if usage is None
        else Swap(usage, _left(cgroup_files.number(_limited(directory) / "memory.swap.max"), usage))
    )


def _limited(directory: Path) -> Path:
    """Where a container's limits are set: crun with systemd makes a cgroup of its own for them within the scope.

    Those of the scope itself are systemd's, which may set them anew at any time.
    """
    inner = directory / "container"
    return inner if directory.name.endswith(".scope") and inner.is_dir() else directory


def _unified_io(directory: Path) -> Io | None:
    text = cgroup_files.text(directory / "io.stat")
    if text is None:
        return None
    pairs = [word.partition("=") for word in text.split() if "=" in word]
    read_bytes = sum(int(value) for name, _, value in pairs if name == "rbytes")
    written = sum(int(value) for name, _, value in pairs if name == "wbytes")
    return Io(read_bytes, written, psi(directory / "io.pressure"))


def psi(path: Path | str) -> Psi | None:
    """None on a kernel without pressure stall information. Source: the kernel's accounting/psi.rst."""
    lines = {line.partition(" ")[0]: line for line in (cgroup_files.text(path) or "").splitlines()}
    if "some" not in lines:
        return None
    some = _psi_data(lines["some"])
    return Psi(full=_psi_data(lines["full"]) if "full" in lines else PsiData(0, 0.0, 0.0, 0.0), some=some)


def _psi_data(line: str) -> PsiData:
    fields = dict(word.split("=") for word in line.split()[1:])
    averages = (float(fields[name]) for name in ("avg10", "avg60", "avg300"))
    return PsiData(int(fields["total"]) * 1000, *averages)


# --- v1


def _read_v1(now: int, cgroups: Cgroups, path: str) -> CgroupStats:
    cpu, memory = cgroups.directory("cpuacct", path), cgroups.directory("memory", path)
    pids, blkio = cgroups.directory("pids", path), cgroups.directory("blkio", path)
    usage = cgroup_files.number(cpu / "cpuacct.usage") if cpu else None
    stat = cgroup_files.table(memory / "memory.stat") if memory else {}
    return CgroupStats(
        timestamp=now,
        cpu=None if usage is None else Cpu(usage),
        memory=_v1_memory(memory, stat) if memory else None,
        swap=_v1_swap(stat),
        io=_v1_io(blkio) if blkio else None,
        processes=cgroup_files.number(pids / "pids.current") if pids else None,
    )


def _v1_memory(directory: Path, stat: dict[str, int]) -> Memory | None:
    usage = cgroup_files.number(directory / "memory.usage_in_bytes")
    if usage is None:
        return None
    working_set = max(0, usage - stat.get("total_inactive_file", 0))
    return Memory(
        usage_bytes=usage,
        working_set_bytes=working_set,
        available_bytes=_left(_limit(stat, "hierarchical_memory_limit"), working_set),
        rss_bytes=stat.get("total_rss", 0),
        page_faults=stat.get("total_pgfault", 0),
        major_page_faults=stat.get("total_pgmajfault", 0),
    )


def _v1_swap(stat: dict[str, int]) -> Swap | None:
    usage = stat.get("total_swap")
    if usage is None:
        return None
    both, memory = _limit(stat, "hierarchical_memsw_limit"), _limit(stat, "hierarchical_memory_limit")
    limit = both - memory if both is not None and memory is not None else None
    return Swap(usage, _left(limit, usage))


def _v1_io(directory: Path) -> Io | None:
    text = cgroup_files.text(directory / "blkio.throttle.io_service_bytes_recursive")
    if text is None:
        return None
    lines = [line.split() for line in text.splitlines()]
    totals = {
        kind: sum(int(fields[2]) for fields in lines if len(fields) == 3 and fields[1] == kind)
        for kind in ("Read", "Write")
    }
    return Io(totals["Read"], totals["Write"])


def _limit(stat: dict[str, int], name: str) -> int | None:
    limit = stat.get(name)
    return None if limit is None or limit >= _UNLIMITED else limit


# --- files


def _left(limit: int | None, used: int) -> int | None:
    return None if limit is None else max(0, limit - used)
