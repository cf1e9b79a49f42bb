"""A world for one test: its own fork server, bundles made by hand, and the proof that nothing of it is left."""

import asyncio
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from oci.errors import Error
from oci.fork_server import ForkServer, MonitorRequest
from oci.monitor import kernel
from oci.monitor_client import Monitor
from oci.pause import kill_pause, read_pod_process, remove_pins

RUNTIMES = ["crun", "runc"]
BUSYBOX = Path("/usr/bin/busybox")
COMMANDS = "sh sleep echo cat yes dd true false setsid kill stty seq head printf wc tail usleep"
PROCESS: dict[str, Any] = {"env": ["PATH=/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "terminal": False}


class World:
    def __init__(self, path: Path, runtime: str, forks: ForkServer) -> None:
        self.path = path
        self.run_dir = path / "run"
        self.runtime = (f"/usr/bin/{runtime}", "--root", str(path / "runtime"), "--log-format", "json")
        self.forks = forks
        self.cgroup = f"/crito-test-{uuid.uuid4().hex[:12]}"
        self._containers: dict[str, Monitor] = {}

    def bundle(
        self, name: str, args: list[str], *, tty: bool = False, shared_pid: bool = False, memory: int = 0
    ) -> Path:
        bundle = self.path / f"bundle-{name}"
        make_bundle(bundle, args, f"{self.cgroup}/{name}", tty=tty, shared_pid=shared_pid, memory=memory)
        return bundle

    def request(self, name: str, bundle: Path, **more: Any) -> MonitorRequest:
        directory = self.run_dir / "containers" / name
        directory.mkdir(parents=True)
        log_path = more.pop("log_path", str(self.log_path(name)))
        runtime = more.pop("runtime", self.runtime)
        return MonitorRequest(self._id(name), directory, bundle, runtime, log_path=log_path, **more)

    def _id(self, name: str) -> str:
        return f"{name}-{self.cgroup[-12:]}"

    def directory(self, name: str) -> Path:
        return self.run_dir / "containers" / name

    def log_path(self, name: str) -> Path:
        return self.path / f"{name}.log"

    def log(self, name: str, stream: str = "stdout") -> bytes:
        """The container's output, put together again as the kubelet does it."""
        output = b""
        for record in self.log_path(name).read_bytes().splitlines(keepends=True):
            stamp, of, tag, content = record[:-1].split(b" ", 3)
            assert len(stamp) == 30 and stamp.endswith(b"Z")
            if of == stream.encode():
                output += content + (b"\n" if tag == b"F" else b"")
        return output

    async def created(self, name: str, args: list[str], **more: Any) -> Monitor:
        config = {key: more.pop(key) for key in ("tty", "shared_pid", "memory") if key in more}
        tty = {"tty": True} if config.get("tty") else {}
        monitor = await self.forks.spawn_monitor(self.request(name, self.bundle(name, args, **config), **tty, **more))
        self._containers[name] = monitor
        await monitor.create(20)
        return monitor

    async def started(self, name: str, args: list[str], **more: Any) -> Monitor:
        monitor = await self.created(name, args, **more)
        await monitor.start(20)
        return monitor

    async def close(self) -> None:
        for name, monitor in self._containers.items():
            monitor.close()
            command = [*self.runtime, "delete", "--force", self._id(name)]
            await asyncio.to_thread(subprocess.run, command, capture_output=True, check=False)
        for pins in self.path.glob("pins*"):
            pause = read_pod_process(pins)
            if pause is not None:
                await kill_pause(pause.pid, pause.start_time)
            remove_pins(pins)
        for _ in range(200):
            if not await self.forks.children():
                break
            await asyncio.sleep(0.05)
        assert await self.forks.shutdown() == ()
        self._assert_nothing_is_left()

    def _assert_nothing_is_left(self) -> None:
        assert str(self.path) not in Path("/proc/self/mountinfo").read_text()
        assert [command for command in _commands() if str(self.path) in command] == []
        for hierarchy in Path("/sys/fs/cgroup").iterdir():
            ours = hierarchy / self.cgroup.strip("/")
            if ours.exists():
                assert list(ours.glob("*/")) == []
                ours.rmdir()  # the parent that the runtime made for us


def _commands() -> list[str]:
    """The command lines of all processes that are alive."""
    found = []
    for stat in kernel.processes():
        if stat.state not in "ZX":
            try:
                found.append(Path(f"/proc/{stat.pid}/cmdline").read_text(errors="replace"))
            except OSError:
                continue
    return found


def make_bundle(
    bundle: Path, args: list[str], cgroup: str, *, tty: bool = False, shared_pid: bool = False, memory: int = 0
) -> None:
    binaries = bundle / "rootfs" / "bin"
    for folder in (binaries, bundle / "rootfs/proc", bundle / "rootfs/dev", bundle / "rootfs/tmp"):
        folder.mkdir(parents=True)
    os.link(BUSYBOX, binaries / "busybox") if _same_device(BUSYBOX, binaries) else shutil.copy(BUSYBOX, binaries)
    for command in COMMANDS.split():
        (binaries / command).symlink_to("busybox")
    namespaces = ["mount", "ipc", "uts", "network", *([] if shared_pid else ["pid"])]
    mounts = [
        ("/proc", "proc", []),
        ("/dev", "tmpfs", ["nosuid", "mode=755"]),
        ("/dev/pts", "devpts", ["newinstance", "ptmxmode=0666", "mode=0620"]),
    ]
    memory_limit: Mapping[str, Any] = {"memory": {"limit": memory, "swap": memory}} if memory else {}
    config = {
        "ociVersion": "1.0.2",
        "process": {**PROCESS, "terminal": tty, "args": args, "oomScoreAdj": 100},
        "root": {"path": "rootfs"},
        "mounts": [{"destination": d, "type": t, "source": t, "options": o} for d, t, o in mounts],
        "linux": {
            "cgroupsPath": cgroup,
            "namespaces": [{"type": name} for name in namespaces],
            "resources": memory_limit,
        },
    }
    (bundle / "config.json").write_text(json.dumps(config))


def _same_device(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev


def _why_not(runtime: str, path: Path) -> str:
    """Why this runtime cannot run a container here; empty if it can."""
    if os.geteuid() != 0:
        return "needs root"
    if not Path(f"/usr/bin/{runtime}").exists() or not BUSYBOX.exists():
        return f"{runtime} or a static busybox is not installed"
    name = f"crito-test-{uuid.uuid4().hex[:12]}"
    make_bundle(path / "bundle", ["true"], f"/{name}")
    run = subprocess.run(
        [f"/usr/bin/{runtime}", "--root", str(path / "state"), "run", "--bundle", str(path / "bundle"), name],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    return f"{runtime} does not run here: {run.stderr.strip()}" if run.returncode else ""


_reasons: dict[str, str] = {}


def _reason(name: str, temporary: pytest.TempPathFactory) -> str:
    if name not in _reasons:
        _reasons[name] = _why_not(name, temporary.mktemp(f"canary-{name}"))
    return _reasons[name]


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    name = str(request.param)
    reason = _reason(name, tmp_path_factory)
    if reason:
        pytest.skip(reason)
    return name


@pytest.fixture
def any_runtime(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first that runs here."""
    for name in RUNTIMES:
        if not _reason(name, tmp_path_factory):
            return name
    pytest.skip("; ".join(_reasons.values()))


WorldMaker = Callable[[], AbstractAsyncContextManager[World]]


@pytest.fixture
def world(tmp_path: Path, runtime: str) -> WorldMaker:
    """`async with world() as w:` in each test; leaving it checks that nothing is left."""

    @asynccontextmanager
    async def make() -> AsyncIterator[World]:
        made = World(tmp_path, runtime, await ForkServer.ensure(tmp_path / "run"))
        try:
            yield made
        finally:
            await made.close()

    return make


@pytest.fixture
def process() -> Callable[..., dict[str, Any]]:
    return lambda *args, **more: {**PROCESS, "args": list(args), **more}


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], Any]:
    async def wait(claim: Callable[[], bool], timeout_s: float = 10.0) -> None:
        for _ in range(int(timeout_s / 0.02)):
            if claim():
                return
            await asyncio.sleep(0.02)
        raise Error("it never came true")

    return wait
