"""What was read of a cgroup is told in the CRI's messages, also what this machine does not count."""

from types import SimpleNamespace
from typing import Any

from cri.api.runtime.v1 import api_pb2 as api
from cri.runtime_service import stats as messages
from oci import stats
from oci.writable_layers import LayerUsage
from sandbox.network.interfaces import InterfaceStats

PSI = stats.Psi(full=stats.PsiData(1, 2.0, 3.0, 4.0), some=stats.PsiData(5, 6.0, 7.0, 8.0))
NUMBERS = stats.CgroupStats(
    timestamp=9,
    cpu=stats.Cpu(10, PSI),
    memory=stats.Memory(11, 12, 13, 14, 15, 16, PSI),
    swap=stats.Swap(17, 18),
    io=stats.Io(19, 20, PSI),
    processes=21,
)


def value(number: int) -> api.UInt64Value:
    return api.UInt64Value(value=number)


def test_every_field_of_the_counters_is_told() -> None:
    psi = api.PsiStats(
        Full=api.PsiData(Total=1, Avg10=2.0, Avg60=3.0, Avg300=4.0),
        Some=api.PsiData(Total=5, Avg10=6.0, Avg60=7.0, Avg300=8.0),
    )

    assert messages.memory_usage(NUMBERS) == api.MemoryUsage(
        timestamp=9,
        usage_bytes=value(11),
        working_set_bytes=value(12),
        available_bytes=value(13),
        rss_bytes=value(14),
        page_faults=value(15),
        major_page_faults=value(16),
        psi=psi,
    )
    assert messages.swap_usage(NUMBERS) == api.SwapUsage(
        timestamp=9, swap_usage_bytes=value(17), swap_available_bytes=value(18)
    )
    assert messages.io_usage(NUMBERS) == api.IoUsage(timestamp=9, psi=psi)
    assert messages.process_usage(NUMBERS) == api.ProcessUsage(timestamp=9, process_count=value(21))


def test_a_container_and_a_pod_tell_of_pressure() -> None:
    record: Any = SimpleNamespace(
        id="1",
        requested_at=0,
        spec=SimpleNamespace(name="n", uid="u", namespace="s", attempt=0, labels={}, annotations={}),
    )
    holder: Any = SimpleNamespace(record=record)
    layers: Any = SimpleNamespace(directory="/layers")
    unused: Any = None
    made = messages.Stats(unused, unused, unused, layers, unused)

    container = made._container(holder, NUMBERS, LayerUsage(1, 2, 3))
    pod = made._sandbox(holder, messages._PodNumbers(NUMBERS, ()), [container]).linux

    for each in (container, pod):
        assert each.cpu.psi == each.memory.psi == each.io.psi
        assert each.io.psi.Some.Total == 5


def test_the_first_interface_is_the_default_one_and_others_follow() -> None:
    found = messages.network_usage([InterfaceStats("net1", *[1] * 8), InterfaceStats("eth0", *[2] * 8)])

    assert found.default_interface.name == "eth0"
    assert [each.name for each in found.interfaces] == ["net1"]
