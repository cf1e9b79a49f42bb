"""Files that vendors and administrators put into directories: read at every use, parsed again only when changed."""

import errno
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

Parsed = TypeVar("Parsed")
_Version = tuple[int, int, int, int]


class ParsedFiles(Generic[Parsed]):
    """`parse` makes of a file and its content what it says, or the reason why it says nothing.

    Its methods read files, so they are not for the event loop; any number of threads may call them.
    """

    def __init__(self, parse: Callable[[Path, bytes], Parsed | str], suffixes: Iterable[str], most_bytes: int) -> None:
        self._parse = parse
        self._suffixes = frozenset(suffixes)
        self._most_bytes = most_bytes
        self._known: dict[Path, tuple[_Version, Parsed | str]] = {}

    def listed(self, directory: Path, unread: dict[Path, str]) -> list[Path]:
        """Its files, by name; `unread` gets the directory with the reason where it cannot be read."""
        try:
            return sorted(path for path in directory.iterdir() if path.suffix in self._suffixes)
        except FileNotFoundError:
            return []
        except OSError as error:
            unread[directory] = error.strerror or str(error)
            return []

    def read(self, paths: Iterable[Path]) -> dict[Path, Parsed | str]:
        """What each says, or why it says nothing; without those that are gone meanwhile."""
        found = {path: each for path in paths if (each := self._read(path)) is not None}
        self._known = found
        return {path: parsed for path, (_, parsed) in found.items()}

    def _read(self, path: Path) -> tuple[_Version, Parsed | str] | None:
        try:
            seen = path.stat()
            version = (seen.st_ino, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_size)
            known = self._known.get(path)
            if known is not None and known[0] == version:
                return known
            if not stat.S_ISREG(seen.st_mode):
                return version, "not a regular file"
            if seen.st_size > self._most_bytes:
                return version, f"{seen.st_size} bytes: larger than {self._most_bytes}"
            return version, self._parse(path, path.read_bytes())
        except OSError as error:
            if error.errno == errno.ENOENT and not path.is_symlink():
                return None
            return (0, 0, 0, 0), error.strerror or str(error)
