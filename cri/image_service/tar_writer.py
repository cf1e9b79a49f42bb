"""Writes the headers of tar archives: ustar, with PAX records for what that cannot hold; touches no file.

Names are bytes, as the kernel's are. Source: POSIX pax(1), "ustar Interchange Format"; GNU tar manual, "Storing Sparse
Files", PAX format 1.0.
"""

from cri.image_service.tar import BLOCK, Entry, Kind

END = bytes(2 * BLOCK)
_NAME_BYTES = 100
_FLAGS = {
    Kind.FILE: b"0",
    Kind.HARD_LINK: b"1",
    Kind.SYMLINK: b"2",
    Kind.CHARACTER: b"3",
    Kind.BLOCK_DEVICE: b"4",
    Kind.DIRECTORY: b"5",
    Kind.FIFO: b"6",
}


def header(entry: Entry) -> bytes:
    """What precedes the entry's data: its header, with PAX records before it and a sparse file's map behind it."""
    name = entry.name + b"/" if entry.kind is Kind.DIRECTORY and not entry.name.endswith(b"/") else entry.name
    size, sparse_map = entry.stored_bytes, b""
    records = {b"SCHILY.xattr." + key: value for key, value in entry.xattrs.items()}
    if entry.segments is not None:
        sparse_map = _sparse_map(entry.segments)
        size += len(sparse_map)
        records |= {
            b"GNU.sparse.major": b"1",
            b"GNU.sparse.minor": b"0",
            b"GNU.sparse.name": name,
            b"GNU.sparse.realsize": b"%d" % entry.size_bytes,
        }
        name = b"GNUSparseFile.0/" + name.rpartition(b"/")[2]
    if len(name) > _NAME_BYTES:
        records[b"path"] = name
    if len(entry.link) > _NAME_BYTES:
        records[b"linkpath"] = entry.link
    for key, number, digits in ((b"uid", entry.uid, 7), (b"gid", entry.gid, 7), (b"size", size, 11)):
        if number >= 8**digits:
            records[key] = b"%d" % number
    seconds, fraction = divmod(entry.mtime_ns, 1_000_000_000)
    if fraction or not 0 <= seconds < 8**11:
        records[b"mtime"] = _decimal(entry.mtime_ns)
    block = _block(
        name,
        _FLAGS[entry.kind],
        size if size < 8**11 else 0,
        mode=entry.mode,
        uid=entry.uid if entry.uid < 8**7 else 0,
        gid=entry.gid if entry.gid < 8**7 else 0,
        mtime=seconds if 0 <= seconds < 8**11 else 0,
        link=entry.link,
        device=(entry.major, entry.minor),
    )
    return _extended(name, records) + block + sparse_map


def member_header(name: bytes, size_bytes: int) -> bytes:
    """One of a plain file, always as long for the same name: it may be written before the size is known, and again."""
    records = {b"path": name} if len(name) > _NAME_BYTES else {}
    return _extended(name, records) + _block(name, b"0", size_bytes, mode=0o644)


def padding(size_bytes: int) -> bytes:
    """What follows so many bytes of data."""
    return bytes(-size_bytes % BLOCK)


def _extended(name: bytes, records: dict[bytes, bytes]) -> bytes:
    if not records:
        return b""
    text = b"".join(_record(key, records[key]) for key in sorted(records))
    return _block(b"PaxHeaders.0/" + name.rpartition(b"/")[2], b"x", len(text), mode=0o644) + text + padding(len(text))


def _record(key: bytes, value: bytes) -> bytes:
    """ "LENGTH key=value\\n", where LENGTH counts itself."""
    rest = b" %s=%s\n" % (key, value)
    length = len(rest) + 1
    while len(b"%d" % length) + len(rest) != length:
        length = len(b"%d" % length) + len(rest)
    return b"%d%s" % (length, rest)


def _block(
    name: bytes,
    flag: bytes,
    size: int,
    *,
    mode: int,
    uid: int = 0,
    gid: int = 0,
    mtime: int = 0,
    link: bytes = b"",
    device: tuple[int, int] = (0, 0),
) -> bytes:
    size_field = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    before = b"".join(
        (
            name[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0"),
            b"%07o\0%07o\0%07o\0" % (mode, uid, gid),
            size_field,
            b"%011o\0" % mtime,
        )
    )
    behind = b"".join(
        (
            flag,
            link[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0"),
            b"ustar\x0000",
            bytes(64),  # the names of user and group: numbers count
            b"%07o\0%07o\0" % device,
            bytes(167),
        )
    )
    checksum = sum(before) + 8 * 0x20 + sum(behind)
    return before + b"%06o\0 " % checksum + behind


def _sparse_map(segments: list[tuple[int, int]]) -> bytes:
    numbers = [len(segments), *(number for segment in segments for number in segment)]
    text = b"".join(b"%d\n" % number for number in numbers)
    return text + padding(len(text))


def _decimal(nanoseconds: int) -> bytes:
    sign = b"-" if nanoseconds < 0 else b""
    seconds, fraction = divmod(abs(nanoseconds), 1_000_000_000)
    return sign + (b"%d.%09d" % (seconds, fraction)).rstrip(b"0").rstrip(b".")
