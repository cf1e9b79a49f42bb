"""How containers ended, as their monitors wrote it, or as the fork server saw it of those whose monitor was lost.

    <run>/containers/<id>/exit.json       ExitRecord
    <run>/orphans/<pid>-<start>.json      OrphanExit

What is read are small files on a tmpfs.
"""

import asyncio
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from oci import pidfd
from oci.errors import Unavailable
from oci.monitor import exit as exits
from oci.monitor.forkserver import ORPHANS

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ExitRecord:
    """How a container ended; the same as `exit.json`."""

    pid: int
    start_time: int
    exit_code: int  # 0-255; 128 + N when signal N killed it
    signal: int  # 0 unless one killed it
    finished_at: int  # ns since the epoch
    oom_killed: bool = False  # the OOM killer took at least one process of its cgroup
    oom_limit: str = ""  # "container", or "above": the pod's limit or the node's memory
    log_bytes: int = 0
    log_dropped: int = 0


@dataclass(frozen=True, slots=True)
class OrphanExit:
    """The exit of a process that had lost its monitor, as the fork server saw it."""

    pid: int
    start_time: int
    exit_code: int
    signal: int
    finished_at: int


def read_exit_record(directory: Path) -> ExitRecord | None:
    """What the monitor wrote about the container's end; None if it has not ended, or its monitor was lost."""
    return read(directory / exits.RECORD, ExitRecord)


def read_orphan_exit(run_dir: Path, pid: int, start_time: int) -> OrphanExit | None:
    """How a process ended whose monitor had died before it; None if the fork server has not seen that."""
    return read(run_dir / ORPHANS / f"{pid}-{start_time}.json", OrphanExit)


def forget_orphan_exits(run_dir: Path, kept: Collection[tuple[int, int]]) -> None:
    """Remove the exits of processes, by pid and start time, that nobody will ask about any more."""
    names = {f"{pid}-{start_time}.json" for pid, start_time in kept}
    for path in (run_dir / ORPHANS).glob("*.json"):
        if path.name not in names:
            path.unlink(missing_ok=True)


async def wait_orphan_exit(run_dir: Path, pid: int, start_time: int) -> OrphanExit:
    """The exit of a container's init that lives on without its monitor. Unavailable if nobody can tell it any more."""
    await pidfd.wait_process(pid, start_time)
    for _ in range(50):  # the fork server writes it while the process is a zombie: now, or in a moment
        found = read_orphan_exit(run_dir, pid, start_time)
        if found is not None:
            return found
        await asyncio.sleep(0.02)
    raise Unavailable(f"process {pid} has ended, and its exit code went with its monitor and fork server")


def read(path: Path, kind: type[T]) -> T | None:
    """A record of this kind; None where there is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
