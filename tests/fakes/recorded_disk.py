"""A disk that remembers every write in its order, to say what it would hold had the power gone at any moment.

A process of its own serves one file by FUSE; a loop device makes a disk of it, an ext4 lies on that. What a disk was
told to flush it has; of what came after, it may have any part: see Recording.after_power_loss.
"""

import ctypes
import os
import random
import signal
import stat
import struct
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_FLUSH = 1 << 63  # the offset that stands for a flush in the log
_RECORD = struct.Struct("<QI")
_MAX_WRITE = 128 << 10
_SECTOR = 4096


@dataclass(frozen=True, slots=True)
class Write:
    """None as data is a flush; `end` is the size of the log after it."""

    end: int
    offset: int
    data: bytes | None


@dataclass(frozen=True, slots=True)
class Recording:
    """Made by `recorded_disk`: the disk as it was before, and what was written since."""

    before: Path
    log: Path

    @property
    def position(self) -> int:
        """How much has been written and flushed up to now; of use to name a moment."""
        return self.log.stat().st_size

    def writes(self) -> list[Write]:
        text, at, found = self.log.read_bytes(), 0, []
        while at < len(text):
            offset, size = _RECORD.unpack_from(text, at)
            at += _RECORD.size
            data = None if offset == _FLUSH else text[at : at + size]
            at += size
            found.append(Write(at, offset, data))
        return found

    def after_power_loss(self, writes: Sequence[Write], position: int, chance: random.Random | None, to: Path) -> None:
        """Makes `to` what the disk holds when the power goes at `position`.

        With `chance` each sector written since the last flush is there or not, as a drive's cache leaves them; without,
        all are.
        """
        subprocess.run(["cp", "--reflink=never", "--sparse=always", str(self.before), str(to)], check=True)
        done = writes[: bisect_right(writes, position, key=lambda write: write.end)]
        flushed = max((at for at, write in enumerate(done) if write.data is None), default=-1)
        with to.open("r+b") as disk:
            for at, write in enumerate(done):
                for start in range(0, len(write.data or b""), _SECTOR):
                    if at < flushed or chance is None or chance.random() < 0.5:
                        disk.seek(write.offset + start)
                        disk.write((write.data or b"")[start : start + _SECTOR])


@contextmanager
def recorded_disk(directory: Path, size_bytes: int) -> Iterator[tuple[Path, Recording]]:
    """Where an ext4 is mounted whose every write is recorded; nothing of it stays mounted or runs after the block."""
    before, live, served, log, at = (directory / name for name in ("before", "live", "disk", "log", "mounted"))
    make_ext4(before, size_bytes)
    subprocess.run(["cp", "--sparse=always", str(before), str(live)], check=True)
    served.touch()
    log.touch()
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__)), str(live), str(served), str(log)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    try:
        assert server.stdout is not None and server.stdout.readline() == b"mounted\n"
        with mounted_ext4(served, at, "commit=1"):
            yield at, Recording(before, log)
    finally:
        subprocess.run(["umount", "-l", str(served)], check=False, capture_output=True)
        server.send_signal(signal.SIGKILL)  # its end aborts what may still hang
        server.wait()
        if server.stdout is not None:
            server.stdout.close()


