"""Measures how fast 100 MB flow through kubectl's exec, cp, attach, port-forward and logs, beside containerd.

Two nodes of one API server, one for each runtime, with the same OCI runtime and image, in one run, in turn (A B A B),
by both protocols of kubectl. A time is a whole call's, from kubectl's start to the last byte's arrival.
"""

import argparse
import hashlib
import math
import os
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.__main__ import CATATONIT, push_pause
from bench.peers import CONTAINERD, Bed, Peer, started
from tests.e2e.harness.cluster import Cluster, Kubectl, missing, running_cluster
from tests.e2e.harness.daemon import Daemon
from tests.e2e.harness.images import busybox_image
from tests.e2e.harness.kubelet import running_kubelet
from tests.e2e.harness.registry import Registry, running_registry
from tests.e2e.harness.sessions import forwarded, read_until
from tests.hugetlb import hugetlb_hierarchy

COMMANDS = ("apply", "attach", "cp", "exec", "get", "logs", "port-forward", "wait")
PEERS = ("crito", "containerd")
MEGABYTE = 1_000_000
TIMEOUT_S = 60
GIVES_PORT, TAKES_PORT = 8001, 8002
RECEIVED = b"received\n"
# Who opens the FIFO again before its last writer has closed it reads an end, and tries again.
SAY = "read word < /data/words && if [ $word = text ]; then cat /data/text; else echo $word; fi"
NO_ROTATION = {"containerLogMaxSize": "100Gi"}  # kubelet would compress what it rotates, meanwhile


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if os.geteuid() != 0 or not CONTAINERD or not CATATONIT.exists() or missing(COMMANDS):
        told = missing(COMMANDS) or "needs root, containerd and catatonit"
        print(f"bench.streams: not run: {told}", file=sys.stderr)
        return 2
    with (
        tempfile.TemporaryDirectory(prefix="crito-b-", ignore_cleanup_errors=True) as name,
        hugetlb_hierarchy(),
        running_registry(Path(name) / "registry") as registry,
        running_cluster(Path(name) / "cluster") as cluster,
        _daemon("crito", Path(name) / "a", registry) as ours,
        _daemon("containerd", Path(name) / "b", registry) as theirs,
        _pod(cluster, "crito", ours, registry, arguments.megabytes * MEGABYTE) as our_pod,
        _pod(cluster, "containerd", theirs, registry, arguments.megabytes * MEGABYTE) as their_pod,
    ):
        pods = {"crito": our_pod, "containerd": their_pod}
        websocket, spdy = _streams(cluster.kubectl), _streams(cluster.kubectl.with_spdy())
        rows = {
            **{f"{what}, websocket": way for what, way in websocket.items()},
            **{f"{what}, spdy": way for what, way in spdy.items()},
            **_logs(cluster.kubectl),
        }
        measured = {
            what: _measured(way, pods, arguments.rounds) for what, way in rows.items() if arguments.only in what
        }
    _print(measured, arguments)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.streams", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--only", default="", metavar="TEXT", help="the rows whose names have it")
    return parser


def _daemon(name: str, folder: Path, registry: Registry) -> AbstractContextManager[Daemon | Peer]:
    return started(name, folder, Bed(registry.host, Path("/usr/bin/runc"), push_pause(registry)))


# The pods


@dataclass(frozen=True, slots=True)
class Pod:
    """`folder` of this machine is the /data of its containers. It has `random` and `text`, which are sent around."""

    name: str
    folder: Path
    size_bytes: int

    @property
    def random(self) -> Path:
        return self.folder / "random"

    @property
    def text(self) -> Path:
        return self.folder / "text"

    @property
    def target(self) -> Path:
        """Where what was sent arrives, in the pod or here."""
        return self.folder / "target"

    def say(self, word: str) -> None:
        """To the container `logs`, which logs it; `text` makes it log that file."""
        (self.folder / "words").write_text(f"{word}\n")

    def containers(self, image: str) -> Iterator[dict[str, Any]]:
        serve = f"nc -ll -p {GIVES_PORT} -e cat /data/random & exec nc -ll -p {TAKES_PORT} -e sh -c"
        scripts = {
            "main": "exec sleep 100000",
            "takes": f"while :; do {self._take('attach')}; done",
            "gives": "while read line; do cat /data/random; done",
            "serves": f"{serve} '{self._take('port-forward')}'",
            "logs": f"while :; do {SAY}; done",
            "logged": "cat /data/text; exec sleep 100000",
        }
        mounts = [{"name": "data", "mountPath": "/data"}]
        for name, script in scripts.items():
            command = ["sh", "-c", script]
            yield {"name": name, "image": image, "command": command, "stdin": True, "volumeMounts": mounts}

    def _take(self, draft: str) -> str:
        """A script that makes the target of its input, without waiting for its end. It has `draft` open before."""
        count = self.size_bytes // MEGABYTE
        read = f"dd bs={MEGABYTE} count={count} iflag=fullblock of=/data/{draft}"
        return f"{read}; mv /data/{draft} /data/target; echo received"


