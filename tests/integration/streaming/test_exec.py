"""Exec into real containers: output, input, exit codes, terminals, and what happens when either side goes."""

import asyncio
import contextlib
import hashlib
import json
import os
import time
from typing import Any

import grpc
import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from tests.fakes.stream_client import Command, spdy_command, websocket_client
from tests.integration.streaming.conftest import Node

EXIT_CODE = [{"reason": "ExitCode", "message": "7"}]


def resize(width: int, height: int) -> bytes:
    return json.dumps({"Width": width, "Height": height}).encode() + b"\n"


def test_output_errors_and_exit_code_arrive_apart(node: Node) -> None:
    async def run() -> None:
        url = node.exec_url(["sh", "-c", "echo out; echo err >&2; exit 7"])
        async with spdy_command(url, "stdout", "stderr") as command:
            assert await command["stdout"].read_all() == b"out\n"
            assert await command["stderr"].read_all() == b"err\n"
            status = await command.status()
            assert (status["reason"], status["details"]["causes"]) == ("NonZeroExitCode", EXIT_CODE)

    asyncio.run(run())


@pytest.mark.parametrize("protocol", ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"])
def test_success_is_told_in_every_version(node: Node, protocol: str) -> None:
    async def run() -> None:
        url = node.exec_url(["echo", "hello"])
        async with spdy_command(url, "stdout", "stderr", protocols=[protocol]) as command:
            assert await command["stdout"].read_all() == b"hello\n"
            told = await command["error"].read_all()
            assert told == b"" if protocol != "v4.channel.k8s.io" else json.loads(told)["status"] == "Success"

    asyncio.run(run())


def test_failure_is_told_as_text_before_v4(node: Node) -> None:
    async def run() -> None:
        async with spdy_command(
            node.exec_url(["false"]), "stdout", "stderr", protocols=["v2.channel.k8s.io"]
        ) as command:
            assert await command["error"].read_all() == b"command terminated with non-zero exit code: 1"

    asyncio.run(run())


def test_input_is_passed_on_with_its_end(node: Node) -> None:
    content = os.urandom(5_000_000)

    async def run() -> None:
        async with spdy_command(node.exec_url(["md5sum"], stdin=True), "stdin", "stdout", "stderr") as command:
            for start in range(0, len(content), 32_768):
                await command["stdin"].write(content[start : start + 32_768])
            await command["stdin"].close()

            assert (await command["stdout"].read_all()).split()[0].decode() == hashlib.md5(content).hexdigest()
            assert (await command.status())["status"] == "Success"

    asyncio.run(run())


def test_a_large_output_is_whole(node: Node) -> None:
    async def run() -> None:
        url = node.exec_url(["sh", "-c", "head -c 20000000 /dev/zero; echo end"])
        async with spdy_command(url, "stdout", "stderr") as command:
            assert await command["stdout"].read_all() == bytes(20_000_000) + b"end\n"

    asyncio.run(run())


def test_a_terminal_has_the_clients_size_and_follows_it(node: Node) -> None:
    async def run() -> None:
        async with spdy_command(node.exec_url(["sh"], tty=True, stdin=True), "stdin", "stdout", "resize") as command:
            await command["resize"].write(resize(100, 30))
            await asyncio.sleep(0.3)
            await command["stdin"].write(b"stty size\n")
            await command["stdout"].read_until(b"30 100")
            await command["resize"].write(resize(123, 44))
            await asyncio.sleep(0.3)
            await command["stdin"].write(b"stty size; exit 3\n")
            assert b"44 123" in await command["stdout"].read_all()
            assert (await command.status())["details"]["causes"][0]["message"] == "3"

    asyncio.run(run())


def test_a_terminal_s_session_ends_with_its_process_although_input_is_open(node: Node) -> None:
    async def run() -> None:
        url = node.exec_url(["echo", "hello"], tty=True, stdin=True)
        async with spdy_command(url, "stdin", "stdout", "resize") as command:
            assert await command["stdout"].read_all() == b"hello\r\n"
            assert (await command.status())["status"] == "Success"

    asyncio.run(run())


@pytest.mark.parametrize("tty", [False, True])
def test_a_child_that_holds_the_streams_does_not_hold_the_session(node: Node, tty: bool) -> None:
    async def run() -> None:
        url = node.exec_url(["sh", "-c", "trap '' HUP; sleep 3 & echo done"], tty=tty)
        names = ("stdout", "resize") if tty else ("stdout", "stderr")
        began = time.monotonic()
        async with spdy_command(url, *names) as command:
            assert (await command["stdout"].read_all()).strip() == b"done"
            assert (await command.status())["status"] == "Success"
        assert time.monotonic() - began < 2

    asyncio.run(run())


def test_an_input_that_nobody_reads_is_closed_and_the_end_is_told(node: Node) -> None:
    async def run() -> None:
        url = node.exec_url(["sh", "-c", "exec <&-; sleep 1; echo unread"], stdin=True)
        async with spdy_command(url, "stdin", "stdout", "stderr") as command:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.8):
                    for _ in range(200):
                        await command["stdin"].write(b"x" * 32_768)
            assert await command["stdout"].read_all() == b"unread\n"
            assert (await command.status())["status"] == "Success"

    asyncio.run(run())


