"""Waiting for the end of a process that is not our child, on the event loop."""

import asyncio


async def wait(pidfd: int) -> None:
    """Return once the process has ended. The fd stays the caller's; only one may wait on it at a time."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
