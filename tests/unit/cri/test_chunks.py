from cri.api.runtime.v1 import api_pb2 as api
from cri.chunks import CHUNK_BYTES, chunks


def container(size: int) -> api.Container:
    return api.Container(id="c", annotations={"large": "x" * size})


def test_the_items_come_in_their_order_and_none_is_lost() -> None:
    items = [api.Container(id=str(number)) for number in range(25)]

    found = list(chunks(items, limit_items=10))

    assert [len(chunk) for chunk in found] == [10, 10, 5]
    assert [item for chunk in found for item in chunk] == items


def test_no_message_is_larger_than_the_limit() -> None:
    items = [container(size) for size in (1, 900_000, 2_000_000, 100, 1_500_000, 3_000_000, 7)]

    messages = [api.StreamContainersResponse(containers=chunk) for chunk in chunks(items)]

    assert all(message.ByteSize() <= CHUNK_BYTES < 4 << 20 for message in messages)
    assert [item for message in messages for item in message.containers] == items


def test_an_item_that_is_too_large_goes_alone() -> None:
    items = [container(1), container(5 << 20), container(1)]

    assert [len(chunk) for chunk in chunks(items)] == [1, 1, 1]


def test_there_is_nothing_for_no_items() -> None:
    assert list(chunks([])) == []
