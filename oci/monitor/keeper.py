"""The half of a monitor that is always there: the container's parent, asleep while nothing happens.

Python's working half (monitor.py) copies about 1.2 MB of the pages that it shares with the zygote. So it does not stay:
once nothing is under way it hands its open files and a few facts to this process, and ends. This one waits on all of
them at once, and forks a new working half, which reads what has come, as soon as there is something to do. It reaps the
container's init and whatever else loses its parent, and tells the working half, since only a parent can.
If either half dies the other ends too: then the monitor is lost, as it would be if it were one process.
"""

import _socket as socket
import array
import os
import select
import signal
import sys

from oci.monitor import kernel, loop, monitor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

NAME = "crito-monitor"
LISTENER = 3  # the fd number of the listening socket
REST_BYTES = 128 * 1024
FDS = monitor.FDS_AT_REST


def run(listener_fd: int, config: bytes, surroundings: "monitor.Surroundings") -> "NoReturn":
    """Be the keeper from here on; for a process just forked, whose other fds are of no concern to it."""
    if listener_fd != LISTENER:
        os.dup2(listener_fd, LISTENER, inheritable=False)
    kernel.close_fds_from(LISTENER + 1)
    os.set_blocking(LISTENER, False)
    os.setsid()
    kernel.set_name(NAME)
    kernel.set_child_subreaper()
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    rest, fds, ended = b"", array.array("i"), [""]
    del ended[:]
    keeper = os.getpid()
    while True:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        worker = os.fork()
        if worker == 0:
            os.close(woken)
            os.close(wake)
            ours.close()
            monitor.run(monitor.Link(theirs, keeper, ended), LISTENER, config, surroundings, rest, fds.tolist())
        theirs.close()
        for fd in fds:
            os.close(fd)
        rest, fds, ended = _while_awake(worker, ours, woken)
        ours.close()
        if not rest:
            os._exit(0)
        if not ended:
            ended = _while_asleep(rest, fds, woken)


def _while_awake(worker: int, channel: socket.socket, woken: int) -> tuple[bytes, "array.array[int]", list[str]]:
    """Tell the working half who ended, until it ends itself.

    Returns what it left: its facts (empty: it is done, or has died), its fds, and the ends that it has not heard of.
    """
    poll = select.poll()
    poll.register(woken, select.POLLIN)
    told: list[str] = []
    while True:
        poll.poll()
        try:
            os.read(woken, 512)
        except BlockingIOError:
            continue
        for pid, status in _reap():
            if pid == worker:
                if status:
                    print(f"monitor {os.getpid()}: its working half died, status {status}", file=sys.stderr, flush=True)
                return _left(channel, told)
            end = f"{pid} {status}"
            told.append(end)
            try:
                channel.send(end.encode())
            except OSError:
                continue  # it ends just now, and has counted what it heard


def _left(channel: socket.socket, told: list[str]) -> tuple[bytes, "array.array[int]", list[str]]:
    fds = array.array("i")
    channel.setblocking(False)
    try:
        rest, ancillary, _, _ = channel.recvmsg(REST_BYTES, socket.CMSG_SPACE(4 * FDS), socket.MSG_CMSG_CLOEXEC)
    except OSError:  # ECONNRESET: it ended with something unread, so without a rest
        rest, ancillary = b"", []
    for _, _, content in ancillary:
        fds.frombytes(content)
    heard = int(rest.split(b" ", 1)[0]) if rest else 0
    return rest, fds, told[heard:]


def _while_asleep(rest: bytes, fds: "array.array[int]", woken: int) -> list[str]:
    """Until there is something to do. Returns the end of the container's init, if that is what it was."""
    _, init, masks, _ = rest.split(b" ", 3)
    poll = select.poll()
    poll.register(LISTENER, select.POLLIN)
    poll.register(woken, select.POLLIN)
    for fd, mask in zip(fds, masks, strict=True):
        if mask == monitor.READ:
            poll.register(fd, select.POLLIN)
        elif mask == monitor.PRIORITY:
            poll.register(fd, select.POLLPRI)
    while True:
        for fd, _ in poll.poll():
            if fd != woken:
                return []
        os.read(woken, 512)
        for pid, status in _reap():
            if pid == int(init):
                return [f"{pid} {status}"]


def _reap() -> list[tuple[int, int]]:
    ended: list[tuple[int, int]] = []
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            return ended
        if found is None:
            return ended
        ended.append((found.si_pid, loop.wait_status(found)))
