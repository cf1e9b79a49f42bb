import os
import subprocess
import time

import pytest

from oci.linux import proc


def test_a_name_with_blanks_and_parentheses_does_not_confuse() -> None:
    line = "42 (a) b (c)) S 7 " + " ".join(str(number) for number in range(5, 53))

    found = proc.parse_stat(line)

    assert (found.pid, found.comm, found.state, found.parent, found.start_time) == (42, "a) b (c)", "S", 7, 22)


def test_a_process_is_believed_only_with_its_start_time() -> None:
    started = proc.start_time(os.getpid())
    assert started is not None

    assert proc.is_alive(os.getpid(), started)
    assert not proc.is_alive(os.getpid(), started + 1)
    assert not proc.is_alive(0, started)
    assert proc.start_time(1 << 30) is None
    os.close(proc.pidfd(os.getpid(), started))
    with pytest.raises(ProcessLookupError):
        proc.pidfd(os.getpid(), started + 1)


def test_a_zombie_does_not_live() -> None:
    with subprocess.Popen(["true"]) as child:
        started = proc.start_time(child.pid)
        assert started is not None
        while proc.is_alive(child.pid, started):
            time.sleep(0.001)

        assert proc.stat(child.pid) is not None
        os.close(proc.pidfd(child.pid, started))


def test_children_and_their_children_are_found() -> None:
    script = "sleep 60 & echo $!; wait"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        sleeper = int(shell.stdout.readline())

        assert proc.children(shell.pid) == [sleeper]
        assert {shell.pid, sleeper} <= set(proc.descendants(os.getpid()))
        os.kill(sleeper, 9)

    assert proc.children(1 << 30) == []


def test_the_boot_has_an_id() -> None:
    assert len(proc.boot_id()) == 36
