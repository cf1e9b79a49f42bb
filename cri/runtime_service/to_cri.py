"""Our values → CRI messages. Pure."""

from collections.abc import Iterable, Mapping

from cri.api.runtime.v1 import api_pb2 as api
from oci.container import ContainerRecord
from oci.container_spec import IdMapping, Mount, NamespaceMode, Propagation, Resources, UserNamespace
from oci.events import EventKind
from oci.status import ContainerState
from sandbox.sandbox import SandboxRecord, SandboxState

_MODES = {
    NamespaceMode.POD: api.POD,
    NamespaceMode.CONTAINER: api.CONTAINER,
    NamespaceMode.NODE: api.NODE,
    NamespaceMode.TARGET: api.TARGET,
}
_PROPAGATIONS = {
    Propagation.PRIVATE: api.PROPAGATION_PRIVATE,
    Propagation.HOST_TO_CONTAINER: api.PROPAGATION_HOST_TO_CONTAINER,
    Propagation.BIDIRECTIONAL: api.PROPAGATION_BIDIRECTIONAL,
}
_CONTAINER_STATES = {
    ContainerState.CREATING: api.CONTAINER_UNKNOWN,
    ContainerState.CREATED: api.CONTAINER_CREATED,
    ContainerState.RUNNING: api.CONTAINER_RUNNING,
    ContainerState.EXITED: api.CONTAINER_EXITED,
    ContainerState.UNKNOWN: api.CONTAINER_UNKNOWN,
}
_EVENTS = {
    EventKind.CREATED: api.CONTAINER_CREATED_EVENT,
    EventKind.STARTED: api.CONTAINER_STARTED_EVENT,
    EventKind.STOPPED: api.CONTAINER_STOPPED_EVENT,
    EventKind.DELETED: api.CONTAINER_DELETED_EVENT,
}


def sandbox_state(state: SandboxState) -> "api.PodSandboxState.ValueType":
    return api.SANDBOX_READY if state is SandboxState.READY else api.SANDBOX_NOTREADY


def container_state(state: ContainerState) -> "api.ContainerState.ValueType":
    return _CONTAINER_STATES[state]


def event_type(kind: EventKind) -> "api.ContainerEventType.ValueType":
    return _EVENTS[kind]


def sandbox_metadata(record: SandboxRecord) -> api.PodSandboxMetadata:
    spec = record.spec
    return api.PodSandboxMetadata(name=spec.name, uid=spec.uid, namespace=spec.namespace, attempt=spec.attempt)


def sandbox(record: SandboxRecord) -> api.PodSandbox:
    """The pod sandbox as ListPodSandbox shows it."""
    return api.PodSandbox(
        id=record.id,
        metadata=sandbox_metadata(record),
        state=sandbox_state(record.state),
        created_at=record.requested_at,
        labels=record.spec.labels,
        annotations=record.spec.annotations,
        runtime_handler=record.spec.runtime_handler,
    )


def sandbox_status(record: SandboxRecord) -> api.PodSandboxStatus:
    """The pod sandbox as PodSandboxStatus shows it; on the node's network it has no address of its own."""
    ips = record.ips
    return api.PodSandboxStatus(
        id=record.id,
        metadata=sandbox_metadata(record),
        state=sandbox_state(record.state),
        created_at=record.requested_at,
        network=api.PodSandboxNetworkStatus(
            ip=ips[0] if ips else "", additional_ips=[api.PodIP(ip=ip) for ip in ips[1:]]
        ),
        linux=api.LinuxPodSandboxStatus(namespaces=api.Namespace(options=_namespace_options(record))),
        labels=record.spec.labels,
        annotations=record.spec.annotations,
        runtime_handler=record.spec.runtime_handler,
    )


def container(record: ContainerRecord) -> api.Container:
    """The container as ListContainers shows it."""
    return api.Container(
        id=record.id,
        pod_sandbox_id=record.sandbox_id,
        metadata=container_metadata(record),
        image=_image_spec(record),
        image_ref=record.image_ref,
        image_id=record.image_id,
        state=container_state(record.state),
        created_at=_created_at(record),
        labels=record.spec.labels,
        annotations=record.spec.annotations,
    )


