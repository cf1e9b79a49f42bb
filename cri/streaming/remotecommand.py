"""Exec and attach: a client's streams and a process's, joined until the process has ended and its output is read.

The daemon has no part in it: the container's monitor starts the process and tells its end. A client that goes leaves
the process what a closed terminal or pipe would: SIGHUP with a terminal, end of input and SIGPIPE without.
"""

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cri.streaming import status
from cri.streaming.channel import Channel, ClientGone
from cri.streaming.pipes import BURST_BYTES, PIPE_BYTES, End, burst_pipe, pipe
from cri.streaming.spdy_session import Refused, SpdyStream
from cri.streaming.targets import AttachTarget, ExecTarget
from oci.errors import Error
from oci.monitor_client import ExecRequest, Monitor

_log = logging.getLogger(__name__)

STREAMS_WAIT_S = 30.0  # for a client to open its streams
EXIT_WAIT_S = 1.0  # between the end of an attachment and the news of its container's exit
SIZES_BYTES = 4096  # of a terminal's sizes that have not come whole yet

STDIN, STDOUT, STDERR, ERROR, RESIZE = "stdin", "stdout", "stderr", "error", "resize"
NAMES = (STDIN, STDOUT, STDERR, ERROR, RESIZE)  # in the order of the WebSocket protocols' channel numbers


@dataclass(frozen=True, slots=True)
class Client:
    """The streams that a client has opened, of those that it may; and whether it takes a Status as JSON."""

    streams: dict[str, Channel]
    has_json_status: bool

    def stream(self, name: str) -> Channel | None:
        return self.streams.get(name)


class SpdyStreams:
    """Collects a SPDY client's streams by their `streamType`, until all that are wanted are there."""

    def __init__(self, wanted: frozenset[str]) -> None:
        self._wanted = wanted
        self._complete = asyncio.Event()
        self.streams: dict[str, Channel] = {}

    def take(self, stream: SpdyStream) -> None:
        name = stream.headers.get("streamtype", "").lower()
        if name not in NAMES or name in self.streams:
            raise Refused
        self.streams[name] = stream
        if self._wanted <= self.streams.keys():
            self._complete.set()

    async def all(self) -> dict[str, Channel]:
        """Raises TimeoutError."""
        async with asyncio.timeout(STREAMS_WAIT_S):
            await self._complete.wait()
        return self.streams


def wanted(target: ExecTarget | AttachTarget, has_resize: bool) -> frozenset[str]:
    """The streams that a client of this session opens. Source: the kubelet's own streaming server."""
    asked = {STDIN: target.stdin, STDOUT: target.stdout, STDERR: target.stderr, RESIZE: target.tty and has_resize}
    return frozenset({ERROR, *(name for name, is_asked in asked.items() if is_asked)})


async def serve(target: ExecTarget | AttachTarget, client: Client) -> None:
    """The whole session; returns when the client has been told how it ended."""
    for name in client.streams.keys() - wanted(target, True):
        client.streams[name].stop_reading()
        await client.streams[name].close()
    try:
        if isinstance(target, ExecTarget):
            told = await _exec(target, client)
        else:
            told = await _attach(target, client)
    except (Error, OSError) as error:
        verb = "executing command in" if isinstance(target, ExecTarget) else "attaching to"
        _log.warning("%s container %s: %s", verb, target.container_id, error)
        told = status.failure(f"error {verb} container: {error}", client.has_json_status)
    with contextlib.suppress(ClientGone):
        error_stream = client.streams[ERROR]
        if told:
            await error_stream.write(told)
    for stream in client.streams.values():
        await stream.close()


# Exec


async def _exec(target: ExecTarget, client: Client) -> bytes:
    """What to tell the client."""
    monitor = await Monitor.connect(Path(target.monitor_directory))
    try:
        if target.tty:
            code = await _exec_terminal(monitor, target, client)
        else:
            code = await _exec_pipes(monitor, target, client)
    finally:
        monitor.close()
    is_json = client.has_json_status
    return status.exit_code(code, is_json) if code else status.success(is_json)


async def _exec_terminal(monitor: Monitor, target: ExecTarget, client: Client) -> int:
    session = await monitor.exec(ExecRequest(target.process))
    terminal = End(session.take_console())
    with contextlib.closing(terminal):

        async def resize(rows: int, columns: int) -> None:
            terminal.resize(rows, columns)

        ended = asyncio.ensure_future(session.exit())
        stdin = terminal if target.stdin else None
        await _join(client, stdin, {STDOUT: terminal} if target.stdout else {}, ended, resize, closes_stdin=False)
        return ended.result().exit_code


async def _exec_pipes(monitor: Monitor, target: ExecTarget, client: Client) -> int:
    with _Stdio(target) as stdio:
        session = await monitor.exec(ExecRequest(target.process), **stdio.theirs)
        stdio.close_theirs()
        ended = asyncio.ensure_future(session.exit())
        await _join(client, stdio.stdin, stdio.outputs, ended)
        return ended.result().exit_code


# Attach


