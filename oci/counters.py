"""The finer counters of one cgroup, v1 or v2, and of its processes: what cAdvisor's Prometheus metrics told of it.

A value that the host does not count is None, never 0.
"""
# ruff: noqa: PTH112

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from oci.errors import NotFound
from oci.linux import cgroup_files, open_files
from oci.linux.cgroup import Cgroups
from oci.stats import Psi, counting_hierarchy, psi

_CONTROLLERS = ("memory", "cpuacct", "cpu", "pids", "blkio", "hugetlb")
_USER_HZ_NS = 10_000_000  # cpuacct.stat counts in hundredths of a second on every architecture


@dataclass(frozen=True, slots=True)
class CpuCounters:
    usage_ns: int
    user_ns: int | None
    system_ns: int | None
    periods: int | None
    throttled_periods: int | None
    throttled_ns: int | None
    bursts: int = 0  # periods in which more than the quota was used; 0 on a kernel that allows none
    burst_ns: int = 0
    psi: Psi | None = None


@dataclass(frozen=True, slots=True)
class MemoryCounters:
    usage_bytes: int
    working_set_bytes: int
    max_usage_bytes: int | None
    rss_bytes: int
    cache_bytes: int
    kernel_bytes: int | None
    mapped_file_bytes: int
    swap_bytes: int | None
    active_file_bytes: int
    inactive_file_bytes: int
    limit_hits: int | None
    oom_kills: int | None
    page_faults: int  # of the cgroup's own processes; v2 tells only those with all below it
    major_page_faults: int
    total_page_faults: int  # with all below it
    total_major_page_faults: int
    psi: Psi | None = None


@dataclass(frozen=True, slots=True)
class DeviceIo:
    """One kind of transfer ("Read", "Write", "Discard" …) of one block device."""

    major: int
    minor: int
    operation: str
    bytes: int | None
    operations: int | None


@dataclass(frozen=True, slots=True)
class HugePages:
    size: str  # "2MB"
    usage_bytes: int
    max_usage_bytes: int | None


@dataclass(frozen=True, slots=True)
class ProcessCounters:
    """`processes` and `files` are None where they were not asked for."""

    processes: int | None
    threads: int | None
    threads_max: int | None  # 0 is unlimited
    files: open_files.OpenFiles | None


@dataclass(frozen=True, slots=True)
class Counters:
    """One look at one cgroup, everything below it included."""

    cpu: CpuCounters | None
    memory: MemoryCounters | None
    io: tuple[DeviceIo, ...]
    io_psi: Psi | None
    huge_pages: tuple[HugePages, ...]
    processes: ProcessCounters | None


def read(cgroups: Cgroups, path: str, *, each_process: bool = True) -> Counters:
    """Raises NotFound when there is no such cgroup (any more). Without `each_process` no process is looked at."""
    # Text paths: a scrape opens some twenty files for each container, and a Path for each takes longer than the read.
    unified = counting_hierarchy(cgroups)
    if unified is not None:
        directory = str(unified.mountpoint / path.strip("/"))
        _require([directory], path)
        return _read_unified(directory, each_process)
    found = {name: str(at) for name in _CONTROLLERS if (at := cgroups.directory(name, path)) is not None}
    _require(found.values(), path)
    return _read_v1(found, each_process)


def _require(directories: Iterable[str], path: str) -> None:
    if not any(os.path.isdir(directory) for directory in directories):
        raise NotFound(f"counters of cgroup {path}: there is no such cgroup")


# --- v2


def _read_unified(directory: str, each_process: bool) -> Counters:
    return Counters(
        cpu=_unified_cpu(directory),
        memory=_unified_memory(directory),
        io=tuple(_unified_io(cgroup_files.text(f"{directory}/io.stat") or "")),
        io_psi=psi(f"{directory}/io.pressure"),
        huge_pages=tuple(_huge_pages(directory, "current", "")),
        processes=_processes(directory, each_process),
    )


