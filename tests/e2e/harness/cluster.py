"""A cluster of one machine: etcd and an API server on loopback, the kubelets that join, and kubectl to talk to them.

Nothing schedules and nothing controls: pods name their node, and the API server does without service accounts.
"""

import json
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.harness.kubelet import Membership
from tests.e2e.harness.ports import free_port, wait_until

PROGRAMS = ("etcd", "kube-apiserver", "kubelet", "kubectl", "openssl")


def missing(kubectl_commands: Sequence[str]) -> str:
    """Why there can be no cluster here; "" if there can."""
    for name in PROGRAMS:
        if shutil.which(name) is None:
            return f"{name} is not installed"
    usage = subprocess.run([_program("kubectl"), "--help"], capture_output=True, text=True, check=False).stdout
    for command in kubectl_commands:
        if f"\n  {command} " not in usage:
            return f"this kubectl has no {command}"
    return ""


def _program(name: str) -> str:
    return shutil.which(name) or name


@dataclass(frozen=True, slots=True)
class Kubectl:
    """`environment` is all that it gets, besides its kubeconfig."""

    kubeconfig: Path
    environment: Mapping[str, str]

    def command(self, *arguments: str) -> list[str]:
        return [_program("kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments]

    def __call__(self, *arguments: str, input: bytes = b"", timeout_s: float = 120) -> str:
        """What it printed; an error holds what it said on both streams."""
        done = self.run(*arguments, input=input, timeout_s=timeout_s)
        if done.returncode != 0:
            told = f"{done.stdout.decode(errors='replace')}\n{done.stderr.decode(errors='replace')}"
            raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.returncode}\n{told}")
        return done.stdout.decode()

    def run(self, *arguments: str, input: bytes = b"", timeout_s: float = 120) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            self.command(*arguments),
            input=input,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            env=self.environment,
        )

    @contextmanager
    def session(self, *arguments: str, **fds: Any) -> Iterator[subprocess.Popen[bytes]]:
        """It runs with pipes as its stdio, but for what `fds` say, until the block ends."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **fds}
        process = subprocess.Popen(self.command(*arguments), env=self.environment, bufsize=0, **pipes)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()

    def with_spdy(self) -> "Kubectl":
        """As kubectl was before it spoke WebSocket."""
        without = {"KUBECTL_REMOTE_COMMAND_WEBSOCKETS": "false", "KUBECTL_PORT_FORWARD_WEBSOCKETS": "false"}
        return Kubectl(self.kubeconfig, {**self.environment, **without})

    def apply(self, manifest: Mapping[str, Any]) -> None:
        self("apply", "--validate=false", "-f", "-", input=json.dumps(manifest).encode())

    def pod(self, name: str) -> dict[str, Any]:
        pod: dict[str, Any] = json.loads(self("get", "pod", name, "-o", "json"))
        return pod

    def wait_ready(self, name: str, timeout_s: int = 90) -> dict[str, Any]:
        self("wait", "--for=condition=Ready", f"pod/{name}", f"--timeout={timeout_s}s", timeout_s=timeout_s + 20)
        return self.pod(name)


class Cluster:
    """etcd and an API server, with everything of theirs in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port, self.etcd_port = free_port(), free_port()
        self.kubeconfig = directory / "kubeconfig"
        self._token = secrets.token_hex(16)
        self._processes: list[subprocess.Popen[bytes]] = []
        directory.mkdir(parents=True)
        (directory / "home").mkdir()
        self.kubectl = Kubectl(self.kubeconfig, {"HOME": str(directory / "home"), "PATH": "/usr/bin:/bin"})

    def start(self) -> None:
        self._write_credentials()
        self._run("etcd", *self._etcd_flags())
        self._run("kube-apiserver", *self._api_server_flags())
        self._wait(self._is_ready, "the API server is ready", 120)
        self._wait(lambda: self._has("namespace", "default"), "there is a namespace for pods", 60)

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        self._processes.clear()

    def member(self, node: str, address: str) -> Membership:
        return Membership(self.kubeconfig, node, address)

    def wait_for_node(self, node: str) -> None:
        """Return once pods can be given to it: it is there, and says that it is ready."""
        path = "jsonpath={.status.conditions[?(@.type=='Ready')].status}"

        def is_ready() -> bool:
            return self.kubectl.run("get", "node", node, "-o", path).stdout == b"True"

        self._wait(is_ready, f"node {node} is ready", 90)

    def _is_ready(self) -> bool:
        return self.kubectl.run("get", "--raw", "/readyz").stdout == b"ok"

    def _has(self, kind: str, name: str) -> bool:
        return self.kubectl.run("get", kind, name).returncode == 0

    def _wait(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        try:
            wait_until(condition, f"{what} (see {self.directory})", timeout_s, self._processes[-1])
        except (RuntimeError, TimeoutError) as error:
            tails = [log.read_text(errors="replace")[-2000:] for log in self.directory.glob("*.log")]
            raise RuntimeError("\n".join([str(error), *tails])) from None

    def _run(self, name: str, *flags: str) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [_program(name), *flags], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.directory
            )
        self._processes.append(process)

    def _write_credentials(self) -> None:
        key = self.directory / "service-accounts.key"
        subprocess.run([_program("openssl"), "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        (self.directory / "tokens.csv").write_text(f'{self._token},admin,admin,"system:masters"\n')
        server = {"server": f"https://127.0.0.1:{self.port}", "insecure-skip-tls-verify": True}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "e2e", "cluster": server}],
            "users": [{"name": "admin", "user": {"token": self._token}}],
            "contexts": [{"name": "e2e", "context": {"cluster": "e2e", "user": "admin", "namespace": "default"}}],
            "current-context": "e2e",
        }
        self.kubeconfig.write_text(json.dumps(config))

    def _etcd_flags(self) -> Iterator[str]:
        client, peer = f"http://127.0.0.1:{self.etcd_port}", f"http://127.0.0.1:{free_port()}"
        yield f"--data-dir={self.directory}/etcd"
        yield f"--listen-client-urls={client}"
        yield f"--advertise-client-urls={client}"
        yield f"--listen-peer-urls={peer}"
        yield f"--initial-advertise-peer-urls={peer}"
        yield f"--initial-cluster=default={peer}"

    def _api_server_flags(self) -> Iterator[str]:
        yield f"--etcd-servers=http://127.0.0.1:{self.etcd_port}"
        yield "--bind-address=127.0.0.1"
        yield "--advertise-address=127.0.0.1"
        yield f"--secure-port={self.port}"
        yield f"--cert-dir={self.directory}/pki"
        yield f"--token-auth-file={self.directory}/tokens.csv"
        yield "--authorization-mode=AlwaysAllow"
        yield "--disable-admission-plugins=ServiceAccount"
        yield "--service-account-issuer=https://e2e.invalid"
        yield f"--service-account-key-file={self.directory}/service-accounts.key"
        yield f"--service-account-signing-key-file={self.directory}/service-accounts.key"
        yield "--service-cluster-ip-range=10.254.254.0/24"
        yield "--endpoint-reconciler-type=none"
        yield "--kubelet-preferred-address-types=InternalIP"
        yield "--allow-privileged=true"


@contextmanager
def running_cluster(directory: Path) -> Iterator[Cluster]:
    cluster = Cluster(directory)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
