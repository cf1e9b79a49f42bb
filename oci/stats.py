"""What containers and pods use, read from their cgroups (v1 and v2): the kernel's counters in the CRI's units.

A value that the host does not count is None, never 0.
"""

import errno
import time
from dataclasses import dataclass
from pathlib import Path

from oci.errors import NotFound
from oci.linux.cgroup import Cgroups, Hierarchy

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
    if cgroups.of_controller("memory") is None or _is_unified(cgroups.of_controller("memory")):
        return _read_unified(now, cgroups, path)
    return _read_v1(now, cgroups, path)


class CpuRates:
    """Turns counters of CPU time into nano-cores: the average since the sample before, at least `window_s` ago.

    Every reader may call at any time: samples that come too fast do not shorten the window.
    """

    def __init__(self, window_s: float = 1.0) -> None:
        self._window_ns = int(window_s * 1e9)
        self._samples: dict[str, tuple[int, int]] = {}  # id -> timestamp, usage
        self._rates: dict[str, int] = {}

    def usage_nano_cores(self, id: str, timestamp: int, usage_core_ns: int) -> int | None:
        """None until there are two samples; the last known rate while the window has not passed."""
        before = self._samples.get(id)
        if before is None or usage_core_ns < before[1]:  # new, or the counter started over
            self._samples[id] = (timestamp, usage_core_ns)
            self._rates.pop(id, None)
            return None
        elapsed = timestamp - before[0]
        if elapsed >= self._window_ns:
            self._samples[id] = (timestamp, usage_core_ns)
            self._rates[id] = (usage_core_ns - before[1]) * 1_000_000_000 // elapsed
        return self._rates.get(id)

    def forget(self, id: str) -> None:
        self._samples.pop(id, None)
        self._rates.pop(id, None)


# --- v2


def _read_unified(now: int, cgroups: Cgroups, path: str) -> CgroupStats:
    hierarchy = cgroups.unified
    if hierarchy is None:
        return CgroupStats(now, None, None, None, None, None)
    directory = hierarchy.mountpoint / path.strip("/")
    return CgroupStats(
        timestamp=now,
        cpu=_unified_cpu(directory),
        memory=_unified_memory(directory),
        swap=_unified_swap(directory),
        io=_unified_io(directory),
        processes=_number(directory / "pids.current"),
    )


def _unified_cpu(directory: Path) -> Cpu | None:
    usage = _table(directory / "cpu.stat").get("usage_usec")
    return None if usage is None else Cpu(usage * 1000, _psi(directory / "cpu.pressure"))


def _unified_memory(directory: Path) -> Memory | None:
    usage, stat = _number(directory / "memory.current"), _table(directory / "memory.stat")
    if usage is None:
        return None
    working_set = max(0, usage - stat.get("inactive_file", 0))
    return Memory(
        usage_bytes=usage,
        working_set_bytes=working_set,
        available_bytes=_left(_number(directory / "memory.max"), working_set),
        rss_bytes=stat.get("anon", 0),
        page_faults=stat.get("pgfault", 0),
        major_page_faults=stat.get("pgmajfault", 0),
        psi=_psi(directory / "memory.pressure"),
    )


def _unified_swap(directory: Path) -> Swap | None:
    usage = _number(directory / "memory.swap.current")
    return None if usage is None else Swap(usage, _left(_number(directory / "memory.swap.max"), usage))


def _unified_io(directory: Path) -> Io | None:
    text = _text(directory / "io.stat")
    if text is None:
        return None
    pairs = [word.partition("=") for word in text.split() if "=" in word]
    read_bytes = sum(int(value) for name, _, value in pairs if name == "rbytes")
    written = sum(int(value) for name, _, value in pairs if name == "wbytes")
    return Io(read_bytes, written, _psi(directory / "io.pressure"))


def _psi(path: Path) -> Psi | None:
    """None on a kernel without pressure stall information. Source: the kernel's accounting/psi.rst."""
    lines = {line.partition(" ")[0]: line for line in (_text(path) or "").splitlines()}
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
    usage = _number(cpu / "cpuacct.usage") if cpu else None
    stat = _table(memory / "memory.stat") if memory else {}
    return CgroupStats(
        timestamp=now,
        cpu=None if usage is None else Cpu(usage),
        memory=_v1_memory(memory, stat) if memory else None,
        swap=_v1_swap(stat),
        io=_v1_io(blkio) if blkio else None,
        processes=_number(pids / "pids.current") if pids else None,
    )


def _v1_memory(directory: Path, stat: dict[str, int]) -> Memory | None:
    usage = _number(directory / "memory.usage_in_bytes")
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
    text = _text(directory / "blkio.throttle.io_service_bytes_recursive")
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


def _is_unified(hierarchy: Hierarchy | None) -> bool:
    return hierarchy is not None and hierarchy.is_unified


def _left(limit: int | None, used: int) -> int | None:
    return None if limit is None else max(0, limit - used)


def _text(path: Path) -> str | None:
    """None where the file is not there: no such controller, kernel option, or no longer such a cgroup."""
    try:
        return path.read_text()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
            return None
        raise


def _number(path: Path) -> int | None:
    """None also for "max"."""
    text = (_text(path) or "").strip()
    return int(text) if text.isdecimal() else None


def _table(path: Path) -> dict[str, int]:
    fields = (line.split() for line in (_text(path) or "").splitlines())
    return {line[0]: int(line[1]) for line in fields if len(line) == 2 and line[1].isdecimal()}
