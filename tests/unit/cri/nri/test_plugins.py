"""Plugins that come, answer, misbehave and go, over a real socket."""

import asyncio
import contextlib
import os
import struct
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cri.api.nri.v1alpha1 import api_pb2 as nri
from cri.nri import mux
from cri.nri import plugins as plugins_module
from cri.nri.connection import Refused
from cri.nri.plugins import Plugins, Settings, State
from oci.errors import PermissionDenied
from tests.fakes.nri_plugin import NriPlugin, Refusal, Silence, dial, mask

ROOT = Path(__file__).parents[4]
POD = nri.PodSandbox(id="p1", name="pod")
RUN = nri.RunPodSandboxRequest(pod=POD)


class Runtime:
    """Plugins with a state of one pod and its containers, and what was applied."""

    def __init__(self, directory: Path) -> None:
        self.settings = Settings(directory / "nri.sock", directory / "plugins", directory / "conf", 2.0, 1.0)
        self.state = State([POD], [nri.Container(id="c1")])
        self.applied: list[str] = []
        self.made: list[NriPlugin] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Plugins]:
        plugins = Plugins(self.settings, self._snapshot, self._apply)
        await plugins.start()
        try:
            yield plugins
        finally:
            await plugins.close()
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert left == []

    @property
    def socket(self) -> Path:
        assert self.settings.socket is not None
        return self.settings.socket

    async def connect(self, **options: Any) -> NriPlugin:
        plugin = await asyncio.to_thread(NriPlugin.connect, self.socket, **options)
        self.made.append(plugin)
        return plugin

    def dial(self, name: str = "test", index: str = "10", **options: Any) -> NriPlugin:
        """Connected, and nothing more."""
        plugin = NriPlugin(dial(self.socket), name, index, **options)
        self.made.append(plugin)
        return plugin

    def _snapshot(self) -> Awaitable[State]:
        taken = State(list(self.state.pods), list(self.state.containers))

        async def described() -> State:
            return taken

        return described()

    async def _apply(
        self, updates: Iterable[nri.ContainerUpdate], evictions: Iterable[nri.ContainerEviction]
    ) -> list[nri.ContainerUpdate]:
        updates = list(updates)
        self.applied += [each.container_id for each in updates] + [f"evict {each.container_id}" for each in evictions]
        return [each for each in updates if each.container_id == "unknown"]


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    runtime = Runtime(tmp_path)
    yield runtime
    for plugin in runtime.made:
        plugin.close()


async def run_pod(plugins: Plugins) -> None:
    await plugins.tell(nri.RUN_POD_SANDBOX, "RunPodSandbox", RUN, nri.RunPodSandboxResponse)


async def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_a_plugin_is_configured_and_synchronised_and_then_told(runtime: Runtime) -> None:
    async def scenario() -> None:
        async with runtime.running() as plugins:
            with await runtime.connect() as plugin:
                await run_pod(plugins)

                assert plugin.methods() == ["Configure", "Synchronize", "RunPodSandbox"]
                configure, state = plugin.told[0][1], plugin.told[1][1]
                assert (configure.runtime_name, configure.request_timeout) == ("crito", 1000)
                assert ([pod.id for pod in state.pods], [each.id for each in state.containers]) == (["p1"], ["c1"])

    asyncio.run(scenario())


def test_the_socket_is_root_s_alone_replaces_a_stale_one_and_goes_with_the_daemon(runtime: Runtime) -> None:
    async def scenario() -> None:
        async with runtime.running():
            assert runtime.socket.stat().st_mode & 0o777 == 0o600
            runtime.socket.rename(runtime.socket.with_name("kept"))
        runtime.socket.with_name("kept").rename(runtime.socket)
        async with runtime.running():
            (await runtime.connect()).close()
        assert not runtime.socket.exists()

    asyncio.run(scenario())


def test_plugins_are_asked_in_the_order_of_their_indexes(runtime: Runtime) -> None:
    order: list[str] = []

    async def scenario() -> None:
        async with runtime.running() as plugins:
            for index in ("50", "10", "99", "30"):
                handlers = {"RunPodSandbox": lambda _, index=index: order.append(index)}
                await runtime.connect(index=index, handlers=handlers)
            await run_pod(plugins)

    asyncio.run(scenario())
    assert order == ["10", "30", "50", "99"]


