"""A kubelet on a runtime's socket, with static pods from a directory; a node of an API server where one is given."""

import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.e2e.harness import cgroups
from tests.e2e.harness.client import Client
from tests.e2e.harness.ports import free_port, wait_until

PROGRAM = shutil.which("kubelet") or ""

# What kubelet sets on a node when it starts.
SYSCTLS = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)


class Runtime(Protocol):
    """What a kubelet runs its pods by, and its tests ask."""

    directory: Path
    socket: Path
    cgroup_parent: str

    def start(self) -> None: ...

    def kill(self) -> None: ...

    def client(self) -> Client: ...


@dataclass(frozen=True, slots=True)
class Membership:
    """How a kubelet is a node of an API server."""

    kubeconfig: Path
    node: str
    address: str  # of this machine, but not on the loopback interface: kubelet takes none of these


class Kubelet:
    """`settings` are fields of KubeletConfiguration, over those that are made here."""

    def __init__(
        self,
        daemon: Runtime,
        feature_gates: Mapping[str, bool] | None = None,
        membership: Membership | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.daemon = daemon
        self.feature_gates = dict(feature_gates or {})
        self.membership = membership
        self.settings = dict(settings or {})
        self.directory = daemon.directory / "kubelet"
        self.manifests = self.directory / "manifests"
        self.log = self.directory / "log"
        self.port, self.read_only_port = free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.manifests.mkdir(parents=True)

    def start(self) -> None:
        cgroups.make(f"/{self.daemon.cgroup_parent}")
        config = self.directory / "config.json"
        config.write_text(json.dumps(self._config()))
        command = [
            PROGRAM,
            f"--config={config}",
            f"--root-dir={self.directory}/root",
            f"--cert-dir={self.directory}/pki",
            f"--hostname-override={self.membership.node if self.membership else 'e2e'}",
            f"--node-ip={self.membership.address if self.membership else '127.0.0.1'}",
            "--v=2",
        ]
        if self.membership:
            command.append(f"--kubeconfig={self.membership.kubeconfig}")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        wait_until(self._answers, f"kubelet answers (see {self.log})", 60, self.process)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def write(self, manifest: Mapping[str, Any]) -> None:
        """Put a static pod there, or a new version of one; by rename, so that it is never seen half written."""
        path = self.manifests / f"{manifest['metadata']['name']}.json"
        draft = self.directory / path.name
        draft.write_text(json.dumps(manifest))
        draft.rename(path)

    def remove(self, name: str) -> None:
        (self.manifests / f"{name}.json").unlink()

    def pods(self) -> list[dict[str, Any]]:
        """What kubelet says of its pods, with their status."""
        pods: list[dict[str, Any]] = self._get("/pods")["items"] or []
        return pods

    def pod(self, name: str) -> dict[str, Any] | None:
        """The static pod `name`: kubelet appends the node's name to it."""
        return next((pod for pod in self.pods() if pod["metadata"]["name"] == f"{name}-e2e"), None)

    def condition(self, name: str, condition: str) -> bool:
        pod = self.pod(name)
        listed = pod["status"].get("conditions", []) if pod else []
        return any(each["type"] == condition and each["status"] == "True" for each in listed)

    def stats(self) -> dict[str, Any]:
        return self._get("/stats/summary")

    def text(self, path: str) -> str:
        """What kubelet answers at `path`, such as "/metrics/cadvisor"."""
        with urllib.request.urlopen(
            f"http://{self._config()['address']}:{self.read_only_port}{path}", timeout=20
        ) as answer:
            body: bytes = answer.read()
            return body.decode()

    def _get(self, path: str) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.text(path))
        return body

    def _answers(self) -> bool:
        try:
            self.pods()
        except OSError:
            return False
        return True

    def _config(self) -> dict[str, Any]:
        resolv = self.directory / "resolv.conf"
        resolv.write_text("nameserver 127.0.0.1\n")
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "containerRuntimeEndpoint": f"unix://{self.daemon.socket}",
            "imageServiceEndpoint": f"unix://{self.daemon.socket}",
            "staticPodPath": str(self.manifests),
            "podLogsDir": str(self.directory / "pod-logs"),
            "volumePluginDir": str(self.directory / "plugins"),
            "resolvConf": str(resolv),
            "address": self.membership.address if self.membership else "127.0.0.1",
            "port": self.port,
            "readOnlyPort": self.read_only_port,
            "healthzPort": 0,
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupDriver": "systemd" if cgroups.HAS_SYSTEMD else "cgroupfs",
            "cgroupRoot": f"/{self.daemon.cgroup_parent.removesuffix('.slice')}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "oomScoreAdj": 0,
            "enforceNodeAllocatable": ["pods"],
            "makeIPTablesUtilChains": False,
            "fileCheckFrequency": "1s",
            "syncFrequency": "2s",
            "evictionHard": {"memory.available": "1Mi"},
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "shutdownGracePeriod": "0s",
            "registerNode": self.membership is not None,
            "featureGates": self.feature_gates,
            **self.settings,
        }


@contextmanager
def running_kubelet(
    daemon: Runtime,
    feature_gates: Mapping[str, bool] | None = None,
    membership: Membership | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Iterator[Kubelet]:
    """A kubelet, with the host's sysctls put back when it ends."""
    before = {name: Path("/proc/sys", name).read_text() for name in SYSCTLS if Path("/proc/sys", name).exists()}
    kubelet = Kubelet(daemon, feature_gates, membership, settings)
    try:
        kubelet.start()
        yield kubelet
    finally:
        kubelet.stop()
        for name, value in before.items():
            Path("/proc/sys", name).write_text(value)
        _unmount_volumes(kubelet.directory)


def _unmount_volumes(directory: Path) -> None:
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        target = line.split()[4]
        if target.startswith(f"{directory}/"):
            subprocess.run(["umount", "-l", target], check=False, capture_output=True)


def text_of_log(kubelet: Kubelet, lines: int = 40) -> str:
    return os.linesep.join(kubelet.log.read_text(errors="replace").splitlines()[-lines:])
