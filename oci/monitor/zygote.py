"""The process that all others are forked from: it does next to nothing, so that its pages stay as they are.

A page that the parent writes between two forks is copied for good; so the fork server, which parses, logs and reaps,
keeps this one beside it. What it forks is forked twice: the first child ends at once, and the second is thereby the
fork server's, the next subreaper above.
"""

import _socket as socket
import array
import gc
import os
import signal

from oci.monitor import keeper, kernel, pod, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from oci.monitor.monitor import Surroundings

MONITOR, POD = b"M", b"P"  # the first byte of a request says what shall be made; the rest is its JSON


def run(channel_fd: int, surroundings: "Surroundings") -> "NoReturn":
    """Be the zygote; ends when the other end of `channel_fd` is closed."""
    channel = pod.take_channel(channel_fd)
    kernel.set_name("crito-zygote")
    receive, space, flags = channel.recvmsg, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
    fork, close, wait = os.fork, os.close, os.waitpid
    while True:
        data, ancillary, _, _ = receive(wire.MESSAGE_BYTES, space, flags)
        if not data:
            os._exit(0)
        fd = array.array("i", ancillary[0][2])[0]
        child = fork()
        if child == 0:
            _fork_again(channel, data, fd, surroundings)
        close(fd)
        wait(child, 0)


def _fork_again(channel: socket.socket, data: bytes, fd: int, surroundings: "Surroundings") -> "NoReturn":
    child = os.fork()
    if child == 0:
        _be(data, fd, surroundings)
    channel.send(b"%d" % child)
    os._exit(0)


def _be(data: bytes, fd: int, surroundings: "Surroundings") -> "NoReturn":
    try:
        if data[:1] == MONITOR:
            keeper.run(fd, data[1:], surroundings)
        gc.enable()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        pod.make(wire.decode(data[1:]), fd)
    except BaseException:
        kernel.report_exception()
    os._exit(1)
