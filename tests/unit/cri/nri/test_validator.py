"""What the built-in validator refuses."""

import pytest

from cri.api.nri.v1alpha1 import api_pb2 as nri
from cri.nri import validator
from cri.nri.validator import Rules
from oci.errors import PermissionDenied

STRICT = Rules(
    oci_hooks=True,
    runtime_default_seccomp=True,
    unconfined_seccomp=True,
    custom_seccomp=True,
    namespaces=True,
    sysctls=True,
)
PROFILES = nri.SecurityProfile


def request(
    simple: str = "",
    compound: tuple[str, str] | None = None,
    profile: "PROFILES.ProfileType.ValueType" = PROFILES.UNCONFINED,
    annotations: dict[str, str] | None = None,
    plugins: tuple[tuple[str, str], ...] = (),
) -> nri.ValidateContainerAdjustmentRequest:
    message = nri.ValidateContainerAdjustmentRequest(
        pod=nri.PodSandbox(annotations=annotations or {}),
        container=nri.Container(id="c1", name="web"),
        plugins=[nri.PluginInstance(index=index, name=name) for index, name in plugins],
    )
    message.container.linux.seccomp_profile.profile_type = profile
    owners = message.owners.owners["c1"]
    if simple:
        owners.simple[nri.Field.Value(simple)] = "10-bad"
    if compound:
        owners.compound[nri.Field.Value(compound[0])].owners[compound[1]] = "10-bad"
    return message


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (request("OciHooks"), "hooks"),
        (request("SeccompPolicy", profile=PROFILES.UNCONFINED), "UNCONFINED"),
        (request("SeccompPolicy", profile=PROFILES.RUNTIME_DEFAULT), "RUNTIME_DEFAULT"),
        (request("SeccompPolicy", profile=PROFILES.LOCALHOST), "LOCALHOST"),
        (request(compound=("Namespace", "ipc")), "namespace ipc"),
        (request(compound=("Sysctl", "net.a")), r"sysctl net\.a"),
    ],
)
def test_what_is_forbidden_is_refused_with_the_plugin_s_name(
    wrong: nri.ValidateContainerAdjustmentRequest, text: str
) -> None:
    with pytest.raises(PermissionDenied, match=text) as raised:
        validator.check(STRICT, wrong)
    assert "10-bad" in str(raised.value)

    validator.check(Rules(), wrong)


def test_what_no_rule_speaks_of_passes() -> None:
    validator.check(STRICT, request("Args"))


def test_a_required_plugin_may_be_named_with_its_index_or_without() -> None:
    there = request(plugins=(("10", "policy"),))

    validator.check(Rules(required_plugins=("policy",)), there)
    validator.check(Rules(required_plugins=("10-policy",)), there)
    with pytest.raises(PermissionDenied, match="20-policy"):
        validator.check(Rules(required_plugins=("20-policy",)), there)


@pytest.mark.parametrize("value", ['["a", "b"]', "[a, b]", "- a\n- b"])
def test_a_pod_may_require_plugins_of_its_own(value: str) -> None:
    annotated = {f"{validator.REQUIRED_PLUGINS}/container.web": value}

    with pytest.raises(PermissionDenied, match=r"there: b$"):
        validator.check(Rules(), request(annotations=annotated, plugins=(("10", "a"),)))


def test_a_pod_may_do_without_where_the_configuration_lets_it() -> None:
    rules = Rules(required_plugins=("policy",), tolerate_missing_annotation="tolerate.example.org")

    validator.check(rules, request(annotations={"tolerate.example.org": "true"}))
    with pytest.raises(PermissionDenied):
        validator.check(rules, request(annotations={"tolerate.example.org/container.web": "false"}))
