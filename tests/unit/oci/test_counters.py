import os
import socket
from pathlib import Path

import pytest

from oci import counters
from oci.counters import DeviceIo
from oci.errors import NotFound
from oci.linux import open_files
from oci.linux.cgroup import Cgroups, Hierarchy
from oci.stats import Psi, PsiData

# As Linux 6.12 writes them for a container with limits under systemd.
CPU_STAT = """\
usage_usec 4213370
user_usec 3100000
system_usec 1113370
nice_usec 0
core_sched.force_idle_usec 0
nr_periods 212
nr_throttled 31
throttled_usec 1520345
nr_bursts 3
burst_usec 1700
"""
MEMORY_STAT = """\
anon 1048576
file 8192000
kernel 401408
kernel_stack 32768
pagetables 73728
sec_pagetables 0
percpu 0
sock 0
vmalloc 0
shmem 0
zswap 0
zswapped 0
file_mapped 245760
file_dirty 0
file_writeback 0
swapcached 0
anon_thp 0
inactive_anon 1040384
active_anon 8192
inactive_file 5242880
active_file 2949120
unevictable 0
slab_reclaimable 150000
slab_unreclaimable 100000
slab 250000
workingset_refault_anon 0
pgscan 0
pgfault 4711
pgmajfault 12
"""
MEMORY_EVENTS = "low 0\nhigh 0\nmax 18\noom 3\noom_kill 2\noom_group_kill 0\n"
IO_STAT = """\
259:0 rbytes=1048576 wbytes=20480 rios=33 wios=5 dbytes=4096 dios=1
7:0
253:1 rbytes=0 wbytes=512 rios=0 wios=1 dbytes=0 dios=0
"""
PRESSURE = (
    "some avg10=1.50 avg60=0.25 avg300=0.00 total=12345678\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=2000001\n"
)

V1_MEMORY_STAT = """\
cache 10
rss 20
mapped_file 5
pgfault 400
pgmajfault 3
hierarchical_memory_limit 67108864
hierarchical_memsw_limit 67108864
total_cache 8192000
total_rss 1048576
total_mapped_file 245760
total_swap 4096
total_pgfault 4711
total_pgmajfault 12
total_inactive_file 5242880
total_active_file 2949120
"""
IO_SERVICE_BYTES = """\
254:0 Read 1048576
254:0 Write 20480
254:0 Sync 1069056
254:0 Async 0
254:0 Discard 0
254:0 Total 1069056
Total 1069056
"""
IO_SERVICED = "254:0 Read 33\n254:0 Write 5\n254:0 Total 38\nTotal 38\n"


def v2(root: Path) -> Cgroups:
    return Cgroups((Hierarchy(root, frozenset({"cpu", "memory", "io", "pids", "hugetlb"}), True),))


def v1(root: Path) -> Cgroups:
    controllers = ("cpuacct", "cpu", "memory", "pids", "blkio", "hugetlb")
    return Cgroups(tuple(Hierarchy(root / name, frozenset({name}), False) for name in controllers))


