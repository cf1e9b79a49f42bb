"""Status and RuntimeConfig: whether pods can be started here, and what this runtime and its handlers can do."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cri.api.runtime.v1 import api_pb2 as api
from oci.handlers import Handler, Handlers
from oci.linux.cgroup import Driver
from sandbox.network.pod_network import PodNetwork

RUNTIME_READY = "RuntimeReady"
NETWORK_READY = "NetworkReady"


@dataclass(frozen=True, slots=True)
class Health:
    """Whether pods could be started, and why not."""

    reason: str = ""
    message: str = ""

    @property
    def is_ready(self) -> bool:
        return not self.reason


class RuntimeStatus:
    """`check` looks at what pods need of the runtime itself; it must not wait for anything."""

    def __init__(
        self,
        handlers: Handlers,
        network: PodNetwork,
        driver: Driver,
        check: Callable[[], Health],
        info: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._handlers = handlers
        self._network = network
        self._driver = driver
        self._check = check
        self._info = info

    def response(self, verbose: bool) -> api.StatusResponse:
        return api.StatusResponse(
            status=api.RuntimeStatus(conditions=[self._runtime_condition(), self._network_condition()]),
            info={"config": json.dumps(self._info())} if verbose else {},
            runtime_handlers=self._runtime_handlers(),
            features=api.RuntimeFeatures(
                supplemental_groups_policy=True, user_namespaces_host_network=True, mount_options=True
            ),
        )

    def config(self) -> api.RuntimeConfigResponse:
        driver = api.SYSTEMD if self._driver is Driver.SYSTEMD else api.CGROUPFS
        return api.RuntimeConfigResponse(linux=api.LinuxRuntimeConfiguration(cgroup_driver=driver))

    def _runtime_condition(self) -> api.RuntimeCondition:
        health = self._check()
        return api.RuntimeCondition(
            type=RUNTIME_READY, status=health.is_ready, reason=health.reason, message=health.message
        )

    def _network_condition(self) -> api.RuntimeCondition:
        network = self._network.status()
        return api.RuntimeCondition(
            type=NETWORK_READY, status=network.ready, reason=network.reason, message=network.message
        )

    def _runtime_handlers(self) -> list[api.RuntimeHandler]:
        """Every handler by its name, and the default one also as ""."""
        default = self._handlers.find("")
        named = [("", default)] if default is not None else []
        named += [(handler.name, handler) for handler in self._handlers.all()]
        return [api.RuntimeHandler(name=name, features=_features(handler)) for name, handler in named]


def _features(handler: Handler) -> api.RuntimeHandlerFeatures:
    features = handler.features
    return api.RuntimeHandlerFeatures(
        recursive_read_only_mounts=features.recursive_read_only, user_namespaces=features.idmap_mounts
    )


def disk_health(directories: Mapping[str, Path], least_bytes: int = 1 << 20) -> Health:
    """Whether the directories that every pod start writes to are there and have room. A statvfs each: no waiting."""
    for name, directory in directories.items():
        try:
            found = os.statvfs(directory)
        except OSError as error:
            return Health("DirectoryGone", f"{name} {directory}: {error.strerror}")
        if found.f_flag & os.ST_RDONLY:
            return Health("ReadOnly", f"{name} {directory} is mounted read-only")
        if found.f_bavail * found.f_frsize < least_bytes:
            return Health("DiskFull", f"{name} {directory} has {found.f_bavail * found.f_frsize} bytes left")
    return Health()
