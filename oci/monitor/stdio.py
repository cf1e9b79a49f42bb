"""The container's standard streams: its pipes or its terminal, read into the log and out to attached clients."""

import _socket as socket
import errno
import fcntl
import os
import struct
import termios
import time

from oci.monitor import kernel, wire
from oci.monitor.attach import Stdin
from oci.monitor.log_file import LogFile, Stamper
from oci.monitor.loop import READABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from oci.monitor.attach import Attachments
    from oci.monitor.loop import Loop, Timer

READ_BYTES = 64 * 1024
READS_AT_ONCE = 16  # then the other streams and clients have their turn
PART_AFTER_S = 0.1  # a prompt without newline is seen in the log after this
TRIM_AFTER_S = 2.0
HUNG_UP_TTY_S = 0.5


class Output:
    """One output stream on its way to the log and the attached clients."""

    def __init__(
        self, loop: "Loop", fd: int, name: str, *, stamper: Stamper, log: LogFile, attachments: "Attachments"
    ) -> None:
        self._loop = loop
        self._fd = fd
        self._name = name
        self._stamper = stamper
        self._log = log
        self._attachments = attachments
        self._part_timer: Timer | None = None
        self._trim_timer: Timer | None = None
        self._is_hung_up = False
        self.may_end = True  # a terminal only ends with its container
        self.on_end: Callable[[], None] = lambda: None

    @property
    def is_open(self) -> bool:
        return self._fd >= 0

    @property
    def can_rest(self) -> bool:
        return not self._stamper.keeps and not self._is_hung_up

    def at_rest(self) -> tuple[str, int, bool]:
        """Its name, its fd, and whether its line goes on."""
        return self._name, self._fd, self._stamper.is_line_open

    def begin(self) -> None:
        os.set_blocking(self._fd, False)
        self._loop.watch(self._fd, READABLE, self._on_readable)

    def _on_readable(self, _events: int) -> None:
        for _ in range(READS_AT_ONCE):
            if self._attachments.is_full(self._name):
                self._loop.forget(self._fd)
                self._attachments.when_taken(self._name, self._go_on)
                break
            if self._read() < READ_BYTES:
                break
        if self._stamper.keeps and self._part_timer is None:
            self._part_timer = self._loop.after(PART_AFTER_S, self._write_part)
        if self._trim_timer is None:
            self._trim_timer = self._loop.after(TRIM_AFTER_S, self._trim)

    def _read(self) -> int:
        """Take what there is: its size, at most READ_BYTES; 0 if there was nothing, or the stream has ended."""
        if self._fd < 0:
            return 0
        try:
            data = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            data = b""  # EIO: nobody has the terminal open
        if not data:
            self._ended()
            return 0
        self._log.write(self._stamper.feed(data, time.time_ns()))
        if len(self._attachments):
            self._attachments.broadcast(self._name, data)
        return len(data)

    def drain(self, limit_bytes: int) -> None:
        """Read on until nothing is left; `limit_bytes` bounds it where somebody else goes on writing."""
        while limit_bytes > 0:
            size = self._read()
            if size == 0:
                return
            limit_bytes -= size

    def _ended(self) -> None:
        if self.may_end:
            self.close()
            self.on_end()
        else:  # the container may open its terminal again, as an init system does
            self._is_hung_up = True
            self._loop.forget(self._fd)
            self._loop.after(HUNG_UP_TTY_S, self._look_again)

    def _look_again(self) -> None:
        self._is_hung_up = False
        self._go_on()

    def _go_on(self) -> None:
        if self._fd >= 0:
            self._loop.watch(self._fd, READABLE, self._on_readable)

    def _write_part(self) -> None:
        self._part_timer = None
        self._log.write(self._stamper.flush(time.time_ns()))

    def _trim(self) -> None:
        self._trim_timer = None
        kernel.trim_heap()

    def finish_line(self) -> None:
        self._log.write(self._stamper.finish(time.time_ns()))

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.forget(self._fd)
            os.close(self._fd)
            self._fd = -1
            self.finish_line()


