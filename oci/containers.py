"""The story of every container: create, start, stop, exec, update, remove, and what becomes of it after a restart.

One teardown serves them all: what a container may have is derived from its record, and taking it away is idempotent.
So a failed create, a removal, and a crash in the middle of either end the same way.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from oci import checkpoint_archive, checkpoint_worker, criu, spec, status, trace
from oci.background import Background, until_done, with_last_repeated
from oci.bundle import Bundles
from oci.cdi import Cdi
from oci.checkpoint_archive import Checkpoint
from oci.clock import Clock
from oci.container import Container, ContainerRecord
from oci.container_spec import ContainerId, ContainerSpec, NamespaceMode, PodEnvironment, Resources, SandboxId
from oci.criu import Criu
from oci.errors import (
    AlreadyExists,
    DeadlineExceeded,
    Error,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unimplemented,
)
from oci.events import Bus, Event, EventKind
from oci.exit_records import ExitRecord, forget_orphan_exits, read_exit_record, wait_orphan_exit
from oci.fork_server import DEFAULT_ENVIRONMENT, ForkServer, MonitorRequest
from oci.handlers import Handler, Handlers
from oci.hook_files import HookFiles
from oci.hooks import Adjusted, ContainerHooks, NoContainerHooks
from oci.image_volumes import ImageVolumes
from oci.linux import cgroup, proc, signals, tree
from oci.linux.node import Node
from oci.monitor_client import ExecResult, InitProcess, Monitor
from oci.preparation import ImageToRun, Preparation
from oci.rootfs import Rootfs
from oci.runtime import Runtime, Usage
from oci.state import Records, Unreadable
from oci.status import ContainerState

_log = logging.getLogger(__name__)

DEFAULT_STOP_SIGNAL = "SIGTERM"
DELETE_TIMEOUT_S = 15.0  # of the OCI runtime's delete
END_TIMEOUT_S = 5.0  # for processes that were killed to leave their cgroup
DISCARD_WAIT_S = 5.0  # how long a failed CreateContainer waits for its own cleanup before it answers
UNRESTORED_POLL_S = 0.2  # a restore that nobody waits for any more
_LOST_LINES = "its monitor was lost before it ended: the log may lack lines"
KILL_RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)  # after SIGKILL, until the kernel lets the process go


class ImageHolds(Protocol):
    """Who keeps an image's layers on disk for as long as somebody runs from them."""

    def hold(self, image_id: str, holder: str) -> None: ...

    def release(self, holder: str) -> None: ...


@dataclass(frozen=True, slots=True)
class ContainerSettings:
    """What the configuration says of containers; directories are absolute."""

    run_dir: Path  # …/containers/<id>: bundle, monitor socket, exit record, mount point of the root filesystem
    cgroup_driver: cgroup.Driver
    create_timeout_s: float
    log_max_bytes: int  # 0 is unlimited
    cdi_spec_dirs: tuple[Path, ...]  # descriptions of devices; the later ones count first
    hooks_dirs: tuple[Path, ...]  # OCI hooks; the later ones count first
    defaults: spec.Defaults
    criu_path: Path | None = None  # None looks where programs are