@contextmanager
def _pod(cluster: Cluster, name: str, peer: Daemon | Peer, registry: Registry, size: int) -> Iterator[Pod]:
    """A pod on a node, both called `name`. The node's address is the bridge's, which the first pod makes."""
    pod = Pod(name, peer.directory / "data", size)
    pod.folder.mkdir()
    pod.random.write_bytes(os.urandom(size))
    pod.text.write_bytes(_lines(size))
    os.mkfifo(pod.folder / "words")
    client = peer.client()
    client.remove_pod(client.run_pod("warm-up").id)
    with running_kubelet(peer, membership=cluster.member(name, peer.network.gateway), settings=NO_ROTATION):
        cluster.wait_for_node(name)
        spec = {
            "nodeName": name,
            "containers": list(pod.containers(registry.push(busybox_image(), "bench/busybox", "1"))),
            "volumes": [{"name": "data", "hostPath": {"path": str(pod.folder)}}],
        }
        cluster.kubectl.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec})
        cluster.kubectl.wait_ready(name)
        yield pod
    client.remove_everything()
    client.close()


def _lines(size: int) -> bytes:
    """Text of `size` bytes, no line like another, of a usual length."""
    text = bytearray()
    while len(text) < size:
        text += b"%s\n" % os.urandom(100).hex().encode()
    return bytes(text[: size - 1]) + b"\n"


# The ways


@dataclass(frozen=True, slots=True)
class Way:
    """`run` moves the bytes of a pod's `source`, and returns when they are there; `target` is where they are then."""

    run: Callable[[Pod], None]
    source: Callable[[Pod], Path] = field(default=lambda pod: pod.random)

    def is_whole(self, pod: Pod) -> bool:
        return pod.target.exists() and _sha256(pod.target) == _sha256(self.source(pod))


def _streams(kubectl: Kubectl) -> dict[str, Way]:
    """Those for which a kubectl chooses the protocol."""

    def run(*arguments: str, stdin: Path = Path("/dev/null"), stdout: Path = Path("/dev/null")) -> None:
        command = kubectl.command(*arguments)
        with stdin.open("rb") as source, stdout.open("wb") as target:
            subprocess.run(command, stdin=source, stdout=target, check=True, timeout=TIMEOUT_S, env=kubectl.environment)

    def exec_in(pod: Pod) -> None:
        run("exec", "-i", pod.name, "-c", "main", "--", "sh", "-c", "cat > /data/target", stdin=pod.random)

    def exec_out(pod: Pod) -> None:
        run("exec", pod.name, "-c", "main", "--", "cat", "/data/random", stdout=pod.target)

    def cp_in(pod: Pod) -> None:
        run("cp", str(pod.random), f"{pod.name}:/data/target", "-c", "main")

    def cp_out(pod: Pod) -> None:
        run("cp", f"{pod.name}:/data/random", str(pod.target), "-c", "main")

    def attach_in(pod: Pod) -> None:
        with kubectl.session("attach", "-i", pod.name, "-c", "takes") as session:
            assert session.stdin is not None and session.stdout is not None
            _send(session.stdin.fileno(), pod)
            read_until(session.stdout.fileno(), RECEIVED, TIMEOUT_S)

    def attach_out(pod: Pod) -> None:
        with kubectl.session("attach", "-i", pod.name, "-c", "gives") as session:
            assert session.stdin is not None and session.stdout is not None
            session.stdin.write(b"now\n")
            _receive(session.stdout.fileno(), pod)

    def port_forward_in(pod: Pod) -> None:
        with _connected(kubectl, pod, TAKES_PORT) as connection:
            _send(connection.fileno(), pod)
            read_until(connection.fileno(), RECEIVED, TIMEOUT_S)

    def port_forward_out(pod: Pod) -> None:
        with _connected(kubectl, pod, GIVES_PORT) as connection:
            _receive(connection.fileno(), pod)

    return {
        "exec in": Way(exec_in),
        "exec out": Way(exec_out),
        "cp in": Way(cp_in),
        "cp out": Way(cp_out),
        "attach in": Way(attach_in),
        "attach out": Way(attach_out),
        "port-forward in": Way(port_forward_in),
        "port-forward out": Way(port_forward_out),
    }


