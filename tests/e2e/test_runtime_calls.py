"""What the runtime tells of itself: version, readiness, handlers, features, configuration."""

import json

from cri.api.runtime.v1 import api_pb2 as pb
from oci.version import VERSION
from tests.e2e.harness.client import Client
from tests.e2e.harness.daemon import Daemon


def test_the_version_is_that_of_the_api_and_of_crito(client: Client) -> None:
    answer = client.runtime.Version(pb.VersionRequest(version="0.1.0"), timeout=10)

    assert (answer.version, answer.runtime_api_version) == ("0.1.0", "v1")
    assert (answer.runtime_name, answer.runtime_version) == ("crito", VERSION)


def test_the_status_has_conditions_handlers_and_features(client: Client, daemon: Daemon) -> None:
    answer = client.runtime.Status(pb.StatusRequest(verbose=True), timeout=10)

    assert {each.type: each.status for each in answer.status.conditions} == {"RuntimeReady": True, "NetworkReady": True}
    assert all(each.HasField("features") for each in answer.runtime_handlers)
    handlers = {each.name: each.features for each in answer.runtime_handlers}
    assert "" in handlers, "the default one"
    assert handlers[""] in [features for name, features in handlers.items() if name]
    assert answer.features.supplemental_groups_policy
    assert answer.features.mount_options
    assert answer.features.user_namespaces_host_network
    assert json.loads(answer.info["config"])
    assert not client.runtime.Status(pb.StatusRequest(), timeout=10).info


def test_the_cgroup_driver_is_told(client: Client, daemon: Daemon) -> None:
    driver = client.runtime.RuntimeConfig(pb.RuntimeConfigRequest(), timeout=10).linux.cgroup_driver

    assert driver == (pb.SYSTEMD if daemon.owned.cgroup_parent.endswith(".slice") else pb.CGROUPFS)


def test_a_pod_cidr_is_taken(client: Client) -> None:
    network = pb.NetworkConfig(pod_cidr="192.0.2.0/24")
    request = pb.UpdateRuntimeConfigRequest(runtime_config=pb.RuntimeConfig(network_config=network))

    client.runtime.UpdateRuntimeConfig(request, timeout=10)


def test_the_verbose_status_tells_where_things_are(client: Client, busybox: str) -> None:
    pod = client.run_pod("verbose")
    container_id = client.run(pod, busybox, ["sleep", "100000"])
    calls = (
        (client.runtime.PodSandboxStatus, pb.PodSandboxStatusRequest(pod_sandbox_id=pod.id, verbose=True)),
        (client.runtime.ContainerStatus, pb.ContainerStatusRequest(container_id=container_id, verbose=True)),
    )

    infos = [json.loads(call(request, timeout=10).info["info"]) for call, request in calls]

    assert infos[0]["cgroupParent"] == pod.config.linux.cgroup_parent
    assert infos[1]["sandboxID"] == pod.id
    assert infos[1]["runtimeSpec"]["process"]["args"] == ["sleep", "100000"]
