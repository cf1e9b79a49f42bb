"""The entry of the stream server's process: started by the daemon, which gives it its listening sockets."""

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import sys
from pathlib import Path

# -I keeps the script's folder out of sys.path; appended, so that nothing beside our packages shadows the library.
if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[2]))

import msgspec

from cri.streaming.control import SOCKET, Control
from cri.streaming.server import StreamServer
from cri.streaming.settings import StreamSettings


def main(arguments: list[str]) -> None:
    """`main([run_dir, program, settings as JSON, fd of the control socket, fd of the TCP socket])`."""
    run_dir, program, settings, control_fd, stream_fd = arguments
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(
        serve(
            Path(run_dir),
            program,
            msgspec.json.decode(settings, type=StreamSettings),
            socket.socket(fileno=int(control_fd)),
            socket.socket(fileno=int(stream_fd)),
        )
    )


async def serve(
    run_dir: Path, program: str, settings: StreamSettings, control: socket.socket, listener: socket.socket
) -> None:
    for each in (control, listener):
        each.setblocking(False)
        each.set_inheritable(False)
    server = StreamServer(settings, listener)
    await Control(control, run_dir / SOCKET, program, server).until_unneeded()
    await server.close()


if __name__ == "__main__":
    main(sys.argv[1:])
