"""What several plugins' answers come to together."""

from typing import Any

import pytest

from cri.api.nri.v1alpha1 import api_pb2 as nri
from cri.nri.result import Conflict, Creation, Updates
from oci.errors import Error


def creation() -> Creation:
    container = nri.Container(
        id="c1",
        args=["sh"],
        env=["A=1", "B=2"],
        annotations={"a": "1"},
        mounts=[nri.Mount(destination="/data", source="/old")],
        linux=nri.LinuxContainer(
            devices=[nri.LinuxDevice(path="/dev/old")],
            namespaces=[nri.LinuxNamespace(type="ipc", path="/x")],
            sysctl={"net.a": "1"},
        ),
    )
    return Creation(nri.CreateContainerRequest(container=container))


def answer(**adjustment: Any) -> nri.CreateContainerResponse:
    return nri.CreateContainerResponse(adjust=nri.ContainerAdjustment(**adjustment))


def limits(**parts: Any) -> nri.LinuxContainerAdjustment:
    return nri.LinuxContainerAdjustment(resources=nri.LinuxResources(**parts))


ANNOTATION: dict[str, Any] = {"annotations": {"k": "v"}}
SETTINGS: dict[str, dict[str, Any]] = {
    "annotation": ANNOTATION,
    "mount": {"mounts": [nri.Mount(destination="/m")]},
    "env": {"env": [nri.KeyValue(key="E", value="1")]},
    "args": {"args": ["true"]},
    "rlimit": {"rlimits": [nri.POSIXRlimit(type="RLIMIT_CORE")]},
    "cdi": {"CDI_devices": [nri.CDIDevice(name="v/c=d")]},
    "device": {"linux": nri.LinuxContainerAdjustment(devices=[nri.LinuxDevice(path="/dev/d")])},
    "cgroup": {"linux": nri.LinuxContainerAdjustment(cgroups_path="/x")},
    "oom": {"linux": nri.LinuxContainerAdjustment(oom_score_adj=nri.OptionalInt(value=5))},
    "io": {"linux": nri.LinuxContainerAdjustment(io_priority=nri.LinuxIOPriority(priority=1))},
    "seccomp": {"linux": nri.LinuxContainerAdjustment(seccomp_policy=nri.LinuxSeccomp(default_action="x"))},
    "namespace": {"linux": nri.LinuxContainerAdjustment(namespaces=[nri.LinuxNamespace(type="uts")])},
    "sysctl": {"linux": nri.LinuxContainerAdjustment(sysctl={"net.b": "1"})},
    "net device": {"linux": nri.LinuxContainerAdjustment(net_devices={"eth9": nri.LinuxNetDevice(name="e")})},
    "scheduler": {"linux": nri.LinuxContainerAdjustment(scheduler=nri.LinuxScheduler(nice=1))},
    "rdt": {"linux": nri.LinuxContainerAdjustment(rdt=nri.LinuxRdt(clos_id=nri.OptionalString(value="c")))},
    "memory policy": {"linux": nri.LinuxContainerAdjustment(memory_policy=nri.LinuxMemoryPolicy(nodes="0"))},
    "memory": {"linux": limits(memory=nri.LinuxMemory(limit=nri.OptionalInt64(value=1)))},
    "swap": {"linux": limits(memory=nri.LinuxMemory(swap=nri.OptionalInt64(value=1)))},
    "cpu shares": {"linux": limits(cpu=nri.LinuxCPU(shares=nri.OptionalUInt64(value=1)))},
    "cpuset": {"linux": limits(cpu=nri.LinuxCPU(cpus="0"))},
    "huge pages": {"linux": limits(hugepage_limits=[nri.HugepageLimit(page_size="2MB", limit=1)])},
    "unified": {"linux": limits(unified={"memory.high": "1"})},
    "pids": {"linux": limits(pids=nri.LinuxPids(limit=1))},
    "rdt class": {"linux": limits(rdt_class=nri.OptionalString(value="gold"))},
    "blockio class": {"linux": limits(blockio_class=nri.OptionalString(value="slow"))},
}


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_what_one_plugin_has_set_another_may_not_set(name: str) -> None:
    result = creation()
    result.apply(answer(**SETTINGS[name]), "10-first")

    with pytest.raises(Conflict, match=r"'10-first' and '20-second' both set"):
        result.apply(answer(**SETTINGS[name]), "20-second")


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_what_a_plugin_has_set_is_in_the_adjustment(name: str) -> None:
    result = creation()

    result.apply(answer(**SETTINGS[name]), "10-first")

    assert result.adjustment == answer(**SETTINGS[name]).adjust


