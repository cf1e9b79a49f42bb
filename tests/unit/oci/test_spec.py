import resource
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oci import spec
from oci.container_spec import (
    Capabilities,
    ContainerId,
    ContainerSpec,
    IdMapping,
    Mount,
    NamespaceMode,
    PodEnvironment,
    Profile,
    ProfileKind,
    Propagation,
    Resources,
    SandboxId,
    SecurityContext,
    UserNamespace,
)
from oci.errors import Error, FailedPrecondition, InvalidArgument
from oci.host import HostObjects
from oci.image import ImageConfig
from oci.linux import caps, seccomp
from oci.linux.cgroup import Cgroups, Hierarchy
from oci.linux.devices import DeviceNode
from oci.linux.node import Node, Rlimit, permitted
from oci.linux.passwd import User

V2 = Cgroups((Hierarchy(Path("/sys/fs/cgroup"), frozenset({"cpu", "memory", "hugetlb"}), True),))
V1 = Cgroups((Hierarchy(Path("/sys/fs/cgroup/memory"), frozenset({"memory"}), False),))
NODE = Node(
    cgroups=V2,
    capabilities=frozenset(caps.NAMES),
    lowest_oom_score_adj=-1000,
    has_apparmor=False,
    has_selinux=False,
    has_swap_limit=True,
    hugepage_sizes=frozenset({"2MB"}),
    architecture=seccomp.architecture("x86_64"),
)
POD = PodEnvironment(
    sandbox_id=SandboxId("5" * 64),
    hostname="pod",
    net_ns="/ns/net",
    ipc_ns="/ns/ipc",
    uts_ns="/ns/uts",
    pid_ns="/ns/pid",
    user_ns="",
    cgroup_parent="/kubepods/pod1",
    resolv_conf_path="/pod/resolv.conf",
    hostname_path="/pod/hostname",
    hosts_path="",
    shm_path="/pod/shm",
    log_directory="",
    privileged=False,
)
PLACEMENT = spec.Placement(ContainerId("c1"), Path("/rootfs"), User(0, 0, (0,), "/root"), "/kubepods/pod1/crito-c1")
WANTED = ContainerSpec("web", image="nginx", command=("/bin/web",))
DISK = DeviceNode("/dev/disk", "b", 8, 1, 0o660, 0, 6, "rw")


def build(
    wanted: ContainerSpec = WANTED,
    image: ImageConfig | None = None,
    *,
    pod: PodEnvironment = POD,
    node: Node = NODE,
    placement: spec.Placement = PLACEMENT,
    host: HostObjects | None = None,
    features: spec.RuntimeFeatures | None = None,
    defaults: spec.Defaults | None = None,
) -> dict[str, Any]:
    if host is None:
        host = HostObjects({mount.host_path: mount.host_path for mount in wanted.mounts})
    return spec.build(
        wanted,
        image or ImageConfig(),
        pod,
        node,
        placement=placement,
        host=host,
        features=features or spec.RuntimeFeatures(),
        defaults=defaults or spec.Defaults(),
    )


def secure(**fields: Any) -> ContainerSpec:
    return replace(WANTED, security=SecurityContext(**fields))


def limited(**fields: Any) -> ContainerSpec:
    return replace(WANTED, resources=Resources(**fields))


def destinations(config: Mapping[str, Any]) -> list[str]:
    return [mounted["destination"] for mounted in config["mounts"]]


