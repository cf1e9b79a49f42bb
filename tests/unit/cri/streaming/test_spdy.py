"""SPDY/3.1 by its bytes: what is right is understood wherever it is cut, what is wrong is refused in bounded memory."""

import struct
import zlib
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cri.streaming import spdy

SYN_STREAM_1 = bytes.fromhex("80030001")  # control, version 3, type 1


def control(kind: int, payload: bytes, flags: int = 0, version: int = 3) -> bytes:
    return struct.pack(">HHI", 0x8000 | version, kind, flags << 24 | len(payload)) + payload


def block(headers: Mapping[str, str], count: int | None = None) -> bytes:
    parts = [struct.pack(">I", len(headers) if count is None else count)]
    for name, value in headers.items():
        parts += [struct.pack(">I", len(name)), name.encode(), struct.pack(">I", len(value)), value.encode()]
    return b"".join(parts)


def compressed(plain: bytes, level: int = 9) -> bytes:
    deflater = zlib.compressobj(level, zdict=spdy.DICTIONARY)
    return deflater.compress(plain) + deflater.flush(zlib.Z_SYNC_FLUSH)


def syn_stream(stream_id: int, header_block: bytes, flags: int = 0) -> bytes:
    return control(1, struct.pack(">IIH", stream_id, 0, 0) + header_block, flags)


def decoded(data: bytes) -> list[spdy.Frame]:
    return list(spdy.Decoder().feed(data))


def joined(frames: list[spdy.Frame]) -> list[spdy.Frame]:
    """The same with the parts of each DATA frame put together."""
    whole: list[spdy.Frame] = []
    for frame in frames:
        last = whole[-1] if whole else None
        if isinstance(frame, spdy.Data) and isinstance(last, spdy.Data) and last.stream_id == frame.stream_id:
            whole[-1] = spdy.Data(frame.stream_id, last.data + frame.data, frame.fin)
        else:
            whole.append(frame)
    return whole


def test_the_dictionary_is_the_one_of_the_draft() -> None:
    assert len(spdy.DICTIONARY) == 1423
    assert zlib.adler32(spdy.DICTIONARY) == 0xE3C6A7C2


def test_a_stream_is_opened_with_its_headers() -> None:
    frame = syn_stream(1, compressed(block({"streamtype": "stdin", "port": "80"})))

    assert frame.startswith(SYN_STREAM_1)
    assert decoded(frame) == [spdy.SynStream(1, {"streamtype": "stdin", "port": "80"})]


def test_flags_tell_the_end_and_one_way_streams() -> None:
    assert decoded(syn_stream(3, compressed(block({})), flags=3)) == [spdy.SynStream(3, {}, True, True)]


def test_header_names_are_compared_in_lower_case() -> None:
    assert decoded(syn_stream(1, compressed(block({"StreamType": "error"})))) == [
        spdy.SynStream(1, {"streamtype": "error"})
    ]


def test_headers_of_later_frames_refer_to_earlier_ones() -> None:
    encoder = spdy.Encoder()
    first, second = (encoder.syn_stream(number, {"streamType": "a" * 100}) for number in (1, 3))

    assert len(second) < len(first)
    assert [frame.headers for frame in decoded(first + second) if isinstance(frame, spdy.SynStream)] == [
        {"streamtype": "a" * 100}
    ] * 2


def test_an_answer_is_bytes_that_any_zlib_with_the_dictionary_reads() -> None:
    answer = spdy.Encoder().syn_reply(5)

    assert answer[:4] == bytes.fromhex("80030002")
    assert answer[8:12] == struct.pack(">I", 5)
    assert zlib.decompressobj(zdict=spdy.DICTIONARY).decompress(answer[12:]) == b"\0\0\0\0"


@pytest.mark.parametrize(
    ("frame", "wire"),
    [
        (spdy.data(7, b"abc"), "00000007 00000003 616263"),
        (spdy.data(7, b"", fin=True), "00000007 01000000"),
        (spdy.rst_stream(9, spdy.Reset.CANCEL), "80030003 00000008 00000009 00000005"),
        (spdy.ping(1), "80030006 00000004 00000001"),
        (spdy.goaway(11, spdy.GoAwayStatus.OK), "80030007 00000008 0000000b 00000000"),
    ],
)
def test_frames_are_these_bytes(frame: bytes, wire: str) -> None:
    assert frame == bytes.fromhex(wire)


@pytest.mark.parametrize(
    ("wire", "frame"),
    [
        ("00000007 00000003 616263", spdy.Data(7, b"abc")),
        ("00000007 01000000", spdy.Data(7, b"", fin=True)),
        ("80030003 00000008 00000009 00000005", spdy.RstStream(9, 5)),
        ("80030006 00000004 00000001", spdy.Ping(1)),
        ("80030007 00000008 0000000b 00000000", spdy.GoAway(11, 0)),
    ],
)
def test_bytes_are_these_frames(wire: str, frame: spdy.Frame) -> None:
    assert decoded(bytes.fromhex(wire)) == [frame]