def test_a_plugin_is_told_only_what_it_wants_to_hear(runtime: Runtime) -> None:
    async def scenario() -> None:
        async with runtime.running() as plugins:
            with await runtime.connect(events=mask(nri.STOP_POD_SANDBOX)) as plugin:
                await run_pod(plugins)

                assert plugin.methods() == ["Configure", "Synchronize"]

    asyncio.run(scenario())


def test_a_plugin_s_own_error_refuses_the_step_and_keeps_the_plugin(runtime: Runtime) -> None:
    def refuse(_: Any) -> None:
        raise Refusal("no room")

    async def scenario() -> None:
        async with runtime.running() as plugins:
            with await runtime.connect(name="policy", handlers={"RunPodSandbox": refuse}) as plugin:
                for _ in range(2):
                    with pytest.raises(Refused, match=r"10-policy refuses: RunPodSandbox: no room"):
                        await run_pod(plugins)
                assert plugin.methods().count("RunPodSandbox") == 2

    asyncio.run(scenario())


def test_a_plugin_that_hangs_is_dropped_and_the_step_goes_on(runtime: Runtime) -> None:
    def hang(_: Any) -> None:
        raise Silence

    async def scenario() -> None:
        async with runtime.running() as plugins:
            hanging = await runtime.connect(index="10", handlers={"RunPodSandbox": hang})
            well = await runtime.connect(index="20")
            started = time.monotonic()
            await run_pod(plugins)

            assert 0.9 < time.monotonic() - started < 1.9
            assert "RunPodSandbox" in well.methods()
            assert await asyncio.to_thread(hanging.closed.wait, 5)
            started = time.monotonic()
            await run_pod(plugins)
            assert time.monotonic() - started < 0.5

    asyncio.run(scenario())


def test_a_plugin_that_dies_while_it_is_asked_holds_nobody_up(runtime: Runtime) -> None:
    async def scenario() -> None:
        async with runtime.running() as plugins:
            plugin = await runtime.connect()
            plugin.handlers["RunPodSandbox"] = lambda _: plugin._socket.shutdown(2)
            started = time.monotonic()
            await run_pod(plugins)

            assert time.monotonic() - started < 0.5
            assert plugins.wanting(nri.RUN_POD_SANDBOX) == ()

    asyncio.run(scenario())


def test_a_plugin_that_knows_an_older_protocol_hears_of_changes_of_state(runtime: Runtime) -> None:
    def unknown(_: Any) -> None:
        raise Refusal("no such method", 12)

    async def scenario() -> None:
        async with runtime.running() as plugins:
            with await runtime.connect(handlers={"RunPodSandbox": unknown}) as plugin:
                await run_pod(plugins)

                method, change = plugin.told[-1]
                assert (method, change.event, change.pod.id) == ("StateChange", nri.RUN_POD_SANDBOX, "p1")

    asyncio.run(scenario())


def test_what_happens_while_a_plugin_is_synchronised_is_told_when_it_has_been(runtime: Runtime) -> None:
    at_sync, go_on = threading.Event(), threading.Event()

    def synchronize(_: Any) -> None:
        at_sync.set()
        go_on.wait(5)

    async def scenario() -> None:
        async with runtime.running() as plugins:
            connecting = asyncio.create_task(runtime.connect(handlers={"Synchronize": synchronize}))
            await asyncio.to_thread(at_sync.wait, 5)
            telling = asyncio.create_task(run_pod(plugins))
            await asyncio.sleep(0.2)
            assert not telling.done()
            go_on.set()
            plugin = await connecting
            await telling

            assert plugin.methods() == ["Configure", "Synchronize", "RunPodSandbox"]

    asyncio.run(scenario())


def test_a_large_state_comes_in_parts(runtime: Runtime) -> None:
    runtime.state = State([POD], [nri.Container(id=f"c{n}", args=["x" * 100_000]) for n in range(100)])

    async def scenario() -> None:
        async with runtime.running():
            with await runtime.connect() as plugin:
                parts = [request for method, request in plugin.told if method == "Synchronize"]

                assert [part.more for part in parts] == [True, True, True, False]
                assert [each.id for part in parts for each in part.containers] == [f"c{n}" for n in range(100)]
                assert sum(len(part.pods) for part in parts) == 1

    asyncio.run(scenario())


