"""What containers and pods use, as the CRI's messages: cgroups, network interfaces, writable layers."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence, Set
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

from cri.api.runtime.v1 import api_pb2 as api
from cri.runtime_service import to_cri
from oci import stats
from oci.container import Container
from oci.container_spec import ContainerId
from oci.containers import Containers
from oci.errors import NotFound
from oci.linux.cgroup import Cgroups
from oci.status import ContainerState
from oci.writable_layers import LayerUsage, WritableLayers
from sandbox.network.interfaces import InterfaceStats, interface_stats, interface_stats_in, is_netns
from sandbox.sandbox import Sandbox
from sandbox.sandboxes import Sandboxes

_log = logging.getLogger(__name__)
T = TypeVar("T")

SAMPLE_INTERVAL_S = 10.0  # the kubelet asks as often
PRIMARY_INTERFACE = "eth0"
TELLERS = 4  # commands at once that ask OCI runtimes for what happens in their sandboxes
REST_RATIO = 100  # at least this many times as long as a round of samples took passes before the next one


@dataclass(frozen=True, slots=True)
class PodPlaces:
    """Where a pod's numbers are read; found on the event loop, read on a thread."""

    own_cgroup: str  # that holds this pod and no other; "" where there is none
    members: tuple[str, ...]  # the cgroups of its containers, or that of the sandbox which they live in
    netns: str  # "" on the node's network, and once stopped
    pid: int  # some process in the network namespace; 0 where there is none


@dataclass(frozen=True, slots=True)
class _PodNumbers:
    cgroup: stats.CgroupStats | None
    interfaces: tuple[InterfaceStats, ...]


