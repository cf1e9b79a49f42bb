"""Keeps all workers that fetch from one registry together below a rate, through a file that they share."""

import fcntl
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

_BURST_S = 0.25


class Pace:
    """A virtual clock: each byte takes its time of it, whoever fetches it; who is ahead of the clock waits."""

    def __init__(self, path: Path, bytes_per_s: float) -> None:
        self._path = path
        self._bytes_per_s = bytes_per_s

    def of(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """The same chunks, each only when the one before it may have been fetched."""
        for chunk in chunks:
            yield chunk
            self.wait(len(chunk))

    def wait(self, size_bytes: int) -> None:
        """Returns when `size_bytes` more may have been fetched."""
        ahead_s = self._take(size_bytes / self._bytes_per_s)
        if ahead_s > _BURST_S:
            time.sleep(ahead_s - _BURST_S)

    def _take(self, seconds: float) -> float:
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        with self._path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            last = float(text) if text else now
            if not now - seconds <= last <= now + 3600:  # idle meanwhile, or a boot ago
                last = now
            file.truncate(0)
            file.write(repr(last + seconds))
        return last + seconds - now
