"""The pause of a pod and the pins of its namespaces, once they are made: found again, ended, taken away."""

import asyncio
import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from oci import exit_records, pidfd
from oci.errors import DeadlineExceeded
from oci.linux import proc
from oci.monitor import pod


@dataclass(frozen=True, slots=True)
class PodProcess:
    """The pause, by pid and start time (clock ticks since boot); pid 0 where none was kept."""

    pid: int
    start_time: int


def read_pod_process(pin_dir: Path) -> PodProcess | None:
    """The pause that was made for these pins; also of a make_pod whose answer never arrived."""
    return exit_records.read(pin_dir / pod.RECORD, PodProcess)


async def kill_pause(pid: int, start_time: int, timeout_s: float = 10.0) -> None:
    """Kill exactly this process and wait for its end. A process that is gone already is fine.

    Raises DeadlineExceeded if it has not ended by then.
    """
    try:
        fd = proc.pidfd(pid, start_time)
    except ProcessLookupError:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        await asyncio.wait_for(pidfd.wait(fd), timeout_s)
    except TimeoutError as error:
        raise DeadlineExceeded(f"process {pid} was killed but has not ended after {timeout_s:g} s") from error
    finally:
        os.close(fd)


def remove_pins(pin_dir: Path) -> None:
    """Unmount and remove the pins of a pod and their directory; blocking, idempotent. Raises OSError."""
    pod.remove_pins(str(pin_dir))