class Containers:
    def __init__(
        self,
        settings: ContainerSettings,
        records: Records[ContainerRecord],
        handlers: Handlers,
        fork_server: ForkServer,
        bundles: Bundles,
        rootfs: Rootfs,
        image_volumes: ImageVolumes,
        node: Node,
        holds: ImageHolds,
        events: Bus[Event],
        clock: Clock,
        mounts: Executor,
    ) -> None:
        self._settings = settings
        self.cdi = Cdi(settings.cdi_spec_dirs)
        self.criu = Criu(settings.criu_path)
        self._records = records
        self._handlers = handlers
        self._fork_server = fork_server
        self._bundles = bundles
        self._rootfs = rootfs
        self._node = node
        self._preparation = Preparation(
            settings.cgroup_driver,
            settings.defaults,
            self.cdi,
            HookFiles(settings.hooks_dirs),
            rootfs,
            image_volumes,
            node,
            mounts,
        )
        self._holds = holds
        self._events = events
        self._clock = clock
        self._mounts = mounts
        self._by_id: dict[ContainerId, Container] = {}
        self._by_name: dict[str, ContainerId] = {}
        self._background = Background()
        self.hooks: ContainerHooks = NoContainerHooks()

    # Lookup: from memory, never waiting

    def all(self) -> list[Container]:
        """Every container that lists show."""
        return [container for container in self._by_id.values() if container.is_visible]

    def of(self, sandbox_id: SandboxId) -> list[Container]:
        """Every container of one pod, those being made or removed too."""
        return [container for container in self._by_id.values() if container.record.sandbox_id == sandbox_id]

    def known(self) -> list[Container]:
        """Every container of which anything may exist, also those being made or removed."""
        return list(self._by_id.values())

    def known_ids(self) -> list[ContainerId]:
        """Every container of which anything may exist, also those being made or removed."""
        return list(self._by_id)

    def find(self, id: str) -> Container | None:
        """The visible container with this id, or with the only id that begins so."""
        container = self._by_id.get(ContainerId(id))
        if container is None and id:
            matches = [each for each in self.all() if each.id.startswith(id)]
            container = matches[0] if len(matches) == 1 else None
        return container if container is not None and container.is_visible else None

    def get(self, id: str) -> Container:
        container = self.find(id)
        if container is None:
            raise NotFound(f"container {id!r}: there is none")
        return container

    def cgroup_path(self, container: Container) -> str:
        """Where the container's cgroup lies in every hierarchy."""
        driver, record = self._settings.cgroup_driver, container.record
        if record.cgroups_path:
            return cgroup.from_runtime_path(driver, record.cgroups_path)
        return cgroup.child_path(driver, record.cgroup_parent, record.id)

    # Create

    async def create(
        self,
        wanted: ContainerSpec,
        pod: PodEnvironment,
        image: ImageToRun,
        handler: Handler,
        checkpoint: Checkpoint | None = None,
    ) -> Container:
        """Make a container that is ready to start. On any error nothing of it stays.

        With a checkpoint its processes are those of the checkpoint; they go on when it is started.
        """
        if checkpoint is not None:
            await self._require_restore(wanted, handler)
        id = ContainerId(secrets.token_hex(32))
        record = ContainerRecord(
            id=id,
            sandbox_id=pod.sandbox_id,
            spec=wanted,
            image_id=image.id,
            image_ref=image.ref,
            image_mounts=tuple((volume.container_path, volume.image_id) for volume in image.volumes),
            runtime_handler=handler.name,
            log_path=_log_path(pod, wanted),
            cgroup_parent=pod.cgroup_parent,
            stop_signal=wanted.stop_signal or image.config.stop_signal or DEFAULT_STOP_SIGNAL,
            rootfs=str(self._rootfs.path(id)),
            requested_at=self._clock.now(),
            status=status.ContainerStatus(resources=wanted.resources),
            restored_from=str(checkpoint.source) if checkpoint is not None else "",
            in_sandbox=pod.runtime_sandbox,
        )
        existing = self._named(record)
        if existing is not None:
            return existing
        signals.number(record.stop_signal)
        container = self._by_id[id] = Container(record)
        self._by_name[record.full_name] = id
        try:
            await self._make(container, pod, image, checkpoint)
        except Exception:  # a cancelled one is left to the next start, which finds its record
            self._forget_name(record)
            self._background.start(self._discard(container), f"discard container {container.id}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(container.settled.wait(), DISCARD_WAIT_S)
            raise
        container.settled.set()
        self._publish(EventKind.CREATED, container)
        await self.hooks.created(container)
        return container

    def _named(self, record: ContainerRecord) -> Container | None:
        """The container that an earlier, equal request has made; its caller may have given up before the answer."""
        id = self._by_name.get(record.full_name)
        if id is None:
            return None
        existing = self._by_id[id]
        if existing.record.spec == record.spec and existing.state is ContainerState.CREATED:
            return existing
        raise AlreadyExists(
            f"container {record.spec.name!r}, attempt {record.spec.attempt}, of pod {record.sandbox_id}:"
            f" {id} is called so and is {existing.state}"
        )

    async def _make(
        self, container: Container, pod: PodEnvironment, image: ImageToRun, checkpoint: Checkpoint | None
    ) -> None:
        id = container.id
        devices = await self._preparation.devices(container.record.spec)
        await self._records.put(id, container.record)
        self._hold_images(container.record)
        handler = self._handlers.resolve(container.record.runtime_handler)
        target_pid_ns = await self._target_pid_ns(container.record)
        user, config = await self._preparation.build(container.record, pod, image, handler, devices, target_pid_ns)
        container.record = replace(container.record, user=user)
        if checkpoint is not None:
            config = checkpoint.applied_to(config)
        adjusted = await self.hooks.creating(container, config)
        container.record = self._with_adjustments(container.record, adjusted)
        await self._pooled(self._write, container.record, adjusted.config)
        if checkpoint is not None:
            await self._unpack(container, checkpoint, pod, adjusted.config)
            await self._set(container, status.with_creation(container.record.status, self._clock.now(), 0, 0))
            return
        init = await self._begin(container, handler, ("create",), DEFAULT_ENVIRONMENT)
        now = self._clock.now()
        await self._set(container, status.with_creation(container.record.status, now, init.pid, init.start_time))
        self._watch(container)

    async def _begin(
        self, container: Container, handler: Handler, command: tuple[str, ...], environment: Mapping[str, str]
    ) -> InitProcess:
        """Give the container a monitor, and let it run the OCI runtime's command that makes the init process."""
        id, settings, spec_ = container.id, self._settings, container.record.spec
        container.monitor = await self._fork_server.spawn_monitor(
            MonitorRequest(
                container_id=id,
                directory=settings.run_dir / id,
                bundle=self._bundles.path(id),
                runtime=handler.runtime.argv,
                log_path=container.record.log_path,
                log_max_bytes=settings.log_max_bytes,
                tty=spec_.tty,
                stdin=spec_.stdin,
                stdin_once=spec_.stdin_once,
                create_command=command,
                create_options=handler.runtime.create_options,
                cgroup_procs=handler.monitor_cgroup_procs,
                in_sandbox=container.record.in_sandbox,
                has_helpers=container.record.in_sandbox,
                environment=environment,
            )
        )
        return await container.monitor.create(self._create_timeout_s(container))

    def _write(self, record: ContainerRecord, config: dict[str, Any]) -> None:
        self._bundles.write(record.id, config)
        if record.log_path:
            Path(record.log_path).parent.mkdir(parents=True, exist_ok=True)  # NAME/ATTEMPT.log, as kubelet has it

    def _with_adjustments(self, record: ContainerRecord, adjusted: Adjusted) -> ContainerRecord:
        ours = cgroup.runtime_path(self._settings.cgroup_driver, record.cgroup_parent, record.id)
        path = adjusted.config["linux"]["cgroupsPath"]
        limits = _merged(record.status.resources, adjusted.limits)
        return replace(
            record, cgroups_path="" if path == ours else path, status=replace(record.status, resources=limits)
        )

    async def _target_pid_ns(self, record: ContainerRecord) -> str | None:
        """The PID namespace that the container joins (CRI mode TARGET), as a path; None for the other modes."""
        security = record.spec.security
        if security.pid is not NamespaceMode.TARGET:
            return None
        target = self.get(security.target_id)
        if target.record.sandbox_id != record.sandbox_id:
            raise InvalidArgument(f"namespace_options.target_id: {security.target_id!r} is not in the same pod")
        if target.state is not ContainerState.RUNNING:
            raise FailedPrecondition(f"namespace_options.target_id: {security.target_id!r} is {target.state}")
        if target.record.in_sandbox:
            namespaces = (await self.runtime_spec(target))["linux"]["namespaces"]
            return next((str(each["path"]) for each in namespaces if each["type"] == "pid"), "")
        return f"/proc/{target.record.status.pid}/ns/pid"

    # Restore from a checkpoint

    async def _require_restore(self, wanted: ContainerSpec, handler: Handler) -> None:
        await self.criu.require()
        if not await handler.runtime.can_checkpoint():
            raise FailedPrecondition(
                f"runtime_handler: {handler.name!r} ({handler.runtime.path}) restores no checkpoints; runc does"
            )
        if wanted.security.user_namespace is not None:
            raise FailedPrecondition("userns_options: CRIU cannot restore into a pod's user namespace")

    async def _unpack(
        self, container: Container, checkpoint: Checkpoint, pod: PodEnvironment, config: dict[str, Any]
    ) -> None:
        record = container.record
        await checkpoint_archive.call(
            "unpack",
            self._settings.create_timeout_s,
            f"checkpoint {checkpoint.source}",
            source=str(checkpoint.source),
            staging=str(self._checkpoint(record.id)),
            hostname=pod.hostname,
            rootfs=record.rootfs,
            volumes={**self._rootfs.volumes_in(record.id, config), **checkpoint_archive.shared_memory(config)},
            log=record.log_path,
        )

    def _checkpoint(self, id: ContainerId) -> Path:
        """Where a restored container's checkpoint lies until it has been started; goes with the writable layer."""
        return self._rootfs.writable_layer(id).parent / "restore"

    async def _go_on(self, container: Container) -> None:
        """Let CRIU bring back a checkpoint's processes; a failure is an end, as that of any start."""
        async with container.lock:
            now = self._clock.now()
            started = status.with_start(container.record.status, now)
            try:
                init = await self._bring_back(container)
            except Error as error:
                await self._set(container, status.with_failed_start(container.record.status, now, str(error)))
                self._background.start(self._end_unrestored(container), f"end container {container.id}")
                raise
            await self._set(container, replace(started, pid=init.pid, pid_start_time=init.start_time))
            self._watch(container)
            self._publish(EventKind.STARTED, container)
        await self._pooled(tree.remove, self._checkpoint(container.id))

    async def _bring_back(self, container: Container) -> InitProcess:
        handler = self._handlers.resolve(container.record.runtime_handler)
        staging = self._checkpoint(container.id)
        command = handler.runtime.restore_command(staging / checkpoint_worker.IMAGES, staging)
        try:
            return await self._begin(container, handler, command, self.criu.environment)
        except Error as error:
            said = await self._pooled(criu.complaints, staging / "restore.log")
            raise type(error)(f"{error}; CRIU says: {said}") from error

    async def _end_unrestored(self, container: Container) -> None:
        """A container that never had a process, as far as anybody knows: whatever may be left of it goes."""
        monitor = container.monitor
        with contextlib.suppress(Error):
            while monitor is not None and (await monitor.status()).state == "creating":
                await self._pooled(proc.kill_below, monitor.pid)  # CRIU, and what it has brought back already
                await asyncio.sleep(UNRESTORED_POLL_S)
        container.exited.set()
        self._publish(EventKind.STOPPED, container)
        await self.hooks.stopped(container)
        await self._released(container)

    # Start

    async def start(self, container: Container) -> None:
        """Let the container's process run. A failed start is an end: EXITED, with the OCI runtime's own words."""
        status.with_start(container.record.status, 0)  # what cannot be started is refused before anybody is told
        await self.hooks.starting(container)
        await (self._go_on(container) if container.record.restored_from else self._start(container))
        await self.hooks.started(container)

    async def _start(self, container: Container) -> None:
        async with container.lock:
            now = self._clock.now()
            started = status.with_start(container.record.status, now)
            try:
                await _monitor(container).start(self._create_timeout_s(container))
            except Error as error:
                if not await self._has_started(container):
                    await self._set(container, status.with_failed_start(container.record.status, now, str(error)))
                    await self._kill(container, signal.SIGKILL)
                    raise
            await self._set(container, started)
            self._publish(EventKind.STARTED, container)

    async def _has_started(self, container: Container) -> bool:
        """Whether the OCI runtime has started it for a daemon that died before it could write that down."""
        handler = self._handlers.find(container.record.runtime_handler)
        if handler is None:
            return False
        try:
            return (await handler.runtime.state(container.id)).status == "running"
        except Error:
            return False

    # Stop

    async def stop(self, container: Container, timeout_s: float) -> None:
        """Return once the container has ended: by its stop signal within `timeout_s`, or by SIGKILL.

        A later call may only shorten the time that an earlier one gave. Whoever gives up waiting stops nothing.
        """
        await container.settled.wait()
        if container.exited.is_set():
            return
        deadline = asyncio.get_running_loop().time() + max(timeout_s, 0)
        if container.stop_deadline is None or deadline < container.stop_deadline:
            container.stop_deadline = deadline
            container.stop_changed.set()
        if container.stop_task is None or container.stop_task.done():
            container.stop_task = self._background.start(self._stop(container), f"stop container {container.id}")
        with trace.step("wait for the container's end"):
            await asyncio.shield(container.stop_task)

    async def _stop(self, container: Container) -> None:
        loop = asyncio.get_running_loop()
        assert container.stop_deadline is not None
        if container.state is ContainerState.RUNNING and container.stop_deadline > loop.time():
            await self._kill(container, signals.number(container.record.stop_signal))
            while (left := container.stop_deadline - loop.time()) > 0 and not container.exited.is_set():
                container.stop_changed.clear()
                await _first_of(container.exited.wait(), container.stop_changed.wait(), timeout_s=left)
        for pause_s in with_last_repeated(KILL_RETRY_S):
            if container.exited.is_set():
                return
            has_process = container.state is not ContainerState.UNKNOWN and container.record.status.pid
            if not has_process and await self._end_without_process(container):
                return
            await self._kill(container, signal.SIGKILL)
            try:
                await asyncio.wait_for(container.exited.wait(), pause_s)
            except TimeoutError:
                await self._explain_survivor(container)

    async def _end_without_process(self, container: Container) -> bool:
        """End whatever stands behind a record that could not be read, or a checkpoint that was never started.

        The OCI runtime knows the id. False when a start has given the container a process meanwhile.
        """
        async with container.lock:
            if container.record.status.pid and container.state is not ContainerState.UNKNOWN:
                return False
            unreadable = "stopped; its record was unreadable"
            message = unreadable if container.state is ContainerState.UNKNOWN else "stopped before it was started"
            await self._release_parts(container)
            ended = status.with_lost_exit(container.record.status, self._clock.now(), status.REASON_ERROR, message)
            await self._set(container, replace(ended, is_unknown=False))
        container.exited.set()
        self._publish(EventKind.STOPPED, container)
        await self._released(container)
        return True

    async def _explain_survivor(self, container: Container) -> None:
        stat = await self._pooled(proc.stat, container.record.status.pid)
        state = stat.state if stat is not None else "gone"
        _log.warning(
            "container %s still runs after SIGKILL: process %d is in state %s%s",
            container.id,
            container.record.status.pid,
            state,
            " (uninterruptible: it waits for a device or a dead file server)" if state == "D" else "",
        )

    async def _kill(self, container: Container, number: int) -> None:
        """Send a signal to the container's init, and to no other process that may have got its pid."""
        if container.record.in_sandbox:
            with contextlib.suppress(Error):  # it has ended, or its sandbox has
                await self._kill_in_sandbox(container, number)
        elif container.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):  # it has ended: the exit is on its way
                signal.pidfd_send_signal(container.pidfd, number)

    async def _kill_in_sandbox(self, container: Container, number: int) -> None:
        if container.monitor is not None:
            try:
                return await container.monitor.kill(number)
            except Unavailable as error:
                _log.debug("the monitor of container %s cannot kill it: %s", container.id, error)
        runtime = self._handlers.resolve(container.record.runtime_handler).runtime
        await runtime.kill(container.id, number, everything=number == signal.SIGKILL)

    # Remove

    async def remove(self, container: Container) -> None:
        """Take the container away, whatever its state; its log file stays, for kubelet to remove."""
        await container.settled.wait()
        if self._by_id.get(container.id) is not container:
            return  # its creation has failed meanwhile
        async with container.lock:
            if not container.record.is_removing:
                container.record = replace(container.record, is_removing=True)
                await self._records.put(container.id, container.record)
        await self.stop(container, 0)
        with trace.step("wait for the container's release"):
            await container.released.wait()
        await self.hooks.removing(container)
        await until_done(f"removal of container {container.id}", lambda: self._delete(container))
        self._publish(EventKind.DELETED, container)

    async def _delete(self, container: Container) -> None:
        with trace.step("remove writable layer"):
            await self._pooled(self._rootfs.remove, container.id)
        await self._pooled(self._bundles.remove, container.id)
        await self._records.delete(container.id)
        self._forget_name(container.record)
        self._by_id.pop(container.id, None)

    def _forget_name(self, record: ContainerRecord) -> None:
        if self._by_name.get(record.full_name) == record.id:
            del self._by_name[record.full_name]

    # Exit: the one path upward

    def _watch(self, container: Container) -> None:
        if not container.record.in_sandbox:
            self._open_pidfd(container)
        container.watch_task = self._background.start(self._until_exit(container), f"exit of container {container.id}")

    def _open_pidfd(self, container: Container) -> None:
        current = container.record.status
        with contextlib.suppress(ProcessLookupError):  # it ended before anybody looked; the monitor knows how
            container.pidfd = proc.pidfd(current.pid, current.pid_start_time)

    async def _until_exit(self, container: Container) -> None:
        exit = await self._exit_of(container)
        async with container.lock:
            if isinstance(exit, _Lost):
                ended = status.with_lost_exit(container.record.status, self._clock.now(), exit.reason, exit.message)
            else:
                ended = status.with_exit(
                    container.record.status,
                    exit.finished_at or self._clock.now(),
                    exit.exit_code,
                    exit.oom_killed,
                    exit.message,
                )
            await self._set(container, ended)
        if container.pidfd >= 0:
            os.close(container.pidfd)
            container.pidfd = -1
        container.exited.set()
        self._publish(EventKind.STOPPED, container)
        await self.hooks.stopped(container)
        await self._released(container)

    async def _exit_of(self, container: Container) -> "_Exit | _Lost":
        """How the container ended: from its monitor, else its monitor's record, else whoever reaped it."""
        if container.monitor is not None:
            try:
                return _exit_from(await container.monitor.wait_exit())
            except Unavailable as error:
                _log.warning("the monitor of container %s is lost: %s", container.id, error)
        record = await self._pooled(read_exit_record, self._settings.run_dir / container.id)
        if record is not None:
            return _exit_from(record)
        if container.record.in_sandbox:
            return await self._exit_in_sandbox(container)
        last = container.record.status
        try:
            orphan = await wait_orphan_exit(self._settings.run_dir.parent, last.pid, last.pid_start_time)
        except Unavailable as error:
            return _Lost(status.REASON_MONITOR_LOST, f"its monitor was lost, so nobody saw how it ended: {error}")
        return _Exit(orphan.finished_at, orphan.exit_code, False, _LOST_LINES)

    async def _exit_in_sandbox(self, container: Container) -> "_Exit | _Lost":
        """How a container in a sandbox ended whose monitor was lost: its runtime can tell whoever asks."""
        handler = self._handlers.find(container.record.runtime_handler)
        reason = "its runtime handler is not configured any more"
        if handler is not None and container.state is ContainerState.RUNNING:
            try:
                return _Exit(0, await handler.runtime.wait(container.id), False, _LOST_LINES)
            except Error as error:
                reason = str(error)
        elif handler is not None:
            reason = "it was never started"
        return _Lost(status.REASON_MONITOR_LOST, f"its monitor was lost, so nobody saw how it ended: {reason}")

    # Release: what an ended container no longer needs

    async def _released(self, container: Container) -> None:
        """Give back what runs and is mounted for the container, trying again until it is done."""
        await until_done(f"release of container {container.id}", lambda: self._release(container))
        container.released.set()

    async def _release(self, container: Container) -> None:
        async with container.lock:
            await self._release_parts(container)
            container.record = replace(container.record, is_released=True)
            if container.state is not ContainerState.CREATING:
                await self._records.put(container.id, container.record)

    async def _release_parts(self, container: Container) -> None:
        record = container.record
        handler = self._handlers.find(record.runtime_handler)
        if handler is not None:
            await self._delete_from(handler.runtime, container)
        if container.monitor is not None:
            container.monitor.close()
            container.monitor = None
        await self._pooled(self._unmount, record.id)
        for holder, _ in _holders(record):
            self._holds.release(holder)

    async def _delete_from(self, runtime: Runtime, container: Container) -> None:
        """Let the OCI runtime forget the container; do by hand what one that fails or hangs does not."""
        try:
            await runtime.delete(container.id, DELETE_TIMEOUT_S)
            if container.record.in_sandbox:
                await self._pooled(runtime.forget, container.id)
        except Error as error:
            _log.warning("container %s: %s; ending it without the runtime", container.id, error)
            await self._pooled(self._end_without, runtime, self.cgroup_path(container), container.id)

    def _end_without(self, runtime: Runtime, cgroup_path: str, id: ContainerId) -> None:
        self._node.cgroups.kill(cgroup_path)
        self._node.cgroups.remove(cgroup_path, END_TIMEOUT_S)
        runtime.forget(id)

    def _unmount(self, id: ContainerId) -> None:
        self._preparation.unmount(id)
        self.forget_orphans()

    def forget_orphans(self) -> None:
        """Forget the ends of processes that were nobody's, such as the helpers of a sandbox; in a pool."""
        forget_orphan_exits(self._settings.run_dir.parent, self._running())

    def _running(self) -> list[tuple[int, int]]:
        """Pid and start time of every init whose end is still to be heard of."""
        alive = [each.record.status for each in list(self._by_id.values()) if not each.exited.is_set()]
        return [(each.pid, each.pid_start_time) for each in alive if each.pid]

    async def _discard(self, container: Container) -> None:
        """Take away what a failed create has left."""
        if container.monitor is not None:
            with contextlib.suppress(Error):  # it has ended by itself after a failed create
                await container.monitor.shutdown()
        await self._released(container)
        await self.hooks.discarded(container)
        await until_done(f"removal of container {container.id}", lambda: self._delete(container))
        container.exited.set()
        container.settled.set()

    # Exec, log, resources

    async def exec_sync(self, container: Container, command: tuple[str, ...], timeout_s: float | None) -> ExecResult:
        """Run a command in the container and return what it wrote and its exit code.

        Raises DeadlineExceeded after `timeout_s` (None waits for ever), when no process of it is left.
        """
        _require(container, ContainerState.RUNNING, "exec in")
        config = await self.runtime_spec(container)
        process = spec.exec_process(config, command, tty=False)
        try:
            return await _monitor(container).exec_sync(process, timeout_s)
        except DeadlineExceeded:
            raise DeadlineExceeded(f"command {' '.join(command)!r} timed out after {timeout_s} s") from None

    async def usage_in_sandbox(self, container: Container) -> Usage | None:
        """What a container uses whose process is its pod's sandbox; None where its runtime does not tell."""
        handler = self._handlers.find(container.record.runtime_handler)
        if handler is None or container.state is not ContainerState.RUNNING:
            return None
        try:
            return await handler.runtime.usage(container.id)
        except (Error, ValueError):
            return None  # it has ended meanwhile, or the runtime speaks otherwise

    async def runtime_spec(self, container: Container) -> dict[str, Any]:
        """The config.json that the OCI runtime was given. Raises NotFound once the bundle is gone."""
        config: dict[str, Any] = await self._pooled(self._bundles.read, container.id)
        return config

    async def reopen_log(self, container: Container) -> None:
        """Write to the log's path anew: somebody moved the file. The new file is there on return."""
        _require(container, ContainerState.RUNNING, "reopen the log of")
        await _monitor(container).reopen_log()

    async def update(self, container: Container, changes: Resources) -> None:
        """Change the limits of a container that has not ended; fields that are not set stay as they are."""
        _require_alive(container)
        await self.limit(container, await self.hooks.updating(container, changes))
        await self.hooks.updated(container)

    async def limit(self, container: Container, changes: Resources) -> None:
        """The same, at the wish of a hook: no hook is asked."""
        async with container.lock:
            _require_alive(container)
            handler = self._handlers.resolve(container.record.runtime_handler)
            if container.record.in_sandbox:
                raise Unimplemented(
                    f"runtime_handler: {handler.name!r} cannot change the limits of one container in its sandbox; those"
                    " of the pod hold"
                )
            limits = spec.update_resources(changes, self._node, handler.features)
            await handler.runtime.update(container.id, limits)
            if changes.oom_score_adj is not None:  # no cgroup holds it: it is each process's own
                score = spec.oom_score_adj(changes, self._node)
                await self._pooled(proc.adjust_oom_scores, await handler.runtime.processes(container.id), score)
            merged = _merged(container.record.status.resources, changes)
            await self._set(container, replace(container.record.status, resources=merged))

    # Restart

    async def restore(self, same_boot: bool) -> None:
        """Take over the containers of an earlier daemon; to be called once, before anything else.

        `same_boot` is False when the node has rebooted since: then nothing of them runs. Returns when every container's
        state is known; what must be undone or finished goes on in the background.
        """
        found = [_readable(id, record, self._settings) for id, record in self._records.load()]
        await asyncio.gather(*(self._restore(record, same_boot) for record in found))

    async def _restore(self, record: ContainerRecord, same_boot: bool) -> None:
        container = self._by_id[record.id] = Container(record)
        if record.state is ContainerState.CREATING:
            self._background.start(self._discard(container), f"discard container {container.id}")
            return
        self._by_name[record.full_name] = record.id
        if not record.is_released:
            with contextlib.suppress(NotFound):  # it runs on: what it has mounted does not need the store's record
                self._hold_images(record)
        if record.state is ContainerState.EXITED:
            if not record.is_released:
                self._background.start(self._released(container), f"release container {container.id}")
        elif record.state is not ContainerState.UNKNOWN:
            await self._restore_alive(container, same_boot)
        if record.is_removing:
            self._background.start(self.remove(container), f"remove container {container.id}")

    async def _restore_alive(self, container: Container, same_boot: bool) -> None:
        """A container that had not ended when it was last heard of."""
        if not same_boot:
            message = "the node was rebooted while it ran"
            ended = status.with_lost_exit(
                container.record.status, self._clock.now(), status.REASON_NODE_REBOOTED, message
            )
            await self._set(container, ended)
            container.exited.set()
            self._background.start(self._released(container), f"release container {container.id}")
            return
        try:
            container.monitor = await Monitor.connect(self._settings.run_dir / container.id)
        except Unavailable as error:
            _log.info("container %s has no monitor: %s", container.id, error)
        if container.record.status.pid == 0:
            await self._restore_unstarted(container)
            return
        if container.state is ContainerState.CREATED and await self._has_started(container):
            await self._set(container, status.with_start(container.record.status, self._clock.now()))
        self._watch(container)

    async def _restore_unstarted(self, container: Container) -> None:
        """A checkpoint's container: to be started as before, unless the daemon ended while it was being started."""
        if container.monitor is None:
            return
        message = "the daemon ended while the container's checkpoint was being restored"
        await self._set(container, status.with_failed_start(container.record.status, self._clock.now(), message))
        self._background.start(self._end_unrestored(container), f"end container {container.id}")

    async def close(self) -> None:
        """Let go of everything; containers and monitors go on."""
        await self._background.close()
        for container in self._by_id.values():
            if container.monitor is not None:
                container.monitor.close()
            if container.pidfd >= 0:
                os.close(container.pidfd)

    # Small steps

    def _create_timeout_s(self, container: Container) -> float:
        handler = self._handlers.find(container.record.runtime_handler)
        return (handler and handler.create_timeout_s) or self._settings.create_timeout_s

    def _hold_images(self, record: ContainerRecord) -> None:
        for holder, image_id in _holders(record):
            self._holds.hold(image_id, holder)

    async def _set(self, container: Container, new: status.ContainerStatus) -> None:
        container.record = replace(container.record, status=new)
        await self._records.put(container.id, container.record)

    def _publish(self, kind: EventKind, container: Container) -> None:
        record = container.record
        self._events.publish(Event(kind, record.id, record.sandbox_id, self._clock.now(), record))

    async def _pooled(self, leaf: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._mounts, leaf, *arguments)


