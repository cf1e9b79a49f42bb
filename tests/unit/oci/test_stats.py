from pathlib import Path

import pytest

from oci import stats
from oci.errors import NotFound
from oci.linux.cgroup import Cgroups, Hierarchy
from oci.runtime import Usage

PSI = "some avg10=1.50 avg60=0.25 avg300=0.00 total=1234\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n"


def v2(root: Path) -> Cgroups:
    return Cgroups((Hierarchy(root, frozenset({"cpu", "memory", "io", "pids"}), True),))


def v1(root: Path) -> Cgroups:
    controllers = ("cpuacct", "memory", "pids", "blkio")
    return Cgroups(tuple(Hierarchy(root / name, frozenset({name}), False) for name in controllers))


def write(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)


def test_a_v2_cgroup_is_read(tmp_path: Path) -> None:
    write(
        tmp_path / "c",
        cpu__stat="usage_usec 5000\nuser_usec 1\n",
        cpu__pressure=PSI,
        memory__current="1000\n",
        memory__max="5000\n",
        memory__stat="anon 300\nfile 600\ninactive_file 400\npgfault 9\npgmajfault 2\n",
        memory__swap__current="50\n",
        memory__swap__max="max\n",
        io__stat="254:0 rbytes=10 wbytes=20 rios=1\n8:0 rbytes=1 wbytes=2\n",
        pids__current="3\n",
    )

    found = stats.read(v2(tmp_path), "/c")

    assert found.cpu is not None
    assert found.cpu.usage_core_ns == 5_000_000
    assert found.cpu.psi == stats.Psi(
        full=stats.PsiData(7000, 0.0, 0.0, 0.0), some=stats.PsiData(1_234_000, 1.5, 0.25, 0.0)
    )
    assert found.memory == stats.Memory(1000, 600, 4400, 300, 9, 2)
    assert found.swap == stats.Swap(50, None)
    assert found.io == stats.Io(11, 22)
    assert found.processes == 3


def test_the_limit_of_a_scope_is_that_of_the_container_within(tmp_path: Path) -> None:
    write(tmp_path / "c.scope", memory__current="1000\n", memory__max="max\n")
    write(tmp_path / "c.scope/container", memory__current="900\n", memory__max="5000\n")

    found = stats.read(v2(tmp_path), "/c.scope")

    assert found.memory is not None
    assert (found.memory.usage_bytes, found.memory.available_bytes) == (1000, 4000)


def test_a_v1_cgroup_is_read(tmp_path: Path) -> None:
    write(tmp_path / "cpuacct/c", cpuacct__usage="77\n")
    write(tmp_path / "pids/c", pids__current="4\n")
    write(
        tmp_path / "memory/c",
        memory__usage_in_bytes="1000\n",
        memory__stat=(
            "rss 1\ntotal_rss 300\ntotal_inactive_file 400\ntotal_pgfault 9\ntotal_pgmajfault 2\ntotal_swap 10\n"
            "hierarchical_memory_limit 5000\nhierarchical_memsw_limit 5000\n"
        ),
    )
    write(
        tmp_path / "blkio/c",
        blkio__throttle__io_service_bytes_recursive="254:0 Read 5\n254:0 Write 6\n254:0 Total 11\nTotal 11\n",
    )

    found = stats.read(v1(tmp_path), "/c")

    assert found.cpu == stats.Cpu(77)
    assert found.memory == stats.Memory(1000, 600, 4400, 300, 9, 2)
    assert found.swap == stats.Swap(10, 0)
    assert found.io == stats.Io(5, 6)
    assert found.processes == 4


def test_without_a_limit_nothing_is_said_of_what_is_left(tmp_path: Path) -> None:
    write(
        tmp_path / "memory/c",
        memory__usage_in_bytes="1000\n",
        memory__stat="hierarchical_memory_limit 9223372036854771712\n",
    )

    found = stats.read(v1(tmp_path), "/c")

    assert found.memory is not None
    assert found.memory.available_bytes is None
    assert found.swap is None
    assert found.cpu is None