class Stats:
    """Reads on request, on `pool`. Only CPU time is sampled in the background: a rate needs an earlier sample."""

    def __init__(
        self, cgroups: Cgroups, sandboxes: Sandboxes, containers: Containers, layers: WritableLayers, pool: Executor
    ) -> None:
        self._cgroups = cgroups
        self._sandboxes = sandboxes
        self._containers = containers
        self._layers = layers
        self._pool = pool
        self._rates = stats.CpuRates()
        self._tellers = asyncio.Semaphore(TELLERS)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._sample_for_ever(), name="cpu samples")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def containers(self, wanted: Sequence[Container]) -> list[api.ContainerStats]:
        """One message per container; one that has ended has no CPU and memory any more."""
        paths = [self._containers.cgroup_path(each) if _has_cgroup(each) else "" for each in wanted]
        numbers = await self._pooled(lambda: [self._read(path) for path in paths])
        told = dict(await asyncio.gather(*(self._told(each) for each in wanted if each.record.in_sandbox)))
        numbers = [told.get(each.id, read) for each, read in zip(wanted, numbers, strict=True)]
        layers = [await self._layers.usage(each.id) for each in wanted]
        return [self._container(*each) for each in zip(wanted, numbers, layers, strict=True)]

    async def _told(self, container: Container) -> tuple[ContainerId, stats.CgroupStats | None]:
        """What the runtime tells of a container in its sandbox; a process each, so few at a time."""
        async with self._tellers:
            usage = await self._containers.usage_in_sandbox(container)
        return container.id, stats.of_usage(usage) if usage is not None else None

    async def sandboxes(self, wanted: Sequence[Sandbox]) -> list[api.PodSandboxStats]:
        """One message per pod, with those of its containers."""
        places = self.places(wanted)
        numbers = await self._pooled(lambda: [self._read_pod(each) for each in places])
        result = []
        for sandbox, pod in zip(wanted, numbers, strict=True):
            members = [each for each in self._containers.of(sandbox.id) if each.is_visible]
            result.append(self._sandbox(sandbox, pod, await self.containers(members)))
        return result

    def places(self, wanted: Iterable[Sandbox]) -> list[PodPlaces]:
        shared = self._shared_parents()
        return [self._places(each, shared) for each in wanted]

    def _places(self, sandbox: Sandbox, shared: Set[str]) -> PodPlaces:
        alive = [each for each in self._containers.of(sandbox.id) if each.is_alive]
        running = (each.record.status.pid for each in alive if each.state is ContainerState.RUNNING)
        return PodPlaces(
            own_cgroup=self._own_cgroup(sandbox, shared),
            members=self._members(sandbox, alive),
            netns=self._sandboxes.netns(sandbox),
            pid=sandbox.record.pause_pid or next(running, 0),
        )

    def _members(self, sandbox: Sandbox, alive: Iterable[Container]) -> tuple[str, ...]:
        if sandbox.record.runtime_sandbox:
            return (self._sandboxes.process_cgroup_path(sandbox),)
        return tuple(self._containers.cgroup_path(each) for each in alive)

    def _own_cgroup(self, sandbox: Sandbox, shared: Set[str]) -> str:
        """The cgroup that holds this pod and no other; "" where there is none."""
        if not self._sandboxes.has_own_cgroup(sandbox) or sandbox.record.cgroup_parent in shared:
            return ""
        return self._sandboxes.cgroup_path(sandbox)

    def _shared_parents(self) -> set[str]:
        """The cgroup parents of more than one pod. Sandboxes of one uid are one pod: the kubelet's cgroup is for it."""
        uids: dict[str, str] = {}
        shared = set()
        for each in self._sandboxes.all():
            parent, uid = each.record.cgroup_parent, each.record.spec.uid
            if uids.setdefault(parent, uid) != uid:
                shared.add(parent)
        return shared

    # Samples

    async def _sample_for_ever(self) -> None:
        while True:
            started = time.monotonic()
            try:
                await self._sample()
            except OSError as error:
                _log.warning("CPU samples: %s", error)
            took_s = time.monotonic() - started
            await asyncio.sleep(max(SAMPLE_INTERVAL_S, REST_RATIO * took_s))

    async def _sample(self) -> None:
        """Read the CPU time of all that runs: one small file each."""
        alive = [each for each in self._containers.all() if _has_cgroup(each)]
        pods, shared = self._sandboxes.all(), self._shared_parents()
        paths: dict[str, tuple[str, int]] = {
            each.id: (self._containers.cgroup_path(each), each.record.requested_at) for each in alive
        }
        paths |= {
            each.id: (path, each.record.requested_at) for each in pods if (path := self._own_cgroup(each, shared))
        }
        found = await self._pooled(
            lambda: {id: stats.cpu_usage(self._cgroups, path) for id, (path, _) in paths.items()}
        )
        for id, sample in found.items():
            if sample is not None:
                self._rates.usage_nano_cores(id, *sample, since=paths[id][1])
        self._rates.keep_only([*(each.id for each in self._containers.all()), *(each.id for each in pods)])

    # Reading, on a thread

    def _read(self, path: str) -> stats.CgroupStats | None:
        try:
            return stats.read(self._cgroups, path) if path else None
        except NotFound:
            return None  # it has ended meanwhile

    def _read_pod(self, places: PodPlaces) -> _PodNumbers:
        if places.own_cgroup:
            return _PodNumbers(self._read(places.own_cgroup), read_interfaces(places))
        parts = [found for path in places.members if (found := self._read(path)) is not None]
        return _PodNumbers(stats.total(parts) if parts else None, read_interfaces(places))

    # Messages

    def _container(
        self, container: Container, numbers: stats.CgroupStats | None, layer: LayerUsage
    ) -> api.ContainerStats:
        record = container.record
        message = api.ContainerStats(
            attributes=api.ContainerAttributes(
                id=record.id,
                metadata=to_cri.container_metadata(record),
                labels=record.spec.labels,
                annotations=record.spec.annotations,
            ),
            writable_layer=api.FilesystemUsage(
                timestamp=layer.timestamp,
                fs_id=api.FilesystemIdentifier(mountpoint=str(self._layers.directory)),
                used_bytes=_value(layer.used_bytes),
                inodes_used=_value(layer.inodes),
            ),
        )
        if numbers is not None:
            message.MergeFrom(
                api.ContainerStats(
                    cpu=self._cpu(record.id, numbers, record.requested_at),
                    memory=memory_usage(numbers),
                    swap=swap_usage(numbers),
                    io=io_usage(numbers),
                )
            )
        return message

    def _sandbox(
        self, sandbox: Sandbox, pod: _PodNumbers, containers: Sequence[api.ContainerStats]
    ) -> api.PodSandboxStats:
        record = sandbox.record
        linux = api.LinuxPodSandboxStats(containers=containers)
        if pod.interfaces:
            linux.network.MergeFrom(network_usage(pod.interfaces))
        if pod.cgroup is not None:
            linux.MergeFrom(
                api.LinuxPodSandboxStats(
                    cpu=self._cpu(record.id, pod.cgroup, record.requested_at),
                    memory=memory_usage(pod.cgroup),
                    process=process_usage(pod.cgroup),
                    io=io_usage(pod.cgroup),
                )
            )
        return api.PodSandboxStats(
            attributes=api.PodSandboxAttributes(
                id=record.id,
                metadata=to_cri.sandbox_metadata(record),
                labels=record.spec.labels,
                annotations=record.spec.annotations,
            ),
            linux=linux,
        )

    def _cpu(self, id: str, numbers: stats.CgroupStats, since: int) -> api.CpuUsage | None:
        if numbers.cpu is None:
            return None
        usage = numbers.cpu.usage_core_ns
        return api.CpuUsage(
            timestamp=numbers.timestamp,
            usage_core_nano_seconds=_value(usage),
            usage_nano_cores=_value(self._rates.usage_nano_cores(id, numbers.timestamp, usage, since)),
            psi=_psi(numbers.cpu.psi),
        )

    async def _pooled(self, leaf: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, leaf)


