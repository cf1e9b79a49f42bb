"""The hooks of `oci/` and `sandbox/` by which plugins hear of pods and containers, and may change what is made."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from cri.api.nri.v1alpha1 import api_pb2 as nri
from cri.nri import adjust, to_nri, validator
from cri.nri.plugins import Plugins
from cri.nri.result import Creation, Updates
from oci.container import Container, ContainerRecord
from oci.container_spec import ContainerId, Resources, SandboxId
from oci.containers import Containers
from oci.errors import Error, NotFound
from oci.handlers import Handlers
from oci.hooks import Adjusted
from oci.linux import cgroup, node
from oci.status import ContainerState
from sandbox.sandbox import Sandbox, SandboxRecord, SandboxState
from sandbox.sandboxes import Sandboxes

_log = logging.getLogger(__name__)

Configs = dict[ContainerId, dict[str, Any]]
# Carries out what plugins want of existing containers; an update that fails and may not is an Error.
Apply = Callable[[Iterable[nri.ContainerUpdate], Iterable[nri.ContainerEviction]], Awaitable[None]]


class Messages:
    """Pods and containers as plugins are told them."""

    def __init__(self, containers: Containers, sandboxes: Sandboxes) -> None:
        self._containers = containers
        self._sandboxes = sandboxes
        self.in_making: Configs = {}  # the runtime-specs of containers that plugins know and lists do not show yet

    def inject_cdi(self, config: dict[str, Any], names: list[str], *, idmap_mounts: bool) -> None:
        self._containers.cdi.inject(config, names, idmap_mounts=idmap_mounts)

    def known_containers(self) -> list[ContainerId]:
        return self._containers.known_ids()

    def known_sandboxes(self) -> list[SandboxId]:
        return self._sandboxes.known_ids()

    def pod(self, sandbox: Sandbox) -> nri.PodSandbox:
        return to_nri.pod_sandbox(sandbox.record, self._sandboxes.environment(sandbox))

    def pod_of(self, container: Container) -> nri.PodSandbox:
        id = container.record.sandbox_id
        sandbox = next((each for each in self._sandboxes.known() if each.id == id), None)
        return self.pod(sandbox) if sandbox is not None else nri.PodSandbox(id=id)

    async def container(self, container: Container, record: ContainerRecord | None = None) -> nri.Container:
        """As it is now, or as `record` says that it was."""
        config = self.in_making.get(container.id)
        if config is None:
            try:
                config = await self._containers.runtime_spec(container)
            except (NotFound, OSError):  # it has been released long ago
                config = {}
        return to_nri.container(record or container.record, config)


class ContainerPlugins:
    """What plugins hear of containers."""

    def __init__(
        self,
        plugins: Plugins,
        messages: Messages,
        apply: Apply,
        rules: validator.Rules | None,
        handlers: Handlers,
        host: node.Node,
    ) -> None:
        self._plugins = plugins
        self._messages = messages
        self._apply = apply
        self._rules = rules
        self._handlers = handlers
        self._host = host
        self._ends: dict[ContainerId, asyncio.Future[None]] = {}  # the telling of each container's end
        self._leaving: set[ContainerId] = set()  # whose removal is being told, or was

    # What a plugin that comes is told at first

    def is_known(self, container: Container) -> bool:
        """Whether plugins have heard of it, and not yet of its removal."""
        if container.id in self._leaving:
            return False
        return container.state is not ContainerState.CREATING or container.id in self._messages.in_making

    def assume_told(self, containers: Iterable[Container]) -> None:
        """The ends of these are nothing new to anybody."""
        for container in containers:
            if container.state is ContainerState.EXITED:
                self._ends[container.id] = _done()

    # Hooks

    async def creating(self, container: Container, config: dict[str, Any]) -> Adjusted:
        self._messages.in_making[container.id] = config  # from here on, a plugin that comes is told of it
        if not self._plugins.wanting(nri.CREATE_CONTAINER) and self._rules is None:
            return Adjusted(config)
        request = nri.CreateContainerRequest(
            pod=self._messages.pod_of(container), container=to_nri.container(container.record, config, seccomp=True)
        )
        validation = nri.ValidateContainerAdjustmentRequest(
            pod=request.pod, container=request.container, plugins=self._plugins.instances()
        )
        creation = Creation(request)
        event = nri.CREATE_CONTAINER
        await self._plugins.tell(event, "CreateContainer", request, nri.CreateContainerResponse, creation.apply)
        await self._validate(validation, creation)
        result = await self._adjusted(container, config, creation.adjustment)
        await self._apply(creation.updates.others(), creation.evictions)
        self._messages.in_making[container.id] = result
        return Adjusted(result, adjust.limits(creation.adjustment.linux.resources))

    async def _validate(self, request: nri.ValidateContainerAdjustmentRequest, creation: Creation) -> None:
        if self._rules is None and not self._plugins.wanting(nri.VALIDATE_CONTAINER_ADJUSTMENT):
            return
        request.adjust.CopyFrom(creation.adjustment)
        request.update.extend(creation.updates.others())
        request.owners.CopyFrom(creation.owners.message)
        if self._rules is not None:
            validator.check(self._rules, request)
        await self._plugins.validate(request)

    async def _adjusted(
        self, container: Container, config: dict[str, Any], wanted: nri.ContainerAdjustment
    ) -> dict[str, Any]:
        node = self._node_for(container.record)
        if wanted.CDI_devices:  # their descriptions are files
            return await asyncio.to_thread(adjust.adjusted, config, wanted, node)
        return adjust.adjusted(config, wanted, node)

    def _node_for(self, record: ContainerRecord) -> adjust.Node:
        host, handler = self._host, self._handlers.find(record.runtime_handler)
        return adjust.Node(
            has_swap_limit=host.has_swap_limit,
            has_unified_cgroups=host.cgroups.version is cgroup.Version.V2,
            hugepage_sizes=host.hugepage_sizes,
            lowest_oom_score_adj=host.lowest_oom_score_adj,
            min_memory_bytes=handler.features.min_memory_bytes if handler else 0,
            inject_cdi=partial(
                self._messages.inject_cdi, idmap_mounts=handler is not None and handler.features.idmap_mounts
            ),
        )

    async def created(self, container: Container) -> None:
        self._messages.in_making.pop(container.id, None)
        await self._tell(container, nri.POST_CREATE_CONTAINER, "PostCreateContainer", nri.PostCreateContainerRequest)

    async def discarded(self, container: Container) -> None:
        if container.id in self._messages.in_making:
            await self.removing(container)

    async def starting(self, container: Container) -> None:
        request = nri.StartContainerRequest
        await self._ask(container, nri.START_CONTAINER, "StartContainer", request, nri.StartContainerResponse)

    async def started(self, container: Container) -> None:
        await self._tell(container, nri.POST_START_CONTAINER, "PostStartContainer", nri.PostStartContainerRequest)

    async def updating(self, container: Container, changes: Resources) -> Resources:
        if not self._plugins.wanting(nri.UPDATE_CONTAINER):
            return changes
        request = nri.UpdateContainerRequest(
            pod=self._messages.pod_of(container),
            container=await self._messages.container(container),
            linux_resources=to_nri.resources(changes),
        )
        updates, evictions = Updates.of_update(request), list[nri.ContainerEviction]()

        def take(answer: nri.UpdateContainerResponse, plugin: str) -> None:
            updates.apply(answer.update, plugin)
            evictions.extend(answer.evict)

        await self._plugins.tell(nri.UPDATE_CONTAINER, "UpdateContainer", request, nri.UpdateContainerResponse, take)
        await self._apply(updates.others(), evictions)
        return replace(adjust.limits(request.linux_resources), oom_score_adj=changes.oom_score_adj)

    async def updated(self, container: Container) -> None:
        await self._tell(container, nri.POST_UPDATE_CONTAINER, "PostUpdateContainer", nri.PostUpdateContainerRequest)

    async def stopped(self, container: Container) -> None:
        """Told once, whoever calls; it returns when every plugin has heard it."""
        if container.id not in self._ends:
            telling = asyncio.create_task(self._tell_stopped(container), name=f"NRI: end of {container.id}")
            self._ends[container.id] = telling
        await asyncio.shield(self._ends[container.id])

    async def _tell_stopped(self, container: Container) -> None:
        if not self._plugins.wanting(nri.STOP_CONTAINER):
            return
        updates = Updates()
        request = nri.StopContainerRequest(
            pod=self._messages.pod_of(container), container=await self._messages.container(container)
        )
        try:
            await self._plugins.tell(
                nri.STOP_CONTAINER,
                "StopContainer",
                request,
                nri.StopContainerResponse,
                lambda answer, plugin: updates.apply(answer.update, plugin),
            )
            await self._apply(updates.others(), ())
        except Error as error:
            _log.warning("container %s has ended: %s", container.id, error)
        except Exception:  # a defect of ours must not keep the container from being released
            _log.exception("container %s has ended: telling NRI plugins", container.id)

    async def removing(self, container: Container) -> None:
        await self.stopped(container)
        self._leaving = {container.id, *self._leaving.intersection(self._messages.known_containers())}
        await self._tell(container, nri.REMOVE_CONTAINER, "RemoveContainer", nri.RemoveContainerRequest)
        self._messages.in_making.pop(container.id, None)
        self._ends.pop(container.id, None)

    # Small steps

    async def _ask(
        self, container: Container, event: "nri.Event.ValueType", method: str, request: Any, answer: Any
    ) -> None:
        """Tell it, where a plugin may refuse."""
        if self._plugins.wanting(event):
            pod, message = self._messages.pod_of(container), await self._messages.container(container)
            await self._plugins.tell(event, method, request(pod=pod, container=message), answer)

    async def _tell(self, container: Container, event: "nri.Event.ValueType", method: str, request: Any) -> None:
        """Tell it, where it is too late to refuse."""
        try:
            await self._ask(container, event, method, request, nri.Empty)
        except Error as error:
            _log.warning("container %s: %s", container.id, error)
        except Exception:  # a defect of ours must not stop what has been decided
            _log.exception("container %s: %s", container.id, method)


class SandboxPlugins:
    """What plugins hear of pods."""

    def __init__(self, plugins: Plugins, messages: Messages, containers: Containers, ends: ContainerPlugins) -> None:
        self._plugins = plugins
        self._messages = messages
        self._containers = containers
        self._ends = ends
        self._in_making: set[SandboxId] = set()
        self._stopped: set[SandboxId] = set()
        self._leaving: set[SandboxId] = set()

    def is_known(self, record: SandboxRecord) -> bool:
        """Whether plugins have heard of it, and not yet of its removal."""
        if record.id in self._leaving:
            return False
        return record.state is not SandboxState.CREATING or record.id in self._in_making

    async def running(self, sandbox: Sandbox) -> None:
        self._in_making.add(sandbox.id)  # from here on, a plugin that comes is told of it
        await self._ask(sandbox, nri.RUN_POD_SANDBOX, "RunPodSandbox", nri.RunPodSandboxRequest)

    async def discarded(self, sandbox: Sandbox) -> None:
        if sandbox.id in self._in_making:
            await self.stopping(sandbox)
            await self.removing(sandbox)

    async def updating(self, sandbox: Sandbox, overhead: Resources, resources: Resources) -> None:
        if self._plugins.wanting(nri.UPDATE_POD_SANDBOX):
            request = nri.UpdatePodSandboxRequest(
                pod=self._messages.pod(sandbox),
                overhead_linux_resources=to_nri.resources(overhead),
                linux_resources=to_nri.resources(resources),
            )
            event = nri.UPDATE_POD_SANDBOX
            await self._plugins.tell(event, "UpdatePodSandbox", request, nri.UpdatePodSandboxResponse)

    async def updated(self, sandbox: Sandbox) -> None:
        event = nri.POST_UPDATE_POD_SANDBOX
        await self._tell(sandbox, event, "PostUpdatePodSandbox", nri.PostUpdatePodSandboxRequest)

    async def stopping(self, sandbox: Sandbox) -> None:
        for container in self._containers.of(sandbox.id):
            if container.exited.is_set() and self._ends.is_known(container):
                await self._ends.stopped(container)
        if sandbox.id not in self._stopped:
            self._stopped.add(sandbox.id)
            await self._tell(sandbox, nri.STOP_POD_SANDBOX, "StopPodSandbox", nri.StopPodSandboxRequest)

    async def removing(self, sandbox: Sandbox) -> None:
        self._leaving = {sandbox.id, *self._leaving.intersection(self._messages.known_sandboxes())}
        await self._tell(sandbox, nri.REMOVE_POD_SANDBOX, "RemovePodSandbox", nri.RemovePodSandboxRequest)
        self._in_making.discard(sandbox.id)
        self._stopped.discard(sandbox.id)

    async def _ask(self, sandbox: Sandbox, event: "nri.Event.ValueType", method: str, request: Any) -> None:
        if self._plugins.wanting(event):
            await self._plugins.tell(event, method, request(pod=self._messages.pod(sandbox)), nri.Empty)

    async def _tell(self, sandbox: Sandbox, event: "nri.Event.ValueType", method: str, request: Any) -> None:
        try:
            await self._ask(sandbox, event, method, request)
        except Error as error:
            _log.warning("pod sandbox %s: %s", sandbox.id, error)
        except Exception:  # a defect of ours must not stop what has been decided
            _log.exception("pod sandbox %s: %s", sandbox.id, method)


def _done() -> asyncio.Future[None]:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_result(None)
    return future
