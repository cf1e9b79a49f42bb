"""The command line's side of the daemon's socket: the CRI's stubs and `crito.v1.Node`, with errors in plain words."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from cri.api.runtime.v1 import api_pb2_grpc
from cri.node_messages import (
    SERVICE,
    CancelPull,
    DamagedLayer,
    ImageEvent,
    ImageSummary,
    Inspect,
    LoadImage,
    PinImage,
    PullImage,
    Pulls,
    PullStatus,
    SaveImages,
    VerifyImages,
    decoder,
    encode,
)
from oci.errors import DeadlineExceeded, Error, FailedPrecondition, NotFound, Unavailable

SHORT_TIMEOUT_S = 10.0
MESSAGE_LIMIT_BYTES = 64 << 20

_KINDS: dict[grpc.StatusCode, type[Error]] = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}


class NodeClient:
    """`runtime` and `images` are the CRI's stubs."""

    def __init__(self, socket: Path) -> None:
        # The authority of a socket's path is not a valid one for HTTP/2 servers that check it.
        options = [("grpc.default_authority", "localhost"), ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES)]
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=options)
        self.runtime: Any = api_pb2_grpc.RuntimeServiceStub(self._channel)
        self.images: Any = api_pb2_grpc.ImageServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def pull(self, request: PullImage) -> Iterator[ImageEvent]:
        return self._stream("PullImage", request)

    def load(self, request: LoadImage) -> Iterator[ImageEvent]:
        return self._stream("LoadImage", request)

    def save(self, request: SaveImages) -> Iterator[ImageEvent]:
        return self._stream("SaveImages", request)

    def pulls(self) -> list[PullStatus]:
        answer: list[PullStatus] = self._ask("Pulls", Pulls(), list[PullStatus])
        return answer

    def cancel_pull(self, reference: str) -> int:
        """How many pulls were ended."""
        return int(self._ask("CancelPull", CancelPull(reference), int))

    def pin(self, reference: str, pinned: bool) -> ImageSummary:
        answer: ImageSummary = self._ask("PinImage", PinImage(reference, pinned), ImageSummary)
        return answer

    def verify(self, repair: bool) -> Iterator[DamagedLayer]:
        yield from self._channel.unary_stream(f"/{SERVICE}/VerifyImages", encode, decoder(DamagedLayer))(
            VerifyImages(repair)
        )

    def _ask(self, method: str, request: Any, kind: Any) -> Any:
        call = self._channel.unary_unary(f"/{SERVICE}/{method}", encode, decoder(kind))
        return call(request, timeout=SHORT_TIMEOUT_S)

    def inspect(self) -> dict[str, Any]:
        call = self._channel.unary_unary(f"/{SERVICE}/Inspect", encode, decoder(dict[str, Any]))
        answer: dict[str, Any] = call(Inspect(), timeout=SHORT_TIMEOUT_S)
        return answer

    def _stream(self, method: str, request: Any) -> Iterator[ImageEvent]:
        yield from self._channel.unary_stream(f"/{SERVICE}/{method}", encode, decoder(ImageEvent))(request)


@contextlib.contextmanager
def connected(socket: Path) -> Iterator[NodeClient]:
    """A client of the daemon on `socket`. A call that fails raises our errors, with the daemon's text.

    Raises Unavailable where no daemon answers there.
    """
    client = NodeClient(socket)
    try:
        yield client
    except grpc.RpcError as error:
        raise _ours(error, socket) from error
    finally:
        client.close()


def _ours(error: grpc.RpcError, socket: Path) -> Error:
    assert isinstance(error, grpc.Call)
    text = error.details() or error.code().name
    if error.code() is grpc.StatusCode.UNAVAILABLE and "connect" in text.lower():
        there = "nothing answers there" if socket.exists() else "there is no such socket"
        return Unavailable(f"cannot reach the daemon on {socket}: {there}; is `crito serve` running?")
    return _KINDS.get(error.code(), Error)(text)
