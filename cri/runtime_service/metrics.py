"""ListMetricDescriptors and ListPodSandboxMetrics: the Prometheus metrics that cAdvisor told of pods, from here.

Names, units, types and label keys are cAdvisor's as the kubelet exposed them (`id` is the cgroup's path, `name` the
container's id), so that dashboards and alerts go on. A pod's own cgroup has series with `container=""`. The CRI
has whole numbers only: metrics in seconds count whole seconds. What the host does not count has no series.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from cri.api.runtime.v1 import api_pb2 as api
from cri.runtime_service.stats import PodPlaces, Stats, read_interfaces
from oci import counters
from oci.container import Container, ContainerRecord
from oci.container_spec import Resources
from oci.containers import Containers
from oci.counters import Counters, CpuCounters, DeviceIo, HugePages, MemoryCounters, ProcessCounters
from oci.errors import NotFound
from oci.linux import mount, open_files
from oci.linux.cgroup import Cgroups
from oci.stats import Psi
from oci.writable_layers import LayerUsage, WritableLayers
from sandbox.network.interfaces import InterfaceStats
from sandbox.sandbox import Sandbox, SandboxState
from sandbox.sandboxes import Sandboxes

LABELS = ("id", "name", "image", "namespace", "pod", "container")

_SECOND = 1_000_000_000
_UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True)
class Filesystem:
    """The one that holds the writable layers."""

    device: str
    size_bytes: int
    inodes: int
    inodes_free: int


@dataclass(frozen=True, slots=True)
class Sample:
    """What was read of one container, or of one pod as a whole."""

    now_s: int
    start_time_s: int
    resources: Resources | None = None  # None for a pod that kubelet has told nothing of
    counters: Counters | None = None
    open_files_limit: int | None = None
    layer: LayerUsage | None = None
    filesystem: Filesystem | None = None
    interfaces: tuple[InterfaceStats, ...] = ()


Values = Iterable[tuple[tuple[str, ...], int | None]]  # values of the labels beyond LABELS; None leaves the series out


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: how it is described, and what of a sample are its series."""

    name: str
    help: str
    kind: "api.MetricType.ValueType"
    values: Callable[[Sample], Values]
    labels: tuple[str, ...] = ()
    counted_at: Callable[[Sample], int] = lambda _: 0  # ns since the epoch; 0: read for this very request

    def descriptor(self) -> api.MetricDescriptor:
        return api.MetricDescriptor(name=self.name, help=self.help, label_keys=LABELS + self.labels)

    def series(self, sample: Sample, labels: tuple[str, ...]) -> Iterator[api.Metric]:
        timestamp = self.counted_at(sample)
        for more, value in self.values(sample):
            if value is not None:
                yield api.Metric(
                    name=self.name,
                    timestamp=timestamp,
                    metric_type=self.kind,
                    label_values=labels + more,
                    value=api.UInt64Value(value=value),
                )


