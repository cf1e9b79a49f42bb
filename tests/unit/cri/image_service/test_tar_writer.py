"""Headers that are written are read back alike, by us, by Python and by GNU tar."""

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from cri.image_service.tar import Archive, Entry, Kind, Stream
from cri.image_service.tar_writer import END, header, member_header, padding

LONG = b"a/" * 100 + b"n" * 255
ENTRIES = [
    Entry(b"d", Kind.DIRECTORY, 0o1777, 1, 2, 5 * 10**9, 0, 0),
    Entry(b"d/f", Kind.FILE, 0o4755, 1000, 1001, 12345 * 10**9, 4, 4),
    Entry(b"d/times", Kind.FILE, 0o644, 0, 0, 1234567890123456789, 4, 4),
    Entry(b"d/old", Kind.FILE, 0o644, 0, 0, -1_500_000_000, 4, 4),
    Entry(b"d/owner", Kind.FILE, 0o644, 2**31, 2**31 + 1, 0, 4, 4),
    Entry(LONG, Kind.FILE, 0o644, 0, 0, 0, 4, 4),
    Entry(b"bytes-\xff", Kind.FILE, 0o644, 0, 0, 0, 4, 4, xattrs={b"user.x": b"\0\xff=\n", b"user.y": b""}),
    Entry(b"s", Kind.SYMLINK, 0o777, 0, 0, 0, 0, 0, link=b"t" * 300),
    Entry(b"h", Kind.HARD_LINK, 0o644, 0, 0, 0, 0, 0, link=LONG),
    Entry(b"c", Kind.CHARACTER, 0o620, 0, 5, 0, 0, 0, major=5, minor=255),
    Entry(b"b", Kind.BLOCK_DEVICE, 0o660, 0, 6, 0, 0, 0, major=259, minor=70000),
    Entry(b"p", Kind.FIFO, 0o600, 0, 0, 0, 0, 0),
    Entry(b"d/sparse", Kind.FILE, 0o644, 0, 0, 0, 514, 1 << 20, segments=[(4096, 512), (8192, 2), (1 << 20, 0)]),
    Entry(b"d/hole", Kind.FILE, 0o644, 0, 0, 0, 0, 1 << 20, segments=[(1 << 20, 0)]),
]


def written(entries: list[Entry]) -> bytes:
    parts = []
    for each in entries:
        data = (b"data" * 200)[: each.stored_bytes]
        parts += [header(each), data, padding(len(data))]
    return b"".join(parts) + END


def test_every_kind_of_entry_comes_back_as_it_was_written() -> None:
    content = written(ENTRIES)

    assert len(content) % 512 == 0
    found = list(Archive(Stream([content])))
    for each in found:
        each.name = each.name.rstrip(b"/")
    assert found == ENTRIES


@pytest.mark.skipif(shutil.which("tar") is None, reason="tar is not installed")
def test_gnu_tar_unpacks_what_was_written(tmp_path: Path) -> None:
    wanted = [each for each in ENTRIES if each.kind not in (Kind.CHARACTER, Kind.BLOCK_DEVICE) and each.uid < 2**31]
    (tmp_path / "x.tar").write_bytes(written(wanted))

    subprocess.run(["tar", "-C", str(tmp_path), "-xf", str(tmp_path / "x.tar"), "--no-same-owner"], check=True)

    assert (tmp_path / "d/f").read_bytes() == b"data"
    assert (tmp_path / "d/times").stat().st_mtime_ns == 1234567890123456789
    assert (tmp_path / LONG.decode()).samefile(tmp_path / "h")
    sparse = (tmp_path / "d/sparse").read_bytes()
    assert (len(sparse), sparse[4096:4608], sparse[8192:8195]) == (1 << 20, b"data" * 128, b"da\0")
    assert (tmp_path / "d/hole").stat().st_size == 1 << 20
    assert (tmp_path / "d/hole").stat().st_blocks == 0


@pytest.mark.parametrize("size", [0, 7, 8**11 - 1, 8**11, 1 << 40])
@pytest.mark.parametrize("name", [b"blobs/sha256/" + b"a" * 64, b"blobs/sha512/" + b"a" * 128])
def test_the_header_of_a_plain_file_is_as_long_whatever_its_size_and_is_understood(name: bytes, size: int) -> None:
    made = member_header(name, size)

    assert len(made) == len(member_header(name, 0))
    with tarfile.open(fileobj=io.BytesIO(made)) as archive:
        found = archive.next()
        assert found is not None
        assert (found.name, found.size) == (name.decode(), size)
