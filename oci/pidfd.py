"""Waiting for the end of a process that is not our child, on the event loop."""

import asyncio
import contextlib
import os

from oci.linux import proc


async def wait(pidfd: int) -> None:
    """Return once the process has ended. The fd stays the caller's; only one may wait on it at a time."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)


async def wait_process(pid: int, start_time: int) -> None:
    """Return once exactly this process has ended; at once if it is gone."""
    with contextlib.suppress(ProcessLookupError):
        fd = proc.pidfd(pid, start_time)
        try:
            await wait(fd)
        finally:
            os.close(fd)
