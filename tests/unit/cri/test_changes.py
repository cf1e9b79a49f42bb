"""A change runs once, to its end, whoever waits."""

import asyncio

import pytest

from cri.changes import Changes
from oci.errors import Unavailable


def test_a_second_caller_joins_the_change_that_runs() -> None:
    async def scenario() -> tuple[list[str], int]:
        changes, runs, go = Changes(), [], asyncio.Event()

        async def change() -> str:
            runs.append("run")
            await go.wait()
            return "made"

        first = asyncio.create_task(changes.run("pod a", change))
        second = asyncio.create_task(changes.run("pod a", change))
        await asyncio.sleep(0)
        go.set()
        return [await first, await second], len(runs)

    results, runs = asyncio.run(scenario())

    assert results == ["made", "made"]
    assert runs == 1


def test_a_caller_who_gives_up_does_not_stop_the_change() -> None:
    async def scenario() -> str:
        changes, go, done = Changes(), asyncio.Event(), []

        async def change() -> str:
            await go.wait()
            done.append("made")
            return "made"

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(changes.run("pod a", change), 0.01)
        retry = asyncio.create_task(changes.run("pod a", change))
        await asyncio.sleep(0)
        go.set()
        result = await retry
        assert done == ["made"]
        return result

    assert asyncio.run(scenario()) == "made"


def test_a_failed_change_tells_every_caller_and_can_be_tried_again() -> None:
    async def scenario() -> str:
        changes, failures = Changes(), [Unavailable("no network yet")]

        async def change() -> str:
            if failures:
                raise failures.pop()
            return "made"

        with pytest.raises(Unavailable, match="no network yet"):
            await changes.run("pod a", change)
        return await changes.run("pod a", change)

    assert asyncio.run(scenario()) == "made"


def test_finish_names_what_is_still_running() -> None:
    async def scenario() -> tuple[list[str], list[str]]:
        changes, go = Changes(), asyncio.Event()

        async def change() -> None:
            await go.wait()

        waiting = asyncio.create_task(changes.run("stuck", change))
        await asyncio.sleep(0)
        left = await changes.finish(0.01)
        go.set()
        await waiting
        return left, await changes.finish(1.0)

    assert asyncio.run(scenario()) == (["stuck"], [])
