"""Tells systemd how the daemon is: ready, alive, stopping (sd_notify(3)), where a service manager listens for it."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Mapping


def notify(state: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Sends one sd_notify state; False where no service manager listens.

    A service manager that is too busy to take it is not waited for: a lost keep-alive comes again.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):  # the abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.connect(address)
            sock.send(state.encode())
        except OSError:
            return False
    return True


def ready(status: str) -> bool:
    return notify(f"READY=1\nSTATUS={status}\nMAINPID={os.getpid()}")


def stopping(status: str) -> bool:
    return notify(f"STOPPING=1\nSTATUS={status}")


def extend_start(seconds: float, status: str) -> bool:
    """Asks for more time to start: a recovery of many pods may take longer than TimeoutStartSec."""
    return notify(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}\nSTATUS={status}")


def watchdog_interval_s(environ: Mapping[str, str] = os.environ) -> float | None:
    """How often systemd wants a sign of life: half of WatchdogSec; None where it wants none of this process."""
    usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not usec.isdigit() or int(usec) == 0 or (pid.isdigit() and int(pid) != os.getpid()):
        return None
    return int(usec) / 1e6 / 2


async def keep_alive(is_well: Callable[[], Awaitable[bool]]) -> None:
    """Sends signs of life for as long as the daemon is well; returns at once where systemd wants none."""
    interval = watchdog_interval_s()
    while interval is not None:
        if await is_well():
            notify("WATCHDOG=1")
        await asyncio.sleep(interval)
