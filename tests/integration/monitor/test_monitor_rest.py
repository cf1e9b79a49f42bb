"""A monitor at rest: it costs little, misses nothing, and is there again when something happens."""

import asyncio
import os
import re
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from oci.errors import Unavailable
from oci.exit_records import read_exit_record, wait_orphan_exit
from oci.fork_server import PodRequest
from oci.monitor import kernel
from oci.monitor_client import Monitor
from oci.pause import kill_pause

PODS = 20


@pytest.fixture
def runtime(any_runtime: str) -> str:
    """The rest is the same whatever the OCI runtime, and takes its time."""
    return any_runtime


def pss_kib(pid: int) -> int:
    found = re.search(r"^Pss:\s+(\d+)", kernel.read_file(f"/proc/{pid}/smaps_rollup"), re.MULTILINE)
    assert found
    return int(found[1])


def halves(monitor: Monitor) -> int:
    """2 while it works, 1 at rest, 0 when it is gone."""
    names = []
    for stat in kernel.processes():
        if monitor.pid in (stat.pid, stat.parent) and stat.state not in "ZX":
            with suppress(OSError):
                names.append(kernel.read_file(f"/proc/{stat.pid}/comm").strip())
    return names.count("crito-monitor") + names.count("crito-mon-awake")


async def at_rest(monitor: Monitor) -> None:
    for _ in range(300):
        if halves(monitor) == 1:
            return
        await asyncio.sleep(0.02)
    pytest.fail("the monitor does not come to rest")


