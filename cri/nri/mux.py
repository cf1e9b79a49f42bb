"""The frames by which NRI carries several two-way connections over one socket: bytes in, pieces out, without I/O.

connection number (32) | length (32) | that many bytes of the connection's stream; both big-endian
"""

import struct
from collections.abc import Iterator

from oci.errors import Error

PLUGIN_SERVICE = 1  # what the runtime asks of the plugin
RUNTIME_SERVICE = 2  # what the plugin asks of the runtime

_HEADER = struct.Struct(">II")
LONGEST = 10 + (4 << 20)  # one ttrpc message, header included

# A Go plugin reads each frame into a buffer of this size, and a larger frame only where its reader already waits for
# the rest of a message that is larger than the buffer. A frame that fits neither breaks its connection.
_FIRST = 4096


class ProtocolError(Error):
    """The peer has sent what the protocol does not know; the connection cannot go on."""


class Splitter:
    """Takes the socket's bytes as they come and gives the pieces of the connections in them."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Connection number and bytes of every frame that is complete now. Raises ProtocolError."""
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            connection, length = _HEADER.unpack_from(self._buffer)
            if length > LONGEST:
                raise ProtocolError(f"NRI mux: a frame of {length} bytes: at most {LONGEST} are allowed")
            end = _HEADER.size + length
            if len(self._buffer) < end:
                return
            piece = bytes(self._buffer[_HEADER.size : end])
            del self._buffer[:end]
            yield connection, piece


def frames(connection: int, message: bytes) -> bytes:
    """One ttrpc message as the frames of a connection, cut as a Go plugin can read them."""
    first, rest = message[:_FIRST], message[_FIRST:]
    framed = _HEADER.pack(connection, len(first)) + first
    return framed + _HEADER.pack(connection, len(rest)) + rest if rest else framed
