"""A containerd of its own that pulls images and mounts them; it runs no containers, and nothing of it stays."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.harness import toml
from tests.e2e.harness.ports import wait_until

PROGRAM = shutil.which("containerd") or ""
CTR = shutil.which("ctr") or ""
_NEEDLESS = ("grpc.v1.cri", "internal.v1.restart", "snapshotter.v1.aufs", "snapshotter.v1.btrfs", "snapshotter.v1.zfs")


class Refused(Exception):
    """What containerd says of an image that it does not take."""


@dataclass(frozen=True, slots=True)
class ImageContainerd:
    socket: Path

    @contextmanager
    def mounted(self, reference: str, at: Path) -> Iterator[Path]:
        """The image that the plain HTTP registry of `reference` has, as its containers see it. Raises Refused."""
        pulled = self._ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", reference)
        if pulled.returncode:
            raise Refused(pulled.stderr)
        at.mkdir()
        mounted = self._ctr("images", "mount", "--snapshotter", "overlayfs", reference, str(at))
        if mounted.returncode:
            raise Refused(mounted.stderr)
        try:
            yield at
        finally:
            self._ctr("images", "unmount", "--rm", "--snapshotter", "overlayfs", str(at))

    def answers(self) -> bool:
        return self._ctr("version").returncode == 0

    def _ctr(self, *words: str) -> "subprocess.CompletedProcess[str]":
        command = [CTR, "--address", str(self.socket), "--namespace", "test", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@contextmanager
def running_containerd(directory: Path) -> Iterator[ImageContainerd]:
    """One whose root, state and sockets lie in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    socket, config, log = (directory / name for name in ("containerd.sock", "config.toml", "log"))
    tables = {
        "version": 2,
        "root": str(directory / "root"),
        "state": str(directory / "state"),
        "disabled_plugins": [f"io.containerd.{plugin}" for plugin in _NEEDLESS],
        "grpc": {"address": str(socket)},
        "ttrpc": {"address": f"{socket}.ttrpc"},
        "plugins": {"io.containerd.internal.v1.opt": {"path": str(directory / "opt")}},
    }
    config.write_text(toml.dumps(tables))
    with log.open("wb") as written:
        process = subprocess.Popen(
            [PROGRAM, "--config", str(config)], stdin=subprocess.DEVNULL, stdout=written, stderr=written
        )
    try:
        found = ImageContainerd(socket)
        wait_until(found.answers, f"containerd answers (see {log})", process=process)
        yield found
    finally:
        process.kill()  # it has no children
        process.wait()
