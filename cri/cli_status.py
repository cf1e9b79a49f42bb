"""`crito status`: how the running daemon is, as it says itself."""

import json
from pathlib import Path
from typing import Any

from cri.api.runtime.v1 import api_pb2 as api
from cri.node_client import SHORT_TIMEOUT_S, NodeClient, connected


def main(socket: Path, *, as_json: bool) -> int:
    """0 where the daemon is ready to run pods with a network, 1 where not."""
    with connected(socket) as daemon:
        status = _status(daemon)
    print(json.dumps(status, indent=2) if as_json else text(status))
    return 0 if all(condition["ready"] for condition in status["conditions"]) else 1


def _status(daemon: NodeClient) -> dict[str, Any]:
    version = daemon.runtime.Version(api.VersionRequest(), timeout=SHORT_TIMEOUT_S)
    answer = daemon.runtime.Status(api.StatusRequest(verbose=True), timeout=SHORT_TIMEOUT_S)
    pods = daemon.runtime.ListPodSandbox(api.ListPodSandboxRequest(), timeout=SHORT_TIMEOUT_S).items
    containers = daemon.runtime.ListContainers(api.ListContainersRequest(), timeout=SHORT_TIMEOUT_S).containers
    images = daemon.images.ListImages(api.ListImagesRequest(), timeout=SHORT_TIMEOUT_S).images
    return {
        "version": version.runtime_version,
        "conditions": [
            {"type": each.type, "ready": each.status, "reason": each.reason, "message": each.message}
            for each in answer.status.conditions
        ],
        "runtime_handlers": [each.name for each in answer.runtime_handlers],
        "pods": _counted([api.PodSandboxState.Name(pod.state).removeprefix("SANDBOX_") for pod in pods]),
        "containers": _counted([api.ContainerState.Name(each.state).removeprefix("CONTAINER_") for each in containers]),
        "images": len(images),
        "daemon": daemon.inspect(),
    }


def _counted(states: list[str]) -> dict[str, int]:
    return {state.lower(): states.count(state) for state in sorted(set(states))}


def text(status: dict[str, Any]) -> str:
    lines = [f"crito {status['version']}"]
    for condition in status["conditions"]:
        mark = "✓" if condition["ready"] else "✗"
        why = ": ".join(filter(None, [condition["reason"], condition["message"]]))
        lines.append(f"{mark} {condition['type']}" + (f"  {why}" if why else ""))
    lines.append(f"runtime handlers  {', '.join(repr(name) for name in status['runtime_handlers']) or 'none'}")
    for kind in ("pods", "containers"):
        counts = status[kind]
        listed = ", ".join(f"{count} {state}" for state, count in counts.items())
        lines.append(f"{kind:<16}  {sum(counts.values())}" + (f" ({listed})" if listed else ""))
    lines.append(f"images            {status['images']}")
    lines += [f"{name:<16}  {_plain(value)}" for name, value in status["daemon"].items()]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
