"""A registry on loopback that serves what it is given, counts what it is asked, and misbehaves where told to."""

import contextlib
import json
import re
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.fakes.layers import Built, digest

Answer = Callable[["Handler"], None]


@dataclass
class FakeRegistry:
    """Use with `with`. `trouble` maps a regular expression over paths to what is done instead of answering."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[bytes, str]] = field(default_factory=dict)  # "repository:tag", "repository@digest"
    trouble: dict[str, Answer] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    headers_seen: list[dict[str, str]] = field(default_factory=list)
    certificate: Path | None = None
    key: Path | None = None
    client_authority: Path | None = None  # who must have signed the callers' certificates; None: nobody
    port: int = 0  # any

    def add(self, repository: str, tag: str, built: Built) -> Built:
        self.blobs.update(built.blobs)
        self.manifests[f"{repository}:{tag}"] = (built.manifest, built.media_type)
        self.manifests[f"{repository}@{built.digest}"] = (built.manifest, built.media_type)
        return built

    def add_index(self, repository: str, tag: str, index: bytes, media_type: str) -> str:
        self.manifests[f"{repository}:{tag}"] = (index, media_type)
        self.manifests[f"{repository}@{digest(index)}"] = (index, media_type)
        return digest(index)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FakeRegistry":
        registry = self

        class Bound(Handler):
            served = registry

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Bound)
        self._server.daemon_threads = True
        if self.certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate, self.key)
            if self.client_authority is not None:
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(self.client_authority)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Handler(BaseHTTPRequestHandler):
    served: FakeRegistry
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        registry = self.served
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        registry.asked[self.path] += 1
        registry.headers_seen.append({key.lower(): value for key, value in self.headers.items()})
        for pattern, answer in registry.trouble.items():
            if re.search(pattern, self.path):
                answer(self)
                return
        self.answer()

    do_HEAD = do_POST = do_GET

    def answer(self) -> None:
        """What an honest registry says."""
        if found := re.fullmatch(r"/v2/(.+)/manifests/(.+)", self.path):
            repository, reference = found.groups()
            separator = "@" if ":" in reference else ":"
            known = self.served.manifests.get(f"{repository}{separator}{reference}")
            if known is not None:
                self.send(200, known[0], {"Content-Type": known[1], "Docker-Content-Digest": digest(known[0])})
                return
        if found := re.fullmatch(r"/v2/(.+)/blobs/(.+)", self.path):
            blob = self.served.blobs.get(found[2])
            if blob is not None:
                self.send_range(blob)
                return
        self.send(404, b'{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}')

    def send_range(self, blob: bytes) -> None:
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start is None:
            self.send(200, blob)
            return
        at = int(start[1])
        self.send(206, blob[at:], {"Content-Range": f"bytes {at}-{len(blob) - 1}/{len(blob)}"})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def status(code: int, headers: dict[str, str] | None = None, body: bytes = b"") -> Answer:
    return lambda handler: handler.send(code, body, headers)


def times(count: int, answer: Answer) -> Answer:
    """Does `answer` for the first `count` requests, then answers honestly."""
    left = [count]

    def done(handler: Handler) -> None:
        left[0] -= 1
        answer(handler) if left[0] >= 0 else handler.answer()

    return done


def in_turn(*answers: Answer) -> Answer:
    """Does one of `answers` for each request, then answers honestly."""
    left = list(answers)

    def done(handler: Handler) -> None:
        answer = left.pop(0) if left else Handler.answer
        answer(handler)

    return done


def cut_after(size: int) -> Answer:
    """Promises the whole blob, sends `size` bytes of what is asked for, and closes the connection."""

    def answer(handler: Handler) -> None:
        blob = handler.served.blobs[handler.path.rpartition("/")[2]]
        start = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        at = int(start[1]) if start else 0
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(blob) - at))
        handler.end_headers()
        handler.wfile.write(blob[at : at + size])
        handler.wfile.flush()
        handler.close_connection = True
        handler.connection.close()

    return answer


def drip(size: int, every_s: float, first: int = 0) -> Answer:
    """Promises what is asked for, sends `first` bytes of it at once, and then `size` more every now and then."""

    def answer(handler: Handler) -> None:
        handler.wfile = _Dripping(handler.wfile, first, size, every_s)  # type: ignore[assignment]
        handler.answer()

    return answer


class _Dripping:
    """A connection on which the body comes slowly; the header is written at once."""

    def __init__(self, file: Any, first: int, size: int, every_s: float) -> None:
        self._file, self._first, self._size, self._every_s = file, first, size, every_s
        self._is_body = False

    def write(self, content: bytes) -> None:
        if not self._is_body:
            self._file.write(content)
            self._is_body = True
            return
        self._file.write(content[: self._first])
        with contextlib.suppress(OSError):  # who asked has enough
            for at in range(self._first, len(content), self._size):
                time.sleep(self._every_s)
                self._file.write(content[at : at + self._size])
                self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def token_server(answers: dict[str, str]) -> Answer:
    """Gives a token to those whose Authorization header is a key of `answers`; "" is who sends none."""

    def answer(handler: Handler) -> None:
        token = answers.get(handler.headers.get("Authorization", ""))
        if token is None:
            handler.send(401, b'{"errors": [{"code": "UNAUTHORIZED", "message": "wrong password"}]}')
        else:
            handler.send(200, json.dumps({"token": token}).encode())

    return answer


def after(seconds: float, answer: Answer | None = None) -> Answer:
    """Waits, then does `answer`, or answers honestly."""

    def wait(handler: Handler) -> None:
        time.sleep(seconds)
        answer(handler) if answer is not None else handler.answer()

    return wait


def wants(authorization: str, challenge: str) -> Answer:
    """Answers only those who send this Authorization header; challenges the others."""

    def answer(handler: Handler) -> None:
        if handler.headers.get("Authorization") == authorization:
            handler.answer()
        else:
            handler.send(401, b"", {"WWW-Authenticate": challenge})

    return answer
