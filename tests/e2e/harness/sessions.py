"""What kubectl's sessions print, awaited; and the ports that one of them forwards."""

import os
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.e2e.harness.cluster import Kubectl
from tests.e2e.harness.ports import free_port


def read_until(fd: int, expected: bytes, timeout_s: float = 30) -> bytes:
    """What comes up to `expected`, and what came with it."""
    read = b""
    deadline = time.monotonic() + timeout_s
    while expected not in read:
        ready, _, _ = select.select([fd], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"no {expected!r} within {timeout_s} s, but {read[-2000:]!r}")
        if not (data := os.read(fd, 1 << 16)):
            raise EOFError(f"ended before {expected!r}, with {read[-2000:]!r}")
        read += data
    return read


@contextmanager
def forwarded(kubectl: Kubectl, pod: str, *ports: int) -> Iterator[list[int]]:
    """The local ports, which lead to `ports` of the pod."""
    local = [free_port() for _ in ports]
    pairs = [f"{here}:{there}" for here, there in zip(local, ports, strict=True)]
    with kubectl.session("port-forward", f"pod/{pod}", *pairs) as session:
        assert session.stdout is not None
        read_until(session.stdout.fileno(), f"Forwarding from 127.0.0.1:{local[-1]}".encode())
        yield local