def test_what_a_host_does_not_count_is_none(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()

    found = stats.read(v2(tmp_path), "/c")

    assert (found.cpu, found.memory, found.swap, found.io, found.processes) == (None,) * 5
    assert found.timestamp > 0


def test_a_missing_cgroup_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="/gone"):
        stats.read(v2(tmp_path), "/gone")


def test_cpu_time_alone_is_read_from_one_file(tmp_path: Path) -> None:
    write(tmp_path / "v2/c", cpu__stat="usage_usec 5000\nuser_usec 1\n")
    write(tmp_path / "cpuacct/c", cpuacct__usage="77\n")

    on_v2, on_v1 = stats.cpu_usage(v2(tmp_path / "v2"), "/c"), stats.cpu_usage(v1(tmp_path), "/c")

    assert on_v2 is not None
    assert on_v2[1] == 5_000_000
    assert on_v1 is not None
    assert on_v1[1] == 77
    assert stats.cpu_usage(v2(tmp_path / "v2"), "/gone") is None
    assert stats.cpu_usage(v1(tmp_path), "/gone") is None


def test_several_cgroups_add_up_to_one() -> None:
    first = stats.CgroupStats(10, stats.Cpu(5), stats.Memory(100, 90, 7, 50, 3, 1), stats.Swap(1, 1), None, 2)
    second = stats.CgroupStats(20, stats.Cpu(7), stats.Memory(10, 9, None, 5, 2, 1), None, None, 3)
    ended = stats.CgroupStats(15, None, None, None, None, None)

    assert stats.total([first, ended, second]) == stats.CgroupStats(
        20, stats.Cpu(12), stats.Memory(110, 99, None, 55, 5, 2), None, None, 5
    )
    assert stats.total([ended]) == ended


SECOND = 1_000_000_000


def test_the_first_rate_is_the_average_since_the_counter_began() -> None:
    rates = stats.CpuRates()

    assert rates.usage_nano_cores("c", 14 * SECOND, 2 * SECOND, since=10 * SECOND) == SECOND // 2
    assert rates.usage_nano_cores("new", 10 * SECOND, 0, since=10 * SECOND) == 0


def test_nano_cores_are_the_average_over_at_least_the_window() -> None:
    rates = stats.CpuRates(window_s=1.0)

    def rate(at_s: float, usage_s: float) -> float:
        return rates.usage_nano_cores("c", int(at_s * SECOND), int(usage_s * SECOND), since=0) / SECOND

    assert rate(2, 1) == 0.5
    assert rate(2.5, 1.5) == 0.5  # too soon: as before
    assert rate(4, 5) == 2
    assert rate(4.1, 100) == 2
    assert rate(6, 5) == 0


def test_a_counter_that_went_back_keeps_the_rate_until_the_next_window() -> None:
    rates = stats.CpuRates(window_s=1.0)
    rates.usage_nano_cores("c", 2 * SECOND, 2 * SECOND, since=0)

    assert rates.usage_nano_cores("c", 4 * SECOND, 0, since=0) == SECOND
    assert rates.usage_nano_cores("c", 6 * SECOND, SECOND, since=0) == SECOND // 2


def test_samples_of_what_is_gone_are_forgotten() -> None:
    rates = stats.CpuRates(window_s=1.0)
    for id in ("gone", "stays"):
        rates.usage_nano_cores(id, 2 * SECOND, 2 * SECOND, since=0)

    rates.keep_only(["stays", "other"])

    assert rates.usage_nano_cores("stays", 4 * SECOND, 2 * SECOND, since=0) == 0
    assert rates.usage_nano_cores("gone", 4 * SECOND, 2 * SECOND, since=0) == SECOND // 2


def test_what_a_runtime_counts_in_its_sandbox_is_all_that_is_told() -> None:
    found = stats.of_usage(Usage(cpu_ns=5, memory_bytes=None, processes=2))

    assert (found.cpu, found.memory, found.swap, found.io, found.processes) == (stats.Cpu(5), None, None, None, 2)
    memory = stats.of_usage(Usage(None, 4096, None)).memory
    assert memory is not None
    assert (memory.usage_bytes, memory.working_set_bytes, memory.available_bytes) == (4096, 4096, None)
