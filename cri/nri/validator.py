"""The built-in validator: refuses containers whose adjustments the configuration forbids."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from cri.api.nri.v1alpha1 import api_pb2 as nri
from oci.errors import PermissionDenied

REQUIRED_PLUGINS = "required-plugins.noderesource.dev"  # the pod's own list, beside the configured one
_F = nri.Field.Value


@dataclass(frozen=True, slots=True)
class Rules:
    """What is refused; the keys of the configuration that begin with validator_."""

    oci_hooks: bool = False
    runtime_default_seccomp: bool = False
    unconfined_seccomp: bool = False
    custom_seccomp: bool = False
    namespaces: bool = False
    sysctls: bool = False
    required_plugins: tuple[str, ...] = ()
    tolerate_missing_annotation: str = ""


def check(rules: Rules, request: nri.ValidateContainerAdjustmentRequest) -> None:
    """Raises PermissionDenied with the plugin and what it tried."""
    owners = request.owners.owners[request.container.id]
    if rules.oci_hooks and (plugins := owners.simple.get(_F("OciHooks"))):
        raise PermissionDenied(f"NRI: OCI hooks were added by {plugins}, which the configuration forbids")
    _check_seccomp(rules, request, owners.simple.get(_F("SeccompPolicy"), ""))
    for forbidden, field in ((rules.namespaces, "Namespace"), (rules.sysctls, "Sysctl")):
        entries = owners.compound[_F(field)].owners
        if forbidden and entries:
            changed = ", ".join(f"{key} (by {plugin})" for key, plugin in sorted(entries.items()))
            raise PermissionDenied(f"NRI: {field.lower()} {changed} was changed, which the configuration forbids")
    _check_required(rules, request)


def _check_seccomp(rules: Rules, request: nri.ValidateContainerAdjustmentRequest, plugin: str) -> None:
    if not plugin:
        return
    profile = nri.SecurityProfile
    forbidden = {
        profile.UNCONFINED: rules.unconfined_seccomp,
        profile.RUNTIME_DEFAULT: rules.runtime_default_seccomp,
        profile.LOCALHOST: rules.custom_seccomp,
    }
    kind = request.container.linux.seccomp_profile.profile_type
    if forbidden.get(kind):
        name = profile.ProfileType.Name(kind)
        raise PermissionDenied(f"NRI: {plugin} replaced the seccomp profile {name}, which the configuration forbids")


def _check_required(rules: Rules, request: nri.ValidateContainerAdjustmentRequest) -> None:
    annotations, name = request.pod.annotations, request.container.name
    tolerates = effective_annotation(annotations, rules.tolerate_missing_annotation, name)
    if tolerates is not None and tolerates.strip().lower() in ("true", "t", "1"):
        return
    required = [*rules.required_plugins, *_names(effective_annotation(annotations, REQUIRED_PLUGINS, name) or "")]
    there = {known for plugin in request.plugins for known in (plugin.name, f"{plugin.index}-{plugin.name}")}
    missing = [each for each in required if each not in there]
    if missing:
        raise PermissionDenied(f"NRI: plugins without which no container is made are not there: {', '.join(missing)}")


def _names(value: str) -> list[str]:
    """A list as YAML writes short ones: ["a", "b"], [a, b], or lines "- a"."""
    try:
        found = json.loads(value)
    except ValueError:
        lines = value.strip().removeprefix("[").removesuffix("]").replace(",", "\n").splitlines()
        found = [line.strip().removeprefix("- ").strip().strip("\"'") for line in lines]
    if not isinstance(found, list):
        raise PermissionDenied(f"NRI: annotation {REQUIRED_PLUGINS}={value!r}: expected a list of plugins")
    return [str(each) for each in found if each]


def effective_annotation(annotations: Mapping[str, str], key: str, container: str) -> str | None:
    """A pod's annotation as it applies to one container: KEY/container.NAME, else KEY/pod, else KEY."""
    if not key:
        return None
    keys = (f"{key}/container.{container}", f"{key}/pod", key)
    return next((annotations[each] for each in keys if each in annotations), None)
