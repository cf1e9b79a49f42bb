"""Tokens: good once, for a minute, and not without limit."""

import pytest

from cri.streaming import tokens
from cri.streaming.tokens import Tokens
from oci.errors import ResourceExhausted


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_token_is_good_once() -> None:
    issued = Tokens[str]()
    token = issued.issue("exec")

    assert issued.take(token) == "exec"
    assert issued.take(token) is None


def test_nobody_guesses_a_token() -> None:
    issued = Tokens[int]()

    made = {issued.issue(number) for number in range(500)}

    assert len(made) == 500
    assert min(len(each) for each in made) >= 32  # 192 bits
    assert issued.take("") is None


def test_a_token_expires_after_a_minute() -> None:
    clock = Clock()
    issued = Tokens[str](clock)
    early, late = issued.issue("early"), None
    clock.now += tokens.LIFE_S / 2
    late = issued.issue("late")

    clock.now += tokens.LIFE_S / 2

    assert issued.take(early) is None
    assert issued.take(late) == "late"


def test_unused_tokens_are_limited_until_they_expire() -> None:
    clock = Clock()
    issued = Tokens[int](clock)
    for number in range(tokens.LIMIT):
        issued.issue(number)

    with pytest.raises(ResourceExhausted, match="not used"):
        issued.issue(-1)

    clock.now += tokens.LIFE_S
    issued.issue(-1)
    assert len(issued) == 1
