"""CRI messages become values; a wrong field is named with its value."""

import pytest

from cri.api.runtime.v1 import api_pb2 as api
from cri.runtime_service import from_cri, to_cri
from oci.container_spec import IdMapping, NamespaceMode, Profile, ProfileKind, Propagation, SELinuxLabel, UserNamespace
from oci.errors import InvalidArgument
from sandbox.spec import Protocol


def pod(**fields: object) -> api.PodSandboxConfig:
    metadata = api.PodSandboxMetadata(name="pod", uid="uid", namespace="ns")
    return api.PodSandboxConfig(metadata=metadata, **fields)  # type: ignore[arg-type]


def container(**fields: object) -> api.ContainerConfig:
    return api.ContainerConfig(
        metadata=api.ContainerMetadata(name="c"),
        image=api.ImageSpec(image="busybox"),
        **fields,  # type: ignore[arg-type]
    )


def secured(**fields: object) -> api.ContainerConfig:
    context = api.LinuxContainerSecurityContext(**fields)  # type: ignore[arg-type]
    return container(linux=api.LinuxContainerConfig(security_context=context))


def pod_with_options(**fields: object) -> api.PodSandboxConfig:
    options = api.NamespaceOption(**fields)  # type: ignore[arg-type]
    context = api.LinuxSandboxSecurityContext(namespace_options=options)
    return pod(linux=api.LinuxPodSandboxConfig(security_context=context))


def test_a_pod_without_linux_part_gets_the_cris_defaults() -> None:
    spec = from_cri.sandbox_spec(pod(), "")

    assert (spec.name, spec.uid, spec.namespace, spec.dns, spec.cgroup_parent) == ("pod", "uid", "ns", None, "")
    assert spec.security.network is NamespaceMode.POD


