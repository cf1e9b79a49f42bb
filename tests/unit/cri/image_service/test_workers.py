"""Workers end when told to, at whatever moment that is."""

import asyncio
import os
import signal
import time

import pytest

from cri.image_service.workers import Workers
from oci.errors import Unavailable

NOTHING = {"verb": "remove", "paths": []}
STEPS_OF_A_START = 10  # of the event loop, until the process and its pipes are there, and some more


@pytest.mark.parametrize("steps", range(STEPS_OF_A_START))
def test_a_request_given_up_amid_a_workers_start_leaves_no_worker_and_the_close_returns(steps: int) -> None:
    async def story() -> None:
        workers = Workers(1, 5)
        request = asyncio.create_task(workers.call(NOTHING))
        for _ in range(steps):
            await asyncio.sleep(0)
        request.cancel()
        async with asyncio.timeout(10):
            await asyncio.wait([request])
            await workers.close()

        assert request.cancelled()
        assert workers.pids == []
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(story())


@pytest.mark.parametrize("steps", range(STEPS_OF_A_START))
def test_a_close_amid_a_workers_start_ends_the_request_and_the_worker(steps: int) -> None:
    async def story() -> None:
        workers = Workers(1, 5)
        request = asyncio.create_task(workers.call(NOTHING))
        for _ in range(steps):
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await workers.close()
            with pytest.raises(Unavailable):
                await request

        assert workers.pids == []

    asyncio.run(story())


def test_an_idle_worker_that_was_killed_is_not_asked() -> None:
    async def story() -> None:
        workers = Workers(1, 5)
        await workers.call(NOTHING)
        (killed,) = workers.pids
        os.kill(killed, signal.SIGKILL)
        time.sleep(0.2)  # noqa: ASYNC251 (it is dead by then, and the event loop has not heard of it)

        assert await workers.call(NOTHING) == {}
        await workers.close()

    asyncio.run(story())


def test_the_signal_that_killed_a_worker_is_told() -> None:
    async def story(workers: Workers) -> str:
        request = asyncio.create_task(workers.call({"verb": "inspect", "path": "/dev/zero", "scratch": "/dev/null"}))
        while not workers.pids:  # noqa: ASYNC110 (no event tells it)
            await asyncio.sleep(0)
        os.kill(workers.pids[0], signal.SIGKILL)
        with pytest.raises(Unavailable) as error:
            await request
        await workers.close()
        return str(error.value)

    for _ in range(20):
        assert asyncio.run(story(Workers(1, 5))) == "image worker was killed by signal 9 while reading /dev/zero"
