"""A container's life under its monitor: create, start, output, exit; with real OCI runtimes."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oci.errors import DeadlineExceeded, Error, FailedPrecondition, Unavailable
from oci.exit_records import read_exit_record
from oci.linux.proc import is_alive
from oci.monitor import kernel
from oci.monitor.exit import cgroup_directory, cgroup_mounts, memberships
from oci.monitor_client import Monitor


def test_output_and_exit_code_are_kept(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            before = time.time_ns()

            monitor = await w.started("c", ["sh", "-c", "echo out; echo err >&2; printf part; exit 7"])
            record = await monitor.wait_exit()

            assert (record.exit_code, record.signal, record.oom_killed) == (7, 0, False)
            assert before < record.finished_at < time.time_ns()
            assert read_exit_record(w.directory("c")) == record
            assert w.log("c") == b"out\npart\n"
            assert w.log("c", "stderr") == b"err\n"

    asyncio.run(main())


def test_a_megabyte_from_a_container_that_ends_at_once_is_whole(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            script = "seq 1 100000 >&2 & seq 1 150000; wait"

            monitor = await w.started("c", ["sh", "-c", script])
            record = await monitor.wait_exit()

            assert w.log("c") == b"".join(b"%d\n" % n for n in range(1, 150001))
            assert w.log("c", "stderr") == b"".join(b"%d\n" % n for n in range(1, 100001))
            assert record.log_bytes == w.log_path("c").stat().st_size
            assert record.log_dropped == 0

    asyncio.run(main())


def test_a_killed_container_has_128_and_the_signal(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"])

            await monitor.kill(signal.SIGKILL)
            record = await monitor.wait_exit()

            assert (record.exit_code, record.signal) == (137, 9)

    asyncio.run(main())


def test_an_out_of_memory_kill_is_told(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["dd", "if=/dev/zero", "of=/dev/null", "bs=64M"], memory=16 * 1024 * 1024)

            record = await monitor.wait_exit()

            assert record.exit_code == 137
            assert record.oom_killed
            assert record.oom_limit == "container"

    asyncio.run(main())


def test_a_failed_create_tells_why_and_leaves_nothing(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            request = w.request("c", w.bundle("c", ["/no/such/program"]))
            monitor = await w.forks.spawn_monitor(request)

            with pytest.raises(Error, match="/no/such/program"):
                await monitor.create(20)

            assert await _settles(w) == ()
            assert [path.name for path in (w.path / "runtime").iterdir() if path.name != ".cache"] == []
            with pytest.raises(Unavailable, match="the monitor is gone"):
                await monitor.status()

    asyncio.run(main())


def test_a_runtime_that_hangs_is_killed_with_all_that_it_started(world: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with world() as w:
            script = tmp_path / "hanging-runtime"
            script.write_text('#!/bin/sh\ncase "$*" in *delete*) exit 0;; esac\nsetsid sleep 777 &\nsleep 777\n')
            script.chmod(0o755)
            monitor = await w.forks.spawn_monitor(w.request("c", w.bundle("c", ["true"]), runtime=(str(script),)))

            with pytest.raises(DeadlineExceeded, match="hanging-runtime create"):
                await monitor.create(0.3)

            assert await _settles(w) == ()

    asyncio.run(main())


async def _settles(world: Any) -> tuple[int, ...]:
    children: tuple[int, ...] = ()
    for _ in range(100):
        children = await world.forks.children()
        if not children:
            break
        await asyncio.sleep(0.02)
    return children


def test_a_missing_runtime_is_named(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            request = w.request("c", w.bundle("c", ["true"]), runtime=("/no/such/runtime",))
            monitor = await w.forks.spawn_monitor(request)

            with pytest.raises(Error, match="/no/such/runtime: No such file"):
                await monitor.create(5)

            await monitor.shutdown()

    asyncio.run(main())


def test_a_log_that_cannot_be_opened_fails_the_create(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            request = w.request("c", w.bundle("c", ["true"]), log_path="/no/such/folder/0.log")
            monitor = await w.forks.spawn_monitor(request)

            with pytest.raises(Error, match=r"cannot open the log /no/such/folder/0.log: No such file"):
                await monitor.create(5)

            await monitor.shutdown()

    asyncio.run(main())


def test_a_container_runs_once_and_is_not_shut_down_while_it_lives(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.created("c", ["sleep", "1000"])

            with pytest.raises(FailedPrecondition, match="created already"):
                await monitor.create(5)
            with pytest.raises(FailedPrecondition, match="the container is created"):
                await monitor.shutdown()
            status = await monitor.status()
            assert status.state == "created"
            assert status.init is not None and is_alive(status.init.pid, status.init.start_time)

    asyncio.run(main())


def test_a_new_daemon_finds_monitor_and_record_as_they_are(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            first = await w.started("c", ["sh", "-c", "sleep 0.3; exit 4"])
            first.close()

            second = await Monitor.connect(w.directory("c"))
            record = await second.wait_exit()

            assert record.exit_code == 4
            with pytest.raises(Unavailable, match="lost"):
                await first.wait_exit()
            for _ in range(100):
                if not await w.forks.children():
                    break
                await asyncio.sleep(0.02)
            with pytest.raises(Unavailable, match="cannot connect to the monitor"):
                await Monitor.connect(w.directory("c"))
            assert read_exit_record(w.directory("c")) == record

    asyncio.run(main())


def test_a_terminal_is_the_containers_and_can_be_resized(world: Any, eventually: Any) -> None:
    async def main() -> None:
        async with world() as w:
            script = "test -t 0 && echo tty; read x; stty size; exit 5"
            monitor = await w.started("c", ["sh", "-c", script], tty=True, stdin=True)
            read, write = os.pipe()
            await monitor.attach(stdin_fd=read)
            os.close(read)

            await eventually(lambda: w.log("c") == b"tty\r\n")
            await monitor.resize(33, 77)
            os.write(write, b"go\n")
            record = await monitor.wait_exit()

            assert record.exit_code == 5
            assert w.log("c").replace(b"\r", b"").splitlines() == [b"tty", b"go", b"33 77"]
            os.close(write)

    asyncio.run(main())


def test_without_a_terminal_there_is_nothing_to_resize(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"])

            with pytest.raises(FailedPrecondition, match="no terminal"):
                await monitor.resize(1, 2)

    asyncio.run(main())


def test_a_rotated_log_goes_on_in_the_new_file_without_a_loss(world: Any, eventually: Callable[..., Any]) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sh", "-c", "i=0; while [ $i -lt 3000 ]; do echo $i; i=$((i+1)); done"])
            ended = asyncio.ensure_future(monitor.wait_exit())
            parts = []
            for number in range(5):
                await asyncio.sleep(0.01)
                part = w.path / f"rotated.{number}"
                if ended.done():
                    break
                w.log_path("c").rename(part)
                parts.append(part)
                try:
                    await monitor.reopen_log()
                except (FailedPrecondition, Unavailable):
                    break
            await ended

            if w.log_path("c").exists():
                parts.append(w.log_path("c"))
            lines = [line.split(b" ", 3)[3] for part in parts for line in part.read_bytes().splitlines()]
            assert lines == [b"%d" % n for n in range(3000)]

    asyncio.run(main())


def test_processes_that_outlive_init_in_a_shared_pid_namespace_are_ended(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sh", "-c", "setsid sleep 1000 & exit 3"], shared_pid=True)

            record = await monitor.wait_exit()

            assert record.exit_code == 3
            assert await _settles(w) == ()  # the monitor too: it had waited for its pipes to be closed

    asyncio.run(main())


async def _sleeper(cgroup: Path) -> str:
    """The pid of the process there that sleeps, once it does."""
    while True:
        for pid in (cgroup / "cgroup.procs").read_text().split():
            if Path(f"/proc/{pid}/cmdline").read_bytes() == b"sleep\x001000\0":
                return pid
        await asyncio.sleep(0.01)


def test_processes_that_outlive_init_in_a_cgroup_below_its_own_are_ended(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            script = "setsid sleep 1000 & while [ ! -e /tmp/moved ]; do usleep 10000; done; exit 3"
            monitor = await w.started("c", ["sh", "-c", script], shared_pid=True)
            init = (await monitor.status()).init
            assert init is not None
            groups = memberships(init.pid)
            mounts = cgroup_mounts(Path("/proc/self/mountinfo").read_text())
            own = Path(cgroup_directory(groups, "memory", mounts) or cgroup_directory(groups, "", mounts))
            (own / "below").mkdir()
            (own / "below/cgroup.procs").write_text(await _sleeper(own))
            (w.path / "bundle-c/rootfs/tmp/moved").touch()

            assert (await monitor.wait_exit()).exit_code == 3
            assert await _settles(w) == ()

    asyncio.run(main())


def test_what_the_monitor_starts_does_not_inherit_its_oom_score(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"])

            init = (await monitor.status()).init

            assert init is not None
            assert kernel.read_file(f"/proc/{init.pid}/oom_score_adj").strip() == "100"
            assert int(kernel.read_file(f"/proc/{monitor.pid}/oom_score_adj")) <= 0

    asyncio.run(main())


def test_a_monitor_has_only_its_own_fds(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            await w.started("a", ["sleep", "1000"])
            monitor = await w.started("b", ["sleep", "1000"])

            targets = [str(fd.readlink()) for fd in Path(f"/proc/{monitor.pid}/fd").iterdir()]

            kinds = sorted(target.split(":")[0] for target in targets)
            assert kinds.count("socket") == 2  # the listening one and ours
            assert [t for t in targets if "/a" in t.removeprefix(str(w.path))] == []
            assert len(targets) < 16

    asyncio.run(main())
