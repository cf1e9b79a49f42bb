"""Plugins that are installed on the node: found in a directory, started with a connected socket, and ended."""

import asyncio
import contextlib
import logging
import re
import socket
from dataclasses import dataclass
from pathlib import Path

_log = logging.getLogger(__name__)

END_GRACE_S = 2.0  # between SIGTERM and SIGKILL


@dataclass(frozen=True, slots=True)
class Installed:
    """An executable NN-NAME, and what its configuration file says."""

    path: Path
    index: str
    name: str
    config: str


def installed(directory: Path, config_dir: Path) -> list[Installed]:
    """Every plugin in `directory`, in order; none where there is no such directory."""
    try:
        files = sorted(directory.iterdir())
    except FileNotFoundError:
        return []
    found = []
    for path in files:
        if not path.is_file() or not path.stat().st_mode & 0o111:
            continue
        match = re.fullmatch(r"([0-9][0-9])-(.+)", path.name)
        if match is None:
            _log.warning("%s is no NRI plugin: expected a name such as 10-name", path)
            continue
        found.append(Installed(path, match[1], match[2], _config(config_dir, path.name, match[2])))
    return found


def _config(directory: Path, full_name: str, name: str) -> str:
    for path in (directory / f"{full_name}.conf", directory / f"{name}.conf"):
        with contextlib.suppress(FileNotFoundError):
            return path.read_text(errors="replace")
    return ""


async def launch(
    plugin: Installed,
) -> tuple[asyncio.subprocess.Process, asyncio.StreamReader, asyncio.StreamWriter]:
    """The plugin's process and our end of its connection. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with theirs:
            process = await asyncio.create_subprocess_exec(
                str(plugin.path),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,  # what it says goes where the daemon's log goes
                pass_fds=(theirs.fileno(),),
                env={
                    "NRI_PLUGIN_NAME": plugin.name,
                    "NRI_PLUGIN_IDX": plugin.index,
                    "NRI_PLUGIN_SOCKET": str(theirs.fileno()),
                },
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours)
    except BaseException:
        ours.close()
        raise
    return process, reader, writer


async def end(process: asyncio.subprocess.Process) -> None:
    """It has lost its connection; return once it has ended, by force where that is needed."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), END_GRACE_S)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
