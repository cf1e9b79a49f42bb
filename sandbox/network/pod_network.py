"""The story of a pod's network: planned, attached, checked, detached, and collected when its pod was lost.

Which networks there are is `networks.py`'s, how CNI is spoken `cni.py`'s. One pod's verbs run one after another, in
the order of their caller (CNI 1.1, section 3 "Lifecycle & Ordering").
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from oci.container_spec import SandboxId
from oci.errors import Error, FailedPrecondition, Unavailable

from .attachment import (
    Attachment,
    PodNetworkRequest,
    PodNetworkResult,
    mapped_ports,
    parameters,
    pod_result,
)
from .cni import Cni
from .conflist import NetworkConfig, from_json
from .interfaces import bring_up_loopback, is_netns
from .ledger import Entry, Key, Ledger
from .networks import Networks, NetworkStatus
from .orphans import end_orphans
from .plugin import Plugins

__all__ = ["Attachment", "NetworkStatus", "PodNetwork", "PodNetworkRequest", "PodNetworkResult"]

log = logging.getLogger(__name__)


class PodNetwork:
    """Attaches pods to the networks of a CNI configuration directory.

    `timeout_s` is for one run of one plugin; `max_conf_num` is how many of the directory's networks a pod gets, 0: all.
    """

    def __init__(
        self,
        conf_dir: Path,
        plugin_dirs: tuple[Path, ...],
        default_network: str = "",
        *,
        state_dir: Path,
        timeout_s: float = 90.0,
        max_conf_num: int = 1,
        poll_s: float = 5.0,
        grace_s: float = 15.0,
    ) -> None:
        self._cni = Cni(Plugins(plugin_dirs, timeout_s))
        self._networks = Networks(
            conf_dir,
            self._cni,
            default_network=default_network,
            max_conf_num=max_conf_num,
            poll_s=poll_s,
            grace_s=grace_s,
        )
        self._ledger = Ledger(state_dir)
        self._added: set[Key] = set()  # by this daemon: never garbage, whatever a caller of gc knew when it called
        self._gate = _Gate()

    async def start(self) -> None:
        """End what an earlier daemon's plugins still do, then read the networks; nothing of ours may run before."""
        entries = await asyncio.to_thread(self._ledger.read)
        await asyncio.to_thread(end_orphans, entries)
        await self._networks.start()

    async def close(self) -> None:
        await self._networks.close()

    def status(self) -> NetworkStatus:
        return self._networks.status

    def plan(self, request: PodNetworkRequest) -> tuple[Attachment, ...]:
        """The attachments that `add` shall make, for the sandbox's record.

        Raises Unavailable when no network is configured or a plugin of it is missing (then not even a cleanup could be
        run), InvalidArgument for an annotation that is wrong.
        """
        networks = self._networks.selected
        if not networks:
            raise Unavailable(f"pod {request.namespace}/{request.name}: {self._networks.status.message}")
        for network in networks:
            self._networks.require_plugins(network)
        parameters(request, "")
        _warn_of_unmapped_ports(request, networks)
        return tuple(
            Attachment(network.name, f"eth{number}", network.to_json()) for number, network in enumerate(networks)
        )

    async def add(self, request: PodNetworkRequest, attachments: tuple[Attachment, ...]) -> PodNetworkResult:
        """Attach the pod to each network in turn. After an error the caller owes a `remove`.

        Raises what a plugin said, with the verb, the pod, the network and the plugin.
        """
        async with self._gate.shared():
            await self._bring_up_loopback(request)
            return pod_result(tuple([await self._add(request, attachment) for attachment in attachments]))

    async def remove(self, request: PodNetworkRequest, attachments: tuple[Attachment, ...]) -> None:
        """Detach the pod from all networks, last first, as often as wanted; a netns that is gone is no error.

        A network that fails does not keep the others; in the end one error says all that went wrong.
        """
        errors: list[Error] = []
        async with self._gate.shared():
            for attachment in reversed(attachments):
                await _collect(self._remove(request, attachment), errors)
        _raise_all(errors)

    async def check(self, request: PodNetworkRequest, attachments: tuple[Attachment, ...]) -> None:
        """Ask the plugins whether the pod's network is as they made it; raises what the first that objects says."""
        async with self._gate.shared():
            for attachment in attachments:
                if attachment.result is None:
                    raise FailedPrecondition(f'network "{attachment.network}" of {_owner(request)} was never attached')
                network = from_json(attachment.conflist)
                await self._cni.check(network, parameters(request, attachment.ifname), json.loads(attachment.result))

    async def gc(self, valid: Mapping[SandboxId, tuple[Attachment, ...]]) -> None:
        """Release what belongs to no sandbox of `valid`: DEL for our lost attachments, then GC where plugins have it.

        Waits for running verbs and keeps others waiting. Everything is tried; one error says all that went wrong.
        """
        errors: list[Error] = []
        async with self._gate.alone():
            keep = self._added | {(id, attachment.ifname) for id, of_pod in valid.items() for attachment in of_pod}
            for entry in await asyncio.to_thread(self._ledger.read):
                if entry.key not in keep:
                    await _collect(self._remove(entry.request, entry.attachment), errors)
            entries = await asyncio.to_thread(self._ledger.read)
            for network in self._networks_of(valid):
                of_network = {
                    (id, a.ifname) for id, of_pod in valid.items() for a in of_pod if a.network == network.name
                }
                of_network |= {entry.key for entry in entries if entry.attachment.network == network.name}
                await _collect(self._cni.gc(network, sorted(of_network)), errors)
        _raise_all(errors)

    async def _add(self, request: PodNetworkRequest, attachment: Attachment) -> Attachment:
        entry = Entry(request, attachment)
        self._added.add(entry.key)
        await asyncio.to_thread(self._ledger.write, entry)  # before the call: a failed ADD may have allocated
        result = await self._cni.add(from_json(attachment.conflist), parameters(request, attachment.ifname))
        attached = replace(attachment, result=json.dumps(result))
        await asyncio.to_thread(self._ledger.write, Entry(request, attached))
        return attached

    async def _remove(self, request: PodNetworkRequest, attachment: Attachment) -> None:
        netns = request.netns if is_netns(request.netns) else ""
        await self._cni.delete(
            from_json(attachment.conflist),
            parameters(replace(request, netns=netns), attachment.ifname),
            json.loads(attachment.result) if attachment.result else None,
        )
        key = request.sandbox_id, attachment.ifname
        await asyncio.to_thread(self._ledger.forget, key)
        self._added.discard(key)

    async def _bring_up_loopback(self, request: PodNetworkRequest) -> None:
        try:
            await asyncio.to_thread(bring_up_loopback, request.netns)
        except OSError as error:
            raise Error(f"network namespace {request.netns} of {_owner(request)}: {error.strerror}") from error

    def _networks_of(self, valid: Mapping[SandboxId, tuple[Attachment, ...]]) -> list[NetworkConfig]:
        """The networks that are configured now, and those that are not any more but have a pod."""
        networks = {network.name: network for network in self._networks.all}
        for of_pod in valid.values():
            for attachment in of_pod:
                if attachment.network not in networks:
                    networks[attachment.network] = from_json(attachment.conflist)
        return list(networks.values())