class PodMetrics:
    """Reads on request, on `pool`; the messages are made there too."""

    def __init__(
        self,
        cgroups: Cgroups,
        sandboxes: Sandboxes,
        containers: Containers,
        layers: WritableLayers,
        stats: Stats,
        pool: Executor,
    ) -> None:
        self._cgroups = cgroups
        self._sandboxes = sandboxes
        self._containers = containers
        self._layers = layers
        self._stats = stats
        self._pool = pool

    def descriptors(self) -> list[api.MetricDescriptor]:
        return [family.descriptor() for family in FAMILIES]

    async def of_pods(self) -> list[api.PodSandboxMetrics]:
        """One message for each pod in which anything runs."""
        loop = asyncio.get_running_loop()
        filesystem = await loop.run_in_executor(self._pool, _filesystem, self._layers.directory)
        pods = [each for each in self._sandboxes.all() if self._runs(each)]
        # One job per pod, one at a time: other requests get the threads, and the loop the interpreter, in between.
        places = self._stats.places(pods)
        return [await self._list_one(*each, filesystem) for each in zip(pods, places, strict=True)]

    def _runs(self, sandbox: Sandbox) -> bool:
        return sandbox.state is SandboxState.READY or any(each.is_alive for each in self._containers.of(sandbox.id))

    async def _list_one(self, sandbox: Sandbox, places: PodPlaces, filesystem: Filesystem) -> api.PodSandboxMetrics:
        members = [each for each in self._containers.of(sandbox.id) if each.is_visible and each.is_alive]
        layers = [await self._layers.usage(each.id) for each in members]
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, self._read, sandbox, places, members, layers, filesystem
        )

    # On a thread: records only, which are frozen

    def _read(
        self,
        sandbox: Sandbox,
        places: PodPlaces,
        members: Sequence[Container],
        layers: Sequence[LayerUsage],
        filesystem: Filesystem,
    ) -> api.PodSandboxMetrics:
        containers = [
            self._container(sandbox, member, layer, filesystem) for member, layer in zip(members, layers, strict=True)
        ]
        return api.PodSandboxMetrics(
            pod_sandbox_id=sandbox.id,
            metrics=self._pod(sandbox, places),
            container_metrics=[each for each in containers if each.metrics],
        )

    def _pod(self, sandbox: Sandbox, places: PodPlaces) -> list[api.Metric]:
        record = sandbox.record
        # Processes and their files are told of containers alone, so that sums over a pod's series count them once.
        found = self._counters(places.own_cgroup, each_process=False) if places.own_cgroup else None
        sample = Sample(
            now_s=int(time.time()),
            start_time_s=record.requested_at // _SECOND,
            resources=record.resources if found and record.resources != Resources() else None,
            counters=found,
            interfaces=read_interfaces(places),
        )
        labels = (places.own_cgroup, record.id, "", record.spec.namespace, record.spec.name, "")
        return _series(sample, labels)

    def _container(
        self, sandbox: Sandbox, container: Container, layer: LayerUsage, filesystem: Filesystem
    ) -> api.ContainerMetrics:
        record, pod = container.record, sandbox.record.spec
        if record.in_sandbox:  # its cgroup is empty: the kernel counts the pod's alone
            return api.ContainerMetrics(container_id=record.id)
        path = self._containers.cgroup_path(container)
        found = self._counters(path, each_process=True)
        if found is None:  # it has ended meanwhile
            return api.ContainerMetrics(container_id=record.id)
        sample = Sample(
            now_s=int(time.time()),
            start_time_s=_started_at(record) // _SECOND,
            resources=record.status.resources,
            counters=found,
            open_files_limit=open_files.limit(record.status.pid),
            layer=layer,
            filesystem=filesystem,
        )
        labels = (path, record.id, record.spec.image, pod.namespace, pod.name, record.spec.name)
        return api.ContainerMetrics(container_id=record.id, metrics=_series(sample, labels))

    def _counters(self, path: str, *, each_process: bool) -> Counters | None:
        try:
            return counters.read(self._cgroups, path, each_process=each_process)
        except NotFound:
            return None


def _series(sample: Sample, labels: tuple[str, ...]) -> list[api.Metric]:
    return [metric for family in FAMILIES for metric in family.series(sample, labels)]


def _started_at(record: ContainerRecord) -> int:
    return record.status.started_at or record.status.created_at or record.requested_at


def _filesystem(directory: Path) -> Filesystem:
    found = os.statvfs(directory)
    device = directory.stat().st_dev
    return Filesystem(
        device=_mounted_device(f"{os.major(device)}:{os.minor(device)}"),
        size_bytes=found.f_blocks * found.f_frsize,
        inodes=found.f_files,
        inodes_free=found.f_ffree,
    )


def _mounted_device(number: str) -> str:
    """What is mounted, in the words of the mount table: "/dev/sda1"; the number where it does not say."""
    sources = (point.source for point in mount.mountinfo() if point.device == number)
    return next(sources, number)


def _block_device(device: DeviceIo) -> str:
    """The path of a block device's node; its number for one that is gone."""
    number = f"{device.major}:{device.minor}"
    try:
        lines = Path(f"/sys/dev/block/{number}/uevent").read_text().splitlines()
    except OSError:
        return number
    names = (line.removeprefix("DEVNAME=") for line in lines if line.startswith("DEVNAME="))
    return next((f"/dev/{name}" for name in names), number)


# How a value is found in a sample


def _plain(value: Callable[[Sample], int | None]) -> Callable[[Sample], Values]:
    return lambda sample: (((), value(sample)),)


def _of_cpu(value: Callable[[CpuCounters], int | None]) -> Callable[[Sample], Values]:
    return _plain(lambda sample: value(sample.counters.cpu) if sample.counters and sample.counters.cpu else None)


def _of_memory(value: Callable[[MemoryCounters], int | None]) -> Callable[[Sample], Values]:
    return _plain(lambda sample: value(sample.counters.memory) if sample.counters and sample.counters.memory else None)


def _of_processes(value: Callable[[ProcessCounters], int | None]) -> Callable[[Sample], Values]:
    return _plain(
        lambda sample: value(sample.counters.processes) if sample.counters and sample.counters.processes else None
    )


