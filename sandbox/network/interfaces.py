"""Reads and sets the network interfaces of a pod's network namespace, from outside of it."""

import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

LIBC = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNET = 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8913, 0x8914
IFF_UP = 0x1
IFREQ = struct.Struct("16sh22x")  # struct ifreq with ifr_flags


@dataclass(frozen=True, slots=True)
class InterfaceStats:
    """The counters of one interface since it was made."""

    name: str
    rx_bytes: int
    rx_packets: int
    rx_errors: int
    rx_dropped: int
    tx_bytes: int
    tx_packets: int
    tx_errors: int
    tx_dropped: int


def interface_stats(pid: int) -> tuple[InterfaceStats, ...]:
    """The interfaces of the network namespace that process `pid` is in. OSError when the process is gone."""
    return parse_net_dev(Path(f"/proc/{pid}/net/dev").read_text())


def interface_stats_in(netns: str) -> tuple[InterfaceStats, ...]:
    """The same by the path of a namespace, for a pod that has no process."""
    return parse_net_dev(in_netns(netns, lambda: Path("/proc/thread-self/net/dev").read_text()))


def parse_net_dev(text: str) -> tuple[InterfaceStats, ...]:
    """The rows of /proc/net/dev without the loopback. Source: proc(5)."""
    rows = (line.split(":", 1) for line in text.splitlines()[2:])
    return tuple(_row(name.strip(), counters.split()) for name, counters in rows if name.strip() != "lo")


def _row(name: str, counters: list[str]) -> InterfaceStats:
    rx_bytes, rx_packets, rx_errors, rx_dropped = map(int, counters[:4])
    tx_bytes, tx_packets, tx_errors, tx_dropped = map(int, counters[8:12])
    return InterfaceStats(
        name, rx_bytes, rx_packets, rx_errors, rx_dropped, tx_bytes, tx_packets, tx_errors, tx_dropped
    )


def bring_up_loopback(netns: str) -> None:
    """Make sure that "lo" of the namespace at this path is up; with it come 127.0.0.1 and ::1."""
    with in_netns(netns, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)) as lo:
        flags = IFREQ.unpack(fcntl.ioctl(lo, SIOCGIFFLAGS, IFREQ.pack(b"lo", 0)))[1]
        if not flags & IFF_UP:
            fcntl.ioctl(lo, SIOCSIFFLAGS, IFREQ.pack(b"lo", flags | IFF_UP))


def is_netns(path: str) -> bool:
    """Whether a namespace is pinned at `path`: the file may be gone, or be left without its bind mount."""
    try:
        return path != "" and Path(path).stat().st_dev == Path("/proc/self/ns/net").stat().st_dev
    except OSError:
        return False


def in_netns(netns: str, function: Callable[[], T]) -> T:
    """What `function` returns when run in the namespace at this path.

    It runs in a thread that is made for it and ends with it: a thread of a pool would stay in the namespace.
    """
    done: Future[T] = Future()

    def enter_and_run() -> None:
        try:
            _set_netns(netns)
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=enter_and_run, name="netns", daemon=True)
    thread.start()
    thread.join()
    return done.result()


def _set_netns(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if LIBC.setns(fd, CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
    finally:
        os.close(fd)
