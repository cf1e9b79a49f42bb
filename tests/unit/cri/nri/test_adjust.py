"""What plugins want, in the runtime-spec."""

import copy
from dataclasses import replace
from typing import Any

import pytest

from cri.api.nri.v1alpha1 import api_pb2 as nri
from cri.nri import adjust, to_nri
from oci.container import ContainerRecord
from oci.container_spec import ContainerId, ContainerSpec, Resources, SandboxId
from oci.errors import FailedPrecondition, InvalidArgument, Unimplemented
from oci.status import ContainerStatus

NODE = adjust.Node(
    inject_cdi=lambda config, names: config["process"]["env"].extend(names),
    has_swap_limit=True,
    has_unified_cgroups=True,
    hugepage_sizes=frozenset({"2MB"}),
    lowest_oom_score_adj=-100,
)
CONFIG: dict[str, Any] = {
    "process": {
        "args": ["sh"],
        "env": ["A=1", "B=2", "C=3"],
        "user": {"uid": 1, "gid": 2, "additionalGids": [3]},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2}],
        "oomScoreAdj": 0,
    },
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": []},
        {"destination": "/a/b/c", "type": "bind", "source": "/x", "options": ["rbind"]},
        {"destination": "/data", "type": "bind", "source": "/y", "options": ["rbind"]},
    ],
    "annotations": {"old": "1", "gone": "2"},
    "linux": {
        "namespaces": [{"type": "mount"}, {"type": "ipc", "path": "/i"}],
        "cgroupsPath": "/ours",
        "resources": {"devices": [{"allow": False, "access": "rwm"}], "memory": {"limit": 100, "swap": 100}},
        "devices": [{"path": "/dev/old", "type": "c", "major": 1, "minor": 1}],
        "sysctl": {"net.a": "1"},
    },
}


def adjusted(node: adjust.Node = NODE, **wanted: Any) -> dict[str, Any]:
    return adjust.adjusted(CONFIG, nri.ContainerAdjustment(**wanted), node)


def linux(node: adjust.Node = NODE, **wanted: Any) -> dict[str, Any]:
    return adjusted(node, linux=nri.LinuxContainerAdjustment(**wanted))


def resources(node: adjust.Node = NODE, **wanted: Any) -> dict[str, Any]:
    made: dict[str, Any] = linux(node, resources=nri.LinuxResources(**wanted))["linux"]["resources"]
    return made


def test_an_empty_adjustment_changes_nothing() -> None:
    before = copy.deepcopy(CONFIG)

    assert adjusted() == CONFIG
    assert before == CONFIG


def test_the_given_spec_is_left_as_it_is() -> None:
    before = copy.deepcopy(CONFIG)

    adjusted(
        args=["x"],
        annotations={"-old": ""},
        mounts=[nri.Mount(destination="-/data")],
        linux=nri.LinuxContainerAdjustment(cgroups_path="/x", devices=[nri.LinuxDevice(path="/dev/n", type="c")]),
    )

    assert before == CONFIG


def test_variables_keep_their_place_are_removed_and_come_last_where_new() -> None:
    env = [nri.KeyValue(key="D", value="4"), nri.KeyValue(key="B", value="new"), nri.KeyValue(key="-A")]

    assert adjusted(env=env)["process"]["env"] == ["B=new", "C=3", "D=4"]


def test_a_variable_that_is_removed_and_set_has_the_new_value() -> None:
    env = [nri.KeyValue(key="-B"), nri.KeyValue(key="B", value="new")]

    assert adjusted(env=env)["process"]["env"] == ["A=1", "B=new", "C=3"]


def test_annotations_and_sysctls_are_set_and_removed() -> None:
    made = adjusted(
        annotations={"-gone": "", "new": "3"}, linux=nri.LinuxContainerAdjustment(sysctl={"-net.a": "", "net.b": "2"})
    )

    assert made["annotations"] == {"old": "1", "new": "3"}
    assert made["linux"]["sysctl"] == {"net.b": "2"}


def test_arguments_are_replaced() -> None:
    assert adjusted(args=["sleep", "1"])["process"]["args"] == ["sleep", "1"]


def test_mounts_are_replaced_removed_and_stand_below_their_parents() -> None:
    mounts = [
        nri.Mount(destination="/a/b", type="bind", source="/n", options=["rbind", "ro"]),
        nri.Mount(destination="-/data"),
    ]

    made = adjusted(mounts=mounts)["mounts"]

    assert [mount["destination"] for mount in made] == ["/proc", "/a/b", "/a/b/c"]
    assert made[1] == {"destination": "/a/b", "type": "bind", "source": "/n", "options": ["rbind", "ro"]}


@pytest.mark.parametrize("propagation", ["rslave", "rshared"])
def test_a_mount_that_propagates_needs_a_root_that_does(propagation: str) -> None:
    made = adjusted(mounts=[nri.Mount(destination="/m", source="/n", options=["rbind", propagation])])

    assert made["linux"]["rootfsPropagation"] == propagation


