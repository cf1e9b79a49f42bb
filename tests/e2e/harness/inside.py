"""What a container looks like from within, and its process from without."""

import json
from pathlib import Path

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.harness.client import Client


def output(client: Client, container_id: str, command: str) -> str:
    """What a shell command writes that has to succeed in the container."""
    done = client.exec_sync(container_id, ["sh", "-c", command])
    assert done.exit_code == 0, (command, done)
    return done.stdout.decode(errors="surrogateescape").strip()


def pid_of(client: Client, container_id: str) -> int:
    """The pid of the container's first process on the node."""
    request = pb.ContainerStatusRequest(container_id=container_id, verbose=True)
    pid: int = json.loads(client.runtime.ContainerStatus(request, timeout=30).info["info"])["pid"]
    return pid


def cgroup_of(pid: int, controller: str) -> str:
    """The cgroup of a process in the controller's hierarchy, on v2 in the only one."""
    lines = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    by_controller = {name: path for _, names, path in lines for name in names.split(",")}
    return by_controller.get(controller) or by_controller[""]


def limit(pid: int, v1: str, v2: str) -> str:
    """A file of the process's cgroup, by its name on v1 or on v2; the controller is the first word of v1's."""
    controller = v1.partition(".")[0]
    path = cgroup_of(pid, controller)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        kind, options = fields[fields.index("-") + 1], fields[-1].split(",")
        if kind == "cgroup" and controller in options:
            return Path(f"{fields[4]}{path}/{v1}").read_text().strip()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[fields.index("-") + 1] == "cgroup2":
            return Path(f"{fields[4]}{path}/{v2}").read_text().strip()
    raise AssertionError(f"no hierarchy has {controller}")
