"""The small process that makes pods and monitors by forking itself, and knows how their orphans ended."""

import gc
import json
import os
import signal
import socket
import time
import traceback
from contextlib import suppress

from oci.monitor import exit as exits
from oci.monitor import kernel, monitor, pod, wire
from oci.monitor.log_file import LogFile, Stamper
from oci.monitor.loop import READABLE, Loop
from oci.monitor.processes import exit_code

NAME = "crito-forks"
SOCKET = "forkserver.sock"
ORPHANS = "orphans"
ORPHANS_KEPT = 1000
POD_TIMEOUT_S = 30.0


class ForkServer:
    """Serves the daemon until it is told to retire; then stays for its children until the last of them is gone."""

    def __init__(self, loop: Loop, listener: socket.socket, run_dir: str, program: str) -> None:
        self._loop = loop
        self._listener: socket.socket | None = listener
        self._run_dir = run_dir
        self._program = program
        self._mounts = _cgroup_mounts()
        self._clients: list[socket.socket] = []
        self._orphans: list[str] = []
        loop.on_stray = self._record_orphan
        loop.watch(listener.fileno(), READABLE, self._on_connect)

    def _on_connect(self, _events: int) -> None:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except BlockingIOError:
            return
        client.setblocking(False)
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
            traceback.print_exc()
            self._tell(client, {"id": request, "error": f"{message.get('verb')}: {type(error).__name__}: {error}"})
        finally:
            wire.close_all(list(named.values()))

    def _serve(self, client: socket.socket, request: int, message: wire.Message, fds: dict[str, int]) -> None:
        verb = message.get("verb")
        if verb == "make_pod":
            self._make_pod(client, request, message)
        elif verb == "monitor":
            self._fork_monitor(client, request, message["config"], fds["listener"])
        elif verb == "status":
            self._tell(client, {"id": request, "children": _children()})
        elif verb == "retire":
            self._retire(client, request)
        else:
            self._tell(client, {"id": request, "error": f"unknown verb {verb!r}"})

    # Pods

    def _make_pod(self, client: socket.socket, request: int, message: wire.Message) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        maker = os.fork()
        if maker == 0:
            _be_maker(message["pod"], theirs)
        theirs.close()
        self._loop.on_exit(maker, lambda _status: None)
        timer = self._loop.after(POD_TIMEOUT_S, lambda: os.kill(maker, signal.SIGKILL))

        def answer(_events: int) -> None:
            timer.cancel()
            result, _ = wire.receive(ours)
            self._loop.forget(ours.fileno())
            ours.close()
            self._pod_made(client, request, message["pod"], result)

        self._loop.watch(ours.fileno(), READABLE, answer)

    def _pod_made(self, client: socket.socket, request: int, asked: wire.Message, result: wire.Message | None) -> None:
        if result is None:
            pod.remove_pins(asked["pin_dir"])
            result = {"error": f"the process that makes the pod died, or took longer than {POD_TIMEOUT_S:g} s"}
        elif "error" not in result and result["pid"]:
            self._loop.on_exit(result["pid"], lambda _status: None)
        if not self._tell(client, {"id": request, **result}) and "error" not in result:
            if result["pid"]:
                os.kill(result["pid"], signal.SIGKILL)
            pod.remove_pins(asked["pin_dir"])

    # Monitors

    def _fork_monitor(self, client: socket.socket, request: int, config: wire.Message, listener: int) -> None:
        child = os.fork()
        if child == 0:
            _forget_parent()
            monitor.run(listener, config, self._mounts)
        self._loop.on_exit(child, lambda _status: None)
        self._tell(client, {"id": request, "pid": child, "start_time": kernel.start_time(child)})

    # Orphans: children of a monitor that died. Their exit would be lost otherwise.

    def _record_orphan(self, pid: int, status: int) -> None:
        started = kernel.start_time(pid)
        code, number = exit_code(status)
        name = f"{pid}-{started}.json"
        record = {"pid": pid, "start_time": started, "exit_code": code, "signal": number, "finished_at": time.time_ns()}
        try:
            kernel.write_record(f"{self._run_dir}/{ORPHANS}", name, json.dumps(record))
        except OSError:
            traceback.print_exc()
        self._orphans.append(name)
        if len(self._orphans) > ORPHANS_KEPT:
            try:
                os.unlink(f"{self._run_dir}/{ORPHANS}/{self._orphans.pop(0)}")  # noqa: PTH108
            except OSError:
                return  # the daemon has taken it

    # The end

    def _retire(self, client: socket.socket, request: int) -> None:
        """Make room for a successor on the same path; answered with the pids of the children that are left."""
        if self._listener is not None:
            self._loop.forget(self._listener.fileno())
            self._listener.close()
            self._listener = None
            with suppress(FileNotFoundError):
                os.unlink(f"{self._run_dir}/{SOCKET}")  # noqa: PTH108
        self._tell(client, {"id": request, "children": _children()})
        self._end_if_alone()

    def _end_if_alone(self) -> None:
        if _has_children():
            self._loop.after(0.2, self._end_if_alone)
        else:
            self._loop.stop()


def _children() -> list[int]:
    own = os.getpid()
    return [stat.pid for stat in kernel.processes() if stat.parent == own and stat.state not in "ZX"]


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _forget_parent() -> None:
    """In a new child: the parent's signals are not ours. Its fds are closed by number, its objects never touched."""
    signal.set_wakeup_fd(-1)
    gc.enable()  # what the parent had is frozen, so its pages stay shared


def _be_maker(asked: wire.Message, reply: socket.socket) -> None:
    _forget_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    reply.setblocking(True)
    kernel.close_all_fds_but((reply.fileno(),))
    pod.make(asked, reply)


def _cgroup_mounts() -> exits.Mounts:
    with open("/proc/self/mountinfo") as file:  # noqa: PTH123
        return exits.cgroup_mounts(file.read())


def _warm_up(loop: Loop) -> None:
    """Run what every monitor runs, so that caches, inline caches and arenas are filled before the forks share them."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    null = os.open(os.devnull, os.O_RDONLY)
    log = LogFile(os.devnull, 0, lambda text: None)
    stamper = Stamper(b"stdout")
    for number in range(40):
        wire.send(here, {"id": number, "verb": "status", "fds": ["one"]}, (null,))
        message, fds = wire.receive(there)
        assert message is not None
        wire.close_all(list(wire.named_fds(message, fds).values()))
        log.write(stamper.feed(b"a line\nand a part", time.time_ns()))
        log.write(stamper.flush(time.time_ns()))
        log.write(stamper.finish(time.time_ns()))
        loop.after(0.0, lambda: None)
        loop.turn()
    kernel.start_time(os.getpid())
    exits.memberships(os.getpid())
    log.close()
    os.close(null)
    here.close()
    there.close()


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
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    kernel.set_name(NAME)
    kernel.set_child_subreaper()
    kernel.keep_heap_small()
    loop = Loop()
    _server = ForkServer(loop, listener, run_dir, program)
    _warm_up(loop)
    gc.collect()
    gc.freeze()
    gc.disable()
    kernel.trim_heap()
    loop.run()