def mounted_at(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = [each for each in config["mounts"] if each["destination"] == path]
    assert len(found) == 1
    return found[0]


def namespaces(config: Mapping[str, Any]) -> dict[str, str | None]:
    return {each["type"]: each.get("path") for each in config["linux"]["namespaces"]}


@pytest.mark.parametrize(
    ("command", "args", "expected"),
    [
        ((), (), ["/entry", "e", "cmd"]),
        ((), ("a",), ["/entry", "e", "a"]),
        (("/own",), (), ["/own"]),
        (("/own",), ("a",), ["/own", "a"]),
    ],
)
def test_what_is_run(command: tuple[str, ...], args: tuple[str, ...], expected: list[str]) -> None:
    image = ImageConfig(entrypoint=("/entry", "e"), cmd=("cmd",))

    assert build(replace(WANTED, command=command, args=args), image)["process"]["args"] == expected


def test_nothing_to_run_is_an_error_that_names_the_image() -> None:
    with pytest.raises(InvalidArgument, match="nginx"):
        build(replace(WANTED, command=()))


def test_the_environment_is_the_defaults_then_the_images_then_the_pods() -> None:
    image = ImageConfig(env=("PATH=/image", "A=image", "B=image", "nonsense"))
    wanted = replace(WANTED, tty=True, envs=(("B", "pod"), ("C", "x=y"), ("D", "")))

    env = build(wanted, image)["process"]["env"]

    assert env == ["PATH=/image", "TERM=xterm", "HOSTNAME=pod", "HOME=/root", "A=image", "B=pod", "C=x=y", "D="]


@pytest.mark.parametrize("name", ["", "A=B", "A\0"])
def test_an_impossible_variable_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="envs"):
        build(replace(WANTED, envs=((name, "x"),)))


@pytest.mark.parametrize(
    ("of_pod", "of_image", "expected"),
    [("", "", "/"), ("", "/app", "/app"), ("/x/", "/app", "/x"), ("", "relative", "/relative")],
)
def test_the_working_directory_is_absolute(of_pod: str, of_image: str, expected: str) -> None:
    config = build(replace(WANTED, working_dir=of_pod), ImageConfig(working_dir=of_image))

    assert config["process"]["cwd"] == expected


def test_the_root_and_the_place_are_given() -> None:
    config = build(secure(readonly_rootfs=True))

    assert config["root"] == {"path": "/rootfs", "readonly": True}
    assert config["linux"]["cgroupsPath"] == "/kubepods/pod1/crito-c1"
    assert "hostname" not in config


def test_the_pods_namespaces_are_joined() -> None:
    assert namespaces(build()) == {
        "mount": None,
        "network": "/ns/net",
        "ipc": "/ns/ipc",
        "uts": "/ns/uts",
        "pid": "/ns/pid",
        "cgroup": None,
    }
    assert "cgroup" not in namespaces(build(node=replace(NODE, cgroups=V1)))
    assert "network" not in namespaces(build(pod=replace(POD, net_ns="")))


@pytest.mark.parametrize(
    ("mode", "pod", "expected"),
    [
        (NamespaceMode.POD, POD, {"pid": "/ns/pid"}),
        (NamespaceMode.POD, replace(POD, pid_ns=""), {"pid": None}),
        (NamespaceMode.CONTAINER, POD, {"pid": None}),
        (NamespaceMode.NODE, POD, {}),
        (NamespaceMode.TARGET, POD, {"pid": "/proc/7/ns/pid"}),
    ],
)
def test_the_pid_namespace_follows_its_mode(
    mode: NamespaceMode, pod: PodEnvironment, expected: dict[str, str | None]
) -> None:
    config = build(secure(pid=mode), pod=pod, placement=replace(PLACEMENT, target_pid_ns="/proc/7/ns/pid"))

    assert {kind: path for kind, path in namespaces(config).items() if kind == "pid"} == expected


def test_a_target_that_is_not_there_is_an_error() -> None:
    with pytest.raises(InvalidArgument, match="target_id"):
        build(secure(pid=NamespaceMode.TARGET))


def test_a_user_namespace_is_joined_with_its_mappings() -> None:
    mapping = (IdMapping(0, 1000, 65536),)
    config = build(pod=replace(POD, user_ns="/ns/user", user_namespace=UserNamespace(mapping, mapping)))

    assert namespaces(config)["user"] == "/ns/user"
    assert config["linux"]["uidMappings"] == [{"containerID": 0, "hostID": 1000, "size": 65536}]
    assert mounted_at(config, "/sys")["type"] == "sysfs"
    host_network = build(pod=replace(POD, user_ns="/ns/user", net_ns=""))
    assert mounted_at(host_network, "/sys")["type"] == "bind"
    assert "/sys/fs/cgroup" not in destinations(host_network)


