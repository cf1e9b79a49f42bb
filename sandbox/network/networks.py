"""Knows which networks pods are attached to and whether that would work now, from the directory and CNI STATUS."""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from oci.errors import Error

from .cni import Cni
from .conflist import Directory, NetworkConfig, read_directory
from .watch import DirectoryWatch

log = logging.getLogger(__name__)

SETTLE_S = 0.1  # files tend to come in groups, and a new one may still be being written
PROBE_S = 10.0  # for STATUS and VERSION
NOT_READY = "NetworkPluginNotReady"  # the reason that kubelet's users know


@dataclass(frozen=True, slots=True)
class NetworkStatus:
    """Whether a pod could be given its network now; when not, `message` names the directory and what is wrong."""

    ready: bool
    reason: str = ""
    message: str = ""


class Networks:
    """The networks of one configuration directory; answers are from memory.

    What the directory says counts at once. A plugin that is missing or says no makes a network that was ready unready
    only after `grace_s`: an upgrade of the plugins passes in less, and would otherwise evict the node's pods.
    """

    def __init__(
        self, conf_dir: Path, cni: Cni, *, default_network: str, max_conf_num: int, poll_s: float, grace_s: float
    ) -> None:
        self._conf_dir = conf_dir
        self._cni = cni
        self._default_network = default_network
        self._max_conf_num = max_conf_num
        self._poll_s = poll_s
        self._grace_s = grace_s
        self._directory = Directory(problems=(f"{conf_dir} was not read yet",))
        self._status = NetworkStatus(False, NOT_READY, f"{conf_dir} was not read yet")
        self._last_ready = float("-inf")
        self._versions: dict[tuple[str, int, int], frozenset[str]] = {}
        self._changed = asyncio.Event()
        self._watch = DirectoryWatch((conf_dir, *cni.plugins.directories), self._changed.set)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the directory once, then follow it. What is wrong in it shows in `status`, never here."""
        self._watch.start()
        await self.refresh()
        self._task = asyncio.create_task(self._follow(), name="cni-networks")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        self._watch.close()

    @property
    def status(self) -> NetworkStatus:
        return self._status

    @property
    def all(self) -> tuple[NetworkConfig, ...]:
        return self._directory.networks

    @property
    def selected(self) -> tuple[NetworkConfig, ...]:
        """The networks of a new pod, its primary one first; () when the primary one is not there."""
        networks = self._directory.networks
        if self._default_network:
            networks = tuple(sorted(networks, key=lambda network: network.name != self._default_network))
            if not networks or networks[0].name != self._default_network:
                return ()
        return networks[: self._max_conf_num] if self._max_conf_num > 0 else networks

    async def refresh(self) -> None:
        before = self._directory, self._status.ready
        directory = await asyncio.to_thread(read_directory, self._conf_dir)
        negotiated = [await self._negotiated(network) for network in directory.networks]
        self._directory = replace(directory, networks=tuple(negotiated))
        self._status = await self._judge()
        if before != (self._directory, self._status.ready):
            self._log()

    async def _follow(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s):
                    await self._changed.wait()
                await asyncio.sleep(SETTLE_S)
            self._changed.clear()
            try:
                await self.refresh()
            except Exception:
                log.exception("reading the CNI networks of %s failed", self._conf_dir)

    async def _judge(self) -> NetworkStatus:
        if wrong := self._wrong_in_directory():
            return NetworkStatus(False, NOT_READY, wrong)
        now = time.monotonic()
        if wrong := await self._wrong_in_plugins():
            in_grace = self._status.ready and now - self._last_ready < self._grace_s
            return self._status if in_grace else NetworkStatus(False, NOT_READY, wrong)
        self._last_ready = now
        return NetworkStatus(True)

    def _wrong_in_directory(self) -> str:
        if self.selected:
            return ""
        names = ", ".join(network.name for network in self._directory.networks)
        if names:
            text = f'no network "{self._default_network}" (default_network) in {self._conf_dir}, only {names}'
        else:
            text = f"no CNI network configuration (.conflist, .conf, .json) in {self._conf_dir}"
        return "; ".join([text, *self._directory.problems])

    async def _wrong_in_plugins(self) -> str:
        for network in self.selected:
            try:
                self.require_plugins(network)
                await self._cni.status(network, PROBE_S)
            except Error as error:
                return f'network "{network.name}" of {self._conf_dir} is not ready: {error}'
        return ""

    def require_plugins(self, network: NetworkConfig) -> None:
        """Raises Unavailable, which names the first plugin of `network` that is in none of the directories."""
        for plugin in _executables(network):
            self._cni.plugins.find(plugin)

    async def _negotiated(self, network: NetworkConfig) -> NetworkConfig:
        """The network in the highest version that it and all its plugins allow ("Version considerations")."""
        if len(network.versions) == 1:
            return network
        spoken = [await self._spoken_by(plugin) for plugin in _executables(network)]
        common = [version for version in network.versions if all(s is None or version in s for s in spoken)]
        return replace(network, version=common[0]) if common else network

    async def _spoken_by(self, plugin: str) -> frozenset[str] | None:
        """None when the plugin cannot be asked; whoever runs it will see why."""
        try:
            stat = (path := self._cni.plugins.find(plugin)).stat()
            key = (str(path), stat.st_mtime_ns, stat.st_ino)
            if key not in self._versions:
                self._versions[key] = await self._cni.versions(plugin, PROBE_S)
            return self._versions[key]
        except (Error, OSError) as error:
            log.debug("the versions of CNI plugin %s are unknown: %s", plugin, error)
            return None

    def _log(self) -> None:
        for problem in self._directory.problems:
            log.warning("CNI: %s", problem)
        if self._status.ready:
            used = ", ".join(f"{network.name} (CNI {network.version})" for network in self.selected)
            log.info("pods are attached to: %s", used)
        else:
            log.warning("pods cannot be attached to a network: %s", self._status.message)


def _executables(network: NetworkConfig) -> Iterator[str]:
    """The plugins of the chain, and those that they delegate address management to."""
    for plugin in network.plugins:
        yield plugin["type"]
        ipam = plugin.get("ipam")
        if isinstance(ipam, dict) and isinstance(ipam.get("type"), str):
            yield ipam["type"]
