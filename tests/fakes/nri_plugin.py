"""An NRI plugin for tests: it writes down what it is told, answers as the test says, and misbehaves on request."""

import contextlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cri.api.nri.v1alpha1 import api_pb2 as nri
from cri.api.ttrpc import api_pb2 as envelope
from cri.nri import mux, ttrpc
from cri.nri.ttrpc import Frame, Kind

ALL = 0
METHODS: Mapping[str, tuple[type[Any], type[Any]]] = {
    method.name: (getattr(nri, method.input_type.name), getattr(nri, method.output_type.name))
    for method in nri.DESCRIPTOR.services_by_name["Plugin"].methods
}


def mask(*events: int) -> int:
    return sum(1 << (event - 1) for event in events)


class Refusal(Exception):
    """A handler raises it to answer with an error."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


class Silence(Exception):
    """A handler raises it to answer nothing at all."""


class NriPlugin:
    """`handlers` answer by method: they take the request, and what they return (None is an empty answer) is sent."""

    def __init__(
        self,
        connection: socket.socket,
        name: str = "test",
        index: str = "10",
        events: int = ALL,
        handlers: Mapping[str, Callable[[Any], Any]] | None = None,
    ) -> None:
        self.name, self.index, self.events = name, index, events
        self.handlers = dict(handlers or {})
        self.told: list[tuple[str, Any]] = []  # method and request, in order
        self.synchronized = threading.Event()
        self.closed = threading.Event()
        self._socket = connection
        self._streams = itertools.count(1, 2)
        self._answers: dict[int, tuple[threading.Event, list[bytes]]] = {}
        self._writing = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @classmethod
    def connect(cls, path: Path, **options: Any) -> "NriPlugin":
        """Connected, registered and synchronised."""
        plugin = cls(dial(path), **options)
        plugin.register()
        if not plugin.synchronized.wait(10):
            raise TimeoutError("the plugin was not synchronised")
        return plugin

    def __enter__(self) -> "NriPlugin":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join(5)
        self._socket.close()

    # What it asks

    def register(self) -> None:
        request = nri.RegisterPluginRequest(plugin_name=self.name, plugin_idx=self.index, NRI_version="v0.12.0")
        self.call("RegisterPlugin", request)

    def update(self, *updates: nri.ContainerUpdate, evict: tuple[nri.ContainerEviction, ...] = ()) -> list[Any]:
        """Those that failed."""
        payload = self.call("UpdateContainers", nri.UpdateContainersRequest(update=updates, evict=evict))
        return list(nri.UpdateContainersResponse.FromString(payload).failed)

    def call(self, method: str, request: Any, service: str = "nri.pkg.api.v1alpha1.Runtime") -> bytes:
        """The answer's bytes. Raises Refusal."""
        stream = next(self._streams)
        arrived, answer = self._answers[stream] = (threading.Event(), [])
        called = envelope.Request(service=service, method=method, payload=request.SerializeToString())
        self.send(mux.RUNTIME_SERVICE, ttrpc.encode(Frame(stream, Kind.REQUEST, called.SerializeToString())))
        if not arrived.wait(10) or not answer:
            raise TimeoutError(f"no answer to {method}")
        response = envelope.Response.FromString(answer[0])
        if response.status.code:
            raise Refusal(response.status.message, response.status.code)
        return response.payload

    def send(self, connection: int, message: bytes) -> None:
        self.send_bytes(mux.frames(connection, message))

    def send_bytes(self, data: bytes) -> None:
        with self._writing:
            self._socket.sendall(data)

    # What it is told

    def methods(self, id: str = "") -> list[str]:
        """What it was told, in order; with an id, of this pod or container only."""
        return [method for method, request in list(self.told) if not id or id == _subject(request)]

    def wait_told(self, method: str, id: str = "", timeout_s: float = 10) -> Any:
        """The request, as soon as it has come."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for told, request in list(self.told):
                if told == method and (not id or id == _subject(request)):
                    return request
            time.sleep(0.005)
        raise TimeoutError(f"{method} {id} was not told; only {self.methods()}")

    def _read(self) -> None:
        outer = mux.Splitter()
        inner = {
            mux.PLUGIN_SERVICE: ttrpc.Splitter(Kind.REQUEST),
            mux.RUNTIME_SERVICE: ttrpc.Splitter(Kind.RESPONSE),
        }
        with contextlib.suppress(OSError):
            while data := self._socket.recv(1 << 16):
                for connection, piece in outer.feed(data):
                    for frame in inner[connection].feed(piece):
                        if connection == mux.PLUGIN_SERVICE:
                            threading.Thread(target=self._answer, args=(frame,), daemon=True).start()
                        else:
                            self._take(frame)
        self.closed.set()
        for arrived, _ in list(self._answers.values()):
            arrived.set()

    def _take(self, frame: Frame) -> None:
        arrived, answer = self._answers.pop(frame.stream)
        answer.append(frame.payload)
        arrived.set()

    def _answer(self, frame: Frame) -> None:
        request = envelope.Request.FromString(frame.payload)
        try:
            response = envelope.Response(payload=self._handle(request.method, request.payload).SerializeToString())
        except Refusal as error:
            response = envelope.Response(status=envelope.Status(code=error.code, message=str(error)))
        except Silence:
            return
        with contextlib.suppress(OSError):
            self.send(
                mux.PLUGIN_SERVICE, ttrpc.encode(Frame(frame.stream, Kind.RESPONSE, response.SerializeToString()))
            )
            if request.method == "Synchronize" and not nri.SynchronizeRequest.FromString(request.payload).more:
                self.synchronized.set()

    def _handle(self, method: str, payload: bytes) -> Any:
        taken, answered = METHODS[method]
        request = taken.FromString(payload)
        self.told.append((method, request))
        if method in self.handlers:
            answer = self.handlers[method](request)
            if answer is not None:
                return answer
        if method == "Configure":
            return nri.ConfigureResponse(events=self.events)
        if method == "Synchronize":
            return nri.SynchronizeResponse(more=request.more)
        return answered()


def dial(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(str(path))
    return connection


def _subject(request: Any) -> str:
    container = getattr(request, "container", None)
    if container is not None and container.id:
        return str(container.id)
    pod = getattr(request, "pod", None)
    return str(pod.id) if pod is not None else ""


def main() -> None:
    """As an installed plugin: it adds a variable to every container, with its configuration as the value."""
    value = ""

    def configure(request: nri.ConfigureRequest) -> None:
        nonlocal value
        value = request.config.strip()

    def create(request: nri.CreateContainerRequest) -> nri.CreateContainerResponse:
        adjustment = nri.ContainerAdjustment(env=[nri.KeyValue(key="FROM_PLUGIN", value=value)])
        return nri.CreateContainerResponse(adjust=adjustment)

    plugin = NriPlugin(
        socket.socket(fileno=int(os.environ["NRI_PLUGIN_SOCKET"])),
        os.environ["NRI_PLUGIN_NAME"],
        os.environ["NRI_PLUGIN_IDX"],
        handlers={"Configure": configure, "CreateContainer": create},
    )
    plugin.register()
    plugin.closed.wait()


if __name__ == "__main__":
    main()
