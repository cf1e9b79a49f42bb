"""Steps belong to the request in whose task they run, for as long as it goes on."""

import asyncio

import pytest

from oci import trace


class Told:
    """A span that notes what happens to it and to its steps."""

    def __init__(self, name: str = "request", lines: list[str] | None = None) -> None:
        self.name = name
        self.lines: list[str] = [] if lines is None else lines
        self.is_open = True

    def begin(self, name: str, facts: trace.Facts) -> "Told":
        self.lines.append(f"{self.name} > {name} {dict(facts)}")
        return Told(name, self.lines)

    def end(self, error: BaseException | None) -> None:
        self.is_open = False
        self.lines.append(f"{self.name} ends with {error!r}")


def test_a_step_without_a_request_is_just_done() -> None:
    with trace.step("mount"):
        done = True

    assert done


def test_steps_lie_within_steps() -> None:
    request = Told()

    with trace.within(request):
        with trace.step("start", {"id": 1}), trace.step("mount"):
            pass
        with trace.step("wait"):
            pass

    assert request.lines == [
        "request > start {'id': 1}",
        "start > mount {}",
        "mount ends with None",
        "start ends with None",
        "request > wait {}",
        "wait ends with None",
        "request ends with None",
    ]


def test_a_step_that_fails_says_so_to_all_around_it() -> None:
    request = Told()

    with pytest.raises(ValueError, match="no room"), trace.within(request), trace.step("mount"):
        raise ValueError("no room")

    assert request.lines[1:] == [
        "mount ends with ValueError('no room')",
        "request ends with ValueError('no room')",
    ]


def test_a_task_that_a_request_started_tells_its_steps_until_the_request_has_ended() -> None:
    request = Told()

    async def steps(ended: asyncio.Event) -> None:
        with trace.step("early"):
            pass
        await ended.wait()
        with trace.step("late"):
            pass

    async def run() -> None:
        ended = asyncio.Event()
        with trace.within(request):
            task = asyncio.create_task(steps(ended))
            await asyncio.sleep(0)
        ended.set()
        await task

    asyncio.run(run())

    assert request.lines == ["request > early {}", "early ends with None", "request ends with None"]


def test_two_requests_at_once_have_their_own_steps() -> None:
    first, second = Told("first"), Told("second")

    async def ask(request: Told) -> None:
        with trace.within(request):
            await asyncio.sleep(0)
            with trace.step("mount"):
                await asyncio.sleep(0)

    async def run() -> None:
        await asyncio.gather(ask(first), ask(second))

    asyncio.run(run())

    assert [request.lines[0] for request in (first, second)] == ["first > mount {}", "second > mount {}"]
