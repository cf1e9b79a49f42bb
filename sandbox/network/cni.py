"""Runs the verbs of CNI over a network's chain of plugins; knows nothing of pods.

Source: CNI specification 1.1, section 3 "Execution of Network Configurations".
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from oci.errors import Error

from .conflist import JsonObject, NetworkConfig
from .plugin import CODE_CONTAINER_UNKNOWN, Call, PluginError, Plugins

CHECK_SINCE = "0.4.0"
PREV_RESULT_ON_DEL_SINCE = "0.4.0"
GC_SINCE = STATUS_SINCE = "1.1.0"


@dataclass(frozen=True, slots=True)
class AttachmentParameters:
    """What distinguishes one attachment from others to the same network (section 3, "Attachment Parameters")."""

    container_id: str
    netns: str  # a path; "" when it is gone
    ifname: str
    args: str  # CNI_ARGS
    owner: str  # in words, for the text of errors
    capability_args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "CNI_CONTAINERID": self.container_id,
            "CNI_NETNS": self.netns,
            "CNI_IFNAME": self.ifname,
            "CNI_ARGS": self.args,
        }


class Cni:
    def __init__(self, plugins: Plugins) -> None:
        self.plugins = plugins

    async def add(self, network: NetworkConfig, parameters: AttachmentParameters) -> JsonObject:
        """Run ADD through the chain; the last plugin's result. After an error the caller owes a `delete`."""
        result: JsonObject | None = None
        for plugin in network.plugins:
            call = _call("ADD", network, plugin, parameters, result)
            answer = await self.plugins.run(call)
            if answer is None:
                raise Error(f"{call} succeeded, but answered no result")
            # The next plugin reads prevResult by the version in its own configuration.
            result = {**answer, "cniVersion": network.version}
        assert result is not None  # a network has a plugin
        return result

    async def delete(
        self, network: NetworkConfig, parameters: AttachmentParameters, result: JsonObject | None = None
    ) -> None:
        """Run DEL through the chain, last plugin first; stops at the first that fails, as section 3 says."""
        prev_result = result if network.speaks(PREV_RESULT_ON_DEL_SINCE) else None
        for plugin in reversed(network.plugins):
            try:
                await self.plugins.run(_call("DEL", network, plugin, parameters, prev_result))
            except PluginError as error:
                if error.code != CODE_CONTAINER_UNKNOWN:  # that one means: nothing to clean up
                    raise

    async def check(self, network: NetworkConfig, parameters: AttachmentParameters, result: JsonObject) -> None:
        """Run CHECK through the chain; nothing where the network forbids it or is older than the verb."""
        if network.disable_check or not network.speaks(CHECK_SINCE):
            return
        for plugin in network.plugins:
            await self.plugins.run(_call("CHECK", network, plugin, parameters, result))

    async def gc(self, network: NetworkConfig, valid: Iterable[tuple[str, str]]) -> None:
        """Tell every plugin the attachments (container id, interface) that are still valid; nothing where it cannot.

        Raises one Error with all that the plugins said, after each was run.
        """
        if network.disable_gc or not network.speaks(GC_SINCE):
            return
        attachments = [{"containerID": container_id, "ifname": ifname} for container_id, ifname in valid]
        failures: list[Error] = []
        for plugin in network.plugins:
            config = {**_config(network, plugin), "cni.dev/valid-attachments": attachments}
            try:
                await self.plugins.run(Call("GC", plugin["type"], f'of network "{network.name}"', {}, config))
            except Error as error:
                failures.append(error)
        if failures:
            raise Error("; ".join(str(error) for error in failures))

    async def status(self, network: NetworkConfig, timeout_s: float) -> None:
        """Ask every plugin whether it could serve an ADD; raises what the first that cannot says."""
        if not network.speaks(STATUS_SINCE):
            return
        for plugin in network.plugins:
            call = Call("STATUS", plugin["type"], f'of network "{network.name}"', {}, _config(network, plugin))
            await self.plugins.run(call, timeout_s)

    async def versions(self, plugin: str, timeout_s: float) -> frozenset[str]:
        """The versions of CNI that a plugin says it speaks."""
        call = Call("VERSION", plugin, "", {}, {"cniVersion": "1.0.0"})
        answer = await self.plugins.run(call, timeout_s) or {}
        supported = answer.get("supportedVersions")
        if not isinstance(supported, list):
            raise Error(f'{call} answered no list "supportedVersions"')
        return frozenset(str(version) for version in supported)


def _call(
    verb: str,
    network: NetworkConfig,
    plugin: JsonObject,
    parameters: AttachmentParameters,
    prev_result: JsonObject | None,
) -> Call:
    config = _config(network, plugin)
    asked = plugin.get("capabilities", {})
    runtime_config = {key: value for key, value in parameters.capability_args.items() if asked.get(key)}
    if runtime_config:
        config["runtimeConfig"] = runtime_config
    if prev_result is not None:
        config["prevResult"] = prev_result
    subject = f'of {parameters.owner} to network "{network.name}" as {parameters.ifname}'
    return Call(verb, plugin["type"], subject, parameters.environment, config)


def _config(network: NetworkConfig, plugin: JsonObject) -> dict[str, Any]:
    """Section 3, "Deriving request configuration from plugin configuration"."""
    passed = {key: value for key, value in plugin.items() if key != "capabilities"}
    return {**passed, "cniVersion": network.version, "name": network.name}
