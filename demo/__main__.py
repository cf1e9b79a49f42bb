"""Shows Crito at work: a daemon of its own, a registry, a pull, a pod, and that nothing is left. `make demo`.

Everything lies in a temporary directory, on free ports, with a bridge of its own: it disturbs nothing on this machine.
"""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cri.api.runtime.v1 import api_pb2 as pb
from cri.cli_images import size
from oci.linux.cgroup import detect
from tests.e2e.harness import leftovers
from tests.e2e.harness.client import Client, Pod
from tests.e2e.harness.daemon import CRITO, Daemon
from tests.e2e.harness.images import BUSYBOX, Entry, TestImage, busybox_layer, image, layer
from tests.e2e.harness.network import missing_plugins
from tests.e2e.harness.registry import PROGRAM as REGISTRY
from tests.e2e.harness.registry import Registry, running_registry
from tests.hugetlb import hugetlb_hierarchy

PORT = 8080
IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
BALLAST_BYTES = 64 << 20
SERVER = f"""
echo Hello from $HOSTNAME
echo and from standard error >&2
mkdir /www
echo crito > /www/index.html
httpd -p {PORT} -h /www
trap 'exit 0' TERM
while true; do sleep 0.1; done
"""
# What the harness looks for, and what it is called here.
TRACES = {
    "processes": ("process", "processes"),
    "mounts": ("mount", "mounts"),
    "cgroups": ("cgroup", "cgroups"),
    "links": ("network link", "network links"),
    "leases": ("address", "addresses"),
    "firewall": ("firewall rule", "firewall rules"),
    "files": ("file", "files"),
}


