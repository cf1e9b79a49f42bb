"""A pod's namespaces: made by the process that becomes the pod's pause, pinned by bind mounts that outlive it.

Three processes: the fork server forks a maker, which stays in the host's namespaces and does what needs the host's
privileges (id maps, pins, cgroups); the maker forks the pod's process, which unshares, sets up and confines itself.
With a PID namespace of its own that one forks once more, since only children are in the new one.
"""

import _socket as socket
import fcntl
import os
import signal
import struct

from oci.monitor import kernel, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

NAME = "pause"
RECORD = "pause.json"
CHANNEL = 3  # the fd number that leads to whoever forked us
FLAGS = {
    "net": kernel.CLONE_NEWNET,
    "ipc": kernel.CLONE_NEWIPC,
    "uts": kernel.CLONE_NEWUTS,
    "pid": kernel.CLONE_NEWPID,
    "user": kernel.CLONE_NEWUSER,
}
# Which sysctls belong to which namespace; all others are the node's. Source: kubernetes, "Using sysctls".
SYSCTLS = (
    ("net.", "net"),
    ("kernel.shm", "ipc"),
    ("kernel.msg", "ipc"),
    ("kernel.sem", "ipc"),
    ("fs.mqueue.", "ipc"),
    ("kernel.hostname", "uts"),
    ("kernel.domainname", "uts"),
)
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1


class PodError(Exception):
    """A step that failed, with what was seen."""


