"""A daemon with a collector: each request's trace tells what its time was spent on."""

import re
from collections.abc import Iterator
from functools import partial

import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness import kubelet as kubelet_module
from tests.e2e.harness.client import Client
from tests.e2e.harness.daemon import Daemon
from tests.e2e.harness.images import Entry, layer
from tests.e2e.harness.images import image as image_of
from tests.e2e.harness.kubelet import running_kubelet
from tests.e2e.harness.ports import wait_until
from tests.e2e.harness.registry import Registry
from tests.fakes.collector import Collector, Taken

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = (("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01"),)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def shared_daemon(make_daemon: MakeDaemon, collector: Collector) -> Daemon:
    return make_daemon({"tracing": {"endpoint": collector.endpoint, "sampling_rate_per_million": 0}})


@pytest.fixture(autouse=True)
def empty(collector: Collector) -> None:
    collector.spans.clear()


def steps(collector: Collector, method: str) -> list[Taken]:
    """All steps of the one traced call of `method`, once they are there."""
    wait_until(lambda: any(span.name.endswith(f"/{method}") for span in collector.spans), f"the span of {method}", 10)
    request = collector.of(method)
    assert request.trace_id == TRACE
    return collector.below(request)


def names(collector: Collector, method: str) -> set[str]:
    return {step.name for step in steps(collector, method)}


def test_a_pod_s_life_is_told_step_by_step(client: Client, collector: Collector, busybox: str) -> None:
    config = client.pod_config("web")
    runtime = client.runtime
    pod_id = runtime.RunPodSandbox(pb.RunPodSandboxRequest(config=config), metadata=CALLER).pod_sandbox_id
    client.ids.add(pod_id)
    container = client.container_config(busybox, ["sleep", "600"])
    create = pb.CreateContainerRequest(pod_sandbox_id=pod_id, config=container, sandbox_config=config)
    id = runtime.CreateContainer(create, metadata=CALLER).container_id
    client.ids.add(id)
    runtime.StartContainer(pb.StartContainerRequest(container_id=id), metadata=CALLER)
    runtime.ExecSync(pb.ExecSyncRequest(container_id=id, cmd=["true"]), metadata=CALLER)
    runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod_id), metadata=CALLER)
    runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod_id), metadata=CALLER)

    assert names(collector, "RunPodSandbox") >= {"change", "fork server: make_pod", "CNI ADD", "write record"}
    attached = [step.attributes["cni.plugin"] for step in steps(collector, "RunPodSandbox") if step.name == "CNI ADD"]
    assert attached == ["bridge", "portmap"]
    assert names(collector, "CreateContainer") >= {"mount root filesystem", "fork server: monitor", "monitor: create"}
    assert "monitor: start" in names(collector, "StartContainer")
    assert "monitor: exec" in names(collector, "ExecSync")
    assert names(collector, "StopPodSandbox") >= {"wait for the container's end", "CNI DEL"}
    assert names(collector, "RemovePodSandbox") >= {"remove writable layer", "delete record"}
    created = collector.of("CreateContainer").attributes
    assert created["k8s.pod.name"] == "web" and created["k8s.container.name"] == "main"
    assert (created["crito.pod_sandbox.id"], created["container.id"]) == (pod_id, id)


def test_a_pull_is_told_layer_by_layer(client: Client, collector: Collector, image_registry: Registry) -> None:
    blob, diff_id = layer([Entry("told", b"layer by layer")])
    content = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff_id]}}
    image = image_registry.push(image_of(content, (blob,)), "test/traced", "1")

    client.images.PullImage(pb.PullImageRequest(image=pb.ImageSpec(image=image)), metadata=CALLER)

    told = steps(collector, "PullImage")
    assert {step.name for step in told} >= {"pull", "image worker: resolve"}
    (of_layer,) = [step for step in told if step.name == "layer"]
    assert of_layer.attributes == {"crito.layer": blob.digest, "crito.bytes": len(blob.data)}
    assert {step.name for step in collector.below(of_layer)} >= {
        "wait for a turn",
        "image worker: layer",
        "commit layer",
    }
    client.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=image)))


def test_a_failure_is_told_where_it_happened(client: Client, collector: Collector) -> None:
    config = client.pod_config("broken", linux=pb.LinuxPodSandboxConfig(sysctls={"kernel.shm_rmid_forced": "what"}))

    with pytest.raises(Exception, match="shm_rmid_forced"):
        client.runtime.RunPodSandbox(pb.RunPodSandboxRequest(config=config), metadata=CALLER)

    failed = [step.name for step in steps(collector, "RunPodSandbox") if step.error]
    assert "fork server: make_pod" in failed and "change" in failed
    assert "shm_rmid_forced" in (collector.of("RunPodSandbox").error or "")


def test_log_lines_of_a_traced_request_name_its_trace(client: Client, daemon: Daemon) -> None:
    with pytest.raises(Exception, match="no-such-pod"):
        client.runtime.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id="no-such-pod"), metadata=CALLER)

    lines = [line for line in daemon.log.read_text().splitlines() if "no-such-pod" in line]
    assert re.search(rf"method=PodSandboxStatus trace_id={TRACE} ", lines[-1])


def test_a_daemon_whose_collector_has_gone_serves_and_ends_as_ever(make_daemon: MakeDaemon, busybox: str) -> None:
    with Collector() as collector:
        daemon = make_daemon({"tracing": {"endpoint": collector.endpoint}})
        wait_until(lambda: bool(collector.spans), "spans of every request", 10)

    client = daemon.client()
    pod = client.run_pod("alone")
    client.run(pod, busybox, ["true"])
    client.remove_pod(pod.id)

    assert daemon.stop(timeout_s=10) == 0
    assert "Traceback" not in daemon.log.read_text()


@pytest.mark.skipif(not kubelet_module.PROGRAM, reason="kubelet is not installed")
def test_kubelet_s_trace_of_a_pod_goes_on_in_ours(make_daemon: MakeDaemon, busybox: str) -> None:
    main = {"name": "main", "image": busybox, "command": ["sleep", "600"], "imagePullPolicy": "IfNotPresent"}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "traced", "namespace": "default"},
        "spec": {"containers": [main], "terminationGracePeriodSeconds": 0},
    }
    with Collector() as collector:
        daemon = make_daemon({"tracing": {"endpoint": collector.endpoint, "sampling_rate_per_million": 0}})
        of_kubelet = {"endpoint": collector.endpoint.removeprefix("http://"), "samplingRatePerMillion": 1_000_000}
        with running_kubelet(daemon, settings={"tracing": of_kubelet}) as kubelet:
            kubelet.write(pod)
            wait_until(lambda: kubelet.condition("traced", "Ready"), "the pod is ready", 60)
            for method in ("RunPodSandbox", "CreateContainer", "StartContainer"):
                wait_until(partial(_is_of_kubelet, collector, method), f"kubelet's span of {method}", 30)


def _is_of_kubelet(collector: Collector, method: str) -> bool:
    """Whether our span of the call lies in kubelet's, which kubelet sends some seconds later."""
    parents = {span.parent_id for span in collector.spans if _is_ours(span, method)}
    return [span.resource["service.name"] for span in collector.spans if span.id in parents] == ["kubelet"]


def _is_ours(span: Taken, method: str) -> bool:
    return span.name.endswith(f"/{method}") and span.resource["service.name"] == "crito"
