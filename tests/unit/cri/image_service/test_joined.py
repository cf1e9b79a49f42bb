"""Work wanted by several at once is done once, and ends with the last who wants it."""

import asyncio

import pytest

from cri.image_service.joined import Joined


class Work:
    def __init__(self) -> None:
        self.started = 0
        self.ended = 0
        self.go = asyncio.Event()

    async def run(self) -> str:
        self.started += 1
        try:
            await self.go.wait()
            return "done"
        finally:
            self.ended += 1


def test_callers_at_once_share_one_run_and_its_result() -> None:
    async def story() -> None:
        joined: Joined[str, str] = Joined()
        work = Work()
        callers = [asyncio.create_task(joined.run("key", work.run)) for _ in range(3)]
        await asyncio.sleep(0)
        work.go.set()

        assert await asyncio.gather(*callers) == ["done"] * 3
        assert work.started == 1

    asyncio.run(story())


def test_a_cancelled_caller_leaves_the_work_to_the_others() -> None:
    async def story() -> None:
        joined: Joined[str, str] = Joined()
        work = Work()
        one, other = (asyncio.create_task(joined.run("key", work.run)) for _ in range(2))
        await asyncio.sleep(0.01)
        one.cancel()
        await asyncio.wait([one])
        work.go.set()

        assert one.cancelled()
        assert await other == "done"

    asyncio.run(story())


def test_the_work_ends_cleaned_up_when_the_last_caller_is_cancelled() -> None:
    async def story() -> None:
        joined: Joined[str, str] = Joined()
        work = Work()
        caller = asyncio.create_task(joined.run("key", work.run))
        await asyncio.sleep(0.01)
        caller.cancel()
        await asyncio.wait([caller])

        assert work.ended == 1

        work.go.set()
        assert await joined.run("key", work.run) == "done"
        assert work.started == 2

    asyncio.run(story())


def test_an_error_reaches_every_caller_and_the_next_call_starts_anew() -> None:
    async def fail() -> str:
        await asyncio.sleep(0)
        raise ValueError("broken")

    async def story() -> None:
        joined: Joined[str, str] = Joined()
        results = await asyncio.gather(*(joined.run("key", fail) for _ in range(2)), return_exceptions=True)
        assert [str(result) for result in results] == ["broken", "broken"]
        with pytest.raises(ValueError, match="broken"):
            await joined.run("key", fail)

    asyncio.run(story())
