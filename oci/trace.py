"""The timed steps of a request, named where they happen. Who keeps them, and of which requests, is for others.

A step belongs to the request in whose task it runs, or in a task that this one has started, for as long as the request
goes on: what happens later (a container's end, hours after its start) is no part of it. Where nobody traces the request
a step costs a look.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

Facts = Mapping[str, str | int | float | bool]


class Span(Protocol):
    """What takes time: a request, or a step of it."""

    @property
    def is_open(self) -> bool:
        """False once it has ended."""

    def begin(self, name: str, facts: Facts) -> "Span":
        """A step of it that begins now."""

    def end(self, error: BaseException | None) -> None:
        """It has ended just now, by this error where it failed."""


_current: ContextVar[Span | None] = ContextVar("span", default=None)


@contextmanager
def within(span: Span) -> Iterator[None]:
    """Steps in this block, and in the tasks that it starts, are steps of `span`, which ends with the block."""
    token = _current.set(span)
    try:
        yield
    except BaseException as error:
        span.end(error)
        raise
    else:
        span.end(None)
    finally:
        _current.reset(token)


@contextmanager
def step(name: str, facts: Facts | None = None) -> Iterator[None]:
    """This block is a step of what is under way. `name` is one of few; what differs each time is in `facts`."""
    span = _current.get()
    if span is None or not span.is_open:
        yield
        return
    with within(span.begin(name, facts or {})):
        yield
