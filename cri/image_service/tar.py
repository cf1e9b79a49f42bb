"""Reads tar archives from a stream: ustar, PAX and GNU headers, long names, xattrs, sparse files; touches no file.

Names are bytes, as the kernel's are. Source: POSIX pax(1), "ustar Interchange Format"; GNU tar manual, "Basic Tar
Format" and "Storing Sparse Files".
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from oci.errors import Error

BLOCK = 512
_EXTENSION_LIMIT = 1 << 20  # a PAX header or a long name
_SPARSE_LIMIT = 1 << 16  # segments of one sparse file
_ZEROS = bytes(BLOCK)
_XATTR_PREFIX = b"SCHILY.xattr."


class Kind(Enum):
    FILE = "regular file"
    HARD_LINK = "hard link"
    SYMLINK = "symbolic link"
    CHARACTER = "character device"
    BLOCK_DEVICE = "block device"
    DIRECTORY = "directory"
    FIFO = "fifo"


_KINDS = {
    b"0": Kind.FILE,
    b"\0": Kind.FILE,
    b"7": Kind.FILE,
    b"S": Kind.FILE,
    b"1": Kind.HARD_LINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHARACTER,
    b"4": Kind.BLOCK_DEVICE,
    b"5": Kind.DIRECTORY,
    b"6": Kind.FIFO,
}


@dataclass(slots=True)
class Entry:
    name: bytes
    kind: Kind
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    stored_bytes: int  # of data in the archive
    size_bytes: int  # of the file; more than stored where it is sparse
    link: bytes = b""
    major: int = 0
    minor: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    segments: list[tuple[int, int]] | None = None  # (offset, length) of a sparse file's data, ascending

    def __str__(self) -> str:
        return f"{self.kind.value} {self.name.decode(errors='backslashreplace')!r}"


class Stream:
    """Bytes from an iterator of chunks, given out by count."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._chunk = b""
        self._at = 0

    def take(self, count: int) -> bytes:
        """`count` bytes, or fewer at the end of the stream."""
        end = self._at + count
        if end <= len(self._chunk):
            taken = self._chunk[self._at : end]
            self._at = end
            return taken
        return b"".join(self.pieces(count))

    def pieces(self, count: int) -> Iterator[memoryview]:
        """The next `count` bytes in pieces, as they lie in memory; fewer at the end of the stream."""
        while count > 0:
            if self._at == len(self._chunk):
                self._chunk, self._at = next(self._chunks, b""), 0
                if not self._chunk:
                    return
            piece = memoryview(self._chunk)[self._at : self._at + count]
            self._at += len(piece)
            count -= len(piece)
            yield piece

    def skip(self, count: int) -> int:
        """How many of `count` bytes there were to skip."""
        if self._at + count <= len(self._chunk):
            self._at += count
            return count
        return sum(len(piece) for piece in self.pieces(count))

    def drain(self) -> None:
        self._chunk, self._at = b"", 0
        for _ in self._chunks:
            pass


