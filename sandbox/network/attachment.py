"""What a pod asks of its networks and gets from them, and how both are said in CNI's words; pure values.

Sources: CNI's CONVENTIONS.md (capabilities, CNI_ARGS) and specification 1.1, section 5 "ADD Success".
"""

import ipaddress
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from oci.container_spec import SandboxId
from oci.errors import Error
from sandbox.spec import DnsConfig, PortMapping

from . import bandwidth
from .cni import AttachmentParameters
from .conflist import JsonObject


@dataclass(frozen=True, slots=True)
class Attachment:
    """One network of one pod.

    The network's configuration is kept with it, because DEL must see what ADD saw whatever the directory holds by then.
    """

    network: str
    ifname: str
    conflist: str  # JSON
    result: str | None = None  # JSON; None until ADD has succeeded


@dataclass(frozen=True, slots=True)
class PodNetworkRequest:
    """The pod, as its networks need to know it; the same for ADD, CHECK and DEL but for a netns that has gone."""

    sandbox_id: SandboxId
    name: str
    namespace: str
    uid: str
    netns: str  # a path; "" when it is gone
    port_mappings: tuple[PortMapping, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)
    dns: DnsConfig | None = None
    cgroup_parent: str = ""


@dataclass(frozen=True, slots=True)
class PodNetworkResult:
    ips: tuple[str, ...]  # without a prefix; the first is the pod's primary one
    attachments: tuple[Attachment, ...]  # with their results
    mac: str = ""  # of the first attachment's interface
    dns: DnsConfig | None = None  # what the networks say; None when they say nothing


def parameters(request: PodNetworkRequest, ifname: str) -> AttachmentParameters:
    """The request in CNI's words. Raises InvalidArgument for an annotation that is wrong."""
    return AttachmentParameters(
        container_id=request.sandbox_id,
        netns=request.netns,
        ifname=ifname,
        args=_cni_args(request),
        owner=f"pod {request.namespace}/{request.name} (sandbox {request.sandbox_id[:13]})",
        capability_args=_capability_args(request),
    )


def mapped_ports(request: PodNetworkRequest) -> tuple[PortMapping, ...]:
    return tuple(mapping for mapping in request.port_mappings if mapping.host_port > 0)


def _cni_args(request: PodNetworkRequest) -> str:
    """The names are those of kubelet's former CNI driver; with IgnoreUnknown, plugins that do not know them go on."""
    return ";".join(
        (
            "IgnoreUnknown=1",
            f"K8S_POD_NAMESPACE={request.namespace}",
            f"K8S_POD_NAME={request.name}",
            f"K8S_POD_INFRA_CONTAINER_ID={request.sandbox_id}",
            f"K8S_POD_UID={request.uid}",
        )
    )


def _capability_args(request: PodNetworkRequest) -> dict[str, Any]:
    """All that the pod can give; each plugin gets what its `capabilities` ask for."""
    given: dict[str, Any] = {
        "portMappings": [_port_mapping(mapping) for mapping in mapped_ports(request)],
        "bandwidth": bandwidth.capability(request.annotations),
        "dns": request.dns and _dns(request.dns),
        "cgroupPath": request.cgroup_parent,
        "io.kubernetes.cri.pod-annotations": dict(request.annotations),
    }
    return {key: value for key, value in given.items() if value}


def _port_mapping(mapping: PortMapping) -> dict[str, Any]:
    entry = {
        "hostPort": mapping.host_port,
        "containerPort": mapping.container_port,
        "protocol": str(mapping.protocol),
    }
    return {**entry, "hostIP": mapping.host_ip} if mapping.host_ip else entry


def _dns(dns: DnsConfig) -> dict[str, list[str]]:
    given = {"servers": dns.servers, "searches": dns.searches, "options": dns.options}
    return {key: list(value) for key, value in given.items() if value}


def pod_result(attachments: tuple[Attachment, ...]) -> PodNetworkResult:
    """What the results of all attachments mean for the pod.

    Raises Error when a result is not of CNI's shape, or when the first network gave the pod no address.
    """
    results = [_Result(attachment) for attachment in attachments]
    ips = tuple(dict.fromkeys(ip for result in results for ip in result.ips()))
    if results and not next(results[0].ips(), None):
        raise Error(f'network "{attachments[0].network}" answered no IP address for {attachments[0].ifname}')
    dns = next((said for result in results if (said := result.dns())), None)
    return PodNetworkResult(ips, attachments, mac=results[0].mac() if results else "", dns=dns)


class _Result:
    """Reads one attachment's ADD result."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._result: JsonObject = json.loads(attachment.result or "{}")
        self._interfaces = self._objects("interfaces")

    def ips(self) -> Iterator[str]:
        """The pod's own addresses, in the plugin's order; those of the node's side of the link are left out."""
        for entry in self._objects("ips"):
            index = entry.get("interface")
            if isinstance(index, int) and 0 <= index < len(self._interfaces) and not self._is_in_pod(index):
                continue
            try:
                yield str(ipaddress.ip_interface(entry.get("address")).ip)  # type: ignore[arg-type]
            except ValueError as error:
                raise self._wrong(f"the IP address {entry.get('address')!r}") from error

    def mac(self) -> str:
        for index, interface in enumerate(self._interfaces):
            if self._is_in_pod(index) and interface.get("name") == self._attachment.ifname:
                return str(interface.get("mac", ""))
        return ""

    def dns(self) -> DnsConfig | None:
        said = self._result.get("dns") or {}
        if not isinstance(said, dict):
            raise self._wrong(f"dns {said!r}")
        lists = [tuple(map(str, said.get(key) or ())) for key in ("nameservers", "search", "options")]
        return DnsConfig(*lists) if any(lists) else None

    def _is_in_pod(self, index: int) -> bool:
        return bool(self._interfaces[index].get("sandbox"))

    def _objects(self, key: str) -> list[JsonObject]:
        value = self._result.get(key) or []
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self._wrong(f"{key} {value!r}")
        return value

    def _wrong(self, what: str) -> Error:
        return Error(f'the result of network "{self._attachment.network}" has {what}, which CNI does not allow')
