"""Kubernetes' channels over WebSocket, by their messages."""

import base64
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wsproto import ConnectionType, events
from wsproto.connection import Connection

from cri.streaming import websocket
from cri.streaming.websocket import ChannelClose, ChannelData, Channels, Closed, Reply, WebSocketError


def frame(payload: bytes, opcode: int = 2, fin: bool = True) -> bytes:
    """As a client sends it: masked, here by zeros."""
    size = len(payload)
    if size < 126:
        length = bytes((0x80 | size,))
    elif size < 65536:
        length = bytes((0x80 | 126,)) + struct.pack(">H", size)
    else:
        length = bytes((0x80 | 127,)) + struct.pack(">Q", size)
    return bytes(((0x80 if fin else 0) | opcode,)) + length + b"\0\0\0\0" + payload


def fed(channels: Channels, *parts: bytes) -> list[websocket.Event]:
    return [event for part in parts for event in channels.feed(part)]


def sent(data: bytes) -> list[events.Event]:
    """What a client sees."""
    client = Connection(ConnectionType.CLIENT)
    client.receive_data(data)
    return list(client.events())


def test_the_first_byte_of_a_message_is_its_channel() -> None:
    assert fed(Channels(websocket.V5), frame(b"\0in") + frame(b"\4{}")) == [
        ChannelData(0, b"in"),
        ChannelData(4, b"{}"),
    ]


def test_the_parts_of_a_message_belong_to_one_channel_wherever_it_is_cut() -> None:
    channels = Channels(websocket.V4)
    wire = frame(b"\0abc", fin=False) + frame(b"def", opcode=0) + frame(b"\1x")

    got = fed(channels, *(wire[place : place + 1] for place in range(len(wire))))

    assert b"".join(e.data for e in got if isinstance(e, ChannelData) and e.channel == 0) == b"abcdef"
    assert b"".join(e.data for e in got if isinstance(e, ChannelData) and e.channel == 1) == b"x"


def test_an_empty_message_is_nothing() -> None:
    assert fed(Channels(websocket.V5), frame(b"") + frame(b"\0") + frame(b"\0a")) == [ChannelData(0, b"a")]


def test_v5_ends_a_channel_and_v4_knows_no_such_message() -> None:
    assert fed(Channels(websocket.V5), frame(b"\xff\0")) == [ChannelClose(0)]
    assert fed(Channels(websocket.V4), frame(b"\xff\0")) == [ChannelData(255, b"\0")]


@pytest.mark.parametrize("body", [b"\xff", b"\xff\0\1", b"\xff" + b"\0" * 1000])
def test_a_close_of_no_channel_or_of_several_ends_the_session(body: bytes) -> None:
    with pytest.raises(WebSocketError, match="close of"):
        fed(Channels(websocket.V5), frame(body))


def test_base64_is_decoded_in_whole_groups_wherever_the_message_is_cut() -> None:
    content = bytes(range(256))
    text = b"0" + base64.b64encode(content)
    wire = (
        frame(text[:50], opcode=1, fin=False) + frame(text[50:101], opcode=0, fin=False) + frame(text[101:], opcode=0)
    )

    got = fed(Channels(websocket.V4_BASE64), *(wire[place : place + 3] for place in range(0, len(wire), 3)))

    assert b"".join(e.data for e in got if isinstance(e, ChannelData) and e.channel == 0) == content


@pytest.mark.parametrize("text", [b"0***", b"0abc"])
def test_what_is_no_base64_ends_the_session(text: bytes) -> None:
    with pytest.raises(WebSocketError, match="base64"):
        fed(Channels(websocket.V1_BASE64), frame(text, opcode=1))


@pytest.mark.parametrize(("protocol", "opcode"), [(websocket.V5, 1), (websocket.V4_BASE64, 2)])
def test_messages_of_the_other_kind_end_the_session(protocol: str, opcode: int) -> None:
    with pytest.raises(WebSocketError):
        fed(Channels(protocol), frame(b"0abc", opcode=opcode))


def test_what_we_send_bears_its_channel() -> None:
    assert sent(Channels(websocket.V5).data(1, b"out")) == [events.BytesMessage(b"\1out")]
    assert sent(Channels(websocket.V4_BASE64).data(1, b"out")) == [events.TextMessage("1b3V0")]


def test_a_ping_is_answered_with_its_content() -> None:
    (reply,) = fed(Channels(websocket.V5), frame(b"are you there", opcode=9))

    assert isinstance(reply, Reply)
    assert sent(reply.data) == [events.Pong(b"are you there")]


def test_a_close_is_answered_once() -> None:
    channels = Channels(websocket.V5)

    reply, closed = fed(channels, frame(struct.pack(">H", 1000), opcode=8))

    assert isinstance(reply, Reply)
    assert isinstance(closed, Closed)
    assert sent(reply.data) == [events.CloseConnection(1000, "")]
    assert channels.close() == b""


def test_our_own_close_is_a_normal_one_or_says_that_the_protocol_was_broken() -> None:
    assert sent(Channels(websocket.V5).close()) == [events.CloseConnection(1000, "")]
    assert sent(Channels(websocket.V5).close(broken=True)) == [events.CloseConnection(1002, "")]


@pytest.mark.parametrize(
    "wire",
    [
        b"\x82\x03\x00ab",  # not masked
        b"\xf2\x83\0\0\0\0\0ab",  # reserved bits
        b"\x8b\x80\0\0\0\0",  # an unknown opcode
        b"\x89\xfe\x00\x80\0\0\0\0" + b"x" * 128,  # a long control frame
        b"\x80\x80\0\0\0\0",  # a continuation of nothing
        b"\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff\0\0\0\0",  # a length beyond 2^63
    ],
)
def test_broken_frames_end_the_session(wire: bytes) -> None:
    with pytest.raises(WebSocketError):
        fed(Channels(websocket.V5), wire)


def test_an_announced_length_takes_no_memory() -> None:
    channels = Channels(websocket.V5)
    list(channels.feed(b"\x82\xff" + struct.pack(">Q", 2**40) + b"\0\0\0\0" + b"\0"))

    for _ in range(100):
        assert fed(channels, b"x" * 1000) == [ChannelData(0, b"x" * 1000)]


def chunks(wire: bytes, sizes: list[int]) -> Iterator[bytes]:
    place = 0
    for size in sizes:
        yield wire[place : place + size]
        place += size
    yield wire[place:]


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.sampled_from([0, 1, 2, 8, 9, 10, 3]), st.binary(max_size=100), st.booleans()), max_size=8),
    st.lists(st.integers(0, 50), max_size=10),
    st.sampled_from([websocket.V5, websocket.V4, websocket.V4_BASE64, ""]),
)
def test_any_frames_are_events_or_an_error(
    frames: list[tuple[int, bytes, bool]], sizes: list[int], protocol: str
) -> None:
    channels = Channels(protocol)
    wire = b"".join(frame(payload, opcode, fin) for opcode, payload, fin in frames)

    try:
        for part in chunks(wire, sizes):
            for event in channels.feed(part):
                if isinstance(event, Closed):
                    return
    except WebSocketError:
        return


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=100), max_size=5))
def test_any_bytes_are_events_or_an_error(parts: list[bytes]) -> None:
    channels = Channels(websocket.V5)

    try:
        for part in parts:
            for event in channels.feed(part):
                if isinstance(event, Closed):
                    return
    except WebSocketError:
        return