def container_status(record: ContainerRecord) -> api.ContainerStatus:
    status = record.status
    return api.ContainerStatus(
        id=record.id,
        metadata=container_metadata(record),
        state=container_state(record.state),
        created_at=_created_at(record),
        started_at=status.started_at or 0,
        finished_at=status.finished_at or 0,
        exit_code=status.exit_code,
        image=_image_spec(record),
        image_ref=record.image_ref,
        image_id=record.image_id,
        reason=status.reason,
        message=status.message,
        labels=record.spec.labels,
        annotations=record.spec.annotations,
        mounts=[_mount(mount, dict(record.image_mounts)) for mount in record.spec.mounts],
        log_path=record.log_path,
        resources=api.ContainerResources(linux=resources(status.resources)),
        user=_user(record),
        stop_signal=signal(record.stop_signal),
    )


def container_metadata(record: ContainerRecord) -> api.ContainerMetadata:
    return api.ContainerMetadata(name=record.spec.name, attempt=record.spec.attempt)


def resources(value: Resources) -> api.LinuxContainerResources:
    return api.LinuxContainerResources(
        cpu_period=value.cpu_period,
        cpu_quota=value.cpu_quota,
        cpu_shares=value.cpu_shares,
        memory_limit_in_bytes=value.memory_limit_bytes,
        memory_swap_limit_in_bytes=value.memory_swap_limit_bytes,
        oom_score_adj=value.oom_score_adj or 0,
        cpuset_cpus=value.cpuset_cpus,
        cpuset_mems=value.cpuset_mems,
        hugepage_limits=[api.HugepageLimit(page_size=size, limit=limit) for size, limit in value.hugepage_limits],
        unified=value.unified,
    )


def signal(name: str) -> "api.Signal.ValueType":
    """The CRI's number of a signal that is named as signal(7) does; 0 for a name that the CRI lacks."""
    word = "SIGNAL_" + name.replace("+", "PLUS").replace("-", "MINUS")
    return api.Signal.Value(word) if word in api.Signal.DESCRIPTOR.values_by_name else api.SIGNAL_RUNTIME_DEFAULT


def _created_at(record: ContainerRecord) -> int:
    return record.status.created_at or record.requested_at


def _image_spec(record: ContainerRecord) -> api.ImageSpec:
    return api.ImageSpec(
        image=record.spec.image, annotations=record.spec.image_annotations, user_specified_image=record.spec.image
    )


def _user(record: ContainerRecord) -> api.ContainerUser:
    if record.user is None:
        return api.ContainerUser()
    groups = sorted({record.user.gid, *record.user.additional_gids})
    return api.ContainerUser(
        linux=api.LinuxContainerUser(uid=record.user.uid, gid=record.user.gid, supplemental_groups=groups)
    )


def _mount(mount: Mount, image_mounts: Mapping[str, str]) -> api.Mount:
    return api.Mount(
        container_path=mount.container_path,
        host_path=mount.host_path,
        readonly=mount.readonly,
        selinux_relabel=mount.selinux_relabel,
        propagation=_PROPAGATIONS[mount.propagation],
        uidMappings=_id_mappings(mount.uid_mappings),
        gidMappings=_id_mappings(mount.gid_mappings),
        recursive_read_only=mount.recursive_read_only,
        image=_volume_image(mount, image_mounts) if mount.image else None,
        image_sub_path=mount.image_sub_path,
        mount_options=mount.options,
    )


def _volume_image(mount: Mount, image_mounts: Mapping[str, str]) -> api.ImageSpec:
    image_id = image_mounts.get(mount.container_path, "")
    return api.ImageSpec(image=mount.image, user_specified_image=mount.image_name or mount.image, image_ref=image_id)


def _namespace_options(record: SandboxRecord) -> api.NamespaceOption:
    security = record.spec.security
    return api.NamespaceOption(
        network=_MODES[security.network],
        pid=_MODES[security.pid],
        ipc=_MODES[security.ipc],
        userns_options=_user_namespace(security.user_namespace),
    )


def _user_namespace(value: UserNamespace | None) -> api.UserNamespace | None:
    if value is None:
        return None
    return api.UserNamespace(mode=api.POD, uids=_id_mappings(value.uids), gids=_id_mappings(value.gids))


def _id_mappings(mappings: Iterable[IdMapping]) -> list[api.IDMapping]:
    return [
        api.IDMapping(container_id=mapping.container_id, host_id=mapping.host_id, length=mapping.length)
        for mapping in mappings
    ]
