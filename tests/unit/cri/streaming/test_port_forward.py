"""Port forwarding over every protocol: what goes through, what breaks, and that it breaks alone."""

import asyncio
import base64
import os
import socket
import struct

import pytest

from cri.streaming import portforward, spdy, spdy_session
from cri.streaming.targets import PortForwardTarget
from tests.fakes.stream_client import Refused, SpdyClient, open_port, spdy_client, tunnel_client, websocket_client
from tests.fakes.stream_server import closed_port, echo, node, pod, serving, until

PORT_FORWARD = ["portforward.k8s.io"]


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_bytes_go_through_both_ways(method: str) -> None:
    async def run() -> None:
        content = os.urandom(3_000_000)
        async with (
            serving() as server,
            pod(echo) as port,
            spdy_client(server.register(node()), PORT_FORWARD, method) as client,
        ):
            data, error = await open_port(client, port)
            for start in range(0, len(content), 100_000):
                await data.write(content[start : start + 100_000])
            await data.close()

            assert await data.read_all() == content
            assert await error.read_all() == b""
            assert client.socket.headers["x-stream-protocol-version"] == PORT_FORWARD

    asyncio.run(run())


def test_bytes_go_through_a_tunnel_in_a_websocket() -> None:
    async def run() -> None:
        content = os.urandom(1_000_000)
        async with serving() as server, pod(echo) as port, tunnel_client(server.register(node())) as client:
            data, error = await open_port(client, port)
            for start in range(0, len(content), 70_001):
                await data.write(content[start : start + 70_001])
            await data.close()

            assert await data.read_all() == content
            assert await error.read_all() == b""

    asyncio.run(run())


@pytest.mark.parametrize("protocols", [["v4.channel.k8s.io"], []])
def test_channels_of_a_websocket_begin_with_their_port(protocols: list[str]) -> None:
    async def run() -> None:
        async with (
            serving() as server,
            pod(echo) as first,
            pod(echo) as second,
            websocket_client(server.register(node(first, second)), protocols) as client,
        ):
            await client.send(b"\0one")
            await client.send(b"\2two")

            await client.until(0, struct.pack("<H", first) + b"one")
            await client.until(2, struct.pack("<H", second) + b"two")
            assert client.channel(1) == struct.pack("<H", first)
            assert client.protocol == "".join(protocols)

    asyncio.run(run())


def test_channels_may_be_base64() -> None:
    async def run() -> None:
        async with (
            serving() as server,
            pod(echo) as port,
            websocket_client(server.register(node(port)), ["v4.base64.channel.k8s.io"]) as client,
        ):
            await client.send("0" + base64.b64encode(b"hello").decode())
            await until(lambda: len(client.messages) >= 3)

            texts = [each for each in client.messages if isinstance(each, str) and each[0] == "0"]
            assert b"".join(base64.b64decode(each[1:]) for each in texts) == struct.pack("<H", port) + b"hello"

    asyncio.run(run())


def test_channels_need_ports_in_the_request() -> None:
    async def run() -> None:
        async with serving() as server:
            with pytest.raises(Refused, match=r"400: .*needs ports"):
                async with websocket_client(server.register(node()), ["v4.channel.k8s.io"]):
                    pass

    asyncio.run(run())


def test_the_end_of_what_the_client_sends_reaches_the_pod_which_answers_after_it() -> None:
    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received = await reader.read()
        writer.write(b"%d bytes" % len(received))

    async def run() -> None:
        async with (
            serving() as server,
            pod(count) as port,
            spdy_client(server.register(node()), PORT_FORWARD) as client,
        ):
            data, _ = await open_port(client, port)
            await data.write(b"x" * 1000)
            await data.close()

            assert await data.read_all() == b"1000 bytes"

    asyncio.run(run())


def test_the_end_of_what_the_pod_sends_reaches_the_client_which_goes_on_after_it() -> None:
    received = bytearray()
    all_there = asyncio.Event()

    async def speak_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"go on")
        writer.write_eof()
        received.extend(await reader.read())
        all_there.set()

    async def run() -> None:
        async with (
            serving() as server,
            pod(speak_first) as port,
            spdy_client(server.register(node()), PORT_FORWARD) as client,
        ):
            data, _ = await open_port(client, port)
            assert await data.read_all() == b"go on"
            await data.write(b"after your end")
            await data.close()
            async with asyncio.timeout(5):
                await all_there.wait()

        assert bytes(received) == b"after your end"

    asyncio.run(run())


