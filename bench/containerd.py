"""The peer: the distribution's containerd, with roots, socket, network and cgroup parent of its own."""

import os
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import Any

import grpc

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.harness import toml
from tests.e2e.harness.client import Client
from tests.e2e.harness.daemon import destroy_owned
from tests.e2e.harness.leftovers import Owned
from tests.e2e.harness.network import PLUGIN_DIRS, BridgeNetwork
from tests.e2e.harness.ports import wait_until

PROGRAM = shutil.which("containerd") or ""


class Containerd:
    name = "containerd"

    def __init__(self, directory: Path, oci_runtime: Path, pause_image: str) -> None:
        self.directory = directory
        self.socket = directory / "containerd.sock"
        self.log = directory / "log"
        self.cgroup_parent = f"crito-peer-{uuid.uuid4().hex[:8]}"
        self.network = BridgeNetwork.choose(directory / "leases")
        self.owned = Owned(directory, directory / "root", directory / "state", self.cgroup_parent, self.network)
        self.process: subprocess.Popen[bytes] | None = None
        self._tables = self._configuration(oci_runtime, pause_image)
        directory.mkdir(parents=True, exist_ok=True)
        self.network.write(directory / "cni")

    def start(self) -> None:
        config = self.directory / "config.toml"
        config.write_text(toml.dumps(self._tables))
        # Its shims put their sockets below /run/containerd/s whatever the configuration says; they end with their pods.
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [PROGRAM, "--config", str(config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ
            )
        wait_until(self._answers, f"containerd answers (see {self.log})", 30, self.process)

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
        client = self.client()
        try:
            client.runtime.Version(pb.VersionRequest(), timeout=2)
        except grpc.RpcError:
            return False
        finally:
            client.close()
        return True

    def _configuration(self, oci_runtime: Path, pause_image: str) -> dict[str, Any]:
        plugins = next(folder for folder in PLUGIN_DIRS if (folder / "bridge").exists())
        handler = {
            "runtime_type": "io.containerd.runc.v2",
            "options": {"BinaryName": str(oci_runtime), "SystemdCgroup": False},
        }
        cri = {
            "sandbox_image": pause_image,
            "restrict_oom_score_adj": True,
            "stream_server_address": "127.0.0.1",
            "stream_server_port": "0",
            "containerd": {
                "snapshotter": "overlayfs",
                "default_runtime_name": "bench",
                "runtimes": {"bench": handler},
            },
            "cni": {"bin_dir": str(plugins), "conf_dir": str(self.directory / "cni")},
        }
        return {
            "version": 2,
            "root": str(self.directory / "root"),
            "state": str(self.directory / "state"),
            "grpc": {"address": str(self.socket)},
            "ttrpc": {"address": f"{self.socket}.ttrpc"},
            "plugins": {
                "io.containerd.grpc.v1.cri": cri,
                "io.containerd.internal.v1.opt": {"path": str(self.directory / "opt")},
            },
        }