def _of_resources(value: Callable[[Resources], int | None]) -> Callable[[Sample], Values]:
    return _plain(lambda sample: value(sample.resources) if sample.resources else None)


def _of_quota(value: Callable[[CpuCounters], int | None]) -> Callable[[Sample], Values]:
    """Throttling is told of what has a quota: without one there are no periods."""

    def values(sample: Sample) -> Values:
        has_quota = sample.resources is not None and sample.resources.cpu_quota > 0
        return _of_cpu(value)(sample) if has_quota else ()

    return values


def _of_huge_pages(value: Callable[[HugePages], int | None]) -> Callable[[Sample], Values]:
    def values(sample: Sample) -> Values:
        pages = sample.counters.huge_pages if sample.counters else ()
        return (((each.size,), value(each)) for each in pages)

    return values


def _of_interfaces(value: Callable[[InterfaceStats], int]) -> Callable[[Sample], Values]:
    return lambda sample: (((each.name,), value(each)) for each in sample.interfaces)


def _of_transfers(operation: str, value: Callable[[DeviceIo], int | None]) -> Callable[[Sample], Values]:
    def values(sample: Sample) -> Values:
        transfers = sample.counters.io if sample.counters else ()
        return (((_block_device(each),), value(each)) for each in transfers if each.operation == operation)

    return values


def _all_transfers(sample: Sample) -> Values:
    for each in sample.counters.io if sample.counters else ():
        yield (_block_device(each), str(each.major), str(each.minor), each.operation), each.bytes


def _of_filesystem(value: Callable[[Filesystem], int]) -> Callable[[Sample], Values]:
    def values(sample: Sample) -> Values:
        found = sample.filesystem
        return (((found.device,), value(found)),) if found else ()

    return values


def _layer_bytes(sample: Sample) -> Values:
    if sample.filesystem and sample.layer:
        yield (sample.filesystem.device,), sample.layer.used_bytes


def _faults(sample: Sample) -> Values:
    memory = sample.counters.memory if sample.counters else None
    if memory is not None:
        yield ("pgfault", "container"), memory.page_faults
        yield ("pgfault", "hierarchy"), memory.total_page_faults
        yield ("pgmajfault", "container"), memory.major_page_faults
        yield ("pgmajfault", "hierarchy"), memory.total_major_page_faults


def _of_pressure(which: Callable[[Counters], Psi | None], full: bool) -> Callable[[Sample], Values]:
    def value(sample: Sample) -> int | None:
        psi = which(sample.counters) if sample.counters else None
        return None if psi is None else (psi.full if full else psi.some).total_ns // _SECOND

    return _plain(value)


def _seconds(nanoseconds: int | None) -> int | None:
    return None if nanoseconds is None else nanoseconds // _SECOND


def _cpu_total(sample: Sample) -> Values:
    cpu = sample.counters.cpu if sample.counters else None
    return ((("total",), _seconds(cpu.usage_ns)),) if cpu else ()


def _limit(value: int) -> int:
    """No limit is 0."""
    return value if 0 < value < _UNLIMITED else 0


def _reserved(resources: Resources) -> int:
    word = resources.unified.get("memory.min", "")
    return int(word) if word.isdecimal() else 0


def _cpu_psi(found: Counters) -> Psi | None:
    return found.cpu.psi if found.cpu else None


def _memory_psi(found: Counters) -> Psi | None:
    return found.memory.psi if found.memory else None


def _io_psi(found: Counters) -> Psi | None:
    return found.io_psi


COUNTER, GAUGE = api.COUNTER, api.GAUGE
_DEVICE, _INTERFACE = ("device",), ("interface",)