class Console:
    """Receives a terminal's master from the OCI runtime over `directory/name`, a socket made for that purpose.

    Source: runc, docs/terminals.md, "console socket".
    """

    def __init__(self, loop: "Loop", directory_fd: int, name: str) -> None:
        self._loop = loop
        self._directory_fd = directory_fd
        self._name = name
        # Through /proc, since the path of a UNIX socket holds 107 bytes only, and run_dir may be long.
        self.path = f"/proc/{os.getpid()}/fd/{directory_fd}/{name}"
        self.master = -1
        self._peer: socket.socket | None = None
        self._unlink()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._listener.bind(self.path)
        self._listener.listen(1)
        loop.watch(self._listener.fileno(), READABLE, self._on_connect)

    def _on_connect(self, _events: int) -> None:
        self._peer = wire.accept(self._listener)
        if self._peer is None:
            return
        self._loop.watch(self._peer.fileno(), READABLE, self._on_message)

    def _on_message(self, _events: int) -> None:
        assert self._peer is not None
        try:
            _, ancillary, _, _ = self._peer.recvmsg(4096, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        for _, kind, content in ancillary:
            if kind == socket.SCM_RIGHTS and self.master < 0:
                self.master = struct.unpack("i", content[:4])[0]
        self._loop.forget(self._peer.fileno())
        self._peer.close()
        self._peer = None

    def take_master(self) -> int:
        """The master, now the caller's; -1 if none came. Closes the socket."""
        if self.master < 0 and self._peer is None:  # it was sent before the runtime ended, so it is here by now
            self._on_connect(0)
        if self.master < 0 and self._peer is not None:
            self._on_message(0)
        master, self.master = self.master, -1
        self.close()
        return master

    def close(self) -> None:
        for sock in (self._listener, self._peer):
            if sock is not None and sock.fileno() >= 0:
                self._loop.forget(sock.fileno())
                sock.close()
        if self.master >= 0:
            os.close(self.master)
            self.master = -1
        self._unlink()

    def _unlink(self) -> None:
        try:
            os.unlink(self._name, dir_fd=self._directory_fd)
        except FileNotFoundError:
            return


def resize(terminal: int, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


class Stdio:
    """What the runtime's `create` gets as stdio, and our ends of it."""

    def __init__(self, loop: "Loop", log: LogFile, attachments: "Attachments", line_bytes: int) -> None:
        self._loop = loop
        self._log = log
        self._attachments = attachments
        self._line_bytes = line_bytes
        self._theirs: list[int] = []
        self._console: Console | None = None
        self._terminal = -1
        self._error_text = -1
        self.outputs: list[Output] = []
        self.stdin: Stdin | None = None

    def open_pipes(self, stdin: bool, stdin_once: bool) -> tuple[int, int, int]:
        """The container's ends of its stdin, stdout and stderr."""
        their_stdin = 0  # ours, which is /dev/null
        if stdin:
            their_stdin, ours = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(ours, False)
            self._theirs.append(their_stdin)
            self.stdin = Stdin(self._loop, ours, False, stdin_once)
        theirs = []
        for name in ("stdout", "stderr"):
            ours, their = os.pipe2(os.O_CLOEXEC)
            theirs.append(their)
            self.outputs.append(self._output(ours, name))
            if name == "stderr":
                self._error_text = os.dup(ours)
        self._theirs += theirs
        return their_stdin, theirs[0], theirs[1]

    def open_console(self, directory_fd: int) -> tuple[str, tuple[int, int, int]]:
        """The console socket's path, and what the runtime itself gets as stdio."""
        self._console = Console(self._loop, directory_fd, "console.sock")
        self._error_text, their = os.pipe2(os.O_CLOEXEC)
        self._theirs.append(their)
        return self._console.path, (0, 1, their)

    def _output(self, fd: int, name: str, line_open: bool = False) -> Output:
        stamper = Stamper(name.encode(), self._line_bytes, line_open)
        return Output(self._loop, fd, name, stamper=stamper, log=self._log, attachments=self._attachments)

    def close_theirs(self) -> None:
        """After the runtime was started."""
        for fd in self._theirs:
            os.close(fd)
        self._theirs.clear()

    def error_text(self) -> bytes:
        """What the runtime of a failed `create` wrote to its stderr."""
        os.set_blocking(self._error_text, False)
        try:
            return os.read(self._error_text, READ_BYTES)
        except BlockingIOError:
            return b""

    def begin(self, stdin: bool, stdin_once: bool, on_end: "Callable[[], None]") -> bool:
        """After a successful `create`: read from now on. False if a terminal was wanted and the runtime sent none."""
        os.close(self._error_text)
        self._error_text = -1
        if self._console is not None:
            self._terminal = self._console.take_master()
            if self._terminal < 0:
                return False
            self.outputs.append(self._output(os.dup(self._terminal), "stdout"))
            self.outputs[0].may_end = False
            if stdin:
                self.stdin = Stdin(self._loop, os.dup(self._terminal), True, stdin_once)
        for output in self.outputs:
            output.on_end = on_end
            output.begin()
        return True

    @property
    def can_rest(self) -> bool:
        return all(output.can_rest for output in self.outputs) and (self.stdin is None or self.stdin.is_empty)

    def at_rest(self) -> tuple[list[tuple[str, int]], dict[str, bool]]:
        """(name, fd) of all that is open, and of each output whether its line goes on."""
        outputs = [output.at_rest() for output in self.outputs if output.is_open]
        fds = [(name, fd) for name, fd, _ in outputs]
        if self.stdin is not None and self.stdin.fd >= 0:
            fds.append(("stdin", self.stdin.fd))
        if self._terminal >= 0:
            fds.append(("terminal", self._terminal))
        return fds, {name: line_open for name, _, line_open in outputs}

    def resume(
        self, fds: dict[str, int], lines: dict[str, bool], stdin_once: bool, on_end: "Callable[[], None]"
    ) -> None:
        """Go on with what `at_rest` gave."""
        self._terminal = fds.get("terminal", -1)
        for name, line_open in lines.items():
            output = self._output(fds[name], name, line_open)
            output.may_end = self._terminal < 0
            output.on_end = on_end
            output.begin()
            self.outputs.append(output)
        if "stdin" in fds:
            self.stdin = Stdin(self._loop, fds["stdin"], self._terminal >= 0, stdin_once)

    def resize(self, rows: int, columns: int) -> bool:
        """False where the container has no terminal."""
        if self._terminal < 0:
            return False
        resize(self._terminal, rows, columns)
        return True

    @property
    def is_open(self) -> bool:
        return any(output.is_open for output in self.outputs)

    def drain(self, limit_bytes: int) -> None:
        """After the exit: all that the container wrote is in the log when this returns."""
        for output in self.outputs:
            output.may_end = True
            output.drain(limit_bytes)
            if output.is_open:
                output.finish_line()

    def close(self) -> None:
        self.close_theirs()
        if self._console is not None:
            self._console.close()
        for output in self.outputs:
            output.close()
        if self.stdin is not None:
            self.stdin.close()
        for fd in (self._terminal, self._error_text):
            if fd >= 0:
                os.close(fd)
        self._terminal = self._error_text = -1
