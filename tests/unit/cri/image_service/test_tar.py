"""Tar archives of every dialect are read from a stream, and broken ones are told as such."""

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from cri.image_service.tar import Archive, Entry, Kind, Stream
from oci.errors import Error
from tests.fakes.layers import directory, entry, file, hard_link, symlink, tar


def chunked(content: bytes, size: int) -> list[bytes]:
    return [content[at : at + size] for at in range(0, len(content), size)]


def read(content: bytes, chunk: int = 700) -> list[tuple[Entry, bytes]]:
    archive = Archive(Stream(chunked(content, chunk)))
    return [(each, b"".join(archive.data())) for each in archive]


@pytest.mark.parametrize("dialect", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("chunk", [1, 511, 512, 1 << 20])
def test_entries_come_back_as_they_were_written(dialect: int, chunk: int) -> None:
    content = tar(
        [
            directory("d/", 0o1777),
            file("d/f", b"x" * 1000, 0o4755, uid=1000, gid=1001, mtime=12345),
            file("d/empty"),
            symlink("d/s", "../target"),
            hard_link("d/h", "d/f"),
            entry("d/c", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
            entry("d/p", type=tarfile.FIFOTYPE),
        ],
        dialect,
    )

    found = read(content, chunk)

    assert [each.kind for each, _ in found][:3] == [Kind.DIRECTORY, Kind.FILE, Kind.FILE]
    by_name = {each.name.rstrip(b"/"): (each, data) for each, data in found}
    regular, data = by_name[b"d/f"]
    assert (regular.mode, regular.uid, regular.gid, regular.mtime_ns) == (0o4755, 1000, 1001, 12345 * 10**9)
    assert data == b"x" * 1000
    assert by_name[b"d"][0].mode == 0o1777
    assert by_name[b"d/s"][0].link == b"../target"
    assert by_name[b"d/h"][0].link == b"d/f"
    assert (by_name[b"d/c"][0].major, by_name[b"d/c"][0].minor) == (1, 3)
    assert by_name[b"d/p"][0].kind is Kind.FIFO


@pytest.mark.parametrize("dialect", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_links_are_whole(dialect: int) -> None:
    name, target = "a/" * 100 + "n" * 255, "t" * 300
    [(found, _)] = read(tar([symlink(name, target)], dialect))

    assert found.name == name.encode()
    assert found.link == target.encode()


def test_a_ustar_prefix_is_put_before_the_name() -> None:
    name = "p" * 100 + "/" + "n" * 90
    [(found, _)] = read(tar([file(name)], tarfile.USTAR_FORMAT))

    assert found.name == name.encode()


def test_large_numbers_negative_times_and_fractions_are_exact() -> None:
    [(gnu, _)] = read(tar([file("f", uid=2**31, mtime=-5)], tarfile.GNU_FORMAT))
    assert (gnu.uid, gnu.mtime_ns) == (2**31, -5 * 10**9)

    [(pax, _)] = read(tar([file("f", uid=2**31, pax_headers={"mtime": "1234567890.123456789"})]))
    assert (pax.uid, pax.mtime_ns) == (2**31, 1234567890123456789)

    [(before, _)] = read(tar([file("f", pax_headers={"mtime": "-1.5"})]))
    assert before.mtime_ns == -1_500_000_000


def test_xattrs_may_hold_any_bytes() -> None:
    value = b"\x01\0\0\x02=\n\xff"
    info, _ = file("f")
    record = b"SCHILY.xattr.security.capability=" + value + b"\n"
    length = len(record) + 3
    header = tarfile.TarInfo("PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, length
    content = header.tobuf() + (b"%d " % length + record).ljust(512, b"\0") + info.tobuf() + bytes(1024)

    [(found, _)] = read(content)

    assert found.xattrs == {b"security.capability": value}


def test_global_headers_name_no_entry() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", pax_headers={"comment": "0123"}) as archive:
        archive.addfile(file("f")[0])

    assert [each.name for each, _ in read(buffer.getvalue())] == [b"f"]


def test_an_old_directory_is_known_by_its_slash() -> None:
    [(found, _)] = read(tar([entry("old/", type=tarfile.AREGTYPE)], tarfile.USTAR_FORMAT))

    assert found.kind is Kind.DIRECTORY


def test_a_missing_end_mark_is_forgiven() -> None:
    content = tar([file("f", b"x")])[:1024]

    assert [data for _, data in read(content)] == [b"x"]


def test_data_that_is_not_read_is_passed_over() -> None:
    archive = Archive(Stream(chunked(tar([file("a", b"x" * 5000), file("b", b"y")]), 333)))

    assert [each.name for each in archive] == [b"a", b"b"]


@pytest.mark.skipif(shutil.which("tar") is None, reason="GNU tar is not installed")
@pytest.mark.parametrize(
    "dialect",
    [
        "--format=gnu",
        "--format=pax --sparse-version=0.0",
        "--format=pax --sparse-version=0.1",
        "--format=pax --sparse-version=1.0",
    ],
)
def test_sparse_files_of_gnu_tar_keep_their_holes(tmp_path: Path, dialect: str) -> None:
    with (tmp_path / "sparse").open("wb") as made:
        for at in range(40):
            made.seek(at * 65536)
            made.write(b"%02d" % at * 2048)
        made.truncate(10 << 20)
    content = subprocess.run(
        ["tar", "--sparse", *dialect.split(), "-C", str(tmp_path), "-cf", "-", "sparse"],
        check=True,
        capture_output=True,
    ).stdout

    [(found, data)] = read(content)

    assert found.name == b"sparse"
    assert found.size_bytes == 10 << 20
    whole = bytearray(found.size_bytes)
    at = 0
    assert found.segments is not None
    for offset, length in found.segments:
        whole[offset : offset + length] = data[at : at + length]
        at += length
    assert bytes(whole) == (tmp_path / "sparse").read_bytes()


def with_size(size: bytes) -> bytes:
    header = bytearray(file("f")[0].tobuf())
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"x" * 512, "not a tar archive|octal"),
        (b"short", "ends in the middle of a header"),
        (tar([file("f", b"x" * 2000)])[:1000], "ends in the middle of a file"),
        (tar([file("n" * 200)])[:1024], "ends after a header that extends"),
        (with_size(b"zzzzzzzzzzz\0"), "octal number is expected"),
        (with_size(b"\xff" * 12), "has the size -1"),
        (tar([entry("v", type=b"V")]), "unknown type b'V'"),
        (entry("L", type=b"L", size=1 << 40)[0].tobuf(tarfile.GNU_FORMAT), "at most 1048576 are accepted"),
    ],
)
def test_a_broken_archive_is_told_as_such(content: bytes, complaint: str) -> None:
    with pytest.raises(Error, match=complaint):
        read(content)


@pytest.mark.parametrize("record", [b"9999 a=b\n", b"x a=b\n", b"6 a=b", b"5 ab\n", b"-3 a=b\n", b"0 \n"])
def test_a_broken_pax_record_is_told_as_such(record: bytes) -> None:
    header = tarfile.TarInfo("PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    content = header.tobuf() + record.ljust(512, b"\0") + file("f")[0].tobuf()

    with pytest.raises(Error, match=r"PAX record|decimal number"):
        read(content)
