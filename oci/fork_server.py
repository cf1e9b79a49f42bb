"""The daemon's side of the fork server: asked for pods' namespaces and for monitors."""

import asyncio
import contextlib
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from oci import pidfd
from oci.container_spec import IdMapping
from oci.errors import Unavailable
from oci.lasting_server import LastingServer
from oci.monitor import kernel
from oci.monitor.forkserver import SOCKET
from oci.monitor_client import MONITOR_SOCKET, Monitor
from oci.monitor_connection import NotSent, listen
from oci.pause import PodProcess
from oci.version import VERSION

START_TIMEOUT_S = 30.0
DEFAULT_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


@dataclass(frozen=True, slots=True)
class PodRequest:
    """The namespaces of a pod. `pin_dir` exists and is empty; the pins are named like the namespaces."""

    sandbox_id: str
    namespaces: tuple[str, ...]  # of net, ipc, uts, pid, user; what is not here is the node's
    pin_dir: Path
    hostname: str = ""
    sysctls: Mapping[str, str] = field(default_factory=dict)
    uids: tuple[IdMapping, ...] = ()  # with "user"
    gids: tuple[IdMapping, ...] = ()
    pause_path: str = ""  # a static program such as catatonit; "" for the fork server's own
    keep_process: bool = True
    cgroup_procs: tuple[str, ...] = ()  # cgroup.procs files that take the pause
    oom_score_adj: int = -998  # raised to what the kernel permits


@dataclass(frozen=True, slots=True)
class MonitorRequest:
    """One container's monitor. `directory` exists; it takes the socket and the exit record."""

    container_id: str
    directory: Path
    bundle: Path
    runtime: tuple[str, ...]  # program and global options, as ("/usr/bin/crun", "--root", …, "--log-format", "json")
    log_path: str = ""  # "" keeps no log
    log_max_bytes: int = 0  # of one file; over it output is dropped until the log is reopened. 0: no limit
    log_line_bytes: int = 16 * 1024  # longer lines are split
    tty: bool = False
    stdin: bool = False
    stdin_once: bool = False
    create_command: tuple[str, ...] = ("create",)  # or the one that restores a checkpoint, with its options
    create_options: tuple[str, ...] = ()  # such as "--no-pivot"
    cgroup_procs: tuple[str, ...] = ()  # cgroup.procs files that take the monitor
    oom_score_adj: int = -999  # raised to what the kernel permits; what the monitor starts does not inherit it
    exec_cgroup: bool = True  # on cgroup v2 an exec gets a sub-cgroup; the runtime must know `exec --cgroup`
    in_sandbox: bool = False  # its process is its pod's sandbox: the runtime's `wait` tells its end, `kill` ends it
    has_helpers: bool = False  # the runtime leaves processes of its own, which it ends when it deletes the container
    environment: Mapping[str, str] = field(default_factory=lambda: dict(DEFAULT_ENVIRONMENT))  # the runtime's


def program() -> str:
    """What makes one fork server another: our version, the text of its modules, and the Python that runs it."""
    digest = hashlib.sha256(sys.version.encode())
    for module in sorted((Path(__file__).parent / "monitor").glob("*.py")):
        digest.update(module.read_bytes())
    return f"{VERSION}-{digest.hexdigest()[:16]}"


class ForkServer(LastingServer):
    """Its children mind neither its death nor its replacement."""

    @classmethod
    async def ensure(cls, run_dir: Path) -> "ForkServer":
        """Raises Unavailable when it cannot be started; its last words are in the text."""
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        server = cls(run_dir, SOCKET, "fork server", program())
        await server._connected()
        return server

    async def make_pod(self, request: PodRequest) -> PodProcess:
        """The pod's namespaces, made and pinned. On an error, which names the step, nothing of them stays."""
        asked = {
            "namespaces": list(request.namespaces),
            "pin_dir": str(request.pin_dir),
            "hostname": request.hostname,
            "sysctls": dict(request.sysctls),
            "uid_maps": [[m.container_id, m.host_id, m.length] for m in request.uids],
            "gid_maps": [[m.container_id, m.host_id, m.length] for m in request.gids],
            "pause_path": request.pause_path,
            "keep_process": request.keep_process,
            "cgroup_procs": list(request.cgroup_procs),
            "oom_score_adj": request.oom_score_adj,
        }
        try:
            answer, _ = await (await self._connected()).call("make_pod", timeout_s=60.0, pod=asked)
        except NotSent:
            answer, _ = await (await self._connected()).call("make_pod", timeout_s=60.0, pod=asked)
        return PodProcess(answer["pid"], answer["start_time"])

    async def spawn_monitor(self, request: MonitorRequest) -> "Monitor":
        """A monitor that awaits its orders, connected. It ends by itself if none come."""
        try:
            await self._fork_monitor(request)
        except Unavailable:  # the fork server has just died: a new one can do it; a monitor unused ends by itself
            await self._fork_monitor(request)
        return await Monitor.connect(request.directory)

    async def _fork_monitor(self, request: MonitorRequest) -> None:
        connection = await self._connected()
        listener = listen(request.directory, MONITOR_SOCKET)
        with listener:
            config = {
                "container_id": request.container_id,
                "directory": str(request.directory),
                "bundle": str(request.bundle),
                "runtime": list(request.runtime),
                "environment": dict(request.environment),
                "log_path": request.log_path,
                "log_max_bytes": request.log_max_bytes,
                "log_line_bytes": request.log_line_bytes,
                "tty": request.tty,
                "stdin": request.stdin,
                "stdin_once": request.stdin_once,
                "create_command": list(request.create_command),
                "create_options": list(request.create_options),
                "cgroup_procs": list(request.cgroup_procs),
                "oom_score_adj": request.oom_score_adj,
                "exec_cgroup": request.exec_cgroup,
                "in_sandbox": request.in_sandbox,
                "has_helpers": request.has_helpers,
            }
            await connection.call("monitor", fds={"listener": listener.fileno()}, config=config)

    async def children(self) -> tuple[int, ...]:
        """The pids of the pauses, monitors and orphans below it."""
        answer, _ = await (await self._connected()).call("status")
        return tuple(answer["children"])

    async def shutdown(self) -> tuple[int, ...]:
        """Tell it to end: at once, or as soon as these processes, its children, have ended. Starts none to do so."""
        if self._connection is None or not self._connection.is_open:
            return ()
        answer, _ = await self._connection.call("retire")
        children = tuple(answer["children"])
        if not children:
            await _wait_gone(self.pid, 10.0)
        self.close()
        return children

    async def _start(self, log: int) -> None:
        main = Path(__file__).parent / "monitor" / "__main__.py"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-OO", str(main), str(self._run_dir), self._program),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=log,
            env={**DEFAULT_ENVIRONMENT, "LC_ALL": "C.UTF-8", "LD_BIND_NOW": "1"},  # bound once, not per fork
            start_new_session=True,
        )
        try:
            status = await asyncio.wait_for(process.wait(), START_TIMEOUT_S)
        except TimeoutError as error:
            process.kill()
            raise Unavailable(
                f"the {self._name} did not start within {START_TIMEOUT_S:g} s; see {self._log}"
            ) from error
        if status != 0:
            raise Unavailable(f"the {self._name} ended with {status}: {self._last_words()}")


async def _wait_gone(pid: int, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(pidfd.wait_process(pid, kernel.start_time(pid)), timeout_s)
