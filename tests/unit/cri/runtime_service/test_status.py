"""The status tells what each runtime handler can do, as far as its runtime says so."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cri.runtime_service.status import Health, RuntimeStatus
from oci.handlers import Handler, Handlers
from oci.linux.cgroup import Driver
from oci.spec import RuntimeFeatures


def test_each_handler_tells_what_its_runtime_can_do() -> None:
    runtime: Any = SimpleNamespace(path=Path("/runtime"))
    handlers = Handlers(
        [
            Handler("old", runtime, RuntimeFeatures()),
            Handler("rro", runtime, RuntimeFeatures(recursive_read_only=True)),
            Handler("ids", runtime, RuntimeFeatures(idmap_mounts=True)),
        ],
        default="rro",
    )
    network: Any = SimpleNamespace(status=lambda: SimpleNamespace(ready=True, reason="", message=""))
    status = RuntimeStatus(handlers, network, Driver.CGROUPFS, Health, dict)

    told = {
        each.name: (each.features.recursive_read_only_mounts, each.features.user_namespaces)
        for each in status.response(verbose=False).runtime_handlers
    }

    assert told == {"": (True, False), "old": (False, False), "rro": (True, False), "ids": (False, True)}
