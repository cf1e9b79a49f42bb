"""The CRI's RuntimeService: one short method per RPC. What the RPCs do is told in `sandbox/` and `oci/`."""

import json
from collections.abc import AsyncIterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from cri.api.runtime.v1 import api_pb2 as api
from cri.api.runtime.v1 import api_pb2_grpc
from cri.changes import Changes
from cri.chunks import chunks
from cri.image_service.images import Image, Images
from cri.runtime_service import checkpoints, filters, from_cri, to_cri
from cri.runtime_service.checkpoints import ContainerCheckpoints
from cri.runtime_service.events import ContainerEvents
from cri.runtime_service.exec import Streaming
from cri.runtime_service.metrics import PodMetrics
from cri.runtime_service.stats import Stats
from cri.runtime_service.status import RuntimeStatus
from oci.container import Container
from oci.container_spec import ContainerSpec
from oci.containers import Containers
from oci.errors import InvalidArgument, NotFound
from oci.handlers import Handlers
from oci.image_volumes import ImageMount
from oci.preparation import ImageToRun
from oci.version import VERSION
from sandbox.sandbox import Sandbox
from sandbox.sandboxes import Sandboxes

Context = grpc.aio.ServicerContext[Any, Any]

CRI_VERSION = "0.1.0"  # what every runtime and the kubelet say in VersionResponse.version


