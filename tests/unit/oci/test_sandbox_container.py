from pathlib import Path

from oci.container_spec import SandboxId
from oci.sandbox_container import SandboxContainer, sandbox_config

WANTED = SandboxContainer(
    id=SandboxId("s1"),
    directory=Path("/run/s1"),
    handler="gvisor",
    name="pod",
    namespace="default",
    uid="u",
    hostname="host",
    net_ns="/ns/net",
    cgroup_parent="/kubepods/pod1",
    annotations={},
)


def test_the_sandbox_is_a_pause_in_the_pods_network() -> None:
    config = sandbox_config(WANTED, "/kubepods/pod1/crito-s1", {"dev.gvisor.x": "1"})

    assert config["process"]["args"] == ["/pause"]
    assert config["hostname"] == "host"
    assert {"type": "network", "path": "/ns/net"} in config["linux"]["namespaces"]
    assert {"type": "pid"} in config["linux"]["namespaces"]
    assert config["linux"]["cgroupsPath"] == "/kubepods/pod1/crito-s1"


def test_its_annotations_say_that_it_is_the_sandbox_whatever_the_pod_says() -> None:
    given = {"dev.gvisor.x": "1", "io.kubernetes.cri.container-type": "container"}

    annotations = sandbox_config(WANTED, "/c", given)["annotations"]

    assert annotations["io.kubernetes.cri.container-type"] == "sandbox"
    assert annotations["io.kubernetes.cri-o.ContainerType"] == "sandbox"
    assert annotations["io.kubernetes.cri.sandbox-id"] == "s1"
    assert annotations["io.kubernetes.cri.sandbox-name"] == "pod"
    assert annotations["dev.gvisor.x"] == "1"
