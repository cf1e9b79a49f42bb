"""A daemon of the tests' own: everything of it lies in one directory, and it goes without leaving anything."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.e2e.harness import cgroups, leftovers, toml
from tests.e2e.harness.client import Client
from tests.e2e.harness.leftovers import Owned
from tests.e2e.harness.network import PLUGIN_DIRS, BridgeNetwork
from tests.e2e.harness.ports import wait_until

FORK_SERVER = ("crito-forks", "crito-zygote")
CRITO = Path(os.environ.get("CRITO_TEST_PROGRAM") or Path(sys.executable).with_name("crito"))


class Daemon:
    """One `crito serve` with roots, socket, CNI network and cgroup parent of its own.

    `settings` are tables of the configuration file, over those that are made here. A change to `settings` or
    `environment` shows at the next start.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any] | None = None, program: Path = CRITO) -> None:
        self.directory = directory
        self.program = program
        self.root = directory / "root"
        self.run_dir = directory / "run"
        self.socket = self.run_dir / "crito.sock"
        self.logs = directory / "pod-logs"
        self.log = directory / "daemon.log"
        self.cni_conf = directory / "cni"
        self.registries_conf = directory / "registries.conf"
        self.cgroup_parent = cgroups.parent(f"crito-e2e-{uuid.uuid4().hex[:8]}")
        self.network = BridgeNetwork.choose(directory / "leases")
        self.owned = Owned(directory, self.root, self.run_dir, self.cgroup_parent, self.network)
        self.settings: dict[str, Any] = dict(settings or {})
        self.environment: dict[str, str] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self._clients: list[Client] = []
        for folder in (self.run_dir, self.logs, directory / "registries.conf.d", directory / "certs.d"):
            folder.mkdir(parents=True, exist_ok=True)
        self._mount_run_dir()
        self.registries_conf.write_text("")
        (directory / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        self.network.write(self.cni_conf)

    # Life

    def start(self, timeout_s: float = 30) -> None:
        """Start it, and return when it answers."""
        config = self.directory / "crito.toml"
        config.write_text(toml.dumps(self._tables()))
        command = [str(self.program), "serve", "--config", str(config)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        try:
            wait_until(self._answers, "the daemon answers", timeout_s, self.process)
        except (RuntimeError, TimeoutError) as error:
            raise RuntimeError(f"{error}\n{self.log_tail(15)}") from None

    def stop(self, timeout_s: float = 30) -> int:
        """Ask it to end; its exit status."""
        assert self.process is not None
        self.process.terminate()
        try:
            return self.process.wait(timeout_s)
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL: what a crash looks like."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    # What is asked of it

    def client(self) -> Client:
        client = Client(self.socket, self.cgroup_parent, self.logs, self.owned.ids)
        self._clients.append(client)
        return client

    def traces(self) -> leftovers.Traces:
        return leftovers.traces(self.owned, self.own_processes())

    def nothing_added(self, before: leftovers.Traces, timeout_s: float = 5.0) -> None:
        try:
            leftovers.nothing_added(before, self.owned, self.own_processes(), timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\nthe daemon's log:\n{self.log_tail(15)}") from None

    def own_processes(self) -> list[int]:
        """The daemon, its children (layer workers), its fork server and its stream server: what lives without pods."""
        pid = self.process.pid if self.process is not None else -1
        return [
            each.pid
            for each in leftovers.processes()
            if pid in (each.pid, each.parent) or (_is_server(each) and self.owned.is_mark(each.marks))
        ]

    def lose_memory(self) -> None:
        """What a reboot does while the daemon is not running: all in memory ends, and the boot id is another one."""
        destroy_owned(self.owned)
        self._mount_run_dir()
        with contextlib.closing(sqlite3.connect(self.root / "state.db")) as database, database:
            changed = database.execute("UPDATE facts SET value = ? WHERE id = 'boot_id'", (str(uuid.uuid4()),))
            assert changed.rowcount == 1

    def destroy(self) -> None:
        """End and remove everything of it by force, whatever state it is in."""
        for client in self._clients:
            client.close()
        self.kill()
        destroy_owned(self.owned)

    def _mount_run_dir(self) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "crito-e2e", str(self.run_dir)], check=True)  # as /run is

    def _answers(self) -> bool:
        with contextlib.closing(Client(self.socket, self.cgroup_parent, self.logs, set())) as client:
            return client.answers()

    def _tables(self) -> dict[str, Any]:
        tables: dict[str, Any] = {
            "crito": {"root": self.root, "run_dir": self.run_dir},
            "api": {"listen": self.socket},
            "image": {
                "registries_conf": self.registries_conf,
                "registries_conf_dir": self.directory / "registries.conf.d",
                "policy": self.directory / "policy.json",
                "policy_dir": self.directory / "policies",
                "registries_d": self.directory / "registries.d",
                "certs_dir": self.directory / "certs.d",
            },
            "network": {"conf_dir": self.cni_conf, "plugin_dirs": [str(folder) for folder in PLUGIN_DIRS]},
            "log": {"level": "debug"},
        }
        for section, values in self.settings.items():
            tables[section] = {**tables.get(section, {}), **values}
        return tables


def crito(daemon: Daemon, *words: str) -> "subprocess.CompletedProcess[str]":
    """What the command says about this daemon."""
    command = [str(CRITO), *words, "--config", str(daemon.directory / "crito.toml")]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def _is_server(process: leftovers.Process) -> bool:
    return process.name in FORK_SERVER or "cri/streaming/__main__.py" in process.command


def destroy_owned(owned: Owned) -> None:
    """End and remove, by force, whatever can be traced to `owned`."""
    _kill_all(owned)
    _unmount_all(owned.directory)
    owned.network.remove()
    _remove_cgroups(owned)


def _kill_all(owned: Owned) -> None:
    for _ in range(5):
        found = leftovers.owned_processes(owned)
        if not found:
            return
        for each in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not leftovers.owned_processes(owned), "all are gone", 2)


def _unmount_all(directory: Path) -> None:
    for _ in range(10):
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        targets = [line.split()[4] for line in lines if line.split()[4].startswith(f"{directory}/")]
        if not targets:
            return
        for target in reversed(targets):
            subprocess.run(["umount", "-l", target.encode().decode("unicode_escape")], check=False, capture_output=True)


def _remove_cgroups(owned: Owned) -> None:
    if cgroups.HAS_SYSTEMD:
        cgroups.remove(f"/{owned.cgroup_parent}")
    for folder in sorted(leftovers.cgroups(owned), key=len, reverse=True):
        with contextlib.suppress(OSError):
            Path(folder).rmdir()


@contextmanager
def running_daemon(directory: Path, settings: Mapping[str, Any] | None = None) -> Iterator[Daemon]:
    daemon = Daemon(directory, settings)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.destroy()
