"""A standalone kubelet on the daemon: static pods come up, follow their manifests, restart and go."""

import json
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.harness import kubelet as kubelet_module
from tests.e2e.harness.daemon import Daemon
from tests.e2e.harness.kubelet import Kubelet, running_kubelet, text_of_log
from tests.e2e.harness.ports import wait_until

MakeDaemon = Callable[..., Daemon]


@pytest.fixture(scope="module")
def kubelet(make_daemon: MakeDaemon) -> Iterator[Kubelet]:
    """kubelet ends every pod that it does not know, so that it has a daemon of its own."""
    if not kubelet_module.PROGRAM:
        pytest.skip("kubelet is not installed")
    with running_kubelet(make_daemon()) as running:
        yield running


@pytest.fixture
def clean(kubelet: Kubelet) -> Iterator[Kubelet]:
    """All pods of the test are gone when it ends."""
    yield kubelet
    for manifest in kubelet.manifests.iterdir():
        manifest.unlink()
    client = kubelet.daemon.client()
    wait_until(lambda: not client.containers(), "kubelet has ended all containers", 90)
    client.close()


def manifest(name: str, *containers: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"containers": list(containers), "terminationGracePeriodSeconds": 1, **spec},
    }


def container(name: str, image: str, script: str, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "image": image,
        "command": ["sh", "-c", script],
        "imagePullPolicy": "IfNotPresent",
        **fields,
    }


def full_pod(name: str, image: str, greeting: str = "first") -> dict[str, Any]:
    """Init container, two containers, exec and HTTP probes, emptyDir, memory limit and postStart hook."""
    work = {"name": "work", "mountPath": "/work"}
    serve = container(
        "serve",
        image,
        "exec httpd -f -p 8080 -h /work",
        volumeMounts=[work],
        readinessProbe={"httpGet": {"path": "/index.html", "port": 8080}, "periodSeconds": 1},
        resources={"limits": {"memory": "64Mi"}, "requests": {"memory": "32Mi", "cpu": "50m"}},
        lifecycle={"postStart": {"exec": {"command": ["sh", "-c", "echo started > /work/hook"]}}},
    )
    watch = container(
        "watch",
        image,
        "trap 'exit 0' TERM; while :; do sleep 0.2; done",
        volumeMounts=[work],
        readinessProbe={"exec": {"command": ["grep", "-q", "started", "/work/hook"]}, "periodSeconds": 1},
        livenessProbe={"exec": {"command": ["true"]}, "periodSeconds": 1},
    )
    init = container("prepare", image, f"echo {greeting} > /work/index.html", volumeMounts=[work])
    return manifest(name, serve, watch, initContainers=[init], volumes=[{"name": "work", "emptyDir": {}}])


def is_ready(kubelet: Kubelet, name: str) -> Callable[[], bool]:
    return lambda: kubelet.condition(name, "Ready")


