"""Processes in a running container: their output, their exit, and the end of those that take too long."""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest

from oci.errors import DeadlineExceeded, Error, FailedPrecondition
from oci.monitor import kernel
from oci.monitor_client import ExecRequest


def sleepers(world: Any, seconds: str) -> int:
    """How many processes of this world sleep for just so long."""
    found = 0
    for stat in kernel.processes():
        try:
            arguments = Path(f"/proc/{stat.pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if arguments[:2] == [b"sleep", seconds.encode()] and stat.state not in "ZX":
            found += 1
    return found


def test_exec_sync_gives_output_and_exit_code(world: Any, process: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"])

            result = await monitor.exec_sync(process("sh", "-c", "echo out; echo err >&2; exit 3"), 10)

            assert (result.exit_code, result.stdout, result.stderr) == (3, b"out\n", b"err\n")
            assert sorted(p.name for p in w.directory("c").iterdir()) == ["monitor.sock"]

    asyncio.run(main())


def test_the_hosts_null_device_is_not_given_to_a_containers_user(world: Any, process: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"])
            other = {**process("sh", "-c", "echo >&0; head -c 1"), "user": {"uid": 1000, "gid": 1000}}

            result = await monitor.exec_sync(other, 10)

            assert (result.exit_code, result.stdout, result.stderr) == (0, b"", b"")
            assert (Path("/dev/null").stat().st_uid, Path("/dev/null").stat().st_mode & 0o777) == (0, 0o666)
            assert list(Path("/dev").glob(".crito-null-*")) == []

    asyncio.run(main())


def test_a_killed_process_has_128_and_the_signal(world: Any, process: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"])

            assert (await monitor.exec_sync(process("sh", "-c", "kill -9 $$"), 10)).exit_code == 137

    asyncio.run(main())


def test_a_timeout_kills_the_whole_tree_before_it_is_told(world: Any, process: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"])
            seconds = str(100_000 + os.getpid())
            script = f"sleep {seconds} & (sleep {seconds} & sleep {seconds}) & trap '' TERM; sleep {seconds}; sleep 9"
            started = time.monotonic()

            with pytest.raises(DeadlineExceeded, match=r"not done after 0\.5 s"):
                await monitor.exec_sync(process("sh", "-c", script), 0.5)

            assert sleepers(w, seconds) == 0
            assert time.monotonic() - started < 3
            assert (await monitor.exec_sync(process("true"), 10)).exit_code == 0

    asyncio.run(main())


def test_output_over_the_limit_is_cut_and_the_rest_read_away(world: Any, process: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"])

            result = await monitor.exec_sync(process("sh", "-c", "yes | head -c 3000000; exit 2"), 20, 100_000)

            assert result.exit_code == 2
            assert result.stdout == b"y\n" * 50_000

    asyncio.run(main())


def test_all_of_a_large_output_arrives(world: Any, process: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"])

            result = await monitor.exec_sync(process("seq", "1", "200000"), 20)

            assert result.stdout == b"".join(b"%d\n" % n for n in range(1, 200_001))

    asyncio.run(main())


def test_a_background_process_that_keeps_the_pipe_is_not_waited_for(world: Any, process: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"])
            started = time.monotonic()

            result = await monitor.exec_sync(process("sh", "-c", "sleep 50 & echo done"), 30)

            assert result.stdout == b"done\n"
            assert time.monotonic() - started < 5

    asyncio.run(main())


def test_what_cannot_be_started_is_named(world: Any, process: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"])

            with pytest.raises(Error, match="no-such-program"):
                await monitor.exec_sync(process("no-such-program"), 10)

            assert (await monitor.status()).execs == 0

    asyncio.run(main())


def test_a_cancelled_exec_is_killed(world: Any, process: Any, eventually: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"])
            seconds = str(200_000 + os.getpid())
            task = asyncio.create_task(monitor.exec_sync(process("sleep", seconds), None))
            await eventually(lambda: sleepers(w, seconds) == 1)

            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

            await eventually(lambda: sleepers(w, seconds) == 0)

    asyncio.run(main())


def test_an_exec_cancelled_while_it_starts_is_killed(world: Any, process: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"])
            seconds = str(300_000 + os.getpid())
            for delay_ms in range(0, 20, 2):
                task = asyncio.create_task(monitor.exec_sync(process("sleep", seconds), None))
                await asyncio.sleep(delay_ms / 1000)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

            for _ in range(300):
                if (await monitor.status()).execs == 0:
                    break
                await asyncio.sleep(0.02)

            assert (await monitor.status()).execs == 0
            assert sleepers(w, seconds) == 0

    asyncio.run(main())


def test_many_at_once_do_not_mix(world: Any, process: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"])

            results = await asyncio.gather(
                *(monitor.exec_sync(process("sh", "-c", f"echo {n}; exit {n}"), 30) for n in range(20))
            )

            assert [(r.exit_code, r.stdout) for r in results] == [(n, b"%d\n" % n) for n in range(20)]

    asyncio.run(main())


def test_an_exec_with_a_terminal_hands_over_its_master(world: Any, process: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"])
            script = process("sh", "-c", "read x; stty size; exit 6", terminal=True)

            session = await monitor.exec(ExecRequest(script))
            session.resize(44, 88)
            os.write(session.console_fd, b"go\n")
            ended = await session.exit()

            assert ended.exit_code == 6
            output = b""
            try:
                while chunk := os.read(session.console_fd, 1000):
                    output += chunk
            except OSError:
                pass  # EIO: the end
            assert output.replace(b"\r", b"") == b"go\n44 88\n"
            session.close()

    asyncio.run(main())


def test_an_exec_survives_the_daemon_and_its_output_goes_on(world: Any, process: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"])
            with (tmp_path / "out").open("wb") as out:
                await monitor.exec(
                    ExecRequest(process("sh", "-c", "sleep 0.5; echo late")), -1, out.fileno(), out.fileno()
                )

            monitor.close()
            for _ in range(200):
                if (tmp_path / "out").read_bytes():
                    break
                await asyncio.sleep(0.02)

            assert (tmp_path / "out").read_bytes() == b"late\n"

    asyncio.run(main())


def test_there_is_no_exec_after_the_exit(world: Any, process: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"], shared_pid=False)
            read, write = os.pipe()
            await monitor.attach(stdout_fd=write)  # keeps nothing: the end is not held up by it
            os.close(write)

            await monitor.kill(9)
            await monitor.wait_exit()

            with pytest.raises((FailedPrecondition, Error)):
                await monitor.exec_sync(process("true"), 5)
            os.close(read)

    asyncio.run(main())


def test_running_execs_end_with_their_container(world: Any, process: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"])
            session = await monitor.exec(ExecRequest(process("sleep", "1000")))

            await monitor.kill(9)

            assert (await asyncio.wait_for(session.exit(), 10)).exit_code == 137

    asyncio.run(main())
