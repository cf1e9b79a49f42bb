"""An OCI runtime (crun, runc or another with their command line), driven by command.

What starts processes of a container (create, start, exec) is the monitor's; here is the rest, and the question whether
a runtime can run a container on this host at all.
"""

import asyncio
import contextlib
import json
import math
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from oci import tiny_program, trace
from oci.container_spec import ContainerId
from oci.errors import DeadlineExceeded, Error, FailedPrecondition, NotFound, Unimplemented
from oci.linux import cgroup, proc, tree
from oci.monitor.wait import exit_status
from oci.spec import OCI_VERSION, RuntimeFeatures

_DIRECTORIES = ("/usr/local/bin", "/usr/local/sbin", "/usr/bin", "/usr/sbin", "/bin", "/sbin", "/usr/libexec/crito")
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_CANARY = "canary-"
_MIN_MEMORY = {"crun": 512_000, "runc": 12 << 20}  # what CRI-O found they need; other runtimes get no check

# Words by which runc, crun and runsc say that a container is not there, and that it is not running.
_NOT_FOUND = (
    "container does not exist",
    "/status`: no such file or directory",
    "loading container: file does not exist",
    "loading sandbox: file does not exist",
)
_NOT_RUNNING = ("not running", "no such process", "process already finished", "process not running", "stopped")