def test_hooks_are_added_with_their_timeouts() -> None:
    hook = nri.Hook(path="/h", args=["h", "1"], env=["A=1"], timeout=nri.OptionalInt(value=5))

    made = adjusted(hooks=nri.Hooks(create_runtime=[hook], poststop=[nri.Hook(path="/p")]))["hooks"]

    assert made == {
        "createRuntime": [{"path": "/h", "args": ["h", "1"], "env": ["A=1"], "timeout": 5}],
        "poststop": [{"path": "/p"}],
    }


def test_a_device_comes_with_the_right_to_use_it() -> None:
    device = nri.LinuxDevice(
        path="/dev/new", type="b", major=8, minor=1, file_mode=nri.OptionalFileMode(value=0o600),
        uid=nri.OptionalUInt32(value=0),
    )  # fmt: skip

    made = linux(devices=[device, nri.LinuxDevice(path="-/dev/old")])["linux"]

    assert made["devices"] == [{"path": "/dev/new", "type": "b", "major": 8, "minor": 1, "fileMode": 0o600, "uid": 0}]
    assert made["resources"]["devices"][-1] == {"allow": True, "type": "b", "major": 8, "minor": 1, "access": "rwm"}


def test_namespaces_are_replaced_added_and_removed() -> None:
    wanted = [nri.LinuxNamespace(type="-ipc"), nri.LinuxNamespace(type="uts", path="/u")]

    assert linux(namespaces=wanted)["linux"]["namespaces"] == [{"type": "mount"}, {"type": "uts", "path": "/u"}]


def test_the_oom_score_goes_no_lower_than_this_host_can() -> None:
    assert linux(oom_score_adj=nri.OptionalInt(value=-999))["process"]["oomScoreAdj"] == -100
    assert linux(oom_score_adj=nri.OptionalInt(value=500))["process"]["oomScoreAdj"] == 500


def test_io_priority_and_scheduler_have_the_runtime_spec_s_names() -> None:
    made = linux(
        io_priority=nri.LinuxIOPriority(**{"class": nri.IOPRIO_CLASS_BE}, priority=4),
        scheduler=nri.LinuxScheduler(policy=nri.SCHED_FIFO, priority=10, flags=[nri.SCHED_FLAG_RESET_ON_FORK]),
    )["process"]

    assert made["ioPriority"] == {"class": "IOPRIO_CLASS_BE", "priority": 4}
    assert made["scheduler"] == {"policy": "SCHED_FIFO", "priority": 10, "flags": ["SCHED_FLAG_RESET_ON_FORK"]}


def test_a_number_that_no_enum_has_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="IOPrioClass 99"):
        linux(io_priority=nri.LinuxIOPriority(**{"class": 99}))


def test_a_seccomp_policy_replaces_the_profile() -> None:
    policy = nri.LinuxSeccomp(
        default_action="SCMP_ACT_ERRNO",
        default_errno=nri.OptionalUInt32(value=0),
        syscalls=[
            nri.LinuxSyscall(
                names=["personality"],
                action="SCMP_ACT_ALLOW",
                args=[nri.LinuxSeccompArg(index=0, value=8, op="SCMP_CMP_EQ")],
            )
        ],
    )

    assert linux(seccomp_policy=policy)["linux"]["seccomp"] == {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 0,
        "syscalls": [
            {
                "names": ["personality"],
                "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 0, "value": 8, "valueTwo": 0, "op": "SCMP_CMP_EQ"}],
            }
        ],
    }


def test_rlimits_are_replaced_by_type() -> None:
    made = adjusted(rlimits=[nri.POSIXRlimit(type="RLIMIT_NOFILE", soft=5, hard=6)])["process"]["rlimits"]

    assert made == [{"type": "RLIMIT_NOFILE", "soft": 5, "hard": 6}]


def test_net_devices_memory_policy_and_rdt_are_set() -> None:
    made = linux(
        net_devices={"eth9": nri.LinuxNetDevice(name="net1")},
        memory_policy=nri.LinuxMemoryPolicy(mode=nri.MPOL_BIND, nodes="0", flags=[nri.MPOL_F_STATIC_NODES]),
        rdt=nri.LinuxRdt(clos_id=nri.OptionalString(value="gold")),
    )["linux"]

    assert made["netDevices"] == {"eth9": {"name": "net1"}}
    assert made["memoryPolicy"] == {"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]}
    assert made["intelRdt"] == {"closID": "gold"}


def test_the_cgroup_is_moved() -> None:
    assert linux(cgroups_path="/elsewhere")["linux"]["cgroupsPath"] == "/elsewhere"


def test_a_memory_limit_brings_its_swap_limit_along_where_the_host_has_one() -> None:
    memory = nri.LinuxMemory(limit=nri.OptionalInt64(value=50))

    assert resources(memory=memory)["memory"] == {"limit": 50, "swap": 50}
    assert resources(replace(NODE, has_swap_limit=False), memory=memory)["memory"] == {"limit": 50}


def test_a_memory_limit_under_which_nothing_starts_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="needs 80"):
        resources(replace(NODE, min_memory_bytes=80), memory=nri.LinuxMemory(limit=nri.OptionalInt64(value=50)))


