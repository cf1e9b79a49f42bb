"""SPDY/3.1 frames: bytes to frames and back, without I/O.

What Kubernetes' clients speak is SPDY's framing without its flow control: they neither send WINDOW_UPDATE nor heed it.
So nothing here counts windows; who reads slowly is slowed down by not reading from the connection.
Source: SPDY protocol, draft 3.1.
"""

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

VERSION = 3
CONTROL_PAYLOAD_BYTES = 64 * 1024  # of a control frame as it is sent: far above any stream's headers
HEADER_BLOCK_BYTES = 64 * 1024  # decompressed
HEADERS = 100

_FLAG_FIN = 0x01
_FLAG_UNIDIRECTIONAL = 0x02
_HEAD = struct.Struct(">II")
_U32 = struct.Struct(">I")
_TWO = struct.Struct(">II")
_MASK_31 = 0x7FFFFFFF
_MASK_24 = 0xFFFFFF

_WORDS = (
    "options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age allow"
    " authorization cache-control connection content-base content-encoding content-language content-length"
    " content-location content-md5 content-range content-type date etag expect expires from host if-match"
    " if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma"
    " proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade"
    " user-agent vary via warning www-authenticate method get status 200_OK version HTTP/1.1 url public set-cookie"
    " keep-alive origin"
)
_TAIL = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505"
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden"
    "404 Not Found500 Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug"
    " Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,"
    "application/xml,application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,"
    "sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)


def _sized(text: str) -> bytes:
    content = text.encode()
    return _U32.pack(len(content)) + content


# What both sides' compressors start from. Source: draft 3, section 2.6.10.1
DICTIONARY = b"".join(_sized(word.replace("_", " ")) for word in _WORDS.split()) + _TAIL.encode()


class Type(IntEnum):
    SYN_STREAM = 1
    SYN_REPLY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    HEADERS = 8
    WINDOW_UPDATE = 9


class Reset(IntEnum):
    """Why a stream ends at once (RST_STREAM)."""

    PROTOCOL_ERROR = 1
    INVALID_STREAM = 2
    REFUSED_STREAM = 3
    CANCEL = 5
    INTERNAL_ERROR = 6


class GoAwayStatus(IntEnum):
    OK = 0
    PROTOCOL_ERROR = 1


class SpdyError(Exception):
    """The other side broke the protocol in a way that ends the session."""


@dataclass(frozen=True, slots=True)
class SynStream:
    stream_id: int
    headers: Mapping[str, str]
    fin: bool = False
    unidirectional: bool = False


@dataclass(frozen=True, slots=True)
class SynReply:
    stream_id: int
    headers: Mapping[str, str]
    fin: bool = False


@dataclass(frozen=True, slots=True)
class Data:
    """A part of a DATA frame, as far as it has come; `fin` is on the last part of the stream's last frame."""

    stream_id: int
    data: bytes
    fin: bool = False


@dataclass(frozen=True, slots=True)
class RstStream:
    stream_id: int
    status: int


@dataclass(frozen=True, slots=True)
class Ping:
    id: int


@dataclass(frozen=True, slots=True)
class GoAway:
    last_stream_id: int
    status: int


@dataclass(frozen=True, slots=True)
class Headers:
    """More headers of a stream that is open; nobody in Kubernetes sends them."""

    stream_id: int
    headers: Mapping[str, str] = field(default_factory=dict)
    fin: bool = False


Frame = SynStream | SynReply | Data | RstStream | Ping | GoAway | Headers


