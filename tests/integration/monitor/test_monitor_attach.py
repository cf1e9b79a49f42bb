"""Attaching to a running container."""

import asyncio
import os
from typing import Any


async def read_all(fd: int) -> bytes:
    """Until its end; blocking, in a thread."""

    def read() -> bytes:
        data = b""
        while chunk := os.read(fd, 65536):
            data += chunk
        return data

    return await asyncio.to_thread(read)


def test_an_attached_client_sees_what_comes_and_its_input_ends_the_stdin_once(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["sh", "-c", "cat; echo end >&2"], stdin=True, stdin_once=True)
            pipes = [os.pipe() for _ in range(3)]
            (in_read, in_write), (out_read, out_write), (err_read, err_write) = pipes

            attachment = await monitor.attach(in_read, out_write, err_write)
            for fd in (in_read, out_write, err_write):
                os.close(fd)
            os.write(in_write, b"hello\n")
            os.close(in_write)

            assert await read_all(out_read) == b"hello\n"
            assert await read_all(err_read) == b"end\n"
            assert (await monitor.wait_exit()).exit_code == 0
            assert await attachment.end() == "the container has exited"
            assert w.log("c") == b"hello\n"
            os.close(out_read)
            os.close(err_read)

    asyncio.run(main())


def test_a_client_that_never_reads_harms_neither_log_nor_container(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.created("c", ["seq", "1", "200000"])
            read, write = os.pipe()
            attachment = await monitor.attach(stdout_fd=write)
            os.close(write)

            await monitor.start(20)
            record = await asyncio.wait_for(monitor.wait_exit(), 20)

            assert record.exit_code == 0
            assert w.log("c") == b"".join(b"%d\n" % n for n in range(1, 200_001))
            assert await attachment.end() == "the client does not read"
            os.close(read)

    asyncio.run(main())


def test_a_detached_client_gets_nothing_more_and_another_goes_on(world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            monitor = await w.started("c", ["cat"], stdin=True)
            pipes = [os.pipe() for _ in range(3)]
            (in_read, in_write), (one_read, one_write), (two_read, two_write) = pipes
            one = await monitor.attach(stdout_fd=one_write)
            await monitor.attach(in_read, two_write)
            for fd in (in_read, one_write, two_write):
                os.close(fd)

            os.write(in_write, b"first\n")
            assert await asyncio.to_thread(os.read, one_read, 100) == b"first\n"
            assert await asyncio.to_thread(os.read, two_read, 100) == b"first\n"
            await one.detach()
            assert await one.end() == "detached"
            os.write(in_write, b"second\n")

            assert await asyncio.to_thread(os.read, two_read, 100) == b"second\n"
            assert await read_all(one_read) == b""
            assert (await monitor.status()).attached == 1
            for fd in (in_write, one_read, two_read):
                os.close(fd)

    asyncio.run(main())
