"""Connections to a monitor's socket."""

import asyncio
import socket
from pathlib import Path

import pytest

from oci import monitor_connection
from oci.errors import Unavailable
from oci.monitor_connection import Connection, connect, listen


def test_who_finds_the_listener_busy_gets_his_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_connection, "BACKLOG", 0)

    async def story() -> None:
        with listen(tmp_path, "sock") as listener:
            first = connect(tmp_path, "sock")
            with pytest.raises(BlockingIOError):
                connect(tmp_path, "sock")
            waiting = asyncio.create_task(Connection.open(tmp_path, "sock", "monitor"))
            await asyncio.sleep(0.05)
            assert not waiting.done()

            accepted, _ = listener.accept()
            connection = await asyncio.wait_for(waiting, 5)

            connection.close()
            for each in (first, accepted):
                each.close()

    asyncio.run(story())


def test_a_socket_that_nobody_listens_on_is_unavailable_at_once(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(tmp_path / "sock"))

    with pytest.raises(Unavailable, match=r"cannot connect to the monitor at .*: Connection refused"):
        asyncio.run(Connection.open(tmp_path, "sock", "monitor"))
