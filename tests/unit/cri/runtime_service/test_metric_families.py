from collections import Counter
from dataclasses import replace

from cri.api.runtime.v1 import api_pb2 as api
from cri.runtime_service.metrics import FAMILIES, LABELS, Filesystem, Sample
from oci.container_spec import Resources
from oci.counters import Counters, CpuCounters, DeviceIo, HugePages, MemoryCounters, ProcessCounters
from oci.linux.open_files import OpenFiles
from oci.stats import Psi, PsiData
from oci.writable_layers import LayerUsage
from sandbox.network.interfaces import InterfaceStats

SECOND = 1_000_000_000
OWN = ("/cgroup", "c1", "image", "namespace", "pod", "container")


def psi(full_s: float, some_s: float) -> Psi:
    return Psi(full=PsiData(int(full_s * SECOND), 0.0, 0.0, 0.0), some=PsiData(int(some_s * SECOND), 0.0, 0.0, 0.0))


FULL = Sample(
    now_s=1000,
    start_time_s=900,
    resources=Resources(
        cpu_period=100_000,
        cpu_quota=50_000,
        cpu_shares=512,
        memory_limit_bytes=4096,
        memory_swap_limit_bytes=8192,
        unified={"memory.min": "2048"},
    ),
    counters=Counters(
        cpu=CpuCounters(10 * SECOND, 7 * SECOND, 3 * SECOND + 999, 5, 2, 2 * SECOND, 4, SECOND, psi(1.5, 11)),
        memory=MemoryCounters(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, psi(2, 12)),
        io=(DeviceIo(1_000_000, 1, "Read", 100, 10), DeviceIo(1_000_000, 1, "Write", 200, 20)),
        io_psi=psi(3, 13),
        huge_pages=(HugePages("2MB", 21, 22), HugePages("1GB", 0, None)),
        processes=ProcessCounters(31, 32, 0, OpenFiles(33, 34)),
    ),
    open_files_limit=1024,
    layer=LayerUsage(500, 5, 0),
    filesystem=Filesystem("/dev/sda1", 10_000, 1000, 900),
    interfaces=(InterfaceStats("eth0", *range(1, 9)), InterfaceStats("net1", *range(11, 19))),
)


NETWORK: dict[tuple[str, ...], int] = {
    (f"container_network_{name}_total", interface): value + more
    for interface, more in (("eth0", 0), ("net1", 10))
    for name, value in {
        "receive_bytes": 1,
        "receive_packets": 2,
        "receive_errors": 3,
        "receive_packets_dropped": 4,
        "transmit_bytes": 5,
        "transmit_packets": 6,
        "transmit_errors": 7,
        "transmit_packets_dropped": 8,
    }.items()
}


def series(sample: Sample) -> dict[tuple[str, ...], int]:
    found = [metric for family in FAMILIES for metric in family.series(sample, OWN)]
    assert all(tuple(metric.label_values[: len(LABELS)]) == OWN for metric in found)
    keys = Counter((metric.name, *metric.label_values) for metric in found)
    assert max(keys.values()) == 1
    return {(metric.name, *metric.label_values[len(LABELS) :]): metric.value.value for metric in found}


