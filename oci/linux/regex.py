"""POSIX extended regular expressions, as the C library has them: without the blow-ups of backtracking.

Source: regcomp(3). Matching lets other threads run; an expression can be used by any number of them.
"""

import ctypes
import functools
import re

_REG_EXTENDED = 1
_REG_NOSUB = 8
_REGEX_BYTES = 512  # of a regex_t: 64 with glibc and musl on 64 bits; nothing of it is read here

# What other dialects mean by these, POSIX leaves open: \d would silently be the letter.
_FOREIGN = re.compile(r"(?<!\\)(?:\\\\)*(\\[ac-rt-vx-zAC-RT-VX-Z]|\(\?)")


class Expression:
    """One compiled expression. Raises ValueError for what is none."""

    def __init__(self, text: str) -> None:
        foreign = _FOREIGN.search(text)
        if foreign:
            raise ValueError(f"{text!r}: {foreign[1]} is not of POSIX extended regular expressions")
        if "\0" in text:
            raise ValueError(f"{text!r}: holds a NUL")
        self.text = text
        self._libc = _libc()
        self._compiled = ctypes.create_string_buffer(_REGEX_BYTES)
        self._is_compiled = False
        code = self._libc.regcomp(self._compiled, _bytes(text), _REG_EXTENDED | _REG_NOSUB)
        if code != 0:
            raise ValueError(f"{text!r}: {self._message(code)}")
        self._is_compiled = True

    def matches(self, text: str) -> bool:
        """Whether some part of the text matches; what follows a NUL is not looked at."""
        return bool(self._libc.regexec(self._compiled, _bytes(text), 0, None, 0) == 0)

    def _message(self, code: int) -> str:
        said = ctypes.create_string_buffer(200)
        self._libc.regerror(code, self._compiled, said, len(said))
        return said.value.decode(errors="replace")

    def __del__(self) -> None:
        if getattr(self, "_is_compiled", False):
            self._libc.regfree(self._compiled)


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.regcomp.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int]
    libc.regexec.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int]
    libc.regerror.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
    libc.regerror.restype = ctypes.c_size_t
    libc.regfree.argtypes = [ctypes.c_char_p]
    libc.regfree.restype = None
    return libc
