"""The fork server, its pods, and what happens when it, a monitor or the daemon dies."""

import asyncio
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from oci import fork_server
from oci.container_spec import IdMapping
from oci.errors import Error, Unavailable
from oci.exit_records import read_exit_record, read_orphan_exit, wait_orphan_exit
from oci.fork_server import ForkServer, PodRequest
from oci.linux.proc import is_alive
from oci.monitor import kernel
from oci.monitor_client import Monitor
from oci.pause import kill_pause, read_pod_process, remove_pins

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
CATATONIT = "/usr/bin/catatonit"


@pytest.fixture(params=["", CATATONIT])
def pause_path(request: pytest.FixtureRequest) -> str:
    if request.param and not Path(request.param).exists():
        pytest.skip("catatonit is not installed")
    return str(request.param)


def pins(world: Any) -> Path:
    path: Path = world.path / "pins"
    path.mkdir()
    return path


def in_namespace(kind: str, pin: Path, *command: str) -> str:
    run = subprocess.run(["nsenter", f"--{kind}={pin}", *command], capture_output=True, text=True, check=True)
    return run.stdout


def test_a_pod_has_its_namespaces_pinned_and_its_pause_confined(world: Any, pause_path: str) -> None:
    async def main() -> None:
        async with world() as w:
            at = pins(w)

            pause = await w.forks.make_pod(
                PodRequest(
                    "s",
                    ("net", "ipc", "uts"),
                    at,
                    hostname="web-0",
                    sysctls={"net.ipv4.ip_unprivileged_port_start": "80", "kernel.shm_rmid_forced": "1"},
                    pause_path=pause_path,
                )
            )

            assert sorted(p.name for p in at.iterdir()) == ["ipc", "net", "pause.json", "uts"]
            assert in_namespace("uts", at / "uts", "hostname") == "web-0\n"
            assert "LOOPBACK,UP" in in_namespace("net", at / "net", "ip", "-o", "link")
            sysctl = in_namespace("net", at / "net", "cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start")
            assert sysctl == "80\n"
            assert in_namespace("ipc", at / "ipc", "cat", "/proc/sys/kernel/shm_rmid_forced") == "1\n"
            status = kernel.read_file(f"/proc/{pause.pid}/status")
            assert "NoNewPrivs:\t1" in status
            assert "CapEff:\t0000000000000000" in status and "CapBnd:\t0000000000000000" in status
            assert list(Path(f"/proc/{pause.pid}/root").iterdir()) == []
            fds = {str(fd.readlink()) for fd in Path(f"/proc/{pause.pid}/fd").iterdir()}
            (null,) = fds - {"anon_inode:[signalfd]"}
            assert null == "/dev/null" or null.startswith("/dev/.crito-null-")
            assert read_pod_process(at) == pause

            await kill_pause(pause.pid, pause.start_time)
            assert not is_alive(pause.pid, pause.start_time)
            assert in_namespace("uts", at / "uts", "hostname") == "web-0\n"  # the pins outlive it
            remove_pins(at)
            remove_pins(at)
            assert not at.exists()

    asyncio.run(main())


def test_the_pause_of_a_shared_pid_namespace_is_its_process_one_and_reaps(
    world: Any, pause_path: str, eventually: Any
) -> None:
    async def main() -> None:
        async with world() as w:
            at = pins(w)
            pause = await w.forks.make_pod(PodRequest("s", ("net", "ipc", "uts", "pid"), at, pause_path=pause_path))
            assert kernel.read_file(f"/proc/{pause.pid}/status").split("NSpid:")[1].split("\n")[0].split()[-1] == "1"

            in_namespace("pid", at / "pid", "sh", "-c", "sleep 0.1 & exit 0")  # an orphan of that namespace
            await eventually(lambda: not [s for s in kernel.processes() if s.parent == pause.pid])

            os.kill(pause.pid, signal.SIGTERM)
            await eventually(lambda: not is_alive(pause.pid, pause.start_time))

    asyncio.run(main())


def test_a_pod_with_a_user_namespace_maps_ids_and_sets_sysctls(world: Any, pause_path: str) -> None:
    async def main() -> None:
        async with world() as w:
            at = pins(w)
            mapping = (IdMapping(0, 200_000, 65_536),)

            pause = await w.forks.make_pod(
                PodRequest(
                    "s",
                    ("user", "net", "ipc", "uts", "pid"),
                    at,
                    hostname="u",
                    sysctls={"net.ipv4.ping_group_range": "0 0"},
                    uids=mapping,
                    gids=mapping,
                    pause_path=pause_path,
                )
            )

            assert kernel.read_file(f"/proc/{pause.pid}/uid_map").split() == ["0", "200000", "65536"]
            assert kernel.read_file(f"/proc/{pause.pid}/status").split("Uid:")[1].split()[0] == "200000"
            assert sorted(p.name for p in at.iterdir()) == ["ipc", "net", "pause.json", "pid", "user", "uts"]

    asyncio.run(main())


