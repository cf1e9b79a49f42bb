"""The virtual machine as a node: Crito's unit as it is installed, the default directories, the CNI network we ship."""

import os
import re
import shutil
import subprocess
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.harness.client import Client
from tests.e2e.harness.ports import wait_until

TREE = Path(__file__).parents[2]
SOCKET = Path("/run/crito/crito.sock")
UNIT = Path("/etc/systemd/system/crito.service")
DROP_INS = Path("/run/systemd/system/crito.service.d")
LOGS = Path("/var/log/pods")
LEASES = Path("/var/lib/cni/networks/crito")
PARENT = "kubepods.slice"

only_in_the_machine = pytest.mark.skipif(
    "V2VM" not in os.environ, reason="changes the whole machine: `tests/vm/run` gives it one of its own"
)


def install(registry: str) -> None:
    """What an administrator does, with images from `registry` (HOST:PORT)."""
    shutil.copy(TREE / "deploy/systemd/crito.service", UNIT)
    for folder in ("/etc/crito", "/etc/cni/net.d", "/etc/containers"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(TREE / "deploy/cni/10-crito-bridge.conflist", "/etc/cni/net.d/")
    Path("/etc/crito/crito.toml").write_text('[network]\nplugin_dirs = ["/opt/cni/bin", "/usr/lib/cni"]\n')
    Path("/etc/containers/registries.conf").write_text(f'[[registry]]\nlocation = "{registry}"\ninsecure = true\n')
    systemctl("daemon-reload")


def settle_packages() -> None:
    """Copy what the daemon imports to the machine's own disk: at boot the service starts before folders are shared."""
    home = Path(sysconfig.get_path("purelib"))
    names, seen = ["crito"], set[str]()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for other Pythons or systems
            continue
        names += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in found.requires or [] if "extra ==" not in line]
        for file in {each.parts[0] for each in found.files or [] if each.parts[0] not in ("..", "__pycache__")}:
            source = Path(str(found.locate_file(file)))
            if source.is_dir():
                shutil.copytree(source, home / file, dirs_exist_ok=True)
            elif source.suffix != ".pth" and not source.name.startswith("__editable__"):
                shutil.copy(source, home)


def configure_unit(text: str) -> None:
    """A drop-in of the unit until the next boot; "" takes it away."""
    DROP_INS.mkdir(parents=True, exist_ok=True)
    (DROP_INS / "test.conf").write_text(text)
    systemctl("daemon-reload")


def systemctl(*arguments: str) -> str:
    done = subprocess.run(["systemctl", *arguments], check=False, capture_output=True, text=True, timeout=150)
    if done.returncode != 0:
        raise RuntimeError(f"systemctl {' '.join(arguments)}: {done.stderr}\n{journal()}")
    return done.stdout.strip()


def show(name: str) -> str:
    """A property of the unit."""
    return systemctl("show", "--value", "--property", name, "crito.service")


def journal(lines: int = 40) -> str:
    command = ["journalctl", "--no-pager", "--output=cat", f"--lines={lines}", "--unit=crito.service"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main_pid() -> int:
    return int(show("MainPID"))


def connected() -> Client:
    return Client(SOCKET, PARENT, LOGS, set())


def wait_for_another_daemon(old_pid: int, timeout_s: float = 30) -> None:
    """Until systemd has started a daemon that is not `old_pid`, and calls it active: it answers then."""
    wait_until(
        lambda: show("ActiveState") == "active" and main_pid() not in (0, old_pid),
        "another daemon is active",
        timeout_s,
    )


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def pid_of(client: Client, container_id: str) -> int:
    """The container's first process, as the host knows it."""
    for procs in Path("/sys/fs/cgroup").glob(f"**/crito-{container_id}.scope/**/cgroup.procs"):
        if pids := procs.read_text().split():
            return int(pids[0])
    raise LookupError(f"no process of container {container_id}: {client.status(container_id)}")


def leases() -> list[str]:
    return sorted(each.name for each in LEASES.glob("10.*")) if LEASES.is_dir() else []


def leftovers(ids: list[str]) -> list[str]:
    """What the node still has of pods and containers with these ids."""
    found = [f"lease {each}" for each in leases()]
    found += [f"link {each.name}" for each in Path("/sys/class/net/crito0/brif").glob("*")]
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        found += [f"mount {line.split()[4]}" for id in ids if id in line]
    for top in ("/sys/fs/cgroup", "/run/crito", "/var/lib/crito"):
        for folder, _, _ in os.walk(top):
            found += [folder for id in ids if id in Path(folder).name]
    units = systemctl("list-units", "--all", "--no-legend", "--plain")
    return found + [f"unit {line.split()[0]}" for line in units.splitlines() if any(id in line for id in ids)]


def wait_until_nothing_is_left(ids: list[str], timeout_s: float = 10) -> None:
    try:
        wait_until(lambda: not leftovers(ids), "nothing is left", timeout_s)
    except TimeoutError:
        raise AssertionError("left behind:\n" + "\n".join(leftovers(ids))) from None


def is_ready(client: Client) -> bool:
    conditions = client.runtime.Status(pb.StatusRequest(), timeout=10).status.conditions
    return all(each.status for each in conditions)