class Archive:
    """The entries of one archive, in order; the data of an entry is read before the next entry is asked for."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._left = 0  # bytes of the entry's data not yet read
        self._padding = 0

    def __iter__(self) -> Iterator[Entry]:
        """Ends at the archive's end mark or at the stream's end. Raises Error for what is no tar."""
        while (header := self._header()) is not None:
            entry = self._entry(header)
            if entry is not None:
                yield entry

    def data(self) -> Iterator[memoryview]:
        """The stored data of the entry that was given last, in pieces. Raises Error where the archive is cut short."""
        while self._left:
            got = 0
            for piece in self._stream.pieces(self._left):
                got += len(piece)
                self._left -= len(piece)
                yield piece
            if not got:
                raise Error("tar archive ends in the middle of a file")

    def _header(self) -> bytes | None:
        if self._left:
            for _ in self.data():
                pass
        if self._padding:
            self._stream.skip(self._padding)
            self._padding = 0
        header = self._stream.take(BLOCK)
        if not header or header == _ZEROS:
            return None
        if len(header) < BLOCK:
            raise Error(f"tar archive ends in the middle of a header, {len(header)} bytes into it")
        _check_sum(header)
        return header

    def _expect(self, size: int) -> None:
        self._left = size
        self._padding = -size % BLOCK

    def _entry(self, header: bytes) -> Entry | None:
        """The entry that starts with `header`, after the headers that extend it; None where only the end follows."""
        pax: list[tuple[bytes, bytes]] = []
        long_name = long_link = None
        while (flag := header[156:157]) in b"xgLK" and flag:
            self._expect(_number(header[124:136]))
            if flag == b"g":
                pass  # global headers name the archive (git does so), nothing that other runtimes apply
            elif flag == b"x":
                pax = _pax_records(self._extension())
            elif flag == b"L":
                long_name = self._extension().split(b"\0", 1)[0]
            else:
                long_link = self._extension().split(b"\0", 1)[0]
            following = self._header()
            if following is None:
                if flag == b"g":
                    return None
                raise Error("tar archive ends after a header that extends the next one")
            header = following
        entry = _plain_entry(header)
        if long_name is not None:
            entry.name = long_name
        if long_link is not None:
            entry.link = long_link
        if pax:
            _apply_pax(entry, pax)
        if flag in (b"\0", b"0") and entry.name.endswith(b"/"):
            entry.kind = Kind.DIRECTORY  # as written before POSIX had a flag for directories
        if entry.kind is not Kind.FILE:
            entry.size_bytes = 0
            if flag not in b"\x000":  # links tell their target's size, and no data follows
                entry.stored_bytes = 0
        self._expect(entry.stored_bytes)
        if flag == b"S":
            self._old_sparse(entry, header)
        elif pax and entry.kind is Kind.FILE:
            self._pax_sparse(entry, dict(pax), pax)
        return entry

    def _extension(self) -> bytes:
        if self._left > _EXTENSION_LIMIT:
            raise Error(f"tar header of {self._left} bytes; at most {_EXTENSION_LIMIT} are accepted")
        return b"".join(self.data())

    def _old_sparse(self, entry: Entry, header: bytes) -> None:
        entry.size_bytes = _number(header[483:495])
        segments = _sparse_table(header[386:482])
        more = header[482]
        while more:
            extension = self._stream.take(BLOCK)
            if len(extension) < BLOCK:
                raise Error("tar archive ends in the middle of a sparse file's map")
            segments += _sparse_table(extension[:504])
            more = extension[504]
            if len(segments) > _SPARSE_LIMIT:
                raise Error(f"sparse {entry} has more than {_SPARSE_LIMIT} segments")
        entry.segments = _checked(segments, entry)

    def _pax_sparse(self, entry: Entry, records: dict[bytes, bytes], ordered: list[tuple[bytes, bytes]]) -> None:
        if b"GNU.sparse.major" not in records and b"GNU.sparse.size" not in records:
            return
        size = records.get(b"GNU.sparse.realsize", records.get(b"GNU.sparse.size"))
        if size is None:
            raise Error(f"sparse {entry} has no size")
        entry.size_bytes = _decimal(size)
        entry.name = records.get(b"GNU.sparse.name", entry.name)
        if records.get(b"GNU.sparse.major") == b"1":
            numbers = self._sparse_map_in_data(entry)
        elif b"GNU.sparse.map" in records:
            numbers = [_decimal(number) for number in records[b"GNU.sparse.map"].split(b",") if number]
        else:
            wanted = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")
            numbers = [_decimal(value) for key, value in ordered if key in wanted]
        if len(numbers) % 2:
            raise Error(f"sparse {entry} has a map of an odd length")
        entry.segments = _checked(list(zip(numbers[::2], numbers[1::2], strict=True)), entry)

    def _sparse_map_in_data(self, entry: Entry) -> list[int]:
        """The map that GNU's format 1.0 puts before the data, in whole blocks of decimal lines."""
        text = b""
        wanted = None
        while wanted is None or text.count(b"\n") < wanted:
            if self._left < BLOCK or len(text) > _EXTENSION_LIMIT:
                raise Error(f"sparse {entry} has no whole map")
            block = self._stream.take(BLOCK)
            self._left -= len(block)
            entry.stored_bytes -= len(block)
            text += block
            if wanted is None and b"\n" in text:
                wanted = 1 + 2 * _decimal(text.split(b"\n", 1)[0])
        return [_decimal(line) for line in text.split(b"\n")[1:wanted]]


