"""The stream server's doors: tokens, requests, limits, idleness and its end."""

import asyncio
import contextlib
import socket
import struct
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cri.streaming import server as server_module
from cri.streaming import sessions
from cri.streaming.settings import StreamSettings
from cri.streaming.targets import ExecTarget
from tests.fakes.stream_client import Refused, Socket, SpdyClient, open_port, spdy_client, upgrade, websocket_client
from tests.fakes.stream_server import echo, node, pod, serving, until

PORT_FORWARD = ["portforward.k8s.io"]
SPDY = [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"), ("X-Stream-Protocol-Version", "portforward.k8s.io")]
WEBSOCKET = [
    ("Connection", "keep-alive, Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
]


def exec_target(tmp: str = "/nowhere") -> ExecTarget:
    return ExecTarget("c1", tmp, {"args": ["true"]}, tty=False, stdin=False, stdout=True, stderr=True)


def address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname and parts.port
    return parts.hostname, parts.port


async def works(url: str, port: int) -> None:
    async with spdy_client(url, PORT_FORWARD) as client:
        data, _ = await open_port(client, port)
        await data.write(b"works")
        assert await data.read_until(b"works")


def test_a_url_names_kind_address_and_token() -> None:
    async def run() -> None:
        async with serving() as server:
            parts = urlsplit(server.register(exec_target()))

            assert parts.scheme == "http"
            assert parts.netloc == server.url.removeprefix("http://")
            assert parts.path.startswith("/exec/")
            assert len(parts.path) > len("/exec/") + 30

    asyncio.run(run())


def test_a_url_is_good_for_one_session() -> None:
    async def run() -> None:
        async with serving() as server:
            url = server.register(node())
            async with spdy_client(url, PORT_FORWARD):
                pass

            with pytest.raises(Refused, match=r"404: .*used already"):
                await upgrade(url, SPDY)

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/exec/guess", "/", "/other/guess", "/portforward/", "/exec/../../etc/passwd"])
def test_without_a_token_there_is_nothing(path: str) -> None:
    async def run() -> None:
        async with serving() as server:
            with pytest.raises(Refused) as refused:
                await upgrade(server.url + path, SPDY)

            assert refused.value.status == 404

    asyncio.run(run())


def test_a_token_is_good_for_its_own_kind_only() -> None:
    async def run() -> None:
        async with serving() as server:
            url = server.register(node()).replace("/portforward/", "/exec/")
            with pytest.raises(Refused, match="404"):
                await upgrade(url, SPDY)

    asyncio.run(run())


def test_other_methods_are_not_allowed_and_spend_no_token() -> None:
    async def run() -> None:
        async with serving() as server, pod(echo) as port:
            url = server.register(node())
            with pytest.raises(Refused) as refused:
                await upgrade(url, SPDY, "DELETE")

            assert refused.value.status == 405
            assert refused.value.headers["allow"] == ["GET, POST"]
            await works(url, port)

    asyncio.run(run())


@pytest.mark.parametrize("headers", [[], [("Upgrade", "SPDY/3.1")], [("Connection", "Upgrade"), ("Upgrade", "h2c")]])
def test_what_asks_for_no_upgrade_that_we_know_is_refused(headers: list[tuple[str, str]]) -> None:
    async def run() -> None:
        async with serving() as server:
            with pytest.raises(Refused, match="400: unable to upgrade"):
                await upgrade(server.register(node()), headers)

    asyncio.run(run())


def test_a_stream_protocol_that_we_lack_is_refused_with_those_that_we_have() -> None:
    async def run() -> None:
        async with serving() as server:
            with pytest.raises(Refused) as refused:
                async with spdy_client(server.register(exec_target()), ["v9.channel.k8s.io"]):
                    pass

            assert refused.value.status == 403
            assert refused.value.headers["x-accepted-stream-protocol-versions"] == list(sessions.REMOTE_COMMAND_SPDY)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (["v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io"], ["v4.channel.k8s.io"]),
        (["v2.channel.k8s.io, channel.k8s.io"], ["v2.channel.k8s.io"]),
        ([], None),
    ],
)
def test_the_first_stream_protocol_that_both_know_is_taken(offered: list[str], chosen: list[str] | None) -> None:
    async def run() -> None:
        async with serving() as server, spdy_client(server.register(exec_target()), offered) as client:
            assert client.socket.headers.get("x-stream-protocol-version") == chosen

    asyncio.run(run())


