"""The story of every pod sandbox: run, stop, remove, and what becomes of it after a restart.

One teardown serves failure, stop, removal and recovery: what a pod may have is derived from its record, and taking it
away is idempotent.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oci import pidfd
from oci.background import Background, until_done
from oci.clock import Clock
from oci.container_spec import NamespaceMode, PodEnvironment, Resources, SandboxId
from oci.containers import Containers
from oci.errors import AlreadyExists, Error, FailedPrecondition, NotFound
from oci.events import Bus, Event, EventKind
from oci.fork_server import ForkServer, PodRequest
from oci.linux import proc
from oci.pause import PodProcess, kill_pause, read_pod_process, remove_pins
from oci.sandbox_container import SandboxContainer, SandboxContainers
from oci.state import Records, Unreadable
from sandbox import files, namespaces
from sandbox.cgroup import PodCgroups
from sandbox.hooks import NoSandboxHooks, SandboxHooks
from sandbox.network.attachment import PodNetworkRequest
from sandbox.network.pod_network import PodNetwork
from sandbox.sandbox import Sandbox, SandboxRecord, SandboxState
from sandbox.spec import SandboxSpec

_log = logging.getLogger(__name__)

PAUSE_OOM_SCORE_ADJ = -998  # the pause goes last: without it the pod's PID namespace is gone
RELEASE_WAIT_S = 20.0  # for the OCI runtime to delete a pod's containers before the sandbox that they live in
DISCARD_WAIT_S = 5.0  # how long a failed RunPodSandbox waits for its own cleanup before it answers


@dataclass(frozen=True, slots=True)
class SandboxSettings:
    """What the configuration says of pod sandboxes; directories are absolute."""

    run_dir: Path  # …/sandboxes/<id>: the pod's files and, in ns/, its pinned namespaces
    drop_pause: bool
    pause_path: str  # static program that becomes the pause; "" for the built-in one
    default_sysctls: tuple[tuple[str, str], ...]


class Sandboxes:
    def __init__(
        self,
        settings: SandboxSettings,
        records: Records[SandboxRecord],
        containers: Containers,
        fork_server: ForkServer,
        network: PodNetwork,
        cgroups: PodCgroups,
        runtime_sandboxes: SandboxContainers,
        events: Bus[Event],
        clock: Clock,
        mounts: Executor,
    ) -> None:
        self._settings = settings
        self._records = records
        self._containers = containers
        self._fork_server = fork_server
        self._network = network
        self._cgroups = cgroups
        self._runtime_sandboxes = runtime_sandboxes
        self._events = events
        self._clock = clock
        self._mounts = mounts
        self._by_id: dict[SandboxId, Sandbox] = {}
        self._by_name: dict[str, SandboxId] = {}
        self._background = Background()
        self.hooks: SandboxHooks = NoSandboxHooks()

    # Lookup: from memory, never waiting

    def all(self) -> list[Sandbox]:
        """Every pod sandbox that lists show."""
        return [sandbox for sandbox in self._by_id.values() if sandbox.is_visible]

    def known(self) -> list[Sandbox]:
        """Every pod sandbox of which anything may exist, also those being made or removed."""
        return list(self._by_id.values())

    def known_ids(self) -> list[SandboxId]:
        """Every pod sandbox of which anything may exist, also those being made or removed."""
        return list(self._by_id)

    def find(self, id: str) -> Sandbox | None:
        """The visible pod sandbox with this id, or with the only id that begins so."""
        sandbox = self._by_id.get(SandboxId(id))
        if sandbox is None and id:
            matches = [each for each in self.all() if each.id.startswith(id)]
            sandbox = matches[0] if len(matches) == 1 else None
        return sandbox if sandbox is not None and sandbox.is_visible else None

    def get(self, id: str) -> Sandbox:
        sandbox = self.find(id)
        if sandbox is None:
            raise NotFound(f"pod sandbox {id!r}: there is none")
        return sandbox

    def record(self, id: SandboxId) -> SandboxRecord | None:
        """What is recorded of a pod sandbox, whether lists show it or not."""
        sandbox = self._by_id.get(id)
        return sandbox.record if sandbox is not None else None

    def ready(self, id: str) -> Sandbox:
        """The pod sandbox, which containers can be made in. Raises NotFound or FailedPrecondition."""
        sandbox = self.get(id)
        if sandbox.state is not SandboxState.READY:
            raise FailedPrecondition(f"pod sandbox {sandbox.id} is {sandbox.state}")
        return sandbox

    def environment(self, sandbox: Sandbox) -> PodEnvironment:
        """What the pod gives each of its containers."""
        record = sandbox.record
        pinned = namespaces.pinned(record.spec, self._pin_dir(record.id), runtime_sandbox=record.runtime_sandbox)
        pod_files = files.paths(record.spec, self._directory(record.id))
        security = record.spec.security
        return PodEnvironment(
            sandbox_id=record.id,
            hostname=record.hostname,
            net_ns=pinned.net,
            ipc_ns=pinned.ipc,
            uts_ns=pinned.uts,
            pid_ns=pinned.pid,
            user_ns=pinned.user,
            cgroup_parent=record.cgroup_parent,
            resolv_conf_path=pod_files.resolv_conf,
            hostname_path=pod_files.hostname,
            hosts_path=pod_files.hosts,
            shm_path=pod_files.shm,
            log_directory=record.spec.log_directory,
            privileged=security.privileged,
            user_namespace=security.user_namespace,
            selinux=security.selinux,
            annotations=record.spec.annotations,
            runtime_sandbox=record.runtime_sandbox,
        )

    def cgroup_path(self, sandbox: Sandbox) -> str:
        """The cgroup whose numbers are the pod's."""
        return self._cgroups.path(sandbox.record.cgroup_parent)

    def process_cgroup_path(self, sandbox: Sandbox) -> str:
        """The cgroup of the pod's pause; of all its processes where the OCI runtime has made the sandbox."""
        return self._cgroups.pause_path(sandbox.record.cgroup_parent, sandbox.id)

    def has_own_cgroup(self, sandbox: Sandbox) -> bool:
        """Whether `cgroup_path` holds this pod alone: kubelet's pod cgroup or ours, not the default slice."""
        return bool(sandbox.record.spec.cgroup_parent) or sandbox.record.owns_cgroup_parent

    def netns(self, sandbox: Sandbox) -> str:
        """The path of the pod's network namespace; "" where the pod is on the node's network, or stopped."""
        path = self._pin_dir(sandbox.id) / "net"
        has_one = sandbox.record.spec.security.network is NamespaceMode.POD
        return str(path) if has_one and sandbox.record.stopped_at is None else ""

    # Run

    async def run(self, spec: SandboxSpec, handler: str) -> Sandbox:
        """Make a pod sandbox that is ready. On any error nothing of it stays."""
        id = SandboxId(secrets.token_hex(32))
        cgroup_parent, owned = self._cgroups.parent(spec.cgroup_parent, id)
        namespaces.normal_sysctls(spec)
        runtime_sandbox = self._runtime_sandboxes.serves(handler)
        if runtime_sandbox:
            namespaces.require_possible(spec, handler)
        record = SandboxRecord(
            id=id,
            spec=spec,
            runtime_handler=handler,
            hostname=_hostname(spec),
            cgroup_parent=cgroup_parent,
            owns_cgroup_parent=owned,
            requested_at=self._clock.now(),
            overhead=spec.overhead,
            resources=spec.resources,
            runtime_sandbox=runtime_sandbox,
        )
        existing = self._named(record)
        if existing is not None:
            return existing
        sandbox = self._by_id[id] = Sandbox(record)
        self._by_name[record.full_name] = id
        try:
            await self._make(sandbox)
        except Exception:  # a cancelled one is left to the next start, which finds its record
            self._forget_name(record)
            discard = self._background.start(self._discard(sandbox), f"discard pod sandbox {id}")
            await asyncio.wait([discard], timeout=DISCARD_WAIT_S)
            raise
        self._publish(EventKind.CREATED, sandbox)
        self._publish(EventKind.STARTED, sandbox)
        return sandbox

    def _named(self, record: SandboxRecord) -> Sandbox | None:
        """The pod sandbox that an earlier, equal request has made; its caller may have given up before the answer."""
        id = self._by_name.get(record.full_name)
        if id is None:
            return None
        existing = self._by_id[id]
        if existing.record.spec == record.spec and existing.state is SandboxState.READY:
            return existing
        spec = record.spec
        raise AlreadyExists(
            f"pod sandbox {spec.namespace}/{spec.name} (uid {spec.uid}, attempt {spec.attempt}):"
            f" {id} is called so and is {existing.state}"
        )

    async def _make(self, sandbox: Sandbox) -> None:
        id, spec = sandbox.id, sandbox.record.spec
        await self._set(sandbox, sandbox.record)
        await self._pooled(self._make_directories, sandbox.record)
        await self._make_namespaces(sandbox)
        if spec.security.network is NamespaceMode.POD:
            await self._join_networks(sandbox)
        record = sandbox.record
        await self._pooled(files.write, spec, self._directory(id), record.hostname, record.ips)
        if record.runtime_sandbox:
            sandbox_process = await self._runtime_sandboxes.make(self._runtime_sandbox(record))
            await self._set_pause(sandbox, sandbox_process)
        await self.hooks.running(sandbox)
        await self._set(sandbox, replace(sandbox.record, ready_at=self._clock.now()))
        self._watch_pause(sandbox)

    def _make_directories(self, record: SandboxRecord) -> None:
        self._pin_dir(record.id).mkdir(parents=True)
        if record.spec.log_directory:
            Path(record.spec.log_directory).mkdir(parents=True, exist_ok=True)

    async def _make_namespaces(self, sandbox: Sandbox) -> None:
        """The pod's namespaces, with a pause in them where nothing else will be."""
        record, spec = sandbox.record, sandbox.record.spec
        kinds = namespaces.wanted(spec, runtime_sandbox=record.runtime_sandbox)
        has_pause = not record.runtime_sandbox and ("pid" in kinds or not self._settings.drop_pause)
        mappings = spec.security.user_namespace
        pause = await self._fork_server.make_pod(
            PodRequest(
                sandbox_id=record.id,
                namespaces=kinds,
                pin_dir=self._pin_dir(record.id),
                hostname=record.hostname if "uts" in kinds else "",
                sysctls=self._sysctls(spec, kinds),
                uids=mappings.uids if mappings else (),
                gids=mappings.gids if mappings else (),
                pause_path=self._settings.pause_path,
                keep_process=has_pause,
                cgroup_procs=await self._cgroups.prepare(record.cgroup_parent, record.id),
                oom_score_adj=PAUSE_OOM_SCORE_ADJ,
            )
        )
        await self._set_pause(sandbox, pause)
        await self._cgroups.place(record.cgroup_parent, record.id, pause.pid)

    async def _set_pause(self, sandbox: Sandbox, process: PodProcess) -> None:
        await self._set(sandbox, replace(sandbox.record, pause_pid=process.pid, pause_start_time=process.start_time))

    def _runtime_sandbox(self, record: SandboxRecord) -> SandboxContainer:
        return SandboxContainer(
            id=record.id,
            directory=self._directory(record.id) / "sandbox",
            handler=record.runtime_handler,
            name=record.spec.name,
            namespace=record.spec.namespace,
            uid=record.spec.uid,
            hostname=record.hostname,
            net_ns=namespaces.pinned(record.spec, self._pin_dir(record.id), runtime_sandbox=True).net,
            cgroup_parent=record.cgroup_parent,
            annotations=record.spec.annotations,
        )

    def _sysctls(self, spec: SandboxSpec, kinds: tuple[str, ...]) -> dict[str, str]:
        """The pod's sysctls over those that the configuration gives to every pod with the namespace for them."""
        result = {}
        for name, value in self._settings.default_sysctls:
            with contextlib.suppress(Error):
                result.update(namespaces.normal_sysctls(replace(spec, sysctls={name: value})))
        result.update(namespaces.normal_sysctls(spec))
        return {name: value for name, value in result.items() if namespaces.kind_of_sysctl(name) in kinds}

    async def _join_networks(self, sandbox: Sandbox) -> None:
        request = self._network_request(sandbox)
        planned = self._network.plan(request)
        await self._set(sandbox, replace(sandbox.record, attachments=planned))  # a failed ADD may have allocated
        result = await self._network.add(request, planned)
        await self._set(sandbox, replace(sandbox.record, attachments=result.attachments, ips=result.ips))

    # Stop

    async def stop(self, sandbox: Sandbox) -> None:
        """End every process of the pod and give its addresses back. Stopped already is success."""
        containers = [each for each in self._containers.of(sandbox.id) if not each.exited.is_set()]
        await asyncio.gather(*(self._containers.stop(each, 0) for each in containers))
        if sandbox.record.runtime_sandbox:  # which can delete a container only while it lives
            await self._until_released(sandbox)
        async with sandbox.lock:
            if sandbox.record.stopped_at is not None:
                return
            await self.hooks.stopping(sandbox)
            await self._release(sandbox)
            await self._set(sandbox, replace(sandbox.record, stopped_at=self._clock.now()))
        self._publish(EventKind.STOPPED, sandbox)

    async def _until_released(self, sandbox: Sandbox) -> None:
        releases = [asyncio.create_task(each.released.wait()) for each in self._containers.of(sandbox.id)]
        if releases:
            _, late = await asyncio.wait(releases, timeout=RELEASE_WAIT_S)
            for each in late:
                each.cancel()

    async def _release(self, sandbox: Sandbox) -> None:
        """The runtime's sandbox, network, pause, namespaces, cgroup: as much as there is of each, in this order."""
        record = sandbox.record
        if record.runtime_sandbox:
            await self._runtime_sandboxes.remove(self._runtime_sandbox(record))
            if record.pause_pid:  # what has outlived that, outside of the cgroup
                await kill_pause(record.pause_pid, record.pause_start_time)
        if record.attachments:
            await self._network.remove(self._network_request(sandbox), record.attachments)
        pause = await self._pooled(read_pod_process, self._pin_dir(record.id))
        if pause is not None:
            await kill_pause(pause.pid, pause.start_time)
        await self._pooled(remove_pins, self._pin_dir(record.id))
        await self._cgroups.remove(record.cgroup_parent, record.id)

    # Remove

    async def remove(self, sandbox: Sandbox) -> None:
        """Take the pod sandbox away with its containers, whatever their state."""
        await self._set(sandbox, replace(sandbox.record, is_removing=True))
        await self.stop(sandbox)
        await asyncio.gather(*(self._containers.remove(each) for each in self._containers.of(sandbox.id)))
        await self.hooks.removing(sandbox)
        await until_done(f"removal of pod sandbox {sandbox.id}", lambda: self._delete(sandbox))
        self._publish(EventKind.DELETED, sandbox)

    async def _delete(self, sandbox: Sandbox) -> None:
        record = sandbox.record
        await self._pooled(files.remove, self._directory(record.id))
        if record.runtime_sandbox:
            await self._pooled(self._containers.forget_orphans)
        if record.owns_cgroup_parent:
            await self._cgroups.remove_parent(record.cgroup_parent)
        await self._records.delete(record.id)
        self._forget_name(record)
        self._by_id.pop(record.id, None)

    async def _discard(self, sandbox: Sandbox) -> None:
        """Take away what a failed run has left, trying again until it is done."""
        await until_done(f"cleanup of failed pod sandbox {sandbox.id}", lambda: self._release(sandbox))
        await self.hooks.discarded(sandbox)
        await until_done(f"cleanup of failed pod sandbox {sandbox.id}", lambda: self._delete(sandbox))

    def _forget_name(self, record: SandboxRecord) -> None:
        if self._by_name.get(record.full_name) == record.id:
            del self._by_name[record.full_name]

    # The pause's end

    def _watch_pause(self, sandbox: Sandbox) -> None:
        record = sandbox.record
        if not record.pause_pid:
            return
        with contextlib.suppress(ProcessLookupError):  # without a pidfd it counts as ended
            sandbox.pause_pidfd = proc.pidfd(record.pause_pid, record.pause_start_time)
        self._background.start(self._until_pause_ends(sandbox), f"pause of pod sandbox {sandbox.id}")

    async def _until_pause_ends(self, sandbox: Sandbox) -> None:
        if sandbox.pause_pidfd >= 0:
            await pidfd.wait(sandbox.pause_pidfd)
        self._forget_pause(sandbox)
        async with sandbox.lock:
            if sandbox.record.stopped_at is not None:
                return
            what = "process" if sandbox.record.runtime_sandbox else "pause"
            _log.warning("the %s of pod sandbox %s has ended: the pod is not ready any more", what, sandbox.id)
            await self._set(sandbox, replace(sandbox.record, lost_at=self._clock.now()))
        self._publish(EventKind.STOPPED, sandbox)

    def _forget_pause(self, sandbox: Sandbox) -> None:
        if sandbox.pause_pidfd >= 0:
            os.close(sandbox.pause_pidfd)
            sandbox.pause_pidfd = -1

    # Update

    async def update_resources(self, sandbox: Sandbox, overhead: Resources, resources: Resources) -> None:
        """Remember what kubelet has given the pod's cgroup, which is kubelet's own to write."""
        await self.hooks.updating(sandbox, overhead, resources)
        async with sandbox.lock:
            await self._set(sandbox, replace(sandbox.record, overhead=overhead, resources=resources))
        await self.hooks.updated(sandbox)

    # Restart

    async def restore(self, same_boot: bool) -> None:
        """Take over the pods of an earlier daemon, after their containers; to be called once.

        `same_boot` is False when the node has rebooted since: then all of them have ended, and their addresses are
        given back in the background.
        """
        for id, found in list(self._records.load()):
            if isinstance(found, Unreadable):
                _log.error("the record of pod sandbox %s cannot be read: %s", id, found.reason)
            await self._restore(_unreadable(id) if isinstance(found, Unreadable) else found, same_boot)
        await self._network.gc({each.id: each.record.attachments for each in self._by_id.values()})

    async def _restore(self, record: SandboxRecord, same_boot: bool) -> None:
        sandbox = self._by_id[record.id] = Sandbox(record)
        if record.state is SandboxState.CREATING:
            self._background.start(self._discard(sandbox), f"discard pod sandbox {record.id}")
            return
        self._by_name[record.full_name] = record.id
        if record.state is SandboxState.READY and not same_boot:
            await self._set(sandbox, replace(record, lost_at=self._clock.now()))
        elif record.state is SandboxState.READY:
            self._watch_pause(sandbox)
        if record.is_removing:
            self._background.start(self.remove(sandbox), f"remove pod sandbox {record.id}")
        elif not same_boot and record.stopped_at is None:
            self._background.start(self._stop_lost(sandbox), f"stop pod sandbox {record.id}")

    async def _stop_lost(self, sandbox: Sandbox) -> None:
        await until_done(f"stop of pod sandbox {sandbox.id} after a reboot", lambda: self.stop(sandbox))

    async def close(self) -> None:
        """Let go of everything; pods go on."""
        await self._background.close()
        for sandbox in self._by_id.values():
            self._forget_pause(sandbox)

    # Small steps

    def _directory(self, id: SandboxId) -> Path:
        return self._settings.run_dir / id

    def _pin_dir(self, id: SandboxId) -> Path:
        return self._directory(id) / "ns"

    def _network_request(self, sandbox: Sandbox) -> PodNetworkRequest:
        spec = sandbox.record.spec
        netns = self._pin_dir(sandbox.id) / "net"
        return PodNetworkRequest(
            sandbox_id=sandbox.id,
            name=spec.name,
            namespace=spec.namespace,
            uid=spec.uid,
            netns=str(netns) if netns.exists() else "",
            port_mappings=tuple(mapping for mapping in spec.port_mappings if mapping.host_port),
            annotations=spec.annotations,
            dns=spec.dns,
            cgroup_parent=sandbox.record.cgroup_parent,
        )

    async def _set(self, sandbox: Sandbox, record: SandboxRecord) -> None:
        sandbox.record = record
        await self._records.put(record.id, record)

    def _publish(self, kind: EventKind, sandbox: Sandbox) -> None:
        self._events.publish(Event(kind, sandbox.id, sandbox.id, self._clock.now(), sandbox.record))

    async def _pooled(self, leaf: Callable[..., Any], *arguments: Any) -> Any:
        wait: Awaitable[Any] = asyncio.get_running_loop().run_in_executor(self._mounts, leaf, *arguments)
        return await wait


def _hostname(spec: SandboxSpec) -> str:
    """The pod's hostname: as asked, the node's on the node's network, else the pod's name."""
    if spec.hostname:
        return spec.hostname
    if spec.security.network is NamespaceMode.NODE:
        return socket.gethostname()
    return spec.name[: namespaces.HOSTNAME_LIMIT]


def _unreadable(id: str) -> SandboxRecord:
    """A pod that can be listed, stopped and removed, in place of a record that cannot be read."""
    return SandboxRecord(
        id=SandboxId(id),
        spec=SandboxSpec(name=id[:13], uid=id, namespace="unreadable-record"),
        runtime_handler="",
        hostname="",
        cgroup_parent="/",
        owns_cgroup_parent=False,
        requested_at=1,
        ready_at=1,
        lost_at=1,
    )