def test_a_command_that_cannot_be_started_is_explained(node: Node) -> None:
    async def run() -> None:
        async with spdy_command(node.exec_url(["no-such-program"]), "stdout", "stderr") as command:
            status = await command.status()
            assert status["reason"] == "InternalError"
            assert "no-such-program" in status["message"]

    asyncio.run(run())


def test_a_client_that_goes_ends_the_shell_of_its_terminal(node: Node) -> None:
    async def run() -> None:
        async with spdy_command(node.exec_url(["sh"], tty=True, stdin=True), "stdin", "stdout", "resize") as command:
            await command["stdin"].write(b"echo $((6*7)); exec sleep 1234\n")
            await command["stdout"].read_until(b"42")

    asyncio.run(run())  # the fixture finds the process if it is still there


def test_a_client_that_goes_ends_the_input(node: Node) -> None:
    async def run() -> None:
        async with spdy_command(node.exec_url(["cat"], stdin=True), "stdin", "stdout", "stderr") as command:
            await command["stdin"].write(b"hello")
            await command["stdout"].read_until(b"hello")

    asyncio.run(run())


def test_a_client_that_does_not_read_delays_neither_the_stop_nor_others(node: Node, busybox: str) -> None:
    victim = node.client.run(node.pod, busybox, ["sleep", "1000"], name="victim")

    async def run() -> None:
        async with spdy_command(node.exec_url(["yes"], container=victim), "stdout", "stderr") as deaf:
            deaf.client.stop_listening()
            await asyncio.sleep(0.5)
            async with spdy_command(node.exec_url(["echo", "hello"]), "stdout", "stderr") as other:
                assert await other["stdout"].read_all() == b"hello\n"

            began = time.monotonic()
            await asyncio.to_thread(node.client.stop, victim, 0)
            assert time.monotonic() - began < 3

    asyncio.run(run())
    node.client.remove(victim)


# WebSocket


def test_v5_of_the_websocket_protocol_ends_input_and_closes_with_the_status(node: Node) -> None:
    async def run() -> None:
        url = node.exec_url(["sh", "-c", "cat; echo err >&2; exit 7"], stdin=True)
        async with websocket_client(url, ["v5.channel.k8s.io"]) as client:
            await client.send(b"\0hello")
            await client.send(b"\xff\0")
            await client.until_closed()

            assert (client.channel(1), client.channel(2)) == (b"hello", b"err\n")
            assert json.loads(client.channel(3))["details"]["causes"] == EXIT_CODE
            assert (client.protocol, client.close_code) == ("v5.channel.k8s.io", 1000)

    asyncio.run(run())


def test_v4_of_the_websocket_protocol_with_a_terminal(node: Node) -> None:
    async def run() -> None:
        async with websocket_client(node.exec_url(["sh"], tty=True, stdin=True), ["v4.channel.k8s.io"]) as client:
            await client.send(b"\4" + resize(90, 40))
            await client.ping(b"beat")
            await asyncio.sleep(0.3)
            await client.send(b"\0stty size; exit\n")
            await client.until_closed()

            assert b"40 90" in client.channel(1)
            assert json.loads(client.channel(3))["status"] == "Success"
            assert client.pongs == [b"beat"]

    asyncio.run(run())


def test_the_base64_variant(node: Node) -> None:
    async def run() -> None:
        url = node.exec_url(["sh", "-c", "read line; echo $line"], stdin=True)
        async with websocket_client(url, ["base64.channel.k8s.io"]) as client:
            await client.send("0aGVsbG8K")
            await client.until_closed()

            assert "1aGVsbG8K" in client.messages

    asyncio.run(run())


# Asking


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"cmd": ["sh"], "tty": True, "stdout": True, "stderr": True}, "stderr"),
        ({"cmd": ["sh"]}, "at least one"),
        ({"stdout": True}, "cmd"),
    ],
)
def test_requests_that_make_no_sense_are_refused(node: Node, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(grpc.RpcError, match=text) as refused:
        node.client.runtime.Exec(pb.ExecRequest(container_id=node.container, **fields), timeout=10)

    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_only_running_containers_are_executed_in(node: Node, busybox: str) -> None:
    created = node.client.create(node.pod, node.client.container_config(busybox, ["true"], "created"))

    for id, code in ((created, grpc.StatusCode.FAILED_PRECONDITION), ("f" * 64, grpc.StatusCode.NOT_FOUND)):
        with pytest.raises(grpc.RpcError) as refused:
            node.exec_url(["true"], container=id)
        assert refused.value.code() is code
        with pytest.raises(grpc.RpcError) as refused:
            node.attach_url(id)
        assert refused.value.code() is code
    node.client.remove(created)


async def echoes(command: Command, text: bytes) -> None:
    await command["stdin"].write(text)
    await command["stdout"].read_until(text)


def test_many_sessions_at_once(node: Node) -> None:
    async def one(number: int) -> None:
        url = await asyncio.to_thread(node.exec_url, ["cat"], stdin=True)
        async with spdy_command(url, "stdin", "stdout", "stderr") as command:
            await echoes(command, b"session %d" % number)
            await command["stdin"].close()
            assert (await command.status())["status"] == "Success"

    async def run() -> None:
        await asyncio.gather(*(one(number) for number in range(20)))

    asyncio.run(run())
