"""Makes the layer of an artifact's file: a tree of that file alone, and the list that it is verified by.

Runs in worker processes.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from cri.image_service.layer_files import FileList, crc32
from cri.image_service.unpack import Unpacked

_BLOCK_BYTES = 4096


def write_file(chunks: Iterable[bytes], path: str, directory: Path) -> Unpacked:
    """Makes `directory`/diff with one file at `path`, a clean relative one. The caller removes `directory` on errors.

    Anyone may read the file and nobody run it, whoever has pushed it with which mode.
    """
    os.umask(0)
    top = directory / "diff"
    top.mkdir(mode=0o755)
    with FileList(directory) as files:
        parents = list(Path(path).parents)[-2::-1]
        for parent in parents:
            (top / parent).mkdir(mode=0o755)
            files.directory(os.fsencode(parent))
        checksum = size = 0
        with (top / path).open("xb", buffering=0) as file:
            os.fchmod(file.fileno(), 0o644)
            for chunk in chunks:
                _write(file.fileno(), memoryview(chunk))
                checksum, size = crc32(chunk, checksum), size + len(chunk)
        files.file(os.fsencode(path), size, checksum)
    blocks = -(-size // _BLOCK_BYTES) + len(parents) + 1
    return Unpacked(blocks * _BLOCK_BYTES, len(parents) + 2, ())


def _write(fd: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(fd, piece) :]
