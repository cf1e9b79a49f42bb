"""Every compression is undone a bounded piece at a time, told by its first bytes."""

import bz2
import gzip
import lzma
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import zstandard

from cri.image_service.decompress import ahead, decompressed
from oci.errors import Error

CONTENT = os.urandom(100_000) + bytes(5_000_000)
zstd = zstandard.ZstdCompressor().compress
COMPRESSORS: list[Callable[[bytes], bytes]] = [bytes, gzip.compress, zstd, bz2.compress, lzma.compress]


def chunks(content: bytes, size: int = 10_000) -> Iterator[bytes]:
    return (content[at : at + size] for at in range(0, len(content), size))


@pytest.mark.parametrize("compress", COMPRESSORS)
@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_what_was_compressed_comes_back(compress: Callable[[bytes], bytes], size: int) -> None:
    assert b"".join(decompressed(chunks(compress(CONTENT), size))) == CONTENT


@pytest.mark.parametrize("compress", [gzip.compress, zstd, bz2.compress, lzma.compress])
def test_several_streams_one_after_another_are_one(compress: Callable[[bytes], bytes]) -> None:
    assert b"".join(decompressed(chunks(compress(b"one") + compress(b"two"), 7))) == b"onetwo"


def test_skippable_zstd_frames_are_skipped() -> None:
    frame = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"index"

    assert b"".join(decompressed(chunks(frame + zstd(b"data") + frame))) == b"data"


@pytest.mark.parametrize("compress", COMPRESSORS[1:])
def test_no_piece_is_larger_than_a_mebibyte_however_much_it_expands(compress: Callable[[bytes], bytes]) -> None:
    bomb = compress(bytes(50_000_000))

    assert max(len(piece) for piece in decompressed(chunks(bomb, 1 << 20))) <= 1 << 20


@pytest.mark.parametrize("compress", COMPRESSORS[1:])
def test_broken_data_is_an_error(compress: Callable[[bytes], bytes]) -> None:
    content = bytearray(compress(b"%d " * 50 % tuple(range(50)) * 1000 + os.urandom(1000).hex().encode()))
    content[15:65] = b"\xff" * 50

    with pytest.raises(Error, match=r"broken|too early"):
        list(decompressed(chunks(bytes(content))))


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_data_that_ends_early_is_an_error(compress: Callable[[bytes], bytes]) -> None:
    with pytest.raises(Error, match="ends too early"):
        list(decompressed(chunks(compress(CONTENT)[:-20])))


def test_nothing_is_nothing() -> None:
    assert list(decompressed([])) == [b""] or b"".join(decompressed([])) == b""


def test_a_thread_ahead_hands_over_items_and_errors_in_order() -> None:
    def items() -> Iterator[int]:
        yield from range(20)
        raise Error("at the end")

    seen = []
    with pytest.raises(Error, match="at the end"):
        for item in ahead(items(), 3):
            seen.append(item)

    assert seen == list(range(20))


def test_a_thread_ahead_ends_when_nobody_wants_more() -> None:
    before = threading.active_count()
    iterator = ahead(iter(range(10_000_000)), 2)
    next(iterator)
    del iterator

    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
