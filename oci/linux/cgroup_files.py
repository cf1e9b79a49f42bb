"""The files of one cgroup directory as the kernel writes them: a number, a table, a list of processes."""

import errno
import os
from pathlib import Path

_GONE = (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP)


def text(path: Path | str) -> str | None:
    """None where the file is not there: no such controller, kernel option, or no longer such a cgroup."""
    # Plain system calls: a scrape reads some twenty of these files for each container.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise
    try:
        parts = []
        while part := os.read(fd, 1 << 16):
            parts.append(part)
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise
    finally:
        os.close(fd)
    return b"".join(parts).decode(errors="replace")


def number(path: Path | str) -> int | None:
    """None also for "max"."""
    found = (text(path) or "").strip()
    return int(found) if found.isdecimal() else None


def table(path: Path | str) -> dict[str, int]:
    """The lines "NAME NUMBER"; empty where the file is not there."""
    fields = (line.split() for line in (text(path) or "").splitlines())
    return {line[0]: int(line[1]) for line in fields if len(line) == 2 and line[1].isdecimal()}


def processes(directory: Path | str) -> list[int]:
    """The processes in the cgroup and below it; those of another PID namespace do not show."""
    found: list[int] = []
    for below, _, _ in os.walk(directory):
        found.extend(int(pid) for pid in (text(f"{below}/cgroup.procs") or "").split())
    return [pid for pid in found if pid]