def make_ext4(path: Path, size_bytes: int) -> None:
    with path.open("wb") as file:
        file.truncate(size_bytes)
    options = ["-q", "-F", "-b", "4096", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0"]
    subprocess.run(["mkfs.ext4", *options, str(path)], check=True)


@contextmanager
def mounted_ext4(disk: Path, at: Path, options: str = "") -> Iterator[Path]:
    """The file system in the file `disk`, mounted by a loop device that goes with the mount."""
    at.mkdir(exist_ok=True)
    given = f"loop,{options}" if options else "loop"
    subprocess.run(["mount", "-t", "ext4", "-o", given, str(disk), str(at)], check=True)
    try:
        yield at
    finally:
        if subprocess.run(["umount", str(at)], check=False).returncode:  # some process of a failed test is still in it
            subprocess.run(["umount", "-l", str(at)], check=True)


def why_not() -> str:
    """Why there can be no such disk here; "" where there can."""
    if os.geteuid() != 0:
        return "mounts file systems"
    if not Path("/dev/fuse").exists():
        return "the kernel has no FUSE"
    if not Path("/dev/loop-control").exists():
        return "the kernel has no loop devices"
    if subprocess.run(["sh", "-c", "command -v mkfs.ext4"], check=False, capture_output=True).returncode:
        return "mkfs.ext4 is not installed"
    return "" if "\text4\n" in Path("/proc/filesystems").read_text() else "the kernel has no ext4"


# ---- the server. Source: the kernel's include/uapi/linux/fuse.h

_IN_HEADER = struct.Struct("<IIQQIIIHH")
_OUT_HEADER = struct.Struct("<IiQ")
_ENOSYS = 38
_GETATTR, _SETATTR, _OPEN, _READ, _WRITE, _STATFS = 3, 4, 14, 15, 16, 17
_RELEASE, _FSYNC, _FLUSH_CALL, _INIT = 18, 20, 25, 26
_UNANSWERED = (2, 36, 38, 42)  # FORGET, INTERRUPT, DESTROY, BATCH_FORGET


class _Server:
    """Answers one request after the other, so that the order of the log is the order of the writes."""

    def __init__(self, live: Path, log: Path) -> None:
        self._live = os.open(live, os.O_RDWR | os.O_CLOEXEC)
        self._size = os.fstat(self._live).st_size
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def serve(self, fuse: int) -> None:
        while True:
            try:
                request = os.read(fuse, _MAX_WRITE + (8 << 10))
            except OSError:  # ENODEV: unmounted
                return
            _, opcode, unique, *_ = _IN_HEADER.unpack_from(request)
            if opcode in _UNANSWERED:
                continue
            error, body = self._answer(opcode, request[_IN_HEADER.size :])
            os.write(fuse, _OUT_HEADER.pack(_OUT_HEADER.size + len(body), -error, unique) + body)

    def _answer(self, opcode: int, body: bytes) -> tuple[int, bytes]:
        if opcode == _INIT:
            flags = 1 << 5 | 1 << 22  # BIG_WRITES and MAX_PAGES, of version 7.31
            limits = (16, 12, _MAX_WRITE, 1, _MAX_WRITE >> 12)
            return 0, struct.pack("<IIIIHHIIHHI28x", 7, 31, 0, flags, *limits, 0, 0)
        if opcode in (_GETATTR, _SETATTR):
            times = (0,) * 6
            attributes = (1, self._size, self._size >> 9, *times, stat.S_IFREG | 0o600, 1, 0, 0, 0, 4096, 0)
            return 0, struct.pack("<QII", 3600, 0, 0) + struct.pack("<QQQQQQIIIIIIIIII", *attributes)
        if opcode == _OPEN:
            return 0, struct.pack("<QIi", 1, 1, 0)  # DIRECT_IO: what is written comes here at once
        if opcode == _READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return 0, os.pread(self._live, size, offset)
        if opcode == _WRITE:
            _, offset, size = struct.unpack_from("<QQI", body)
            data = body[40 : 40 + size]
            os.pwrite(self._live, data, offset)
            os.write(self._log, _RECORD.pack(offset, size) + data)
            return 0, struct.pack("<II", size, 0)
        if opcode == _FSYNC:
            os.write(self._log, _RECORD.pack(_FLUSH, 0))
            return 0, b""
        if opcode == _STATFS:
            return 0, struct.pack("<QQQQQIIII24x", self._size >> 12, 0, 0, 1, 0, 4096, 255, 4096, 0)
        return (0, b"") if opcode in (_FLUSH_CALL, _RELEASE) else (_ENOSYS, b"")


def _serve(live: str, served: str, log: str) -> None:
    server = _Server(Path(live), Path(log))
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fuse},rootmode={stat.S_IFREG | 0o600:o},user_id=0,group_id=0"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"recorded-disk", os.fsencode(served), b"fuse", 0, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), served)
    print("mounted", flush=True)
    server.serve(fuse)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
