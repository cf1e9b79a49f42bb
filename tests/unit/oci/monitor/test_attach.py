"""Attached clients that read, that do not, and that go away."""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from oci.monitor import attach
from oci.monitor.attach import BUFFER_BYTES, Attachments, Stdin
from oci.monitor.log_file import LogFile, Stamper
from oci.monitor.loop import Loop, catch_children
from oci.monitor.stdio import Output


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


def test_a_client_that_does_not_read_is_let_go(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "HOLD_S", 0.05)
    ended: list[tuple[int, str]] = []
    attachments = Attachments(loop, lambda number, reason: ended.append((number, reason)))
    read, write = os.pipe()
    attachments.add({"stdout": write}, None)
    went_on: list[bool] = []

    fill(attachments)
    attachments.when_taken("stdout", lambda: went_on.append(True))
    assert not ended
    while not ended:
        loop.turn()

    assert ended == [(1, "the client does not read")]
    assert len(attachments) == 0
    assert went_on == [True]
    os.close(read)


def fill(attachments: Attachments) -> int:
    """Write until somebody is too far behind; how much that was."""
    written = 0
    while not attachments.is_full("stdout"):
        assert written <= BUFFER_BYTES + 2 * 65536, "more is kept than may be"
        attachments.broadcast("stdout", b"x" * 4096)
        written += 4096
    return written


def test_a_client_that_reads_again_gets_the_rest_and_is_kept(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "HOLD_S", 0.2)
    attachments = Attachments(loop, lambda number, reason: pytest.fail(reason))
    read, write = os.pipe()
    attachments.add({"stdout": write}, None)
    went_on: list[int] = []

    left = fill(attachments)
    attachments.when_taken("stdout", lambda: went_on.append(left))
    while left:
        left -= len(os.read(read, 65536))
        turn(loop, 1)
    time.sleep(0.3)
    turn(loop)

    assert len(went_on) == 1
    assert not attachments.is_full("stdout")
    assert not attachments.is_full("stderr")
    os.close(read)


def test_output_waits_for_a_client_that_is_behind_and_loses_nothing(loop: Loop, tmp_path: Path) -> None:
    attachments = Attachments(loop, lambda number, reason: pytest.fail(reason))
    read, write = os.pipe2(os.O_NONBLOCK)
    attachments.add({"stdout": write}, None)
    source, container = os.pipe2(os.O_NONBLOCK)
    log = LogFile(str(tmp_path / "log"), 0, pytest.fail)
    output = Output(loop, source, "stdout", stamper=Stamper(b"stdout"), log=log, attachments=attachments)
    output.begin()
    sent = os.urandom(2_000_000)
    done, got = 0, b""

    while len(got) < len(sent):
        with suppress(BlockingIOError):
            done += os.write(container, sent[done:])
        turn(loop, 2)
        with suppress(BlockingIOError):
            got += os.read(read, 4096)

    assert got == sent
    output.close()
    log.close()
    for fd in (read, container):
        os.close(fd)


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