@dataclass(frozen=True, slots=True)
class _Exit:
    finished_at: int  # 0: just now
    exit_code: int
    oom_killed: bool
    message: str


@dataclass(frozen=True, slots=True)
class _Lost:
    reason: str
    message: str


def _exit_from(record: ExitRecord) -> _Exit:
    return _Exit(record.finished_at, record.exit_code, record.oom_killed, "")


def _readable(id: str, record: ContainerRecord | Unreadable, settings: ContainerSettings) -> ContainerRecord:
    """The record, or where it cannot be read, one that lets the container be listed, stopped and removed."""
    if not isinstance(record, Unreadable):
        return record
    _log.error("the record of container %s cannot be read: %s", id, record.reason)
    return ContainerRecord(
        id=ContainerId(id),
        sandbox_id=SandboxId(""),
        spec=ContainerSpec(name=id[:13], image="unknown"),
        image_id="unknown",
        image_ref="unknown",
        image_mounts=(),
        runtime_handler="",
        log_path="",
        cgroup_parent="/",
        stop_signal=DEFAULT_STOP_SIGNAL,
        rootfs=str(settings.run_dir / id / "rootfs"),
        requested_at=1,
        status=status.ContainerStatus(created_at=1, is_unknown=True, message=f"unreadable record: {record.reason}"),
    )