@pytest.mark.parametrize("is_tunnel", [False, True])
def test_a_refused_connection_ends_alone(is_tunnel: bool) -> None:
    async def run() -> None:
        async with serving() as server, pod(echo) as port:
            url = server.register(node())
            async with tunnel_client(url) if is_tunnel else spdy_client(url, PORT_FORWARD) as client:
                before, _ = await open_port(client, port, "1")
                refused, error = await open_port(client, closed_port(), "2")

                assert await refused.read_all() == b""
                assert refused.reset_status == spdy.Reset.CANCEL
                assert await error.read_all() == b""  # a text there would make clients in Go end the session
                after, _ = await open_port(client, port, "3")
                for stream in (before, after):
                    await stream.write(b"still here")
                    assert await stream.read_until(b"still here")

    asyncio.run(run())


def test_a_connection_that_the_pod_resets_ends_alone() -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def run() -> None:
        async with (
            serving() as server,
            pod(reset) as bad,
            pod(echo) as good,
            spdy_client(server.register(node()), PORT_FORWARD) as client,
        ):
            broken, error = await open_port(client, bad, "1")
            await broken.write(b"x")
            await broken.read_all()

            assert broken.reset_status == spdy.Reset.CANCEL
            assert await error.read_all() == b""
            other, _ = await open_port(client, good, "2")
            await other.write(b"fine")
            assert await other.read_until(b"fine")

    asyncio.run(run())


@pytest.mark.parametrize("closes_first", [False, True])
def test_a_stream_that_the_client_resets_closes_the_pods_connection(closes_first: bool) -> None:
    gone = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        try:
            while await reader.read(100):
                pass
            if closes_first:
                while True:  # an end is no reset: only a write, or an error, tells
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.01)
        finally:
            gone.set()

    async def run() -> None:
        async with serving() as server, pod(wait) as port, spdy_client(server.register(node()), PORT_FORWARD) as client:
            data, _ = await open_port(client, port)
            await data.read_until(b"hello")
            if closes_first:
                await data.close()
            await data.reset()
            async with asyncio.timeout(5):
                await gone.wait()

    asyncio.run(run())


def test_connections_end_with_their_session() -> None:
    gone = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read()
        finally:
            gone.set()

    async def run() -> None:
        async with serving() as server, pod(wait) as port:
            async with spdy_client(server.register(node()), PORT_FORWARD) as client:
                await open_port(client, port)
                await asyncio.sleep(0.1)
            async with asyncio.timeout(5):
                await gone.wait()

    asyncio.run(run())


def test_a_pod_that_listens_on_the_other_loopback_address_is_found() -> None:
    async def run() -> None:
        async with (
            serving() as server,
            pod(echo, "::1") as port,
            spdy_client(server.register(node()), PORT_FORWARD) as client,
        ):
            data, _ = await open_port(client, port)
            await data.write(b"six")
            assert await data.read_until(b"six")

    asyncio.run(run())


def test_a_sandbox_with_a_network_stack_of_its_own_is_reached_from_the_node() -> None:
    async def run() -> None:
        async with pod(echo, "127.0.0.2") as port:
            with pytest.raises(ConnectionRefusedError):
                await portforward.connect("", port)
            (await portforward.connect("", port, ("127.0.0.2",))).close()
            with pytest.raises(ConnectionRefusedError):
                await portforward.connect("", port, ("127.0.0.3", "::1"))

    asyncio.run(run())


def test_a_pod_without_a_network_is_told_on_the_error_stream() -> None:
    async def run() -> None:
        target = PortForwardTarget("gone-sandbox", "/nowhere/net", ())
        async with serving() as server, spdy_client(server.register(target), PORT_FORWARD) as client:
            _, error = await open_port(client, 80)

            assert b"gone-sandbox has no network" in await error.read_all()

    asyncio.run(run())


@pytest.mark.parametrize(
    "headers",
    [
        {"streamType": "data", "port": "0", "requestID": "1"},
        {"streamType": "data", "port": "65536", "requestID": "1"},
        {"streamType": "data", "port": "-1", "requestID": "1"},
        {"streamType": "data", "port": "9" * 5000, "requestID": "1"},
        {"streamType": "data", "port": "٣", "requestID": "1"},
        {"streamType": "data", "requestID": "1"},
        {"streamType": "other", "port": "80", "requestID": "1"},
        {},
    ],
)
def test_streams_that_say_nonsense_are_refused_alone(headers: dict[str, str]) -> None:
    async def run() -> None:
        async with serving() as server, pod(echo) as port, spdy_client(server.register(node()), PORT_FORWARD) as client:
            stream = await client.open(headers)

            assert stream.reset_status == spdy.Reset.REFUSED_STREAM
            data, _ = await open_port(client, port, "2")
            await data.write(b"fine")
            assert await data.read_until(b"fine")

    asyncio.run(run())


def test_streams_without_a_request_are_paired_by_their_order() -> None:
    async def run() -> None:
        async with serving() as server, pod(echo) as port, spdy_client(server.register(node()), PORT_FORWARD) as client:
            await client.open({"streamType": "error", "port": str(port)})
            data = await client.open({"streamType": "data", "port": str(port)})
            await data.write(b"old")
            assert await data.read_until(b"old")

    asyncio.run(run())


