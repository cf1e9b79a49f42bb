"""Tells when directories change, also ones that do not exist yet, by inotify on the event loop."""

import asyncio
import ctypes
import logging
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

IN_ATTRIB, IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO = 0x4, 0x8, 0x40, 0x80
IN_CREATE, IN_DELETE, IN_DELETE_SELF, IN_MOVE_SELF = 0x100, 0x200, 0x400, 0x800
IN_IGNORED, IN_Q_OVERFLOW, IN_ONLYDIR = 0x8000, 0x4000, 0x01000000
ENTRIES = IN_CREATE | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO | IN_DELETE_SELF | IN_MOVE_SELF
MASK = ENTRIES | IN_CLOSE_WRITE | IN_ATTRIB | IN_ONLYDIR
EVENT = struct.Struct("iIII")  # wd, mask, cookie, length of the name

Interest = set[str] | None  # the names that matter in a watched directory; None: all


class DirectoryWatch:
    """Calls `changed` after something happened in one of the directories, or on the way to one.

    Each directory is watched, and the lowest directory above it that exists, for the name that leads down. When
    inotify is not to be had, nothing is ever told: the owner polls as well.
    """

    def __init__(self, directories: tuple[Path, ...], changed: Callable[[], None]) -> None:
        self._directories = directories
        self._changed = changed
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._interests: dict[int, Interest] = {}
        self._fd = -1

    def start(self) -> None:
        self._fd = self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._fd < 0:
            log.warning("inotify: %s; directories are polled instead", os.strerror(ctypes.get_errno()))
            return
        self.arm()
        asyncio.get_running_loop().add_reader(self._fd, self._read)

    def close(self) -> None:
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def arm(self) -> None:
        """Watch what is there now; to be called again after a change, since paths may lead elsewhere."""
        if self._fd < 0:
            return
        interests: dict[int, Interest] = {}
        for directory in self._directories:
            for path, interest in self._points(directory):
                wd = self._libc.inotify_add_watch(self._fd, os.fsencode(path), MASK)
                if wd >= 0:  # else it went between the look and the call; the watch above it tells
                    known = interests.get(wd, set())
                    interests[wd] = None if interest is None or known is None else known | interest
        for wd in self._interests.keys() - interests.keys():
            self._libc.inotify_rm_watch(self._fd, wd)
        self._interests = interests

    @staticmethod
    def _points(directory: Path) -> list[tuple[Path, Interest]]:
        points: list[tuple[Path, Interest]] = []
        if directory.is_dir():
            points.append((directory, None))
            points += [(child, None) for child in directory.iterdir() if child.is_dir()]
        child = directory
        for parent in directory.parents:
            if parent.is_dir():
                points.append((parent, {child.name}))
                break
            child = parent
        return points

    def _read(self) -> None:
        with suppress(BlockingIOError):
            if self._concerns_us(os.read(self._fd, 1 << 16)):
                self.arm()
                self._changed()

    def _concerns_us(self, events: bytes) -> bool:
        concerned, offset = False, 0
        while offset < len(events):
            wd, mask, _, length = EVENT.unpack_from(events, offset)
            name = os.fsdecode(events[offset + EVENT.size : offset + EVENT.size + length].rstrip(b"\0"))
            offset += EVENT.size + length
            if mask & IN_Q_OVERFLOW:
                return True
            interest = self._interests.get(wd, set())  # a watch that was removed may still have told something
            concerned |= not mask & IN_IGNORED and (interest is None or not name or name in interest)
        return concerned
