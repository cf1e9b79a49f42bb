"""Ends CNI plugins that a killed daemon left running, so that an ADD cannot overtake the DEL that undoes it.

A plugin and all that it runs carry CNI_CONTAINERID in their environment. Only those are ended whose work nobody waits
for: an ADD that was not finished, which is rolled back anyway, and a DEL, which is done again. What a finished ADD may
have left running on purpose is not touched.
"""

import logging
import os
import select
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from .ledger import Entry

log = logging.getLogger(__name__)

GONE_S = 2.0


def end_orphans(entries: Iterable[Entry]) -> int:
    """Kill the orphaned plugins of these attachments and wait for their end; how many there were. Blocks."""
    finished: dict[tuple[str, str], bool] = {entry.key: entry.attachment.result is not None for entry in entries}
    if not finished:
        return 0
    pidfds = [pidfd for pid in _pids() if (pidfd := _kill_orphan(pid, finished)) is not None]
    _wait(pidfds)
    return len(pidfds)


def _kill_orphan(pid: int, finished: dict[tuple[str, str], bool]) -> int | None:
    try:
        pidfd = os.pidfd_open(pid)  # before looking: the number may be somebody else's afterwards
    except OSError:
        return None
    environment = _environment(pid)
    key = environment.get("CNI_CONTAINERID", ""), environment.get("CNI_IFNAME", "")
    verb = environment.get("CNI_COMMAND")
    if key in finished and (verb == "DEL" or (verb == "ADD" and not finished[key])):
        log.warning("ending process %d: a CNI %s of sandbox %s that an earlier daemon left behind", pid, verb, key[0])
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            return pidfd
        except ProcessLookupError:
            pass
    os.close(pidfd)
    return None


def _wait(pidfds: list[int]) -> None:
    poll = select.poll()
    for pidfd in pidfds:
        poll.register(pidfd, select.POLLIN)
    deadline = time.monotonic() + GONE_S
    waiting = set(pidfds)
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pidfd, _ in poll.poll(left * 1000):
            poll.unregister(pidfd)
            waiting.discard(pidfd)
    for pidfd in pidfds:
        os.close(pidfd)


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def _environment(pid: int) -> dict[str, str]:
    try:
        data = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    entries = data.decode(errors="surrogateescape").split("\0")
    return dict(entry.split("=", 1) for entry in entries if entry.startswith("CNI_") and "=" in entry)
