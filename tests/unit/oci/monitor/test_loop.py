"""The monitor's event loop, with real fds and real children."""

import os
from collections.abc import Iterator

import pytest

from oci.monitor.kernel import process_stat
from oci.monitor.loop import READABLE, Loop, catch_children
from oci.monitor.processes import TreeKill, exit_code, spawn


@pytest.fixture
def loop() -> Iterator[Loop]:
    catch_children()
    made = Loop()
    yield made
    made.close()


def turn_until(loop: Loop, done: list[object]) -> None:
    late = loop.after(10.0, lambda: pytest.fail("nothing happened for ten seconds"))
    while not done:
        loop.turn()
    late.cancel()


def test_timers_run_in_the_order_of_their_times_and_cancelled_ones_do_not(loop: Loop) -> None:
    seen: list[object] = []
    loop.after(0.02, lambda: seen.append("second"))
    loop.after(0.01, lambda: seen.append("first"))
    loop.after(0.005, lambda: seen.append("never")).cancel()
    loop.after(0.03, loop.stop)

    loop.run()

    assert seen == ["first", "second"]


def test_a_handler_may_forget_another_fd_that_is_ready_in_the_same_turn(loop: Loop) -> None:
    seen: list[object] = []
    ends = [os.pipe() for _ in range(2)]
    for read, write in ends:
        os.write(write, b"x")

        def handler(_events: int) -> None:
            seen.append("one")
            for read, _ in ends:
                loop.forget(read)

        loop.watch(read, READABLE, handler)

    loop.turn()
    loop.after(0.0, lambda: None)
    loop.turn()

    assert seen == ["one"]
    for pair in ends:
        for fd in pair:
            os.close(fd)


def test_each_child_is_told_with_its_status(loop: Loop) -> None:
    seen: list[tuple[int, int]] = []
    done: list[object] = []

    def ended(status: int) -> None:
        seen.append(exit_code(status))
        done.extend(seen[1:])

    for code in (0, 3):
        loop.on_exit(spawn(["/bin/sh", "-c", f"exit {code}"], {}, 0, 1, 2), ended)

    turn_until(loop, done)

    assert sorted(seen) == [(0, 0), (3, 0)]


def test_an_unknown_child_is_seen_while_it_is_still_a_zombie(loop: Loop) -> None:
    seen: list[object] = []

    def stray(pid: int, status: int) -> None:
        stat = process_stat(pid)
        seen.append((pid, exit_code(status), stat and stat.state))

    loop.on_stray = stray
    pid = spawn(["/bin/sh", "-c", "kill -9 $$"], {}, 0, 1, 2)

    turn_until(loop, seen)

    assert seen == [(pid, (137, 9), "Z")]


def test_a_tree_is_killed_with_what_was_backgrounded_in_it(loop: Loop) -> None:
    reads, writes = os.pipe()
    script = "(sleep 100 & echo $!; sleep 100) & sleep 0.05; trap '' TERM; sleep 100"
    pid = spawn(["/usr/bin/setsid", "/bin/sh", "-c", script], {"PATH": "/bin:/usr/bin"}, 0, writes, 2)
    grandchild = int(os.read(reads, 20))
    loop.on_exit(pid, lambda status: None)
    done: list[object] = []

    TreeKill(loop, pid, done.append)
    turn_until(loop, done)

    assert done == [0]
    stat = process_stat(grandchild)
    assert stat is None or stat.state == "Z"
    os.close(reads)
    os.close(writes)
