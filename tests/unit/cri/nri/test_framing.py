"""The two layers of frames below NRI, by bytes."""

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.nri import mux, ttrpc
from cri.nri.mux import ProtocolError
from cri.nri.ttrpc import Frame, Kind


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


def test_a_mux_frame_is_connection_length_and_bytes() -> None:
    assert mux.frames(2, b"abc") == bytes.fromhex("00000002 00000003") + b"abc"


def test_a_ttrpc_frame_is_length_stream_type_flags_and_bytes() -> None:
    assert ttrpc.encode(Frame(5, Kind.REQUEST, b"hello")) == bytes.fromhex("00000005 00000005 01 00") + b"hello"


def test_a_long_message_is_cut_where_a_go_plugin_can_read_it() -> None:
    framed = mux.frames(1, bytes(10_000))

    lengths = [len(piece) for _, piece in mux.Splitter().feed(framed)]

    assert lengths == [4096, 5904]


@given(st.lists(st.tuples(st.integers(1, 9), st.binary(max_size=300)), max_size=8), st.lists(st.integers(0, 3000)))
def test_mux_frames_come_out_as_they_went_in_however_they_are_cut(
    sent: list[tuple[int, bytes]], cuts: list[int]
) -> None:
    data = b"".join(mux.frames(connection, message) for connection, message in sent)
    splitter = mux.Splitter()

    got = [frame for piece in pieces_of(data, cuts) for frame in splitter.feed(piece)]

    assert got == sent


@given(st.lists(st.tuples(st.integers(0, 2**30), st.binary(max_size=300)), max_size=8), st.lists(st.integers(0, 3000)))
def test_ttrpc_messages_come_out_as_they_went_in_however_they_are_cut(
    sent: list[tuple[int, bytes]], cuts: list[int]
) -> None:
    frames = [Frame(2 * half + 1, Kind.RESPONSE, payload) for half, payload in sent]
    data = b"".join(map(ttrpc.encode, frames))
    splitter = ttrpc.Splitter(Kind.RESPONSE)

    got = [frame for piece in pieces_of(data, cuts) for frame in splitter.feed(piece)]

    assert got == frames


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_any_bytes_are_frames_or_a_protocol_error(data: bytes, cuts: list[int]) -> None:
    outer, inner = mux.Splitter(), ttrpc.Splitter(Kind.REQUEST)
    try:
        for piece in pieces_of(data, cuts):
            for _, carried in outer.feed(piece):
                for frame in inner.feed(carried):
                    assert frame.stream % 2 == 1
    except ProtocolError as error:
        assert str(error)


def test_a_frame_that_claims_gigabytes_is_refused_at_its_header() -> None:
    with pytest.raises(ProtocolError, match="4294967295 bytes"):
        list(mux.Splitter().feed(struct.pack(">II", 1, 0xFFFFFFFF)))
    with pytest.raises(ProtocolError, match="4194305 bytes"):
        list(ttrpc.Splitter(Kind.REQUEST).feed(struct.pack(">IIBB", (4 << 20) + 1, 1, 1, 0)))


def test_the_longest_message_passes_both_layers() -> None:
    message = ttrpc.encode(Frame(1, Kind.REQUEST, bytes(ttrpc.LONGEST)))
    outer, inner = mux.Splitter(), ttrpc.Splitter(Kind.REQUEST)

    got = [frame for _, piece in outer.feed(mux.frames(1, message)) for frame in inner.feed(piece)]

    assert [len(frame.payload) for frame in got] == [ttrpc.LONGEST]


def test_a_message_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="at most"):
        ttrpc.encode(Frame(1, Kind.REQUEST, bytes(ttrpc.LONGEST + 1)))


@pytest.mark.parametrize(("stream", "kind"), [(1, 3), (1, 2), (2, 1)])
def test_streams_and_types_that_nri_does_not_have_are_refused(stream: int, kind: int) -> None:
    with pytest.raises(ProtocolError):
        list(ttrpc.Splitter(Kind.REQUEST).feed(struct.pack(">IIBB", 0, stream, kind, 0)))