@dataclass(frozen=True, slots=True)
class RuntimeState:
    """Source: OCI runtime-spec, runtime.md, "State"."""

    status: str  # creating, created, running, stopped; paused with crun and runc
    pid: int  # 0 when stopped
    bundle: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What a runtime that makes sandboxes counts of one container; None is what it does not tell."""

    cpu_ns: int | None
    memory_bytes: int | None
    processes: int | None


@dataclass(frozen=True, slots=True)
class Canary:
    """Whether a container could be created and started, how long that took, and if not what was seen."""

    ok: bool
    reason: str
    seconds: float


class Runtime:
    """One configured runtime. Every command ends at its deadline; its error is the runtime's own last words."""

    def __init__(
        self,
        name: str,
        path: Path,
        root: Path,
        driver: cgroup.Driver,
        *,
        arguments: Sequence[str] = (),
        create_options: Sequence[str] = (),
        makes_sandboxes: bool = False,
    ) -> None:
        self.name = name
        self.path = path
        self.root = root
        self.driver = driver
        self.create_options = tuple(create_options)  # of the commands that make a container
        self.makes_sandboxes = makes_sandboxes  # a pod's sandbox is a container of its own, in which the others live
        self._arguments = tuple(arguments)

    @property
    def argv(self) -> tuple[str, ...]:
        """What precedes each of the runtime's commands, for whoever runs them."""
        systemd = ("--systemd-cgroup",) if self.driver is cgroup.Driver.SYSTEMD else ()
        return (str(self.path), "--root", str(self.root), "--log-format", "json", *systemd, *self._arguments)

    async def version(self, timeout_s: float = 10.0) -> str:
        """The first line of `--version`, such as "crun version 1.8.1"."""
        output = await self._output([str(self.path), "--version"], timeout_s)
        return output.decode(errors="replace").partition("\n")[0].strip()

    async def features(self, timeout_s: float = 10.0) -> RuntimeFeatures:
        """What the runtime says it can do; one without the command (crun before 1.8.2) can do what all can."""
        least = _MIN_MEMORY.get(self.path.name, 0)
        try:
            said = json.loads(await self._output([*self.argv, "features"], timeout_s))
        except DeadlineExceeded:
            raise
        except (Error, ValueError):
            return RuntimeFeatures(min_memory_bytes=least)
        return features_from(said, least)

    async def state(self, id: ContainerId, timeout_s: float = 10.0) -> RuntimeState:
        """Raises NotFound when the runtime knows no such container."""
        said = json.loads(await self._command("state", id, timeout_s=timeout_s))
        return RuntimeState(str(said.get("status", "")), int(said.get("pid", 0)), str(said.get("bundle", "")))

    async def ids(self, timeout_s: float = 10.0) -> list[ContainerId]:
        """The containers that the runtime knows, alive or not."""
        output = await self._output([*self.argv, "list", "--quiet"], timeout_s)
        return [ContainerId(id) for id in output.decode().split()]

    async def kill(self, id: ContainerId, signal: int, timeout_s: float = 10.0, *, everything: bool = False) -> None:
        """Raises NotFound when there is no such container, FailedPrecondition when it is not running."""
        await self._command("kill", *(["--all"] if everything else []), id, str(signal), timeout_s=timeout_s)

    async def delete(self, id: ContainerId, timeout_s: float = 60.0, *, force: bool = True) -> None:
        """Remove what the runtime keeps of the container, killing it with `force`; that it is gone is success."""
        with contextlib.suppress(NotFound):
            await self._command("delete", *(["--force"] if force else []), id, timeout_s=timeout_s)

    async def wait(self, id: ContainerId) -> int:
        """The exit code (128 + N for signal N) of a container in a sandbox, once it has ended. Has no deadline.

        Raises Error when its sandbox has died, which nobody can tell more of.
        """
        code = exit_status((await self._command("wait", id, timeout_s=math.inf)).decode(errors="replace"))
        if code is None:
            raise Error(f"{self.name}: wait {id}: the runtime tells no exit status")
        return code

    async def usage(self, id: ContainerId, timeout_s: float = 10.0) -> Usage:
        """What a container in a sandbox uses, as its runtime counts it: the host sees the sandbox only."""
        said = json.loads(await self._command("events", "--stats", id, timeout_s=timeout_s))
        data = said.get("data") or {}
        return Usage(
            cpu_ns=_number(data, "cpu", "usage", "total"),
            memory_bytes=_number(data, "memory", "usage", "usage"),
            processes=_number(data, "pids", "current"),
        )

    def forget(self, id: str) -> None:
        """Remove by hand what the runtime still keeps of a container or a sandbox; in a pool.

        runsc leaves the lock file to whichever of its commands was under way beside a delete.
        """
        tree.remove(self.root / id)
        for pattern in (f"{id}_sandbox:*", f"*_sandbox:{id}.*", f"*-{id}.sock"):
            for path in self.root.glob(pattern):
                path.unlink(missing_ok=True)

    async def update(self, id: ContainerId, resources: Mapping[str, Any], timeout_s: float = 30.0) -> None:
        """Change the limits of a container; `resources` is the runtime-spec's linux.resources."""
        given = json.dumps(resources).encode()
        await self._command("update", "--resources", "-", id, timeout_s=timeout_s, given=given)

    async def pause(self, id: ContainerId, timeout_s: float = 30.0) -> None:
        await self._command("pause", id, timeout_s=timeout_s)

    async def resume(self, id: ContainerId, timeout_s: float = 30.0) -> None:
        await self._command("resume", id, timeout_s=timeout_s)

    async def processes(self, id: ContainerId, timeout_s: float = 10.0) -> list[int]:
        """The host's pids of all processes in the container."""
        output = await self._command("ps", "--format", "json", id, timeout_s=timeout_s)
        return [int(pid) for pid in json.loads(output) or ()]

    async def can_checkpoint(self) -> bool:
        """Whether the runtime has the commands: crun can be built without CRIU. Sandboxes have ways of their own."""
        if self.makes_sandboxes:
            return False
        with contextlib.suppress(Error):
            return b"--image-path" in await self._command("checkpoint", "--help", timeout_s=10.0)
        return False

    async def checkpoint(
        self, id: ContainerId, images: Path, work: Path, timeout_s: float, environment: Mapping[str, str]
    ) -> None:
        """Let CRIU write the container's processes into `images`; they stay as they are, paused or not."""
        arguments = ("--leave-running", *self._criu_arguments(images, work), id)
        await self._output([*self.argv, "checkpoint", *arguments], timeout_s, environment=environment)

    def restore_command(self, images: Path, work: Path) -> tuple[str, ...]:
        """The command that makes a container go on from `images`, in place of create and start."""
        return ("restore", "--detach", *self._criu_arguments(images, work))

    def _criu_arguments(self, images: Path, work: Path) -> tuple[str, ...]:
        return ("--image-path", str(images), "--work-path", str(work), "--tcp-established", "--file-locks")

    async def canary(self, directory: Path, cgroup_parent: str, timeout_s: float = 20.0) -> Canary:
        """Create and start a container of one tiny program, below a checked cgroup parent; nothing of it stays.

        `directory` is a private one that exists, on a file system where programs may run.
        """
        await self._clear_canaries(directory, cgroup_parent)
        began = time.monotonic()
        id = ContainerId(f"{_CANARY}{secrets.token_hex(8)}")
        bundle = directory / id
        cgroups_path = cgroup.runtime_path(self.driver, cgroup_parent, id)
        try:
            await asyncio.to_thread(_write_canary, bundle, cgroups_path)
            # No null device as its stdin: runsc and crun give what they find there to the container's user.
            command = [*self.argv, "run", *self.create_options, "--bundle", str(bundle), id]
            await self._output(command, timeout_s, given=b"")
            return Canary(True, "", time.monotonic() - began)
        except (Error, OSError) as error:
            return Canary(False, f"{self.path}: cannot run a container: {error}", time.monotonic() - began)
        finally:
            with contextlib.suppress(Error):
                await self.delete(id)
            await asyncio.to_thread(self._forget_canary, bundle, cgroup_parent, id)

    async def _clear_canaries(self, directory: Path, cgroup_parent: str) -> None:
        """Take away what a daemon left that was killed beside its canary."""
        for bundle in await asyncio.to_thread(lambda: list(directory.glob(f"{_CANARY}*"))):
            with contextlib.suppress(Error):
                await self.delete(ContainerId(bundle.name))
            await asyncio.to_thread(self._forget_canary, bundle, cgroup_parent, bundle.name)

    def _forget_canary(self, bundle: Path, cgroup_parent: str, id: str) -> None:
        tree.remove(bundle)
        with contextlib.suppress(Error, OSError):  # the runtime removes it; this is for one that failed half-way
            cgroup.detect().remove(cgroup.child_path(self.driver, cgroup_parent, id))

    async def _command(self, command: str, *arguments: str, timeout_s: float, given: bytes | None = None) -> bytes:
        with trace.step(f"OCI runtime: {command}", {"crito.runtime_handler": self.name}):
            return await self._output([*self.argv, command, *arguments], timeout_s, given)

    async def _output(
        self,
        argv: Sequence[str],
        timeout_s: float,
        given: bytes | None = None,
        environment: Mapping[str, str] = MappingProxyType(_ENVIRONMENT),
    ) -> bytes:
        """What the command prints. Raises an Error of the fitting kind when it fails or takes longer."""
        what = f"{self.name}: {' '.join(argv[len(self.argv) :] or argv[1:])}"
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL if given is None else asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=environment,
                start_new_session=True,
                cwd="/",
            )
        except OSError as error:
            raise FailedPrecondition(f"{what}: cannot run {argv[0]}: {error.strerror}") from error
        try:
            patience_s = None if math.isinf(timeout_s) else timeout_s
            output, errors = await asyncio.wait_for(process.communicate(given), patience_s)
        except TimeoutError:
            raise DeadlineExceeded(f"{what}: the runtime did not end within {timeout_s:g} s and was killed") from None
        finally:
            if process.returncode is None:
                await _kill(process)
        if process.returncode != 0:
            raise _error(what, process.returncode or 0, error_text(errors) or error_text(output))
        return output


