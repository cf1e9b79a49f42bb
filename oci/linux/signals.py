"""Signals by the names that images and the CRI give them."""

import signal

from oci.errors import InvalidArgument


def number(name: str) -> int:
    """The number of a signal as images and the CRI name it: "SIGTERM", "TERM", "15", "SIGRTMIN+3".

    Raises InvalidArgument for anything else.
    """
    word = name.strip().upper()
    if word.isdecimal() and 0 < int(word) < signal.NSIG:
        return int(word)
    base, sign, offset = word.partition("+") if "+" in word else word.partition("-")
    base = base if base.startswith("SIG") else f"SIG{base}"
    try:
        return int(signal.Signals[base]) + (int(sign + offset) if sign else 0)
    except (KeyError, ValueError):
        raise InvalidArgument(f"stop signal {name!r} is not a signal of this host") from None