def wait(kubelet: Kubelet, condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    try:
        wait_until(condition, what, timeout_s)
    except TimeoutError as error:
        pods = json.dumps([pod["status"] for pod in kubelet.pods()], indent=1)
        raise AssertionError(f"{error}\n{pods}\nkubelet:\n{text_of_log(kubelet)}") from None


def test_a_full_pod_becomes_ready_follows_its_manifest_and_goes(clean: Kubelet, busybox: str) -> None:
    clean.write(full_pod("full", busybox))
    wait(clean, is_ready(clean, "full"), "the pod is ready")

    pod = clean.pod("full")
    assert pod is not None
    assert page(pod) == "first\n"
    states = {each["name"]: each for each in pod["status"]["containerStatuses"]}
    assert set(states) == {"serve", "watch"}
    assert all("running" in each["state"] and each["restartCount"] == 0 for each in states.values())
    assert pod["status"]["initContainerStatuses"][0]["state"]["terminated"]["reason"] == "Completed"

    clean.write(full_pod("full", busybox, "second"))
    wait(clean, lambda: serves(clean, "full", "second\n"), "the edited manifest is followed", 90)

    clean.remove("full")
    client = clean.daemon.client()
    wait(clean, lambda: not client.containers() and clean.pod("full") is None, "the pod is gone", 90)
    assert not [each for each in client.pods() if each.state == 0]


def page(pod: dict[str, Any]) -> str:
    with urllib.request.urlopen(f"http://{pod['status']['podIP']}:8080/index.html", timeout=5) as answer:
        text: str = answer.read().decode()
        return text


def serves(kubelet: Kubelet, name: str, text: str) -> bool:
    pod = kubelet.pod(name)
    if pod is None or not kubelet.condition(name, "Ready"):
        return False
    try:
        return page(pod) == text
    except OSError:
        return False


def test_a_container_that_fails_is_started_again_with_back_off(clean: Kubelet, busybox: str) -> None:
    clean.write(manifest("fails", container("main", busybox, "echo trying; sleep 0.2; exit 3")))

    def main() -> dict[str, Any]:
        pod = clean.pod("fails")
        statuses: list[dict[str, Any]] = pod["status"].get("containerStatuses", []) if pod else []
        return statuses[0] if statuses else {"restartCount": 0, "state": {}, "lastState": {}}

    wait(clean, lambda: main()["restartCount"] >= 2, "the container was started again twice", 90)
    wait(clean, lambda: main()["state"].get("waiting", {}).get("reason") == "CrashLoopBackOff", "there is back-off", 60)
    last = main()["lastState"]["terminated"]
    assert (last["exitCode"], last["reason"]) == (3, "Error")


def test_a_liveness_probe_that_fails_restarts_the_container(clean: Kubelet, busybox: str) -> None:
    probe = {"exec": {"command": ["test", "-e", "/tmp/alive"]}, "periodSeconds": 1, "failureThreshold": 1}
    script = "[ -e /keep/seen ] && touch /tmp/alive; touch /keep/seen; trap 'exit 0' TERM; while :; do sleep 0.2; done"
    keep = {"name": "keep", "mountPath": "/keep"}
    clean.write(
        manifest(
            "probed",
            container("main", busybox, script, livenessProbe=probe, volumeMounts=[keep]),
            volumes=[{"name": "keep", "emptyDir": {}}],
        )
    )

    def restarts() -> int:
        pod = clean.pod("probed")
        return pod["status"]["containerStatuses"][0]["restartCount"] if pod and is_ready(clean, "probed")() else 0

    wait(clean, lambda: restarts() == 1, "the container runs again after one restart", 60)


def test_a_pod_stays_as_it_is_while_the_daemon_is_killed_and_started_again(clean: Kubelet, busybox: str) -> None:
    clean.write(full_pod("stays", busybox))
    wait(clean, is_ready(clean, "stays"), "the pod is ready")
    before = clean.pod("stays")
    assert before is not None

    clean.daemon.kill()
    clean.daemon.start()

    wait(clean, is_ready(clean, "stays"), "the pod is ready again")
    after = clean.pod("stays")
    assert after is not None
    assert [each["containerID"] for each in after["status"]["containerStatuses"]] == [
        each["containerID"] for each in before["status"]["containerStatuses"]
    ]
    assert page(after) == "first\n"


def test_kubelet_s_summary_tells_what_pods_use(clean: Kubelet, busybox: str) -> None:
    clean.write(manifest("used", container("main", busybox, "while :; do sleep 0.2; done")))
    wait(clean, is_ready(clean, "used"), "the pod is ready")

    def memory_is_told() -> bool:
        pods = [each for each in clean.stats()["pods"] if each["podRef"]["name"] == "used-e2e"]
        containers = pods[0].get("containers", []) if pods else []
        return bool(containers) and containers[0].get("memory", {}).get("workingSetBytes", 0) > 0

    wait(clean, memory_is_told, "memory of the container is in the summary", 60)
