"""The plugins that are there: how they come, in which order they are asked, and how they go.

A plugin registers, is configured, and is synchronised with the pods and containers there are. From the moment in which
that state is taken, every event is for it too; events wait until it has been synchronised, so that nothing is told
twice and nothing is lost. One request at a time is with a plugin. One that hangs, breaks the protocol or goes is
dropped, and whatever waited for it goes on without it.
"""

import asyncio
import contextlib
import logging
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.message import Message

from cri.api.nri.v1alpha1 import api_pb2 as nri
from cri.nri import program
from cri.nri.connection import Connection, NotImplementedByPlugin, Refused
from cri.nri.mux import ProtocolError
from oci import trace
from oci.errors import DeadlineExceeded, Error, InvalidArgument, PermissionDenied, Unavailable
from oci.version import VERSION

_log = logging.getLogger(__name__)

NRI_VERSION = "v0.12.0"  # whose protocol this is
RUNTIME_NAME = "crito"
CONNECTIONS_AT_ONCE = 128
SYNC_BYTES = 3 << 20  # of pods and containers in one message: the protocol takes 4 MiB

_ALL_EVENTS = (1 << (nri.LAST - 1)) - 1
# What plugins of older protocols learn by StateChange instead.
_STATE_CHANGES = frozenset(
    {
        nri.RUN_POD_SANDBOX,
        nri.POST_UPDATE_POD_SANDBOX,
        nri.STOP_POD_SANDBOX,
        nri.REMOVE_POD_SANDBOX,
        nri.POST_CREATE_CONTAINER,
        nri.START_CONTAINER,
        nri.POST_START_CONTAINER,
        nri.POST_UPDATE_CONTAINER,
        nri.REMOVE_CONTAINER,
    }
)

