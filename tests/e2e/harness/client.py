"""A client of the CRI over the generated stubs, with the few messages that nearly every test needs."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from cri.api.runtime.v1 import api_pb2 as pb
from cri.api.runtime.v1.api_pb2_grpc import ImageServiceStub, RuntimeServiceStub


@dataclass(frozen=True, slots=True)
class Pod:
    id: str
    config: pb.PodSandboxConfig


class Client:
    """`runtime` and `images` are the stubs themselves; the methods save typing.

    `ids` collects what was made, for the search for leftovers.
    """

    def __init__(self, socket: Path, cgroup_parent: str, logs: Path, ids: set[str]) -> None:
        options = [
            ("grpc.default_authority", "localhost"),
            ("grpc.max_receive_message_length", 16 << 20),  # as kubelet's
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.min_reconnect_backoff_ms", 10000),  # also the time that connecting may take
            ("grpc.max_reconnect_backoff_ms", 200),
        ]
        self.channel = grpc.insecure_channel(f"unix://{socket}", options=options)
        self.runtime: Any = RuntimeServiceStub(self.channel)
        self.images: Any = ImageServiceStub(self.channel)
        self.cgroup_parent = cgroup_parent
        self.logs = logs
        self.ids = ids

    def close(self) -> None:
        self.channel.close()

    def answers(self) -> bool:
        """Whether somebody serves the CRI there."""
        try:
            self.runtime.Version(pb.VersionRequest(), timeout=2)
        except grpc.RpcError:
            return False
        return True

    # Pods

    def pod_config(self, name: str = "pod", **fields: Any) -> pb.PodSandboxConfig:
        """A pod of its own uid; `linux` and everything else of PodSandboxConfig can be given."""
        uid = str(uuid.uuid4())
        linux = fields.pop("linux", None) or pb.LinuxPodSandboxConfig()
        namespace = fields.pop("namespace", "e2e")
        if not linux.cgroup_parent:
            linux.cgroup_parent = f"/{self.cgroup_parent}"
        return pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid=uid, namespace=namespace, attempt=fields.pop("attempt", 0)),
            hostname=fields.pop("hostname", name),
            log_directory=fields.pop("log_directory", str(self.logs / f"e2e_{name}_{uid}")),
            linux=linux,
            **fields,
        )

    def run_pod(
        self,
        name: str = "pod",
        *,
        config: pb.PodSandboxConfig | None = None,
        handler: str = "",
        timeout_s: float = 60,
        **fields: Any,
    ) -> Pod:
        config = config or self.pod_config(name, **fields)
        request = pb.RunPodSandboxRequest(config=config, runtime_handler=handler)
        pod = Pod(self.runtime.RunPodSandbox(request, timeout=timeout_s).pod_sandbox_id, config)
        self.ids.add(pod.id)
        return pod

    def pod_status(self, pod_id: str) -> pb.PodSandboxStatus:
        status: pb.PodSandboxStatus = self.runtime.PodSandboxStatus(
            pb.PodSandboxStatusRequest(pod_sandbox_id=pod_id), timeout=30
        ).status
        return status

    def pods(self) -> Sequence[pb.PodSandbox]:
        items: Sequence[pb.PodSandbox] = self.runtime.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=30).items
        return items

    def stop_pod(self, pod_id: str, timeout_s: float = 60) -> None:
        self.runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod_id), timeout=timeout_s)

    def remove_pod(self, pod_id: str, timeout_s: float = 60) -> None:
        self.stop_pod(pod_id, timeout_s)
        self.runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod_id), timeout=timeout_s)

    # Containers

    def container_config(
        self, image: str, command: Sequence[str] = (), name: str = "main", **fields: Any
    ) -> pb.ContainerConfig:
        attempt = fields.pop("attempt", 0)
        return pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name, attempt=attempt),
            image=pb.ImageSpec(image=image, user_specified_image=image),
            command=list(command),
            log_path=fields.pop("log_path", f"{name}/{attempt}.log"),
            linux=fields.pop("linux", None) or pb.LinuxContainerConfig(),
            **fields,
        )

    def create(self, pod: Pod, config: pb.ContainerConfig, timeout_s: float = 60) -> str:
        request = pb.CreateContainerRequest(pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config)
        container_id: str = self.runtime.CreateContainer(request, timeout=timeout_s).container_id
        self.ids.add(container_id)
        return container_id

    def start(self, container_id: str, timeout_s: float = 60) -> None:
        self.runtime.StartContainer(pb.StartContainerRequest(container_id=container_id), timeout=timeout_s)

    def run(self, pod: Pod, image: str, command: Sequence[str], name: str = "main", **fields: Any) -> str:
        """Create and start a container; its id."""
        container_id = self.create(pod, self.container_config(image, command, name, **fields))
        self.start(container_id)
        return container_id

    def status(self, container_id: str) -> pb.ContainerStatus:
        status: pb.ContainerStatus = self.runtime.ContainerStatus(
            pb.ContainerStatusRequest(container_id=container_id), timeout=30
        ).status
        return status

    def containers(self) -> Sequence[pb.Container]:
        listed: Sequence[pb.Container] = self.runtime.ListContainers(pb.ListContainersRequest(), timeout=30).containers
        return listed

    def stop(self, container_id: str, grace_s: int = 0) -> None:
        request = pb.StopContainerRequest(container_id=container_id, timeout=grace_s)
        self.runtime.StopContainer(request, timeout=grace_s + 60)

    def remove(self, container_id: str) -> None:
        self.runtime.RemoveContainer(pb.RemoveContainerRequest(container_id=container_id), timeout=60)

    def exec_sync(self, container_id: str, command: Sequence[str], timeout_s: int = 10) -> pb.ExecSyncResponse:
        request = pb.ExecSyncRequest(container_id=container_id, cmd=command, timeout=timeout_s)
        answer: pb.ExecSyncResponse = self.runtime.ExecSync(request, timeout=timeout_s + 20)
        return answer

    def wait_exited(self, container_id: str, timeout_s: float = 30) -> pb.ContainerStatus:
        return self.wait_status(container_id, lambda s: s.state == pb.CONTAINER_EXITED, timeout_s)

    def wait_status(
        self, container_id: str, condition: Callable[[pb.ContainerStatus], bool], timeout_s: float = 30
    ) -> pb.ContainerStatus:
        deadline = time.monotonic() + timeout_s
        while not condition(status := self.status(container_id)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"container {container_id} is still {status}")
            time.sleep(0.02)
        return status

    def log(self, pod: Pod, name: str = "main", attempt: int = 0) -> str:
        """The text of a container's log, without time stamps and tags; the parts of a long line are joined."""
        return log_text(Path(pod.config.log_directory) / name / f"{attempt}.log")

    # Images

    def pull(self, reference: str, timeout_s: float = 120, pod: pb.PodSandboxConfig | None = None) -> str:
        request = pb.PullImageRequest(image=pb.ImageSpec(image=reference), sandbox_config=pod)
        image_ref: str = self.images.PullImage(request, timeout=timeout_s).image_ref
        return image_ref

    # Everything

    def remove_everything(self) -> None:
        for pod in self.pods():
            self.remove_pod(pod.id)


def log_text(path: Path) -> str:
    parts = []
    for line in path.read_bytes().splitlines(keepends=True):
        _stamp, _stream, tag, text = line.split(b" ", 3)
        parts.append(text if tag == b"F" else text.removesuffix(b"\n"))
    return b"".join(parts).decode(errors="replace")