def test_cpu_pids_and_device_rules_are_limits_too() -> None:
    made = resources(
        cpu=nri.LinuxCPU(shares=nri.OptionalUInt64(value=2), cpus="0-1", mems="0"),
        pids=nri.LinuxPids(limit=10),
        devices=[nri.LinuxDeviceCgroup(allow=True, type="c", major=nri.OptionalInt64(value=0), access="r")],
    )

    assert made["cpu"] == {"shares": 2, "cpus": "0-1", "mems": "0"}
    assert made["pids"] == {"limit": 10}
    assert made["devices"][-1] == {"allow": True, "type": "c", "major": 0, "access": "r"}


def test_what_the_host_cannot_limit_is_refused() -> None:
    with pytest.raises(FailedPrecondition, match="1GB"):
        resources(hugepage_limits=[nri.HugepageLimit(page_size="1GB", limit=1)])
    with pytest.raises(FailedPrecondition, match=r"memory\.high"):
        resources(replace(NODE, has_unified_cgroups=False), unified={"memory.high": "1"})
    with pytest.raises(Unimplemented, match="slow"):
        resources(blockio_class=nri.OptionalString(value="slow"))


def test_huge_pages_and_unified_keys_are_set_where_the_host_has_them() -> None:
    made = resources(
        hugepage_limits=[nri.HugepageLimit(page_size="2MB", limit=9), nri.HugepageLimit(page_size="1GB", limit=0)],
        unified={"memory.high": "1"},
    )

    assert made["hugepageLimits"] == [{"pageSize": "2MB", "limit": 9}]
    assert made["unified"] == {"memory.high": "1"}


def test_cdi_devices_are_handed_to_whoever_injects_them() -> None:
    made = adjusted(CDI_devices=[nri.CDIDevice(name="vendor/class=device")])

    assert made["process"]["env"][-1] == "vendor/class=device"


def test_limits_go_to_nri_and_back_unchanged() -> None:
    ours = Resources(
        cpu_period=1,
        cpu_quota=-1,
        cpu_shares=2,
        memory_limit_bytes=3,
        memory_swap_limit_bytes=4,
        cpuset_cpus="0",
        cpuset_mems="1",
        hugepage_limits=(("2MB", 5),),
        unified={"a": "b"},
    )

    assert adjust.limits(to_nri.resources(ours)) == ours


def test_a_container_is_told_with_all_of_its_runtime_spec() -> None:
    config = adjusted(
        hooks=nri.Hooks(poststop=[nri.Hook(path="/p", timeout=nri.OptionalInt(value=1))]),
        linux=nri.LinuxContainerAdjustment(
            io_priority=nri.LinuxIOPriority(**{"class": nri.IOPRIO_CLASS_BE}, priority=4),
            seccomp_policy=nri.LinuxSeccomp(default_action="SCMP_ACT_LOG"),
        ),
    )
    record = ContainerRecord(
        id=ContainerId("c1"),
        sandbox_id=SandboxId("p1"),
        spec=ContainerSpec("web", image="nginx:1", labels={"l": "\udcff"}),
        image_id="sha256:1",
        image_ref="registry/nginx@sha256:2",
        image_mounts=(),
        runtime_handler="crun",
        log_path="",
        cgroup_parent="/",
        stop_signal="SIGTERM",
        rootfs="/r",
        requested_at=1,
        status=ContainerStatus(created_at=2, started_at=3, pid=4, resources=Resources(cpu_shares=77)),
    )

    told = to_nri.container(record, config, seccomp=True)

    assert (told.id, told.pod_sandbox_id, told.name, told.state) == ("c1", "p1", "web", nri.CONTAINER_RUNNING)
    assert (told.pid, told.created_at, told.started_at) == (4, 2, 3)
    assert list(told.args) == ["sh"]
    assert list(told.env) == ["A=1", "B=2", "C=3"]
    assert dict(told.labels) == {"l": "?"}
    assert [mount.destination for mount in told.mounts] == ["/proc", "/a/b/c", "/data"]
    assert (told.hooks.poststop[0].path, told.hooks.poststop[0].timeout.value) == ("/p", 1)
    assert (told.user.uid, told.user.gid, list(told.user.additional_gids)) == (1, 2, [3])
    assert told.linux.resources.memory.limit.value == 100
    assert told.linux.resources.cpu.shares.value == 77
    assert told.linux.seccomp_policy.default_action == "SCMP_ACT_LOG"
    assert told.linux.io_priority.priority == 4
    assert (told.image.name, told.image.digest, told.image.config_digest) == ("nginx:1", "sha256:2", "sha256:1")
    assert (told.rlimits[0].type, told.rlimits[0].hard) == ("RLIMIT_NOFILE", 2)