def test_default_mounts_come_before_the_pods_and_parents_before_children() -> None:
    wanted = replace(WANTED, mounts=(Mount("/a/b/c", "/3"), Mount("/a", "/1"), Mount("/z", "/z"), Mount("/a/b", "/2")))
    config = build(wanted, placement=replace(PLACEMENT, volumes={"/a/v": Path("/v"), "/z": Path("/hidden")}))

    paths = destinations(config)

    assert paths[:7] == ["/proc", "/dev", "/dev/pts", "/dev/mqueue", "/sys", "/sys/fs/cgroup", "/dev/shm"]
    assert paths[7:] == ["/etc/resolv.conf", "/etc/hostname", "/a", "/z", "/a/v", "/a/b", "/a/b/c"]
    assert mounted_at(config, "/z")["source"] == "/z"


def test_a_mount_on_a_default_path_replaces_it_with_all_below() -> None:
    config = build(replace(WANTED, mounts=(Mount("/dev", "/host/dev"), Mount("/etc/hostname/", "/own"))))

    assert [path for path in destinations(config) if path.startswith("/dev")] == ["/dev"]
    assert mounted_at(config, "/etc/hostname")["source"] == "/own"
    assert "/etc/hosts" not in destinations(config)


@pytest.mark.parametrize(
    ("mount", "options"),
    [
        (Mount("/v", "/h"), ["rbind", "rprivate", "rw"]),
        (Mount("/v", "/h", readonly=True), ["rbind", "rprivate", "ro"]),
        (Mount("/v", "/h", propagation=Propagation.HOST_TO_CONTAINER), ["rbind", "rslave", "rw"]),
        (Mount("/v", "/h", options=("noexec", "nodev")), ["rbind", "rprivate", "noexec", "nodev", "rw"]),
        (Mount("/v", "/h", readonly=True, recursive_read_only=True), ["rbind", "rprivate", "rro"]),
    ],
)
def test_the_options_of_a_mount(mount: Mount, options: list[str]) -> None:
    config = build(replace(WANTED, mounts=(mount,)), features=spec.RuntimeFeatures(recursive_read_only=True))

    assert mounted_at(config, "/v") == {"destination": "/v", "type": "bind", "source": "/h", "options": options}


def test_the_source_is_what_the_host_resolved() -> None:
    wanted = replace(WANTED, mounts=(Mount("/v", "/link"),))

    assert mounted_at(build(wanted, host=HostObjects({"/link": "/real"})), "/v")["source"] == "/real"


def test_the_roots_propagation_is_the_widest_that_a_mount_needs() -> None:
    slave = Mount("/s", "/s", propagation=Propagation.HOST_TO_CONTAINER)
    shared = Mount("/b", "/b", propagation=Propagation.BIDIRECTIONAL)

    assert "rootfsPropagation" not in build()["linux"]
    assert build(replace(WANTED, mounts=(slave,)))["linux"]["rootfsPropagation"] == "rslave"
    assert build(replace(WANTED, mounts=(slave, shared)))["linux"]["rootfsPropagation"] == "rshared"


def test_an_image_mount_is_read_only_and_comes_from_its_owner() -> None:
    wanted = replace(WANTED, mounts=(Mount("/v", image="model"),))
    config = build(wanted, placement=replace(PLACEMENT, image_mounts={"/v": Path("/image/sub")}))

    assert mounted_at(config, "/v")["source"] == "/image/sub"
    assert mounted_at(config, "/v")["options"][-1] == "ro"


