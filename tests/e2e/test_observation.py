"""What the CRI tells of running pods: statistics, metrics, events, filters and the Stream* calls."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import cgroups
from tests.e2e.harness.client import Client, Pod
from tests.e2e.harness.daemon import Daemon
from tests.e2e.harness.ports import wait_until

FOR_EVER = ["sleep", "100000"]
BUSY = ["sh", "-c", "while :; do :; done"]


OwnCgroup = Callable[[str], pb.LinuxPodSandboxConfig]


@pytest.fixture
def own_cgroup(client: Client) -> Iterator[OwnCgroup]:
    """Gives pods a cgroup each, and removes it in the end, as the kubelet does."""
    names = []

    def give(name: str) -> pb.LinuxPodSandboxConfig:
        names.append(name)
        return pb.LinuxPodSandboxConfig(cgroup_parent=cgroups.below(client.cgroup_parent, name))

    yield give
    client.remove_everything()
    for name in names:
        cgroups.remove(cgroups.below(client.cgroup_parent, name))


def stats_of(client: Client, container_id: str) -> pb.ContainerStats:
    request = pb.ContainerStatsRequest(container_id=container_id)
    found: pb.ContainerStats = client.runtime.ContainerStats(request, timeout=30).stats
    return found


def pod_stats_of(client: Client, pod: Pod) -> pb.PodSandboxStats:
    request = pb.PodSandboxStatsRequest(pod_sandbox_id=pod.id)
    found: pb.PodSandboxStats = client.runtime.PodSandboxStats(request, timeout=30).stats
    return found


# Statistics


def test_the_first_stats_of_a_container_have_every_field(client: Client, busybox: str, own_cgroup: OwnCgroup) -> None:
    pod = client.run_pod("stats", linux=own_cgroup("stats"))
    limit = 64 << 20
    resources = pb.LinuxContainerResources(memory_limit_in_bytes=limit, memory_swap_limit_in_bytes=limit)
    container_id = client.run(
        pod,
        busybox,
        ["sh", "-c", "dd if=/dev/zero of=/file bs=1M count=5; while :; do :; done"],
        labels={"a": "b"},
        annotations={"c": "d"},
        linux=pb.LinuxContainerConfig(resources=resources),
    )
    client.exec_sync(container_id, ["sh", "-c", "until [ -s /file ]; do sleep 0.1; done; sleep 0.3"])

    found = stats_of(client, container_id)

    assert (found.attributes.id, found.attributes.metadata.name) == (container_id, "main")
    assert (dict(found.attributes.labels), dict(found.attributes.annotations)) == ({"a": "b"}, {"c": "d"})
    assert found.cpu.timestamp > 0
    assert found.cpu.usage_core_nano_seconds.value > 0
    assert 0 < found.cpu.usage_nano_cores.value < 64e9
    memory = found.memory
    assert memory.timestamp > 0
    assert 0 < memory.working_set_bytes.value <= memory.usage_bytes.value <= limit
    assert 0 < memory.available_bytes.value < limit
    assert memory.rss_bytes.value > 0
    assert memory.page_faults.value > 0
    assert memory.HasField("major_page_faults")
    assert found.swap.HasField("swap_usage_bytes")
    assert found.swap.swap_available_bytes.value == 0
    assert found.writable_layer.timestamp > 0
    assert found.writable_layer.used_bytes.value >= 5 << 20
    assert found.writable_layer.inodes_used.value >= 1
    assert Path(found.writable_layer.fs_id.mountpoint).is_dir()
    if Path("/proc/pressure").exists() and Path("/sys/fs/cgroup/cgroup.controllers").exists():
        assert all(each.HasField("psi") for each in (found.cpu, found.memory, found.io))


def test_a_pod_s_stats_have_its_network_processes_and_containers(
    client: Client, busybox: str, own_cgroup: OwnCgroup
) -> None:
    pod = client.run_pod("pod-stats", labels={"a": "b"}, annotations={"c": "d"}, linux=own_cgroup("pod-stats"))
    container_id = client.run(pod, busybox, ["sh", "-c", "sleep 100000 & sleep 100000 & wait"])
    client.exec_sync(
        container_id, ["sh", "-c", "ping -c 1 -W 1 $(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p')"]
    )

    found = pod_stats_of(client, pod)

    assert found.attributes.id == pod.id
    assert found.attributes.metadata == pod.config.metadata
    assert (dict(found.attributes.labels), dict(found.attributes.annotations)) == ({"a": "b"}, {"c": "d"})
    linux = found.linux
    assert linux.cpu.usage_core_nano_seconds.value > 0
    assert linux.cpu.HasField("usage_nano_cores")
    assert linux.memory.working_set_bytes.value > 0
    assert linux.network.timestamp > 0
    assert linux.network.default_interface.name == "eth0"
    assert linux.network.default_interface.tx_bytes.value > 0
    assert linux.network.default_interface.HasField("rx_bytes")
    assert linux.network.default_interface.HasField("rx_errors")
    assert linux.network.default_interface.HasField("tx_errors")
    assert linux.process.timestamp > 0
    assert linux.process.process_count.value >= 3
    assert [each.attributes.id for each in linux.containers] == [container_id]


def test_pods_that_share_a_cgroup_parent_have_their_own_containers_numbers(client: Client, busybox: str) -> None:
    idle = client.run_pod("idle")
    busy = client.run_pod("busy")
    client.run(idle, busybox, FOR_EVER)
    client.run(busy, busybox, BUSY)
    time.sleep(2)

    used = [pod_stats_of(client, pod).linux for pod in (idle, busy)]

    assert used[0].cpu.usage_core_nano_seconds.value * 3 < used[1].cpu.usage_core_nano_seconds.value
    assert used[0].process.process_count.value == 1
    for each in used:
        assert each.memory.usage_bytes.value == each.containers[0].memory.usage_bytes.value > 0


def test_nano_cores_follow_what_runs(client: Client, busybox: str, own_cgroup: OwnCgroup) -> None:
    pod = client.run_pod("busy", linux=own_cgroup("busy"))
    container_id = client.run(pod, busybox, BUSY)
    time.sleep(1)
    first = stats_of(client, container_id).cpu.usage_nano_cores.value
    time.sleep(1.5)
    second = stats_of(client, container_id).cpu.usage_nano_cores.value

    assert first > 50_000_000
    assert second > 100_000_000
    assert pod_stats_of(client, pod).linux.cpu.usage_nano_cores.value > 50_000_000


def test_created_and_exited_containers_have_stats_too(client: Client, busybox: str) -> None:
    pod = client.run_pod("states")
    created = client.create(pod, client.container_config(busybox, FOR_EVER, "created"))
    exited = client.run(pod, busybox, ["dd", "if=/dev/zero", "of=/file", "bs=1M", "count=3"], "exited")
    client.wait_exited(exited)

    assert stats_of(client, created).memory.usage_bytes.value > 0
    assert stats_of(client, created).cpu.timestamp > 0
    ended = stats_of(client, exited)
    assert not ended.HasField("cpu")
    assert not ended.HasField("memory")
    assert ended.writable_layer.used_bytes.value >= 3 << 20
    with pytest.raises(grpc.RpcError) as failure:
        stats_of(client, "0" * 64)
    assert failure.value.code() == grpc.StatusCode.NOT_FOUND


def test_what_a_container_wrote_last_is_counted_after_its_end(client: Client, busybox: str) -> None:
    pod = client.run_pod("last")
    container_id = client.run(pod, busybox, FOR_EVER)
    before = stats_of(client, container_id).writable_layer.used_bytes.value
    client.exec_sync(container_id, ["dd", "if=/dev/zero", "of=/file", "bs=1M", "count=4"])

    client.stop(container_id)

    assert before < 1 << 20
    wait_until(
        lambda: stats_of(client, container_id).writable_layer.used_bytes.value >= 4 << 20, "the layer is counted", 30
    )


def test_a_pod_on_the_node_s_network_has_no_network_stats(client: Client, busybox: str) -> None:
    options = pb.NamespaceOption(network=pb.NODE)
    security = pb.LinuxSandboxSecurityContext(namespace_options=options)
    pod = client.run_pod("host", hostname="", linux=pb.LinuxPodSandboxConfig(security_context=security))

    assert not pod_stats_of(client, pod).linux.HasField("network")


# Metrics

EVERYWHERE = {
    "container_cpu_cfs_burst_periods_total",
    "container_cpu_cfs_burst_seconds_total",
    "container_cpu_cfs_periods_total",
    "container_cpu_cfs_throttled_periods_total",
    "container_cpu_cfs_throttled_seconds_total",
    "container_cpu_system_seconds_total",
    "container_cpu_usage_seconds_total",
    "container_cpu_user_seconds_total",
    "container_file_descriptors",
    "container_fs_inodes_free",
    "container_fs_inodes_total",
    "container_fs_limit_bytes",
    "container_fs_usage_bytes",
    "container_last_seen",
    "container_memory_cache",
    "container_memory_failcnt",
    "container_memory_failures_total",
    "container_memory_kernel_usage",
    "container_memory_mapped_file",
    "container_memory_max_usage_bytes",
    "container_memory_rss",
    "container_memory_swap",
    "container_memory_total_active_file_bytes",
    "container_memory_total_inactive_file_bytes",
    "container_memory_usage_bytes",
    "container_memory_working_set_bytes",
    "container_network_receive_bytes_total",
    "container_network_receive_errors_total",
    "container_network_receive_packets_dropped_total",
    "container_network_receive_packets_total",
    "container_network_transmit_bytes_total",
    "container_network_transmit_errors_total",
    "container_network_transmit_packets_dropped_total",
    "container_network_transmit_packets_total",
    "container_oom_events_total",
    "container_processes",
    "container_sockets",
    "container_spec_cpu_period",
    "container_spec_cpu_quota",
    "container_spec_cpu_shares",
    "container_spec_memory_limit_bytes",
    "container_spec_memory_reservation_limit_bytes",
    "container_spec_memory_swap_limit_bytes",
    "container_start_time_seconds",
    "container_threads",
    "container_threads_max",
    "container_ulimits_soft",
}
WHERE_COUNTED = {
    "container_blkio_device_usage_total",
    "container_fs_reads_bytes_total",
    "container_fs_reads_total",
    "container_fs_writes_bytes_total",
    "container_fs_writes_total",
    "container_hugetlb_max_usage_bytes",
    "container_hugetlb_usage_bytes",
    *(
        f"container_pressure_{what}_{how}_seconds_total"
        for what in ("cpu", "memory", "io")
        for how in ("stalled", "waiting")
    ),
}


def descriptors(client: Client) -> dict[str, pb.MetricDescriptor]:
    request = pb.ListMetricDescriptorsRequest()
    return {each.name: each for each in client.runtime.ListMetricDescriptors(request, timeout=30).descriptors}


def all_metrics(client: Client) -> dict[str, pb.PodSandboxMetrics]:
    request = pb.ListPodSandboxMetricsRequest()
    return {each.pod_sandbox_id: each for each in client.runtime.ListPodSandboxMetrics(request, timeout=30).pod_metrics}


def test_every_metric_is_described(client: Client) -> None:
    found = descriptors(client)

    assert set(found) == EVERYWHERE | WHERE_COUNTED
    assert all(each.help and each.label_keys for each in found.values())


def test_the_metrics_of_a_pod_and_its_container_are_those_that_are_described(
    client: Client, busybox: str, own_cgroup: OwnCgroup
) -> None:
    pod = client.run_pod("metrics", linux=own_cgroup("metrics"))
    limit = 64 << 20
    resources = pb.LinuxContainerResources(
        cpu_period=100_000, cpu_quota=50_000, cpu_shares=512, memory_limit_in_bytes=limit,
        memory_swap_limit_in_bytes=limit,
    )  # fmt: skip
    command = ["sh", "-c", "dd if=/dev/zero of=/file bs=1M count=2; sleep 100000 & nc -l -p 80 & wait"]
    container_id = client.run(pod, busybox, command, linux=pb.LinuxContainerConfig(resources=resources))
    client.exec_sync(container_id, ["sh", "-c", "until [ -s /file ]; do sleep 0.1; done; sleep 0.5"])
    described = descriptors(client)

    found = all_metrics(client)[pod.id]

    of_container = {each.container_id: each.metrics for each in found.container_metrics}[container_id]
    every = [*found.metrics, *of_container]
    assert {each.name for each in every} >= EVERYWHERE
    for each in every:
        assert len(each.label_values) == len(described[each.name].label_keys), each
    series = Counter((each.name, *each.label_values) for each in every)
    assert max(series.values()) == 1, "Prometheus refuses a series that comes twice"

    values = {each.name: each.value.value for each in of_container}
    assert values["container_spec_memory_limit_bytes"] == limit
    assert values["container_spec_memory_swap_limit_bytes"] == limit
    assert values["container_spec_cpu_period"] == 100_000
    assert values["container_spec_cpu_quota"] == 50_000
    assert values["container_spec_cpu_shares"] == 512
    assert 0 < values["container_memory_working_set_bytes"] <= values["container_memory_usage_bytes"] <= limit
    assert values["container_memory_max_usage_bytes"] >= values["container_memory_usage_bytes"] > 0
    assert values["container_fs_usage_bytes"] >= 2 << 20
    assert values["container_fs_limit_bytes"] > values["container_fs_usage_bytes"]
    assert values["container_processes"] == 3
    assert values["container_threads"] >= 3
    assert values["container_sockets"] >= 1
    assert values["container_file_descriptors"] >= 9
    assert values["container_ulimits_soft"] > 0
    assert abs(values["container_last_seen"] - time.time()) < 60
    assert abs(values["container_start_time_seconds"] - time.time()) < 60


def test_metrics_tell_their_types_and_when_they_were_counted(client: Client, busybox: str) -> None:
    pod = client.run_pod("types")
    client.run(pod, busybox, FOR_EVER)

    found = all_metrics(client)[pod.id]

    every = [*found.metrics, *found.container_metrics[0].metrics]
    totals = {each.name for each in every if each.name.endswith(("_total", "_failcnt"))} - {"container_fs_inodes_total"}
    assert {each.name for each in every if each.metric_type == pb.COUNTER} == totals
    ages_s = {each.name: (time.time_ns() - each.timestamp) / 1e9 for each in every if each.timestamp}
    assert list(ages_s) == ["container_fs_usage_bytes"], "all others are read on request"
    assert 0 < ages_s["container_fs_usage_bytes"] < 60


def test_metrics_bear_the_labels_that_kubelet_gave_them(client: Client, busybox: str, own_cgroup: OwnCgroup) -> None:
    pod = client.run_pod("labelled", linux=own_cgroup("labelled"))
    container_id = client.run(pod, busybox, FOR_EVER)
    keys = descriptors(client)["container_memory_rss"].label_keys

    found = all_metrics(client)[pod.id]

    def labels(metrics: Any, name: str) -> dict[str, str]:
        return next(dict(zip(keys, each.label_values, strict=False)) for each in metrics if each.name == name)

    common = {"namespace": "e2e", "pod": "labelled"}
    cgroup = cgroups.below(client.cgroup_parent, "labelled")
    assert labels(found.metrics, "container_memory_rss") == {
        **common, "id": cgroup, "name": pod.id, "image": "", "container": "",
    }  # fmt: skip
    assert labels(found.metrics, "container_network_receive_bytes_total")["container"] == ""
    of_container = labels(found.container_metrics[0].metrics, "container_memory_rss")
    assert of_container.pop("id").startswith(f"{cgroup}/")
    assert of_container == {**common, "name": container_id, "image": busybox, "container": "main"}


def test_what_has_ended_has_no_metrics(client: Client, busybox: str) -> None:
    pod = client.run_pod("ended")
    container_id = client.run(pod, busybox, ["true"])
    client.wait_exited(container_id)
    assert not all_metrics(client)[pod.id].container_metrics

    client.stop_pod(pod.id)

    assert pod.id not in all_metrics(client)


# Events


class Listener:
    """One GetContainerEvents stream, read by a thread of its own."""

    def __init__(self, client: Client) -> None:
        self.events: list[pb.ContainerEventResponse] = []
        self.code: grpc.StatusCode | None = None
        self._call = client.runtime.GetContainerEvents(pb.GetEventsRequest())
        self._call.initial_metadata()  # comes once the daemon listens for us
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            for event in self._call:
                self.events.append(event)
        except grpc.RpcError as error:
            self.code = error.code()

    def wait(self, condition: Callable[[list[pb.ContainerEventResponse]], bool]) -> list[pb.ContainerEventResponse]:
        wait_until(lambda: condition(self.events), "the events have come", 20)
        return list(self.events)

    def close(self) -> None:
        self._call.cancel()
        self.join()

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def listening(client: Client) -> Iterator[Listener]:
    listener = Listener(client)
    try:
        yield listener
    finally:
        listener.close()


def is_deleted(id: str) -> Callable[[list[pb.ContainerEventResponse]], bool]:
    return lambda events: any(
        each.container_id == id and each.container_event_type == pb.CONTAINER_DELETED_EVENT for each in events
    )


LIFE = [
    pb.CONTAINER_CREATED_EVENT,
    pb.CONTAINER_STARTED_EVENT,
    pb.CONTAINER_STOPPED_EVENT,
    pb.CONTAINER_DELETED_EVENT,
]


def test_each_event_tells_the_states_of_its_moment(client: Client, busybox: str) -> None:
    with listening(client) as listener:
        pod = client.run_pod("events")
        container_id = client.run(pod, busybox, ["sh", "-c", "exit 3"])
        client.wait_exited(container_id)
        client.remove_pod(pod.id)
        events = listener.wait(is_deleted(pod.id))

    of_container = [each for each in events if each.container_id == container_id]
    of_pod = [each for each in events if each.container_id == pod.id]
    assert [each.container_event_type for each in of_container] == LIFE
    assert [each.container_event_type for each in of_pod] == LIFE
    created, started, stopped, deleted = of_container
    assert [each.state for each in created.containers_statuses] == [pb.CONTAINER_CREATED]
    assert [each.state for each in started.containers_statuses] == [pb.CONTAINER_RUNNING]
    assert [(each.state, each.exit_code) for each in stopped.containers_statuses] == [(pb.CONTAINER_EXITED, 3)]
    assert not deleted.containers_statuses
    assert [each.pod_sandbox_status.state for each in of_pod] == [
        pb.SANDBOX_READY, pb.SANDBOX_READY, pb.SANDBOX_NOTREADY, pb.SANDBOX_NOTREADY,
    ]  # fmt: skip
    for each in events:
        assert each.pod_sandbox_status.metadata == pod.config.metadata, "kubelet drops an event without it"
        assert each.pod_sandbox_status.id == pod.id
        assert each.pod_sandbox_status.network.ip
    times = [each.created_at for each in events]
    assert times == sorted(set(times))


def test_two_listeners_see_a_burst_alike(client: Client, daemon: Daemon, busybox: str) -> None:
    other = daemon.client()

    def whole_way(number: int) -> str:
        pod = client.run_pod(f"burst-{number}")
        client.wait_exited(client.run(pod, busybox, ["true"]))
        client.remove_pod(pod.id)
        return pod.id

    with listening(client) as first, listening(other) as second:
        with ThreadPoolExecutor(8) as pool:
            ids = list(pool.map(whole_way, range(16)))
        wanted = lambda events: all(is_deleted(id)(events) for id in ids)  # noqa: E731
        seen, seen_too = first.wait(wanted), second.wait(wanted)
    other.close()

    assert seen == seen_too
    assert len(seen) == 16 * 8
    times = [each.created_at for each in seen]
    assert times == sorted(set(times))
    by_object: dict[str, list[int]] = {}
    for each in seen:
        by_object.setdefault(each.container_id, []).append(each.container_event_type)
    assert all(kinds == LIFE for kinds in by_object.values())


def test_a_listener_that_left_is_forgotten_and_others_go_on(client: Client, daemon: Daemon) -> None:
    other = daemon.client()
    with listening(client) as stays:
        with listening(other):
            pass
        pod = client.run_pod("left")
        client.remove_pod(pod.id)
        assert stays.wait(is_deleted(pod.id))
    other.close()


def test_the_status_of_a_pod_has_its_containers_and_the_time(client: Client, busybox: str) -> None:
    pod = client.run_pod("status")
    container_id = client.run(pod, busybox, FOR_EVER)
    request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod.id)

    first = client.runtime.PodSandboxStatus(request, timeout=30)
    second = client.runtime.PodSandboxStatus(request, timeout=30)

    assert [each.id for each in first.containers_statuses] == [container_id]
    assert first.containers_statuses[0] == client.status(container_id)
    assert 0 < first.timestamp < second.timestamp
    assert abs(first.timestamp / 1e9 - time.time()) < 60


def test_a_restarted_daemon_tells_rates_and_events_at_once(make_daemon: MakeDaemon, busybox: str) -> None:
    daemon = make_daemon()
    client = daemon.client()
    pod = client.run_pod("restart")
    container_id = client.run(pod, busybox, BUSY)
    listener = Listener(client)

    daemon.restart()

    listener.join()
    assert listener.code is grpc.StatusCode.UNAVAILABLE
    assert stats_of(client, container_id).cpu.usage_nano_cores.value > 50_000_000
    with listening(client) as again:
        client.remove_pod(pod.id)
        events = again.wait(is_deleted(pod.id))
    kinds = [each.container_event_type for each in events if each.container_id == container_id]
    assert kinds == [pb.CONTAINER_STOPPED_EVENT, pb.CONTAINER_DELETED_EVENT]
    assert all(each.pod_sandbox_status.metadata == pod.config.metadata for each in events)


# Lists


def streamed(method: Any, request: Any, field: str) -> list[Any]:
    return [item for message in method(request, timeout=30) for item in getattr(message, field)]


def ids_of(stats: Any) -> list[str]:
    return [each.attributes.id for each in stats]


def test_filters_let_through_what_they_name(client: Client, busybox: str) -> None:
    pods = {name: client.run_pod(name, labels={"pod": name, "all": "yes"}) for name in ("one", "two")}
    ids = {
        (name, container): client.run(pods[name], busybox, command, container, labels={"container": container})
        for name in pods
        for container, command in (("runs", FOR_EVER), ("ends", ["true"]))
    }
    for name in pods:
        client.wait_exited(ids[name, "ends"])
    client.stop_pod(pods["two"].id)

    runtime = client.runtime

    def listed(**wanted: Any) -> set[str]:
        filter = pb.ContainerFilter(**wanted)
        found = {each.id for each in runtime.ListContainers(pb.ListContainersRequest(filter=filter)).containers}
        parts = streamed(runtime.StreamContainers, pb.StreamContainersRequest(filter=filter), "containers")
        assert {each.id for each in parts} == found
        return found

    def listed_pods(**wanted: Any) -> set[str]:
        filter = pb.PodSandboxFilter(**wanted)
        found = {each.id for each in runtime.ListPodSandbox(pb.ListPodSandboxRequest(filter=filter)).items}
        parts = streamed(runtime.StreamPodSandboxes, pb.StreamPodSandboxesRequest(filter=filter), "pod_sandboxes")
        assert {each.id for each in parts} == found
        return found

    def with_stats(**wanted: Any) -> set[str]:
        filter = pb.ContainerStatsFilter(**wanted)
        found = {*ids_of(runtime.ListContainerStats(pb.ListContainerStatsRequest(filter=filter)).stats)}
        request = pb.StreamContainerStatsRequest(filter=filter)
        assert {*ids_of(streamed(runtime.StreamContainerStats, request, "container_stats"))} == found
        return found

    def pods_with_stats(**wanted: Any) -> set[str]:
        filter = pb.PodSandboxStatsFilter(**wanted)
        found = {*ids_of(runtime.ListPodSandboxStats(pb.ListPodSandboxStatsRequest(filter=filter)).stats)}
        request = pb.StreamPodSandboxStatsRequest(filter=filter)
        assert {*ids_of(streamed(runtime.StreamPodSandboxStats, request, "pod_sandbox_stats"))} == found
        return found

    one, two = pods["one"].id, pods["two"].id
    everything = set(ids.values())
    running, of_two = ids["one", "runs"], {ids["two", "runs"], ids["two", "ends"]}
    assert listed() == with_stats() == everything
    assert listed(id=running) == listed(id=running[:20]) == with_stats(id=running[:20]) == {running}
    assert listed(pod_sandbox_id=two) == with_stats(pod_sandbox_id=two) == of_two
    assert listed(state=pb.ContainerStateValue(state=pb.CONTAINER_RUNNING)) == {running}
    assert listed(label_selector={"container": "runs"}) == with_stats(label_selector={"container": "runs"})
    assert listed(label_selector={"container": "runs"}) == {running, ids["two", "runs"]}
    assert listed(label_selector={"container": "runs"}, pod_sandbox_id=one) == {running}
    assert listed(label_selector={"container": "runs", "no": "such"}) == set()
    assert listed_pods() == pods_with_stats() == {one, two}
    assert listed_pods(id=one[:20]) == pods_with_stats(id=one[:20]) == {one}
    assert listed_pods(state=pb.PodSandboxStateValue(state=pb.SANDBOX_NOTREADY)) == {two}
    assert listed_pods(label_selector={"all": "yes"}) == pods_with_stats(label_selector={"all": "yes"}) == {one, two}
    assert listed_pods(label_selector={"pod": "one"}) == pods_with_stats(label_selector={"pod": "one"}) == {one}
    assert listed_pods(id=one, label_selector={"pod": "two"}) == set()


def test_the_stream_calls_send_what_the_lists_do(client: Client, busybox: str) -> None:
    for number in range(3):
        pod = client.run_pod(f"stream-{number}")
        client.run(pod, busybox, FOR_EVER)
    runtime = client.runtime

    pods = runtime.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=30).items
    assert streamed(runtime.StreamPodSandboxes, pb.StreamPodSandboxesRequest(), "pod_sandboxes") == list(pods)
    containers = runtime.ListContainers(pb.ListContainersRequest(), timeout=30).containers
    assert streamed(runtime.StreamContainers, pb.StreamContainersRequest(), "containers") == list(containers)
    stats = runtime.ListContainerStats(pb.ListContainerStatsRequest(), timeout=30).stats
    found = streamed(runtime.StreamContainerStats, pb.StreamContainerStatsRequest(), "container_stats")
    assert ids_of(found) == ids_of(stats)
    pod_stats = runtime.ListPodSandboxStats(pb.ListPodSandboxStatsRequest(), timeout=30).stats
    found = streamed(runtime.StreamPodSandboxStats, pb.StreamPodSandboxStatsRequest(), "pod_sandbox_stats")
    assert ids_of(found) == ids_of(pod_stats)
    metrics = all_metrics(client)
    found = streamed(runtime.StreamPodSandboxMetrics, pb.StreamPodSandboxMetricsRequest(), "pod_sandbox_metrics")
    assert {each.pod_sandbox_id for each in found} == set(metrics)
    assert len(found) == len(pods) == 3


def test_large_items_go_in_messages_below_4_mib(client: Client) -> None:
    annotations = {f"large-{number}": "x" * 60_000 for number in range(16)}
    for number in range(6):
        client.run_pod(f"large-{number}", annotations=annotations)

    messages = list(client.runtime.StreamPodSandboxes(pb.StreamPodSandboxesRequest(), timeout=30))

    assert len(messages) > 1
    assert all(each.ByteSize() < 4 << 20 for each in messages)
    assert sum(len(each.pod_sandboxes) for each in messages) == 6
