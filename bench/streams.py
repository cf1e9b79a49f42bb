"""Measures how fast 100 MB flow through `kubectl exec` and `kubectl cp`, beside the distribution's containerd.

Two nodes of one API server, one for each runtime, with the same OCI runtime and image, in one run, in turn (A B A B).
containerd is always asked by SPDY: older ones break off WebSocket sessions with a lot of input.
"""

import argparse
import hashlib
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.__main__ import CATATONIT, push_pause
from bench.peers import CONTAINERD, Bed, Peer, started
from tests.e2e.harness.cluster import Cluster, Kubectl, missing, running_cluster
from tests.e2e.harness.daemon import Daemon
from tests.e2e.harness.images import busybox_image
from tests.e2e.harness.kubelet import running_kubelet
from tests.e2e.harness.registry import Registry, running_registry
from tests.hugetlb import hugetlb_hierarchy

COMMANDS = ("apply", "cp", "exec", "get", "wait")
TIMEOUT_S = 300


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if os.geteuid() != 0 or not CONTAINERD or not CATATONIT.exists() or missing(COMMANDS):
        told = missing(COMMANDS) or "needs root, containerd and catatonit"
        print(f"bench.streams: not run: {told}", file=sys.stderr)
        return 2
    seconds: dict[str, dict[str, list[float]]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="crito-b-", ignore_cleanup_errors=True) as name,
        hugetlb_hierarchy(),
        running_registry(Path(name) / "registry") as registry,
        running_cluster(Path(name) / "cluster") as cluster,
        _daemon("crito", Path(name) / "a", registry) as ours,
        _daemon("containerd", Path(name) / "b", registry) as theirs,
        _node(cluster, "crito", ours, registry),
        _node(cluster, "containerd", theirs, registry),
    ):
        file = Path(name) / "big"
        file.write_bytes(os.urandom(arguments.bytes))
        spdy = cluster.kubectl.with_spdy()
        theirs_by = _copies(spdy, file, Path(name) / "back")
        for protocol, kubectl in (("websocket", cluster.kubectl), ("spdy", spdy)):
            ours_by = _copies(kubectl, file, Path(name) / "back")
            for _ in range(arguments.rounds):
                for what in ours_by:
                    times = seconds.setdefault(f"{what}, {protocol}", {"crito": [], "containerd": []})
                    times["crito"].append(_seconds(ours_by[what], "crito"))
                    times["containerd"].append(_seconds(theirs_by[what], "containerd"))
    _print(seconds, arguments)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.streams", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bytes", type=int, default=100_000_000)
    return parser


def _daemon(name: str, folder: Path, registry: Registry) -> AbstractContextManager[Daemon | Peer]:
    return started(name, folder, Bed(registry.host, Path("/usr/bin/runc"), push_pause(registry)))


@contextmanager
def _node(cluster: Cluster, name: str, peer: Daemon | Peer, registry: Registry) -> Iterator[None]:
    """A node with one pod, both called `name`. Its address is the bridge's, which the first pod makes."""
    reference = registry.push(busybox_image(), "bench/busybox", "1")
    client = peer.client()
    client.remove_pod(client.run_pod("warm-up").id)
    with running_kubelet(peer, membership=cluster.member(name, peer.network.gateway)):
        cluster.wait_for_node(name)
        main = {"name": "main", "image": reference, "command": ["sleep", "100000"]}
        mounts = [{"name": "data", "mountPath": "/data"}]
        spec = {
            "nodeName": name,
            "containers": [{**main, "volumeMounts": mounts}],
            "volumes": [{"name": "data", "emptyDir": {}}],
        }
        cluster.kubectl.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec})
        cluster.kubectl.wait_ready(name)
        yield
    client.remove_everything()
    client.close()


@dataclass(frozen=True, slots=True)
class Copy:
    """`run` copies to or from a pod, `is_whole` tells afterwards whether everything has arrived."""

    run: Callable[[str], None]
    is_whole: Callable[[str], bool]


def _copies(kubectl: Kubectl, file: Path, back: Path) -> dict[str, Copy]:
    def run(*arguments: str, stdin: Path = Path("/dev/null"), stdout: Path = Path("/dev/null")) -> None:
        command = kubectl.command(*arguments)
        with stdin.open("rb") as source, stdout.open("wb") as target:
            subprocess.run(command, stdin=source, stdout=target, check=True, timeout=TIMEOUT_S, env=kubectl.environment)

    def is_in(pod: str, name: str) -> bool:
        return kubectl("exec", pod, "--", "sha256sum", f"/data/{name}").split()[0] == _sha256(file)

    def is_back(pod: str) -> bool:
        return _sha256(back) == _sha256(file)

    return {
        "exec in": Copy(
            lambda pod: run("exec", "-i", pod, "--", "sh", "-c", "cat > /data/by-exec", stdin=file),
            lambda pod: is_in(pod, "by-exec"),
        ),
        "cp in": Copy(lambda pod: run("cp", str(file), f"{pod}:/data/by-cp"), lambda pod: is_in(pod, "by-cp")),
        "exec out": Copy(lambda pod: run("exec", pod, "--", "cat", "/data/by-cp", stdout=back), is_back),
        "cp out": Copy(lambda pod: run("cp", f"{pod}:/data/by-cp", str(back)), is_back),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seconds(copy: Copy, pod: str) -> float:
    """Infinity if not all bytes have come through."""
    began = time.perf_counter()
    copy.run(pod)
    taken = time.perf_counter() - began
    return taken if copy.is_whole(pod) else math.inf


def _print(seconds: dict[str, dict[str, list[float]]], arguments: argparse.Namespace) -> None:
    print(f"{arguments.bytes / 1e6:.0f} MB, {arguments.rounds} rounds in turn; medians of seconds")
    print(f"{'':24}{'crito':>12}{'containerd':>12}{'ratio':>8}")
    for what, taken in seconds.items():
        medians = [statistics.median(taken[peer]) for peer in ("crito", "containerd")]
        shown = [f"{each:12.2f}" if math.isfinite(each) else f"{'bytes lost':>12}" for each in medians]
        ratio = f"{medians[0] / medians[1]:8.2f}" if all(map(math.isfinite, medians)) else f"{'-':>8}"
        print(f"{what:24}{''.join(shown)}{ratio}")


if __name__ == "__main__":
    sys.exit(main())
