"""Transient units of systemd over D-Bus: the scope of a pod's pause process with the systemd cgroup driver.

Containers' scopes are the OCI runtime's own business.
"""

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from jeepney import DBusAddress, MatchRule, Message, MessageType, message_bus, new_method_call
from jeepney.auth import AuthenticationError
from jeepney.io.asyncio import DBusRouter, Proxy, open_dbus_connection

from oci import trace
from oci.errors import DeadlineExceeded, Error, NotFound, Unavailable

DEFAULT_ADDRESS = "unix:path=/run/dbus/system_bus_socket"

_MANAGER = DBusAddress(
    "/org/freedesktop/systemd1", bus_name="org.freedesktop.systemd1", interface="org.freedesktop.systemd1.Manager"
)
_UNIT_EXISTS = "org.freedesktop.systemd1.UnitExists"
_NO_SUCH_UNIT = "org.freedesktop.systemd1.NoSuchUnit"
_NO_MANAGER = ("org.freedesktop.DBus.Error.ServiceUnknown", "org.freedesktop.DBus.Error.NameHasNoOwner")


class Systemd:
    """The system's service manager. Each call connects anew: it may be restarted at any time."""

    def __init__(self, address: str = "", timeout_s: float = 30.0) -> None:
        self._address = address or os.environ.get("DBUS_SYSTEM_BUS_ADDRESS", DEFAULT_ADDRESS)
        self._timeout_s = timeout_s

    async def version(self) -> str:
        """systemd's own version. Raises Unavailable where there is no bus, or no systemd on it."""
        properties = DBusAddress(_MANAGER.object_path, _MANAGER.bus_name, "org.freedesktop.DBus.Properties")
        async with self._deadline("Get", "Version"), self._connected() as router:
            body = await _call(router, properties, "Get", "ss", (_MANAGER.interface, "Version"))
        return str(body[0][1])

    async def start_scope(self, name: str, *, slice: str, pids: Sequence[int], description: str) -> None:
        """Put the processes into a new scope of their own below the slice, which is made where it is missing.

        A scope of that name that lingers from before (it has failed, or was stopped just now) is removed first.
        """
        properties = [
            ("Description", ("s", description)),
            ("Slice", ("s", slice)),
            ("PIDs", ("au", list(pids))),
            ("Delegate", ("b", True)),
            ("DefaultDependencies", ("b", False)),  # else a shutdown kills it before the kubelet can stop its pod
            ("CollectMode", ("s", "inactive-or-failed")),
        ]
        async with self._deadline("StartTransientUnit", name), self._connected() as router:
            try:
                await _job(router, "StartTransientUnit", "ssa(sv)a(sa(sv))", (name, "replace", properties, []))
            except _UnitExistsError:
                await _stop(router, name)
                await _job(router, "StartTransientUnit", "ssa(sv)a(sa(sv))", (name, "replace", properties, []))

    async def stop_unit(self, name: str) -> None:
        """Stop a unit and wait for it; what is in it gets killed. That there is no such unit is success."""
        async with self._deadline("StopUnit", name), self._connected() as router:
            await _stop(router, name)

    @asynccontextmanager
    async def _deadline(self, method: str, subject: str) -> AsyncIterator[None]:
        what = f"{method} {subject}"
        try:
            with trace.step(f"systemd: {method}"):
                async with asyncio.timeout(self._timeout_s):
                    yield
        except TimeoutError:
            raise DeadlineExceeded(f"systemd: {what}: no answer within {self._timeout_s:g} s") from None
        except (OSError, AuthenticationError, EOFError) as error:
            raise Unavailable(f"systemd: {what}: the D-Bus connection at {self._address} failed: {error}") from error

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[DBusRouter]:
        try:
            connection = await open_dbus_connection(self._address)
        except OSError as error:
            reason = error.strerror or errno.errorcode.get(error.errno or 0, str(error))
            raise Unavailable(
                f"systemd: no D-Bus at {self._address} ({reason}); the systemd cgroup driver needs it"
            ) from error
        try:
            async with DBusRouter(connection) as router:
                yield router
        finally:
            await connection.close()


class _UnitExistsError(Error):
    """systemd still has a unit of that name."""


async def _stop(router: DBusRouter, name: str) -> None:
    try:
        await _job(router, "StopUnit", "ss", (name, "replace"))
    except NotFound:
        return
    try:
        await _call(router, _MANAGER, "ResetFailedUnit", "s", (name,))
    except NotFound:
        return  # as it should be: stopped units are collected


async def _job(router: DBusRouter, method: str, signature: str, arguments: tuple[Any, ...]) -> None:
    """Call a method that queues a job, and wait for the job's end. Raises Error when it is anything but "done"."""
    rule = MatchRule(type="signal", interface=_MANAGER.interface, member="JobRemoved", path=_MANAGER.object_path)
    await Proxy(message_bus, router).AddMatch(rule)
    await _call(router, _MANAGER, "Subscribe")
    with router.filter(rule, bufsize=1024) as removed:
        (job,) = await _call(router, _MANAGER, method, signature, arguments)
        while True:
            signal = await removed.get()
            _, path, unit, result = signal.body
            if path == job:
                break
    if result not in ("done", "skipped"):
        raise Error(f"systemd: {method} {unit}: the job ended with {result!r}")


async def _call(
    router: DBusRouter, address: DBusAddress, method: str, signature: str = "", arguments: tuple[Any, ...] = ()
) -> tuple[Any, ...]:
    reply: Message = await router.send_and_get_reply(new_method_call(address, method, signature or None, arguments))
    if reply.header.message_type is not MessageType.error:
        body: tuple[Any, ...] = reply.body
        return body
    name = str(next((value for field, value in reply.header.fields.items() if field.name == "error_name"), ""))
    text = f"systemd: {method} {arguments[0] if arguments else ''}: {reply.body[0] if reply.body else name}"
    if name == _UNIT_EXISTS:
        raise _UnitExistsError(text)
    if name == _NO_SUCH_UNIT:
        raise NotFound(text)
    if name in _NO_MANAGER:
        raise Unavailable(f"{text}; is systemd running on this host?")
    raise Error(text)
