"""Which namespaces a pod gets, and which sysctls it may set in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from oci.container_spec import IdMapping, NamespaceMode, UserNamespace
from oci.errors import FailedPrecondition, InvalidArgument
from sandbox.namespaces import normal_sysctls, pinned, require_possible, wanted
from sandbox.spec import SandboxSecurity, SandboxSpec


def spec(sysctls: Any = None, **modes: Any) -> SandboxSpec:
    return SandboxSpec("pod", "uid", "ns", sysctls=sysctls or {}, security=SandboxSecurity(**modes))


NODE = NamespaceMode.NODE


@pytest.mark.parametrize(
    ("modes", "kinds"),
    [
        ({}, ("net", "uts", "ipc", "pid")),
        ({"pid": NamespaceMode.CONTAINER}, ("net", "uts", "ipc")),
        ({"network": NODE}, ("ipc", "pid")),
        ({"network": NODE, "ipc": NODE, "pid": NODE}, ()),
    ],
)
def test_a_pod_gets_the_namespaces_that_it_does_not_share_with_the_node(
    modes: Mapping[str, NamespaceMode], kinds: tuple[str, ...]
) -> None:
    assert wanted(spec(**modes)) == kinds


def test_the_pins_are_named_like_the_namespaces() -> None:
    found = pinned(spec(pid=NamespaceMode.CONTAINER), Path("/run/ns"))

    assert (found.net, found.ipc, found.uts, found.pid, found.user) == (
        "/run/ns/net",
        "/run/ns/ipc",
        "/run/ns/uts",
        "",
        "",
    )


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("net.ipv4.ip_forward", "net.ipv4.ip_forward"),
        ("net/ipv4/conf/eth0.1/forwarding", "net.ipv4.conf.eth0/1.forwarding"),
        ("kernel.shm_rmid_forced", "kernel.shm_rmid_forced"),
        ("fs.mqueue.msg_max", "fs.mqueue.msg_max"),
    ],
)
def test_namespaced_sysctls_are_taken_with_either_separator(given: str, normal: str) -> None:
    assert normal_sysctls(spec({given: " 1 "})) == {normal: "1"}


@pytest.mark.parametrize("name", ["vm.swappiness", "kernel.panic", "fs.file-max", ""])
def test_a_sysctl_of_the_whole_node_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="it would change the node"):
        normal_sysctls(spec({name: "1"}))


@pytest.mark.parametrize(
    ("name", "modes"), [("net.core.somaxconn", {"network": NODE}), ("kernel.msgmax", {"ipc": NODE})]
)
def test_a_sysctl_of_a_namespace_that_is_the_nodes_is_refused(name: str, modes: Mapping[str, NamespaceMode]) -> None:
    with pytest.raises(InvalidArgument, match="namespace of the pod's own"):
        normal_sysctls(spec({name: "1"}, **modes))


def test_an_oci_runtime_that_makes_the_sandbox_needs_the_network_only() -> None:
    assert wanted(spec(), runtime_sandbox=True) == ("net",)
    assert wanted(spec(network=NODE), runtime_sandbox=True) == ()
    assert pinned(spec(), Path("/run/ns"), runtime_sandbox=True).ipc == ""


def test_what_such_a_sandbox_cannot_be_is_refused() -> None:
    require_possible(spec({"net.core.somaxconn": "1024"}), "gvisor")

    with pytest.raises(FailedPrecondition, match=r"'gvisor'.*kernel\.sem"):
        require_possible(spec({"kernel/sem": "1"}), "gvisor")
    mapped = UserNamespace(uids=(IdMapping(0, 1 << 20, 65536),), gids=(IdMapping(0, 1 << 20, 65536),))
    with pytest.raises(FailedPrecondition, match="user namespaces"):
        require_possible(spec(user_namespace=mapped), "gvisor")