def write(directory: Path, files: dict[str, str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)


def test_a_v2_cgroup_s_counters_are_read(tmp_path: Path) -> None:
    files = {
        "cpu.stat": CPU_STAT,
        "cpu.pressure": PRESSURE,
        "memory.current": "9641984\n",
        "memory.peak": "20000000\n",
        "memory.stat": MEMORY_STAT,
        "memory.events": MEMORY_EVENTS,
        "memory.swap.current": "4096\n",
        "memory.pressure": PRESSURE,
        "io.stat": IO_STAT,
        "io.pressure": PRESSURE,
        "cgroup.procs": f"{os.getpid()}\n",
        "pids.current": "7\n",
        "pids.max": "max\n",
    }
    write(tmp_path / "pod/c", files)
    write(tmp_path / "pod/c/below", {"cgroup.procs": f"{os.getpid()}\n"})

    found = counters.read(v2(tmp_path), "/pod/c")

    psi = Psi(full=PsiData(2_000_001_000, 0.0, 0.0, 0.0), some=PsiData(12_345_678_000, 1.5, 0.25, 0.0))
    assert found.cpu == counters.CpuCounters(
        usage_ns=4_213_370_000,
        user_ns=3_100_000_000,
        system_ns=1_113_370_000,
        periods=212,
        throttled_periods=31,
        throttled_ns=1_520_345_000,
        bursts=3,
        burst_ns=1_700_000,
        psi=psi,
    )
    assert found.memory == counters.MemoryCounters(
        usage_bytes=9_641_984,
        working_set_bytes=9_641_984 - 5_242_880,
        max_usage_bytes=20_000_000,
        rss_bytes=1_048_576,
        cache_bytes=8_192_000,
        kernel_bytes=401_408,
        mapped_file_bytes=245_760,
        swap_bytes=4096,
        active_file_bytes=2_949_120,
        inactive_file_bytes=5_242_880,
        limit_hits=18,
        oom_kills=2,
        page_faults=4711,
        major_page_faults=12,
        total_page_faults=4711,
        total_major_page_faults=12,
        psi=psi,
    )
    assert found.io == (
        DeviceIo(259, 0, "Read", 1_048_576, 33),
        DeviceIo(259, 0, "Write", 20_480, 5),
        DeviceIo(259, 0, "Discard", 4096, 1),
        DeviceIo(253, 1, "Read", 0, 0),
        DeviceIo(253, 1, "Write", 512, 1),
        DeviceIo(253, 1, "Discard", 0, 0),
    )
    assert found.io_psi == psi
    assert found.processes is not None
    assert (found.processes.processes, found.processes.threads, found.processes.threads_max) == (2, 7, 0)
    assert found.processes.files is not None
    assert found.processes.files.fds > 0
    fewer = counters.read(v2(tmp_path), "/pod/c", each_process=False)
    assert fewer.processes == counters.ProcessCounters(None, 7, 0, None)


def test_kernel_memory_is_added_up_where_the_kernel_does_not(tmp_path: Path) -> None:
    old = "".join(line for line in MEMORY_STAT.splitlines(keepends=True) if not line.startswith("kernel "))
    write(tmp_path / "c", {"memory.current": "1\n", "memory.stat": old})

    found = counters.read(v2(tmp_path), "/c")

    assert found.memory is not None
    assert found.memory.kernel_bytes == 32_768 + 73_728 + 250_000
    assert found.memory.max_usage_bytes is None


def test_a_v1_cgroup_s_counters_are_read(tmp_path: Path) -> None:
    write(tmp_path / "cpuacct/c", {"cpuacct.usage": "4213370000\n", "cpuacct.stat": "user 310\nsystem 111\n"})
    write(
        tmp_path / "cpu/c",
        {"cpu.stat": "nr_periods 212\nnr_throttled 31\nthrottled_time 1520345000\nnr_bursts 3\nburst_time 4\n"},
    )
    memory = {
        "memory.usage_in_bytes": "9641984\n",
        "memory.max_usage_in_bytes": "20000000\n",
        "memory.kmem.usage_in_bytes": "401408\n",
        "memory.failcnt": "18\n",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        "memory.stat": V1_MEMORY_STAT,
    }
    write(tmp_path / "memory/c", memory)
    blkio = {
        "blkio.throttle.io_service_bytes_recursive": IO_SERVICE_BYTES,
        "blkio.throttle.io_serviced_recursive": IO_SERVICED,
    }
    write(tmp_path / "blkio/c", blkio)
    write(tmp_path / "pids/c", {"cgroup.procs": "", "pids.current": "0\n", "pids.max": "100\n"})

    found = counters.read(v1(tmp_path), "/c")

    assert found.cpu == counters.CpuCounters(4_213_370_000, 3_100_000_000, 1_110_000_000, 212, 31, 1_520_345_000, 3, 4)
    assert found.memory == counters.MemoryCounters(
        usage_bytes=9_641_984,
        working_set_bytes=9_641_984 - 5_242_880,
        max_usage_bytes=20_000_000,
        rss_bytes=1_048_576,
        cache_bytes=8_192_000,
        kernel_bytes=401_408,
        mapped_file_bytes=245_760,
        swap_bytes=4096,
        active_file_bytes=2_949_120,
        inactive_file_bytes=5_242_880,
        limit_hits=18,
        oom_kills=2,
        page_faults=400,
        major_page_faults=3,
        total_page_faults=4711,
        total_major_page_faults=12,
    )
    assert DeviceIo(254, 0, "Read", 1_048_576, 33) in found.io
    assert DeviceIo(254, 0, "Write", 20_480, 5) in found.io
    assert {each.operation for each in found.io} == {"Read", "Write", "Sync", "Async", "Discard"}
    assert found.processes is not None
    assert (found.processes.processes, found.processes.threads, found.processes.threads_max) == (0, 0, 100)


@pytest.mark.parametrize(("usage", "most"), [("usage_in_bytes", "max_usage_in_bytes"), ("current", "")])
def test_huge_pages_are_read_for_each_size_of_this_kernel(tmp_path: Path, usage: str, most: str) -> None:
    sizes = [each.name for each in Path("/sys/kernel/mm/hugepages").glob("hugepages-*kB")]
    if "hugepages-2048kB" not in sizes:
        pytest.skip("this kernel has no huge pages of 2 MB")
    hierarchies = v1(tmp_path) if most else v2(tmp_path)
    directory = tmp_path / "hugetlb/c" if most else tmp_path / "c"
    write(directory, {f"hugetlb.2MB.{usage}": "4194304\n"} | ({f"hugetlb.2MB.{most}": "6291456\n"} if most else {}))

    found = counters.read(hierarchies, "/c")

    assert found.huge_pages == (counters.HugePages("2MB", 4_194_304, 6_291_456 if most else None),)


def test_what_a_host_does_not_count_is_none(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "cpuacct/c").mkdir(parents=True)

    on_v2, on_v1 = counters.read(v2(tmp_path), "/c"), counters.read(v1(tmp_path), "/c")

    for found in (on_v2, on_v1):
        assert (found.cpu, found.memory, found.io, found.io_psi, found.huge_pages) == (None, None, (), None, ())
    assert on_v1.processes is None


def test_a_missing_cgroup_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="/gone"):
        counters.read(v2(tmp_path), "/gone")


def test_open_files_and_sockets_are_counted() -> None:
    before = open_files.count([os.getpid()])

    with socket.socket(), Path("/dev/null").open():
        found = open_files.count([os.getpid()])

    assert found.fds == before.fds + 2
    assert found.sockets is not None
    assert before.sockets is not None
    assert found.sockets == before.sockets + 1


def test_very_many_open_files_are_counted_without_looking_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "FDS_READ_LIMIT", 2)

    found = open_files.count([os.getpid()])

    assert found.fds > 2
    assert found.sockets is None


def test_a_process_that_is_gone_has_no_open_files() -> None:
    assert open_files.count([2**22 + 1]) == open_files.OpenFiles(0, 0)
    assert open_files.limit(2**22 + 1) is None
    assert (open_files.limit(os.getpid()) or 1) > 0