@pytest.mark.parametrize(
    ("mount", "kind", "said"),
    [
        (Mount("/", "/h"), InvalidArgument, "root"),
        (Mount("", "/h"), InvalidArgument, "container_path"),
        (Mount("/a/../b", "/h"), InvalidArgument, "container_path"),
        (Mount("/v", "/h", image="x"), InvalidArgument, "exclude"),
        (Mount("/v", image="x"), InvalidArgument, "not found"),
        (Mount("/v", "/h", options=("suid",)), InvalidArgument, "mount_options suid"),
        (Mount("/v", "/h", recursive_read_only=True), InvalidArgument, "needs readonly"),
        (
            Mount("/v", "/h", readonly=True, recursive_read_only=True, propagation=Propagation.BIDIRECTIONAL),
            InvalidArgument,
            "private",
        ),
        (Mount("/v", "/h", readonly=True, recursive_read_only=True), FailedPrecondition, "^RROUnsupported"),
        (Mount("/v", "/h", uid_mappings=(IdMapping(0, 1, 1),)), FailedPrecondition, "uidMappings"),
    ],
)
def test_an_impossible_mount_is_refused(mount: Mount, kind: type[Error], said: str) -> None:
    with pytest.raises(kind, match=said):
        build(replace(WANTED, mounts=(mount,)))


def test_an_id_mapped_mount_carries_its_mappings() -> None:
    mapping = (IdMapping(0, 1000, 10),)
    mount = Mount("/v", "/h", uid_mappings=mapping, gid_mappings=mapping)

    made = mounted_at(build(replace(WANTED, mounts=(mount,)), features=spec.RuntimeFeatures(idmap_mounts=True)), "/v")

    assert made["options"][-1] == "idmap"
    assert made["uidMappings"] == made["gidMappings"] == [{"containerID": 0, "hostID": 1000, "size": 10}]


def test_limits_take_the_runtime_specs_names() -> None:
    wanted = limited(
        cpu_period=100000,
        cpu_quota=-1,
        cpu_shares=512,
        cpuset_cpus="0-1",
        memory_limit_bytes=1 << 30,
        memory_swap_limit_bytes=2 << 30,
        hugepage_limits=(("2MB", 0), ("1GB", 0)),
        unified={"memory.high": "5"},
    )

    resources = build(wanted)["linux"]["resources"]

    assert resources == {
        "devices": [{"allow": False, "access": "rwm"}],
        "memory": {"limit": 1 << 30, "swap": 2 << 30},
        "cpu": {"period": 100000, "quota": -1, "shares": 512, "cpus": "0-1"},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
        "unified": {"memory.high": "5"},
    }


def test_a_memory_limit_is_one_for_swap_too_where_swap_can_be_limited() -> None:
    wanted = limited(memory_limit_bytes=100 << 20)

    assert build(wanted)["linux"]["resources"]["memory"] == {"limit": 100 << 20, "swap": 100 << 20}
    without = build(wanted, node=replace(NODE, has_swap_limit=False))
    assert without["linux"]["resources"]["memory"] == {"limit": 100 << 20}
    assert spec.update_resources(Resources(cpu_shares=5), NODE) == {"cpu": {"shares": 5}}


@pytest.mark.parametrize(
    ("fields", "kind", "said"),
    [
        ({"memory_limit_bytes": 1000}, InvalidArgument, "memory_limit_in_bytes 1000"),
        ({"memory_limit_bytes": 20 << 20, "memory_swap_limit_bytes": 10 << 20}, InvalidArgument, "swap"),
        ({"hugepage_limits": (("1GB", 5),)}, FailedPrecondition, "1GB=5"),
        ({"oom_score_adj": 1001}, InvalidArgument, "oom_score_adj 1001"),
    ],
)
def test_an_impossible_limit_is_refused(fields: dict[str, Any], kind: type[Error], said: str) -> None:
    with pytest.raises(kind, match=said):
        build(limited(**fields), features=spec.RuntimeFeatures(min_memory_bytes=12 << 20))


def test_unified_limits_need_cgroup_v2() -> None:
    with pytest.raises(FailedPrecondition, match=r"memory\.high.* v1"):
        build(limited(unified={"memory.high": "5"}), node=replace(NODE, cgroups=V1))


@pytest.mark.parametrize(
    ("wanted", "lowest", "expected"), [(None, -1000, 0), (None, 5, 5), (-998, 0, 0), (900, 0, 900)]
)
def test_the_oom_score_is_the_pods_as_far_as_permitted(wanted: int | None, lowest: int, expected: int) -> None:
    config = build(limited(oom_score_adj=wanted), node=replace(NODE, lowest_oom_score_adj=lowest))

    assert config["process"]["oomScoreAdj"] == expected


