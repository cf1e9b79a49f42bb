"""The pod's place in the cgroup tree: the parent of its containers' cgroups, and the cgroup of its pause.

kubelet makes a pod's cgroup first and names it as the parent. A pod without one gets its own, with the cgroupfs driver;
with systemd its scopes go to the default slice.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from oci import trace
from oci.container_spec import SandboxId
from oci.linux import cgroup
from oci.linux.systemd import Systemd


class PodCgroups:
    def __init__(self, driver: cgroup.Driver, hierarchies: cgroup.Cgroups, systemd: Systemd, pool: Executor) -> None:
        self._driver = driver
        self._hierarchies = hierarchies
        self._systemd = systemd
        self._pool = pool

    def parent(self, wanted: str, id: SandboxId) -> tuple[str, bool]:
        """The parent for the pod's cgroups, and whether it is the pod's own. Raises InvalidArgument."""
        checked = cgroup.check_parent(self._driver, wanted)
        if wanted or self._driver is cgroup.Driver.SYSTEMD:
            return checked, False
        return cgroup.child_path(self._driver, checked, id), True

    def path(self, parent: str) -> str:
        """Where a pod's parent lies in every hierarchy: the cgroup whose numbers are the pod's."""
        return cgroup.parent_path(self._driver, parent)

    def pause_path(self, parent: str, id: SandboxId) -> str:
        """Where the pause's cgroup lies in every hierarchy, or that of the sandbox which the OCI runtime makes."""
        return cgroup.child_path(self._driver, parent, id)

    async def prepare(self, parent: str, id: SandboxId) -> tuple[str, ...]:
        """Make the pause's cgroup; the files into which its pid is to be written (none with systemd)."""
        if self._driver is cgroup.Driver.SYSTEMD:
            return ()
        path = cgroup.child_path(self._driver, parent, id)
        with trace.step("make cgroup"):
            await self._pooled(self._hierarchies.make, path)
        return tuple(str(file) for file in self._hierarchies.procs_files(path))

    async def place(self, parent: str, id: SandboxId, pause_pid: int) -> None:
        """With systemd, give the pause its scope. Raises Unavailable where systemd does not answer."""
        if self._driver is cgroup.Driver.SYSTEMD and pause_pid:
            await self._systemd.start_scope(
                cgroup.scope_name(id), pids=(pause_pid,), slice=parent, description=f"Crito pod sandbox {id[:13]}"
            )

    async def remove(self, parent: str, id: SandboxId) -> None:
        """Remove the pause's cgroup once it is empty; gone already is success."""
        if self._driver is cgroup.Driver.SYSTEMD:
            await self._systemd.stop_unit(cgroup.scope_name(id))
        else:
            with trace.step("remove cgroup"):
                await self._pooled(self._hierarchies.remove, cgroup.child_path(self._driver, parent, id))

    async def remove_parent(self, parent: str) -> None:
        """Remove a parent that was the pod's own, with what is left below it."""
        await self._pooled(self._hierarchies.remove, self.path(parent))

    async def _pooled(self, leaf: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, leaf, *arguments)