def main() -> int:
    if why := _obstacle():
        print(f"demo: {why}", file=sys.stderr)
        return 1
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.enter_context(hugetlb_hierarchy())
        stack.callback(IP_FORWARD.write_text, IP_FORWARD.read_text())  # the bridge plugin turns it on
        directory = Path(tempfile.mkdtemp(prefix="crito-demo-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        _show(directory, stack)
    print(f"\nDone in {time.monotonic() - began:.1f} s.")
    return 0


def _obstacle() -> str:
    if os.geteuid() != 0:
        return "needs root: pods are namespaces, mounts and cgroups"
    programs = {"docker-registry": REGISTRY, "busybox-static": BUSYBOX.exists()}
    lacks = [name for name, there in programs.items() if not there]
    lacks += [f"CNI plugin {name}" for name in missing_plugins()]
    return f"this machine lacks {', '.join(lacks)}: run `make setup` as root" if lacks else ""


def _show(directory: Path, stack: contextlib.ExitStack) -> None:
    title("A registry, and a daemon of our own")
    registry = stack.enter_context(running_registry(directory / "registry"))
    made = _image()
    reference = registry.push(made, "demo/web", "v1")
    say("image", f"{reference}, {size(sum(len(each.data) for each in made.layers))} in 2 layers")
    daemon = Daemon(directory / "crito")
    stack.callback(daemon.destroy)
    _configure(daemon, registry)
    with timed("crito serve", "answers on its socket"):
        daemon.start()
    client = daemon.client()
    _describe(client, daemon)

    title("Pull")
    with timed("crito images pull", reference):
        pull = [str(CRITO), "images", "pull", reference, "--socket", str(daemon.socket)]
        subprocess.run(pull, check=True, stdout=subprocess.DEVNULL)
    _prepare(daemon)
    before = daemon.traces()

    title("A pod")
    with timed("run pod sandbox", "pause, namespaces, network"):
        pod = client.run_pod("web")
    ip = client.pod_status(pod.id).network.ip
    with timed("create and start", "a web server"):
        container = client.run(pod, reference, ["sh", "-c", SERVER])
    say("pod IP", f"{ip}, and http://{ip}:{PORT} answers {_fetch(ip)!r}")
    _log(client, pod)
    with timed("exec", ""):
        answer = client.exec_sync(container, ["sh", "-c", "id -u; hostname; ls /"])
    say("", " ".join(answer.stdout.decode().split()))
    _stats(client, container)

    title("The daemon is killed, and started again")
    started_at = client.status(container).started_at
    daemon.kill()
    say("kill -9 crito", f"http://{ip}:{PORT} still answers {_fetch(ip)!r}")
    with timed("crito serve", "picks everything up"):
        daemon.start()
    client = daemon.client()
    same = client.status(container).started_at == started_at
    say("container", f"{'running since before' if same else 'LOST'}; exec says {_exec(client, container, 'echo ok')!r}")

    title("Stop and remove")
    added = leftovers.added(before, daemon.traces())
    counted = [f"{len(added[kind])} {names[len(added[kind]) > 1]}" for kind, names in TRACES.items() if kind in added]
    say("the pod had", ", ".join(counted))
    with timed("stop container", "SIGTERM, and SIGKILL had it not ended in 10 s"):
        client.stop(container, grace_s=10)
    say("", f"exit code {client.status(container).exit_code}")
    with timed("remove container and pod", ""):
        client.remove(container)
        client.remove_pod(pod.id)
    _check_that_nothing_is_left(before, daemon)
    with timed("stop the daemon", ""):
        daemon.stop()


def _check_that_nothing_is_left(before: leftovers.Traces, daemon: Daemon) -> None:
    deadline = time.monotonic() + 5
    while left := leftovers.added(before, daemon.traces()):
        if time.monotonic() > deadline:
            raise SystemExit(f"demo: left behind: {left}\n{daemon.log_tail()}")
        time.sleep(0.05)
    say("what is left", "nothing: no process, mount, cgroup, network link, address, firewall rule or file")


def _image() -> TestImage:
    """Busybox and a layer of noise, so that there is something to pull."""
    base, diff_id = busybox_layer()
    noise, noise_diff_id = layer([Entry("noise", random.Random(1).randbytes(BALLAST_BYTES))])
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": [diff_id, noise_diff_id]},
    }
    return image(config, (base, noise))


def _prepare(daemon: Daemon) -> None:
    """What is not a pod's: its parent cgroup, which kubelet makes, and the daemon's own directories."""
    detect().make(f"/{daemon.cgroup_parent}")
    for directory in (daemon.root / "cni", daemon.run_dir / "sandboxes"):
        directory.mkdir(exist_ok=True)


def _configure(daemon: Daemon, registry: Registry) -> None:
    daemon.registries_conf.write_text(f'[[registry]]\nlocation = "{registry.host}"\ninsecure = true\n')


def _describe(client: Client, daemon: Daemon) -> None:
    version = client.runtime.Version(pb.VersionRequest(), timeout=10)
    status = client.runtime.Status(pb.StatusRequest(), timeout=10)
    handlers = ", ".join(sorted({each.name for each in status.runtime_handlers if each.name}))
    conditions = ", ".join(f"{each.type}={str(each.status).lower()}" for each in status.status.conditions)
    say("version", f"{version.runtime_name} {version.runtime_version}, CRI {version.runtime_api_version}; {handlers}")
    say("status", conditions)
    say("memory", f"{_rss(daemon.pid)} resident")


def _fetch(ip: str) -> str:
    deadline = time.monotonic() + 5
    while True:
        try:
            with urllib.request.urlopen(f"http://{ip}:{PORT}/", timeout=5) as answer:
                return str(answer.read().decode().strip())
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _log(client: Client, pod: Pod) -> None:
    path = Path(pod.config.log_directory) / "main" / "0.log"
    for line in path.read_text().splitlines():
        say("log", line)


def _exec(client: Client, container: str, script: str) -> str:
    return client.exec_sync(container, ["sh", "-c", script]).stdout.decode().strip()


def _stats(client: Client, container: str) -> None:
    request = pb.ContainerStatsRequest(container_id=container)
    stats: Any = client.runtime.ContainerStats(request, timeout=10).stats
    cpu_ms = stats.cpu.usage_core_nano_seconds.value / 1e6
    say(
        "stats",
        f"{cpu_ms:.1f} ms of CPU, {size(stats.memory.working_set_bytes.value)} of memory, "
        f"{size(stats.writable_layer.used_bytes.value)} written",
    )


def _rss(pid: int) -> str:
    status = Path(f"/proc/{pid}/status").read_text()
    return size(int(status.partition("VmRSS:")[2].split()[0]) * 1024)


def title(text: str) -> None:
    print(f"\n{text}", flush=True)


def say(what: str, text: str, took: str = "") -> None:
    print(f"  {what:<26}{took:>9}  {text}".rstrip(), flush=True)


@contextlib.contextmanager
def timed(what: str, text: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    say(what, text, f"{(time.monotonic() - started) * 1000:.0f} ms")


if __name__ == "__main__":
    sys.exit(main())
