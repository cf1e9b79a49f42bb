"""Attached clients: the container's output is copied to each of them, their input goes to its stdin.

Output waits for a client that is far behind, but not for long: one that does not read is let go. So a container writes
no faster than its clients read, and is held up by nobody who does not.
"""

import os

from oci.monitor.loop import READABLE, WRITABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from oci.monitor.loop import Loop, Timer

BUFFER_BYTES = 256 * 1024  # over what the client's own pipe holds
HOLD_S = 2.0  # for a client with a full buffer to take it, and most of what its pipe holds: the kernel waits for that
INPUT_BYTES = 64 * 1024  # what the container's pipe holds


class Stdin:
    """The container's standard input (a pipe's end, or its terminal), fed by attached clients."""

    def __init__(self, loop: "Loop", fd: int, is_tty: bool, once: bool) -> None:
        self._loop = loop
        self._fd = fd
        self._is_tty = is_tty
        self._once = once
        self._rest = b""
        self._sources: list[int] = []

    @property
    def fd(self) -> int:
        """-1 once it is closed."""
        return self._fd

    @property
    def is_empty(self) -> bool:
        """Whether nothing is on its way to the container."""
        return not self._rest and not self._sources

    def add(self, source: int) -> None:
        """Forward what can be read from `source`, now ours; its end closes the container's stdin if that is `once`."""
        if self._fd < 0:
            os.close(source)
            return
        os.set_blocking(source, False)
        self._sources.append(source)
        self._listen(source)

    def remove(self, source: int) -> None:
        if source in self._sources:
            self._sources.remove(source)
            self._loop.forget(source)
            os.close(source)

    def _listen(self, source: int) -> None:
        if self._rest:
            return  # the container does not read: nor do we
        try:
            self._loop.watch(source, READABLE, lambda _events: self._forward(source))
        except PermissionError:
            self._ended(source)  # /dev/null or a plain file

    def _forward(self, source: int) -> None:
        try:
            data = os.read(source, INPUT_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._write(data)
        else:
            self._ended(source)

    def _ended(self, source: int) -> None:
        self.remove(source)
        if self._once and not self._is_tty:
            self.close()

    def _write(self, data: bytes) -> None:
        try:
            done = os.write(self._fd, data)
        except BlockingIOError:
            done = 0
        except OSError:
            self.close()  # EPIPE: the container has closed its end
            return
        if done < len(data):
            self._rest = data[done:]
            for source in self._sources:  # not even for hang-ups: they would spin the loop
                self._loop.forget(source)
            self._loop.watch(self._fd, WRITABLE, self._go_on)

    def _go_on(self, _events: int) -> None:
        self._loop.forget(self._fd)
        rest, self._rest = self._rest, b""
        self._write(rest)
        for source in list(self._sources):
            self._listen(source)

    def close(self) -> None:
        for source in list(self._sources):
            self.remove(source)
        if self._fd >= 0:
            self._loop.forget(self._fd)
            os.close(self._fd)
            self._fd = -1


class Sink:
    """One stream on its way to one client. Who writes while it `is_full` makes it grow: wait for `on_taken`."""

    def __init__(self, loop: "Loop", fd: int, on_broken: "Callable[[], None]", on_taken: "Callable[[], None]") -> None:
        self._loop = loop
        self._fd = fd
        self._rest = b""
        self._patience: Timer | None = None
        self._on_broken = on_broken
        self._on_taken = on_taken
        os.set_blocking(fd, False)
        self._watch(0)

    @property
    def is_empty(self) -> bool:
        return not self._rest

    @property
    def is_full(self) -> bool:
        return self._patience is not None

    def _watch(self, events: int) -> None:
        try:
            self._loop.watch(self._fd, events, self._on_event)  # 0: only errors, such as a reader that has gone
        except PermissionError:
            return  # a plain file neither blocks nor breaks

    def write(self, data: bytes) -> None:
        if self._rest:
            self._rest += data
        else:
            done = self._try(data)
            if not 0 <= done < len(data):
                return
            self._rest = data[done:]
            self._watch(WRITABLE)
        if self._patience is None and len(self._rest) >= BUFFER_BYTES:
            self._patience = self._loop.after(HOLD_S, self._on_broken)

    def _try(self, data: bytes) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0
        except OSError:
            self._on_broken()
            return -1

    def _on_event(self, events: int) -> None:
        if not events & WRITABLE:
            self._on_broken()
            return
        done = self._try(self._rest)
        if done < 0:
            return
        self._rest = self._rest[done:]
        if not self._rest:
            self._watch(0)
            self._stop_waiting()
            self._on_taken()

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def close(self) -> None:
        self._stop_waiting()
        if self._fd >= 0:
            self._loop.forget(self._fd)
            os.close(self._fd)
            self._fd = -1


class Attachment:
    """One client's fds."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.stdin = -1
        self.sinks: dict[str, Sink] = {}


class Attachments:
    """All attached clients. `on_end(number, reason)` is called once for each."""

    def __init__(self, loop: "Loop", on_end: "Callable[[int, str], None]") -> None:
        self._loop = loop
        self._on_end = on_end
        self._by_number: dict[int, Attachment] = {}
        self._waiting: dict[str, Callable[[], None]] = {}  # by stream
        self._last = 0

    def __len__(self) -> int:
        return len(self._by_number)

    @property
    def are_flushed(self) -> bool:
        return all(sink.is_empty for one in self._by_number.values() for sink in one.sinks.values())

    def add(self, fds: dict[str, int], stdin: Stdin | None) -> int:
        """Take over the fds: `stdin` to read from, `stdout` and `stderr` to write to. Its number, for `remove`."""
        self._last += 1
        one = self._by_number[self._last] = Attachment(self._last)
        for stream in ("stdout", "stderr"):
            if stream in fds:
                broken = lambda number=one.number: self.remove(number, "the client does not read")  # noqa: E731
                one.sinks[stream] = Sink(self._loop, fds.pop(stream), broken, self._let_go_on)
        if "stdin" in fds and stdin is not None:
            one.stdin = fds.pop("stdin")
            stdin.add(one.stdin)
        for fd in fds.values():
            os.close(fd)
        return one.number

    def broadcast(self, stream: str, data: bytes) -> None:
        for one in list(self._by_number.values()):
            sink = one.sinks.get(stream)
            if sink is not None:
                sink.write(data)

    def is_full(self, stream: str) -> bool:
        """Whether somebody is too far behind to get more of it."""
        return any(stream in one.sinks and one.sinks[stream].is_full for one in self._by_number.values())

    def when_taken(self, stream: str, call: "Callable[[], None]") -> None:
        """Call once nobody is too far behind any more: within HOLD_S."""
        self._waiting[stream] = call

    def _let_go_on(self) -> None:
        for stream in [stream for stream in self._waiting if not self.is_full(stream)]:
            self._waiting.pop(stream)()

    def remove(self, number: int, reason: str, stdin: Stdin | None = None) -> None:
        one = self._by_number.pop(number, None)
        if one is None:
            return
        for sink in one.sinks.values():
            sink.close()
        if stdin is not None and one.stdin >= 0:
            stdin.remove(one.stdin)
        self._on_end(number, reason)
        self._let_go_on()

    def remove_all(self, reason: str) -> None:
        for number in list(self._by_number):
            self.remove(number, reason)
