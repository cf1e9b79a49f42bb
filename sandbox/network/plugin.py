"""Finds and runs one CNI plugin executable: environment and JSON in, JSON or an error out, killed at its deadline.

Source: CNI specification 1.1, section 2 "Execution Protocol" and section 5 "Error".
"""

import asyncio
import errno
import json
import logging
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from oci import environment, trace
from oci.errors import DeadlineExceeded, Error, Unavailable

from .conflist import JsonObject

log = logging.getLogger(__name__)

MAX_OUTPUT_BYTES = 4 << 20
STALL_S = 10.0  # a plugin that runs longer is named in the log while it still runs
DRAIN_S = 0.5  # how long a helper that outlives its plugin may hold the plugin's output open
KILL_S = 2.0  # how long a killed plugin may take to go before it is left to itself
BUSY_TRIES = 5
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

CODE_CONTAINER_UNKNOWN = 3
CODE_TRY_AGAIN_LATER = 11
CODES_UNAVAILABLE = (CODE_TRY_AGAIN_LATER, 50, 51)


@dataclass(frozen=True, slots=True)
class Call:
    """One run of one plugin; `subject` says in words for whom, for the text of errors."""

    verb: str  # CNI_COMMAND
    plugin: str  # the plugin's type
    subject: str
    environment: Mapping[str, str]  # CNI_CONTAINERID and so on, without CNI_COMMAND and CNI_PATH
    config: JsonObject

    def __str__(self) -> str:
        return f"CNI {self.verb} {self.subject}: plugin {self.plugin}"


class PluginError(Error):
    """The plugin ran and said no; `code` is its own, 0 where it gave none."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class PluginUnavailable(PluginError, Unavailable):
    """The plugin said that another try may help (codes 11, 50 and 51)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    exit_code: int  # negative: the signal that ended it
    stdout: bytes
    stderr: bytes


class Plugins:
    """The plugin executables of some directories; the first directory that has a name wins."""

    def __init__(self, directories: tuple[Path, ...], timeout_s: float) -> None:
        self.directories = directories
        self.timeout_s = timeout_s

    def find(self, plugin: str) -> Path:
        """The executable called `plugin`. Raises Unavailable, which names the directories searched."""
        for directory in self.directories:
            path = directory / plugin
            if path.is_file() and os.access(path, os.X_OK):
                return path
        searched = ", ".join(str(directory) for directory in self.directories) or "no directory at all"
        raise Unavailable(f"CNI plugin {plugin}: no such executable in {searched}")

    async def run(self, call: Call, timeout_s: float | None = None) -> JsonObject | None:
        """What the plugin answered; None when it answered nothing.

        Raises PluginError with the plugin's own code and text, DeadlineExceeded when it had to be killed, Unavailable
        when it cannot be found or executed, Error when it answered what is not a JSON object.
        """
        with trace.step(f"CNI {call.verb}", {"cni.plugin": call.plugin}):
            return await self._run(call, min(timeout_s or self.timeout_s, self.timeout_s))

    async def _run(self, call: Call, deadline_s: float) -> JsonObject | None:
        path = self.find(call.plugin)
        loop = asyncio.get_running_loop()
        stall = loop.call_later(STALL_S, log.warning, "%s still runs after %g s", call, STALL_S)
        started = loop.time()
        try:
            outcome = await _execute(path, self._environment(call), json.dumps(call.config).encode(), deadline_s)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{call} ({path}) did not end within {deadline_s:g} s and was killed") from error
        except OSError as error:
            raise Unavailable(f"{call}: {path} cannot be executed: {error.strerror}") from error
        finally:
            stall.cancel()
            log.debug("%s took %.0f ms", call, (loop.time() - started) * 1000)
        return _answer(call, outcome)

    def _environment(self, call: Call) -> dict[str, str]:
        inherited = {key: value for key, value in environment.inherited().items() if not key.startswith("CNI_")}
        return {
            "PATH": DEFAULT_PATH,  # portmap and bridge look for iptables here
            **inherited,
            **call.environment,
            "CNI_COMMAND": call.verb,
            "CNI_PATH": ":".join(str(directory) for directory in self.directories),
        }