def test_port_mappings_keep_protocol_and_ports() -> None:
    mapping = api.PortMapping(protocol=api.UDP, container_port=53, host_port=5353, host_ip="127.0.0.1")

    found = from_cri.sandbox_spec(pod(port_mappings=[mapping]), "").port_mappings[0]

    assert (found.protocol, found.container_port, found.host_port, found.host_ip) == (
        Protocol.UDP,
        53,
        5353,
        "127.0.0.1",
    )


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (api.PodSandboxConfig(), "config.metadata: missing"),
        (api.PodSandboxConfig(metadata=api.PodSandboxMetadata(name="p", namespace="n")), r"metadata\.uid: empty"),
        (pod(hostname="h" * 65), "longer than 64"),
        (pod(log_directory="logs"), "'logs' is not an absolute path"),
        (pod(port_mappings=[api.PortMapping(container_port=70000)]), r"port_mappings\[0\]\.container_port: 70000"),
        (pod_with_options(network=api.CONTAINER), "namespace_options.network: CONTAINER"),
        (pod_with_options(ipc=api.TARGET), "namespace_options.ipc: TARGET"),
        (
            pod_with_options(userns_options=api.UserNamespace(mode=api.CONTAINER)),
            "userns_options.mode: CONTAINER is neither POD nor NODE",
        ),
        (pod_with_options(userns_options=api.UserNamespace(mode=api.POD)), "uids: exactly one mapping"),
        (
            pod(
                linux=api.LinuxPodSandboxConfig(
                    security_context=api.LinuxSandboxSecurityContext(run_as_group=api.Int64Value(value=1))
                )
            ),
            "run_as_group: given without run_as_user",
        ),
    ],
)
def test_a_wrong_field_of_a_pod_is_named(config: api.PodSandboxConfig, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        from_cri.sandbox_spec(config, "")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (api.ContainerConfig(image=api.ImageSpec(image="i")), "config.metadata: missing"),
        (api.ContainerConfig(metadata=api.ContainerMetadata(name="c")), "config.image.image: empty"),
        (container(working_dir="tmp"), "working_dir: 'tmp' is not an absolute path"),
        (container(log_path="../x.log"), "log_path: '../x.log'"),
        (container(log_path="/x.log"), "log_path: '/x.log'"),
        (container(envs=[api.KeyValue(key="A=B")]), r"envs\[0\]\.key: 'A=B'"),
        (container(mounts=[api.Mount(container_path="/a")]), r"mounts\[0\]\.host_path: empty"),
        (container(mounts=[api.Mount(host_path="/a")]), r"mounts\[0\]\.container_path: empty"),
        (
            container(mounts=[api.Mount(container_path="/a", image=api.ImageSpec(image="i"))]),
            r"mounts\[0\]\.readonly: false for an image volume",
        ),
        (
            container(mounts=[api.Mount(container_path="/a", host_path="/b", recursive_read_only=True)]),
            "recursive_read_only: true while readonly is false",
        ),
        (
            container(mounts=[api.Mount(container_path="/a", host_path="/b", mount_options=["suid"])]),
            "mount_options: 'suid' is not one of noexec, nodev, nosuid",
        ),
        (container(devices=[api.Device(host_path="/dev/null", permissions="x")]), r"permissions: 'x'"),
        (secured(namespace_options=api.NamespaceOption(pid=api.TARGET)), "target_id: empty"),
        (secured(run_as_group=api.Int64Value(value=1)), "run_as_group: given without"),
        (secured(seccomp=api.SecurityProfile(profile_type=api.SecurityProfile.Localhost)), "localhost_ref: empty"),
        (secured(apparmor_profile="nonsense"), "'nonsense' is not a profile's name"),
        (
            container(linux=api.LinuxContainerConfig(resources=api.LinuxContainerResources(oom_score_adj=1001))),
            "oom_score_adj: 1001",
        ),
    ],
)
def test_a_wrong_field_of_a_container_is_named(config: api.ContainerConfig, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        from_cri.container_spec(config)


def test_no_seccomp_at_all_is_unconfined_and_an_empty_profile_the_default() -> None:
    assert from_cri.container_spec(secured()).security.seccomp is None
    found = from_cri.container_spec(secured(seccomp=api.SecurityProfile())).security.seccomp
    assert found == Profile(ProfileKind.RUNTIME_DEFAULT)


def test_the_new_profile_field_wins_over_the_deprecated_text() -> None:
    new = api.SecurityProfile(profile_type=api.SecurityProfile.Unconfined)

    found = from_cri.container_spec(secured(seccomp=new, seccomp_profile_path="localhost/x")).security.seccomp
    deprecated = from_cri.container_spec(secured(seccomp_profile_path="localhost/x")).security.seccomp

    assert found == Profile(ProfileKind.UNCONFINED)
    assert deprecated == Profile(ProfileKind.LOCALHOST, "x")


def test_capabilities_lose_their_prefix() -> None:
    wanted = api.Capability(add_capabilities=["CAP_NET_ADMIN", "sys_time"], drop_capabilities=["ALL"])

    found = from_cri.container_spec(secured(capabilities=wanted)).security.capabilities

    assert (found.add, found.drop) == (("NET_ADMIN", "SYS_TIME"), ("ALL",))


def test_a_user_namespace_of_the_pod_keeps_its_mappings() -> None:
    ids = [api.IDMapping(container_id=0, host_id=65536, length=65536)]

    found = from_cri.sandbox_spec(
        pod_with_options(userns_options=api.UserNamespace(mode=api.POD, uids=ids, gids=ids)), ""
    ).security.user_namespace

    assert isinstance(found, UserNamespace)
    assert (found.uids[0].host_id, found.gids[0].length) == (65536, 65536)


def test_mounts_keep_propagation_and_options() -> None:
    mount = api.Mount(
        container_path="/a", host_path="/b", propagation=api.PROPAGATION_BIDIRECTIONAL, mount_options=["noexec"]
    )

    found = from_cri.container_spec(container(mounts=[mount])).mounts[0]

    assert (found.propagation, found.options) == (Propagation.BIDIRECTIONAL, ("noexec",))


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (api.SIGNAL_RUNTIME_DEFAULT, ""),
        (api.SIGNAL_SIGUSR1, "SIGUSR1"),
        (api.SIGNAL_SIGRTMINPLUS3, "SIGRTMIN+3"),
        (api.SIGNAL_SIGRTMAXMINUS1, "SIGRTMAX-1"),
    ],
)
def test_stop_signals_go_both_ways(value: "api.Signal.ValueType", name: str) -> None:
    assert from_cri.stop_signal(value) == name
    assert to_cri.signal(name) == value


