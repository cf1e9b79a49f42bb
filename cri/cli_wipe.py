"""`crito wipe`: removes all pods, containers and images of the node, through a daemon, as kubelet would.

Where no daemon runs one is started for it, so that networks and cgroups are released and not only forgotten.
"""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc

from cri.api.runtime.v1 import api_pb2 as api
from cri.config import Config
from cri.node_client import NodeClient, connected
from oci.errors import Error, FailedPrecondition, Unavailable

START_TIMEOUT_S = 60.0
STEP_TIMEOUT_S = 120.0
_SERVE = "import sys; sys.path.append(sys.argv.pop(1)); from cri.cli import main; sys.exit(main(sys.argv[1:]))"
_SOURCE_ROOT = Path(__file__).resolve().parents[1]


def main(config: Config, flags: Sequence[str], *, force: bool) -> int:
    """`flags` lead another `crito` to the same configuration. Raises FailedPrecondition while containers run."""
    socket = config.api.listen
    with _daemon(socket, flags), connected(socket) as daemon:
        running = _running(daemon)
        if running and not force:
            raise FailedPrecondition(f"{running} containers run on this node; --force ends and removes them")
        pods = _remove_pods(daemon)
        images = _remove_images(daemon)
    print(f"removed {pods} pods and {images} images")
    return 0


def _running(daemon: NodeClient) -> int:
    state = api.ContainerStateValue(state=api.CONTAINER_RUNNING)
    request = api.ListContainersRequest(filter=api.ContainerFilter(state=state))
    return len(daemon.runtime.ListContainers(request, timeout=STEP_TIMEOUT_S).containers)


def _remove_pods(daemon: NodeClient) -> int:
    pods = daemon.runtime.ListPodSandbox(api.ListPodSandboxRequest(), timeout=STEP_TIMEOUT_S).items
    for pod in pods:
        daemon.runtime.StopPodSandbox(api.StopPodSandboxRequest(pod_sandbox_id=pod.id), timeout=STEP_TIMEOUT_S)
        daemon.runtime.RemovePodSandbox(api.RemovePodSandboxRequest(pod_sandbox_id=pod.id), timeout=STEP_TIMEOUT_S)
    return len(pods)


def _remove_images(daemon: NodeClient) -> int:
    removed = 0
    for image in daemon.images.ListImages(api.ListImagesRequest(), timeout=STEP_TIMEOUT_S).images:
        request = api.RemoveImageRequest(image=api.ImageSpec(image=image.id))
        try:
            daemon.images.RemoveImage(request, timeout=STEP_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                raise
            continue  # of an additional store, which is not this node's to wipe
        removed += 1
    return removed


@contextlib.contextmanager
def _daemon(socket: Path, flags: Sequence[str]) -> Iterator[None]:
    """One that answers on `socket`: the node's own, else one for the time being."""
    if _answers(socket):
        yield
        return
    command = [sys.executable, "-I", "-c", _SERVE, str(_SOURCE_ROOT), "serve", *flags]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not _answers(socket):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise Unavailable("no daemon runs, and none could be started: see what it says above")
                time.sleep(0.1)
            yield
        finally:
            process.terminate()


def _answers(socket: Path) -> bool:
    if not socket.exists():
        return False
    try:
        with connected(socket) as daemon:
            daemon.inspect()
    except Error:
        return False
    return True
