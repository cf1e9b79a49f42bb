"""TLS of the stream server: certificates, their replacement, clients that must show one, and the least version."""

import asyncio
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cri.streaming.settings import StreamSettings
from cri.streaming.tls import TlsContexts, TlsSettings, openssl_name
from tests.fakes.stream_client import open_port, spdy_client
from tests.fakes.stream_server import echo, node, pod, serving

PORT_FORWARD = ["portforward.k8s.io"]
OPENSSL = shutil.which("openssl") or ""

pytestmark = pytest.mark.skipif(not OPENSSL, reason="openssl is not installed")


def make_certificate(directory: Path, name: str, host: str = "127.0.0.1") -> tuple[Path, Path]:
    """Self-signed: its own CA."""
    cert, key = directory / f"{name}.crt", directory / f"{name}.key"
    subprocess.run(
        [
            *(OPENSSL, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName=IP:{host}"),
            *("-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


def trusting(cert: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(cert))


def tls_settings(cert: Path, key: Path, ca: str = "", **more: Any) -> StreamSettings:
    return StreamSettings("127.0.0.1", tls=TlsSettings(str(cert), str(key), ca, **more))


async def echoes(url: str, port: int, tls: ssl.SSLContext) -> bool:
    content = b"secret" * 50_000
    async with spdy_client(url, PORT_FORWARD, tls=tls) as client:
        data, _ = await open_port(client, port)
        await data.write(content)
        await data.close()
        return await data.read_all() == content


def test_streams_go_through_tls(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path, "server")

    async def run() -> None:
        async with serving(tls_settings(cert, key)) as server, pod(echo) as port:
            url = server.register(node())

            assert url.startswith("https://127.0.0.1:")
            assert await echoes(url, port, trusting(cert))

    asyncio.run(run())


def test_a_replaced_certificate_is_used_from_the_next_connection_on(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path, "server")
    new_cert, new_key = make_certificate(tmp_path, "new")

    async def run() -> None:
        async with serving(tls_settings(cert, key)) as server, pod(echo) as port:
            assert await echoes(server.register(node()), port, trusting(cert))

            new_key.replace(key)
            shutil.copy(new_cert, tmp_path / "copy")
            (tmp_path / "copy").replace(cert)

            assert await echoes(server.register(node()), port, trusting(new_cert))

    asyncio.run(run())


def test_a_replacement_that_is_not_usable_leaves_the_old_certificate(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path, "server")
    contexts = TlsContexts(TlsSettings(str(cert), str(key)))
    before = contexts.current()

    cert.write_text("half a certificate")
    assert contexts.current() is before
    cert.unlink()
    assert contexts.current() is before


def test_clients_without_a_certificate_of_the_ca_are_kept_out(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path, "server")
    client_cert, client_key = make_certificate(tmp_path, "client")

    async def run() -> None:
        async with serving(tls_settings(cert, key, ca=str(client_cert))) as server, pod(echo) as port:
            with pytest.raises((OSError, IndexError)):
                await echoes(server.register(node()), port, trusting(cert))

            known = trusting(cert)
            known.load_cert_chain(client_cert, client_key)
            assert await echoes(server.register(node()), port, known)

    asyncio.run(run())


def test_older_versions_than_the_least_are_refused(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path, "server")
    old = trusting(cert)
    old.maximum_version = ssl.TLSVersion.TLSv1_2

    async def run() -> None:
        async with serving(tls_settings(cert, key)) as server, pod(echo) as port:
            assert await echoes(server.register(node()), port, old)
        async with serving(tls_settings(cert, key, min_version="VersionTLS13")) as server, pod(echo) as port:
            with pytest.raises(OSError):  # asyncio sends no alert
                await echoes(server.register(node()), port, old)

    asyncio.run(run())


def test_ciphers_can_be_chosen(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path, "server")
    other = trusting(cert)
    other.maximum_version = ssl.TLSVersion.TLSv1_2
    other.set_ciphers("ECDHE-ECDSA-CHACHA20-POLY1305")

    async def run() -> None:
        settings = tls_settings(cert, key, cipher_suites=("TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",))
        async with serving(settings) as server, pod(echo) as port:
            with pytest.raises(OSError):
                await echoes(server.register(node()), port, other)

            other.set_ciphers("ECDHE-ECDSA-AES256-GCM-SHA384")
            assert await echoes(server.register(node()), port, other)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("suite", "name"),
    [
        ("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", "ECDHE-RSA-AES128-GCM-SHA256"),
        ("TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256", "ECDHE-ECDSA-CHACHA20-POLY1305"),
        ("TLS_RSA_WITH_AES_256_GCM_SHA384", "AES256-GCM-SHA384"),
    ],
)
def test_suites_have_names_that_openssl_knows(suite: str, name: str) -> None:
    assert openssl_name(suite) == name
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).set_ciphers(name)


def test_who_speaks_no_tls_gets_nothing(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path, "server")

    async def run() -> None:
        async with serving(tls_settings(cert, key)) as server:
            reader, writer = await asyncio.open_connection(*server.url.removeprefix("https://").split(":"))
            writer.write(b"GET /exec/x HTTP/1.1\r\nHost: a\r\n\r\n")
            async with asyncio.timeout(5):
                assert b"HTTP" not in await reader.read()
            writer.close()

    asyncio.run(run())
