"""What a service manager is told, over a real socket."""

import asyncio
import os
import socket
from pathlib import Path

import pytest

from cri import systemd


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(tmp_path / "notify"))
    sock.settimeout(5)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    return sock


def test_the_manager_hears_that_the_daemon_is_ready(manager: socket.socket) -> None:
    with manager:
        assert systemd.ready("3 pods")

        assert manager.recv(1000).decode() == f"READY=1\nSTATUS=3 pods\nMAINPID={os.getpid()}"


def test_an_abstract_address_is_understood() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0crito-test-{os.getpid()}")

        assert systemd.notify("STOPPING=1", {"NOTIFY_SOCKET": f"@crito-test-{os.getpid()}"})
        assert sock.recv(1000) == b"STOPPING=1"


def test_without_a_manager_nothing_is_said(tmp_path: Path) -> None:
    assert not systemd.notify("READY=1", {})
    assert not systemd.notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "gone")})


def test_signs_of_life_are_due_twice_in_the_time_given() -> None:
    assert systemd.watchdog_interval_s({"WATCHDOG_USEC": "30000000"}) == 15
    assert systemd.watchdog_interval_s({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}) == 15
    assert systemd.watchdog_interval_s({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}) is None
    assert systemd.watchdog_interval_s({}) is None


def test_a_daemon_that_is_not_well_gives_no_sign_of_life(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [True, False, True]

    async def is_well() -> bool:
        if not answers:
            raise asyncio.CancelledError
        return answers.pop(0)

    monkeypatch.setattr(systemd, "watchdog_interval_s", lambda: 0.01)
    with manager:
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(systemd.keep_alive(is_well))

        manager.setblocking(False)
        assert [manager.recv(100), manager.recv(100)] == [b"WATCHDOG=1"] * 2
        with pytest.raises(BlockingIOError):
            manager.recv(100)
