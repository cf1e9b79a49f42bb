"""Records become CRI messages with all that they hold."""

from dataclasses import replace

from cri.api.runtime.v1 import api_pb2 as api
from cri.runtime_service import to_cri
from oci.container import ContainerRecord
from oci.container_spec import ContainerId, ContainerSpec, IdMapping, Mount, SandboxId
from oci.status import ContainerStatus, with_failed_start
from sandbox.sandbox import SandboxRecord
from sandbox.spec import SandboxSpec


def test_mounts_are_told_as_they_were_asked_for() -> None:
    mount = Mount(
        "/a",
        "/b",
        readonly=True,
        recursive_read_only=True,
        selinux_relabel=True,
        uid_mappings=(IdMapping(1, 2, 3),),
        gid_mappings=(IdMapping(4, 5, 6),),
    )

    told = to_cri.container_status(container(mounts=(mount,))).mounts[0]

    assert told == api.Mount(
        container_path="/a",
        host_path="/b",
        readonly=True,
        recursive_read_only=True,
        selinux_relabel=True,
        uidMappings=[api.IDMapping(container_id=1, host_id=2, length=3)],
        gidMappings=[api.IDMapping(container_id=4, host_id=5, length=6)],
    )
    assert (told.recursive_read_only, told.selinux_relabel) == (True, True)


def test_every_address_of_a_pod_is_told() -> None:
    record = SandboxRecord(
        id=SandboxId("1" * 64),
        spec=SandboxSpec(name="pod", uid="uid", namespace="ns"),
        runtime_handler="crun",
        hostname="pod",
        cgroup_parent="/",
        owns_cgroup_parent=False,
        requested_at=1,
        ips=("192.0.2.1", "2001:db8::1"),
    )

    network = to_cri.sandbox_status(record).network

    assert (network.ip, [each.ip for each in network.additional_ips]) == ("192.0.2.1", ["2001:db8::1"])


def test_the_words_of_a_failed_start_are_told() -> None:
    failed = with_failed_start(ContainerStatus(created_at=1), 2, "no such program")

    told = to_cri.container_status(replace(container(), status=failed))

    assert (told.state, told.message) == (api.CONTAINER_EXITED, "no such program")


def container(mounts: tuple[Mount, ...] = ()) -> ContainerRecord:
    return ContainerRecord(
        id=ContainerId("2" * 64),
        sandbox_id=SandboxId("1" * 64),
        spec=ContainerSpec("main", image="image", mounts=mounts),
        image_id="sha256:1",
        image_ref="image@sha256:2",
        image_mounts=(),
        runtime_handler="crun",
        log_path="",
        cgroup_parent="/",
        stop_signal="SIGTERM",
        rootfs="/rootfs",
        requested_at=1,
    )
