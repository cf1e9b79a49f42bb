"""What Prometheus gets to see, over real sockets."""

import asyncio
from pathlib import Path

from cri.metrics import NoMetrics, PrometheusMetrics, metrics


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> str:
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer.decode()


def scraped(request: bytes = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n") -> str:
    async def run() -> str:
        served = PrometheusMetrics("127.0.0.1:0")
        await served.start()
        try:
            served.observe("RunPodSandbox", "OK", 0.2)
            served.observe("RunPodSandbox", "NOT_FOUND", 0.002)
            served.container_oom()
            served.gauge("pods", "Pods.", lambda: 3)
            return await ask(*await asyncio.open_connection("127.0.0.1", served.port), request)
        finally:
            await served.close()

    return asyncio.run(run())


def test_calls_are_counted_by_operation_and_code() -> None:
    answer = scraped()

    assert answer.startswith("HTTP/1.1 200 OK\r\n")
    assert 'crito_operations_total{code="OK",operation="RunPodSandbox"} 1.0' in answer
    assert 'crito_operations_total{code="NOT_FOUND",operation="RunPodSandbox"} 1.0' in answer
    assert 'crito_operations_latency_seconds_count{operation="RunPodSandbox"} 2.0' in answer
    assert "crito_containers_oom_total 1.0" in answer


def test_a_gauge_is_read_at_the_scrape() -> None:
    assert "crito_pods 3.0" in scraped()


def test_what_is_no_request_for_metrics_is_told_so() -> None:
    assert scraped(b"GET / HTTP/1.1\r\n\r\n").startswith("HTTP/1.1 404 ")
    assert scraped(b"POST /metrics HTTP/1.1\r\n\r\n").startswith("HTTP/1.1 405 ")
    assert scraped(b"what\r\n\r\n").startswith("HTTP/1.1 400 ")
    assert scraped(b"GET /" + b"x" * 20000 + b" HTTP/1.1\r\n\r\n").startswith("HTTP/1.1 400 ")


def test_a_unix_socket_is_served_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"

    async def run() -> str:
        served = PrometheusMetrics(str(path))
        await served.start()
        assert path.stat().st_mode & 0o777 == 0o660
        try:
            return await ask(*await asyncio.open_unix_connection(path), b"HEAD /metrics HTTP/1.1\r\n\r\n")
        finally:
            await served.close()

    answer = asyncio.run(run())

    assert answer.startswith("HTTP/1.1 200 OK")
    assert answer.endswith("\r\n\r\n")
    assert not path.exists()


def test_without_a_listener_nothing_is_counted() -> None:
    assert isinstance(metrics(""), NoMetrics)