class step:
    """`with step("what is done"):` turns an OSError into a PodError that says so."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, OSError):
            name = self._name
            where = f" ({error.filename})" if error.filename and str(error.filename) not in name else ""
            raise PodError(f"{name}: {error.strerror or error}{where}") from error


# The maker


def make(request: wire.Message, reply_fd: int) -> "NoReturn":
    """Be the maker: make the pod, answer on `reply_fd`, end. If nobody hears the answer, nothing stays."""
    reply = take_channel(reply_fd)
    kernel.set_child_subreaper()  # until it ends: what the pod's process forks and leaves is its to undo
    maker = Maker(request)
    try:
        wire.send(reply, maker.run())
    except BaseException as error:
        maker.undo()
        text = str(error) if isinstance(error, PodError) else f"{type(error).__name__}: {error}"
        try:
            wire.send(reply, {"error": text})
        except OSError:
            os._exit(1)
    os._exit(0)


def take_channel(fd: int) -> socket.socket:
    """After a fork: the one connection to keep; everything else above stderr is closed."""
    if fd != CHANNEL:
        os.dup2(fd, CHANNEL, inheritable=False)
    kernel.close_fds_from(CHANNEL + 1)
    os.set_blocking(CHANNEL, True)
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, CHANNEL)


class Maker:
    def __init__(self, request: wire.Message) -> None:
        self._request = request
        self._namespaces: list[str] = request["namespaces"]
        self._pin_dir: str = request["pin_dir"]
        self._keep: bool = request["keep_process"]
        self._pid = 0

    def run(self) -> wire.Message:
        unknown = sorted(set(self._namespaces) - set(FLAGS))
        if unknown:
            raise PodError(f"unknown namespaces {', '.join(unknown)}")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with step("fork"):
            child = os.fork()
        if child == 0:
            ours.close()
            PodProcess(self._request, theirs).run()
        theirs.close()
        self._pid = child
        self._let_it_set_up(ours, child)
        started = kernel.start_time(self._pid)
        self._pin()
        self._place()
        if self._keep:
            self._write_record(started)
        wire.send(ours, {"go": True})
        last, _ = wire.receive(ours)  # its exec closes the socket; before that comes at most an error
        if last is not None:
            raise PodError(last["error"])
        if not self._keep:
            self._let_it_end(child)
            return {"pid": 0, "start_time": 0}
        return {"pid": self._pid, "start_time": started}

    def _let_it_set_up(self, sock: socket.socket, child: int) -> None:
        # With a PID namespace two processes speak here: the second's "ready" may overtake the first's "forked".
        forking, ready = "pid" in self._namespaces, False
        while forking or not ready:
            message, _ = wire.receive(sock)
            if message is None:
                raise PodError("the pod's process died while it set itself up")
            if "error" in message:
                raise PodError(message["error"])
            if "unshared" in message:
                self._write_id_maps(child)
                wire.send(sock, {"mapped": True})
            elif "forked" in message:
                self._pid = message["forked"]
                os.waitpid(child, 0)
                forking = False
            elif "ready" in message:
                ready = True

    def _let_it_end(self, child: int) -> None:
        """Reap it here: the fork server would take it for an orphan whose exit somebody wants to know."""
        if self._pid == child:
            os.waitpid(child, 0)
            self._pid = 0

    def _write_id_maps(self, pid: int) -> None:
        for name in ("uid", "gid"):
            lines = [" ".join(map(str, line)) for line in self._request.get(f"{name}_maps", [])]
            with step(f"{name} map {', '.join(lines)}"):
                kernel.write_file(f"/proc/{pid}/{name}_map", "\n".join(lines) + "\n")

    def _pin(self) -> None:
        for name in self._namespaces:
            target = f"{self._pin_dir}/{name}"
            with step(f"pin the {name} namespace on {target}"):
                os.close(os.open(target, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
                kernel.mount(f"/proc/{self._pid}/ns/{name}", target, "", kernel.MS_BIND)
                kernel.mount("", target, "", kernel.MS_PRIVATE)

    def _place(self) -> None:
        if not self._keep:
            return
        for path in self._request.get("cgroup_procs", []):
            with step(f"cgroup {path}"):
                kernel.write_file(path, str(self._pid))
        kernel.set_oom_score_adj(self._pid, self._request.get("oom_score_adj", -998))

    def _write_record(self, started: int) -> None:
        """So that a pause whose maker was told by nobody can still be found."""
        with step(f"record {self._pin_dir}/{RECORD}"):
            kernel.write_record(self._pin_dir, RECORD, f'{{"pid": {self._pid}, "start_time": {started}}}')

    def undo(self) -> None:
        """End what was made, and reap it here: the fork server would keep its end for somebody to ask about."""
        if self._pid:
            try:
                os.kill(self._pid, signal.SIGKILL)
            except ProcessLookupError:
                self._pid = 0
        while True:
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
        remove_pins(self._pin_dir)


def remove_pins(pin_dir: str) -> None:
    """Unmount and unlink all pins and remove the directory. What is gone already is fine."""
    for name in (*FLAGS, RECORD):
        target = f"{pin_dir}/{name}"
        try:
            while True:  # several layers, should two makers have raced
                kernel.umount2(target, kernel.MNT_DETACH | kernel.UMOUNT_NOFOLLOW)
        except OSError:
            pass  # EINVAL: not a mount (any more); ENOENT: no such pin
        kernel.unlink(target)
    try:
        os.rmdir(pin_dir)  # noqa: PTH106
    except FileNotFoundError:
        return


# The pod's process


class PodProcess:
    def __init__(self, request: wire.Message, sock: socket.socket) -> None:
        self._request = request
        self._namespaces: list[str] = request["namespaces"]
        self._sock = sock

    def run(self) -> "NoReturn":
        self._sock = take_channel(self._sock.detach())
        try:
            kernel.set_name(NAME)
            self._enter()
            self._set_up()
            keep = self._request["keep_process"]
            if keep:
                pause = self._open_pause()
                self._confine()
            wire.send(self._sock, {"ready": True})
            answer, _ = wire.receive(self._sock)
            if answer is not None and keep:
                self._pause(pause)
        except BaseException as error:
            text = str(error) if isinstance(error, PodError) else f"{type(error).__name__}: {error}"
            try:
                wire.send(self._sock, {"error": text})
            except OSError:
                os._exit(1)
            os._exit(1)
        os._exit(0)

    def _enter(self) -> None:
        os.setsid()
        flags = 0
        for name in self._namespaces:
            flags |= FLAGS[name]
        with step(f"unshare {', '.join(self._namespaces)}"):
            kernel.unshare(flags)
        if "user" in self._namespaces:
            wire.send(self._sock, {"unshared": True})
            if wire.receive(self._sock)[0] is None:
                os._exit(1)
            with step("become root of the user namespace"):
                os.setgroups([])
                os.setresgid(0, 0, 0)
                os.setresuid(0, 0, 0)
        if "pid" in self._namespaces:
            with step("fork into the PID namespace"):
                child = os.fork()
            if child:
                wire.send(self._sock, {"forked": child})
                os._exit(0)

    def _set_up(self) -> None:
        if "net" in self._namespaces:
            with step("bring up the loopback"):
                bring_up("lo")
        hostname = self._request.get("hostname", "")
        if hostname and "uts" in self._namespaces:
            with step(f"hostname {hostname}"):
                socket.sethostname(hostname)
        for name, value in self._request.get("sysctls", {}).items():
            self._set_sysctl(name, value)

    def _set_sysctl(self, name: str, value: str) -> None:
        dotted = name if "." in name.split("/", 1)[0] else name.replace("/", ".")
        owner = next((namespace for prefix, namespace in SYSCTLS if dotted.startswith(prefix)), None)
        if owner not in self._namespaces:
            raise PodError(f"sysctl {name}: not of a namespace that this pod has for itself")
        path = sysctl_path(name)
        if ".." in path.split("/"):
            raise PodError(f"sysctl {name}: malformed")
        with step(f"sysctl {name}={value}"):
            kernel.write_file(path, value)

    def _open_pause(self) -> int:
        path = self._request.get("pause_path", "")
        if not path:
            return -1
        with step(f"pause program {path}"):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def _confine(self) -> None:
        """An empty read-only root, and no capabilities: a process that only sleeps needs neither."""
        with step("confine the pause"):
            kernel.unshare(kernel.CLONE_NEWNS)
            kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
            flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
            kernel.mount("pause", "/proc", "tmpfs", flags, "size=4k,nr_inodes=2,mode=555")
            os.chdir("/proc")
            kernel.pivot_root(".", ".")
            kernel.umount2(".", kernel.MNT_DETACH)
            os.chdir("/")
            kernel.mount("", "/", "", kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | flags)
            kernel.drop_capabilities()
            kernel.set_no_new_privs()

    def _pause(self, program: int) -> "NoReturn":
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if program >= 0:
            os.dup2(0, 2)  # the null device; the exec closes everything else
            os.execve(program, [NAME, "-P"], {})
        os.dup2(0, 2)
        self._sock.close()
        sleep_and_reap()


def sysctl_path(name: str) -> str:
    """The file of a sysctl written with dots, or with slashes where a part has a dot in it. Source: sysctl(8)."""
    first = next((c for c in name if c in "./"), ".")
    return "/proc/sys/" + (name if first == "/" else name.replace(".", "\0").replace("/", ".").replace("\0", "/"))


def bring_up(interface: str) -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    request = fcntl.ioctl(sock.fileno(), _SIOCGIFFLAGS, struct.pack("16sh22x", interface.encode(), 0))
    (flags,) = struct.unpack_from("h", request, 16)
    fcntl.ioctl(sock.fileno(), _SIOCSIFFLAGS, struct.pack("16sh22x", interface.encode(), flags | _IFF_UP))
    sock.close()


def sleep_and_reap() -> "NoReturn":
    """As process 1 of a PID namespace: reap orphans, end at SIGTERM or SIGINT."""
    signals = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # process 1 is not sent what it does not handle
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        if signal.sigwait(signals) in (signal.SIGTERM, signal.SIGINT):
            os._exit(0)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            continue