def test_a_websocket_handshake_is_that_of_rfc_6455() -> None:
    async def run() -> None:
        async with (
            serving() as server,
            websocket_client(server.register(exec_target()), ["v5.channel.k8s.io"]) as client,
        ):
            assert client.socket.headers["sec-websocket-accept"] == [
                "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
            ]  # the RFC's example

            with pytest.raises(Refused, match="400: not a WebSocket handshake"):
                await upgrade(server.register(exec_target()), WEBSOCKET, "POST")
            with pytest.raises(Refused, match="400: not a WebSocket handshake"):
                await upgrade(server.register(exec_target()), [*WEBSOCKET[:2], WEBSOCKET[3]], "GET")
            with pytest.raises(Refused, match="403"):
                await upgrade(server.register(exec_target()), [*WEBSOCKET, ("Sec-WebSocket-Protocol", "chat")], "GET")

    asyncio.run(run())


async def answer_to(server_url: str, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*address(server_url))
    try:
        writer.write(request)
        async with asyncio.timeout(5):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n", b"400"),
        (b"GET /exec/x HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /exec/x HTTP/1.1\r\nHost: a\r\nContent-Length: ten\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 40_000, b"431"),
        (b"POST /exec/x HTTP/1.1\r\nHost: a\r\nContent-Length: 99999\r\n\r\n" + b"x" * 99_999, b"413"),
    ],
)
def test_what_is_no_proper_request_is_refused(request_bytes: bytes, status: bytes) -> None:
    async def run() -> None:
        async with serving() as server:
            assert (await answer_to(server.url, request_bytes)).split(b" ")[1:2] == [status]

    asyncio.run(run())


def test_a_request_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HANDSHAKE_S", 0.2)

    async def run() -> None:
        async with serving() as server:
            assert await answer_to(server.url, b"GET /exec/x HT") == b""

    asyncio.run(run())


def test_many_unfinished_requests_do_not_keep_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HANDSHAKES", 20)

    async def run() -> None:
        async with serving() as server, pod(echo) as port, contextlib.AsyncExitStack() as stack:
            for _ in range(60):
                _, writer = await asyncio.open_connection(*address(server.url))
                stack.callback(writer.close)
                writer.write(b"GET ")
            await asyncio.sleep(0.1)

            assert len(server._handshakes) <= 20
            await works(server.register(node()), port)

    asyncio.run(run())


def test_sessions_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "SESSIONS", 2)

    async def run() -> None:
        async with serving() as server, pod(echo) as port:
            first, second, third = (server.register(node()) for _ in range(3))
            async with spdy_client(first, PORT_FORWARD), spdy_client(second, PORT_FORWARD):
                with pytest.raises(Refused, match="503"):
                    await upgrade(third, SPDY)
            await until(lambda: server.session_count == 0)

            await works(third, port)  # which was not spent

    asyncio.run(run())


def test_an_idle_session_is_closed_and_keep_alives_do_not_count() -> None:
    async def run() -> None:
        async with (
            serving(StreamSettings("127.0.0.1", idle_timeout_s=0.4)) as server,
            spdy_client(server.register(node()), PORT_FORWARD) as client,
        ):
            async with asyncio.timeout(3):
                while not client.closed.is_set():
                    with contextlib.suppress(OSError):
                        await client.socket.send(b"\x80\x03\x00\x06\x00\x00\x00\x04\x00\x00\x00\x01")
                    await asyncio.sleep(0.05)

    asyncio.run(run())


def test_a_session_on_which_something_moves_is_not_idle() -> None:
    async def run() -> None:
        async with (
            serving(StreamSettings("127.0.0.1", idle_timeout_s=0.4)) as server,
            pod(echo) as port,
            spdy_client(server.register(node()), PORT_FORWARD) as client,
        ):
            data, _ = await open_port(client, port)
            for _ in range(10):
                await data.write(b"x")
                await asyncio.sleep(0.1)

            assert not client.closed.is_set()

    asyncio.run(run())


def test_an_idle_timeout_of_zero_closes_nothing() -> None:
    async def run() -> None:
        async with (
            serving(StreamSettings("127.0.0.1", idle_timeout_s=0)) as server,
            spdy_client(server.register(node()), PORT_FORWARD) as client,
        ):
            await asyncio.sleep(0.3)

            assert not client.closed.is_set()

    asyncio.run(run())


