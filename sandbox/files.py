"""The files that every container of a pod sees: resolv.conf, hostname, hosts and /dev/shm.

    <directory>/resolv.conf  hostname  hosts
    <directory>/shm/            a tmpfs, where the pod has an IPC namespace of its own

Synchronous; called in a pool.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from oci.container_spec import NamespaceMode
from oci.linux import mount
from sandbox.spec import SandboxSpec

SHM_SIZE_BYTES = 64 * 1024 * 1024  # what Docker, containerd and CRI-O give
NODE_SHM = "/dev/shm"

_HOSTS = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::0\tip6-localnet
fe00::0\tip6-mcastprefix
fe00::1\tip6-allnodes
fe00::2\tip6-allrouters
"""


@dataclass(frozen=True, slots=True)
class PodFiles:
    """Absolute paths of what is mounted into the containers."""

    resolv_conf: str
    hostname: str
    hosts: str
    shm: str


def paths(spec: SandboxSpec, directory: Path) -> PodFiles:
    own_shm = spec.security.ipc is NamespaceMode.POD
    return PodFiles(
        resolv_conf=str(directory / "resolv.conf"),
        hostname=str(directory / "hostname"),
        hosts=str(directory / "hosts"),
        shm=str(directory / "shm") if own_shm else NODE_SHM,
    )


def write(spec: SandboxSpec, directory: Path, hostname: str, ips: tuple[str, ...]) -> None:
    """Make the pod's files in `directory`, which exists. Raises OSError; `remove` undoes a half-done one."""
    files = paths(spec, directory)
    Path(files.resolv_conf).write_text(_resolv_conf(spec), errors="surrogateescape")
    Path(files.hostname).write_text(hostname + "\n")
    Path(files.hosts).write_text(_hosts(spec, hostname, ips), errors="surrogateescape")
    if files.shm != NODE_SHM:
        Path(files.shm).mkdir(exist_ok=True)
        mount.tmpfs(Path(files.shm), SHM_SIZE_BYTES, mode=0o1777)


def remove(directory: Path) -> None:
    """Take away what `write` made, as much as there is of it, and the directory."""
    shm = directory / "shm"
    if shm.exists():
        mount.unmount(shm)
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        raise OSError(f"{directory} cannot be removed: {[entry.name for entry in directory.iterdir()]} stay")


def _resolv_conf(spec: SandboxSpec) -> str:
    dns = spec.dns
    if dns is None or not (dns.servers or dns.searches or dns.options):
        return _node_file("/etc/resolv.conf")
    lines = []
    if dns.searches:
        lines.append("search " + " ".join(dns.searches))
    lines += [f"nameserver {server}" for server in dns.servers]
    if dns.options:
        lines.append("options " + " ".join(dns.options))
    return "\n".join(lines) + "\n"


def _hosts(spec: SandboxSpec, hostname: str, ips: tuple[str, ...]) -> str:
    if spec.security.network is NamespaceMode.NODE:
        return _node_file("/etc/hosts")
    return _HOSTS + "".join(f"{ip}\t{hostname}\n" for ip in ips)


def _node_file(path: str) -> str:
    try:
        return Path(path).read_text(errors="surrogateescape")
    except FileNotFoundError:
        return ""
