"""Lets the fork server live a container's life once, so that its forks find every cache filled.

What CPython fills on first use (method cache, inline caches, hashes, the linker's table) would otherwise be written by
each fork on pages of its own: the method cache alone touches a hundred. Memory is all that depends on it.
"""

import _socket as socket
import os
import signal
import sys
import time

from oci.monitor import kernel, wire
from oci.monitor.exit import RECORD
from oci.monitor.loop import Loop
from oci.monitor.monitor import Monitor, Surroundings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# Stands in for an OCI runtime: `create` and `exec` leave a process behind that prints a line.
RUNTIME = """
import os, sys
if "--pid-file" in sys.argv:
    path = sys.argv[sys.argv.index("--pid-file") + 1]
    pid = os.fork()
    if pid == 0:
        os.write(1, b"a line\\n" + b"part")
        if "create" in sys.argv:
            import signal
            signal.pause()
        os._exit(0)
    with open(path, "w") as file:
        file.write(str(pid))
"""
PATIENCE_S = 10.0


def live_once(run_dir: str, surroundings: Surroundings) -> None:
    """Raises OSError where even that is not possible."""
    directory = f"{run_dir}/.warm-up-{os.getpid()}"
    os.mkdir(directory, 0o700)  # noqa: PTH102
    try:
        _live(directory, surroundings)
    finally:
        for name in os.listdir(directory):  # noqa: PTH208
            kernel.unlink(f"{directory}/{name}")
        os.rmdir(directory)  # noqa: PTH106


def _live(directory: str, surroundings: Surroundings) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    folder = os.open(directory, os.O_PATH)
    address = f"/proc/self/fd/{folder}/warm.sock"
    listener.bind(address)
    listener.listen(1)
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.connect(address)
    client.setblocking(False)
    loop = Loop()
    monitor = Monitor(loop, listener, wire.decode(wire.encode(_config(directory, surroundings))), surroundings)
    monitor.begin()
    for verb, more in (
        ("create", {"patience_s": PATIENCE_S}),
        ("start", {"patience_s": PATIENCE_S}),
        ("status", {}),
        ("exec", {"patience_s": PATIENCE_S, "fds": ["process"]}),
        ("reopen_log", {}),
        ("kill", {"signal": int(signal.SIGKILL)}),
    ):
        fds = (folder,) if verb == "exec" else ()
        wire.send(client, {"id": 1, "verb": verb, **more}, fds)
        _turn_until(loop, lambda: _answered(client))
    _turn_until(loop, lambda: monitor.has_ended)
    for _ in range(20):
        loop.after(0.0, lambda: None)
        loop.turn()
    for fd in (listener, client):
        fd.close()
    os.close(folder)
    monitor.close()
    loop.close()


def _config(directory: str, surroundings: Surroundings) -> wire.Message:
    return {
        "container_id": "warm-up",
        "directory": directory,
        "bundle": directory,
        "runtime": [sys.executable, "-I", "-S", "-c", RUNTIME],
        "environment": {},
        "log_path": f"{directory}/{RECORD}.log",
        "tty": False,
        "stdin": False,
        "stdin_once": False,
        "oom_score_adj": surroundings.oom_score_adj,
    }


def _answered(client: socket.socket) -> bool:
    try:
        message, _ = wire.receive(client)
    except BlockingIOError:
        return False
    return message is not None and "id" in message


def _turn_until(loop: Loop, claim: "Callable[[], bool]") -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not claim():
        if time.monotonic() > deadline:
            raise TimeoutError("the warm-up takes too long")
        loop.after(0.005, lambda: None)
        loop.turn()