def test_devices_are_made_and_allowed() -> None:
    config = build(host=HostObjects(devices=(DISK,)))

    assert config["linux"]["devices"] == [
        {"path": "/dev/disk", "type": "b", "major": 8, "minor": 1, "fileMode": 0o660, "uid": 0, "gid": 6}
    ]
    assert config["linux"]["resources"]["devices"] == [
        {"allow": False, "access": "rwm"},
        {"allow": True, "type": "b", "major": 8, "minor": 1, "access": "rw"},
    ]


def test_a_privileged_container_is_not_held_back() -> None:
    config = build(
        secure(
            privileged=True,
            seccomp=Profile(ProfileKind.RUNTIME_DEFAULT),
            apparmor=Profile(ProfileKind.LOCALHOST, "x"),
            masked_paths=("/proc/kcore",),
            readonly_paths=("/proc/sys",),
        ),
        node=replace(NODE, has_apparmor=True, has_selinux=True),
    )

    assert len(config["process"]["capabilities"]["effective"]) == len(caps.NAMES)
    assert config["linux"]["resources"]["devices"] == [{"allow": True, "access": "rwm"}]
    assert "rw" in mounted_at(config, "/sys")["options"]
    assert "rw" in mounted_at(config, "/sys/fs/cgroup")["options"]
    for key in ("maskedPaths", "readonlyPaths", "seccomp", "mountLabel"):
        assert key not in config["linux"]
    for key in ("apparmorProfile", "selinuxLabel"):
        assert key not in config["process"]


def test_masks_are_the_pods_and_ours_or_none_at_all() -> None:
    masked = build(secure(masked_paths=("/mine",), readonly_paths=("/too",)))["linux"]

    assert masked["maskedPaths"][0] == "/mine"
    assert "/proc/kcore" in masked["maskedPaths"]
    assert "/proc/sys" in masked["readonlyPaths"]
    assert "maskedPaths" not in build()["linux"]


def test_seccomp_is_none_the_default_or_the_files() -> None:
    assert "seccomp" not in build()["linux"]
    assert "seccomp" not in build(secure(seccomp=Profile(ProfileKind.UNCONFINED)))["linux"]
    default = build(secure(seccomp=Profile(ProfileKind.RUNTIME_DEFAULT)))["linux"]["seccomp"]
    assert default["defaultAction"] == "SCMP_ACT_ERRNO"
    local = secure(seccomp=Profile(ProfileKind.LOCALHOST, "/p.json"))
    given = build(local, host=HostObjects(seccomp={"defaultAction": "SCMP_ACT_LOG"}))["linux"]["seccomp"]
    assert given["defaultAction"] == "SCMP_ACT_LOG"
    with pytest.raises(InvalidArgument, match=r"/p\.json"):
        build(local)


def test_security_modules_are_used_where_they_are() -> None:
    config = build(node=replace(NODE, has_apparmor=True, has_selinux=True))

    assert config["process"]["apparmorProfile"] == "crito-default"
    assert config["process"]["selinuxLabel"].startswith("system_u:system_r:container_t:s0:c")
    assert config["linux"]["mountLabel"].startswith("system_u:object_r:container_file_t:s0:c")


def test_the_pods_annotations_stay_away_from_the_runtime() -> None:
    wanted = replace(
        WANTED, annotations={"run.oci.x": "y"}, labels={"io.kubernetes.pod.name": "p", "io.kubernetes.pod.uid": "u"}
    )
    config = build(wanted, placement=replace(PLACEMENT, annotations={"io.katacontainers.x": "1"}))

    assert config["annotations"]["io.katacontainers.x"] == "1"
    assert config["annotations"]["io.kubernetes.cri.sandbox-name"] == "p"
    assert config["annotations"]["io.kubernetes.cri.container-type"] == "container"
    assert "run.oci.x" not in config["annotations"]


