"""A real image registry (Debian's docker-registry) on a free loopback port, and one that answers garbage."""

import http.client
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.e2e.harness.images import Blob, TestImage
from tests.e2e.harness.ports import free_port, listens, wait_until

PROGRAM = shutil.which("docker-registry") or ""


@dataclass(frozen=True, slots=True)
class Registry:
    port: int

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def push(self, image: TestImage, repository: str, tag: str) -> str:
        """Put `image` there; its reference by tag."""
        for blob in (image.config, *image.layers):
            self._push_blob(repository, blob)
        path = f"/v2/{repository}/manifests/{tag}"
        self._request("PUT", path, image.manifest.data, {"Content-Type": image.manifest.media_type})
        return f"{self.host}/{repository}:{tag}"

    def digest_of(self, repository: str, tag: str) -> str:
        accept = ", ".join(
            f"application/vnd.{kind}+json"
            for kind in (
                "oci.image.index.v1",
                "oci.image.manifest.v1",
                "docker.distribution.manifest.list.v2",
                "docker.distribution.manifest.v2",
            )
        )
        answer = self._request("HEAD", f"/v2/{repository}/manifests/{tag}", b"", {"Accept": accept})
        return answer.headers["Docker-Content-Digest"]

    def _push_blob(self, repository: str, blob: Blob) -> None:
        upload = self._request("POST", f"/v2/{repository}/blobs/uploads/", b"")
        location = upload.headers["Location"].removeprefix(f"http://{self.host}")
        separator = "&" if "?" in location else "?"
        self._request(
            "PUT",
            f"{location}{separator}digest={blob.digest}",
            blob.data,
            {"Content-Type": "application/octet-stream"},
        )

    def _request(
        self, method: str, path: str, body: bytes, headers: dict[str, str] | None = None
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        if answer.status >= 300:
            raise RuntimeError(f"{method} {path} at {self.host}: {answer.status} {text[:300]!r}")
        return answer


@contextmanager
def running_registry(directory: Path, data: Path | None = None) -> Iterator[Registry]:
    """One whose files lie in `directory`, its images in `data` if that is named."""
    directory.mkdir(parents=True, exist_ok=True)
    port, storage = free_port(), data or directory / "data"
    config = directory / "config.yml"
    config.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {storage}}}, delete: {{enabled: true}}}}\n"
        f"http: {{addr: 127.0.0.1:{port}}}\nlog: {{level: error}}\n"
    )
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([PROGRAM, "serve", str(config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_until(lambda: listens(port), f"a registry on port {port} (see {directory}/log)", process=process)
        yield Registry(port)
    finally:
        process.kill()
        process.wait()


class Garbage(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"\x00\xff{]this is no registry"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


class Silence(Garbage):
    def do_GET(self) -> None:
        threading.Event().wait(600)

    do_HEAD = do_GET


@contextmanager
def running_server(handler: type[BaseHTTPRequestHandler] = Garbage) -> Iterator[str]:
    """HOST:PORT of an HTTP server that answers by `handler`; without one, garbage to everything."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