class _Gate:
    """Lets many verbs run at once, or one garbage collection alone (section 3, the exception under "Lifecycle")."""

    def __init__(self) -> None:
        self._alone = asyncio.Lock()
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        async with self._alone:  # taken for a moment only: free unless a collection runs or waits
            self._running += 1
            self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if self._running == 0:
                self._idle.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        async with self._alone:
            await self._idle.wait()
            yield


def _warn_of_unmapped_ports(request: PodNetworkRequest, networks: tuple[NetworkConfig, ...]) -> None:
    """Not an error: on some nodes an agent of the network maps host ports without being asked through CNI."""
    asked = (plugin.get("capabilities", {}).get("portMappings") for network in networks for plugin in network.plugins)
    if (ports := mapped_ports(request)) and not any(asked):
        listed = ", ".join(f"{mapping.host_port}/{mapping.protocol}" for mapping in ports)
        log.warning("%s: no CNI plugin asks for port mappings; nothing maps the host ports %s", _owner(request), listed)


def _owner(request: PodNetworkRequest) -> str:
    return f"pod {request.namespace}/{request.name}"


async def _collect(step: Awaitable[None], errors: list[Error]) -> None:
    try:
        await step
    except Error as error:
        errors.append(error)


def _raise_all(errors: list[Error]) -> None:
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise Error("; ".join(str(error) for error in errors))
