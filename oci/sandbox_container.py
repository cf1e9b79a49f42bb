"""The pod sandbox that an OCI runtime makes itself, as gVisor's runsc does: a container of its own, in which the others
live.

    <directory>/config.json  rootfs/pause    its bundle
                monitor.sock  exit.json      its monitor's

Its process is watched, like a pause, by whoever asked for it.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oci import tiny_program
from oci.bundle import write_config
from oci.container_spec import ContainerId, SandboxId
from oci.errors import Error, Unavailable
from oci.fork_server import ForkServer, MonitorRequest
from oci.handlers import Handler, Handlers
from oci.linux import cgroup
from oci.monitor_client import Monitor
from oci.pause import PodProcess
from oci.spec import OCI_VERSION, pod_annotations

_log = logging.getLogger(__name__)

DELETE_TIMEOUT_S = 15.0
SETTLE_POLL_S = 0.1
PAUSE = "pause"


@dataclass(frozen=True, slots=True)
class SandboxContainer:
    """`directory` is the container's own, and need not exist."""

    id: SandboxId
    directory: Path
    handler: str
    name: str
    namespace: str
    uid: str
    hostname: str
    net_ns: str  # path of the pinned namespace; "" is the node's
    cgroup_parent: str
    annotations: Mapping[str, str]  # of the pod


class SandboxContainers:
    def __init__(
        self,
        driver: cgroup.Driver,
        cgroups: cgroup.Cgroups,
        handlers: Handlers,
        fork_server: ForkServer,
        create_timeout_s: float,
        pool: Executor,
    ) -> None:
        self._driver = driver
        self._cgroups = cgroups
        self._handlers = handlers
        self._fork_server = fork_server
        self._create_timeout_s = create_timeout_s
        self._pool = pool

    def serves(self, handler: str) -> bool:
        """Whether pods of this handler have such a sandbox. Raises InvalidArgument, Unavailable as `resolve` does."""
        return self._handlers.resolve(handler).runtime.makes_sandboxes

    async def make(self, wanted: SandboxContainer) -> PodProcess:
        """Create and start it; the sandbox's process comes back. `remove` undoes one that has failed half-way."""
        handler = self._handlers.resolve(wanted.handler)
        await self._pooled(self._write, wanted, handler)
        timeout_s = handler.create_timeout_s or self._create_timeout_s
        monitor = await self._fork_server.spawn_monitor(
            MonitorRequest(
                container_id=wanted.id,
                directory=wanted.directory,
                bundle=wanted.directory,
                runtime=handler.runtime.argv,
                create_options=handler.runtime.create_options,
                cgroup_procs=handler.monitor_cgroup_procs,
                has_helpers=True,
            )
        )
        try:
            init = await monitor.create(timeout_s)
            await monitor.start(timeout_s)
        finally:
            monitor.close()
        return PodProcess(init.pid, init.start_time)

    def _write(self, wanted: SandboxContainer, handler: Handler) -> None:
        rootfs = wanted.directory / "rootfs"
        rootfs.mkdir(parents=True, exist_ok=True)
        (rootfs / PAUSE).write_bytes(tiny_program.that_pauses())
        (rootfs / PAUSE).chmod(0o755)
        cgroups_path = cgroup.runtime_path(self._driver, wanted.cgroup_parent, wanted.id)
        write_config(wanted.directory, sandbox_config(wanted, cgroups_path, handler.annotations(wanted.annotations)))

    async def remove(self, wanted: SandboxContainer) -> None:
        """End and forget it, as much as there is of it; its cgroup and its directory stay, for who has made those."""
        await self._settle(wanted.directory)
        handler = self._handlers.find(wanted.handler)
        if handler is None:
            await self._pooled(self._end, wanted)
            return
        try:
            await handler.runtime.delete(ContainerId(wanted.id), DELETE_TIMEOUT_S)
        except Error as error:
            _log.warning("pod sandbox %s: %s; ending it without the runtime", wanted.id, error)
            await self._pooled(self._end, wanted)
        await self._pooled(handler.runtime.forget, wanted.id)

    async def _settle(self, directory: Path) -> None:
        """Wait for a create that a killed daemon had begun: what is not yet there cannot be deleted."""
        with contextlib.suppress(Unavailable):
            monitor = await Monitor.connect(directory)
            try:
                while True:
                    state = (await monitor.status()).state
                    if state != "creating":
                        break
                    await asyncio.sleep(SETTLE_POLL_S)
                if state == "new":
                    await monitor.shutdown()
            finally:
                monitor.close()

    def _end(self, wanted: SandboxContainer) -> None:
        self._cgroups.kill(cgroup.child_path(self._driver, wanted.cgroup_parent, wanted.id))

    async def _pooled(self, leaf: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, leaf, *arguments)


def sandbox_config(wanted: SandboxContainer, cgroups_path: str, annotations: Mapping[str, str]) -> dict[str, Any]:
    """The runtime-spec. No limits: those of the pod are in the cgroup above."""
    namespaces = [{"type": kind} for kind in ("mount", "pid", "ipc", "uts")]
    if wanted.net_ns:
        namespaces.append({"type": "network", "path": wanted.net_ns})
    ours = pod_annotations("sandbox", wanted.id, wanted.name, wanted.namespace, wanted.uid)
    return {
        "ociVersion": OCI_VERSION,
        "hostname": wanted.hostname,
        "root": {"path": "rootfs", "readonly": True},
        "process": {
            "args": [f"/{PAUSE}"],
            "cwd": "/",
            "env": [],
            "user": {"uid": 0, "gid": 0},
            "capabilities": {},
            "noNewPrivileges": True,
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
        ],
        "annotations": {**annotations, **ours},
        "linux": {"namespaces": namespaces, "cgroupsPath": cgroups_path},
    }
