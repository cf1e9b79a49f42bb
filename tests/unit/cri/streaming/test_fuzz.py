"""Whole sessions with their bytes damaged, over real sockets: the server serves on, in bounded memory.

The codecs have their own tests; here bytes of whole sessions are changed, cut, doubled and dropped at random.
CRITO_FUZZ_SECONDS makes it longer, CRITO_FUZZ_SEED repeats a run.
"""

import asyncio
import contextlib
import logging
import os
import random
import time
from pathlib import Path

import pytest
from wsproto import ConnectionType, events
from wsproto.connection import Connection

from cri.streaming import spdy
from cri.streaming.targets import ExecTarget
from tests.fakes.stream_client import open_port, spdy_client, upgrade
from tests.fakes.stream_server import echo, node, pod, serving, until

SECONDS = float(os.environ.get("CRITO_FUZZ_SECONDS", "3"))
GROWTH_BYTES = 64 * 1024 * 1024
KEY = [("Sec-WebSocket-Version", "13"), ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")]
WEBSOCKET = [("Connection", "Upgrade"), ("Upgrade", "websocket"), *KEY]
SPDY = [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"), ("X-Stream-Protocol-Version", "portforward.k8s.io")]


def port_forward_frames(port: int) -> bytes:
    encoder, wire = spdy.Encoder(), b""
    for number in range(4):
        headers = {"port": str(port), "requestID": str(number)}
        error, data = 4 * number + 1, 4 * number + 3
        wire += encoder.syn_stream(error, {**headers, "streamType": "error"}, fin=True)
        wire += encoder.syn_stream(data, {**headers, "streamType": "data"})
        wire += spdy.data(data, b"some content" * 20) + spdy.ping(error)
    return wire + spdy.rst_stream(3, spdy.Reset.CANCEL) + spdy.goaway(0, spdy.GoAwayStatus.OK)


def command_frames() -> bytes:
    encoder, wire = spdy.Encoder(), b""
    for number, name in enumerate(("error", "stdin", "stdout", "stderr", "resize")):
        wire += encoder.syn_stream(2 * number + 1, {"streamType": name})
    return wire + spdy.data(3, b"input") + spdy.data(9, b'{"Width": 80, "Height": 24}') + spdy.data(3, b"", fin=True)


def messages(*contents: bytes) -> bytes:
    client = Connection(ConnectionType.CLIENT)
    return b"".join(client.send(events.BytesMessage(each)) for each in contents) + client.send(events.Ping(b"x"))


def damaged(wire: bytes, chance: random.Random) -> bytes:
    result = bytearray(wire)
    for _ in range(chance.randint(1, 6)):
        place = chance.randrange(len(result) or 1)
        match chance.randrange(6):
            case 0:
                result[place : place + 1] = bytes((chance.randrange(256),))
            case 1:
                result[place : place + 4] = chance.choice(
                    (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80")
                )
            case 2:
                del result[place : place + chance.randrange(20)]
            case 3:
                result[place:place] = chance.randbytes(chance.randrange(20))
            case 4:
                result[place:place] = result[place : place + chance.randrange(200)]
            case 5:
                del result[place:]
    return bytes(result)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_damaged_sessions_leave_the_server_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)  # defects; kept warnings would keep the sessions that they are about
    seed = int(os.environ.get("CRITO_FUZZ_SEED", str(random.randrange(2**32))))
    chance = random.Random(seed)
    target = ExecTarget("c1", "/nowhere", {}, tty=True, stdin=True, stdout=True, stderr=False)

    async def run() -> int:
        rounds = 0
        async with serving() as server, pod(echo) as port:
            tunnel = [*WEBSOCKET, ("Sec-WebSocket-Protocol", "SPDY/3.1+portforward.k8s.io")]
            v5 = [*WEBSOCKET, ("Sec-WebSocket-Protocol", "v5.channel.k8s.io")]
            forward, command = port_forward_frames(port), command_frames()
            resize = b'\4{"Width": 80, "Height": 24}'
            kinds = (
                (node(port), SPDY, forward),
                (target, SPDY[:2], command),
                (node(port), tunnel, messages(forward)),
                (node(port), WEBSOCKET, messages(b"\0one", b"\1two", b"\7three")),
                (target, v5, messages(b"\0one", resize, b"\xff\0")),
            )
            before, deadline = resident_bytes(), time.monotonic() + SECONDS
            while time.monotonic() < deadline:
                rounds += 1
                kind, headers, wire = kinds[rounds % len(kinds)]
                opened = await upgrade(server.register(kind), headers, "GET")
                with contextlib.suppress(OSError):
                    await opened.send(damaged(wire, chance))
                    await asyncio.sleep(0.001 * chance.randrange(4))
                opened.abort()
            await until(lambda: not server.is_busy)
            assert resident_bytes() - before < GROWTH_BYTES

            async with spdy_client(server.register(node()), ["portforward.k8s.io"]) as client:
                data, _ = await open_port(client, port)
                await data.write(b"unharmed")
                assert await data.read_until(b"unharmed")
        return rounds

    print(f"seed {seed}")
    assert asyncio.run(run()) > 100
    assert caplog.records == []
