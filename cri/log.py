"""The daemon's own log: one structured line per event on standard error, with the pod and container it is about.

Lines are formatted where they are logged and written by a thread of their own: a reader of standard error that has
stopped reading must not stop the daemon. Lines that find no room are counted, and the count is logged.
"""

import contextlib
import contextvars
import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

QUEUED_LINES = 10_000
FLUSH_TIMEOUT_S = 2.0
OUR_LOGGERS = ("cri", "sandbox", "oci")

_bound: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar("log_fields", default={})  # noqa: B039


@contextlib.contextmanager
def bound(**values: Any) -> Iterator[None]:
    """Every line logged in this block (and in the tasks it starts) carries these fields; empty ones are left out."""
    token = _bound.set({**_bound.get(), **{name: value for name, value in values.items() if value}})
    try:
        yield
    finally:
        _bound.reset(token)


def fields(**values: Any) -> dict[str, Any]:
    """The `extra` of one line: `log.info("pulled", extra=fields(image=name))`."""
    return {"fields": values}


def configure(level: str, form: str = "text", fd: int = 2) -> None:
    """Sends all logging of this process to `fd`; `form` is "text" or "json"."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    handler = _Writer(fd)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    root.addHandler(handler)
    # Libraries tell much at debug level (gRPC several lines per call) that says nothing of pods.
    root.setLevel(max(logging.INFO, logging.getLevelNamesMapping()[level.upper()]))
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(level.upper())
    logging.captureWarnings(True)


def facts(record: logging.LogRecord) -> dict[str, Any]:
    """What a line says, in the order in which it says it."""
    line = {
        "time": _rfc3339(record.created),
        "level": record.levelname.lower(),
        "msg": record.getMessage(),
        **_bound.get(),
        **getattr(record, "fields", {}),
        "logger": record.name,
    }
    if record.exc_info and record.exc_info[1]:
        line["error"] = f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
        line["traceback"] = logging.Formatter().formatException(record.exc_info)
    return line


class TextLines(logging.Formatter):
    """key=value, quoted where a value has blanks or quotes."""

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(f"{name}={_quoted(value)}" for name, value in facts(record).items())


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(facts(record), default=str, ensure_ascii=False)


def _rfc3339(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds * 1e6) % 1_000_000:06d}Z"


def _quoted(value: Any) -> str:
    text = str(value)
    return text if re.fullmatch(r"[^\s\"=\\\x00-\x1f\x7f]+", text) else json.dumps(text, ensure_ascii=False)


class _Writer(logging.Handler):
    """Hands formatted lines to a thread that writes them."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._lines: queue.Queue[str | None] = queue.Queue(QUEUED_LINES)
        self._lost = 0
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record) + "\n")
        except queue.Full:
            self._lost += 1
        except Exception:
            self.handleError(record)

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            with contextlib.suppress(OSError):  # nobody is left to tell
                _write(self._fd, line)
                if self._lost:
                    lost, self._lost = self._lost, 0
                    _write(self._fd, f'time={_rfc3339(time.time())} level=warning msg="log lines lost" count={lost}\n')

    def close(self) -> None:
        """Writes what is queued, for as long as somebody reads it."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=FLUSH_TIMEOUT_S)
            self._thread.join(FLUSH_TIMEOUT_S)
        super().close()


def _write(fd: int, text: str) -> None:
    left = memoryview(text.encode(errors="backslashreplace"))
    while left:
        left = left[os.write(fd, left) :]