class _Exchange(asyncio.SubprocessProtocol):
    """Collects what a child writes; `exited` and `drained` are separate, because a helper may keep a pipe open."""

    def __init__(self) -> None:
        self.output = {1: bytearray(), 2: bytearray()}
        self.exited = asyncio.Event()
        self.drained = asyncio.Event()
        self._open = {1, 2}

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        output = self.output[fd]
        output += data[: MAX_OUTPUT_BYTES - len(output)]

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._open.discard(fd)
        if not self._open:
            self.drained.set()

    def process_exited(self) -> None:
        self.exited.set()


async def _execute(path: Path, environment: Mapping[str, str], stdin: bytes, timeout_s: float) -> Outcome:
    """Run `path` in a session of its own. Raises TimeoutError after killing all of it, OSError if it cannot start."""
    transport, exchange = await _spawn(path, environment)
    try:
        pipe = cast(asyncio.WriteTransport, transport.get_pipe_transport(0))
        pipe.write(stdin)
        pipe.write_eof()
        async with asyncio.timeout(timeout_s):
            await exchange.exited.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                await exchange.drained.wait()
        return Outcome(transport.get_returncode() or 0, bytes(exchange.output[1]), bytes(exchange.output[2]))
    finally:
        if transport.get_returncode() is None:
            await _kill(transport, exchange)
        transport.close()


async def _spawn(path: Path, environment: Mapping[str, str]) -> tuple[asyncio.SubprocessTransport, _Exchange]:
    for attempt in range(BUSY_TRIES):
        try:
            return await asyncio.get_running_loop().subprocess_exec(
                _Exchange,
                str(path),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=environment,
                cwd="/",
                start_new_session=True,  # so that a kill reaches the plugins and commands that it runs, too
            )
        except OSError as error:
            # ETXTBSY: an upgrade is writing the executable in place; it works again as soon as that is done.
            if error.errno != errno.ETXTBSY or attempt == BUSY_TRIES - 1:
                raise
        await asyncio.sleep(0.1 * 2**attempt)
    raise AssertionError("the last try returns or raises")


async def _kill(transport: asyncio.SubprocessTransport, exchange: _Exchange) -> None:
    """A task in an uninterruptible sleep cannot be killed: the wait for it ends too."""
    with suppress(ProcessLookupError):
        os.killpg(transport.get_pid(), signal.SIGKILL)
    with suppress(TimeoutError):
        async with asyncio.timeout(KILL_S):
            await exchange.exited.wait()


def _answer(call: Call, outcome: Outcome) -> JsonObject | None:
    if len(outcome.stdout) >= MAX_OUTPUT_BYTES:
        raise Error(f"{call} wrote more than {MAX_OUTPUT_BYTES} bytes")
    answer = _decoded(outcome.stdout)
    if outcome.exit_code != 0:
        raise _plugin_error(call, outcome, answer)
    if not outcome.stdout.strip():
        return None
    if not isinstance(answer, dict):
        raise Error(f"{call} succeeded, but its answer is not a JSON object: {_excerpt(outcome.stdout)}")
    return answer


def _plugin_error(call: Call, outcome: Outcome, answer: Any) -> PluginError:
    """The plugin's own words; without any, how it ended and what it wrote."""
    if not isinstance(answer, dict) or not (answer.get("msg") or answer.get("code")):
        text = f"{call} {_ending(outcome.exit_code)} without saying why in JSON"
        seen = [
            f"{name}: {_excerpt(data)}"
            for name, data in (("stdout", outcome.stdout), ("stderr", outcome.stderr))
            if data.strip()
        ]
        return PluginError("; ".join([text, *seen]), 0)
    code = answer.get("code")
    code = code if isinstance(code, int) else 0
    words = ": ".join(str(answer[key]) for key in ("msg", "details") if answer.get(key))
    kind = PluginUnavailable if code in CODES_UNAVAILABLE else PluginError
    return kind(f"{call} failed with code {code}: {words or 'no message'}", code)


def _decoded(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _ending(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exited with {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was killed by signal {-exit_code}"


def _excerpt(data: bytes, limit: int = 500) -> str:
    text = data.decode(errors="backslashreplace").strip()
    return repr(text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}")