def _plain_entry(header: bytes) -> Entry:
    flag = header[156:157]
    kind = _KINDS.get(flag)
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    if kind is None:
        raise Error(f"tar entry {name.decode(errors='backslashreplace')!r} is of the unknown type {flag!r}")
    size = _number(header[124:136])
    if size < 0:
        raise Error(f"tar entry {name.decode(errors='backslashreplace')!r} has the size {size}")
    return Entry(
        name=name,
        kind=kind,
        mode=_number(header[100:108]) & 0o7777,
        uid=_number(header[108:116]),
        gid=_number(header[116:124]),
        mtime_ns=_number(header[136:148]) * 1_000_000_000,
        stored_bytes=size,
        size_bytes=size,
        link=header[157:257].split(b"\0", 1)[0],
        major=_number(header[329:337]) if kind in (Kind.CHARACTER, Kind.BLOCK_DEVICE) else 0,
        minor=_number(header[337:345]) if kind in (Kind.CHARACTER, Kind.BLOCK_DEVICE) else 0,
    )


def _apply_pax(entry: Entry, records: list[tuple[bytes, bytes]]) -> None:
    for key, value in records:
        if key.startswith(_XATTR_PREFIX):
            entry.xattrs[key[len(_XATTR_PREFIX) :]] = value
        elif key == b"path":
            entry.name = value
        elif key == b"linkpath":
            entry.link = value
        elif key == b"size":
            entry.stored_bytes = entry.size_bytes = _decimal(value)
        elif key == b"uid":
            entry.uid = _decimal(value)
        elif key == b"gid":
            entry.gid = _decimal(value)
        elif key == b"mtime":
            entry.mtime_ns = _nanoseconds(value)


def _pax_records(text: bytes) -> list[tuple[bytes, bytes]]:
    records = []
    while text:
        length, space, _ = text.partition(b" ")
        size = _decimal(length) if space else 0
        record = text[len(length) + 1 : size]
        key, equals, value = record[:-1].partition(b"=")
        if size > len(text) or not record.endswith(b"\n") or not equals or not key:
            raise Error(f"tar has a wrong PAX record: {text[:40]!r}")
        records.append((key, value))
        text = text[size:]
    return records


def _number(field_bytes: bytes) -> int:
    """A header's number: octal text, or big-endian two's complement where the first bit is set (GNU)."""
    if field_bytes[0] & 0x80:
        value = int.from_bytes(field_bytes, "big", signed=False) & ~(0x80 << 8 * (len(field_bytes) - 1))
        return value - (1 << 8 * len(field_bytes) - 1) if field_bytes[0] & 0x40 else value
    text = field_bytes.split(b"\0", 1)[0].strip()
    if not text:
        return 0
    try:
        return int(text, 8)
    except ValueError:
        raise Error(f"tar header has {field_bytes!r} where an octal number is expected") from None


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise Error(f"tar header has {text[:40]!r} where a decimal number is expected")
    return int(text)


def _nanoseconds(text: bytes) -> int:
    whole, _, fraction = text.partition(b".")
    negative = whole.startswith(b"-")
    seconds = _decimal(whole[1:] if negative else whole)
    nanoseconds = seconds * 1_000_000_000 + (_decimal(fraction[:9].ljust(9, b"0")) if fraction else 0)
    return -nanoseconds if negative else nanoseconds


def _sparse_table(table: bytes) -> list[tuple[int, int]]:
    pairs = [(table[at : at + 12], table[at + 12 : at + 24]) for at in range(0, len(table), 24)]
    return [(_number(offset), _number(length)) for offset, length in pairs if offset[0]]


def _checked(segments: list[tuple[int, int]], entry: Entry) -> list[tuple[int, int]]:
    end = 0
    for offset, length in segments:
        if offset < end or length < 0:
            raise Error(f"sparse {entry} has segments that overlap")
        end = offset + length
    if end > entry.size_bytes or sum(length for _, length in segments) != entry.stored_bytes:
        raise Error(f"sparse {entry} has a map that does not fit its size")
    return segments


def _check_sum(header: bytes) -> None:
    written = _number(header[148:156])
    unsigned = sum(header) - sum(header[148:156]) + 8 * 0x20
    if written == unsigned:
        return
    signed = unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:])
    if written != signed:
        raise Error(f"not a tar archive: the header's checksum is {written}, its bytes make {unsigned}")
