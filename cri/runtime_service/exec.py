"""Exec, Attach and PortForward: checks what is asked, and gets the URL at which the stream server serves it."""

import logging
from pathlib import Path

from cri.api.runtime.v1 import api_pb2 as api
from cri.streaming.client import Streams
from cri.streaming.targets import AttachTarget, ExecTarget, PortForwardTarget
from oci import spec
from oci.container import Container
from oci.containers import Containers
from oci.errors import FailedPrecondition, InvalidArgument, Unavailable
from oci.status import ContainerState
from sandbox.sandboxes import Sandboxes

_log = logging.getLogger(__name__)


class Streaming:
    """Each method returns a URL that is good for one session and expires after a minute."""

    def __init__(self, containers: Containers, sandboxes: Sandboxes, streams: Streams, monitors: Path) -> None:
        """`monitors`: the directory that has a monitor's directory per container, by its id."""
        self._containers = containers
        self._sandboxes = sandboxes
        self._streams = streams
        self._monitors = monitors

    async def exec(self, request: api.ExecRequest) -> str:
        if not request.cmd:
            raise InvalidArgument("cmd: empty")
        _check_streams(request)
        container = self._running(request.container_id, "exec in")
        config = await self._containers.runtime_spec(container)
        target = ExecTarget(
            container_id=container.id,
            monitor_directory=str(self._monitors / container.id),
            process=spec.exec_process(config, tuple(request.cmd), tty=request.tty),
            tty=request.tty,
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
        )
        return await self._streams.register(target)

    async def attach(self, request: api.AttachRequest) -> str:
        _check_streams(request)
        container = self._running(request.container_id, "attach to")
        target = AttachTarget(
            container_id=container.id,
            monitor_directory=str(self._monitors / container.id),
            tty=request.tty,
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
        )
        return await self._streams.register(target)

    async def port_forward(self, request: api.PortForwardRequest) -> str:
        for port in request.port:
            if not 0 < port < 65536:
                raise InvalidArgument(f"port: {port} is no TCP port")
        sandbox = self._sandboxes.ready(request.pod_sandbox_id)
        ips = sandbox.record.ips if sandbox.record.runtime_sandbox else ()
        target = PortForwardTarget(sandbox.id, self._sandboxes.netns(sandbox), tuple(request.port), ips)
        return await self._streams.register(target)

    def _running(self, id: str, verb: str) -> Container:
        container = self._containers.get(id)
        if container.state is not ContainerState.RUNNING:
            raise FailedPrecondition(f"cannot {verb} a container that is {container.state} (id {container.id})")
        return container


def _check_streams(request: api.ExecRequest | api.AttachRequest) -> None:
    """The rules of the CRI and of the kubelet's own streaming server."""
    if request.tty and request.stderr:
        raise InvalidArgument("stderr: a terminal has one output stream; with tty it must be false")
    if not (request.stdin or request.stdout or request.stderr):
        raise InvalidArgument("stdin, stdout, stderr: at least one must be true")


async def start_early(streams: Streams) -> None:
    """Have the stream server ready before somebody needs it. What keeps it from starting is told to callers, too."""
    try:
        await streams.start()
    except (Unavailable, OSError) as error:
        _log.error("exec, attach and port-forward do not work: %s", error)
