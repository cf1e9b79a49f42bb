"""Messages over a socket pair."""

import os
import socket
from pathlib import Path

import pytest

from oci.monitor import wire


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def test_a_message_arrives_whole_with_its_fds(tmp_path: Path) -> None:
    one, other = pair()
    with one, other, (tmp_path / "file").open("w") as file:
        wire.send(one, {"id": 1, "verb": "exec", "text": "ü", "fds": ["stdout"]}, (file.fileno(),))

        message, fds = wire.receive(other)

        assert message == {"id": 1, "verb": "exec", "text": "ü", "fds": ["stdout"]}
        named = wire.named_fds(message, fds)
        assert os.path.sameopenfile(named["stdout"], file.fileno())
        assert not os.get_inheritable(named["stdout"])
        wire.close_all(fds)


def test_the_end_of_a_connection_is_no_message() -> None:
    one, other = pair()
    with other:
        one.close()

        assert wire.receive(other) == (None, [])


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff", b'"text"'])
def test_what_is_no_object_is_refused_and_its_fds_are_closed(data: bytes) -> None:
    one, other = pair()
    with one, other:
        before = len(list(Path("/proc/self/fd").iterdir()))
        socket.send_fds(one, [data], [one.fileno()])

        with pytest.raises(wire.ProtocolError, match="message of"):
            wire.receive(other)

        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_fds_without_names_are_closed() -> None:
    read, write = os.pipe()

    with pytest.raises(wire.ProtocolError, match="0 names for 2 fds"):
        wire.named_fds({}, [read, write])

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read)


def test_of_a_long_error_the_end_is_kept() -> None:
    assert wire.last_bytes(b"x" * 10_000 + b" the end\n").endswith("x the end")
    assert len(wire.last_bytes(b"x" * 10_000)) == wire.TEXT_BYTES
