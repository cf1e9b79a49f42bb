"""The worker processes of the image service: starts them, asks them, keeps a few for the next request, kills them."""

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from errno import EDQUOT, ENOSPC
from pathlib import Path
from signal import SIGKILL
from typing import Any

import oci.errors
from oci import trace
from oci.errors import DeadlineExceeded, Error, ResourceExhausted, Unavailable

log = logging.getLogger(__name__)

_LINE_LIMIT_BYTES = 64 << 20  # manifest and config travel in one line, escaped
_KEEP_IDLE_S = 10.0
_ENVIRONMENT = (
    "PATH",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
)
# -I keeps the environment and the working directory from choosing our modules; the package's own place is then named,
# because it need not be installed.
_START = "import sys; sys.path.append(sys.argv[1]); from cri.image_service.worker import main; main()"
_SOURCE_ROOT = Path(__file__).resolve().parents[2]

Progressed = Callable[[dict[str, int]], None]


class Workers:
    def __init__(self, keep_idle: int, progress_timeout_s: float) -> None:
        self._keep_idle = keep_idle
        self._progress_timeout_s = progress_timeout_s
        self._idle: list[asyncio.subprocess.Process] = []
        self._all: set[asyncio.subprocess.Process] = set()
        self._reaping: set[asyncio.Task[None]] = set()
        self._trim: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._all]

    async def call(self, request: dict[str, Any], progressed: Progressed | None = None) -> dict[str, Any]:
        """What a worker answers. Raises the kind of error that it names, ResourceExhausted where the disk is full,
        DeadlineExceeded where nothing moved for the progress timeout, Unavailable where the worker died.

        Cancelled, or after any of the last two, the worker is killed: what it was making is for the caller to remove.
        """
        with trace.step(f"image worker: {request['verb']}"):
            return await self._call(request, progressed)

    async def _call(self, request: dict[str, Any], progressed: Progressed | None) -> dict[str, Any]:
        process = await self._start()
        answered = False
        try:
            answer = await self._ask(process, request, progressed)
            answered = True
        finally:
            if not answered:
                await self._end(process)
        self._keep(process)
        if "error" in answer:
            raise _error(answer["error"], request)
        done: dict[str, Any] = answer["done"]
        return done

    async def close(self) -> None:
        self._closed = True
        if self._trim is not None:
            self._trim.cancel()
        while self._all:
            for process in self._all:
                _kill(process)  # who is using it sees its end, and reaps it
            self._dismiss_idle()
            await asyncio.wait([asyncio.ensure_future(process.wait()) for process in self._all])
            await asyncio.wait([*self._reaping, asyncio.ensure_future(asyncio.sleep(0))])

    async def _start(self) -> asyncio.subprocess.Process:
        while self._idle:
            process = self._idle.pop()
            if _is_alive(process):
                return process
            self._dismiss(process)
        if self._closed:
            raise Unavailable("the image service is closing")
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-c",
            _START,
            str(_SOURCE_ROOT),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={key: os.environ[key] for key in _ENVIRONMENT if key in os.environ},
            cwd="/",
            limit=_LINE_LIMIT_BYTES,
        )
        self._all.add(process)
        if self._closed:
            await self._end(process)
            raise Unavailable("the image service is closing")
        return process

    async def _ask(
        self, process: asyncio.subprocess.Process, request: dict[str, Any], progressed: Progressed | None
    ) -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None  # both are pipes
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            while True:
                async with asyncio.timeout(self._progress_timeout_s):
                    line = await process.stdout.readline()
                if not line:
                    break
                message: dict[str, Any] = json.loads(line)
                if "progress" not in message:
                    return message
                if progressed is not None:
                    progressed(message["progress"])
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"no progress in {self._progress_timeout_s:.0f} s while {_doing(request)}; gave up"
            ) from error
        except (ConnectionError, ValueError) as error:
            log.warning("image worker %d: %s", process.pid, error)
        _kill(process)
        await process.wait()
        raise Unavailable(f"image worker {_ended(process.returncode)} while {_doing(request)}")

    def _keep(self, process: asyncio.subprocess.Process) -> None:
        if self._closed or len(self._idle) >= self._keep_idle:
            self._dismiss(process)
            return
        self._idle.append(process)
        if self._trim is not None:
            self._trim.cancel()
        self._trim = asyncio.get_running_loop().call_later(_KEEP_IDLE_S, self._dismiss_idle)

    def _dismiss_idle(self) -> None:
        while self._idle:
            self._dismiss(self._idle.pop())

    def _dismiss(self, process: asyncio.subprocess.Process) -> None:
        """Lets a worker that nobody uses end by itself; it does when its stdin does."""
        task = asyncio.get_running_loop().create_task(self._reap(process))
        self._reaping.add(task)
        task.add_done_callback(self._reaping.discard)

    async def _reap(self, process: asyncio.subprocess.Process) -> None:
        """Waits until the process and our ends of its pipes are gone."""
        assert process.stdin is not None and process.stdout is not None  # both are pipes
        process.stdin.close()
        with suppress(ValueError):  # a line over the limit, of which nobody wants the rest
            while await process.stdout.read(1 << 16):
                pass
        await process.wait()
        self._all.discard(process)

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        _kill(process)
        await asyncio.shield(self._reap(process))


def _is_alive(process: asyncio.subprocess.Process) -> bool:
    """Asks the kernel: the event loop hears of an end only later."""
    if process.returncode is not None:
        return False
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:  # waited for already
        return False


def _kill(process: asyncio.subprocess.Process) -> None:
    if _is_alive(process):
        with suppress(ProcessLookupError):
            os.kill(process.pid, SIGKILL)  # process.kill() may take the exit status before asyncio gets at it


def _error(answer: dict[str, Any], request: dict[str, Any]) -> Exception:
    kind, message = answer["kind"], answer["message"]
    if kind == "OSError":
        if answer["errno"] in (ENOSPC, EDQUOT):
            where = request["path"] if request["verb"] == "save" else "the image store"
            return ResourceExhausted(f"no room on the file system of {where} while {_doing(request)}")
        where = f" ({answer['path']})" if answer.get("path") else ""
        return Error(f"{message}{where} while {_doing(request)}")
    found = getattr(oci.errors, kind, Error)
    error: Exception = found(message)
    return error


def _doing(request: dict[str, Any]) -> str:
    match request["verb"]:
        case "resolve":
            return f"asking for {request['name']}"
        case "layer":
            return f"fetching and unpacking layer {request['digest'] or request['id']}"
        case "verify_signatures" | "newer_signatures":
            return f"verifying the signatures of image {request['signatures']['identity']}"
        case "save":
            return f"saving {', '.join(name for image in request['images'] for name in image['names']) or 'images'}"
        case "inspect":
            return f"reading {request['path']}"
        case verb:
            return f"doing {verb}"


def _ended(returncode: int | None) -> str:
    return (
        f"was killed by signal {-returncode}" if returncode is not None and returncode < 0 else f"ended ({returncode})"
    )