def _unified_cpu(directory: str) -> CpuCounters | None:
    stat = cgroup_files.table(f"{directory}/cpu.stat")
    usage = _from_microseconds(stat.get("usage_usec"))
    if usage is None:
        return None
    return CpuCounters(
        usage_ns=usage,
        user_ns=_from_microseconds(stat.get("user_usec")),
        system_ns=_from_microseconds(stat.get("system_usec")),
        periods=stat.get("nr_periods"),
        throttled_periods=stat.get("nr_throttled"),
        throttled_ns=_from_microseconds(stat.get("throttled_usec")),
        bursts=stat.get("nr_bursts", 0),
        burst_ns=stat.get("burst_usec", 0) * 1000,
        psi=psi(f"{directory}/cpu.pressure"),
    )


def _from_microseconds(value: int | None) -> int | None:
    return None if value is None else value * 1000


def _unified_memory(directory: str) -> MemoryCounters | None:
    usage = cgroup_files.number(f"{directory}/memory.current")
    if usage is None:
        return None
    stat = cgroup_files.table(f"{directory}/memory.stat")
    events = cgroup_files.table(f"{directory}/memory.events")
    faults, major_faults = stat.get("pgfault", 0), stat.get("pgmajfault", 0)
    return MemoryCounters(
        usage_bytes=usage,
        working_set_bytes=max(0, usage - stat.get("inactive_file", 0)),
        max_usage_bytes=cgroup_files.number(f"{directory}/memory.peak"),
        rss_bytes=stat.get("anon", 0),
        cache_bytes=stat.get("file", 0),
        kernel_bytes=_unified_kernel(stat),
        mapped_file_bytes=stat.get("file_mapped", 0),
        swap_bytes=cgroup_files.number(f"{directory}/memory.swap.current"),
        active_file_bytes=stat.get("active_file", 0),
        inactive_file_bytes=stat.get("inactive_file", 0),
        limit_hits=events.get("max"),
        oom_kills=events.get("oom_kill"),
        page_faults=faults,
        major_page_faults=major_faults,
        total_page_faults=faults,
        total_major_page_faults=major_faults,
        psi=psi(f"{directory}/memory.pressure"),
    )


def _unified_kernel(stat: dict[str, int]) -> int | None:
    """The sum itself is there since Linux 5.18."""
    parts = ("kernel_stack", "pagetables", "percpu", "sock", "slab", "vmalloc")
    if "kernel" in stat:
        return stat["kernel"]
    return sum(stat.get(part, 0) for part in parts) if "kernel_stack" in stat else None


def _unified_io(text: str) -> Iterator[DeviceIo]:
    """Lines like "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6"; a device without traffic has no pairs."""
    for line in text.splitlines():
        device, *words = line.split()
        major, _, minor = device.partition(":")
        pairs = {name: int(value) for name, _, value in (word.partition("=") for word in words) if value.isdecimal()}
        if not (major.isdecimal() and minor.isdecimal()):
            continue
        for operation, letter in (("Read", "r"), ("Write", "w"), ("Discard", "d")):
            if f"{letter}bytes" in pairs:
                count, operations = pairs[f"{letter}bytes"], pairs.get(f"{letter}ios")
                yield DeviceIo(int(major), int(minor), operation, count, operations)


# --- v1


def _read_v1(directories: Mapping[str, str], each_process: bool) -> Counters:
    memory, accounted, cpu, pids, blkio, hugetlb = map(directories.get, _CONTROLLERS)
    return Counters(
        cpu=_v1_cpu(accounted, cpu) if accounted else None,
        memory=_v1_memory(memory) if memory else None,
        io=tuple(_v1_io(blkio)) if blkio else (),
        io_psi=None,
        huge_pages=tuple(_huge_pages(hugetlb, "usage_in_bytes", "max_usage_in_bytes")) if hugetlb else (),
        processes=_processes(pids, each_process) if pids else None,
    )


def _v1_cpu(accounted: str, cpu: str | None) -> CpuCounters | None:
    usage = cgroup_files.number(f"{accounted}/cpuacct.usage")
    if usage is None:
        return None
    ticks = cgroup_files.table(f"{accounted}/cpuacct.stat")
    stat = cgroup_files.table(f"{cpu}/cpu.stat") if cpu else {}
    return CpuCounters(
        usage_ns=usage,
        user_ns=ticks["user"] * _USER_HZ_NS if "user" in ticks else None,
        system_ns=ticks["system"] * _USER_HZ_NS if "system" in ticks else None,
        periods=stat.get("nr_periods"),
        throttled_periods=stat.get("nr_throttled"),
        throttled_ns=stat.get("throttled_time"),
        bursts=stat.get("nr_bursts", 0),
        burst_ns=stat.get("burst_time", 0),
    )