def _has_cgroup(container: Container) -> bool:
    """Whether it has one with its processes: those of a container in a sandbox are in the sandbox's."""
    return container.is_alive and not container.record.in_sandbox


def read_interfaces(places: PodPlaces) -> tuple[InterfaceStats, ...]:
    """The pod's interfaces; none for a pod on the node's network, or one that is ending."""
    if not places.netns or not is_netns(places.netns):
        return ()
    with contextlib.suppress(OSError):
        return interface_stats(places.pid) if places.pid else interface_stats_in(places.netns)
    return ()


def memory_usage(numbers: stats.CgroupStats) -> api.MemoryUsage | None:
    memory = numbers.memory
    if memory is None:
        return None
    return api.MemoryUsage(
        timestamp=numbers.timestamp,
        working_set_bytes=_value(memory.working_set_bytes),
        available_bytes=_value(memory.available_bytes),
        usage_bytes=_value(memory.usage_bytes),
        rss_bytes=_value(memory.rss_bytes),
        page_faults=_value(memory.page_faults),
        major_page_faults=_value(memory.major_page_faults),
        psi=_psi(memory.psi),
    )


def swap_usage(numbers: stats.CgroupStats) -> api.SwapUsage | None:
    if numbers.swap is None:
        return None
    return api.SwapUsage(
        timestamp=numbers.timestamp,
        swap_available_bytes=_value(numbers.swap.available_bytes),
        swap_usage_bytes=_value(numbers.swap.usage_bytes),
    )


def io_usage(numbers: stats.CgroupStats) -> api.IoUsage | None:
    if numbers.io is None or numbers.io.psi is None:
        return None
    return api.IoUsage(timestamp=numbers.timestamp, psi=_psi(numbers.io.psi))


def process_usage(numbers: stats.CgroupStats) -> api.ProcessUsage | None:
    if numbers.processes is None:
        return None
    return api.ProcessUsage(timestamp=numbers.timestamp, process_count=_value(numbers.processes))


def network_usage(interfaces: Iterable[InterfaceStats]) -> api.NetworkUsage:
    """CNI calls the pod's primary interface eth0; without one the first by name stands for it."""
    usages = [
        api.NetworkInterfaceUsage(
            name=each.name,
            rx_bytes=_value(each.rx_bytes),
            rx_errors=_value(each.rx_errors),
            tx_bytes=_value(each.tx_bytes),
            tx_errors=_value(each.tx_errors),
        )
        for each in sorted(interfaces, key=lambda each: (each.name != PRIMARY_INTERFACE, each.name))
    ]
    return api.NetworkUsage(timestamp=time.time_ns(), default_interface=usages[0], interfaces=usages[1:])


def _psi(psi: stats.Psi | None) -> api.PsiStats | None:
    if psi is None:
        return None
    return api.PsiStats(Full=_psi_data(psi.full), Some=_psi_data(psi.some))


def _psi_data(data: stats.PsiData) -> api.PsiData:
    return api.PsiData(Total=data.total_ns, Avg10=data.avg10, Avg60=data.avg60, Avg300=data.avg300)


def _value(number: int | None) -> api.UInt64Value | None:
    return None if number is None else api.UInt64Value(value=number)