def test_exec_gets_what_the_first_process_has() -> None:
    config = build(secure(run_as_user=5, capabilities=Capabilities(drop=("ALL",))))

    process = spec.exec_process(config, ["ls", "-l"], tty=True, env=[("PATH", "/exec")])

    assert process["args"] == ["ls", "-l"]
    assert process["terminal"] is True
    assert "PATH=/exec" in process["env"]
    assert "TERM=xterm" in process["env"]
    assert process["capabilities"]["bounding"] == []
    assert config["process"]["args"] == ["/bin/web"]
    with pytest.raises(InvalidArgument, match="empty"):
        spec.exec_process(config, [])


def test_defaults_are_under_what_image_and_pod_say() -> None:
    defaults = spec.Defaults(
        capabilities=("KILL",),
        env=(("PROXY", "http://p"), ("LANG", "C")),
        rlimits=(Rlimit("RLIMIT_CORE", 0, -1),),
    )
    wanted = replace(WANTED, envs=(("LANG", "de"),))

    process = build(wanted, defaults=defaults)["process"]

    assert {"PROXY=http://p", "LANG=de"} <= set(process["env"]) and "LANG=C" not in process["env"]
    assert process["capabilities"]["bounding"] == ["CAP_KILL"]
    assert process["rlimits"] == [{"type": "RLIMIT_CORE", "soft": 0, "hard": 2**64 - 1}]


def test_a_configured_seccomp_profile_is_the_runtimes_default() -> None:
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}]}
    wanted = secure(seccomp=Profile(ProfileKind.RUNTIME_DEFAULT))

    found = build(wanted, defaults=spec.Defaults(seccomp=profile))["linux"]["seccomp"]

    assert found["defaultAction"] == "SCMP_ACT_ALLOW"
    assert found["syscalls"][0]["names"] == ["mkdir"]


def test_a_limit_is_lowered_to_what_this_process_may_hand_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda number: (100, 200))
    monkeypatch.setattr(caps, "own", frozenset)

    assert permitted(Rlimit("RLIMIT_CORE", 300, 400)) == Rlimit("RLIMIT_CORE", 200, 200)
    assert permitted(Rlimit("RLIMIT_CORE", 50, 150)) == Rlimit("RLIMIT_CORE", 50, 150)
    assert permitted(Rlimit("RLIMIT_CORE", 50, -1)) == Rlimit("RLIMIT_CORE", 50, 200)
    with pytest.raises(ValueError, match="RLIMIT_NONE is not a resource limit"):
        permitted(Rlimit("RLIMIT_NONE", 0, 0))


@pytest.mark.parametrize(
    ("mode", "target", "pid"),
    [
        (NamespaceMode.CONTAINER, None, [{"type": "pid", "path": "/crito/pid/c1"}]),
        (NamespaceMode.POD, None, []),
        (NamespaceMode.NODE, None, []),
        (NamespaceMode.TARGET, "/crito/pid/c0", [{"type": "pid", "path": "/crito/pid/c0"}]),
        (NamespaceMode.TARGET, "", []),
    ],
)
def test_in_a_runtimes_sandbox_pid_namespaces_are_names_and_the_network_is_the_pods(
    mode: NamespaceMode, target: str | None, pid: list[dict[str, str]]
) -> None:
    pod = replace(POD, ipc_ns="", uts_ns="", pid_ns="", runtime_sandbox=True)

    config = build(secure(pid=mode), pod=pod, placement=replace(PLACEMENT, target_pid_ns=target))

    ours = [{"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network", "path": "/ns/net"}]
    assert config["linux"]["namespaces"] == [*ours, *pid]


def test_a_privileged_container_in_a_sandbox_has_no_capabilities_over_the_nodes_kernel() -> None:
    pod = replace(POD, ipc_ns="", uts_ns="", pid_ns="", runtime_sandbox=True)

    names = build(secure(privileged=True), pod=pod)["process"]["capabilities"]["bounding"]

    assert "CAP_SYS_ADMIN" in names
    assert not {"CAP_BPF", "CAP_PERFMON", "CAP_CHECKPOINT_RESTORE"} & set(names)
