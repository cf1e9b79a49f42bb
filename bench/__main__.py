"""Measures how long a pod takes to come up and what it costs, side by side with the containerd and the CRI-O in PATH.

All use the same OCI runtime, the same kind of CNI network and the same image, in one run, in turn (A B A B), so that
whatever else the machine does hits all. Ratios are worth more than the milliseconds.
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
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from bench.peers import MAKERS, Bed, Peer, started
from cri.api.runtime.v1 import api_pb2 as pb
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
class Measured:
    name: str
    daemon: Daemon | Peer
    client: Client
    times_ms: dict[str, list[float]] = field(default_factory=lambda: {step: [] for step in STEPS})
    memory_kib: dict[str, float] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if os.geteuid() != 0 or len(MAKERS) == 1 or not CATATONIT.exists():
        print("bench: not run: needs root, catatonit, and containerd or CRI-O", file=sys.stderr)
        return 2
    with (
        tempfile.TemporaryDirectory(prefix="crito-b-", ignore_cleanup_errors=True) as folder,
        hugetlb_hierarchy(),
        running_registry(Path(folder) / "registry") as registry,
        ExitStack() as stack,
    ):
        program = Path(shutil.which(arguments.runtime) or arguments.runtime)
        bed = Bed(registry.host, program, push_pause(registry))
        daemons = {name: stack.enter_context(started(name, Path(folder) / name, bed)) for name in MAKERS}
        peers = [Measured(name, daemon, daemon.client()) for name, daemon in daemons.items()]
        _warm_up(peers, registry)
        for _ in range(arguments.rounds):
            for peer in peers:
                _measure(peer, arguments.pods, registry)
        for peer in peers:
            _weigh(peer, arguments.weighed, registry)
    _print(peers, arguments)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({p.name: {"times_ms": p.times_ms, "memory_kib": p.memory_kib} for p in peers}, indent=1)
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    runtime = "crun" if shutil.which("crun") else "runc"
    parser.add_argument("--runtime", default=runtime, help="OCI runtime of all (CRI-O wants a new one)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pods", type=int, default=10, help="pods in a row, per round")
    parser.add_argument("--weighed", type=int, default=20, help="pods that are up when memory is measured")
    parser.add_argument("--json", type=Path, help="also write all figures there")
    return parser


def _warm_up(peers: Sequence[Measured], registry: Registry) -> None:
    reference = registry.push(busybox_image(), "bench/busybox", "1")
    for peer in peers:
        peer.client.pull(reference)
        for _ in range(2):
            _one_pod(peer, reference, "warm-up")
        for times in peer.times_ms.values():
            times.clear()


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


def _measure(peer: Measured, pods: int, registry: Registry) -> None:
    for number in range(pods):
        _one_pod(peer, f"{registry.host}/bench/busybox:1", f"bench-{number}")


def _one_pod(peer: Measured, reference: str, name: str) -> None:
    client = peer.client
    asked = client.pod_config(name, linux=_as_kubelet_asks())
    Path(asked.log_directory, "main").mkdir(parents=True)  # kubelet does that
    began = time.perf_counter()
    pod = client.run_pod(config=asked)
    ran = time.perf_counter()
    container_id = client.create(pod, client.container_config(reference, SLEEP, linux=_own_pids()))
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


def _as_kubelet_asks() -> pb.LinuxPodSandboxConfig:
    """A pod whose containers do not share their PID namespace, as of most pods: CRI-O keeps no pause for it."""
    options = pb.NamespaceOption(pid=pb.CONTAINER)
    return pb.LinuxPodSandboxConfig(security_context=pb.LinuxSandboxSecurityContext(namespace_options=options))


def _own_pids() -> pb.LinuxContainerConfig:
    options = pb.NamespaceOption(pid=pb.CONTAINER)
    return pb.LinuxContainerConfig(security_context=pb.LinuxContainerSecurityContext(namespace_options=options))


def _weigh(peer: Measured, pods: int, registry: Registry) -> None:
    """Memory with `pods` up: per pod all that runs beside the containers themselves, and the daemon."""
    up: dict[str, Pod] = {}
    for number in range(pods):
        asked = peer.client.pod_config(f"weigh-{number}", linux=_as_kubelet_asks())
        Path(asked.log_directory, "main").mkdir(parents=True)
        pod = peer.client.run_pod(config=asked)
        up[peer.client.run(pod, f"{registry.host}/bench/busybox:1", SLEEP, linux=_own_pids())] = pod
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
    for container_id, pod in up.items():
        peer.client.stop(container_id)
        peer.client.remove_pod(pod.id)


def _children(pid: int) -> set[int]:
    return {each.pid for each in leftovers.processes() if each.parent == pid}


def _print(peers: list[Measured], arguments: argparse.Namespace) -> None:
    print(f"{arguments.rounds} rounds of {arguments.pods} pods each, in turn; OCI runtime {arguments.runtime}; medians")
    print_header([peer.name for peer in peers])
    for step in STEPS:
        print_row(f"{step}, ms", [statistics.median(peer.times_ms[step]) for peer in peers], 1)
    for name in peers[0].memory_kib:
        print_row(f"{name}, KiB", [peer.memory_kib[name] for peer in peers], 0)


def print_header(names: Sequence[str]) -> None:
    """`names`: ours first; beside each of the others comes the ratio of ours to it."""
    others = "".join(f"{name:>12}{'ratio':>8}" for name in names[1:])
    print(f"{'':44}{names[0]:>12}{others}")


def print_row(title: str, values: Sequence[float], digits: int) -> None:
    ours, *theirs = values
    others = "".join(f"{each:12.{digits}f}" + (f"{ours / each:8.2f}" if each else f"{'-':>8}") for each in theirs)
    print(f"{title:44}{ours:12.{digits}f}{others}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
