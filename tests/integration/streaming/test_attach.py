"""Attach to real containers."""

import asyncio
import json

from tests.fakes.stream_client import spdy_command, websocket_client
from tests.integration.streaming.conftest import Node


def test_a_shell_with_stdin_once_is_talked_to_and_ends_with_its_input(node: Node, busybox: str) -> None:
    shell = node.client.run(node.pod, busybox, ["sh"], name="shell", stdin=True, stdin_once=True)

    async def run() -> None:
        async with spdy_command(node.attach_url(shell), "stdin", "stdout", "stderr") as attached:
            await attached["stdin"].write(b"echo hello; echo oops >&2\n")
            await attached["stdout"].read_until(b"hello\n")
            await attached["stderr"].read_until(b"oops\n")
            await attached["stdin"].close()

            assert await attached["stdout"].read_all() == b"hello\n"
            assert (await attached.status())["status"] == "Success"

    asyncio.run(run())
    assert node.client.wait_exited(shell).exit_code == 0
    assert node.client.log(node.pod, "shell") == "hello\noops\n"
    node.client.remove(shell)


def test_without_stdin_once_the_container_takes_one_client_after_the_other(node: Node, busybox: str) -> None:
    shell = node.client.run(node.pod, busybox, ["sh"], name="open", stdin=True)

    async def talk(text: bytes) -> None:
        async with spdy_command(node.attach_url(shell), "stdin", "stdout", "stderr") as attached:
            await attached["stdin"].write(b"echo " + text + b"\n")
            await attached["stdout"].read_until(text)

    asyncio.run(talk(b"first"))
    asyncio.run(talk(b"second"))
    node.client.stop(shell)
    node.client.remove(shell)


def test_a_terminal_is_attached_to_and_resized(node: Node, busybox: str) -> None:
    shell = node.client.run(node.pod, busybox, ["sh"], name="terminal", stdin=True, tty=True)

    async def run() -> None:
        url = node.attach_url(shell, tty=True)
        async with websocket_client(url, ["v5.channel.k8s.io"]) as attached:
            await attached.send(b"\4" + json.dumps({"Width": 111, "Height": 22}).encode())
            await asyncio.sleep(0.3)
            await attached.send(b"\0stty size\n")
            await attached.until(1, b"22 111")
            await attached.send(b"\0exit 5\n")
            await attached.until_closed()

            assert json.loads(attached.channel(3))["status"] == "Success"

    asyncio.run(run())
    assert node.client.wait_exited(shell).exit_code == 5
    node.client.remove(shell)


def test_several_clients_see_the_same(node: Node, busybox: str) -> None:
    talker = node.client.run(node.pod, busybox, ["sh", "-c", "while sleep 0.1; do echo tick; done"], name="talker")

    async def run() -> None:
        urls = [node.attach_url(talker, stdin=False) for _ in range(3)]

        async def listen(url: str) -> None:
            async with spdy_command(url, "stdout", "stderr") as attached:
                await attached["stdout"].read_until(b"tick\ntick\n")

        await asyncio.gather(*(listen(url) for url in urls))

    asyncio.run(run())
    node.client.stop(talker)
    node.client.remove(talker)


def test_a_client_that_does_not_read_is_let_go_and_told_why(node: Node, busybox: str) -> None:
    shell = node.client.run(node.pod, busybox, ["sh"], name="flood", stdin=True)

    async def run() -> None:
        async with spdy_command(node.attach_url(shell), "stdin", "stdout", "stderr") as deaf:
            deaf.client.stop_listening()
            await deaf["stdin"].write(b"head -c 64000000 /dev/zero\n")
            async with spdy_command(node.attach_url(shell, stdin=False, stdout=False), "stderr") as other:
                await deaf["stdin"].write(
                    b"echo still here >&2\n"
                )  # nobody else waits for long, nor does the container
                await other["stderr"].read_until(b"still here")

            deaf.client.listen()
            status = await deaf.status()
            assert status["status"] == "Failure"
            assert "does not read" in status["message"]

    asyncio.run(run())
    node.client.stop(shell)
    node.client.remove(shell)


def test_a_client_that_reads_gets_all_that_a_faster_container_writes(node: Node, busybox: str) -> None:
    shell = node.client.run(node.pod, busybox, ["sh"], name="burst", stdin=True, stdin_once=True)

    async def run() -> None:
        async with spdy_command(node.attach_url(shell), "stdin", "stdout", "stderr") as attached:
            await attached["stdin"].write(b"head -c 64000000 /dev/zero\n")
            await attached["stdin"].close()

            assert await attached["stdout"].read_all() == bytes(64_000_000)
            assert (await attached.status())["status"] == "Success"

    asyncio.run(run())
    node.client.remove(shell)
