"""Messages between the daemon, the fork server and the monitors: JSON and fds over SOCK_SEQPACKET.

A server greets each client with `{"hello": {"protocol": 1, ...}}`. A request is `{"id": N, "verb": …, "fds": [names]}`,
its answer `{"id": N, …}` or `{"id": N, "error": text}`; whatever has no id is an event. Fields that one side does not
know are passed over, so an old monitor works with a new daemon; PROTOCOL rises when that is not enough.

Bare sockets (`_socket`) and a ready-made JSON coder: what `socket.socket` and `json.loads` touch on each call (enums,
regular expressions) are pages that each forked process would have to copy.
"""

import _socket as socket
import array
import json
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Message = dict[str, Any]
else:
    Message = dict

PROTOCOL = 1
MESSAGE_BYTES = 64 * 1024
FDS = 8
TEXT_BYTES = 8 * 1024  # of an error; the end says what went wrong

_to_text = json.JSONEncoder(separators=(",", ":")).encode
_from_text = json.JSONDecoder().raw_decode


class ProtocolError(Exception):
    """The other side sent something that is no message."""


def encode(message: "Message") -> bytes:
    return _to_text(message).encode()


def decode(data: bytes) -> "Message":
    """Raises ValueError."""
    message, _ = _from_text(data.decode())
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message


def send(sock: socket.socket, message: "Message", fds: tuple[int, ...] = ()) -> None:
    """Raises BlockingIOError when the other side does not read, and OSError when it is gone."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([encode(message)], ancillary, socket.MSG_NOSIGNAL)


def accept(listener: socket.socket) -> socket.socket | None:
    """The next connection, non-blocking; None if there is none after all."""
    try:
        fd, _ = listener._accept()  # type: ignore[attr-defined]
    except (BlockingIOError, ConnectionAbortedError):
        return None
    os.set_blocking(fd, False)
    return socket.socket(socket.AF_UNIX, _type_of(listener), 0, fd)


def _type_of(listener: socket.socket) -> int:
    return listener.type | socket.SOCK_NONBLOCK


def receive(sock: socket.socket) -> "tuple[Message | None, list[int]]":
    """The next message with its fds (close-on-exec, now the caller's); None at the end of the connection."""
    data, ancillary, flags, _ = sock.recvmsg(MESSAGE_BYTES, socket.CMSG_SPACE(4 * FDS), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % 4])
    if not data:
        close_all(fds.tolist())
        return None, []
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError("cut off")
        return decode(data), fds.tolist()
    except ValueError as error:
        close_all(fds.tolist())
        raise ProtocolError(f"message of {len(data)} bytes: {error}") from error


def named_fds(message: "Message", fds: list[int]) -> dict[str, int]:
    """The fds under the names that the message gives them."""
    names = message.get("fds", [])
    if len(names) != len(fds):
        close_all(fds)
        raise ProtocolError(f"{len(names)} names for {len(fds)} fds")
    return dict(zip(names, fds, strict=True))


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def last_bytes(text: bytes) -> str:
    return text[-TEXT_BYTES:].decode("utf-8", "replace").strip()
