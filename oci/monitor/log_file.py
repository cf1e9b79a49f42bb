"""The container's log in the CRI's format: stamping output in bulk, and the file that takes it.

Format: `<RFC 3339 time with nanoseconds> <stdout|stderr> <P|F> <content>\\n`, P for a part of a line, F for its end.
Source: kubernetes, "kubelet-cri-logging"; the kubelet's reader joins P records of a stream with the F that follows.
"""

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Buffer = bytes | memoryview

LINE_BYTES = 16 * 1024  # content of one record, as containerd's default
FILE_MODE = 0o640


def timestamp(now: int) -> bytes:
    """`now` (ns since the epoch) as RFC 3339 in UTC, always with nine digits."""
    seconds, nanoseconds = divmod(now, 1_000_000_000)
    t = time.gmtime(seconds)
    return b"%04d-%02d-%02dT%02d:%02d:%02d.%09dZ" % (*t[:6], nanoseconds)


class Stamper:
    """Turns one stream's bytes into records. What it returns is a list of buffers, to be written in one go.

    The end of the input that no newline has ended yet is kept (at most `line_bytes`) until more comes, or `flush`.
    """

    __slots__ = ("_kept", "_line_bytes", "_line_open", "_stream")

    def __init__(self, stream: bytes, line_bytes: int = LINE_BYTES, line_open: bool = False) -> None:
        self._stream = b" " + stream + b" "
        self._line_bytes = line_bytes
        self._kept = b""
        self._line_open = line_open  # the last record was a P

    @property
    def keeps(self) -> bool:
        return bool(self._kept)

    @property
    def is_line_open(self) -> bool:
        return self._line_open

    def feed(self, data: bytes, now: int) -> "list[Buffer]":
        if self._kept:
            data = self._kept + data
        cut = data.rfind(b"\n") + 1
        head = timestamp(now) + self._stream
        records: list[Buffer] = []
        if cut:
            self._stamp_lines(data[:cut] if cut < len(data) else data, head + b"F ", head + b"P ", records)
            self._line_open = False
        self._kept = self._cut_long(data[cut:] if cut else data, head + b"P ", records)
        return records

    def flush(self, now: int) -> "list[Buffer]":
        """What is kept, as a part of a line; nothing if nothing is kept."""
        if not self._kept:
            return []
        records: list[Buffer] = [timestamp(now) + self._stream + b"P " + self._kept + b"\n"]
        self._kept = b""
        self._line_open = True
        return records

    def finish(self, now: int) -> "list[Buffer]":
        """The end of the stream: a line without its newline is ended by an F record."""
        if not self._kept and not self._line_open:
            return []
        records: list[Buffer] = [timestamp(now) + self._stream + b"F " + self._kept + b"\n"]
        self._kept = b""
        self._line_open = False
        return records

    def _stamp_lines(self, lines: bytes, full: bytes, part: bytes, records: "list[Buffer]") -> None:
        if self._lines_fit(lines):
            body = lines.replace(b"\n", b"\n" + full)
            records.append(full)
            records.append(memoryview(body)[: -len(full)])  # the last newline begins no line
            return
        for line in lines[:-1].split(b"\n"):
            records.append(full + self._cut_long(line, part, records) + b"\n")

    def _lines_fit(self, lines: bytes) -> bool:
        """Whether no line is longer than a record may be, in a few steps of the size of a record."""
        start, end, window = 0, len(lines), self._line_bytes + 1
        while end - start > window:
            newline = lines.rfind(b"\n", start, start + window)
            if newline < 0:
                return False
            start = newline + 1
        return True

    def _cut_long(self, line: bytes, part: bytes, records: "list[Buffer]") -> bytes:
        """Record all that is over the size of one record as parts; what is left, at most that size."""
        while len(line) > self._line_bytes:
            records.append(part + line[: self._line_bytes] + b"\n")
            line = line[self._line_bytes :]
            self._line_open = True
        return line


class LogFile:
    """The file that the records go to. It never fails and never waits: what cannot be written is counted as dropped.

    A full disk costs the records of that time, never the container's progress; every write tries anew. Past `max_bytes`
    (0: no limit) nothing is written until the kubelet rotates the file.
    """

    def __init__(self, path: str, max_bytes: int, on_error: "Callable[[str], None]") -> None:
        """Raises OSError when the file cannot be opened. An empty path keeps nothing and drops nothing."""
        self._path = path
        self._max_bytes = max_bytes
        self._on_error = on_error
        self._fd = -1
        self._size = 0
        self._failing = False
        self.written = 0  # bytes of records since the start
        self.dropped = 0
        if path:
            self._open(os.O_CREAT)

    def _open(self, create: int) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY | create
        fd = os.open(self._path, flags, FILE_MODE)
        old, self._fd = self._fd, fd
        self._size = os.fstat(fd).st_size
        if old >= 0:
            os.close(old)

    def reopen(self) -> None:
        """Go on in a new file at the path: the kubelet has renamed the old one, which stays in use on OSError."""
        if self._path:
            self._open(os.O_CREAT)

    def write(self, records: "list[Buffer]") -> None:
        """Append the records with one write(2), or none of them."""
        if self._fd < 0 or not records:
            return
        size = sum(map(len, records))
        if self._max_bytes and self._size + size > self._max_bytes:
            self.dropped += size
            return
        try:
            done = 0
            for first in range(0, len(records), 512):  # writev takes 1024
                done += os.writev(self._fd, records[first : first + 512])
        except OSError as error:
            self._failed(size, done, error.strerror or str(error))
            return
        if done < size:
            self._failed(size, done, "short write")
            return
        self._failing = False
        self._size += size
        self.written += size

    def _failed(self, size: int, done: int, reason: str) -> None:
        """Take back the part that was written, so that the next record begins on a line of its own."""
        if done:
            try:
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - done)
            except OSError:
                self._size += done
        self.dropped += size
        if not self._failing:
            self._failing = True
            self._on_error(f"log {self._path}: {reason}; output is dropped until it can be written again")

    def at_rest(self) -> tuple[int, list[int]]:
        """Its fd (-1: none), and what `resume` wants to know."""
        return self._fd, [self._size, self.written, self.dropped, int(self._failing)]

    @classmethod
    def resume(
        cls, path: str, max_bytes: int, on_error: "Callable[[str], None]", fd: int, facts: list[int]
    ) -> "LogFile":
        log = cls("", max_bytes, on_error)
        log._path = path
        log._fd = fd
        log._size, log.written, log.dropped, failing = facts
        log._failing = bool(failing)
        return log

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