def _v1_memory(directory: str) -> MemoryCounters | None:
    usage = cgroup_files.number(f"{directory}/memory.usage_in_bytes")
    if usage is None:
        return None
    stat = cgroup_files.table(f"{directory}/memory.stat")
    return MemoryCounters(
        usage_bytes=usage,
        working_set_bytes=max(0, usage - stat.get("total_inactive_file", 0)),
        max_usage_bytes=cgroup_files.number(f"{directory}/memory.max_usage_in_bytes"),
        rss_bytes=stat.get("total_rss", 0),
        cache_bytes=stat.get("total_cache", 0),
        kernel_bytes=cgroup_files.number(f"{directory}/memory.kmem.usage_in_bytes"),
        mapped_file_bytes=stat.get("total_mapped_file", 0),
        swap_bytes=stat.get("total_swap"),
        active_file_bytes=stat.get("total_active_file", 0),
        inactive_file_bytes=stat.get("total_inactive_file", 0),
        limit_hits=cgroup_files.number(f"{directory}/memory.failcnt"),
        oom_kills=cgroup_files.table(f"{directory}/memory.oom_control").get("oom_kill"),
        page_faults=stat.get("pgfault", 0),
        major_page_faults=stat.get("pgmajfault", 0),
        total_page_faults=stat.get("total_pgfault", 0),
        total_major_page_faults=stat.get("total_pgmajfault", 0),
    )


def _v1_io(directory: str) -> Iterator[DeviceIo]:
    sizes = _by_device(cgroup_files.text(f"{directory}/blkio.throttle.io_service_bytes_recursive"))
    counts = _by_device(cgroup_files.text(f"{directory}/blkio.throttle.io_serviced_recursive"))
    for key in sorted({**sizes, **counts}):
        yield DeviceIo(*key, sizes.get(key), counts.get(key))


def _by_device(text: str | None) -> dict[tuple[int, int, str], int]:
    """Lines like "8:0 Read 4096". The kernel's own "Total" of each device, and of all, are left out."""
    found = {}
    for fields in (line.split() for line in (text or "").splitlines()):
        if len(fields) == 3 and fields[1] != "Total":
            major, _, minor = fields[0].partition(":")
            found[int(major), int(minor), fields[1]] = int(fields[2])
    return found


# --- both


def _huge_pages(directory: str, usage: str, most: str) -> Iterator[HugePages]:
    for size in _huge_page_sizes():
        used = cgroup_files.number(f"{directory}/hugetlb.{size}.{usage}")
        if used is not None:
            yield HugePages(size, used, cgroup_files.number(f"{directory}/hugetlb.{size}.{most}") if most else None)


@cache  # they do not change while a kernel runs
def _huge_page_sizes() -> tuple[str, ...]:
    """The sizes that this kernel has, in the words of the hugetlb controller: "64KB", "2MB", "1GB"."""
    try:
        names = [each.name for each in Path("/sys/kernel/mm/hugepages").iterdir()]
    except OSError:
        return ()
    sizes = sorted(int(name.removeprefix("hugepages-").removesuffix("kB")) for name in names)
    return tuple(_in_words(size) for size in sizes)


def _in_words(kilobytes: int) -> str:
    if kilobytes >= 1 << 20:
        return f"{kilobytes >> 20}GB"
    return f"{kilobytes >> 10}MB" if kilobytes >= 1 << 10 else f"{kilobytes}KB"


def _processes(directory: str, each_process: bool) -> ProcessCounters | None:
    if not os.path.isdir(directory):
        return None
    pids = cgroup_files.processes(directory) if each_process else None
    most = (cgroup_files.text(f"{directory}/pids.max") or "").strip()
    return ProcessCounters(
        processes=None if pids is None else len(pids),
        threads=cgroup_files.number(f"{directory}/pids.current"),
        threads_max=None if not most else int(most) if most.isdecimal() else 0,
        files=None if pids is None else open_files.count(pids),
    )
