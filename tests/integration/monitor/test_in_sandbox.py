"""Containers whose process is their pod's sandbox: with a runtime that tells their ends by `wait` alone."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from oci.errors import Error
from oci.exit_records import read_exit_record
from oci.fork_server import ForkServer, MonitorRequest
from oci.linux import proc
from oci.monitor import kernel
from oci.monitor_client import ExecRequest, Monitor

FAKE = Path(__file__).parents[2] / "fakes/sandboxing_runtime.py"
FOR_EVER = ["/bin/sleep", "100000"]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


class Sandbox:
    """A fork server, a process that stands for a pod's sandbox, and containers in it."""

    def __init__(self, path: Path, forks: ForkServer) -> None:
        self.path = path
        self.root = path / "runtime"
        self.root.mkdir()
        self._forks = forks
        self.process = subprocess.Popen(FOR_EVER)
        (self.root / "sandbox").write_text(str(self.process.pid))

    def directory(self, name: str) -> Path:
        return self.path / "run/containers" / name

    async def created(self, name: str, args: list[str]) -> Monitor:
        bundle = self.path / f"bundle-{name}"
        bundle.mkdir()
        (bundle / "config.json").write_text(json.dumps({"process": {"args": args}}))
        self.directory(name).mkdir(parents=True)
        request = MonitorRequest(
            name,
            self.directory(name),
            bundle,
            (sys.executable, "-I", "-S", str(FAKE), "--root", str(self.root)),
            log_path=str(self.path / f"{name}.log"),
            in_sandbox=True,
            has_helpers=True,
        )
        monitor = await self._forks.spawn_monitor(request)
        await monitor.create(20)
        return monitor

    async def started(self, name: str, args: list[str]) -> Monitor:
        monitor = await self.created(name, args)
        await monitor.start(20)
        return monitor

    def pid(self, name: str) -> int:
        return int((self.root / f"{name}.pid").read_text())

    def kills(self) -> list[str]:
        return (self.root / "kills").read_text().splitlines()

    async def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for file in self.root.glob("*.pid"):
            if not file.with_suffix(".exit").exists():  # so it is not yet reaped
                os.kill(int(file.read_text()), signal.SIGKILL)
        for _ in range(400):
            if not await self._forks.children():
                break
            await asyncio.sleep(0.05)
        assert await self._forks.shutdown() == ()


MakeSandbox = Callable[[], Any]


@pytest.fixture
def sandbox(tmp_path: Path) -> MakeSandbox:
    @asynccontextmanager
    async def make() -> AsyncIterator[Sandbox]:
        made = Sandbox(tmp_path, await ForkServer.ensure(tmp_path / "run"))
        try:
            yield made
        finally:
            await made.close()

    return make


def test_the_exit_is_what_the_runtime_tells(sandbox: MakeSandbox) -> None:
    async def main() -> None:
        async with sandbox() as pod:
            monitor = await pod.started("c", ["/bin/sh", "-c", "echo out; exit 7"])

            record = await monitor.wait_exit()

            assert (record.exit_code, record.pid) == (7, pod.process.pid)
            assert read_exit_record(pod.directory("c")) == record
            assert (pod.path / "c.log").read_text().endswith(" stdout F out\n")
            assert pod.process.poll() is None
            assert not (pod.directory("c") / "wait.json").exists()

    asyncio.run(main())


def test_a_monitor_at_rest_hears_of_the_end(sandbox: MakeSandbox) -> None:
    async def main() -> None:
        async with sandbox() as pod:
            monitor = await pod.started("c", ["/bin/sh", "-c", "sleep 4; exit 5"])
            await asyncio.sleep(3)
            assert working_halves(monitor) == [], "it does not rest"

            assert (await monitor.wait_exit()).exit_code == 5

    asyncio.run(main())


def working_halves(monitor: Monitor) -> list[int]:
    return [
        stat.pid
        for stat in kernel.processes()
        if stat.parent == monitor.pid and Path(f"/proc/{stat.pid}/comm").read_text() == "crito-mon-awake\n"
    ]


def test_a_wait_that_tells_nothing_is_asked_again(sandbox: MakeSandbox) -> None:
    async def main() -> None:
        async with sandbox() as pod:
            (pod.root / "forgetful").touch()
            monitor = await pod.started("c", ["/bin/sh", "-c", "sleep 0.5; exit 3"])

            assert (await monitor.wait_exit()).exit_code == 3
            assert not (pod.root / "forgetful").exists()

    asyncio.run(main())


def test_the_end_of_the_sandbox_is_the_end_of_its_containers(sandbox: MakeSandbox) -> None:
    async def main() -> None:
        async with sandbox() as pod:
            monitors = [await pod.started(name, FOR_EVER) for name in ("one", "two")]

            pod.process.kill()
            pod.process.wait()

            for monitor in monitors:
                record = await asyncio.wait_for(monitor.wait_exit(), 10)
                assert (record.exit_code, record.signal, record.oom_killed) == (137, 9, False)

    asyncio.run(main())


def test_signals_go_by_the_runtime_and_sigkill_to_everybody(sandbox: MakeSandbox) -> None:
    async def main() -> None:
        async with sandbox() as pod:
            willing, deaf = await pod.started("willing", FOR_EVER), await pod.started("deaf", FOR_EVER)

            await willing.kill(signal.SIGTERM)
            await deaf.kill(signal.SIGKILL)

            assert (await willing.wait_exit()).exit_code == 143
            assert (await deaf.wait_exit()).exit_code == 137
            assert pod.process.poll() is None
            assert [kill.split("] ") for kill in pod.kills()] == [
                ["['--log', '--root'", "15"],
                ["['--all', '--log', '--root'", "9"],
            ]

    asyncio.run(main())


def test_a_container_without_a_process_yet_ends_at_sigkill_alone(sandbox: MakeSandbox) -> None:
    async def main() -> None:
        async with sandbox() as pod:
            monitor = await pod.created("c", FOR_EVER)

            await monitor.kill(signal.SIGTERM)
            assert (await monitor.status()).state == "created"
            await monitor.kill(signal.SIGKILL)

            assert (await monitor.wait_exit()).exit_code == 137
            assert not (pod.root / "kills").exists()

    asyncio.run(main())


def test_a_start_that_fails_says_why_and_can_be_ended(sandbox: MakeSandbox) -> None:
    async def main() -> None:
        async with sandbox() as pod:
            monitor = await pod.created("c", ["/no/such/program"])

            with pytest.raises(Error, match="no such file"):
                await monitor.start(20)
            await monitor.kill(signal.SIGKILL)

            assert (await monitor.wait_exit()).exit_code == 137

    asyncio.run(main())


def test_an_exec_has_its_exit_code_and_is_killed_within_the_sandbox(sandbox: MakeSandbox) -> None:
    async def main() -> None:
        async with sandbox() as pod:
            monitor = await pod.started("c", FOR_EVER)

            done = await monitor.exec(ExecRequest({"args": ["/bin/sh", "-c", "exit 6"]}))
            assert (await done.exit()).exit_code == 6

            late = await monitor.exec(ExecRequest({"args": FOR_EVER}, timeout_s=0.5))
            (file,) = pod.directory("c").glob("exec-*.inner")
            inner = int(file.read_text())
            assert (await late.exit()).timed_out
            assert proc.stat(inner) is None
            assert not file.exists()

            await monitor.kill(signal.SIGKILL)
            await monitor.wait_exit()

    asyncio.run(main())