class Decoder:
    """Turns what arrives into frames. Keeps at most one control frame; the body of a DATA frame is never collected."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._inflater = zlib.decompressobj(zdict=DICTIONARY)
        self._data_stream = 0  # whose DATA frame we are in
        self._data_left = 0
        self._data_fin = False

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames, and parts of DATA frames, that `data` completes. SpdyError where they are none.

        Take them all before the next call.
        """
        self._buffer += data
        position = 0
        try:
            while True:
                if self._data_left:
                    frame, position = self._body(position)
                    if frame is None:
                        return
                    yield frame
                    continue
                if len(self._buffer) - position < 8:
                    return
                first, second = _HEAD.unpack_from(self._buffer, position)
                flags, length = second >> 24, second & _MASK_24
                if not first >> 31:
                    position += 8
                    empty = self._begin_data(first, flags, length)
                    if empty is not None:
                        yield empty
                    continue
                if length > CONTROL_PAYLOAD_BYTES:
                    raise SpdyError(f"a control frame of {length} bytes, at most {CONTROL_PAYLOAD_BYTES} are taken")
                if len(self._buffer) - position - 8 < length:
                    return
                payload = bytes(self._buffer[position + 8 : position + 8 + length])
                position += 8 + length
                control = self._control((first >> 16) & 0x7FFF, first & 0xFFFF, flags, payload)
                if control is not None:
                    yield control
        finally:
            del self._buffer[:position]

    def _begin_data(self, stream_id: int, flags: int, length: int) -> Data | None:
        if stream_id == 0:
            raise SpdyError("a DATA frame of stream 0")
        self._data_stream, self._data_left, self._data_fin = stream_id, length, bool(flags & _FLAG_FIN)
        return None if length else Data(stream_id, b"", self._data_fin)

    def _body(self, position: int) -> tuple[Data | None, int]:
        part = bytes(memoryview(self._buffer)[position : position + self._data_left])
        if not part:
            return None, position
        self._data_left -= len(part)
        fin = self._data_fin and not self._data_left
        return Data(self._data_stream, part, fin), position + len(part)

    def _control(self, version: int, kind: int, flags: int, payload: bytes) -> Frame | None:
        if version != VERSION:
            raise SpdyError(f"a control frame of SPDY version {version}")
        try:
            return self._parse(kind, flags, payload)
        except struct.error as error:
            raise SpdyError(f"a control frame of type {kind} with {len(payload)} bytes: {error}") from error

    def _parse(self, kind: int, flags: int, payload: bytes) -> Frame | None:
        fin = bool(flags & _FLAG_FIN)
        match kind:
            case Type.SYN_STREAM:
                stream_id, _associated, _priority = struct.unpack_from(">IIH", payload)
                headers = self._headers(payload[10:])
                return SynStream(_stream(stream_id), headers, fin, bool(flags & _FLAG_UNIDIRECTIONAL))
            case Type.SYN_REPLY:
                (stream_id,) = _U32.unpack_from(payload)
                return SynReply(_stream(stream_id), self._headers(payload[4:]), fin)
            case Type.HEADERS:
                (stream_id,) = _U32.unpack_from(payload)
                return Headers(_stream(stream_id), self._headers(payload[4:]), fin)
            case Type.RST_STREAM:
                stream_id, status = _TWO.unpack(payload)
                return RstStream(_stream(stream_id), status)
            case Type.PING:
                return Ping(*_U32.unpack(payload))
            case Type.GOAWAY:
                last, status = _TWO.unpack(payload)
                return GoAway(last & _MASK_31, status)
            case Type.SETTINGS | Type.WINDOW_UPDATE:
                return None
        raise SpdyError(f"a control frame of unknown type {kind}")

    def _headers(self, block: bytes) -> dict[str, str]:
        try:
            plain = self._inflater.decompress(block, HEADER_BLOCK_BYTES + 1)
        except zlib.error as error:
            raise SpdyError(f"headers that cannot be decompressed: {error}") from error
        if len(plain) > HEADER_BLOCK_BYTES or self._inflater.unconsumed_tail:
            raise SpdyError(f"headers of more than {HEADER_BLOCK_BYTES} bytes")
        if self._inflater.eof:
            raise SpdyError("headers whose compression has ended")
        return parse_headers(plain)


def parse_headers(block: bytes) -> dict[str, str]:
    """The name/value pairs of a decompressed block. SpdyError where it is cut off, too long, or has a name twice."""
    headers: dict[str, str] = {}
    try:
        (count,) = _U32.unpack_from(block)
        if count > HEADERS:
            raise SpdyError(f"{count} headers, at most {HEADERS} are taken")
        position = 4
        for _ in range(count):
            name, position = _text(block, position)
            value, position = _text(block, position)
            if not name or name.lower() in headers:
                raise SpdyError(f"header {name[:100]!r} is empty or twice there")
            headers[name.lower()] = value
    except struct.error as error:
        raise SpdyError(f"a header block of {len(block)} bytes that is cut off") from error
    if position != len(block):
        raise SpdyError(f"a header block with {len(block) - position} bytes too many")
    return headers


def _text(block: bytes, position: int) -> tuple[str, int]:
    (length,) = _U32.unpack_from(block, position)
    end = position + 4 + length
    if end > len(block):
        raise SpdyError(f"a header block of {len(block)} bytes that is cut off")
    return block[position + 4 : end].decode("utf-8", "replace"), end


def _stream(stream_id: int) -> int:
    stream_id &= _MASK_31
    if stream_id == 0:
        raise SpdyError("a frame of stream 0")
    return stream_id


class Encoder:
    """Makes the bytes of frames with headers. They share a compressor: send them in the order of their making."""

    def __init__(self) -> None:
        # A small window is enough for headers, and leaves a session 10 KB smaller than the default does 256.
        self._deflater = zlib.compressobj(wbits=12, memLevel=2, zdict=DICTIONARY)

    def syn_stream(self, stream_id: int, headers: Mapping[str, str], fin: bool = False) -> bytes:
        payload = struct.pack(">IIH", stream_id, 0, 0) + self._block(headers)
        return _control(Type.SYN_STREAM, payload, _FLAG_FIN if fin else 0)

    def syn_reply(self, stream_id: int, headers: Mapping[str, str] | None = None) -> bytes:
        return _control(Type.SYN_REPLY, _U32.pack(stream_id) + self._block(headers or {}))

    def _block(self, headers: Mapping[str, str]) -> bytes:
        plain = _U32.pack(len(headers)) + b"".join(_sized(k.lower()) + _sized(v) for k, v in headers.items())
        return self._deflater.compress(plain) + self._deflater.flush(zlib.Z_SYNC_FLUSH)


def data(stream_id: int, content: bytes, fin: bool = False) -> bytes:
    return _HEAD.pack(stream_id, (_FLAG_FIN if fin else 0) << 24 | len(content)) + content


def rst_stream(stream_id: int, status: Reset) -> bytes:
    return _control(Type.RST_STREAM, _TWO.pack(stream_id, status))


def ping(id: int) -> bytes:
    return _control(Type.PING, _U32.pack(id))


def goaway(last_stream_id: int, status: GoAwayStatus) -> bytes:
    return _control(Type.GOAWAY, _TWO.pack(last_stream_id, status))


def _control(kind: Type, payload: bytes, flags: int = 0) -> bytes:
    return _HEAD.pack(1 << 31 | VERSION << 16 | kind, flags << 24 | len(payload)) + payload
