"""Counts what the daemon does, and serves it to Prometheus over HTTP where `[metrics] listen` says.

Without a listener nothing is counted, and the Prometheus library is not loaded.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from prometheus_client.core import Metric

REQUEST_LIMIT = 8192
REQUEST_TIMEOUT_S = 5.0
SOCKET_MODE = 0o660
# From a list answered out of memory to a pull: the CRI's calls take from under a millisecond to minutes.
LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 240)

_log = logging.getLogger(__name__)


class Metrics(Protocol):
    def observe(self, method: str, code: str, seconds: float) -> None:
        """One call of the CRI has ended, with this gRPC code, after so long."""

    def container_oom(self) -> None:
        """A container was ended by the kernel for want of memory."""

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Serve `crito_<name>`; `read` is called at each scrape, on the event loop."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...


def metrics(listen: str) -> Metrics:
    """What counts, and serves on `listen` ("IP:PORT", a socket's path); what does neither where it is empty."""
    return PrometheusMetrics(listen) if listen else NoMetrics()


class NoMetrics:
    def observe(self, method: str, code: str, seconds: float) -> None: ...

    def container_oom(self) -> None: ...

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...


class PrometheusMetrics:
    def __init__(self, listen: str) -> None:
        from prometheus_client import (  # noqa: PLC0415  not loaded where nothing is served
            CollectorRegistry,
            Counter,
            Histogram,
            PlatformCollector,
            ProcessCollector,
        )

        self._listen = listen
        self._server: asyncio.Server | None = None
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._operations = Counter(
            "crito_operations", "Calls of the CRI that have ended.", ["operation", "code"], registry=self.registry
        )
        self._latency = Histogram(
            "crito_operations_latency_seconds",
            "How long calls of the CRI took.",
            ["operation"],
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self._oom = Counter(
            "crito_containers_oom", "Containers ended by the kernel for want of memory.", registry=self.registry
        )

    def observe(self, method: str, code: str, seconds: float) -> None:
        self._operations.labels(method, code).inc()
        self._latency.labels(method).observe(seconds)

    def container_oom(self) -> None:
        self._oom.inc()

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        self.registry.register(_ReadGauge(f"crito_{name}", text, read))

    async def start(self) -> None:
        if self._listen.startswith("/"):
            Path(self._listen).unlink(missing_ok=True)
            self._server = await asyncio.start_unix_server(self._serve, self._listen, limit=REQUEST_LIMIT)
            Path(self._listen).chmod(SOCKET_MODE)
        else:
            host, _, port = self._listen.rpartition(":")
            address = host.removeprefix("[").removesuffix("]")
            self._server = await asyncio.start_server(self._serve, address, int(port), limit=REQUEST_LIMIT)
        _log.info("metrics are served on %s", self._listen)

    @property
    def port(self) -> int:
        """The TCP port that is listened on: known once started, also where the configuration says 0."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            if self._listen.startswith("/"):
                Path(self._listen).unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                try:
                    head = await reader.readuntil(b"\r\n\r\n")
                except asyncio.LimitOverrunError:
                    head = b""
                writer.write(self._answer(head))
                await writer.drain()

    def _answer(self, head: bytes) -> bytes:
        """An HTTP/1.1 answer to a request head; the connection ends with it."""
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest  # noqa: PLC0415

        words = head.split(b"\r\n", 1)[0].split(b" ")
        status, kind, body = "200 OK", CONTENT_TYPE_LATEST, b""
        if len(words) != 3:
            status, kind = "400 Bad Request", "text/plain"
        elif words[0] not in (b"GET", b"HEAD"):
            status, kind = "405 Method Not Allowed", "text/plain"
        elif words[1].split(b"?")[0] != b"/metrics":
            status, kind, body = "404 Not Found", "text/plain", b"metrics are at /metrics\n"
        else:
            body = generate_latest(self.registry)
        lines = [
            f"HTTP/1.1 {status}",
            f"Content-Type: {kind}",
            f"Content-Length: {len(body)}",
            "Connection: close",
            "",
            "",
        ]
        return "\r\n".join(lines).encode() + (b"" if words[0] == b"HEAD" else body)


class _ReadGauge:
    """A gauge whose value is asked for when it is served."""

    def __init__(self, name: str, text: str, read: Callable[[], float]) -> None:
        self._name, self._text, self._read = name, text, read

    def collect(self) -> Iterator["Metric"]:
        from prometheus_client.core import GaugeMetricFamily  # noqa: PLC0415

        yield GaugeMetricFamily(self._name, self._text, value=self._read())