def test_each_metric_has_the_value_and_labels_that_cadvisor_gave_it() -> None:
    assert series(FULL) == {
        ("container_last_seen",): 1000,
        ("container_start_time_seconds",): 900,
        ("container_cpu_usage_seconds_total", "total"): 10,
        ("container_cpu_user_seconds_total",): 7,
        ("container_cpu_system_seconds_total",): 3,
        ("container_cpu_cfs_periods_total",): 5,
        ("container_cpu_cfs_throttled_periods_total",): 2,
        ("container_cpu_cfs_throttled_seconds_total",): 2,
        ("container_cpu_cfs_burst_periods_total",): 4,
        ("container_cpu_cfs_burst_seconds_total",): 1,
        ("container_memory_usage_bytes",): 1,
        ("container_memory_working_set_bytes",): 2,
        ("container_memory_max_usage_bytes",): 3,
        ("container_memory_rss",): 4,
        ("container_memory_cache",): 5,
        ("container_memory_kernel_usage",): 6,
        ("container_memory_mapped_file",): 7,
        ("container_memory_swap",): 8,
        ("container_memory_total_active_file_bytes",): 9,
        ("container_memory_total_inactive_file_bytes",): 10,
        ("container_memory_failcnt",): 11,
        ("container_oom_events_total",): 12,
        ("container_memory_failures_total", "pgfault", "container"): 13,
        ("container_memory_failures_total", "pgmajfault", "container"): 14,
        ("container_memory_failures_total", "pgfault", "hierarchy"): 15,
        ("container_memory_failures_total", "pgmajfault", "hierarchy"): 16,
        ("container_hugetlb_usage_bytes", "2MB"): 21,
        ("container_hugetlb_usage_bytes", "1GB"): 0,
        ("container_hugetlb_max_usage_bytes", "2MB"): 22,
        ("container_fs_usage_bytes", "/dev/sda1"): 500,
        ("container_fs_limit_bytes", "/dev/sda1"): 10_000,
        ("container_fs_inodes_total", "/dev/sda1"): 1000,
        ("container_fs_inodes_free", "/dev/sda1"): 900,
        ("container_fs_reads_total", "1000000:1"): 10,
        ("container_fs_reads_bytes_total", "1000000:1"): 100,
        ("container_fs_writes_total", "1000000:1"): 20,
        ("container_fs_writes_bytes_total", "1000000:1"): 200,
        ("container_blkio_device_usage_total", "1000000:1", "1000000", "1", "Read"): 100,
        ("container_blkio_device_usage_total", "1000000:1", "1000000", "1", "Write"): 200,
        **NETWORK,
        ("container_processes",): 31,
        ("container_threads",): 32,
        ("container_threads_max",): 0,
        ("container_file_descriptors",): 33,
        ("container_sockets",): 34,
        ("container_ulimits_soft", "max_open_files"): 1024,
        ("container_spec_cpu_period",): 100_000,
        ("container_spec_cpu_quota",): 50_000,
        ("container_spec_cpu_shares",): 512,
        ("container_spec_memory_limit_bytes",): 4096,
        ("container_spec_memory_swap_limit_bytes",): 8192,
        ("container_spec_memory_reservation_limit_bytes",): 2048,
        ("container_pressure_cpu_waiting_seconds_total",): 11,
        ("container_pressure_cpu_stalled_seconds_total",): 1,
        ("container_pressure_memory_waiting_seconds_total",): 12,
        ("container_pressure_memory_stalled_seconds_total",): 2,
        ("container_pressure_io_waiting_seconds_total",): 13,
        ("container_pressure_io_stalled_seconds_total",): 3,
    }


def test_every_metric_has_help_and_the_label_keys_of_its_series() -> None:
    described = {family.name: family.descriptor() for family in FAMILIES}

    assert len(described) == len(FAMILIES)
    for family in FAMILIES:
        descriptor = described[family.name]
        assert descriptor.help
        assert list(descriptor.label_keys[: len(LABELS)]) == list(LABELS)
        for metric in family.series(FULL, OWN):
            assert len(metric.label_values) == len(descriptor.label_keys)


def test_what_only_grows_is_a_counter() -> None:
    kinds = {family.name: family.kind for family in FAMILIES}

    for name, kind in kinds.items():
        is_size = name == "container_fs_inodes_total"
        grows = (name.endswith("_total") and not is_size) or name == "container_memory_failcnt"
        assert kind == (api.COUNTER if grows else api.GAUGE), name


def test_what_is_not_counted_has_no_series() -> None:
    nothing = Sample(now_s=1, start_time_s=1, counters=Counters(None, None, (), None, (), None))

    assert set(series(nothing)) == {("container_last_seen",), ("container_start_time_seconds",)}


def test_without_limits_the_specification_says_0_and_throttling_is_not_told() -> None:
    unlimited = replace(FULL, resources=Resources(cpu_quota=-1, memory_swap_limit_bytes=-1, memory_limit_bytes=1 << 63))

    found = series(unlimited)

    assert found["container_spec_memory_limit_bytes",] == 0
    assert found["container_spec_memory_swap_limit_bytes",] == 0
    assert found["container_spec_memory_reservation_limit_bytes",] == 0
    assert not [key for key in found if "cfs" in key[0] or "quota" in key[0]]