def test_updates_that_a_plugin_asks_for_are_applied_and_failures_told(runtime: Runtime) -> None:
    def synchronize(_: Any) -> nri.SynchronizeResponse:
        return nri.SynchronizeResponse(update=[nri.ContainerUpdate(container_id="c1")])

    async def scenario() -> None:
        async with runtime.running():
            with await runtime.connect(handlers={"Synchronize": synchronize}) as plugin:
                await eventually(lambda: runtime.applied == ["c1"])
                updates = [nri.ContainerUpdate(container_id=id) for id in ("c2", "unknown")]
                failed = await asyncio.to_thread(
                    plugin.update, *updates, evict=(nri.ContainerEviction(container_id="c3"),)
                )

                assert [each.container_id for each in failed] == ["unknown"]
                assert runtime.applied == ["c1", "c2", "unknown", "evict c3"]

    asyncio.run(scenario())


@pytest.mark.parametrize(("name", "index"), [("", "10"), ("a/b", "10"), ("a", "1"), ("a", "1x"), ("a", "100")])
def test_a_plugin_with_an_impossible_name_is_refused(runtime: Runtime, name: str, index: str) -> None:
    async def scenario() -> None:
        async with runtime.running() as plugins:
            plugin = runtime.dial(name, index)
            with pytest.raises(Refusal, match="expected"):
                await asyncio.to_thread(plugin.register)
            plugin.close()

            assert plugins.wanting(nri.RUN_POD_SANDBOX) == ()

    asyncio.run(scenario())


def test_a_plugin_cannot_register_twice_nor_update_before_it_is_synchronised(runtime: Runtime) -> None:
    async def scenario() -> None:
        async with runtime.running():
            early = runtime.dial()
            with pytest.raises(Refusal, match="not synchronised"):
                await asyncio.to_thread(early.update)
            with await runtime.connect() as plugin:
                with pytest.raises(Refusal, match="already"):
                    await asyncio.to_thread(plugin.register)
                with pytest.raises(Refusal, match="no such call") as raised:
                    await asyncio.to_thread(plugin.call, "Reboot", nri.Empty())
                assert raised.value.code == 12

    asyncio.run(scenario())


def test_whoever_connects_and_says_nothing_is_dropped(runtime: Runtime) -> None:
    runtime.settings = replace(runtime.settings, registration_timeout_s=0.3)

    async def scenario() -> None:
        async with runtime.running():
            silent = runtime.dial()

            assert await asyncio.to_thread(silent.closed.wait, 2)

    asyncio.run(scenario())


def test_a_plugin_that_wants_events_that_do_not_exist_is_dropped(runtime: Runtime) -> None:
    async def scenario() -> None:
        async with runtime.running():
            plugin = runtime.dial(events=1 << 20)
            await asyncio.to_thread(plugin.register)

            assert await asyncio.to_thread(plugin.closed.wait, 2)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "garbage",
    [
        struct.pack(">II", 1, 0xFFFFFFF0),
        mux.frames(2, struct.pack(">IIBB", 0, 1, 3, 0)),
        mux.frames(2, struct.pack(">IIBB", 5 << 20, 1, 1, 0)),
        os.urandom(1 << 16),
    ],
    ids=["mux length", "type", "ttrpc length", "noise"],
)
def test_bytes_that_are_no_protocol_cost_the_sender_its_connection_only(runtime: Runtime, garbage: bytes) -> None:
    async def scenario() -> None:
        async with runtime.running() as plugins:
            with await runtime.connect() as well:
                bad = runtime.dial(index="20")
                await asyncio.to_thread(bad.register)
                with contextlib.suppress(OSError):
                    bad.send_bytes(garbage)
                    bad._socket.shutdown(1)

                assert await asyncio.to_thread(bad.closed.wait, 3)
                await run_pod(plugins)
                assert "RunPodSandbox" in well.methods()

    asyncio.run(scenario())


def test_a_request_that_cannot_be_read_is_answered_with_an_error(runtime: Runtime) -> None:
    class Nonsense:
        def SerializeToString(self) -> bytes:
            return b"\xff\xff\xff"

    async def scenario() -> None:
        async with runtime.running():
            with await runtime.connect() as plugin, pytest.raises(Refusal, match="cannot be read"):
                await asyncio.to_thread(plugin.call, "UpdateContainers", Nonsense())

    asyncio.run(scenario())


