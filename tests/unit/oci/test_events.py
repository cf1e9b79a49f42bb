import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from oci.errors import ResourceExhausted
from oci.events import Bus


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 10))


async def take(values: AsyncIterator[int], count: int) -> list[int]:
    return [await anext(values) for _ in range(count)]


async def take_all(values: AsyncIterator[int]) -> list[int]:
    return [value async for value in values]


def test_every_listener_gets_every_value_in_order() -> None:
    async def story() -> None:
        bus = Bus[int]()
        with bus.subscribed() as first, bus.subscribed() as second:
            for number in range(100):
                bus.publish(number)

            assert await take(first, 100) == await take(second, 100) == list(range(100))

    run(story())


def test_a_listener_gets_what_was_published_before_it_first_read() -> None:
    async def story() -> None:
        bus = Bus[int]()
        bus.publish(0)
        with bus.subscribed() as values:
            bus.publish(1)

            assert await take(values, 1) == [1]

    run(story())


def test_a_listener_that_does_not_read_is_told_that_it_was_cut_off_and_others_go_on() -> None:
    async def story() -> None:
        bus = Bus[int](queue_length=10)
        with bus.subscribed() as slow, bus.subscribed() as quick:
            for number in range(11):
                bus.publish(number)
                assert await take(quick, 1) == [number]

            with pytest.raises(ResourceExhausted, match="10 events behind"):
                await take_all(slow)
            bus.publish(11)
            assert await take(quick, 1) == [11]

    run(story())


def test_a_closed_bus_ends_its_listeners_after_what_they_have_not_read() -> None:
    async def story() -> None:
        bus = Bus[int]()
        with bus.subscribed() as values:
            bus.publish(1)
            bus.close()

            assert await take_all(values) == [1]

    run(story())


def test_a_listener_that_is_full_when_the_bus_closes_ends_too() -> None:
    async def story() -> None:
        bus = Bus[int](queue_length=2)
        with bus.subscribed() as values:
            bus.publish(1)
            bus.publish(2)
            bus.close()

            assert await take_all(values) == [2]

    run(story())


def test_who_stops_listening_is_forgotten() -> None:
    async def story() -> None:
        bus = Bus[int]()
        with bus.subscribed():
            assert bus.has_listeners
        assert not bus.has_listeners

        task = asyncio.create_task(take_all(bus.listen()))
        await asyncio.sleep(0)
        assert bus.has_listeners
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not bus.has_listeners

    run(story())


def test_a_derived_value_is_made_when_the_value_is_published_and_only_for_listeners() -> None:
    async def story() -> None:
        bus, state, made = Bus[int](), {"now": "before"}, []

        def derive(value: int) -> str:
            made.append(value)
            return f"{value} {state['now']}"

        derived = bus.derived(derive)
        bus.publish(0)
        with derived.subscribed() as values:
            bus.publish(1)
            state["now"] = "after"

            assert await anext(values) == "1 before"
        assert made == [1]

    run(story())


def test_a_derived_bus_closes_with_its_source() -> None:
    async def story() -> None:
        bus = Bus[int]()
        derived = bus.derived(lambda value: value)
        with derived.subscribed() as values:
            bus.close()

            assert await take_all(values) == []

    run(story())
