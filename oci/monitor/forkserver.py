"""The small process that makes pods and monitors by forking itself, and knows how their orphans ended."""

import _socket as socket
import array
import gc
import json
import os
import signal
import stat
import time

from oci.monitor import arena, kernel, pod, warm_up, wire, zygote
from oci.monitor import exit as exits
from oci.monitor.loop import READABLE, Loop, catch_children, catch_termination
from oci.monitor.monitor import Surroundings
from oci.monitor.processes import exit_code

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "crito-forks"
SOCKET = "forkserver.sock"
ORPHANS = "orphans"
ORPHANS_KEPT = 1000
POD_TIMEOUT_S = 30.0


class ForkServer:
    """Serves the daemon until it is told to retire; then stays for its children until the last of them is gone.

    SIGTERM says so too: it comes when the node shuts down, which would wait for us, and means well at any other time:
    the daemon's next request starts a successor.
    """

    def __init__(
        self, loop: Loop, listener: socket.socket, run_dir: str, program: str, surroundings: Surroundings
    ) -> None:
        self._loop = loop
        self._listener: socket.socket | None = listener
        self._run_dir = run_dir
        self._program = program
        self._surroundings = surroundings
        self._clients: list[socket.socket] = []
        self._orphans: list[str] = []
        self._forking: list[Callable[[int], None]] = []
        self._start_zygote()
        loop.on_stray = self._record_orphan
        loop.on_terminate = lambda: self._retire(self._drop_all)
        loop.watch(listener.fileno(), READABLE, self._on_connect)

    def _on_connect(self, _events: int) -> None:
        assert self._listener is not None
        client = wire.accept(self._listener)
        if client is None:
            return
        self._clients.append(client)
        self._loop.watch(client.fileno(), READABLE, lambda _events: self._on_message(client))
        hello = {"protocol": wire.PROTOCOL, "program": self._program, "pid": os.getpid()}
        self._tell(client, {"hello": hello})

    def _tell(self, client: socket.socket, message: wire.Message) -> bool:
        if client.fileno() < 0:
            return False
        try:
            wire.send(client, message)
        except OSError:
            self._drop(client)
            return False
        return True

    def _drop(self, client: socket.socket) -> None:
        if client.fileno() >= 0:
            self._loop.forget(client.fileno())
            client.close()
            self._clients.remove(client)

    def _drop_all(self) -> None:
        for client in list(self._clients):
            self._drop(client)

    def _on_message(self, client: socket.socket) -> None:
        try:
            message, fds = wire.receive(client)
        except BlockingIOError:
            return
        except (OSError, wire.ProtocolError):
            self._drop(client)
            return
        if message is None:
            self._drop(client)
            return
        request = message.get("id", 0)
        try:
            named = wire.named_fds(message, fds)
        except wire.ProtocolError as error:
            self._tell(client, {"id": request, "error": str(error)})
            return
        try:
            self._serve(client, request, message, named)
        except Exception as error:
            kernel.report_exception()
            self._tell(client, {"id": request, "error": f"{message.get('verb')}: {type(error).__name__}: {error}"})
        finally:
            wire.close_all(list(named.values()))

    def _serve(self, client: socket.socket, request: int, message: wire.Message, fds: dict[str, int]) -> None:
        verb = message.get("verb")
        if verb == "make_pod":
            self._make_pod(client, request, message["pod"])
        elif verb == "monitor":
            self._fork_monitor(client, request, message["config"], fds["listener"])
        elif verb == "status":
            self._tell(client, {"id": request, "children": self._children()})
        elif verb == "retire":
            self._retire(lambda: self._tell(client, {"id": request, "children": self._children()}))
        else:
            self._tell(client, {"id": request, "error": f"unknown verb {verb!r}"})

    # Forking, by way of the zygote

    def _start_zygote(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            zygote.run(theirs.fileno(), self._surroundings)
        theirs.close()
        ours.setblocking(False)
        self._zygote = ours
        self._zygote_pid = pid
        self._loop.watch(ours.fileno(), READABLE, self._on_forked)
        self._loop.on_exit(pid, self._zygote_ended)

    def _fork(self, kind: bytes, message: wire.Message, fd: int, forked: "Callable[[int], None]") -> None:
        """Let the zygote make a process that does as `message` says; `forked` gets its pid, 0 if there is none."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        self._zygote.sendmsg([kind, wire.encode(message)], ancillary, socket.MSG_NOSIGNAL)
        self._forking.append(forked)

    def _on_forked(self, _events: int) -> None:
        try:
            pid = int(self._zygote.recv(16) or 0)
        except BlockingIOError:
            return
        if not pid:  # it is dead; its end is told by SIGCHLD as well
            self._loop.forget(self._zygote.fileno())
            return
        self._loop.on_exit(pid, lambda _status: None)
        self._forking.pop(0)(pid)

    def _zygote_ended(self, _status: int) -> None:
        if self._listener is None:
            return
        self._loop.forget(self._zygote.fileno())
        self._zygote.close()
        waiting, self._forking = self._forking, []
        self._start_zygote()
        for forked in waiting:
            forked(0)

    def _make_pod(self, client: socket.socket, request: int, asked: wire.Message) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        makers: list[int] = []
        timer = self._loop.after(POD_TIMEOUT_S, lambda: _kill(makers))

        def answer(_events: int) -> None:
            timer.cancel()
            result, _ = wire.receive(ours)
            self._loop.forget(ours.fileno())
            ours.close()
            self._pod_made(client, request, asked, result)

        self._loop.watch(ours.fileno(), READABLE, answer)
        try:
            self._fork(zygote.POD, asked, theirs.fileno(), makers.append)
        finally:
            theirs.close()

    def _pod_made(self, client: socket.socket, request: int, asked: wire.Message, result: wire.Message | None) -> None:
        if result is None:
            pod.remove_pins(asked["pin_dir"])
            result = {"error": f"the process that makes the pod died, or took longer than {POD_TIMEOUT_S:g} s"}
        elif "error" not in result and result["pid"]:
            self._loop.on_exit(result["pid"], lambda _status: None)
        if not self._tell(client, {"id": request, **result}) and "error" not in result:
            _kill([result["pid"]])
            pod.remove_pins(asked["pin_dir"])

    def _fork_monitor(self, client: socket.socket, request: int, config: wire.Message, listener: int) -> None:
        def forked(pid: int) -> None:
            if pid:
                self._tell(client, {"id": request, "pid": pid})
            else:
                self._tell(client, {"id": request, "error": "the process that forks monitors died"})

        self._fork(zygote.MONITOR, config, listener, forked)

    # Orphans: children of a monitor that died. Their exit would be lost otherwise.

    def _record_orphan(self, pid: int, status: int) -> None:
        started = kernel.start_time(pid)
        code, number = exit_code(status)
        name = f"{pid}-{started}.json"
        record = {"pid": pid, "start_time": started, "exit_code": code, "signal": number, "finished_at": time.time_ns()}
        try:
            kernel.write_record(f"{self._run_dir}/{ORPHANS}", name, json.dumps(record))
        except OSError:
            kernel.report_exception()
        self._orphans.append(name)
        if len(self._orphans) > ORPHANS_KEPT:
            kernel.unlink(f"{self._run_dir}/{ORPHANS}/{self._orphans.pop(0)}")

    def _children(self) -> list[int]:
        """Those alive, the zygote aside."""
        own, stats = os.getpid(), kernel.processes()
        pids = [stat.pid for stat in stats if stat.parent == own and stat.state not in "ZX"]
        return [pid for pid in pids if pid != self._zygote_pid]

    # The end

    def _retire(self, tell: "Callable[[], object]") -> None:
        """Make room for a successor on the same path; `tell` is called when nothing is under way any more."""
        if self._listener is not None:
            self._loop.forget(self._listener.fileno())
            self._listener.close()
            self._listener = None
            kernel.unlink(f"{self._run_dir}/{SOCKET}")
        if self._forking:  # let it finish what is under way
            self._loop.after(0.01, lambda: self._retire(tell))
            return
        if self._zygote.fileno() >= 0:
            self._loop.forget(self._zygote.fileno())
            self._zygote.close()
        tell()
        self._end_if_alone()

    def _end_if_alone(self) -> None:
        if _has_children():
            self._loop.after(0.2, self._end_if_alone)
        else:
            self._loop.stop()


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _kill(pids: list[int]) -> None:
    for pid in pids:
        if pid:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _cgroup_mounts() -> exits.Mounts:
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:  # noqa: PTH123
        return exits.cgroup_mounts(file.read())


def _listen(run_dir: str) -> socket.socket:
    """A listening socket at its path, put there by rename: a client finds the old server or this one."""
    directory = os.open(run_dir, os.O_PATH | os.O_DIRECTORY)
    try:
        temporary = f".{SOCKET}.{os.getpid()}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        old = os.umask(0o177)
        try:
            listener.bind(f"/proc/self/fd/{directory}/{temporary}")
        finally:
            os.umask(old)
        listener.listen(64)
        os.rename(temporary, SOCKET, src_dir_fd=directory, dst_dir_fd=directory)
        return listener
    finally:
        os.close(directory)


def _own_null_device() -> None:
    """Take a null device of our own as stdin and stdout, which every container without its own stdin gets.

    crun gives what it finds there to the container's user: with the host's /dev/null that user could change its mode
    for everybody. Where no device can be made, the host's has to do.
    """
    name = f"/dev/.crito-null-{os.getpid()}"
    try:
        os.mknod(name, stat.S_IFCHR | 0o666, os.stat("/dev/null").st_rdev)  # noqa: PTH116
    except OSError:
        return
    try:
        fd = os.open(name, os.O_RDWR | os.O_CLOEXEC)
        os.fchmod(fd, 0o666)
    except OSError:
        return
    finally:
        os.unlink(name)  # noqa: PTH108
    for standard in (0, 1):
        os.dup2(fd, standard)
    os.close(fd)


def main(arguments: list[str]) -> None:
    """`main([run_dir, program])`: returns in the parent once the server listens; the server itself is its child."""
    run_dir, program = arguments
    os.makedirs(f"{run_dir}/{ORPHANS}", 0o700, exist_ok=True)  # noqa: PTH103
    listener = _listen(run_dir)
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    os.umask(0o022)
    _own_null_device()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    catch_children()
    kernel.set_name(NAME)
    kernel.set_child_subreaper()
    kernel.keep_heap_small()
    surroundings = Surroundings(_cgroup_mounts(), int(kernel.read_file("/proc/self/oom_score_adj")))
    warm_up.live_once(run_dir, surroundings)
    arena.fill_holes()
    gc.freeze()
    gc.disable()
    kernel.trim_heap()
    loop = Loop()
    _server = ForkServer(loop, listener, run_dir=run_dir, program=program, surroundings=surroundings)
    catch_termination()
    loop.run()
