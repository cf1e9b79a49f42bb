"""A kubelet that takes pods' numbers and states from the CRI alone, beside one that reads cgroups by itself."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.harness import kubelet as kubelet_module
from tests.e2e.harness.daemon import Daemon
from tests.e2e.harness.kubelet import Kubelet, running_kubelet, text_of_log
from tests.e2e.harness.ports import wait_until

MakeDaemon = Callable[..., Daemon]

FROM_THE_CRI = {"PodAndContainerStatsFromCRI": True, "EventedPLEG": True}
OF_PODS = re.compile(r"container_(?!scrape_error)")


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    labels: dict[str, str]
    value: float


def parsed(text: str) -> list[Series]:
    """The series of the Prometheus text format."""
    found = []
    for line in text.splitlines():
        match = re.match(r"(\w+)\{(.*)\} (\S+)", line)
        if match:
            labels = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match[2]))
            found.append(Series(match[1], labels, float(match[3])))
    return found


def label_keys(series: list[Series]) -> dict[str, frozenset[str]]:
    return {each.name: frozenset(each.labels) for each in series if OF_PODS.match(each.name)}


def pod(name: str, image: str) -> dict[str, Any]:
    script = "while :; do i=$((i+1)); [ $((i % 20000)) = 0 ] && sleep 0.05; done"
    main = {
        "name": "main",
        "image": image,
        "command": ["sh", "-c", script],
        "imagePullPolicy": "IfNotPresent",
        "resources": {"limits": {"memory": "64Mi", "cpu": "500m"}},
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"containers": [main], "terminationGracePeriodSeconds": 0},
    }


@pytest.fixture
def running(make_daemon: MakeDaemon) -> Iterator[Callable[..., Kubelet]]:
    """Starts a kubelet on a daemon of its own; all its pods have gone when the test ends."""
    if not kubelet_module.PROGRAM:
        pytest.skip("kubelet is not installed")
    contexts = []

    def start(feature_gates: dict[str, bool]) -> Kubelet:
        contexts.append(running_kubelet(make_daemon(), feature_gates))
        return contexts[-1].__enter__()

    yield start
    for context in contexts:
        context.__exit__(None, None, None)


def wait(kubelet: Kubelet, condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    try:
        wait_until(condition, what, timeout_s)
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{text_of_log(kubelet)}") from None


def with_pod(kubelet: Kubelet, image: str) -> Kubelet:
    kubelet.write(pod("used", image))
    wait(kubelet, lambda: kubelet.condition("used", "Ready"), "the pod is ready")
    return kubelet


def metrics(kubelet: Kubelet) -> list[Series]:
    return parsed(kubelet.text("/metrics/cadvisor"))


# cAdvisor tells these of every cgroup without ever counting them: 0 without a reader of the node's load average.
NEVER_COUNTED = {
    "container_cpu_load_average_10s",
    "container_cpu_load_d_average_10s",
    "container_health_state",
    "container_tasks_state",
}


# cAdvisor looks at the processes of a cgroup itself; those of a pod are all in the cgroups of its containers.
OF_CONTAINERS_ALONE = {"container_processes", "container_file_descriptors", "container_sockets"}


def of_pod(series: list[Series]) -> list[Series]:
    return [each for each in series if each.labels.get("pod") == "used-e2e"]


def test_kubelet_s_metrics_from_the_cri_are_those_it_had_of_cadvisor(
    running: Callable[..., Kubelet], busybox: str
) -> None:
    by_cri, by_cadvisor = with_pod(running(FROM_THE_CRI), busybox), with_pod(running({}), busybox)
    working_set = "container_memory_working_set_bytes"
    wait(
        by_cadvisor,
        lambda: any(each.name == working_set for each in of_pod(metrics(by_cadvisor))),
        "cAdvisor has seen the pod",
    )

    ours, theirs = of_pod(metrics(by_cri)), label_keys(of_pod(metrics(by_cadvisor)))

    mine = label_keys(ours)
    assert theirs.keys() - mine.keys() <= NEVER_COUNTED
    assert {name: mine[name] for name in theirs.keys() - NEVER_COUNTED} == {
        name: theirs[name] for name in theirs.keys() - NEVER_COUNTED
    }
    main = [each for each in ours if each.labels["container"] == "main"]
    assert {each.labels["namespace"] for each in main} == {"default"}
    assert {each.labels["image"] for each in main} != {""}
    values = {each.name: each.value for each in main}
    assert values["container_spec_memory_limit_bytes"] == 64 << 20
    assert values["container_spec_cpu_quota"] == 50_000
    assert values[working_set] > 0


def test_a_pod_s_metrics_have_the_values_that_cadvisor_reads(running: Callable[..., Kubelet], busybox: str) -> None:
    kubelet = with_pod(running({}), busybox)
    client = kubelet.daemon.client()
    described = client.runtime.ListMetricDescriptors(pb.ListMetricDescriptorsRequest(), timeout=30).descriptors
    keys = {each.name: each.label_keys for each in described}

    def by_cgroup(series: Iterable[Series]) -> dict[tuple[str, ...], float]:
        return {
            (each.name, *(each.labels[key] for key in sorted(each.labels) if key not in ("name", "image"))): each.value
            for each in series
            if each.labels.get("container") == "" and "network" not in each.name
        }

    def looked() -> bool:
        """cAdvisor looks at a cgroup every ten seconds or so; at first it tells zeros."""
        theirs.update(by_cgroup(of_pod(metrics(kubelet))))
        return any(key[0] == "container_memory_rss" and value > 0 for key, value in theirs.items())

    theirs: dict[tuple[str, ...], float] = {}
    wait(kubelet, looked, "cAdvisor has looked at the pod")
    listed = client.runtime.ListPodSandboxMetrics(pb.ListPodSandboxMetricsRequest(), timeout=30).pod_metrics
    ours = by_cgroup(
        Series(each.name, dict(zip(keys[each.name], each.label_values, strict=True)), each.value.value)
        for pod in listed
        for each in pod.metrics
    )
    client.close()

    assert {key[0] for key in theirs.keys() - ours.keys()} <= NEVER_COUNTED | OF_CONTAINERS_ALONE
    far = {key: (ours[key], theirs[key]) for key in ours.keys() & theirs if not is_near(key[0], ours[key], theirs[key])}
    assert not far


def is_near(name: str, ours: float, theirs: float) -> bool:
    """Whether two looks at a busy cgroup, some seconds apart, may differ so much."""
    if "_spec_" in name or name == "container_threads_max":
        return ours == theirs
    if "_memory_" in name:
        return abs(ours - theirs) <= 4 << 20
    return abs(ours - theirs) <= 20 or 0.5 < ours / theirs < 2 or "_cfs_" in name


def test_kubelet_s_summary_from_the_cri_alone_is_whole(running: Callable[..., Kubelet], busybox: str) -> None:
    kubelet = with_pod(running(FROM_THE_CRI), busybox)

    found = next(each for each in kubelet.stats()["pods"] if each["podRef"]["name"] == "used-e2e")

    main = found["containers"][0]
    assert main["name"] == "main"
    for each in (found, main):
        assert each["cpu"]["usageCoreNanoSeconds"] > 0
        assert each["cpu"]["usageNanoCores"] > 0
        assert each["memory"]["workingSetBytes"] > 0
        assert each["memory"]["rssBytes"] > 0
        assert each["memory"]["availableBytes"] > 0
    assert found["network"]["name"] == "eth0"
    assert found["process_stats"]["process_count"] >= 1
    assert main["rootfs"]["usedBytes"] >= 0
    assert main["swap"]["swapUsageBytes"] == 0


def test_kubelet_follows_events_instead_of_asking(running: Callable[..., Kubelet], busybox: str) -> None:
    """With EventedPLEG kubelet asks every five minutes only: what it knows sooner comes from events."""
    kubelet = running(FROM_THE_CRI)
    manifest = pod("ends", busybox)
    manifest["spec"]["containers"][0]["command"] = ["sh", "-c", "sleep 3; exit 7"]
    manifest["spec"]["restartPolicy"] = "Never"

    kubelet.write(manifest)

    def exit_code() -> int | None:
        found = kubelet.pod("ends")
        statuses = found["status"].get("containerStatuses", []) if found else []
        return statuses[0]["state"].get("terminated", {}).get("exitCode") if statuses else None

    wait(kubelet, lambda: exit_code() == 7, "kubelet knows the exit code", 45)
    assert "Fall back to Generic PLEG" not in kubelet.log.read_text(errors="replace")
    counts = {each.split(" ")[0]: float(each.split(" ")[1]) for each in _plain(kubelet.text("/metrics"))}
    assert counts.get("kubelet_evented_pleg_connection_success_count", 0) >= 1
    assert counts.get("kubelet_evented_pleg_connection_error_count", 0) == 0


def _plain(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#") and "{" not in line]
