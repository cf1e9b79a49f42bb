"""Attached clients that read, that do not, and that go away."""

import os
from collections.abc import Iterator
from contextlib import suppress

import pytest

from oci.monitor.attach import BUFFER_BYTES, Attachments, Stdin
from oci.monitor.loop import Loop, catch_children


@pytest.fixture
def loop() -> Iterator[Loop]:
    catch_children()
    made = Loop()
    yield made
    made.close()


def turn(loop: Loop, times: int = 20) -> None:
    for _ in range(times):
        loop.after(0.0, lambda: None)
        loop.turn()


def test_output_goes_to_every_client(loop: Loop) -> None:
    ended: list[tuple[int, str]] = []
    attachments = Attachments(loop, lambda number, reason: ended.append((number, reason)))
    pipes = [os.pipe() for _ in range(2)]
    for _, write in pipes:
        attachments.add({"stdout": os.dup(write)}, None)

    attachments.broadcast("stdout", b"hello")
    attachments.broadcast("stderr", b"nobody asked for it")
    turn(loop)

    assert [os.read(read, 100) for read, _ in pipes] == [b"hello", b"hello"]
    attachments.remove_all("bye")
    assert ended == [(1, "bye"), (2, "bye")]


def test_a_client_that_does_not_read_is_let_go(loop: Loop) -> None:
    ended: list[tuple[int, str]] = []
    attachments = Attachments(loop, lambda number, reason: ended.append((number, reason)))
    read, write = os.pipe()
    attachments.add({"stdout": write}, None)

    for _ in range((BUFFER_BYTES + 65536) // 4096 + 2):
        attachments.broadcast("stdout", b"x" * 4096)

    assert ended == [(1, "the client does not read")]
    assert len(attachments) == 0
    os.close(read)


def test_a_slow_client_gets_every_byte_in_order(loop: Loop) -> None:
    attachments = Attachments(loop, lambda number, reason: pytest.fail(reason))
    read, write = os.pipe()
    os.set_blocking(read, False)
    attachments.add({"stdout": write}, None)
    sent = os.urandom(200_000)

    attachments.broadcast("stdout", sent[:150_000])
    attachments.broadcast("stdout", sent[150_000:])
    got = b""
    while len(got) < len(sent):
        turn(loop, 1)
        got += os.read(read, 10_000)

    assert got == sent
    assert attachments.are_flushed


def test_a_client_that_goes_away_is_noticed_without_output(loop: Loop) -> None:
    ended: list[tuple[int, str]] = []
    attachments = Attachments(loop, lambda number, reason: ended.append((number, reason)))
    read, write = os.pipe()
    attachments.add({"stdout": write}, None)

    os.close(read)
    turn(loop)

    assert len(ended) == 1


@pytest.mark.parametrize("once", [True, False])
def test_the_end_of_a_clients_input_ends_stdin_only_if_it_is_once(loop: Loop, once: bool) -> None:
    container, ours = os.pipe2(os.O_NONBLOCK)
    stdin = Stdin(loop, ours, False, once)
    source, client = os.pipe()
    stdin.add(source)

    os.write(client, b"input")
    os.close(client)
    turn(loop)

    assert os.read(container, 100) == b"input"
    if once:
        assert os.read(container, 100) == b""
    else:
        with pytest.raises(BlockingIOError):
            os.read(container, 100)
    stdin.close()
    os.close(container)


def test_input_waits_for_a_container_that_does_not_read(loop: Loop) -> None:
    container, ours = os.pipe2(os.O_NONBLOCK)
    stdin = Stdin(loop, ours, False, True)
    source, client = os.pipe2(os.O_NONBLOCK)
    stdin.add(source)
    data = os.urandom(150_000)
    sent, got = 0, b""

    while len(got) < len(data):
        if sent < len(data):
            with suppress(BlockingIOError):
                sent += os.write(client, data[sent:])
            if sent == len(data):
                os.close(client)
        turn(loop, 3)
        with suppress(BlockingIOError):
            got += os.read(container, 5000)

    assert got == data
    turn(loop)
    assert os.read(container, 10) == b""
    os.close(container)


def test_the_null_device_as_input_is_its_end(loop: Loop) -> None:
    container, ours = os.pipe2(os.O_NONBLOCK)
    stdin = Stdin(loop, ours, False, True)

    stdin.add(os.open(os.devnull, os.O_RDONLY))

    assert os.read(container, 10) == b""
    os.close(container)