def _logs(kubectl: Kubectl) -> dict[str, Way]:
    """kubelet serves them from the files that the runtime writes, by plain HTTP."""

    def while_written(pod: Pod) -> None:
        mark = f"mark-{time.monotonic_ns()}"
        pod.say(mark)
        with kubectl.session("logs", "-f", "--tail=1", pod.name, "-c", "logs") as session:
            assert session.stdout is not None
            read_until(session.stdout.fileno(), f"{mark}\n".encode(), TIMEOUT_S)
            pod.say("text")
            _receive(session.stdout.fileno(), pod)

    def already_there(pod: Pod) -> None:
        with kubectl.session("logs", "-f", pod.name, "-c", "logged") as session:
            assert session.stdout is not None
            _receive(session.stdout.fileno(), pod)

    def text(pod: Pod) -> Path:
        return pod.text

    return {"logs -f, being written": Way(while_written, text), "logs -f, there already": Way(already_there, text)}


@contextmanager
def _connected(kubectl: Kubectl, pod: Pod, port: int) -> Iterator[socket.socket]:
    with (
        forwarded(kubectl, pod.name, port) as (local,),
        socket.create_connection(("127.0.0.1", local), TIMEOUT_S) as connection,
    ):
        yield connection


def _send(fd: int, pod: Pod) -> None:
    """All of it, and no end: who closes may have its answer cut off."""
    rest = memoryview(pod.random.read_bytes())
    while rest and select.select([], [fd], [], TIMEOUT_S)[1]:
        rest = rest[os.write(fd, rest[: 1 << 16]) :]


def _receive(fd: int, pod: Pod) -> None:
    """Write what comes to the pod's target: as much as there is to come, or less where it ends, or stops, before."""
    left = pod.size_bytes
    with pod.target.open("wb") as target:
        while left and select.select([fd], [], [], TIMEOUT_S)[0] and (data := os.read(fd, min(left, 1 << 20))):
            target.write(data)
            left -= len(data)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# The measurement


def _measured(way: Way, pods: Mapping[str, Pod], rounds: int) -> dict[str, float]:
    """Each peer's median in seconds; infinity, without further rounds, once bytes of its were lost."""
    seconds: dict[str, list[float]] = {peer: [] for peer in PEERS}
    for _ in range(rounds):
        for peer in PEERS:
            if math.inf not in seconds[peer]:
                seconds[peer].append(_seconds(way, pods[peer]))
    return {peer: math.inf if math.inf in taken else statistics.median(taken) for peer, taken in seconds.items()}


def _seconds(way: Way, pod: Pod) -> float:
    """Infinity if not all bytes have come through."""
    pod.target.unlink(missing_ok=True)
    began = time.perf_counter()
    try:
        way.run(pod)
    except (EOFError, OSError, subprocess.SubprocessError) as error:
        print(f"bench.streams: {pod.name}: {error}", file=sys.stderr)
        return math.inf
    taken = time.perf_counter() - began
    return taken if way.is_whole(pod) else math.inf


def _print(measured: Mapping[str, Mapping[str, float]], arguments: argparse.Namespace) -> None:
    print(f"{arguments.megabytes} MB; medians of {arguments.rounds} rounds in turn, in seconds; {_version()}\n")
    print(f"| {'':27} | {'crito':>10} | {'containerd':>10} | ratio |")
    print(f"|:{'-' * 27}-|-{'-' * 10}:|-{'-' * 10}:|------:|")
    for what, medians in measured.items():
        shown = [f"{medians[peer]:.2f}" if math.isfinite(medians[peer]) else "bytes lost" for peer in PEERS]
        is_fair = all(map(math.isfinite, medians.values()))
        ratio = f"{medians['crito'] / medians['containerd']:.2f}" if is_fair else "-"
        print(f"| {what:27} | {shown[0]:>10} | {shown[1]:>10} | {ratio:>5} |")


def _version() -> str:
    told = subprocess.run([CONTAINERD, "--version"], capture_output=True, text=True, check=True).stdout.split()
    return f"containerd {told[2]}"


if __name__ == "__main__":
    sys.exit(main())