def test_a_pod_without_a_process_has_only_pins(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            at = pins(w)

            made = await w.forks.make_pod(PodRequest("s", ("net", "ipc", "uts"), at, keep_process=False))

            assert made.pid == 0
            assert read_pod_process(at) is None
            assert "LOOPBACK,UP" in in_namespace("net", at / "net", "ip", "-o", "link")
            for _ in range(100):
                if not await w.forks.children():
                    break
                await asyncio.sleep(0.02)
            assert await w.forks.children() == ()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sysctls": {"net.no_such_thing": "1"}}, "sysctl net.no_such_thing=1: No such file"),
        ({"sysctls": {"net.ipv4.ip_forward": "maybe"}}, "sysctl net.ipv4.ip_forward=maybe: Invalid argument"),
        ({"sysctls": {"vm.swappiness": "1"}}, "sysctl vm.swappiness: not of a namespace that this pod has"),
        ({"sysctls": {"net/../vm/swappiness": "1"}}, "sysctl net/../vm/swappiness: malformed"),
        ({"namespaces": ("net", "pid"), "sysctls": {"net.no_such_thing": "1"}}, "sysctl net.no_such_thing=1: No such"),
        ({"namespaces": ("net", "pid"), "cgroup_procs": ("/no/such/file",)}, "cgroup /no/such/file: No such file"),
        ({"hostname": "x" * 65}, "hostname x+: Invalid argument"),
        ({"pause_path": "/no/such/pause"}, "pause program /no/such/pause: No such file"),
        ({"pause_path": "/etc/passwd"}, "Permission denied|Exec format"),
        ({"cgroup_procs": ("/no/such/cgroup.procs",)}, "cgroup /no/such/cgroup.procs: No such file"),
        ({"namespaces": ("net", "time")}, "unknown namespaces time"),
        ({"namespaces": ("user",), "uids": (IdMapping(0, 0, 0),)}, "uid map 0 0 0: Invalid argument"),
    ],
)
def test_a_failed_pod_names_the_step_and_leaves_nothing(world: Any, change: dict[str, Any], text: str) -> None:
    async def main() -> None:
        async with world() as w:
            at = pins(w)
            wanted = {"namespaces": ("net", "uts"), **change}

            with pytest.raises(Error, match=text):
                await w.forks.make_pod(PodRequest("s", wanted.pop("namespaces"), at, **wanted))

            assert not at.exists()
            for _ in range(100):
                if not await w.forks.children():
                    break
                await asyncio.sleep(0.02)
            assert await w.forks.children() == ()
            assert list((w.run_dir / "orphans").iterdir()) == []

    asyncio.run(main())