def test_twenty_idle_monitors_and_pauses_cost_less_than_a_mebibyte_each(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            pauses = []
            for number in range(PODS):
                pins = w.path / f"pins{number}"
                pins.mkdir()
                catatonit = Path("/usr/bin/catatonit")
                path = str(catatonit) if catatonit.exists() else ""
                pauses.append(await w.forks.make_pod(PodRequest("s", ("net", "ipc", "uts"), pins, pause_path=path)))
            monitors = [await w.started(f"c{n}", ["sh", "-c", "echo hello; sleep 1000"]) for n in range(PODS)]

            for monitor in monitors:
                await at_rest(monitor)
            costs = sorted(pss_kib(pid) for pid in [m.pid for m in monitors] + [p.pid for p in pauses])

            print("PSS in KiB:", costs)
            assert costs[-1] < 1024
            await asyncio.gather(*(kill_pause(pause.pid, pause.start_time) for pause in pauses))

    asyncio.run(main())


def test_a_resting_monitor_wakes_for_requests_and_rests_again(world: Any, process: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"])
            for number in range(3):
                await at_rest(monitor)

                result = await monitor.exec_sync(process("sh", "-c", f"echo {number}; exit {number}"), 10)

                assert (result.exit_code, result.stdout) == (number, b"%d\n" % number)
                assert (await monitor.status()).state == "created"

    asyncio.run(main())


def test_output_wakes_a_monitor_and_the_line_goes_on_over_its_rest(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            script = "printf 'one '; sleep 2.5; printf 'line\\n'; echo err >&2; sleep 2.5; printf end; exit 3"
            monitor = await w.started("c", ["sh", "-c", script])
            await at_rest(monitor)

            record = await asyncio.wait_for(monitor.wait_exit(), 20)

            assert record.exit_code == 3
            tags = [line.split(b" ")[1:3] for line in w.log_path("c").read_bytes().splitlines()]
            assert tags == [[b"stdout", b"P"], [b"stdout", b"F"], [b"stderr", b"F"], [b"stdout", b"F"]]
            assert w.log("c") == b"one line\nend\n"
            assert record.log_bytes == w.log_path("c").stat().st_size

    asyncio.run(main())


def test_an_exit_at_rest_is_recorded(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"])
            init = (await monitor.status()).init
            assert init is not None
            await at_rest(monitor)

            os.kill(init.pid, signal.SIGTERM)  # pid 1 of its namespace does not care
            os.kill(init.pid, signal.SIGKILL)
            record = await asyncio.wait_for(monitor.wait_exit(), 5)

            assert (record.exit_code, record.pid, record.start_time) == (137, init.pid, init.start_time)
            assert read_exit_record(w.directory("c")) == record
            for _ in range(100):
                if halves(monitor) == 0:
                    break
                await asyncio.sleep(0.02)
            assert halves(monitor) == 0

    asyncio.run(main())


def test_a_new_daemon_connects_to_a_resting_monitor(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"])
            await at_rest(monitor)
            monitor.close()
            await at_rest(monitor)

            again = await Monitor.connect(w.directory("c"))

            assert again.pid == monitor.pid
            status = await again.status()
            assert status.init is not None
            await again.kill(9)
            assert (await again.wait_exit()).exit_code == 137

    asyncio.run(main())


def test_terminal_and_stdin_work_after_a_rest(world: Any, eventually: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sh", "-c", "read x; echo got $x; stty size"], tty=True, stdin=True)
            await at_rest(monitor)

            await monitor.resize(11, 22)
            await at_rest(monitor)
            read, write = os.pipe()
            await monitor.attach(stdin_fd=read)
            os.close(read)
            os.write(write, b"it\n")

            assert (await asyncio.wait_for(monitor.wait_exit(), 10)).exit_code == 0
            assert w.log("c").replace(b"\r", b"") == b"it\ngot it\n11 22\n"
            os.close(write)

    asyncio.run(main())


def test_a_log_rotated_after_a_rest_is_the_new_file(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sh", "-c", "echo one; sleep 6; echo two"])
            await at_rest(monitor)
            w.log_path("c").rename(w.path / "old.log")

            await monitor.reopen_log()
            await at_rest(monitor)
            await asyncio.wait_for(monitor.wait_exit(), 10)

            assert (w.path / "old.log").read_bytes().endswith(b"stdout F one\n")
            assert w.log("c") == b"two\n"

    asyncio.run(main())


def test_orphans_of_the_container_are_reaped_at_rest(world: Any, process: Any, eventually: Any) -> None:
    async def main() -> None:
        async with world() as w:
            script = "(sleep 2 &) ; exec sleep 1000"
            monitor = await w.started("c", ["sh", "-c", script], shared_pid=True)
            await at_rest(monitor)

            def orphans() -> list[int]:
                return [s.pid for s in kernel.processes() if s.parent == monitor.pid]

            await eventually(lambda: len(orphans()) == 1)  # init alone: the other was reaped
            assert halves(monitor) == 1

    asyncio.run(main())


@pytest.mark.parametrize("which", ["keeper", "working half"])
def test_the_death_of_either_half_is_the_monitors(world: Any, which: str) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sh", "-c", "sleep 3; exit 12"])
            init = (await monitor.status()).init
            assert init is not None
            awake = [s.pid for s in kernel.processes() if s.parent == monitor.pid and s.pid != init.pid]
            assert len(awake) == 1

            os.kill(monitor.pid if which == "keeper" else awake[0], signal.SIGKILL)

            with pytest.raises(Unavailable, match="monitor lost"):
                await asyncio.wait_for(monitor.wait_exit(), 5)
            ended = await asyncio.wait_for(wait_orphan_exit(w.run_dir, init.pid, init.start_time), 10)
            assert ended.exit_code == 12
            assert halves(monitor) == 0

    asyncio.run(main())


def test_requests_at_the_moment_of_falling_asleep_are_all_answered(world: Any, process: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"])
            await monitor.status()
            for number in range(12):
                await asyncio.sleep(1.0 + (number - 6) * 0.03)

                if number % 4:
                    assert (await asyncio.wait_for(monitor.status(), 5)).state == "created"
                else:
                    assert (await monitor.exec_sync(process("sh", "-c", "exit 5"), 10)).exit_code == 5

    asyncio.run(main())
