"""The time as the CRI counts it: nanoseconds since the Unix epoch, never the same twice, never backwards."""

import time


class Clock:
    def __init__(self) -> None:
        self._last = 0

    def now(self) -> int:
        self._last = max(self._last + 1, time.time_ns())
        return self._last
