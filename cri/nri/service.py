"""All of NRI in one place: takes the state for plugins that come, carries out what they ask, lives with the daemon."""

import asyncio
import logging
from collections.abc import Awaitable, Iterable
from pathlib import Path

from cri.api.nri.v1alpha1 import api_pb2 as nri
from cri.config import NriSection
from cri.nri import adjust, validator
from cri.nri.hooks import ContainerPlugins, Messages, SandboxPlugins
from cri.nri.plugins import Plugins, Settings, State
from oci.container import Container, ContainerRecord
from oci.containers import Containers
from oci.errors import Error, FailedPrecondition
from oci.handlers import Handlers
from oci.linux.node import Node
from sandbox.sandboxes import Sandboxes

_log = logging.getLogger(__name__)

EVICTION_GRACE_S = 30.0  # between the stop signal and SIGKILL


class Nri:
    def __init__(
        self, config: NriSection, containers: Containers, sandboxes: Sandboxes, handlers: Handlers, host: Node
    ) -> None:
        self._listen = config.listen
        self._containers = containers
        self._sandboxes = sandboxes
        self._evictions: set[asyncio.Task[None]] = set()
        self._messages = Messages(containers, sandboxes)
        self._plugins = Plugins(_settings(config), self._snapshot, self._apply)
        self._of_containers = ContainerPlugins(
            self._plugins, self._messages, self._apply_all, _rules(config), handlers, host
        )
        self._of_sandboxes = SandboxPlugins(self._plugins, self._messages, containers, self._of_containers)

    async def start(self) -> None:
        """Take part from now on; after the restore of what an earlier daemon has left. Raises FailedPrecondition."""
        self._of_containers.assume_told(self._containers.known())
        self._containers.hooks = self._of_containers
        self._sandboxes.hooks = self._of_sandboxes
        try:
            await self._plugins.start()
        except OSError as error:
            raise FailedPrecondition(f"nri.listen {self._listen}: cannot listen: {error.strerror or error}") from error

    async def close(self) -> None:
        for task in list(self._evictions):
            task.cancel()
        await self._plugins.close()

    # For plugins that come

    def _snapshot(self) -> Awaitable[State]:
        pods = [
            self._messages.pod(each) for each in self._sandboxes.known() if self._of_sandboxes.is_known(each.record)
        ]
        containers = [(each, each.record) for each in self._containers.known() if self._of_containers.is_known(each)]
        return self._described(pods, containers)

    async def _described(
        self, pods: list[nri.PodSandbox], containers: list[tuple[Container, ContainerRecord]]
    ) -> State:
        return State(pods, [await self._messages.container(container, record) for container, record in containers])

    # What plugins ask for

    async def _apply(
        self, updates: Iterable[nri.ContainerUpdate], evictions: Iterable[nri.ContainerEviction]
    ) -> list[nri.ContainerUpdate]:
        """Those that failed and may not."""
        failed = []
        for update in updates:
            try:
                container = self._containers.get(update.container_id)
                await self._containers.limit(container, adjust.limits(update.linux.resources))
            except (Error, OSError) as error:
                _log.warning("NRI: update of container %s: %s", update.container_id, error)
                if not update.ignore_failure:
                    failed.append(update)
        for eviction in evictions:
            self._evict(eviction)
        return failed

    async def _apply_all(
        self, updates: Iterable[nri.ContainerUpdate], evictions: Iterable[nri.ContainerEviction]
    ) -> None:
        failed = await self._apply(updates, evictions)
        if failed:
            ids = ", ".join(update.container_id for update in failed)
            raise Error(f"NRI: plugins want other limits for containers {ids}, and these could not be set")

    def _evict(self, eviction: nri.ContainerEviction) -> None:
        container = self._containers.find(eviction.container_id)
        if container is None:
            return
        _log.warning("container %s is stopped at a plugin's wish: %s", container.id, eviction.reason or "no reason")
        task = asyncio.create_task(self._containers.stop(container, EVICTION_GRACE_S), name=f"evict {container.id}")
        self._evictions.add(task)
        task.add_done_callback(self._evictions.discard)


def _settings(config: NriSection) -> Settings:
    return Settings(
        socket=None if config.disable_connections else Path(config.listen),
        plugin_dir=config.plugin_path,
        config_dir=config.plugin_config_path,
        registration_timeout_s=config.plugin_registration_timeout,
        request_timeout_s=config.plugin_request_timeout,
    )


def _rules(config: NriSection) -> validator.Rules | None:
    if not config.default_validator:
        return None
    return validator.Rules(
        oci_hooks=config.validator_reject_oci_hook_adjustment,
        runtime_default_seccomp=config.validator_reject_runtime_default_seccomp_adjustment,
        unconfined_seccomp=config.validator_reject_unconfined_seccomp_adjustment,
        custom_seccomp=config.validator_reject_custom_seccomp_adjustment,
        namespaces=config.validator_reject_namespace_adjustment,
        sysctls=config.validator_reject_sysctl_adjustment,
        required_plugins=config.validator_required_plugins,
        tolerate_missing_annotation=config.validator_tolerate_missing_plugins_annotation,
    )
