"""A real daemon on a file system that keeps account of projects tells at once what a container has written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.harness.daemon import Daemon
from tests.fakes.accounted_disk import MAKE, accounted_disk

MIB = 1 << 20


@pytest.mark.parametrize("kind", MAKE)
def test_stats_tell_what_a_container_has_written_until_now_also_after_a_restart(
    make_daemon: Callable[..., Daemon], busybox: str, tmp_path: Path, kind: str
) -> None:
    daemon = make_daemon()
    daemon.stop()
    with accounted_disk(kind, tmp_path / "image", daemon.root):
        daemon.start()
        client = daemon.client()
        client.pull(busybox)
        pod = client.run_pod("writes")
        container_id = client.run(pod, busybox, ["sleep", "1000"])

        def written() -> int:
            request = pb.ContainerStatsRequest(container_id=container_id)
            return int(client.runtime.ContainerStats(request, timeout=30).stats.writable_layer.used_bytes.value)

        def write(name: str) -> None:
            command = ["dd", "if=/dev/urandom", f"of=/{name}", "bs=1M", "count=4"]
            request = pb.ExecSyncRequest(container_id=container_id, cmd=command, timeout=30)
            assert client.runtime.ExecSync(request, timeout=60).exit_code == 0

        assert written() < MIB
        write("one")
        assert 4 * MIB <= written() < 5 * MIB
        daemon.restart()
        assert 4 * MIB <= written() < 5 * MIB
        write("two")
        assert 8 * MIB <= written() < 9 * MIB
        client.remove_pod(pod.id)
        daemon.stop()
    daemon.start()