def test_a_client_that_goes_while_nobody_reads_from_it_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "HANGUP_S", 0.1)

    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.Event().wait()

    async def run() -> None:
        async with serving() as server, pod(deaf) as port, spdy_client(server.register(node()), PORT_FORWARD) as client:
            data, _ = await open_port(client, port)
            with contextlib.suppress(TimeoutError):
                while True:
                    async with asyncio.timeout(0.3):
                        await data.write(b"x" * 100_000)
            raw = client.socket.writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.socket.abort()

            await until(lambda: server.session_count == 0)

    asyncio.run(run())


def test_a_server_that_listens_no_more_serves_those_who_are_there() -> None:
    async def run() -> None:
        async with serving() as server, pod(echo) as port:
            async with spdy_client(server.register(node()), PORT_FORWARD) as client:
                late = server.register(node())

                server.stop_listening()

                with pytest.raises(ConnectionRefusedError):
                    await upgrade(late, SPDY)
                data, _ = await open_port(client, port)
                await data.write(b"still served")
                assert await data.read_until(b"still served")
                assert server.is_busy
            await until(lambda: not server.is_busy)

    asyncio.run(run())


def test_a_command_whose_monitor_is_gone_fails_with_the_reason() -> None:
    async def run() -> None:
        async with serving() as server, spdy_client(server.register(exec_target())) as client:
            streams = [await client.open({"streamType": name}) for name in ("error", "stdout", "stderr")]

            told = await streams[0].read_all()

            assert b"cannot connect to the monitor at /nowhere/monitor.sock" in told
            await client.closed.wait()

    asyncio.run(run())


def test_a_command_whose_streams_are_not_opened_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cri.streaming.remotecommand.STREAMS_WAIT_S", 0.2)

    async def run() -> None:
        async with serving() as server, spdy_client(server.register(exec_target())) as client:
            await client.open({"streamType": "error"})
            async with asyncio.timeout(5):
                await client.closed.wait()

    asyncio.run(run())


def test_streams_of_no_kind_or_of_a_kind_that_is_there_are_refused() -> None:
    async def run() -> None:
        async with serving() as server, spdy_client(server.register(exec_target())) as client:
            await client.open({"streamType": "error"})
            again = await client.open({"streamType": "error"})
            other = await client.open({"streamType": "whatever"})

            assert (again.reset_status, other.reset_status) == (3, 3)

    asyncio.run(run())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.binary(max_size=500), max_size=5), st.sampled_from(["spdy", "tunnel", "channels", "command", "http"])
)
def test_no_bytes_of_a_client_keep_the_server_from_serving_others(parts: list[bytes], where: str) -> None:
    async def attack(url: str, port: int) -> None:
        if where == "http":
            await answer_to(url, b"".join(parts) + b"\r\n\r\n")
            return
        tunnel = [*WEBSOCKET, ("Sec-WebSocket-Protocol", "SPDY/3.1+portforward.k8s.io")]
        channels = [*WEBSOCKET, ("Sec-WebSocket-Protocol", "v4.channel.k8s.io")]
        headers = {"spdy": SPDY, "command": SPDY[:2], "tunnel": tunnel, "channels": channels}[where]
        opened = await upgrade(url, headers, "GET")
        with contextlib.suppress(OSError):
            for part in parts:
                await opened.send(part)
                await asyncio.sleep(0)
        opened.abort()

    async def run() -> None:
        async with serving() as server, pod(echo) as port:
            target = exec_target() if where == "command" else node(port)
            await attack(server.url if where == "http" else server.register(target), port)

            await works(server.register(node()), port)

    asyncio.run(run())


def test_a_request_is_read_however_it_is_cut() -> None:
    async def run() -> None:
        async with serving() as server, pod(echo) as port:
            url = server.register(node())
            reader, writer = await asyncio.open_connection(*address(url))
            path = urlsplit(url).path
            request = f"POST {path}?a=b HTTP/1.1\r\nHost: x\r\n" + "".join(f"{n}: {v}\r\n" for n, v in SPDY) + "\r\n"
            for place in range(len(request)):
                writer.write(request[place : place + 1].encode())
                await asyncio.sleep(0)

            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
            client = SpdyClient(Socket(reader, writer, {}))
            data, _ = await open_port(client, port)
            await data.write(b"whole")
            assert await data.read_until(b"whole")
            await client.close()

    asyncio.run(run())
