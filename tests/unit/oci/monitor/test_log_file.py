"""The CRI log format, whatever the sizes of what is read, and the file under bad conditions."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci.monitor.log_file import LogFile, Stamper, timestamp

NOW = 1_475_712_429_669_794_202
RECORD = re.compile(rb"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z (stdout|stderr) ([FP]) (.*)$", re.DOTALL)


def records_of(written: bytes) -> list[tuple[bytes, bytes]]:
    """(tag, content) of each record."""
    found = []
    for line in written.split(b"\n")[:-1]:
        match = RECORD.match(line)
        assert match, line
        found.append((match[2], match[3]))
    assert written == b"" or written.endswith(b"\n")
    return found


def output_of(records: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(content + (b"\n" if tag == b"F" else b"") for tag, content in records)


def test_a_time_has_nine_digits_and_is_in_utc() -> None:
    assert timestamp(NOW) == b"2016-10-06T00:07:09.669794202Z"
    assert timestamp(1_000_000_000 * 1_700_000_000 + 5) == b"2023-11-14T22:13:20.000000005Z"


def test_two_lines_become_two_full_records() -> None:
    written = b"".join(Stamper(b"stdout").feed(b"one\n\n", NOW))

    assert written == (b"2016-10-06T00:07:09.669794202Z stdout F one\n" + b"2016-10-06T00:07:09.669794202Z stdout F \n")


def test_an_unended_line_is_kept_then_a_part_then_ended_at_the_end_of_the_stream() -> None:
    stamper = Stamper(b"stderr")

    assert stamper.feed(b"prompt> ", NOW) == []
    assert stamper.keeps
    part = records_of(b"".join(stamper.flush(NOW)))
    end = records_of(b"".join(stamper.finish(NOW)))

    assert part == [(b"P", b"prompt> ")]
    assert end == [(b"F", b"")]
    assert stamper.finish(NOW) == []


def test_a_line_that_comes_in_pieces_is_one_record_if_nothing_flushed_it() -> None:
    stamper = Stamper(b"stdout")

    assert stamper.feed(b"one ", NOW) == []
    assert records_of(b"".join(stamper.feed(b"line\nand", NOW))) == [(b"F", b"one line")]
    assert records_of(b"".join(stamper.finish(NOW))) == [(b"F", b"and")]


def test_a_line_of_just_the_limit_is_one_record_and_a_longer_one_is_split() -> None:
    stamper = Stamper(b"stdout", line_bytes=4)

    assert records_of(b"".join(stamper.feed(b"1234\n12345\n123456789\n", NOW))) == [
        (b"F", b"1234"),
        (b"P", b"1234"),
        (b"F", b"5"),
        (b"P", b"1234"),
        (b"P", b"5678"),
        (b"F", b"9"),
    ]


@given(
    st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([b"\n", b"\n\n", b"\r\n", b"abc" * 30]), st.none())),
    st.integers(min_value=1, max_value=50),
)
def test_no_byte_is_lost_or_moved_however_it_is_read(chunks: list[bytes | None], line_bytes: int) -> None:
    stamper = Stamper(b"stdout", line_bytes)
    written = b""
    for chunk in chunks:
        written += b"".join(stamper.flush(NOW) if chunk is None else stamper.feed(chunk, NOW))
    written += b"".join(stamper.finish(NOW))

    records = records_of(written)
    put_in = b"".join(chunk for chunk in chunks if chunk is not None)
    ended = put_in if not put_in or put_in.endswith(b"\n") else put_in + b"\n"
    assert output_of(records) == ended
    assert all(len(content) <= line_bytes for _, content in records)


def test_records_are_appended_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    path.write_bytes(b"before\n")
    log = LogFile(str(path), 0, pytest.fail)

    log.write([b"a ", memoryview(b"bxx")[:1], b"\n"])

    assert path.read_bytes() == b"before\na b\n"
    assert (log.written, log.dropped) == (4, 0)


def test_a_reopened_log_goes_on_in_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    log = LogFile(str(path), 0, pytest.fail)
    log.write([b"one\n"])
    path.rename(tmp_path / "0.log.1")

    log.reopen()
    log.write([b"two\n"])

    assert (tmp_path / "0.log.1").read_bytes() == b"one\n"
    assert path.read_bytes() == b"two\n"
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_log_that_cannot_be_reopened_stays_in_use_and_nothing_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "pod"
    folder.mkdir()
    log = LogFile(str(folder / "0.log"), 0, pytest.fail)
    folder.rename(tmp_path / "moved")

    with pytest.raises(FileNotFoundError):
        log.reopen()
    log.write([b"still\n"])

    assert (tmp_path / "moved" / "0.log").read_bytes() == b"still\n"
    assert not folder.exists()


def test_over_its_limit_a_log_drops_until_it_is_rotated(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    log = LogFile(str(path), 8, pytest.fail)

    log.write([b"12345\n"])
    log.write([b"1234567\n"])
    path.unlink()
    log.reopen()
    log.write([b"again\n"])

    assert path.read_bytes() == b"again\n"
    assert (log.written, log.dropped) == (12, 8)


def test_a_full_disk_costs_records_and_is_reported_once(tmp_path: Path) -> None:
    complaints: list[str] = []
    log = LogFile("/dev/full", 0, complaints.append)

    log.write([b"one\n"])
    log.write([b"two\n"])

    assert (log.written, log.dropped) == (0, 8)
    assert len(complaints) == 1
    assert "No space left" in complaints[0]


def test_a_short_write_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "0.log"
    complaints: list[str] = []
    log = LogFile(str(path), 0, complaints.append)
    log.write([b"whole\n"])
    writev = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, parts: writev(fd, [b"".join(parts)[:3]]))

    log.write([b"torn record\n"])
    monkeypatch.undo()
    log.write([b"after\n"])

    assert path.read_bytes() == b"whole\nafter\n"
    assert log.dropped == 12
    assert "short write" in complaints[0]


def test_an_empty_path_keeps_nothing_and_drops_nothing() -> None:
    log = LogFile("", 0, pytest.fail)

    log.write([b"x\n"])
    log.reopen()
    log.close()

    assert (log.written, log.dropped) == (0, 0)