def test_a_plugin_that_floods_with_requests_is_dropped(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with runtime.running():
            plugin = await runtime.connect()
            request = mux.frames(2, struct.pack(">IIBB", 0, 1, 1, 0))
            with contextlib.suppress(OSError):
                plugin.send_bytes(request * 100)

            assert await asyncio.to_thread(plugin.closed.wait, 3)

    asyncio.run(scenario())


def test_a_plugin_that_asks_and_never_reads_the_answers_is_dropped(runtime: Runtime) -> None:
    async def scenario() -> None:
        async with runtime.running():
            connection = dial(runtime.socket)
            connection.settimeout(5)
            nonsense = struct.pack(">IIBB", 0, 1, 1, 0)

            def flood() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        connection.sendall(mux.frames(2, nonsense))

            await asyncio.wait_for(asyncio.to_thread(flood), 10)
            connection.close()

    asyncio.run(scenario())


def test_connections_have_a_limit(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins_module, "CONNECTIONS_AT_ONCE", 2)

    async def scenario() -> None:
        async with runtime.running():
            with await runtime.connect(), await runtime.connect(index="20"):
                third = runtime.dial()

                assert await asyncio.to_thread(third.closed.wait, 3)

    asyncio.run(scenario())


def test_a_validator_s_objection_refuses(runtime: Runtime) -> None:
    def reject(_: Any) -> nri.ValidateContainerAdjustmentResponse:
        return nri.ValidateContainerAdjustmentResponse(reject=True, reason="too many mounts")

    async def scenario() -> None:
        async with runtime.running() as plugins:
            await runtime.connect(index="10")
            await runtime.connect(index="20", handlers={"ValidateContainerAdjustment": reject})

            with pytest.raises(PermissionDenied, match="20-test: too many mounts"):
                await plugins.validate(nri.ValidateContainerAdjustmentRequest())

    asyncio.run(scenario())


def install(directory: Path, name: str, program: str) -> None:
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(program)}")
    path.chmod(0o755)


def test_installed_plugins_are_started_with_their_configuration_and_ended(runtime: Runtime) -> None:
    install(
        runtime.settings.plugin_dir,
        "10-adder",
        f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from tests.fakes.nri_plugin import main
        main()
        """,
    )
    runtime.settings.config_dir.mkdir()
    (runtime.settings.config_dir / "adder.conf").write_text("configured\n")
    values: list[str] = []

    async def scenario() -> int:
        async with runtime.running() as plugins:
            await plugins.tell(
                nri.CREATE_CONTAINER,
                "CreateContainer",
                nri.CreateContainerRequest(container=nri.Container(id="c1")),
                nri.CreateContainerResponse,
                lambda answer, plugin: values.append(f"{plugin}: {answer.adjust.env[0].value}"),
            )
            (plugin,) = plugins.wanting(nri.CREATE_CONTAINER)
            assert plugin.process is not None
            return plugin.process.pid

    pid = asyncio.run(scenario())

    assert values == ["10-adder: configured"]
    assert not Path(f"/proc/{pid}").exists()


def test_installed_programs_that_are_no_plugins_do_not_stop_the_start(runtime: Runtime) -> None:
    runtime.settings = replace(runtime.settings, registration_timeout_s=1.0)
    install(runtime.settings.plugin_dir, "10-dies", "raise SystemExit(1)")
    install(runtime.settings.plugin_dir, "20-silent", "import time\ntime.sleep(1000)")
    install(runtime.settings.plugin_dir, "no-index", "")
    broken = runtime.settings.plugin_dir / "30-broken"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    (runtime.settings.plugin_dir / "40-data").write_text("not executable")

    async def scenario() -> None:
        async with runtime.running() as plugins:
            assert plugins.wanting(nri.CREATE_CONTAINER) == ()
            with await runtime.connect() as plugin:
                await run_pod(plugins)
                assert "RunPodSandbox" in plugin.methods()

    asyncio.run(scenario())


def test_plugins_see_their_connection_end_when_the_daemon_ends(runtime: Runtime) -> None:
    async def scenario() -> NriPlugin:
        async with runtime.running():
            return await runtime.connect()

    plugin = asyncio.run(scenario())

    assert plugin.closed.wait(2)