class RuntimeService(api_pb2_grpc.RuntimeServiceServicer):
    def __init__(
        self,
        changes: Changes,
        sandboxes: Sandboxes,
        containers: Containers,
        images: Images,
        handlers: Handlers,
        events: ContainerEvents,
        stats: Stats,
        metrics: PodMetrics,
        status: RuntimeStatus,
        streaming: Streaming,
        checkpoints: ContainerCheckpoints,
    ) -> None:
        self._changes = changes
        self._sandboxes = sandboxes
        self._containers = containers
        self._images = images
        self._handlers = handlers
        self._events = events
        self._stats = stats
        self._metrics = metrics
        self._status = status
        self._streaming = streaming
        self._checkpoints = checkpoints

    # The runtime

    async def Version(self, request: api.VersionRequest, context: Context) -> api.VersionResponse:
        return api.VersionResponse(
            version=CRI_VERSION, runtime_name="crito", runtime_version=VERSION, runtime_api_version="v1"
        )

    async def Status(self, request: api.StatusRequest, context: Context) -> api.StatusResponse:
        return self._status.response(request.verbose)

    async def RuntimeConfig(self, request: api.RuntimeConfigRequest, context: Context) -> api.RuntimeConfigResponse:
        return self._status.config()

    async def UpdateRuntimeConfig(
        self, request: api.UpdateRuntimeConfigRequest, context: Context
    ) -> api.UpdateRuntimeConfigResponse:
        """The pod CIDR is the CNI configuration's business here, as with CRI-O: taken, and nothing changes."""
        return api.UpdateRuntimeConfigResponse()

    # Pod sandboxes

    async def RunPodSandbox(self, request: api.RunPodSandboxRequest, context: Context) -> api.RunPodSandboxResponse:
        spec = from_cri.sandbox_spec(request.config, request.runtime_handler)
        handler = self._handlers.resolve(request.runtime_handler).name
        key = f"run pod sandbox {spec.namespace}/{spec.name}/{spec.uid}/{spec.attempt} {_digest(request)}"
        sandbox = await self._changes.run(key, lambda: self._sandboxes.run(spec, handler))
        return api.RunPodSandboxResponse(pod_sandbox_id=sandbox.id)

    async def StopPodSandbox(self, request: api.StopPodSandboxRequest, context: Context) -> api.StopPodSandboxResponse:
        _required(request, "pod_sandbox_id")
        sandbox = self._sandboxes.find(request.pod_sandbox_id)
        if sandbox is not None:
            await self._changes.run(f"stop pod sandbox {sandbox.id}", lambda: self._sandboxes.stop(sandbox))
        return api.StopPodSandboxResponse()

    async def RemovePodSandbox(
        self, request: api.RemovePodSandboxRequest, context: Context
    ) -> api.RemovePodSandboxResponse:
        id = _required(request, "pod_sandbox_id")
        await self._changes.run(f"remove pod sandbox {id}", lambda: self._remove_sandbox(id))
        return api.RemovePodSandboxResponse()

    async def _remove_sandbox(self, id: str) -> None:
        sandbox = self._sandboxes.find(id)
        if sandbox is not None:
            await self._sandboxes.remove(sandbox)

    async def PodSandboxStatus(
        self, request: api.PodSandboxStatusRequest, context: Context
    ) -> api.PodSandboxStatusResponse:
        sandbox = self._sandboxes.get(_required(request, "pod_sandbox_id"))
        return api.PodSandboxStatusResponse(
            status=to_cri.sandbox_status(sandbox.record),
            info={"info": json.dumps(self._sandbox_info(sandbox))} if request.verbose else {},
            containers_statuses=self._events.container_statuses(sandbox.id),
            timestamp=self._events.now(),
        )

    async def ListPodSandbox(self, request: api.ListPodSandboxRequest, context: Context) -> api.ListPodSandboxResponse:
        return api.ListPodSandboxResponse(items=self._listed_sandboxes(request.filter))

    async def StreamPodSandboxes(
        self, request: api.StreamPodSandboxesRequest, context: Context
    ) -> AsyncIterator[api.StreamPodSandboxesResponse]:
        for chunk in chunks(self._listed_sandboxes(request.filter)):
            yield api.StreamPodSandboxesResponse(pod_sandboxes=chunk)

    async def UpdatePodSandboxResources(
        self, request: api.UpdatePodSandboxResourcesRequest, context: Context
    ) -> api.UpdatePodSandboxResourcesResponse:
        sandbox = self._sandboxes.get(_required(request, "pod_sandbox_id"))
        overhead, resources = from_cri.resources(request.overhead), from_cri.resources(request.resources)
        await self._sandboxes.update_resources(sandbox, overhead, resources)
        return api.UpdatePodSandboxResourcesResponse()

    # Containers

    async def CreateContainer(
        self, request: api.CreateContainerRequest, context: Context
    ) -> api.CreateContainerResponse:
        sandbox = self._sandboxes.ready(_required(request, "pod_sandbox_id"))
        spec = from_cri.container_spec(request.config)
        namespace = sandbox.record.spec.namespace
        checkpoint = await self._checkpoints.find(request.config.image.image, spec.image, namespace)
        image = None if checkpoint is not None else self._images.resolve(request.config.image.image)
        key = f"create container {sandbox.id}/{spec.name}/{spec.attempt} {_digest(request.config)}"

        async def create() -> Container:
            pod = self._sandboxes.environment(self._sandboxes.ready(sandbox.id))
            base = image if checkpoint is None else await self._checkpoints.image_of(checkpoint, namespace)
            assert base is not None  # resolved, where there is no checkpoint
            handler = self._handlers.resolve(sandbox.record.runtime_handler)
            to_run = await self._to_run(base, spec, namespace)
            return await self._containers.create(spec, pod, to_run, handler, checkpoint)

        container = await self._changes.run(key, create)
        return api.CreateContainerResponse(container_id=container.id)

    async def StartContainer(self, request: api.StartContainerRequest, context: Context) -> api.StartContainerResponse:
        container = self._containers.get(_required(request, "container_id"))
        self._sandboxes.ready(container.record.sandbox_id)
        await self._changes.run(f"start container {container.id}", lambda: self._containers.start(container))
        return api.StartContainerResponse()

    async def StopContainer(self, request: api.StopContainerRequest, context: Context) -> api.StopContainerResponse:
        container = self._containers.find(_required(request, "container_id"))
        if container is not None:  # an unknown one has stopped: the call is idempotent (critest)
            await self._containers.stop(container, request.timeout)
        return api.StopContainerResponse()

    async def RemoveContainer(
        self, request: api.RemoveContainerRequest, context: Context
    ) -> api.RemoveContainerResponse:
        id = _required(request, "container_id")
        await self._changes.run(f"remove container {id}", lambda: self._remove_container(id))
        return api.RemoveContainerResponse()

    async def _remove_container(self, id: str) -> None:
        """An unknown id is success: the kubelet calls again after a timeout (api.proto, RemoveContainer)."""
        container = self._containers.find(id)
        if container is not None:
            await self._containers.remove(container)

    async def ListContainers(self, request: api.ListContainersRequest, context: Context) -> api.ListContainersResponse:
        return api.ListContainersResponse(containers=self._listed_containers(request.filter))

    async def StreamContainers(
        self, request: api.StreamContainersRequest, context: Context
    ) -> AsyncIterator[api.StreamContainersResponse]:
        for chunk in chunks(self._listed_containers(request.filter)):
            yield api.StreamContainersResponse(containers=chunk)

    async def ContainerStatus(
        self, request: api.ContainerStatusRequest, context: Context
    ) -> api.ContainerStatusResponse:
        container = self._containers.get(_required(request, "container_id"))
        return api.ContainerStatusResponse(
            status=to_cri.container_status(container.record),
            info={"info": json.dumps(await self._container_info(container))} if request.verbose else {},
        )

    async def UpdateContainerResources(
        self, request: api.UpdateContainerResourcesRequest, context: Context
    ) -> api.UpdateContainerResourcesResponse:
        container = self._containers.get(_required(request, "container_id"))
        if request.HasField("linux"):
            await self._containers.update(container, from_cri.resource_changes(request.linux))
        return api.UpdateContainerResourcesResponse()

    async def ReopenContainerLog(
        self, request: api.ReopenContainerLogRequest, context: Context
    ) -> api.ReopenContainerLogResponse:
        await self._containers.reopen_log(self._containers.get(_required(request, "container_id")))
        return api.ReopenContainerLogResponse()

    # Exec

    async def ExecSync(self, request: api.ExecSyncRequest, context: Context) -> api.ExecSyncResponse:
        container = self._containers.get(_required(request, "container_id"))
        if not request.cmd:
            raise InvalidArgument("cmd: empty")
        if request.timeout < 0:
            raise InvalidArgument(f"timeout: {request.timeout} is negative")
        result = await self._containers.exec_sync(container, tuple(request.cmd), request.timeout or None)
        return api.ExecSyncResponse(stdout=result.stdout, stderr=result.stderr, exit_code=result.exit_code)

    async def Exec(self, request: api.ExecRequest, context: Context) -> api.ExecResponse:
        _required(request, "container_id")
        return api.ExecResponse(url=await self._streaming.exec(request))

    async def Attach(self, request: api.AttachRequest, context: Context) -> api.AttachResponse:
        _required(request, "container_id")
        return api.AttachResponse(url=await self._streaming.attach(request))

    async def PortForward(self, request: api.PortForwardRequest, context: Context) -> api.PortForwardResponse:
        _required(request, "pod_sandbox_id")
        return api.PortForwardResponse(url=await self._streaming.port_forward(request))

    # Statistics and events

    async def ContainerStats(self, request: api.ContainerStatsRequest, context: Context) -> api.ContainerStatsResponse:
        container = self._containers.get(_required(request, "container_id"))
        return api.ContainerStatsResponse(stats=(await self._stats.containers([container]))[0])

    async def ListContainerStats(
        self, request: api.ListContainerStatsRequest, context: Context
    ) -> api.ListContainerStatsResponse:
        return api.ListContainerStatsResponse(stats=await self._listed_container_stats(request.filter))

    async def StreamContainerStats(
        self, request: api.StreamContainerStatsRequest, context: Context
    ) -> AsyncIterator[api.StreamContainerStatsResponse]:
        for chunk in chunks(await self._listed_container_stats(request.filter)):
            yield api.StreamContainerStatsResponse(container_stats=chunk)

    async def PodSandboxStats(
        self, request: api.PodSandboxStatsRequest, context: Context
    ) -> api.PodSandboxStatsResponse:
        sandbox = self._sandboxes.get(_required(request, "pod_sandbox_id"))
        return api.PodSandboxStatsResponse(stats=(await self._stats.sandboxes([sandbox]))[0])

    async def ListPodSandboxStats(
        self, request: api.ListPodSandboxStatsRequest, context: Context
    ) -> api.ListPodSandboxStatsResponse:
        return api.ListPodSandboxStatsResponse(stats=await self._listed_sandbox_stats(request.filter))

    async def StreamPodSandboxStats(
        self, request: api.StreamPodSandboxStatsRequest, context: Context
    ) -> AsyncIterator[api.StreamPodSandboxStatsResponse]:
        for chunk in chunks(await self._listed_sandbox_stats(request.filter)):
            yield api.StreamPodSandboxStatsResponse(pod_sandbox_stats=chunk)

    async def GetContainerEvents(
        self, request: api.GetEventsRequest, context: Context
    ) -> AsyncIterator[api.ContainerEventResponse]:
        with self._events.subscribed() as events:
            await context.send_initial_metadata(())  # tells the client that it listens from here on
            async for event in events:
                yield event

    async def ListMetricDescriptors(
        self, request: api.ListMetricDescriptorsRequest, context: Context
    ) -> api.ListMetricDescriptorsResponse:
        return api.ListMetricDescriptorsResponse(descriptors=self._metrics.descriptors())

    async def ListPodSandboxMetrics(
        self, request: api.ListPodSandboxMetricsRequest, context: Context
    ) -> api.ListPodSandboxMetricsResponse:
        return api.ListPodSandboxMetricsResponse(pod_metrics=await self._metrics.of_pods())

    async def StreamPodSandboxMetrics(
        self, request: api.StreamPodSandboxMetricsRequest, context: Context
    ) -> AsyncIterator[api.StreamPodSandboxMetricsResponse]:
        for chunk in chunks(await self._metrics.of_pods()):
            yield api.StreamPodSandboxMetricsResponse(pod_sandbox_metrics=chunk)

    # Checkpoints

    async def CheckpointContainer(
        self, request: api.CheckpointContainerRequest, context: Context
    ) -> api.CheckpointContainerResponse:
        container = self._containers.get(_required(request, "container_id"))
        location = _required(request, "location")
        if request.timeout < 0:
            raise InvalidArgument(f"timeout: {request.timeout} is negative")
        timeout_s = checkpoints.timeout_of(request.timeout, context.time_remaining())
        await self._changes.run(
            f"checkpoint container {container.id} to {location}",
            lambda: self._checkpoints.save(container, location, timeout_s),
        )
        return api.CheckpointContainerResponse()

    async def CheckpointPod(self, request: api.CheckpointPodRequest, context: Context) -> api.CheckpointPodResponse:
        sandbox = self._sandboxes.ready(_required(request, "pod_sandbox_id"))
        directory = Path(_required(request, "output_path"))
        _no_options(request.options)
        if not request.container_ids or len(set(request.container_ids)) != len(request.container_ids):
            raise InvalidArgument(f"container_ids: {list(request.container_ids)} is empty or has one twice")
        containers = [self._containers.get(id) for id in request.container_ids]
        timeout_s = checkpoints.timeout_of(0, context.time_remaining())
        await self._changes.run(
            f"checkpoint pod sandbox {sandbox.id} to {directory} {_digest(request)}",
            lambda: self._checkpoints.save_pod(sandbox, containers, directory, timeout_s),
        )
        return api.CheckpointPodResponse()

    async def RestorePod(self, request: api.RestorePodRequest, context: Context) -> api.RestorePodResponse:
        directory = Path(_required(request, "checkpoint_path"))
        _no_options(request.options)
        spec = from_cri.sandbox_spec(request.config, request.runtime_handler)
        handler = self._handlers.resolve(request.runtime_handler).name
        wanted = [from_cri.container_spec(each) for each in request.container_configs]
        sandbox, containers = await self._changes.run(
            f"restore pod sandbox {spec.namespace}/{spec.name}/{spec.uid} {_digest(request)}",
            lambda: self._checkpoints.restore_pod(directory, spec, handler, wanted, self._to_run),
        )
        restored = [api.RestoredContainer(name=each.record.spec.name, container_id=each.id) for each in containers]
        return api.RestorePodResponse(pod_sandbox_id=sandbox.id, restored_containers=restored)

    # Small steps

    async def _to_run(self, image: Image, spec: ContainerSpec, namespace: str) -> ImageToRun:
        """The image, and those that are mounted, whole on the disk and accepted by the policy of the namespace."""
        if image.artifact is not None:
            raise InvalidArgument(
                f"config.image.image: {_image_ref(image)} is an artifact of type {image.artifact.type!r}, not a"
                " container image: it can be mounted as a volume, but not run"
            )
        mounted = [(self._images.resolve(each.image), each) for each in spec.mounts if each.image]
        named = [(image, spec.image), *((volume, each.image_name or each.image) for volume, each in mounted)]
        for found, name in named:
            await self._images.allow(found, name, namespace)
            await self._images.ensure(found.id)
        layers = self._images.layer_paths(image.id)
        return ImageToRun(image.id, _image_ref(image), image.config, layers, self._image_mounts(spec))

    def _image_mounts(self, spec: ContainerSpec) -> tuple[ImageMount, ...]:
        """What the container's image volumes show. Raises NotFound for an image that is not on this node."""
        wanted = [(mount, self._images.resolve(mount.image)) for mount in spec.mounts if mount.image]
        return tuple(
            ImageMount(mount.container_path, image.id, self._images.layer_paths(image.id), mount.image_sub_path)
            for mount, image in wanted
        )

    def _listed_sandboxes(self, wanted: api.PodSandboxFilter) -> list[api.PodSandbox]:
        return [
            to_cri.sandbox(each.record) for each in self._sandboxes.all() if filters.sandbox_passes(each.record, wanted)
        ]

    def _listed_containers(self, wanted: api.ContainerFilter) -> list[api.Container]:
        return [
            to_cri.container(each.record)
            for each in self._containers.all()
            if filters.container_passes(each.record, wanted)
        ]

    async def _listed_container_stats(self, wanted: api.ContainerStatsFilter) -> list[api.ContainerStats]:
        passing = [each for each in self._containers.all() if filters.container_stats_passes(each.record, wanted)]
        return await self._stats.containers(passing)

    async def _listed_sandbox_stats(self, wanted: api.PodSandboxStatsFilter) -> list[api.PodSandboxStats]:
        passing = [each for each in self._sandboxes.all() if filters.sandbox_stats_passes(each.record, wanted)]
        return await self._stats.sandboxes(passing)

    def _sandbox_info(self, sandbox: Sandbox) -> dict[str, Any]:
        record = sandbox.record
        return {
            "pid": record.pause_pid,
            "runtimeHandler": record.runtime_handler,
            "hostname": record.hostname,
            "cgroupParent": record.cgroup_parent,
            "netns": self._sandboxes.netns(sandbox),
            "ips": record.ips,
            "cniResults": [json.loads(each.result) for each in record.attachments if each.result],
        }

    async def _container_info(self, container: Container) -> dict[str, Any]:
        record = container.record
        try:
            runtime_spec = await self._containers.runtime_spec(container)
        except NotFound:
            runtime_spec = {}
        return {
            "sandboxID": record.sandbox_id,
            "pid": record.status.pid,
            "runtimeHandler": record.runtime_handler,
            "rootfs": record.rootfs,
            "cgroup": self._containers.cgroup_path(container),
            "runtimeSpec": runtime_spec,
        }


def _required(request: Message, field: str) -> str:
    value: str = getattr(request, field)
    if not value:
        raise InvalidArgument(f"{field}: empty")
    return value


def _no_options(options: Mapping[str, str]) -> None:
    if options:
        raise InvalidArgument(f"options: {', '.join(sorted(options))}: there are none")


def _image_ref(image: Image) -> str:
    """How a container's status names its image: by a digest that a registry knows, where there is one."""
    return image.repo_digests[0] if image.repo_digests else image.id


def _digest(request: Message) -> str:
    """Tells equal requests from others that bear the same name."""
    return sha256(request.SerializeToString(deterministic=True)).hexdigest()[:16]
