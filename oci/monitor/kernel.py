"""The system calls that Python 3.11 does not wrap, under the kernel's own names, and facts from /proc/PID."""

import ctypes
import os
import sys

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 0x2
UMOUNT_NOFOLLOW = 0x8

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_CAPBSET_DROP = 24
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217, "armv7l": 218}
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

_libc = ctypes.CDLL(None, use_errno=True)
_prctl = _libc.prctl  # called with small integers and bytes only, which need no conversion
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]


def _check(result: int, path: str | None = None) -> None:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags))


def mount(source: str, target: str, fstype: str, flags: int, data: str = "") -> None:
    encode = os.fsencode
    _check(_libc.mount(encode(source), encode(target), encode(fstype), flags, encode(data)), target)


def umount2(target: str, flags: int) -> None:
    _check(_libc.umount2(os.fsencode(target), flags), target)


def pivot_root(new_root: str, put_old: str) -> None:
    number = _SYS_PIVOT_ROOT[os.uname().machine]
    _check(_libc.syscall(ctypes.c_long(number), os.fsencode(new_root), os.fsencode(put_old)), new_root)


def set_name(name: str) -> None:
    """The process's name as `ps` shows it; 15 bytes are kept."""
    _prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def die_with_parent() -> None:
    """SIGKILL for this process when its parent ends."""
    _prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)


def set_child_subreaper() -> None:
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def set_no_new_privs() -> None:
    _check(_prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def drop_capabilities() -> None:
    """Give up every capability for good: the bounding set first, which needs CAP_SETPCAP, then all others."""
    for capability in range(64):
        if _prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == -1:
            break  # EINVAL: past the kernel's last one
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)()))


def keep_heap_small() -> None:
    """Make freed buffers go back to the kernel: fixed thresholds, where glibc would let them grow with use."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_MMAP_THRESHOLD, 256 * 1024)
        _libc.mallopt(_M_TRIM_THRESHOLD, 128 * 1024)


def trim_heap() -> None:
    """Give the kernel back what the allocator holds without need; musl has no such call."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


class ProcessStat:
    """A few fields of /proc/PID/stat. `start_time` is in clock ticks since boot (field 22)."""

    __slots__ = ("parent", "pid", "session", "start_time", "state")

    def __init__(self, pid: int, text: str) -> None:
        fields = text[text.rindex(")") + 2 :].split(None, 20)  # the name in parentheses may hold anything
        self.pid = pid
        self.state = fields[0]
        self.parent = int(fields[1])
        self.session = int(fields[3])
        self.start_time = int(fields[19])


def process_stat(pid: int) -> ProcessStat | None:
    """None when there is no such process; a zombie still has one."""
    try:
        return ProcessStat(pid, read_file(f"/proc/{pid}/stat"))
    except (FileNotFoundError, ProcessLookupError):
        return None


def start_time(pid: int) -> int:
    """Clock ticks since boot at which `pid` started; 0 when there is no such process."""
    stat = process_stat(pid)
    return stat.start_time if stat else 0


def processes() -> list[ProcessStat]:
    """All processes of this PID namespace at about this moment."""
    found = (process_stat(int(name)) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208
    return [stat for stat in found if stat is not None]


def read_file(path: str) -> str:
    """The text of a small file, at most 16 KiB."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 16384).decode("utf-8", "surrogateescape")
    finally:
        os.close(fd)


def set_oom_score_adj(pid: int, value: int) -> None:
    """Set it, or leave it where the kernel wants CAP_SYS_RESOURCE: a lower score is a wish, not a need."""
    try:
        write_file(f"/proc/{pid}/oom_score_adj", str(value))
    except PermissionError:
        return


def unlink(path: str) -> None:
    """Remove a file; one that is gone already is fine."""
    try:
        os.unlink(path)  # noqa: PTH108
    except FileNotFoundError:
        return


def write_file(path: str, text: str) -> None:
    """One write(2) to a file that is there already: what procfs, sysctl and cgroup files want."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode("utf-8", "surrogateescape"))
    finally:
        os.close(fd)


def write_record(directory: str, name: str, text: str) -> None:
    """Put `directory/name` in place by rename: a reader sees the whole file or none."""
    temporary = f"{directory}/.{name}.{os.getpid()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
    os.rename(temporary, f"{directory}/{name}")  # noqa: PTH104


def report_exception() -> None:
    """The exception being handled, on stderr; in C, where the traceback module would bring a dozen others."""
    sys.__excepthook__(*sys.exc_info())


def close_fds_from(first: int) -> None:
    """Close every fd from `first` on: one close_range(2), where the libc has it. The fork server has few."""
    os.closerange(first, 4096)
