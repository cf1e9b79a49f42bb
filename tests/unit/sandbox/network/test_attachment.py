import json
from typing import Any

import pytest

from oci.container_spec import SandboxId
from oci.errors import Error, InvalidArgument
from sandbox.network.attachment import Attachment, PodNetworkRequest, parameters, pod_result
from sandbox.spec import DnsConfig, PortMapping, Protocol

ID = SandboxId("a" * 64)


def attached(result: Any, network: str = "pods", ifname: str = "eth0") -> Attachment:
    return Attachment(network, ifname, "{}", json.dumps(result))


def test_the_plugins_learn_which_pod_it_is() -> None:
    given = parameters(PodNetworkRequest(ID, "web", "shop", "u-1", "/run/netns/x"), "eth0")

    assert given.environment == {
        "CNI_CONTAINERID": ID,
        "CNI_NETNS": "/run/netns/x",
        "CNI_IFNAME": "eth0",
        "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;"
        f"K8S_POD_INFRA_CONTAINER_ID={ID};K8S_POD_UID=u-1",
    }
    assert given.capability_args == {}


def test_capabilities_are_said_by_cnis_conventions() -> None:
    request = PodNetworkRequest(
        ID,
        "web",
        "shop",
        "u-1",
        "/run/netns/x",
        port_mappings=(
            PortMapping(Protocol.TCP, 80, 8080),
            PortMapping(Protocol.UDP, 53, 5353, "127.0.0.1"),
            PortMapping(Protocol.TCP, 443, 0),
        ),
        annotations={"kubernetes.io/ingress-bandwidth": "1M"},
        dns=DnsConfig(("10.0.0.10",), ("svc.local",), ()),
        cgroup_parent="/kubepods/pod1",
    )

    assert parameters(request, "eth0").capability_args == {
        "portMappings": [
            {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
            {"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"},
        ],
        "bandwidth": {"ingressRate": 1_000_000, "ingressBurst": 1_000_000},
        "dns": {"servers": ["10.0.0.10"], "searches": ["svc.local"]},
        "cgroupPath": "/kubepods/pod1",
        "io.kubernetes.cri.pod-annotations": {"kubernetes.io/ingress-bandwidth": "1M"},
    }


def test_a_wrong_bandwidth_annotation_is_refused() -> None:
    request = PodNetworkRequest(ID, "web", "shop", "u", "", annotations={"kubernetes.io/egress-bandwidth": "lots"})

    with pytest.raises(InvalidArgument, match="egress-bandwidth"):
        parameters(request, "eth0")


def test_the_pods_addresses_are_those_inside_of_it_in_the_plugins_order() -> None:
    result = pod_result(
        (
            attached(
                {
                    "interfaces": [
                        {"name": "br0", "mac": "0a:00:00:00:00:01"},
                        {"name": "eth0", "mac": "0a:00:00:00:00:02", "sandbox": "/run/netns/x"},
                    ],
                    "ips": [
                        {"address": "10.1.0.1/16", "interface": 0},
                        {"address": "fd00::5/64", "interface": 1},
                        {"address": "10.1.0.5/16", "interface": 1},
                        {"address": "10.1.0.6/16"},
                    ],
                    "dns": {"nameservers": ["10.0.0.10"], "domain": "local", "search": ["svc"], "options": ["ndots:5"]},
                }
            ),
            attached({"ips": [{"address": "192.168.7.9/24"}]}, "storage", "eth1"),
        )
    )

    assert result.ips == ("fd00::5", "10.1.0.5", "10.1.0.6", "192.168.7.9")
    assert result.mac == "0a:00:00:00:00:02"
    assert result.dns == DnsConfig(("10.0.0.10",), ("svc",), ("ndots:5",))
    assert [attachment.network for attachment in result.attachments] == ["pods", "storage"]


def test_a_second_network_may_give_no_address() -> None:
    result = pod_result((attached({"ips": [{"address": "10.1.0.5/16"}]}), attached({}, "layer2", "eth1")))

    assert result.ips == ("10.1.0.5",)
    assert result.dns is None


def test_a_first_network_without_an_address_is_an_error() -> None:
    with pytest.raises(Error, match='network "pods" answered no IP address for eth0'):
        pod_result((attached({"ips": []}),))


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ({"ips": [{"address": "ten"}]}, "the IP address 'ten'"),
        ({"ips": [{}]}, "the IP address None"),
        ({"ips": "10.1.0.5"}, "ips '10.1.0.5'"),
        ({"ips": [{"address": "10.1.0.5/16"}], "interfaces": ["eth0"]}, "interfaces"),
        ({"ips": [{"address": "10.1.0.5/16"}], "dns": ["10.0.0.10"]}, "dns"),
    ],
)
def test_a_result_of_another_shape_is_an_error_that_names_the_network(result: Any, text: str) -> None:
    with pytest.raises(Error, match='network "pods"') as error:
        pod_result((attached(result),))

    assert text in str(error.value)
