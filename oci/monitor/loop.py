"""A single-threaded event loop: fds by epoll, timers, and children by SIGCHLD; nothing else."""

import heapq
import os
import select
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT
PRIORITY = select.EPOLLPRI
BROKEN = select.EPOLLERR | select.EPOLLHUP


class Timer:
    """A call to come; `cancel` makes it nothing."""

    __slots__ = ("at", "call")

    def __init__(self, at: float, call: "Callable[[], None]") -> None:
        self.at = at
        self.call: Callable[[], None] | None = call

    def __lt__(self, other: "Timer") -> bool:
        return self.at < other.at

    def cancel(self) -> None:
        self.call = None


class Loop:
    """Only one at a time in a process: it owns SIGCHLD and the wakeup fd."""

    def __init__(self) -> None:
        self._epoll = select.epoll(8)
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._timers: list[Timer] = []
        self._children: dict[int, Callable[[int], None]] = {}
        self.on_stray: Callable[[int, int], None] = lambda pid, status: None
        self.on_terminate: Callable[[], None] = lambda: None  # SIGTERM, for who has called `catch_termination`
        self._stopped = False
        self.busy_turns = 0  # in which there was more than a timer
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self.watch(self._wake_read, READABLE, self._on_signal)

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        self._epoll.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def watch(self, fd: int, events: int, handler: "Callable[[int], None]") -> None:
        """Call `handler(events)` when `fd` has any of `events`, an error or a hang-up. Not for plain files (EPERM)."""
        if fd in self._handlers:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def forget(self, fd: int) -> None:
        """Watch `fd` no longer; to be called before it is closed. Nothing happens if it was not watched."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def after(self, seconds: float, call: "Callable[[], None]") -> Timer:
        timer = Timer(time.monotonic() + seconds, call)
        heapq.heappush(self._timers, timer)
        return timer

    def on_exit(self, pid: int, call: "Callable[[int], None]") -> None:
        """Call `call(wait status)` once our child `pid` has been reaped."""
        self._children[pid] = call

    @property
    def awaits_children(self) -> bool:
        return bool(self._children)

    def stop(self) -> None:
        self._stopped = True

    def run(self) -> None:
        """Until `stop`."""
        while not self._stopped:
            self.turn()

    def turn(self) -> None:
        """Wait for something to happen and handle it."""
        happened = self._epoll.poll(self._patience_s())
        if happened:
            self.busy_turns += 1
        for fd, events in happened:
            handler = self._handlers.get(fd)
            if handler is not None:  # an earlier one of this turn may have closed it
                handler(events)
        self._run_timers()

    def _patience_s(self) -> float | None:
        timers = self._timers
        while timers and timers[0].call is None:
            heapq.heappop(timers)
        return max(0.0, timers[0].at - time.monotonic()) if timers else None

    def _run_timers(self) -> None:
        timers = self._timers
        now = time.monotonic()
        while timers and timers[0].at <= now:
            call = heapq.heappop(timers).call
            if call is not None:
                call()

    def _on_signal(self, _events: int) -> None:
        try:
            numbers = os.read(self._wake_read, 512)
        except BlockingIOError:
            return
        self.reap()
        if signal.SIGTERM in numbers:
            self.on_terminate()

    def reap(self) -> None:
        """Take every child that has ended. `on_stray` sees an unknown one while it is still a zombie."""
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            pid = found.si_pid
            call = self._children.pop(pid, None)
            if call is None:
                self.on_stray(pid, wait_status(found))
            _, status = os.waitpid(pid, 0)
            if call is not None:
                call(status)

    def ended_elsewhere(self, pid: int, status: int) -> None:
        """A process was reaped by its parent, who tells us."""
        call = self._children.pop(pid, None)
        if call is None:
            self.on_stray(pid, status)
        else:
            call(status)


def wait_status(found: os.waitid_result) -> int:
    """A waitid result in waitpid's encoding."""
    if found.si_code == os.CLD_EXITED:
        return found.si_status << 8
    core = 0x80 if found.si_code == os.CLD_DUMPED else 0
    return found.si_status | core


def catch_children() -> None:
    """Once per program, before its first loop; forked processes inherit it."""
    signal.signal(signal.SIGCHLD, _woken)


def catch_termination() -> None:
    """In this process alone: what it forks is to put SIGTERM back."""
    signal.signal(signal.SIGTERM, _woken)


def _woken(_number: int, _frame: object) -> None:
    """The wakeup fd has done the work; without a handler the signal would not be caught at all."""
