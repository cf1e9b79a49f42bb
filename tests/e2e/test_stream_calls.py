"""Exec, Attach and PortForward by the CRI's own calls, each with what its request asks for; the rest is streaming's."""

import asyncio

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.harness.client import Client
from tests.fakes.stream_client import open_port, spdy_client, spdy_command

FOR_EVER = ["sleep", "100000"]


def test_a_command_s_output_and_errors_come_apart(client: Client, busybox: str) -> None:
    container_id = client.run(client.run_pod("exec"), busybox, FOR_EVER)

    answer = client.exec_sync(container_id, ["sh", "-c", "echo out; echo err >&2; exit 3"])

    assert (answer.stdout, answer.stderr, answer.exit_code) == (b"out\n", b"err\n", 3)


def test_a_command_s_streams_are_those_that_were_asked_for(client: Client, busybox: str) -> None:
    container_id = client.run(client.run_pod("exec"), busybox, FOR_EVER)

    def url(command: str, **streams: bool) -> str:
        request = pb.ExecRequest(container_id=container_id, cmd=["sh", "-c", command], **streams)
        answer: str = client.runtime.Exec(request, timeout=20).url
        return answer

    async def run() -> None:
        all_three = url("cat; echo err >&2", stdin=True, stdout=True, stderr=True)
        async with spdy_command(all_three, "stdin", "stdout", "stderr") as command:
            await command["stdin"].write(b"in", fin=True)
            assert await command["stdout"].read_all() == b"in"
            assert await command["stderr"].read_all() == b"err\n"
        terminal = url("tty", stdout=True, tty=True)
        async with spdy_command(terminal, "stdout", "resize") as command:
            assert (await command["stdout"].read_all()).startswith(b"/dev/")

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_container_is_attached_to_with_the_streams_that_were_asked_for(client: Client, busybox: str) -> None:
    pod = client.run_pod("attach")
    script = ["sh", "-c", "read word; echo got $word; echo err >&2"]
    plain = client.run(pod, busybox, script, "plain", stdin=True, stdin_once=True)
    terminal = client.run(pod, busybox, script, "terminal", stdin=True, stdin_once=True, tty=True)

    def url(container_id: str, **streams: bool) -> str:
        answer: str = client.runtime.Attach(pb.AttachRequest(container_id=container_id, **streams), timeout=20).url
        return answer

    async def run() -> None:
        async with spdy_command(
            url(plain, stdin=True, stdout=True, stderr=True), "stdin", "stdout", "stderr"
        ) as command:
            await command["stdin"].write(b"word\n", fin=True)
            assert await command["stdout"].read_all() == b"got word\n"
            assert await command["stderr"].read_all() == b"err\n"
        attached = url(terminal, stdin=True, stdout=True, tty=True)
        async with spdy_command(attached, "stdin", "stdout", "resize") as command:
            await command["stdin"].write(b"word\n")
            assert b"got word\r\n" in await command["stdout"].read_all()

    asyncio.run(asyncio.wait_for(run(), 20))
    assert client.wait_exited(plain).exit_code == 0


def test_a_port_of_a_pod_is_forwarded_to(client: Client, busybox: str) -> None:
    pod = client.run_pod("forward")
    served = ["sh", "-c", "echo served > /tmp/index.html; exec httpd -f -p 127.0.0.1:8080 -h /tmp"]
    container_id = client.run(pod, busybox, served)
    client.exec_sync(container_id, ["sh", "-c", "until wget -qO- 127.0.0.1:8080; do sleep 0.1; done"])
    url = client.runtime.PortForward(pb.PortForwardRequest(pod_sandbox_id=pod.id, port=[8080]), timeout=20).url

    async def run() -> None:
        async with spdy_client(url, ["portforward.k8s.io"]) as session:
            data, _ = await open_port(session, 8080)
            await data.write(b"GET /index.html HTTP/1.0\r\n\r\n")
            assert (await data.read_all()).endswith(b"served\n")

    asyncio.run(asyncio.wait_for(run(), 20))
