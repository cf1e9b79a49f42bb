"""NRI plugins beside a real daemon: what they are told, what they change, and what their faults cost."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.api.nri.v1alpha1 import api_pb2 as nri
from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import cgroups, leftovers
from tests.e2e.harness.client import Client
from tests.e2e.harness.daemon import Daemon
from tests.fakes.nri_plugin import NriPlugin, Refusal, Silence, mask

FOR_EVER = ["sleep", "100000"]
CDI = {
    "cdiVersion": "0.6.0",
    "kind": "vendor.com/gpu",
    "devices": [
        {"name": name, "containerEdits": {"deviceNodes": [{"path": f"/dev/{name}", "hostPath": "/dev/null"}]}}
        for name in ("by-field", "by-annotation", "by-plugin")
    ],
}
Connect = Callable[..., NriPlugin]


@pytest.fixture(scope="module")
def shared_daemon(make_daemon: MakeDaemon, directory: Path) -> Daemon:
    plugins = directory / "no-plugins"
    cdi = directory / "cdi"
    cdi.mkdir()
    (cdi / "v.json").write_text(json.dumps(CDI))
    return make_daemon(
        {
            "nri": {"enable": True, "plugin_path": plugins, "plugin_request_timeout": "1s"},
            "runtime": {"cdi_spec_dirs": [str(cdi)]},
        }
    )


@pytest.fixture
def connect(daemon: Daemon) -> Iterator[Connect]:
    made: list[NriPlugin] = []

    def connect(**options: Any) -> NriPlugin:
        plugin = NriPlugin.connect(daemon.run_dir / "nri.sock", **options)
        made.append(plugin)
        return plugin

    yield connect
    for plugin in made:
        plugin.close()


def adjusting(**adjustment: Any) -> dict[str, Callable[[Any], Any]]:
    answer = nri.CreateContainerResponse(adjust=nri.ContainerAdjustment(**adjustment))
    return {"CreateContainer": lambda _: answer}


def memory(limit: int) -> nri.LinuxResources:
    return nri.LinuxResources(memory=nri.LinuxMemory(limit=nri.OptionalInt64(value=limit)))


def refuse(_: Any) -> None:
    raise Refusal("not today")


def test_a_plugin_is_told_the_whole_life_in_order(client: Client, connect: Connect, busybox: str) -> None:
    plugin = connect()
    pod = client.run_pod("told", labels={"a": "b"}, annotations={"c": "d"})
    container_id = client.run(pod, busybox, FOR_EVER, labels={"e": "f"})
    client.stop(container_id)
    client.remove(container_id)
    client.remove_pod(pod.id)

    assert plugin.methods(pod.id) == ["RunPodSandbox", "StopPodSandbox", "RemovePodSandbox"]
    assert [method for method in plugin.methods(container_id) if method != "ValidateContainerAdjustment"] == [
        "CreateContainer",
        "PostCreateContainer",
        "StartContainer",
        "PostStartContainer",
        "StopContainer",
        "RemoveContainer",
    ]
    run = plugin.wait_told("RunPodSandbox", pod.id).pod
    assert (run.name, run.namespace, run.uid) == ("told", "e2e", pod.config.metadata.uid)
    assert (dict(run.labels), dict(run.annotations)) == ({"a": "b"}, {"c": "d"})
    assert len(run.ips) == 1
    assert any(each.type == "network" and each.path for each in run.linux.namespaces)
    made = plugin.wait_told("CreateContainer", container_id)
    assert (made.pod.id, made.container.name, list(made.container.args)) == (pod.id, "main", FOR_EVER)
    assert dict(made.container.labels) == {"e": "f"}
    started = plugin.wait_told("PostStartContainer", container_id).container
    assert started.state == nri.CONTAINER_RUNNING
    assert started.pid > 0
    ended = plugin.wait_told("StopContainer", container_id).container
    assert (ended.state, ended.exit_code) == (nri.CONTAINER_STOPPED, 137)


def test_a_container_that_ends_by_itself_is_told_at_once_and_once(
    client: Client, connect: Connect, busybox: str
) -> None:
    plugin = connect()
    pod = client.run_pod("by-itself")
    container_id = client.run(pod, busybox, ["sh", "-c", "exit 3"])

    assert plugin.wait_told("StopContainer", container_id).container.exit_code == 3
    client.stop(container_id)
    client.remove_pod(pod.id)

    assert plugin.methods(container_id).count("StopContainer") == 1
    all_told = [(method, each) for method, each in plugin.told if method in ("StopContainer", "StopPodSandbox")]
    assert [method for method, _ in all_told] == ["StopContainer", "StopPodSandbox"]


def test_the_ends_of_containers_are_told_before_the_end_of_their_pod(
    client: Client, connect: Connect, busybox: str
) -> None:
    plugin = connect()
    pod = client.run_pod("ends")
    for number in range(3):
        client.run(pod, busybox, FOR_EVER, f"c{number}")

    client.stop_pod(pod.id)

    ends = [method for method in plugin.methods() if method.startswith("Stop")]
    assert ends == ["StopContainer"] * 3 + ["StopPodSandbox"]


def test_what_a_plugin_adjusts_is_what_the_container_gets(
    client: Client, connect: Connect, busybox: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("from the plugin\n")
    connect(
        handlers=adjusting(
            env=[nri.KeyValue(key="NEW", value="value"), nri.KeyValue(key="-GONE")],
            annotations={"plugin": "was-here"},
            args=[
                "sh",
                "-c",
                "echo $NEW,$GONE; cat /mnt/file /proc/self/oom_score_adj; ulimit -c; ls -l /dev/mine; sleep 100000",
            ],
            mounts=[nri.Mount(destination="/mnt", type="bind", source=str(tmp_path), options=["rbind", "ro"])],
            rlimits=[nri.POSIXRlimit(type="RLIMIT_CORE", soft=0, hard=0)],
            linux=nri.LinuxContainerAdjustment(
                devices=[nri.LinuxDevice(path="/dev/mine", type="c", major=1, minor=3)],
                resources=memory(64 << 20),
                oom_score_adj=nri.OptionalInt(value=777),
            ),
        )
    )
    pod = client.run_pod("adjusted")
    container_id = client.run(pod, busybox, FOR_EVER, envs=[pb.KeyValue(key="GONE", value=b"still here")])
    deadline = time.monotonic() + 10
    while len(client.log(pod).splitlines()) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.05)

    lines = client.log(pod).splitlines()
    assert lines[:4] == ["value,", "from the plugin", "777", "0"]
    assert lines[4].startswith("c")
    assert "1,   3" in lines[4]
    assert client.status(container_id).resources.linux.memory_limit_in_bytes == 64 << 20
    assert client.exec_sync(container_id, ["sh", "-c", "echo $NEW"]).stdout == b"value\n"


def test_cdi_devices_come_by_the_field_by_annotations_and_by_plugins(
    client: Client, connect: Connect, busybox: str
) -> None:
    connect(handlers=adjusting(CDI_devices=[nri.CDIDevice(name="vendor.com/gpu=by-plugin")]))
    pod = client.run_pod("cdi")
    container_id = client.run(
        pod,
        busybox,
        FOR_EVER,
        CDI_devices=[pb.CDIDevice(name="vendor.com/gpu=by-field")],
        annotations={"cdi.k8s.io/test": "vendor.com/gpu=by-annotation"},
    )

    script = "echo x > /dev/by-field && echo x > /dev/by-annotation && echo x > /dev/by-plugin && ls /dev | grep by-"
    answer = client.exec_sync(container_id, ["sh", "-c", script])

    assert answer.stdout.split() == [b"by-annotation", b"by-field", b"by-plugin"]


def test_a_cdi_device_that_is_not_there_fails_the_container(client: Client, busybox: str) -> None:
    pod = client.run_pod("no-cdi")

    with pytest.raises(grpc.RpcError, match=r"vendor\.com/gpu=missing"):
        client.run(pod, busybox, FOR_EVER, CDI_devices=[pb.CDIDevice(name="vendor.com/gpu=missing")])
    assert not client.containers()


def test_a_container_in_another_cgroup_is_found_there(
    daemon: Daemon, client: Client, connect: Connect, busybox: str
) -> None:
    path = cgroups.container(client.cgroup_parent, "by-plugin")
    connect(handlers=adjusting(linux=nri.LinuxContainerAdjustment(cgroups_path=path)))
    pod = client.run_pod("moved")
    container_id = client.run(pod, busybox, FOR_EVER)

    assert any("by-plugin" in each for each in leftovers.cgroups(daemon.owned))
    stats = client.runtime.ContainerStats(pb.ContainerStatsRequest(container_id=container_id), timeout=10).stats
    assert stats.memory.usage_bytes.value > 0


def test_plugins_that_want_the_same_thing_refuse_the_container(client: Client, connect: Connect, busybox: str) -> None:
    first = connect(index="10", name="one", handlers=adjusting(args=["one"]))
    connect(index="20", name="two", handlers=adjusting(args=["true"]))
    pod = client.run_pod("conflict")

    with pytest.raises(grpc.RpcError, match="'10-one' and '20-two' both set Args"):
        client.run(pod, busybox, FOR_EVER)

    assert not client.containers()
    (made,) = [request.container.id for method, request in first.told if method == "CreateContainer"]
    first.wait_told("RemoveContainer", made)  # what it had set aside for the container is free again
    first.handlers.clear()
    client.run(pod, busybox, FOR_EVER)


@pytest.mark.parametrize("method", ["RunPodSandbox", "CreateContainer", "StartContainer", "UpdateContainer"])
def test_a_step_that_a_plugin_refuses_fails_with_its_words_and_can_be_tried_again(
    client: Client, connect: Connect, busybox: str, method: str
) -> None:
    plugin = connect(name="guard", handlers={method: refuse})

    def steps() -> None:
        pod = client.run_pod("refused", config=config)
        container_id = client.run(pod, busybox, FOR_EVER, f"c{len(plugin.told)}")
        limits = pb.LinuxContainerResources(cpu_shares=100)
        request = pb.UpdateContainerResourcesRequest(container_id=container_id, linux=limits)
        client.runtime.UpdateContainerResources(request, timeout=10)

    config = client.pod_config("refused")
    with pytest.raises(grpc.RpcError, match=r"10-guard refuses.*not today"):
        steps()
    plugin.handlers.clear()

    steps()


def test_a_stop_or_removal_that_a_plugin_refuses_happens(client: Client, connect: Connect, busybox: str) -> None:
    stops = ("StopContainer", "RemoveContainer", "StopPodSandbox", "RemovePodSandbox")
    plugin = connect(handlers=dict.fromkeys(stops, refuse))
    pod = client.run_pod("refused-stop")
    client.run(pod, busybox, FOR_EVER)

    client.remove_pod(pod.id)

    assert not client.pods()
    assert [method for method in plugin.methods() if method in stops] == [stops[0], stops[2], stops[1], stops[3]]


def test_a_plugin_that_hangs_costs_its_timeout_once(client: Client, connect: Connect, busybox: str) -> None:
    def hang(_: Any) -> None:
        raise Silence

    plugin = connect(handlers={"CreateContainer": hang})
    pod = client.run_pod("hang")
    started = time.monotonic()
    client.run(pod, busybox, FOR_EVER, "first")
    assert 0.9 < time.monotonic() - started < 2.5
    assert plugin.closed.wait(2)

    started = time.monotonic()
    client.run(pod, busybox, FOR_EVER, "second")
    assert time.monotonic() - started < 0.9


def test_an_update_is_changed_by_a_plugin_and_told_after_it(client: Client, connect: Connect, busybox: str) -> None:
    def update(request: nri.UpdateContainerRequest) -> nri.UpdateContainerResponse:
        limits = nri.LinuxContainerUpdate(resources=memory(48 << 20))
        return nri.UpdateContainerResponse(
            update=[nri.ContainerUpdate(container_id=request.container.id, linux=limits)]
        )

    plugin = connect(handlers={"UpdateContainer": update})
    pod = client.run_pod("update")
    container_id = client.run(pod, busybox, FOR_EVER)
    request = pb.UpdateContainerResourcesRequest(
        container_id=container_id, linux=pb.LinuxContainerResources(cpu_shares=333)
    )
    client.runtime.UpdateContainerResources(request, timeout=10)

    resources = client.status(container_id).resources.linux
    assert (resources.cpu_shares, resources.memory_limit_in_bytes) == (333, 48 << 20)
    told = plugin.wait_told("PostUpdateContainer", container_id).container.linux.resources
    assert (told.cpu.shares.value, told.memory.limit.value) == (333, 48 << 20)


def test_one_container_s_creation_updates_another(client: Client, connect: Connect, busybox: str) -> None:
    pod = client.run_pod("neighbours")
    first = client.run(pod, busybox, FOR_EVER, "first")
    limits = nri.LinuxContainerUpdate(resources=memory(40 << 20))
    answer = nri.CreateContainerResponse(update=[nri.ContainerUpdate(container_id=first, linux=limits)])
    connect(handlers={"CreateContainer": lambda _: answer})

    client.run(pod, busybox, FOR_EVER, "second")

    assert client.status(first).resources.linux.memory_limit_in_bytes == 40 << 20


def test_a_plugin_updates_and_evicts_containers_unasked(client: Client, connect: Connect, busybox: str) -> None:
    plugin = connect()
    pod = client.run_pod("unasked")
    container_id = client.run(pod, busybox, ["sh", "-c", "trap 'exit 9' TERM; while :; do sleep 0.1; done"])
    limits = nri.LinuxContainerUpdate(resources=memory(32 << 20))
    updates = [nri.ContainerUpdate(container_id=id, linux=limits) for id in (container_id, "unknown")]

    failed = plugin.update(*updates)
    assert [each.container_id for each in failed] == ["unknown"]
    assert client.status(container_id).resources.linux.memory_limit_in_bytes == 32 << 20

    plugin.update(evict=(nri.ContainerEviction(container_id=container_id, reason="test"),))
    assert client.wait_exited(container_id).exit_code == 9


def test_a_pod_s_new_limits_are_told_before_and_after(client: Client, connect: Connect) -> None:
    plugin = connect()
    sums = pb.LinuxPodSandboxConfig(
        resources=pb.LinuxContainerResources(cpu_shares=256), overhead=pb.LinuxContainerResources(cpu_shares=64)
    )
    pod = client.run_pod("resized", linux=sums)
    request = pb.UpdatePodSandboxResourcesRequest(
        pod_sandbox_id=pod.id,
        resources=pb.LinuxContainerResources(cpu_shares=512),
        overhead=pb.LinuxContainerResources(cpu_shares=128),
    )
    client.runtime.UpdatePodSandboxResources(request, timeout=10)

    begun = plugin.wait_told("RunPodSandbox", pod.id).pod.linux
    assert (begun.pod_resources.cpu.shares.value, begun.pod_overhead.cpu.shares.value) == (256, 64)
    told = plugin.wait_told("UpdatePodSandbox", pod.id)
    assert (told.linux_resources.cpu.shares.value, told.overhead_linux_resources.cpu.shares.value) == (512, 128)
    after = plugin.wait_told("PostUpdatePodSandbox", pod.id).pod.linux
    assert (after.pod_resources.cpu.shares.value, after.pod_overhead.cpu.shares.value) == (512, 128)


def test_no_container_is_lost_or_told_twice_while_plugins_come(client: Client, connect: Connect, busybox: str) -> None:
    pod = client.run_pod("busy")
    stop = threading.Event()
    made: list[str] = []

    def work(worker: int) -> None:
        for number in range(1000):
            if stop.is_set():
                return
            made.append(client.run(pod, busybox, FOR_EVER, f"w{worker}-{number}"))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for worker in workers:
        worker.start()
    time.sleep(0.3)
    plugins = [
        connect(index=f"{number:02}", handlers={"Synchronize": lambda _: time.sleep(0.2)}) for number in range(4)
    ]
    stop.set()
    for worker in workers:
        worker.join()

    for plugin in plugins:
        at_first = [
            each.id for method, request in plugin.told if method == "Synchronize" for each in request.containers
        ]
        later = [request.container.id for method, request in plugin.told if method == "CreateContainer"]
        assert sorted([*at_first, *later]) == sorted(made)


def test_a_validator_plugin_refuses_what_another_wants(client: Client, connect: Connect, busybox: str) -> None:
    def validate(request: nri.ValidateContainerAdjustmentRequest) -> nri.ValidateContainerAdjustmentResponse:
        owner = request.owners.owners[request.container.id].simple[nri.Field.Value("Args")]
        reason = f"{owner} wants {' '.join(request.adjust.args)} for {' '.join(request.container.args)}"
        return nri.ValidateContainerAdjustmentResponse(reject=True, reason=reason)

    connect(name="bad", events=mask(nri.CREATE_CONTAINER), handlers=adjusting(args=["rm"]))
    connect(
        index="90", events=mask(nri.VALIDATE_CONTAINER_ADJUSTMENT), handlers={"ValidateContainerAdjustment": validate}
    )
    pod = client.run_pod("validated")

    with pytest.raises(grpc.RpcError, match="10-bad wants rm for sleep 100000"):
        client.run(pod, busybox, FOR_EVER)
    assert not client.containers()


def test_a_new_daemon_takes_plugins_in_anew_and_tells_ends_only_once(
    make_daemon: MakeDaemon, directory: Path, busybox: str
) -> None:
    daemon = make_daemon({"nri": {"enable": True, "plugin_path": directory / "no-plugins"}})
    client, socket = daemon.client(), daemon.run_dir / "nri.sock"
    with contextlib.closing(client):
        pod = client.run_pod("restart")
        running = client.run(pod, busybox, FOR_EVER, "running")
        ended = client.run(pod, busybox, ["true"], "ended")
        client.wait_exited(ended)
        old = NriPlugin.connect(socket)
        daemon.kill()
        assert old.closed.wait(5)
        daemon.start()

        with NriPlugin.connect(socket) as new:
            state = next(request for method, request in new.told if method == "Synchronize")
            states = {each.id: each.state for each in state.containers}
            assert states == {running: nri.CONTAINER_RUNNING, ended: nri.CONTAINER_STOPPED}
            assert [each.id for each in state.pods] == [pod.id]
            assert all(list(each.args) for each in state.containers)
            client.remove_pod(pod.id)

            assert [method for method in new.methods(ended) if method.startswith("Stop")] == []
            assert new.methods(running)[-2:] == ["StopContainer", "RemoveContainer"]
        assert not client.pods()
        daemon.stop()
        assert not socket.exists()


def test_without_the_switch_there_is_no_socket_and_nothing_of_it_is_loaded(
    make_daemon: MakeDaemon, busybox: str
) -> None:
    daemon = make_daemon()

    assert not (daemon.run_dir / "nri.sock").exists()
    assert "cri.nri" not in daemon.log.read_text()
