"""ttrpc's message frames: bytes in, messages out, without I/O. Only unary calls: NRI has no others.

    length (32) | stream (32) | type (8) | flags (8) | that many bytes; numbers are big-endian

Source: containerd/ttrpc, PROTOCOL.md.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from cri.nri.mux import ProtocolError

_HEADER = struct.Struct(">IIBB")
LONGEST = 4 << 20  # of a message without its header


class Kind(IntEnum):
    REQUEST = 1
    RESPONSE = 2
    DATA = 3


@dataclass(frozen=True, slots=True)
class Frame:
    """One message; a request opens its stream, whose number is odd, and the response ends it."""

    stream: int
    kind: Kind
    payload: bytes


class Splitter:
    """Takes one connection's bytes as they come and gives the messages in them."""

    def __init__(self, expected: Kind) -> None:
        self._expected = expected
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Every message that is complete now. Raises ProtocolError."""
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            length, stream, kind, _flags = _HEADER.unpack_from(self._buffer)
            if length > LONGEST:
                raise ProtocolError(f"ttrpc: a message of {length} bytes: at most {LONGEST} are allowed")
            if kind != self._expected:
                raise ProtocolError(f"ttrpc: a message of type {kind}: expected {self._expected.name} only")
            if stream % 2 == 0:
                raise ProtocolError(f"ttrpc: stream {stream}: expected an odd number")
            end = _HEADER.size + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[_HEADER.size : end])
            del self._buffer[:end]
            yield Frame(stream, self._expected, payload)


def encode(frame: Frame) -> bytes:
    """Raises ProtocolError for a payload that is too long: the other side would refuse it."""
    if len(frame.payload) > LONGEST:
        raise ProtocolError(f"ttrpc: a message of {len(frame.payload)} bytes: at most {LONGEST} can be sent")
    return _HEADER.pack(len(frame.payload), frame.stream, frame.kind, 0) + frame.payload