def test_resources_go_both_ways() -> None:
    message = api.LinuxContainerResources(
        cpu_period=100000,
        cpu_quota=50000,
        cpu_shares=512,
        memory_limit_in_bytes=1 << 26,
        memory_swap_limit_in_bytes=1 << 27,
        oom_score_adj=500,
        cpuset_cpus="0-1",
        cpuset_mems="0",
        hugepage_limits=[api.HugepageLimit(page_size="2MB", limit=0)],
        unified={"memory.high": "100"},
    )

    assert to_cri.resources(from_cri.resources(message)) == message


def test_a_pod_s_security_context_is_kept() -> None:
    profile = api.SecurityProfile(profile_type=api.SecurityProfile.Localhost, localhost_ref="localhost/x")
    context = api.LinuxSandboxSecurityContext(
        run_as_user=api.Int64Value(value=5),
        run_as_group=api.Int64Value(value=6),
        privileged=True,
        readonly_rootfs=True,
        supplemental_groups=[7],
        seccomp=profile,
        apparmor=profile,
        selinux_options=api.SELinuxOption(type="t"),
    )

    found = from_cri.sandbox_spec(pod(linux=api.LinuxPodSandboxConfig(security_context=context)), "").security

    assert (found.run_as_user, found.run_as_group, found.supplemental_groups) == (5, 6, (7,))
    assert (found.privileged, found.readonly_rootfs) == (True, True)
    assert found.seccomp == found.apparmor == Profile(ProfileKind.LOCALHOST, "x")
    assert found.selinux == SELinuxLabel("", "", "t", "")


def test_a_user_namespace_has_to_map_id_0() -> None:
    ids = [api.IDMapping(container_id=1, host_id=65536, length=65536)]

    with pytest.raises(InvalidArgument, match="id 0 of the container is not mapped"):
        from_cri.sandbox_spec(pod_with_options(userns_options=api.UserNamespace(mode=api.POD, uids=ids, gids=ids)), "")


def test_a_selinux_label_is_kept() -> None:
    option = api.SELinuxOption(user="u", role="r", type="t", level="s0:c1,c2")

    found = from_cri.container_spec(secured(selinux_options=option)).security.selinux

    assert found == SELinuxLabel("u", "r", "t", "s0:c1,c2")


def test_mounts_keep_what_the_kernel_or_selinux_does() -> None:
    mount = api.Mount(
        container_path="/a",
        host_path="/b",
        selinux_relabel=True,
        uidMappings=[api.IDMapping(container_id=1, host_id=2, length=3)],
        gidMappings=[api.IDMapping(container_id=4, host_id=5, length=6)],
    )

    found = from_cri.container_spec(container(mounts=[mount])).mounts[0]

    assert found.selinux_relabel
    assert (found.uid_mappings, found.gid_mappings) == ((IdMapping(1, 2, 3),), (IdMapping(4, 5, 6),))


def test_streams_are_those_that_were_asked_for() -> None:
    found = from_cri.container_spec(container(stdin=True, stdin_once=True, tty=True))
    least = from_cri.container_spec(container())

    assert (found.stdin, found.stdin_once, found.tty) == (True, True, True)
    assert (least.stdin, least.stdin_once, least.tty) == (False, False, False)


def test_an_oom_score_of_0_is_no_change_of_it() -> None:
    assert from_cri.resource_changes(api.LinuxContainerResources(cpuset_cpus="0")).oom_score_adj is None
    assert from_cri.resource_changes(api.LinuxContainerResources(oom_score_adj=5)).oom_score_adj == 5
    assert from_cri.resources(api.LinuxContainerResources()).oom_score_adj == 0


def test_a_variable_of_other_bytes_than_utf8_does_not_keep_the_pod_from_starting() -> None:
    spec = from_cri.container_spec(container(envs=[api.KeyValue(key="KEY", value=b"a\xffb")]))

    assert spec.envs == (("KEY", "a\ufffdb"),)