async def _attach(target: AttachTarget, client: Client) -> bytes:
    """What to tell the client: nothing but success, whatever the container's exit code, as with every runtime."""
    monitor = await Monitor.connect(Path(target.monitor_directory))
    try:
        with _Stdio(target) as stdio:
            attachment = await monitor.attach(**stdio.theirs)
            stdio.close_theirs()

            async def resize(rows: int, columns: int) -> None:
                await monitor.resize(rows, columns)

            ended = asyncio.ensure_future(attachment.end())
            await _join(client, stdio.stdin, stdio.outputs, ended, resize)
            return await _attach_status(monitor, ended.result(), client.has_json_status)
    finally:
        monitor.close()


async def _attach_status(monitor: Monitor, reason: str, is_json: bool) -> bytes:
    try:
        async with asyncio.timeout(EXIT_WAIT_S):
            await monitor.wait_exit()
    except (Error, TimeoutError):
        return status.failure(f"attachment ended: {reason}", is_json)
    return status.success(is_json)


# The streams


class _Stdio:
    """Pipes for what a client asks for: `theirs` for the monitor, by its parameters' names, the other ends for us."""

    def __init__(self, target: ExecTarget | AttachTarget) -> None:
        self.theirs: dict[str, int] = {}
        self.stdin: End | None = None
        self.outputs: dict[str, End] = {}
        # A process waits for whoever reads its pipe; the monitor waits for no attached client and lets slow ones go.
        is_exec = isinstance(target, ExecTarget)
        make_output, held_bytes = (pipe, PIPE_BYTES) if is_exec else (burst_pipe, BURST_BYTES)
        try:
            if target.stdin:
                self.theirs["stdin_fd"], write_fd = pipe()
                self.stdin = End(write_fd)
            for name in (STDOUT, STDERR):
                if getattr(target, name):
                    read_fd, self.theirs[f"{name}_fd"] = make_output()
                    self.outputs[name] = End(read_fd, held_bytes)
        except OSError:
            self.close()
            raise

    def __enter__(self) -> "_Stdio":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close_theirs(self) -> None:
        for fd in self.theirs.values():
            os.close(fd)
        self.theirs.clear()

    def close(self) -> None:
        self.close_theirs()
        for end in filter(None, (self.stdin, *self.outputs.values())):
            end.close()


async def _no_resize(_rows: int, _columns: int) -> None:
    """Of a process without a terminal."""


async def _join(
    client: Client,
    stdin: End | None,
    outputs: dict[str, End],
    ended: "asyncio.Future[Any]",
    resize: Callable[[int, int], Awaitable[None]] = _no_resize,
    closes_stdin: bool = True,
) -> None:
    """Copy until `ended` is done and what the process has written is sent. Raises what `ended` raises."""
    outward = [asyncio.create_task(_copy_out(end, client.streams[name], ended)) for name, end in outputs.items()]
    inward = []
    if stdin is not None:
        inward.append(asyncio.create_task(_copy_in(client.streams[STDIN], stdin, closes_stdin)))
    if sizes := client.stream(RESIZE):
        inward.append(asyncio.create_task(_follow_sizes(sizes, resize)))
    try:
        await asyncio.gather(ended, *outward)
    finally:  # nobody waits on an fd any more when its owner closes it
        for task in (ended, *outward, *inward):
            task.cancel()
        await asyncio.gather(ended, *outward, *inward, return_exceptions=True)


async def _copy_out(end: End, channel: Channel, ended: "asyncio.Future[Any]") -> None:
    """Returns once the process has ended and what it had written is sent, or nobody can write any more.

    A child that lives on with the pipe does not hold the session: after the end only what is there already is read.
    """
    with contextlib.suppress(ClientGone):
        while data := await end.read(ended):
            await channel.write(data)
            await asyncio.sleep(0)  # a fast writer and a fast reader would keep the loop to themselves
            if ended.done():
                break
        left = end.held_bytes
        while left > 0 and (data := end.read_now()):
            left -= len(data)
            await channel.write(data)
    await channel.close()


async def _copy_in(channel: Channel, end: End, closes: bool) -> None:
    while data := await channel.read():
        if not await end.write(data):
            channel.stop_reading()  # the process reads no more: nor do we
            await channel.close()
            break
    if closes:
        end.close()


# The terminal's size


async def _follow_sizes(channel: Channel, resize: Callable[[int, int], Awaitable[None]]) -> None:
    text = ""
    while data := await channel.read():
        text = (text + data.decode("utf-8", "replace")).lstrip()
        sizes, text = _sizes(text)
        for rows, columns in sizes:
            with contextlib.suppress(Error, OSError):  # a process that has just ended
                await resize(rows, columns)
        if len(text) > SIZES_BYTES:
            channel.stop_reading()
            return


def _sizes(text: str) -> tuple[list[tuple[int, int]], str]:
    """The (rows, columns) at the beginning of a stream of `{"Width": N, "Height": N}`, and the rest of the text."""
    sizes = []
    for value, rest in _objects(text):
        text = rest
        if isinstance(value, dict):
            width, height = value.get("Width"), value.get("Height")
            if isinstance(width, int) and isinstance(height, int):
                sizes.append((min(max(height, 0), 0xFFFF), min(max(width, 0), 0xFFFF)))
    return sizes, text


def _objects(text: str) -> Iterator[tuple[object, str]]:
    decoder = json.JSONDecoder()
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            return
        text = text[end:].lstrip()
        yield value, text
