"""Measures how long a pod takes to come up and what it costs, side by side with the distribution's containerd.

Both use the same OCI runtime, the same kind of CNI network and the same image, in one run, in turn (A B A B), so that
whatever else the machine does hits both. Ratios are worth more than the milliseconds.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.containerd import PROGRAM, Containerd
from tests.e2e.harness import leftovers
from tests.e2e.harness.client import Client, Pod
from tests.e2e.harness.daemon import FORK_SERVER, Daemon
from tests.e2e.harness.images import Entry, busybox_image, image, layer
from tests.e2e.harness.memory import pss_kib, rss_kib, support_of
from tests.e2e.harness.registry import Registry, running_registry
from tests.hugetlb import hugetlb_hierarchy

CATATONIT = Path("/usr/bin/catatonit")
SLEEP = ["sleep", "100000"]
SETTLED_S = 5.0  # before memory is measured: nothing happens in the pods any more
STEPS = ("run pod", "create", "start", "pod up", "exec", "stop and remove")


@dataclass
class Peer:
    name: str
    daemon: Daemon | Containerd
    client: Client
    times_ms: dict[str, list[float]] = field(default_factory=lambda: {step: [] for step in STEPS})
    memory_kib: dict[str, float] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if os.geteuid() != 0 or not PROGRAM or not CATATONIT.exists():
        print("bench: not run: needs root, containerd and catatonit", file=sys.stderr)
        return 2
    with (
        tempfile.TemporaryDirectory(prefix="crito-b-", ignore_cleanup_errors=True) as folder,
        hugetlb_hierarchy(),
        running_registry(Path(folder) / "registry") as registry,
    ):
        peers: list[Peer] = []
        try:
            peers = _start(Path(folder), registry, arguments.runtime)
            for _ in range(arguments.rounds):
                for peer in peers:
                    _measure(peer, arguments.pods, registry)
            for peer in peers:
                _weigh(peer, arguments.weighed, registry)
        finally:
            for peer in peers:
                peer.daemon.destroy()
    _print(peers, arguments)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({p.name: {"times_ms": p.times_ms, "memory_kib": p.memory_kib} for p in peers}, indent=1)
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--runtime", default="crun" if shutil.which("crun") else "runc", help="OCI runtime of both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pods", type=int, default=10, help="pods in a row, per round")
    parser.add_argument("--weighed", type=int, default=20, help="pods that are up when memory is measured")
    parser.add_argument("--json", type=Path, help="also write all figures there")
    return parser


def _start(folder: Path, registry: Registry, runtime: str) -> list[Peer]:
    reference = registry.push(busybox_image(), "bench/busybox", "1")
    program = Path(shutil.which(runtime) or runtime)
    ours = Daemon(folder / "a", {"runtime": {"default_handler": runtime}, "log": {"level": "info"}})
    ours.registries_conf.write_text(f'[[registry]]\nlocation = "{registry.host}"\ninsecure = true\n')
    theirs = Containerd(folder / "b", program, push_pause(registry))
    peers = []
    for name, daemon in (("crito", ours), ("containerd", theirs)):
        daemon.start()
        peer = Peer(name, daemon, daemon.client())
        peer.client.pull(reference)
        for _ in range(2):
            _one_pod(peer, reference, "warm-up")
        for times in peer.times_ms.values():
            times.clear()
        peers.append(peer)
    return peers


def push_pause(registry: Registry) -> str:
    """containerd's pause comes as an image; it gets the same program as ours."""
    blob, diff_id = layer([Entry("catatonit", CATATONIT.read_bytes(), 0o755)])
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": ["/catatonit", "-P"]},
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
    }
    return registry.push(image(config, (blob,)), "bench/pause", "1")


def _measure(peer: Peer, pods: int, registry: Registry) -> None:
    for number in range(pods):
        _one_pod(peer, f"{registry.host}/bench/busybox:1", f"bench-{number}")


def _one_pod(peer: Peer, reference: str, name: str) -> None:
    client = peer.client
    began = time.perf_counter()
    pod = client.run_pod(name)
    ran = time.perf_counter()
    container_id = client.create(pod, client.container_config(reference, SLEEP))
    created = time.perf_counter()
    client.start(container_id)
    started = time.perf_counter()
    client.exec_sync(container_id, ["true"])
    executed = time.perf_counter()
    client.stop(container_id)
    client.remove_pod(pod.id)
    removed = time.perf_counter()
    for step, first, last in zip(
        STEPS,
        (began, ran, created, began, started, executed),
        (ran, created, started, started, executed, removed),
        strict=True,
    ):
        peer.times_ms[step].append((last - first) * 1000)


def _weigh(peer: Peer, pods: int, registry: Registry) -> None:
    """Memory with `pods` up: per pod all that runs beside the containers themselves, and the daemon."""
    up: list[Pod] = []
    for number in range(pods):
        pod = peer.client.run_pod(f"weigh-{number}")
        peer.client.run(pod, f"{registry.host}/bench/busybox:1", SLEEP)
        up.append(pod)
    time.sleep(SETTLED_S)
    daemon = peer.daemon
    assert daemon.process is not None
    spared = {daemon.process.pid}
    fork_server = [each.pid for each in leftovers.owned_processes(daemon.owned, spared) if each.name in FORK_SERVER]
    support = support_of(daemon.owned, {*spared, *fork_server, *_children(daemon.process.pid)})
    peer.memory_kib = {
        "per pod, PSS (monitor or shim, and pause)": sum(map(pss_kib, support)) / pods,
        "daemon, RSS": rss_kib(daemon.process.pid),
        "fork server, PSS": sum(map(pss_kib, fork_server)),
    }
    for pod in up:
        peer.client.remove_pod(pod.id)


def _children(pid: int) -> set[int]:
    return {each.pid for each in leftovers.processes() if each.parent == pid}


def _print(peers: list[Peer], arguments: argparse.Namespace) -> None:
    ours, theirs = peers
    print(f"{arguments.rounds} rounds of {arguments.pods} pods each, in turn; OCI runtime {arguments.runtime}; medians")
    print(f"{'':44}{ours.name:>12}{theirs.name:>12}{'ratio':>8}")
    for step in STEPS:
        first, second = statistics.median(ours.times_ms[step]), statistics.median(theirs.times_ms[step])
        print(f"{step + ', ms':44}{first:12.1f}{second:12.1f}{first / second:8.2f}")
    for name in ours.memory_kib:
        first, second = ours.memory_kib[name], theirs.memory_kib[name]
        ratio = f"{first / second:8.2f}" if second else f"{'-':>8}"
        print(f"{name + ', KiB':44}{first:12.0f}{second:12.0f}{ratio}")


if __name__ == "__main__":
    sys.exit(main())
