"""What Crito is measured beside: containerd and CRI-O, with roots, socket, network and cgroup parent of their own."""

import os
import shutil
import subprocess
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.harness import toml
from tests.e2e.harness.client import Client
from tests.e2e.harness.daemon import Daemon, destroy_owned
from tests.e2e.harness.leftovers import Owned
from tests.e2e.harness.network import PLUGIN_DIRS, BridgeNetwork
from tests.e2e.harness.ports import wait_until

CONTAINERD = shutil.which("containerd") or ""
CRIO = shutil.which("crio") or ""
ACCEPT_ANYTHING = '{"default": [{"type": "insecureAcceptAnything"}]}'


@dataclass(frozen=True, slots=True)
class Bed:
    """What all of them are given."""

    registry: str  # HOST:PORT, plain HTTP
    oci_runtime: Path
    pause_image: str


class Peer(ABC):
    """A runtime of somebody else's; use Containerd or Crio."""

    name: str

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / f"{self.name}.sock"
        self.log = directory / "log"
        self.cgroup_parent = f"crito-peer-{uuid.uuid4().hex[:8]}"
        self.network = BridgeNetwork.choose(directory / "leases")
        self.owned = Owned(directory, directory / "root", directory / "run", self.cgroup_parent, self.network)
        self.process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        self.network.write(directory / "cni")

    @abstractmethod
    def command(self) -> Sequence[str]: ...

    def environment(self) -> Mapping[str, str]:
        return {}

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment()},
            )
        wait_until(self._answers, f"{self.name} answers (see {self.log})", 30, self.process)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def client(self) -> Client:
        return Client(self.socket, self.cgroup_parent, self.directory / "pod-logs", self.owned.ids)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def destroy(self) -> None:
        self.kill()
        destroy_owned(self.owned)

    def _answers(self) -> bool:
        with closing(self.client()) as client:
            return client.answers()


class Containerd(Peer):
    name = "containerd"

    def __init__(self, directory: Path, bed: Bed) -> None:
        super().__init__(directory)
        self._config = directory / "config.toml"
        self._config.write_text(toml.dumps(self._tables(bed)))

    def command(self) -> Sequence[str]:
        # Its shims put their sockets below /run/containerd/s whatever the configuration says; they end with their pods.
        return [CONTAINERD, "--config", str(self._config)]

    def _tables(self, bed: Bed) -> dict[str, Any]:
        handler = {
            "runtime_type": "io.containerd.runc.v2",
            "options": {"BinaryName": str(bed.oci_runtime), "SystemdCgroup": False},
        }
        cri = {
            "sandbox_image": bed.pause_image,
            "restrict_oom_score_adj": True,
            "stream_server_address": "127.0.0.1",
            "stream_server_port": "0",
            "containerd": {
                "snapshotter": "overlayfs",
                "default_runtime_name": "bench",
                "runtimes": {"bench": handler},
            },
            "cni": {"bin_dir": str(_plugins()), "conf_dir": str(self.directory / "cni")},
        }
        return {
            "version": 2,
            "root": str(self.owned.root),
            "state": str(self.owned.run_dir),
            "grpc": {"address": str(self.socket)},
            "ttrpc": {"address": f"{self.socket}.ttrpc"},
            "plugins": {
                "io.containerd.grpc.v1.cri": cri,
                "io.containerd.internal.v1.opt": {"path": str(self.directory / "opt")},
            },
        }


class Crio(Peer):
    name = "cri-o"

    def __init__(self, directory: Path, bed: Bed) -> None:
        super().__init__(directory)
        self._config = directory / "crio.conf"
        self._config.write_text(toml.dumps(self._tables(bed)))
        (directory / "policy.json").write_text(ACCEPT_ANYTHING)
        (directory / "registries.conf").write_text(f'[[registry]]\nlocation = "{bed.registry}"\ninsecure = true\n')
        (directory / "storage.conf").write_text("")

    def command(self) -> Sequence[str]:
        registries = str(self.directory / "registries.conf")
        return [CRIO, "--config", str(self._config), "--config-dir", "", "--registries-conf", registries]

    def environment(self) -> Mapping[str, str]:
        return {"CONTAINERS_STORAGE_CONF": str(self.directory / "storage.conf")}

    def _tables(self, bed: Bed) -> dict[str, Any]:
        run_dir = self.owned.run_dir
        return {
            "crio": {
                "root": str(self.owned.root),
                "runroot": str(run_dir / "storage"),
                "storage_driver": "overlay",
                "log_dir": str(self.directory / "logs"),
                "version_file": str(run_dir / "version"),
                "version_file_persist": str(self.directory / "version"),
                "clean_shutdown_file": str(self.directory / "clean"),
                "api": {"listen": str(self.socket), "stream_port": "0"},
                "runtime": {
                    "cgroup_manager": "cgroupfs",
                    "default_runtime": "bench",
                    "apparmor_profile": "unconfined",
                    "namespaces_dir": str(run_dir / "ns"),
                    "container_exits_dir": str(run_dir / "exits"),
                    "container_attach_socket_dir": str(run_dir / "attach"),
                    "hooks_dir": [str(self.directory / "hooks")],
                    "runtimes": {
                        "bench": {
                            "runtime_path": str(bed.oci_runtime),
                            "runtime_root": str(run_dir / "oci"),
                            "monitor_path": shutil.which("conmon") or "",
                            "monitor_cgroup": "pod",
                        }
                    },
                },
                "image": {"pause_image": bed.pause_image, "signature_policy": str(self.directory / "policy.json")},
                "network": {"network_dir": str(self.directory / "cni"), "plugin_dirs": [str(_plugins())]},
                "metrics": {"enable_metrics": False},
            }
        }


def _plugins() -> Path:
    return next(folder for folder in PLUGIN_DIRS if (folder / "bridge").exists())


def _crito(directory: Path, bed: Bed) -> Daemon:
    handlers = {bed.oci_runtime.name: {"path": str(bed.oci_runtime)}}
    runtime = {"default_handler": bed.oci_runtime.name, "handlers": handlers}
    daemon = Daemon(directory, {"runtime": runtime, "log": {"level": "info"}})
    daemon.registries_conf.write_text(f'[[registry]]\nlocation = "{bed.registry}"\ninsecure = true\n')
    return daemon


# Ours first, then what is installed of the others.
MAKERS: dict[str, Callable[[Path, Bed], Daemon | Peer]] = {
    "crito": _crito,
    **({Containerd.name: Containerd} if CONTAINERD else {}),
    **({Crio.name: Crio} if CRIO else {}),
}


@contextmanager
def started(name: str, directory: Path, bed: Bed) -> Iterator[Daemon | Peer]:
    """One of MAKERS, which is destroyed at the end."""
    daemon = MAKERS[name](directory, bed)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.destroy()