R = TypeVar("R", bound=Message)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the configuration says of plugins."""

    socket: Path | None  # None listens nowhere
    plugin_dir: Path
    config_dir: Path
    registration_timeout_s: float
    request_timeout_s: float


@dataclass(frozen=True, slots=True)
class State:
    """All pods and containers, as a plugin is told them."""

    pods: list[nri.PodSandbox]
    containers: list[nri.Container]


# Takes the state at the moment of the call; what comes back turns it into messages.
Snapshot = Callable[[], Awaitable[State]]
Apply = Callable[[Iterable[nri.ContainerUpdate], Iterable[nri.ContainerEviction]], Awaitable[list[nri.ContainerUpdate]]]


class Plugin:
    """One plugin: its connection, and once it has registered, its place in the order and what it wants to hear."""

    def __init__(self, index: str = "", name: str = "", config: str = "") -> None:
        self.index = index
        self.name = name
        self.config = config
        self.events = 0
        self.lock = asyncio.Lock()  # held while a request is with it
        self.registered = asyncio.Event()
        self.connection: Connection | None = None
        self.process: asyncio.subprocess.Process | None = None

    @property
    def full_name(self) -> str:
        return f"{self.index}-{self.name}"

    @property
    def is_open(self) -> bool:
        return self.connection is not None and self.connection.is_open

    def wants(self, event: int) -> bool:
        return bool(self.events & (1 << (event - 1)))


class Plugins:
    """`apply` carries out updates that a plugin asks for, and returns those that failed."""

    def __init__(self, settings: Settings, snapshot: Snapshot, apply: Apply) -> None:
        self._settings = settings
        self._snapshot = snapshot
        self._apply = apply
        self._plugins: tuple[Plugin, ...] = ()  # in the order in which they are asked
        self._connected: set[Plugin] = set()
        self._coming: set[asyncio.Task[None]] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._is_closing = False
        self._server: asyncio.Server | None = None

    # Asking

    def wanting(self, event: int) -> tuple[Plugin, ...]:
        return tuple(plugin for plugin in self._plugins if plugin.wants(event))

    def instances(self) -> list[nri.PluginInstance]:
        return [nri.PluginInstance(name=plugin.name, index=plugin.index) for plugin in self._plugins]

    async def tell(
        self,
        event: "nri.Event.ValueType",
        method: str,
        request: Any,
        answer: type[R],
        take: Callable[[R, str], None] | None = None,
    ) -> None:
        """Ask every plugin that wants the event, one after another; `take` gets each answer and its plugin's name.

        Raises Refused with the first plugin's own error, and whatever `take` raises.
        """
        for plugin in self.wanting(event):
            response = await self._ask(plugin, event, method, request, answer)
            if response is not None and take is not None:
                take(response, plugin.full_name)

    async def validate(self, request: nri.ValidateContainerAdjustmentRequest) -> None:
        """Ask all validators at once. Raises PermissionDenied with what one of them objects to, or Refused."""
        event, answer = nri.VALIDATE_CONTAINER_ADJUSTMENT, nri.ValidateContainerAdjustmentResponse
        plugins = self.wanting(event)
        answers = await asyncio.gather(
            *(self._ask(each, event, "ValidateContainerAdjustment", request, answer) for each in plugins)
        )
        for plugin, response in zip(plugins, answers, strict=True):
            if response is not None and response.reject:
                raise PermissionDenied(f"NRI validator {plugin.full_name}: {response.reason or 'no reason was given'}")

    async def _ask(
        self, plugin: Plugin, event: "nri.Event.ValueType", method: str, request: Any, answer: type[R]
    ) -> R | None:
        """None from a plugin that has gone, or does not know the event."""
        async with plugin.lock:
            if not plugin.is_open:
                return None
            try:
                return await self._call(plugin, method, request, answer)
            except NotImplementedByPlugin:
                if event in _STATE_CHANGES:
                    await self._state_change(plugin, event, request)
                return None
            except Refused as error:
                raise Refused(f"NRI plugin {plugin.full_name} refuses: {error}") from error
            except (DeadlineExceeded, Unavailable, ProtocolError) as error:
                self._drop(plugin, str(error))
                return None

    async def _state_change(self, plugin: Plugin, event: "nri.Event.ValueType", request: Any) -> None:
        container = getattr(request, "container", None)
        change = nri.StateChangeEvent(event=event, pod=request.pod, container=container)
        try:
            await self._call(plugin, "StateChange", change, nri.Empty)
        except NotImplementedByPlugin:
            return
        except Refused as error:
            raise Refused(f"NRI plugin {plugin.full_name} refuses: {error}") from error
        except (DeadlineExceeded, Unavailable, ProtocolError) as error:
            self._drop(plugin, str(error))

    async def _call(
        self, plugin: Plugin, method: str, request: Message, answer: type[R], timeout_s: float | None = None
    ) -> R:
        assert plugin.connection is not None
        with trace.step(f"NRI {method}", {"nri.plugin": plugin.full_name}):
            return await plugin.connection.call(method, request, answer, timeout_s or self._settings.request_timeout_s)

    # Coming

    async def start(self) -> None:
        """Start the plugins that are installed, then listen for others. Raises OSError when it cannot listen."""
        found = await asyncio.to_thread(program.installed, self._settings.plugin_dir, self._settings.config_dir)
        await asyncio.gather(*(self._launch(each) for each in found))
        if self._settings.socket is None:
            return
        self._server = await asyncio.start_unix_server(
            self._accept, sock=await asyncio.to_thread(_bind, self._settings.socket)
        )
        _log.info("NRI plugins can connect on %s", self._settings.socket)

    async def _launch(self, installed: program.Installed) -> None:
        plugin = Plugin(installed.index, installed.name, installed.config)
        try:
            plugin.process, reader, writer = await program.launch(installed)
        except OSError as error:
            _log.warning("NRI plugin %s cannot be started: %s", installed.path, error)
            return
        await self._take_in(plugin, reader, writer)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_closing or len(self._connected) >= CONNECTIONS_AT_ONCE:
            _log.warning("NRI: a connection is refused: there are %d", len(self._connected))
            writer.transport.abort()
            return
        task = asyncio.create_task(self._take_in(Plugin(), reader, writer), name="NRI plugin that comes")
        self._coming.add(task)
        task.add_done_callback(self._coming.discard)

    async def _take_in(self, plugin: Plugin, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """From the connection to a synchronised plugin; one that fails on the way is dropped."""
        plugin.connection = Connection(
            reader,
            writer,
            {
                "RegisterPlugin": lambda request: self._register(plugin, request),
                "UpdateContainers": lambda request: self._update(plugin, request),
            },
            on_close=lambda: self._gone(plugin),
        )
        self._connected.add(plugin)
        try:
            await self._wait_registered(plugin)
            await self._configure(plugin)
            await self._synchronize(plugin)
        except Error as error:
            self._drop(plugin, str(error))
        except Exception:  # a defect of ours must not leave a plugin behind that holds everybody up
            _log.exception("NRI plugin %s", _known_as(plugin))
            self._drop(plugin, "the daemon failed to take it in")

    async def _register(self, plugin: Plugin, request: nri.RegisterPluginRequest) -> nri.Empty:
        if plugin.registered.is_set():
            raise InvalidArgument("RegisterPlugin: it has registered already")
        if plugin.process is None:  # one that we have started is called as its file is
            plugin.name, plugin.index = request.plugin_name, request.plugin_idx
            if not re.fullmatch(r"[A-Za-z0-9_.+-]+", plugin.name):
                raise InvalidArgument(f"plugin_name {plugin.name!r}: expected letters, digits and _.+- only")
            if not re.fullmatch(r"[0-9][0-9]", plugin.index):
                raise InvalidArgument(f"plugin_idx {plugin.index!r}: expected two digits")
        plugin.registered.set()
        return nri.Empty()

    async def _wait_registered(self, plugin: Plugin) -> None:
        timeout_s = self._settings.registration_timeout_s
        try:
            await asyncio.wait_for(plugin.registered.wait(), timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(f"it has not registered within {timeout_s:g} s") from None

    async def _configure(self, plugin: Plugin) -> None:
        settings = self._settings
        request = nri.ConfigureRequest(
            config=plugin.config,
            runtime_name=RUNTIME_NAME,
            runtime_version=VERSION,
            registration_timeout=int(settings.registration_timeout_s * 1000),
            request_timeout=int(settings.request_timeout_s * 1000),
            NRI_version=NRI_VERSION,
        )
        answer = await self._call(plugin, "Configure", request, nri.ConfigureResponse)
        if answer.events & ~_ALL_EVENTS:
            raise InvalidArgument(f"Configure: events {answer.events:#x}: there are only {_ALL_EVENTS:#x}")
        plugin.events = answer.events or _ALL_EVENTS

    async def _synchronize(self, plugin: Plugin) -> None:
        async with plugin.lock:
            # No await between these two: what is not in the state comes as an event.
            self._plugins = tuple(sorted((*self._plugins, plugin), key=lambda each: (each.index, each.name)))
            snapshot = self._snapshot()
            updates = await self._send_state(plugin, await snapshot)
        _log.info("NRI plugin %s is there", plugin.full_name)
        await self._apply(updates, ())

    async def _send_state(self, plugin: Plugin, state: State) -> list[nri.ContainerUpdate]:
        """Part by part. It is the end of the registration, and has that time."""
        deadline = time.monotonic() + self._settings.registration_timeout_s
        for request in _parts(state):
            left_s = max(deadline - time.monotonic(), 0.001)
            answer = await self._call(plugin, "Synchronize", request, nri.SynchronizeResponse, left_s)
            if request.more and (answer.update or not answer.more):
                raise InvalidArgument("Synchronize: it does not take the state in parts")
        return list(answer.update)

    async def _update(self, plugin: Plugin, request: nri.UpdateContainersRequest) -> nri.UpdateContainersResponse:
        if plugin not in self._plugins:
            raise InvalidArgument("UpdateContainers: it is not synchronised yet")
        return nri.UpdateContainersResponse(failed=await self._apply(request.update, request.evict))

    # Going

    def _drop(self, plugin: Plugin, reason: str) -> None:
        if plugin.is_open:
            assert plugin.connection is not None
            _log.warning("NRI plugin %s is dropped: %s", _known_as(plugin), reason)
            plugin.connection.close(reason)

    def _gone(self, plugin: Plugin) -> None:
        self._plugins = tuple(each for each in self._plugins if each is not plugin)
        if plugin in self._connected:
            self._connected.discard(plugin)
            _log.info("NRI plugin %s has gone", _known_as(plugin))
        if plugin.process is not None:
            task = asyncio.create_task(program.end(plugin.process), name=f"end of NRI plugin {plugin.full_name}")
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        """Close every connection, as a sign to reconnect to the next daemon, and end the plugins that were started."""
        self._is_closing = True
        if self._server is not None:
            self._server.close()
        coming = list(self._coming)
        for task in coming:
            task.cancel()
        await asyncio.gather(*coming, return_exceptions=True)
        connections = [plugin.connection for plugin in self._connected if plugin.connection is not None]
        for connection in connections:
            connection.close("the daemon ends")
        for connection in connections:
            await connection.wait_closed()
        await asyncio.gather(*self._ending, return_exceptions=True)
        if self._settings.socket is not None:
            with contextlib.suppress(FileNotFoundError):
                self._settings.socket.unlink()


def _known_as(plugin: Plugin) -> str:
    return plugin.full_name if plugin.registered.is_set() or plugin.process else "(not registered)"


def _bind(path: Path) -> socket.socket:
    """A socket there that root alone can connect to, in place of one that an earlier daemon has left."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.is_socket():
        path.unlink()
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        bound.bind(str(path))
        path.chmod(0o600)  # nobody can connect yet: it does not listen
    except BaseException:
        bound.close()
        raise
    return bound


def _parts(state: State) -> Iterator[nri.SynchronizeRequest]:
    """Requests that hold all of the state together, each short enough to be sent."""
    request, size = nri.SynchronizeRequest(), 0
    for kind, items in (("pods", state.pods), ("containers", state.containers)):
        for item in items:
            length = item.ByteSize()
            if size and size + length > SYNC_BYTES:
                request.more = True
                yield request
                request, size = nri.SynchronizeRequest(), 0
            getattr(request, kind).append(item)
            size += length
    yield request