def find(names: Sequence[str] = ("crun", "runc"), directories: Sequence[str] = _DIRECTORIES) -> dict[str, Path]:
    """The runtimes that are installed, in the order of `names`."""
    found = {}
    for name in names:
        paths = (Path(directory, name) for directory in directories)
        path = next((path for path in paths if os.access(path, os.X_OK)), None)
        if path is not None:
            found[name] = path
    return found


def features_from(said: Mapping[str, Any], min_memory_bytes: int = 0) -> RuntimeFeatures:
    """Source: OCI runtime-spec, features.md and features-linux.md."""
    linux = said.get("linux") or {}
    idmap = ((linux.get("mountExtensions") or {}).get("idmap") or {}).get("enabled")
    return RuntimeFeatures(
        recursive_read_only="rro" in (said.get("mountOptions") or ()),
        idmap_mounts=bool(idmap),
        min_memory_bytes=min_memory_bytes,
    )


def _number(said: Mapping[str, Any], *path: str) -> int | None:
    value: Any = said
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, int) else None


def error_text(output: bytes) -> str:
    """What a runtime said last: the messages of its JSON log's errors, else its plain lines."""
    messages, plain = [], []
    for line in output.decode(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            plain.append(line.strip())
            continue
        if isinstance(entry, dict) and entry.get("level", "error") in ("error", "fatal", "panic"):
            messages.append(str(entry.get("msg", "")).strip())
    return "; ".join(dict.fromkeys(message for message in messages or plain[-5:] if message))


def _error(what: str, code: int, text: str) -> Error:
    message = f"{what}: {text or f'the runtime ended with {code} and said nothing'}"
    lower = text.lower()
    if "unknown command" in lower or "no help topic" in lower:
        return Unimplemented(message)
    if any(words in lower for words in _NOT_RUNNING):
        return FailedPrecondition(message)
    if any(words in lower for words in _NOT_FOUND):
        return NotFound(message)
    return Error(message)


async def _kill(process: asyncio.subprocess.Process) -> None:
    """The command and what it started: runtimes fork, and a child of theirs may hold the pipes."""
    below = await asyncio.to_thread(proc.descendants, process.pid)
    for pid in (process.pid, *below):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
    await process.wait()


# --- the canary's bundle


def _write_canary(bundle: Path, cgroups_path: str) -> None:
    program = tiny_program.that_exits()
    rootfs = bundle / "rootfs"
    rootfs.mkdir(parents=True)
    (rootfs / "canary").write_bytes(program)
    (rootfs / "canary").chmod(0o755)
    (bundle / "config.json").write_text(json.dumps(_canary_config(cgroups_path)))


def _canary_config(cgroups_path: str) -> dict[str, Any]:
    capabilities = ["CAP_KILL"]
    return {
        "ociVersion": OCI_VERSION,
        "root": {"path": "rootfs", "readonly": True},
        "process": {
            "args": ["/canary"],
            "cwd": "/",
            "env": [],
            "user": {"uid": 0, "gid": 0},
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "noNewPrivileges": True,
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "size=64k"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("mount", "pid", "ipc", "uts", "network")],
            "cgroupsPath": cgroups_path,
            "resources": {"memory": {"limit": 64 << 20}, "devices": [{"allow": False, "access": "rwm"}]},
        },
    }
