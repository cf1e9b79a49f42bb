"""Turns the bytes of a compressed layer into plain ones, a bounded piece at a time, whatever the compression is.

Runs in worker processes. The first bytes tell the format: media types lie. Nothing expands without bound in memory.
"""

import bz2
import lzma
import queue
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, Protocol, TypeVar

from oci.errors import Error

_PIECE_BYTES = 1 << 20
T = TypeVar("T")


def decompressed(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Plain bytes of a gzip, zstd, bzip2, xz or plain stream. Raises Error where the stream is broken."""
    rest = iter(chunks)
    first = b""
    while len(first) < 6 and (chunk := next(rest, b"")):
        first += chunk
    return _decompressor(first)(chain((first,), rest))


def ahead(items: Iterable[T], depth: int = 8) -> Iterator[T]:
    """The same items, made by a thread of their own that is at most `depth` of them ahead."""
    made: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(depth)
    unwanted = threading.Event()

    def make() -> None:
        try:
            for item in items:
                made.put((True, item))
                if unwanted.is_set():
                    return
            made.put((False, None))
        except BaseException as error:
            made.put((False, error))

    threading.Thread(target=make, daemon=True).start()
    try:
        while True:
            is_item, item = made.get()
            if is_item:
                yield item  # type: ignore[misc]  # an item, as the flag says
            elif isinstance(item, BaseException):
                raise item
            else:
                return
    finally:
        unwanted.set()
        while not made.empty():
            made.get_nowait()


def _decompressor(first: bytes) -> Callable[[Iterator[bytes]], Iterator[bytes]]:
    if first.startswith(b"\x1f\x8b"):
        return _gzip
    if first.startswith(b"\x28\xb5\x2f\xfd") or first[1:4] == b"\x2a\x4d\x18":  # the latter: a skippable frame
        return _zstd
    if first.startswith(b"BZh"):
        return lambda chunks: _bounded(chunks, bz2.BZ2Decompressor, "bzip2")
    if first.startswith(b"\xfd7zXZ\0"):
        return lambda chunks: _bounded(chunks, lzma.LZMADecompressor, "xz")
    return lambda chunks: chunks


def gzip_module() -> Any:
    """isal where it is installed: it takes less than half of zlib's time."""
    try:
        from isal import isal_zlib  # noqa: PLC0415 (a worker that meets no gzip saves its memory)
    except ImportError:  # there is none for every architecture
        return zlib
    return isal_zlib


def _gzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    module = gzip_module()
    member = module.decompressobj(wbits=31)
    started = False
    for chunk in chunks:
        left = chunk
        while left:
            try:
                piece = member.decompress(left, _PIECE_BYTES)
            except module.error as error:
                raise Error(f"broken gzip data: {error}") from error
            started = True
            if piece:
                yield piece
            left = member.unconsumed_tail
            if member.eof:
                left = member.unused_data.lstrip(b"\0")  # padding, as tape blocks leave it
                member, started = module.decompressobj(wbits=31), False
    if started:
        raise Error("gzip data ends too early")


def _zstd(chunks: Iterator[bytes]) -> Iterator[bytes]:
    import zstandard  # noqa: PLC0415 (a worker that meets no zstd saves its memory)

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    try:
        with decompressor.stream_reader(_Readable(chunks), read_across_frames=True) as reader:  # type: ignore[arg-type]
            while piece := reader.read(_PIECE_BYTES):
                yield piece
    except zstandard.ZstdError as error:
        raise Error(f"broken zstd data: {error}") from error


class _Bounded(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = ...) -> bytes: ...


def _bounded(chunks: Iterator[bytes], make: Callable[[], _Bounded], name: str) -> Iterator[bytes]:
    stream, started = make(), False
    for chunk in chunks:
        left = chunk
        started = True
        while left or not (stream.needs_input or stream.eof):
            try:
                piece = stream.decompress(left, _PIECE_BYTES)
            except (OSError, lzma.LZMAError, EOFError) as error:
                raise Error(f"broken {name} data: {error}") from error
            left = b""
            if piece:
                yield piece
            if stream.eof:
                left = stream.unused_data
                stream, started = make(), bool(left)
                if not left:
                    break
    if started:
        raise Error(f"{name} data ends too early")


class _Readable:
    """Chunks as the file that zstandard wants to read from."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = b""

    def read(self, size: int) -> bytes:
        if not self._left:
            self._left = next(self._chunks, b"")
        taken, self._left = self._left[:size], self._left[size:]
        return taken