def _holders(record: ContainerRecord) -> list[tuple[str, str]]:
    """Who holds which image for this container: a name for each, because one name holds one image."""
    volumes = [(f"{record.id}:{path}", image_id) for path, image_id in record.image_mounts]
    return [(record.id, record.image_id), *volumes]


def _monitor(container: Container) -> Monitor:
    if container.monitor is None:
        raise FailedPrecondition(f"container {container.id}: its monitor is lost, so this cannot be done")
    return container.monitor


def _require(container: Container, state: ContainerState, verb: str) -> None:
    if container.state is not state:
        raise FailedPrecondition(f"cannot {verb} a container that is {container.state} (id {container.id})")


def _require_alive(container: Container) -> None:
    if not container.is_alive:
        raise FailedPrecondition(f"cannot update a container that is {container.state} (id {container.id})")


def _log_path(pod: PodEnvironment, wanted: ContainerSpec) -> str:
    if not wanted.log_path or not pod.log_directory:
        return ""
    return str(Path(pod.log_directory) / wanted.log_path)


def _merged(old: Resources, new: Resources) -> Resources:
    """`old` with every field that `new` sets."""
    unset = Resources()
    changed = {name: value for name in Resources.__slots__ if (value := getattr(new, name)) != getattr(unset, name)}
    if "unified" in changed:
        changed["unified"] = {**old.unified, **new.unified}
    return replace(old, **changed)


async def _first_of(*waits: Any, timeout_s: float) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