# fmt: off
FAMILIES: tuple[Family, ...] = (
    Family("container_last_seen", "When the runtime last saw the container, in seconds since the Unix epoch.", GAUGE,
           _plain(lambda s: s.now_s)),
    Family("container_start_time_seconds", "When the container started, in seconds since the Unix epoch.", GAUGE,
           _plain(lambda s: s.start_time_s)),

    Family("container_cpu_usage_seconds_total", "CPU time consumed, in whole seconds.", COUNTER, _cpu_total, ("cpu",)),
    Family("container_cpu_user_seconds_total", "CPU time consumed in user mode, in whole seconds.", COUNTER,
           _of_cpu(lambda c: _seconds(c.user_ns))),
    Family("container_cpu_system_seconds_total", "CPU time consumed in the kernel, in whole seconds.", COUNTER,
           _of_cpu(lambda c: _seconds(c.system_ns))),
    Family("container_cpu_cfs_periods_total", "Periods for which the CPU quota was enforced.", COUNTER,
           _of_quota(lambda c: c.periods)),
    Family("container_cpu_cfs_throttled_periods_total", "Periods in which the CPU quota was used up.", COUNTER,
           _of_quota(lambda c: c.throttled_periods)),
    Family("container_cpu_cfs_throttled_seconds_total", "Time spent throttled by the CPU quota, in whole seconds.",
           COUNTER, _of_quota(lambda c: _seconds(c.throttled_ns))),
    Family("container_cpu_cfs_burst_periods_total", "Periods in which more than the CPU quota was used.", COUNTER,
           _of_quota(lambda c: c.bursts)),
    Family("container_cpu_cfs_burst_seconds_total", "CPU time used above the quota, in whole seconds.", COUNTER,
           _of_quota(lambda c: _seconds(c.burst_ns))),

    Family("container_memory_usage_bytes", "Memory in use, page cache included.", GAUGE,
           _of_memory(lambda m: m.usage_bytes)),
    Family("container_memory_working_set_bytes", "Memory in use less inactive page cache; what eviction looks at.",
           GAUGE, _of_memory(lambda m: m.working_set_bytes)),
    Family("container_memory_max_usage_bytes", "The most memory that was in use so far.", GAUGE,
           _of_memory(lambda m: m.max_usage_bytes)),
    Family("container_memory_rss", "Anonymous memory, in bytes.", GAUGE, _of_memory(lambda m: m.rss_bytes)),
    Family("container_memory_cache", "Page cache, in bytes.", GAUGE, _of_memory(lambda m: m.cache_bytes)),
    Family("container_memory_kernel_usage", "Memory of the kernel on the container's behalf, in bytes.", GAUGE,
           _of_memory(lambda m: m.kernel_bytes)),
    Family("container_memory_mapped_file", "Files mapped into memory, in bytes.", GAUGE,
           _of_memory(lambda m: m.mapped_file_bytes)),
    Family("container_memory_swap", "Swap in use, in bytes.", GAUGE, _of_memory(lambda m: m.swap_bytes)),
    Family("container_memory_total_active_file_bytes", "Page cache that was used lately, in bytes.", GAUGE,
           _of_memory(lambda m: m.active_file_bytes)),
    Family("container_memory_total_inactive_file_bytes", "Page cache that was not used lately, in bytes.", GAUGE,
           _of_memory(lambda m: m.inactive_file_bytes)),
    Family("container_memory_failcnt", "How often the memory limit was hit.", COUNTER,
           _of_memory(lambda m: m.limit_hits)),
    Family("container_memory_failures_total", "Page faults; pgmajfault had to read from a disk.", COUNTER, _faults,
           ("failure_type", "scope")),
    Family("container_oom_events_total", "Processes that the kernel killed for want of memory.", COUNTER,
           _of_memory(lambda m: m.oom_kills)),
    Family("container_hugetlb_usage_bytes", "Huge pages in use, in bytes.", GAUGE,
           _of_huge_pages(lambda p: p.usage_bytes), ("pagesize",)),
    Family("container_hugetlb_max_usage_bytes", "The most huge pages that were in use so far, in bytes.", GAUGE,
           _of_huge_pages(lambda p: p.max_usage_bytes), ("pagesize",)),

    Family("container_fs_usage_bytes", "What the container's writable layer takes of its filesystem, in bytes.", GAUGE,
           _layer_bytes, _DEVICE, lambda sample: sample.layer.timestamp if sample.layer else 0),
    Family("container_fs_limit_bytes", "Size of the filesystem that holds the container's writable layer.", GAUGE,
           _of_filesystem(lambda f: f.size_bytes), _DEVICE),
    Family("container_fs_inodes_total", "Inodes of the filesystem that holds the container's writable layer.", GAUGE,
           _of_filesystem(lambda f: f.inodes), _DEVICE),
    Family("container_fs_inodes_free", "Free inodes of the filesystem that holds the container's writable layer.",
           GAUGE, _of_filesystem(lambda f: f.inodes_free), _DEVICE),
    Family("container_fs_reads_total", "Reads from block devices.", COUNTER,
           _of_transfers("Read", lambda d: d.operations), _DEVICE),
    Family("container_fs_reads_bytes_total", "Bytes read from block devices.", COUNTER,
           _of_transfers("Read", lambda d: d.bytes), _DEVICE),
    Family("container_fs_writes_total", "Writes to block devices.", COUNTER,
           _of_transfers("Write", lambda d: d.operations), _DEVICE),
    Family("container_fs_writes_bytes_total", "Bytes written to block devices.", COUNTER,
           _of_transfers("Write", lambda d: d.bytes), _DEVICE),
    Family("container_blkio_device_usage_total", "Bytes moved to and from block devices, by kind of transfer.",
           COUNTER, _all_transfers, ("device", "major", "minor", "operation")),

    Family("container_network_receive_bytes_total", "Bytes received.", COUNTER,
           _of_interfaces(lambda i: i.rx_bytes), _INTERFACE),
    Family("container_network_receive_packets_total", "Packets received.", COUNTER,
           _of_interfaces(lambda i: i.rx_packets), _INTERFACE),
    Family("container_network_receive_packets_dropped_total", "Packets dropped while receiving.", COUNTER,
           _of_interfaces(lambda i: i.rx_dropped), _INTERFACE),
    Family("container_network_receive_errors_total", "Errors while receiving.", COUNTER,
           _of_interfaces(lambda i: i.rx_errors), _INTERFACE),
    Family("container_network_transmit_bytes_total", "Bytes sent.", COUNTER,
           _of_interfaces(lambda i: i.tx_bytes), _INTERFACE),
    Family("container_network_transmit_packets_total", "Packets sent.", COUNTER,
           _of_interfaces(lambda i: i.tx_packets), _INTERFACE),
    Family("container_network_transmit_packets_dropped_total", "Packets dropped while sending.", COUNTER,
           _of_interfaces(lambda i: i.tx_dropped), _INTERFACE),
    Family("container_network_transmit_errors_total", "Errors while sending.", COUNTER,
           _of_interfaces(lambda i: i.tx_errors), _INTERFACE),

    Family("container_processes", "Processes.", GAUGE, _of_processes(lambda p: p.processes)),
    Family("container_threads", "Threads.", GAUGE, _of_processes(lambda p: p.threads)),
    Family("container_threads_max", "How many threads there may be; 0 without a limit.", GAUGE,
           _of_processes(lambda p: p.threads_max)),
    Family("container_file_descriptors", "Open file descriptors of all processes.", GAUGE,
           _of_processes(lambda p: p.files.fds if p.files else None)),
    Family("container_sockets", "Open sockets of all processes; not told where they have very many descriptors.", GAUGE,
           _of_processes(lambda p: p.files.sockets if p.files else None)),
    Family("container_ulimits_soft", "Soft limits of the container's first process; not told without a limit.", GAUGE,
           lambda s: ((("max_open_files",), s.open_files_limit),), ("ulimit",)),

    Family("container_spec_cpu_period", "Period of the CPU quota, in microseconds.", GAUGE,
           _of_resources(lambda r: r.cpu_period)),
    Family("container_spec_cpu_quota", "CPU quota per period, in microseconds; not told without one.", GAUGE,
           _of_resources(lambda r: r.cpu_quota if r.cpu_quota > 0 else None)),
    Family("container_spec_cpu_shares", "CPU shares.", GAUGE, _of_resources(lambda r: r.cpu_shares)),
    Family("container_spec_memory_limit_bytes", "Memory limit; 0 without one.", GAUGE,
           _of_resources(lambda r: _limit(r.memory_limit_bytes))),
    Family("container_spec_memory_swap_limit_bytes", "Limit of memory and swap together; 0 without one.", GAUGE,
           _of_resources(lambda r: _limit(r.memory_swap_limit_bytes))),
    Family("container_spec_memory_reservation_limit_bytes", "Memory that is protected from reclaim.", GAUGE,
           _of_resources(_reserved)),

    Family("container_pressure_cpu_waiting_seconds_total", "Time in which some task waited for a CPU.", COUNTER,
           _of_pressure(_cpu_psi, full=False)),
    Family("container_pressure_cpu_stalled_seconds_total", "Time in which all tasks waited for a CPU.", COUNTER,
           _of_pressure(_cpu_psi, full=True)),
    Family("container_pressure_memory_waiting_seconds_total", "Time in which some task waited for memory.", COUNTER,
           _of_pressure(_memory_psi, full=False)),
    Family("container_pressure_memory_stalled_seconds_total", "Time in which all tasks waited for memory.", COUNTER,
           _of_pressure(_memory_psi, full=True)),
    Family("container_pressure_io_waiting_seconds_total", "Time in which some task waited for I/O.", COUNTER,
           _of_pressure(_io_psi, full=False)),
    Family("container_pressure_io_stalled_seconds_total", "Time in which all tasks waited for I/O.", COUNTER,
           _of_pressure(_io_psi, full=True)),
)
# fmt: on