def test_twenty_pods_at_once(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            paths = [w.path / f"pins{n}" for n in range(20)]
            for path in paths:
                path.mkdir()

            made = await asyncio.gather(
                *(w.forks.make_pod(PodRequest(str(n), ("net", "uts"), paths[n], hostname=f"h{n}")) for n in range(20))
            )

            assert len({pod.pid for pod in made}) == 20
            names = [in_namespace("uts", path / "uts", "hostname").strip() for path in paths]
            assert names == [f"h{n}" for n in range(20)]

            await asyncio.gather(*(kill_pause(pod.pid, pod.start_time) for pod in made))

    asyncio.run(main())


def test_a_pod_whose_daemon_went_away_meanwhile_is_undone_or_on_record(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            at = pins(w)
            task = asyncio.create_task(w.forks.make_pod(PodRequest("s", ("net",), at)))
            await asyncio.sleep(0)
            for _ in range(3):
                await asyncio.sleep(0)
            w.forks.close()
            with pytest.raises(Unavailable):
                await task

            await asyncio.sleep(0.3)
            found = read_pod_process(at) if at.exists() else None
            assert found is None or is_alive(found.pid, found.start_time)
            if found is not None:
                await kill_pause(found.pid, found.start_time)

    asyncio.run(main())


def test_a_second_daemon_life_finds_the_same_fork_server(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            w.forks.close()

            again = await ForkServer.ensure(w.run_dir)

            assert again.pid == w.forks.pid
            again.close()

    asyncio.run(main())


def test_another_versions_fork_server_is_replaced_and_keeps_its_children(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sleep", "1000"])
            old = w.forks.pid
            w.forks.close()
            monkeypatch.setattr(fork_server, "program", lambda: "another version")

            w.forks = await ForkServer.ensure(w.run_dir)

            assert w.forks.pid != old
            assert (await monitor.exec_sync({"args": ["true"], "cwd": "/", "env": ["PATH=/bin"]}, 10)).exit_code == 0
            assert is_alive(old, kernel.start_time(old))
            await monitor.kill(9)
            await monitor.wait_exit()
            for _ in range(200):
                if not is_alive(old, kernel.start_time(old)):
                    break
                await asyncio.sleep(0.02)
            assert not is_alive(old, kernel.start_time(old))

    asyncio.run(main())


def test_a_killed_fork_server_is_started_again_and_monitors_do_not_mind(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sh", "-c", "sleep 0.5; exit 9"])
            old = w.forks.pid

            os.kill(old, signal.SIGKILL)
            other = await w.started("d", ["true"])

            assert w.forks.pid != old
            assert (await other.wait_exit()).exit_code == 0
            assert (await monitor.wait_exit()).exit_code == 9

    asyncio.run(main())


def test_a_killed_zygote_is_replaced(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            zygotes = [s.pid for s in kernel.processes() if s.parent == w.forks.pid]
            assert len(zygotes) == 1

            os.kill(zygotes[0], signal.SIGKILL)
            await asyncio.sleep(0.1)
            monitor = await w.started("c", ["true"])

            assert (await monitor.wait_exit()).exit_code == 0

    asyncio.run(main())


def test_a_killed_monitor_is_noticed_and_the_fork_server_knows_the_exit(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sh", "-c", "sleep 0.7; exit 11"])
            init = (await monitor.status()).init
            assert init is not None

            os.kill(monitor.pid, signal.SIGKILL)

            with pytest.raises(Unavailable, match="monitor lost"):
                await asyncio.wait_for(monitor.wait_exit(), 5)
            assert is_alive(init.pid, init.start_time)
            ended = await asyncio.wait_for(wait_orphan_exit(w.run_dir, init.pid, init.start_time), 5)
            assert ended.exit_code == 11
            assert read_orphan_exit(w.run_dir, init.pid, init.start_time) == ended
            assert read_exit_record(w.directory("c")) is None
            with pytest.raises(Unavailable):
                await Monitor.connect(w.directory("c"))

    asyncio.run(main())


def test_a_monitor_killed_while_it_creates_is_told_at_once(world: Any, tmp_path: Path) -> None:
    async def main() -> None:
        async with world() as w:
            script = tmp_path / "slow-runtime"
            script.write_text("#!/bin/sh\nsleep 1\n")
            script.chmod(0o755)
            monitor = await w.forks.spawn_monitor(w.request("c", w.bundle("c", ["true"]), runtime=(str(script),)))
            task = asyncio.create_task(monitor.create(20))
            await asyncio.sleep(0.2)

            os.kill(monitor.pid, signal.SIGKILL)

            with pytest.raises(Unavailable, match="the monitor is gone"):
                await asyncio.wait_for(task, 2)

    asyncio.run(main())


def test_a_long_run_dir_is_no_obstacle(runtime: str, tmp_path: Path) -> None:
    async def main() -> None:
        run_dir = tmp_path / ("long-" * 30)
        forks = await ForkServer.ensure(run_dir)
        at = run_dir / "pins"
        at.mkdir()

        pause = await forks.make_pod(PodRequest("s", ("uts",), at))
        await kill_pause(pause.pid, pause.start_time)
        remove_pins(at)

        assert (run_dir / "forkserver.sock").stat().st_mode & 0o777 == 0o600
        for _ in range(100):
            if not await forks.children():
                break
            await asyncio.sleep(0.02)
        assert await forks.shutdown() == ()

    asyncio.run(main())


def test_a_fork_server_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "orphans").write_text("in the way")

    with pytest.raises(Unavailable, match=r"the fork server ended with 1: .*orphans"):
        asyncio.run(ForkServer.ensure(tmp_path))


def test_shutdown_with_children_tells_them_and_waits_for_their_end(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            at = pins(w)
            pause = await w.forks.make_pod(PodRequest("s", ("uts",), at))
            server, started = w.forks.pid, kernel.start_time(w.forks.pid)
            for _ in range(200):  # the process that made the pod is about to end
                if await w.forks.children() == (pause.pid,):
                    break
                await asyncio.sleep(0.01)

            assert await w.forks.shutdown() == (pause.pid,)
            assert is_alive(server, started)
            await kill_pause(pause.pid, pause.start_time)
            for _ in range(200):
                if not is_alive(server, started):
                    break
                await asyncio.sleep(0.02)

            assert not is_alive(server, started)

    asyncio.run(main())


def test_a_fork_server_that_is_terminated_goes_with_its_last_child_and_has_a_successor(world: Any) -> None:
    """Its SIGTERM is that of a node which shuts down, and which waits for whoever ignores it."""

    async def main() -> None:
        async with world() as w:
            pause = await w.forks.make_pod(PodRequest("s", ("uts",), pins(w)))
            server, started = w.forks.pid, kernel.start_time(w.forks.pid)

            os.kill(server, signal.SIGTERM)
            await asyncio.sleep(0.2)
            assert is_alive(server, started)
            beside = w.path / "pins-of-another"
            beside.mkdir()
            another = await w.forks.make_pod(PodRequest("t", ("uts",), beside))
            assert w.forks.pid != server
            await kill_pause(pause.pid, pause.start_time)
            for _ in range(200):
                if not is_alive(server, started):
                    break
                await asyncio.sleep(0.02)

            assert not is_alive(server, started)
            assert is_alive(another.pid, another.start_time)

    asyncio.run(main())


def test_only_exactly_that_process_is_killed() -> None:
    async def main() -> None:
        own = kernel.start_time(os.getpid())

        await kill_pause(os.getpid(), own + 1)
        await kill_pause(0, 0)
        await kill_pause(2**22 - 3, 1)

    asyncio.run(main())