def test_different_entries_of_one_list_come_from_different_plugins() -> None:
    result = creation()

    result.apply(answer(env=[nri.KeyValue(key="X", value="1")]), "10-a")
    result.apply(answer(env=[nri.KeyValue(key="Y", value="2")]), "20-b")

    assert [(each.key, each.value) for each in result.adjustment.env] == [("X", "1"), ("Y", "2")]


def test_hooks_of_all_plugins_add_up() -> None:
    result = creation()

    result.apply(answer(hooks=nri.Hooks(poststop=[nri.Hook(path="/one")])), "10-a")
    result.apply(answer(hooks=nri.Hooks(poststop=[nri.Hook(path="/two")])), "20-b")

    assert [hook.path for hook in result.adjustment.hooks.poststop] == ["/one", "/two"]
    assert result.owners.message.owners["c1"].simple[nri.Field.Value("OciHooks")] == "10-a,20-b"


def test_the_next_plugin_sees_what_those_before_it_have_changed() -> None:
    result = creation()

    result.apply(
        answer(
            annotations={"a": "2"},
            args=["sleep"],
            env=[nri.KeyValue(key="-A"), nri.KeyValue(key="B", value="3")],
            mounts=[nri.Mount(destination="/data", source="/new")],
            linux=nri.LinuxContainerAdjustment(
                devices=[nri.LinuxDevice(path="-/dev/old")],
                namespaces=[nri.LinuxNamespace(type="-ipc")],
                sysctl={"-net.a": ""},
                resources=nri.LinuxResources(memory=nri.LinuxMemory(limit=nri.OptionalInt64(value=7))),
            ),
        ),
        "10-a",
    )

    seen = result.request.container
    assert (list(seen.args), list(seen.env), dict(seen.annotations)) == (["sleep"], ["B=3"], {"a": "2"})
    assert [mount.source for mount in seen.mounts] == ["/new"]
    assert (list(seen.linux.devices), list(seen.linux.namespaces), dict(seen.linux.sysctl)) == ([], [], {})
    assert seen.linux.resources.memory.limit.value == 7


def test_who_removes_an_entry_may_set_it_anew_even_where_another_had_set_it() -> None:
    result = creation()
    result.apply(answer(annotations={"k": "first"}, env=[nri.KeyValue(key="E", value="first")]), "10-a")

    result.apply(
        answer(
            annotations={"-k": "", "k": "second"},
            env=[nri.KeyValue(key="-E"), nri.KeyValue(key="E", value="second")],
        ),
        "20-b",
    )

    assert dict(result.adjustment.annotations) == {"-k": "", "k": "second"}
    assert [(each.key, each.value) for each in result.adjustment.env] == [("-E", ""), ("E", "second")]


def test_what_one_plugin_has_removed_another_may_not_set() -> None:
    result = creation()
    result.apply(answer(env=[nri.KeyValue(key="-A")]), "10-a")

    with pytest.raises(Conflict, match="Env A"):
        result.apply(answer(env=[nri.KeyValue(key="A", value="2")]), "20-b")


def test_args_that_begin_with_an_empty_one_replace_those_of_another_plugin() -> None:
    result = creation()
    result.apply(answer(args=["one"]), "10-a")

    result.apply(answer(args=["", "two"]), "20-b")

    assert list(result.adjustment.args) == ["two"]


def update(id: str, limit: int, ignore_failure: bool = False) -> nri.ContainerUpdate:
    memory = nri.LinuxMemory(limit=nri.OptionalInt64(value=limit))
    return nri.ContainerUpdate(
        container_id=id,
        linux=nri.LinuxContainerUpdate(resources=nri.LinuxResources(memory=memory)),
        ignore_failure=ignore_failure,
    )


def test_the_container_that_is_being_made_cannot_be_updated() -> None:
    with pytest.raises(Error, match="while it is being made"):
        creation().apply(nri.CreateContainerResponse(update=[update("c1", 1)]), "10-a")


def test_updates_of_one_container_by_two_plugins_conflict_unless_one_may_fail() -> None:
    updates = Updates()
    updates.apply([update("c2", 1)], "10-a")

    updates.apply([update("c2", 2, ignore_failure=True)], "20-b")
    with pytest.raises(Conflict, match="MemLimit"):
        updates.apply([update("c2", 3)], "30-c")

    assert [each.linux.resources.memory.limit.value for each in updates.others()] == [1]


def test_an_update_request_is_changed_in_place_and_others_are_told_apart() -> None:
    request = nri.UpdateContainerRequest(container=nri.Container(id="c1"))
    request.linux_resources.cpu.shares.value = 512
    updates = Updates.of_update(request)

    updates.apply([update("c1", 100), update("c2", 200)], "10-a")

    assert request.linux_resources.memory.limit.value == 100
    assert request.linux_resources.cpu.shares.value == 512
    assert [each.container_id for each in updates.others()] == ["c2"]
