"""What containers and pods use, as the CRI's messages: cgroups, network interfaces, writable layers."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cri.api.runtime.v1 import api_pb2 as api
from cri.runtime_service import to_cri
from oci import stats
from oci.container import Container
from oci.containers import Containers
from oci.errors import NotFound
from oci.linux.cgroup import Cgroups
from oci.status import ContainerState
from oci.writable_layers import LayerUsage, WritableLayers
from sandbox.network.interfaces import InterfaceStats, interface_stats
from sandbox.sandbox import Sandbox
from sandbox.sandboxes import Sandboxes

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _PodNumbers:
    cgroup: stats.CgroupStats | None
    interfaces: tuple[InterfaceStats, ...]


class Stats:
    """Reads on request, on threads of its own; `rates` remembers the samples from which nano-cores follow."""

    def __init__(self, cgroups: Cgroups, sandboxes: Sandboxes, containers: Containers, layers: WritableLayers) -> None:
        self._cgroups = cgroups
        self._sandboxes = sandboxes
        self._containers = containers
        self._layers = layers
        self._rates = stats.CpuRates()
        self._pool = ThreadPoolExecutor(2, "stats")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def forget(self, id: str) -> None:
        """Let go of what is remembered of a container or pod that is gone."""
        self._rates.forget(id)

    async def containers(self, wanted: Sequence[Container]) -> list[api.ContainerStats]:
        """One message per container; one that has ended has no CPU and memory any more."""
        paths = [self._containers.cgroup_path(each) if each.is_alive else "" for each in wanted]
        numbers = await self._pooled(lambda: [self._read(path) for path in paths])
        layers = [await self._layers.usage(each.id) for each in wanted]
        return [self._container(*each) for each in zip(wanted, numbers, layers, strict=True)]

    async def sandboxes(self, wanted: Sequence[Sandbox]) -> list[api.PodSandboxStats]:
        """One message per pod, with those of its containers."""
        numbers = await self._pooled(lambda: [self._read_pod(each) for each in wanted])
        result = []
        for sandbox, pod in zip(wanted, numbers, strict=True):
            members = [each for each in self._containers.of(sandbox.id) if each.is_visible]
            result.append(self._sandbox(sandbox, pod, await self.containers(members)))
        return result

    def _read(self, path: str) -> stats.CgroupStats | None:
        try:
            return stats.read(self._cgroups, path) if path else None
        except NotFound:
            return None  # it has ended meanwhile

    def _read_pod(self, sandbox: Sandbox) -> _PodNumbers:
        netns = self._sandboxes.netns(sandbox)
        pid = sandbox.record.pause_pid or self._pid_in(sandbox)
        interfaces: tuple[InterfaceStats, ...] = ()
        if netns and pid and Path(netns).exists():
            with contextlib.suppress(OSError):  # the process has ended: the pod has no traffic to tell of
                interfaces = interface_stats(pid)
        path = self._sandboxes.cgroup_path(sandbox) if self._sandboxes.has_own_cgroup(sandbox) else ""
        return _PodNumbers(self._read(path), interfaces)

    def _pid_in(self, sandbox: Sandbox) -> int:
        """Some process of the pod, where it has no pause."""
        running = (each for each in self._containers.of(sandbox.id) if each.state is ContainerState.RUNNING)
        return next((each.record.status.pid for each in running), 0)

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
                    cpu=self._cpu(record.id, numbers),
                    memory=_memory(numbers),
                    swap=_swap(numbers),
                    io=_io(numbers),
                )
            )
        return message

    def _sandbox(
        self, sandbox: Sandbox, pod: _PodNumbers, containers: Sequence[api.ContainerStats]
    ) -> api.PodSandboxStats:
        record = sandbox.record
        linux = api.LinuxPodSandboxStats(containers=containers)
        if pod.interfaces:
            linux.network.MergeFrom(_network(pod.interfaces))
        if pod.cgroup is not None:
            linux.MergeFrom(
                api.LinuxPodSandboxStats(
                    cpu=self._cpu(record.id, pod.cgroup),
                    memory=_memory(pod.cgroup),
                    process=_processes(pod.cgroup),
                    io=_io(pod.cgroup),
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

    def _cpu(self, id: str, numbers: stats.CgroupStats) -> api.CpuUsage | None:
        if numbers.cpu is None:
            return None
        usage = numbers.cpu.usage_core_ns
        return api.CpuUsage(
            timestamp=numbers.timestamp,
            usage_core_nano_seconds=_value(usage),
            usage_nano_cores=_value(self._rates.usage_nano_cores(id, numbers.timestamp, usage)),
            psi=_psi(numbers.cpu.psi),
        )

    async def _pooled(self, leaf: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, leaf)


def _memory(numbers: stats.CgroupStats) -> api.MemoryUsage | None:
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


def _swap(numbers: stats.CgroupStats) -> api.SwapUsage | None:
    if numbers.swap is None:
        return None
    return api.SwapUsage(
        timestamp=numbers.timestamp,
        swap_available_bytes=_value(numbers.swap.available_bytes),
        swap_usage_bytes=_value(numbers.swap.usage_bytes),
    )


def _io(numbers: stats.CgroupStats) -> api.IoUsage | None:
    if numbers.io is None or numbers.io.psi is None:
        return None
    return api.IoUsage(timestamp=numbers.timestamp, psi=_psi(numbers.io.psi))


def _processes(numbers: stats.CgroupStats) -> api.ProcessUsage | None:
    if numbers.processes is None:
        return None
    return api.ProcessUsage(timestamp=numbers.timestamp, process_count=_value(numbers.processes))


def _network(interfaces: Sequence[InterfaceStats]) -> api.NetworkUsage:
    """The first interface is the pod's primary one: CNI makes eth0 first."""
    usages = [
        api.NetworkInterfaceUsage(
            name=each.name,
            rx_bytes=_value(each.rx_bytes),
            rx_errors=_value(each.rx_errors),
            tx_bytes=_value(each.tx_bytes),
            tx_errors=_value(each.tx_errors),
        )
        for each in sorted(interfaces, key=lambda each: each.name)
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