def test_half_a_pair_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portforward, "PAIR_WAIT_S", 0.1)

    async def run() -> None:
        async with serving() as server, spdy_client(server.register(node()), PORT_FORWARD) as client:
            lonely = await client.open({"streamType": "data", "port": "80", "requestID": "1"})
            await lonely.read_all()

            assert lonely.reset_status == spdy.Reset.CANCEL

    asyncio.run(run())


async def answers(client: SpdyClient, number: int) -> None:
    await client.socket.send(spdy.ping(number))
    await until(lambda: number in client.pings)


def test_pings_are_answered_and_answers_are_not() -> None:
    async def run() -> None:
        async with serving() as server, spdy_client(server.register(node()), PORT_FORWARD) as client:
            await client.socket.send(spdy.ping(2))
            await answers(client, 1)

            assert client.pings == [1]

    asyncio.run(run())


def test_ten_thousand_streams_are_refused_but_for_a_bounded_number_and_the_rest_goes_on() -> None:
    async def run() -> None:
        async with serving() as server, pod(echo) as port, spdy_client(server.register(node()), PORT_FORWARD) as client:
            data, _ = await open_port(client, port, "first")
            headers = {"streamType": "data", "port": str(port)}
            streams = [await client.open_unanswered({**headers, "requestID": str(n)}) for n in range(10_000)]
            for stream in streams:
                await stream.replied.wait()

            open_streams = [stream for stream in streams if stream.reset_status is None]
            assert len(open_streams) <= spdy_session.STREAMS
            await data.write(b"unmoved")
            assert await data.read_until(b"unmoved")

    asyncio.run(run())


def test_a_client_that_does_not_read_holds_up_its_pod_and_nobody_else() -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        while True:
            writer.write(b"x" * 100_000)
            await writer.drain()
            sent += 100_000

    async def run() -> None:
        async with (
            serving() as server,
            pod(flood) as flooding,
            pod(echo) as port,
            spdy_client(server.register(node()), PORT_FORWARD) as deaf,
        ):
            await open_port(deaf, flooding)
            deaf.stop_listening()
            while True:
                before = sent
                await asyncio.sleep(0.3)
                if sent == before:
                    break
            assert sent < 20_000_000  # the kernel's buffers, and a little of ours

            async with spdy_client(server.register(node()), PORT_FORWARD) as other:
                data, _ = await open_port(other, port)
                await data.write(b"not held up")
                assert await data.read_until(b"not held up")

    asyncio.run(run())


def test_a_pod_that_does_not_read_holds_up_its_client_in_bounded_memory() -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.Event().wait()

    async def run() -> None:
        async with serving() as server, pod(deaf) as port, spdy_client(server.register(node()), PORT_FORWARD) as client:
            data, _ = await open_port(client, port)
            sent = 0
            try:
                while sent < 100_000_000:
                    async with asyncio.timeout(0.5):
                        await data.write(b"x" * 100_000)
                    sent += 100_000
            except TimeoutError:
                pass
            assert sent < 30_000_000

    asyncio.run(run())


@pytest.mark.parametrize(
    "wrong",
    [
        spdy.data(99, b"for a stream that was never opened"),
        spdy.Encoder().syn_stream(2, {"a": "b"}),
        b"\xff" * 100,
        struct.pack(">HHI", 0x8003, 1, 0xFFFFFF),
    ],
)
def test_a_client_that_breaks_the_protocol_is_told_and_left(wrong: bytes) -> None:
    async def run() -> None:
        async with serving() as server, spdy_client(server.register(node()), PORT_FORWARD) as client:
            await client.socket.send(wrong)
            async with asyncio.timeout(5):
                await client.closed.wait()

            assert client.went_away.is_set()

    asyncio.run(run())


def test_an_id_that_is_used_again_ends_the_session() -> None:
    async def run() -> None:
        async with serving() as server, spdy_client(server.register(node()), PORT_FORWARD) as client:
            await client.socket.send(client.encoder.syn_stream(5, {}) + client.encoder.syn_stream(5, {}))
            client.streams[5] = await client.open_unanswered({})
            async with asyncio.timeout(5):
                await client.closed.wait()

    asyncio.run(run())


def test_no_stream_is_opened_after_the_client_has_said_that_it_goes() -> None:
    async def run() -> None:
        async with serving() as server, pod(echo) as port, spdy_client(server.register(node()), PORT_FORWARD) as client:
            data, _ = await open_port(client, port)
            await client.socket.send(spdy.goaway(0, spdy.GoAwayStatus.OK))
            late = await client.open({"streamType": "error", "port": str(port), "requestID": "2"})

            assert late.reset_status == spdy.Reset.REFUSED_STREAM
            await data.write(b"to the end")
            assert await data.read_until(b"to the end")

    asyncio.run(run())
