"""Signals are known by the names that images and the CRI use."""

import signal

import pytest

from oci.errors import InvalidArgument
from oci.linux import signals


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("SIGTERM", 15),
        ("term", 15),
        ("9", 9),
        (" SIGKILL ", 9),
        ("SIGRTMIN+3", int(signal.SIGRTMIN) + 3),
        ("RTMAX-1", int(signal.SIGRTMAX) - 1),
    ],
)
def test_a_signal_is_known_by_any_of_its_names(name: str, number: int) -> None:
    assert signals.number(name) == number


@pytest.mark.parametrize("name", ["", "SIGNONE", "0", "999", "SIGTERM+x"])
def test_anything_else_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidArgument, match="is not a signal of this host"):
        signals.number(name)