def test_settings_and_window_updates_are_passed_over() -> None:
    window_update = control(9, struct.pack(">II", 1, 65536))
    some_settings = control(4, struct.pack(">III", 1, 7, 65536))

    assert decoded(window_update + some_settings + spdy.ping(3)) == [spdy.Ping(3)]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (control(6, b"\0\0\0\1", version=2), "version 2"),
        (control(77, b""), "unknown type 77"),
        (control(6, b"\0\0\0\1\0"), "type 6 with 5 bytes"),
        (control(3, b"\0"), "type 3 with 1 bytes"),
        (control(1, b"\0\0\0\1"), "type 1 with 4 bytes"),
        (control(3, struct.pack(">II", 0, 5)), "stream 0"),
        (spdy.data(0, b"x"), "stream 0"),
        (syn_stream(0, compressed(block({}))), "stream 0"),
        (struct.pack(">HHI", 0x8003, 1, 0xFFFFFF), "16777215 bytes"),
        (syn_stream(1, b"no zlib at all"), "cannot be decompressed"),
        (syn_stream(1, zlib.compress(block({}))), "stream 0|cannot be|has ended"),
        (syn_stream(1, compressed(b"")), "cut off"),
        (syn_stream(1, compressed(block({}, count=101))), "101 headers"),
        (syn_stream(1, compressed(block({"a": "b"}, count=2))), "cut off"),
        (syn_stream(1, compressed(block({"a": "b"}) + b"more")), "4 bytes too many"),
        (syn_stream(1, compressed(struct.pack(">II", 1, 0xFFFFFFFF))), "cut off"),
        (syn_stream(1, compressed(block({"a": "1", "A": "2"}))), "twice"),
        (syn_stream(1, compressed(block({"": "1"}))), "empty"),
    ],
)
def test_what_is_wrong_is_refused_with_what_was_seen(wrong: bytes, text: str) -> None:
    with pytest.raises(spdy.SpdyError, match=text):
        decoded(wrong)


@pytest.mark.parametrize("size", [100 * 1024, 50 * 1024 * 1024])
def test_a_bomb_of_headers_is_refused_before_it_is_unpacked(size: int) -> None:
    bomb = compressed(b"\0" * size)
    assert len(bomb) < spdy.CONTROL_PAYLOAD_BYTES - 10

    with pytest.raises(spdy.SpdyError, match="headers of more than"):
        decoded(syn_stream(1, bomb))


def test_a_large_data_frame_is_not_collected() -> None:
    decoder = spdy.Decoder()
    list(decoder.feed(struct.pack(">II", 1, 16 * 1024 * 1024 - 1)))

    for _ in range(1000):
        assert list(decoder.feed(b"x" * 1000)) == [spdy.Data(1, b"x" * 1000)]
    assert len(decoder._buffer) == 0


def test_a_control_frame_that_does_not_end_is_held_up_to_its_limit() -> None:
    decoder = spdy.Decoder()
    list(decoder.feed(struct.pack(">HHI", 0x8003, 1, spdy.CONTROL_PAYLOAD_BYTES)))

    list(decoder.feed(b"x" * (spdy.CONTROL_PAYLOAD_BYTES - 1)))

    assert len(decoder._buffer) == 8 + spdy.CONTROL_PAYLOAD_BYTES - 1


Names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
HeaderSets = st.dictionaries(Names, st.text(max_size=50), max_size=5).filter(
    lambda headers: len({name.lower() for name in headers}) == len(headers)
)


@st.composite
def sessions(draw: st.DrawFn) -> tuple[bytes, list[spdy.Frame]]:
    encoder, wire, frames = spdy.Encoder(), b"", list[spdy.Frame]()
    for number in range(draw(st.integers(1, 8))):
        stream_id = 2 * number + 1
        match draw(st.sampled_from(["open", "data", "ping", "reset"])):
            case "open":
                headers = draw(HeaderSets)
                wire += encoder.syn_stream(stream_id, headers)
                frames.append(spdy.SynStream(stream_id, {name.lower(): value for name, value in headers.items()}))
            case "data":
                content, fin = draw(st.binary(max_size=300)), draw(st.booleans())
                wire += spdy.data(stream_id, content, fin)
                frames.append(spdy.Data(stream_id, content, fin))
            case "ping":
                wire += spdy.ping(stream_id)
                frames.append(spdy.Ping(stream_id))
            case "reset":
                wire += spdy.rst_stream(stream_id, spdy.Reset.CANCEL)
                frames.append(spdy.RstStream(stream_id, 5))
    return wire, frames


@given(sessions(), st.data())
def test_it_does_not_matter_where_the_bytes_are_cut(
    session: tuple[bytes, list[spdy.Frame]], data: st.DataObject
) -> None:
    wire, frames = session
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=10)))
    decoder, seen = spdy.Decoder(), list[spdy.Frame]()

    for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        seen += decoder.feed(wire[start:end])

    assert joined(seen) == joined(frames)


@settings(max_examples=500)
@given(st.lists(st.binary(max_size=200), max_size=10))
def test_any_bytes_are_frames_or_an_error_and_never_more_is_kept_than_a_control_frame(parts: list[bytes]) -> None:
    decoder = spdy.Decoder()

    try:
        for part in parts:
            list(decoder.feed(part))
    except spdy.SpdyError:
        return
    assert len(decoder._buffer) <= spdy.CONTROL_PAYLOAD_BYTES + 8


@settings(max_examples=300)
@given(sessions(), st.data())
def test_a_session_with_any_byte_changed_is_frames_or_an_error(
    session: tuple[bytes, list[spdy.Frame]], data: st.DataObject
) -> None:
    wire = bytearray(session[0])
    for _ in range(data.draw(st.integers(1, 3))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))

    try:
        decoded(bytes(wire))
    except spdy.SpdyError:
        return


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_any_header_block_is_headers_or_an_error(content: bytes) -> None:
    try:
        headers = spdy.parse_headers(content)
    except spdy.SpdyError:
        return
    assert len(headers) <= spdy.HEADERS
