"""Scopes over a real message bus; systemd itself is played by a service that answers as it does."""

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from jeepney import (
    DBusAddress,
    HeaderFields,
    Message,
    MessageType,
    message_bus,
    new_error,
    new_method_return,
    new_signal,
)
from jeepney.io.asyncio import DBusConnection, open_dbus_connection

from oci.errors import DeadlineExceeded, Error, Unavailable
from oci.linux.systemd import Systemd

MANAGER = DBusAddress("/org/freedesktop/systemd1", interface="org.freedesktop.systemd1.Manager")
CONFIG = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><listen>unix:path={path}</listen><auth>EXTERNAL</auth>
<policy context="default">
<allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/>
</policy>
</busconfig>
"""


@dataclass
class FakeManager:
    """What systemd does with units, without any processes."""

    units: dict[str, dict[str, Any]] = field(default_factory=dict)
    result: str = "done"
    is_silent: bool = False
    calls: list[str] = field(default_factory=list)

    async def serve(self, connection: DBusConnection) -> None:
        while True:
            message = await connection.receive()
            if message.header.message_type is MessageType.method_call and not self.is_silent:
                await self._answer(connection, message)

    async def _answer(self, connection: DBusConnection, message: Message) -> None:
        method = message.header.fields[HeaderFields.member]
        self.calls.append(method)
        if method == "Get":
            await connection.send(new_method_return(message, "v", (("s", "252"),)))
        elif method == "Subscribe":
            await connection.send(new_method_return(message))
        elif method == "StartTransientUnit" and message.body[0] in self.units:
            await connection.send(new_error(message, "org.freedesktop.systemd1.UnitExists", "s", ("it exists",)))
        elif method in ("StopUnit", "ResetFailedUnit") and message.body[0] not in self.units:
            await connection.send(new_error(message, "org.freedesktop.systemd1.NoSuchUnit", "s", ("not loaded",)))
        else:
            await self._run(connection, message, method)

    async def _run(self, connection: DBusConnection, message: Message, method: str) -> None:
        unit = message.body[0]
        if method == "StartTransientUnit":
            self.units[unit] = {name: value for name, (_, value) in message.body[2]}
        else:
            del self.units[unit]
        job = f"/org/freedesktop/systemd1/job/{len(self.calls)}"
        await connection.send(_job_removed("/org/freedesktop/systemd1/job/of_another", unit, "failed"))
        await connection.send(new_method_return(message, "o", (job,)))
        await connection.send(_job_removed(job, unit, self.result))


def _job_removed(job: str, unit: str, result: str) -> Message:
    return new_signal(MANAGER, "JobRemoved", "uoss", (1, job, unit, result))


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    daemon = shutil.which("dbus-daemon")
    if daemon is None:
        pytest.skip("dbus-daemon is not installed")
    path = tmp_path / "bus"
    (tmp_path / "bus.conf").write_text(CONFIG.format(path=path))
    argv = [daemon, f"--config-file={tmp_path / 'bus.conf'}", "--nofork", "--print-address=1"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("unix:")
        try:
            yield f"unix:path={path}"
        finally:
            process.terminate()


@asynccontextmanager
async def played(manager: FakeManager, address: str) -> AsyncIterator[None]:
    connection = await open_dbus_connection(address)
    await connection.send(message_bus.RequestName("org.freedesktop.systemd1"))
    task = asyncio.create_task(manager.serve(connection))
    await asyncio.sleep(0.05)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await connection.close()


def run(manager: FakeManager, address: str, *stories: Any) -> None:
    async def story() -> None:
        async with played(manager, address):
            for each in stories:
                await each

    asyncio.run(story())


def test_a_scope_is_started_with_its_processes_and_stopped(address: str) -> None:
    manager, systemd = FakeManager(), Systemd(address)

    run(manager, address, systemd.start_scope("crito-x.scope", slice="a.slice", pids=[7, 8], description="the pause"))
    started = dict(manager.units)
    run(manager, address, systemd.stop_unit("crito-x.scope"), systemd.stop_unit("crito-x.scope"))

    assert started == {
        "crito-x.scope": {
            "Description": "the pause",
            "Slice": "a.slice",
            "PIDs": [7, 8],
            "Delegate": True,
            "DefaultDependencies": False,
            "CollectMode": "inactive-or-failed",
        }
    }
    assert manager.units == {}


def test_a_scope_that_lingers_is_replaced(address: str) -> None:
    manager = FakeManager(units={"crito-x.scope": {"Slice": "old.slice"}})

    run(
        manager,
        address,
        Systemd(address).start_scope("crito-x.scope", slice="new.slice", pids=[7], description="again"),
    )

    assert manager.units["crito-x.scope"]["Slice"] == "new.slice"


def test_a_job_that_fails_is_an_error_with_its_result(address: str) -> None:
    manager = FakeManager(result="timeout")

    with pytest.raises(Error, match=r"StartTransientUnit crito-x\.scope: the job ended with 'timeout'"):
        run(manager, address, Systemd(address).start_scope("crito-x.scope", slice="a.slice", pids=[7], description=""))


def test_a_manager_that_does_not_answer_is_not_waited_for(address: str) -> None:
    with pytest.raises(DeadlineExceeded, match=r"StopUnit x\.scope: no answer within 0\.2 s"):
        run(FakeManager(is_silent=True), address, Systemd(address, timeout_s=0.2).stop_unit("x.scope"))


def test_the_version_is_asked(address: str) -> None:
    async def story() -> str:
        async with played(FakeManager(), address):
            return await Systemd(address).version()

    assert asyncio.run(story()) == "252"


def test_a_bus_without_systemd_and_no_bus_at_all_are_unavailable(address: str, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="is systemd running on this host"):
        asyncio.run(Systemd(address).version())
    with pytest.raises(Unavailable, match=r"no D-Bus at unix:path=.*missing \(No such file"):
        asyncio.run(Systemd(f"unix:path={tmp_path}/missing").stop_unit("x.scope"))
