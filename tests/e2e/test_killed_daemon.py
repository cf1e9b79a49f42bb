"""The daemon is killed and started again, at any moment; pods, containers, logs and exit codes do not notice."""

import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import grpc
import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.harness.client import Client, Pod, log_text
from tests.e2e.harness.daemon import Daemon

FOR_EVER = ["sleep", "100000"]
T = TypeVar("T")


@pytest.fixture
def restarted(daemon: Daemon) -> Iterator[Daemon]:
    """A daemon that runs again after the test, whatever the test has done to it."""
    yield daemon
    if daemon.process is None or daemon.process.poll() is not None:
        daemon.kill()
        daemon.start()


def test_everything_goes_on_without_the_daemon_and_is_known_to_the_next(
    restarted: Daemon, client: Client, busybox: str
) -> None:
    pod = client.run_pod("goes-on", labels={"a": "b"})
    running = client.run(pod, busybox, ["sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done"])
    created = client.create(pod, client.container_config(busybox, ["echo", "late"], "created"))
    before, pod_before = client.status(running), client.pod_status(pod.id)

    restarted.kill()
    time.sleep(1)
    restarted.start()

    assert client.status(running) == before
    assert client.pod_status(pod.id) == pod_before
    assert client.exec_sync(running, ["echo", "still", "there"]).stdout == b"still there\n"
    client.start(created)
    client.wait_exited(created)
    assert client.log(pod, "created") == "late\n"
    client.stop(running)
    assert_counts_without_a_gap(client.log(pod))


def assert_counts_without_a_gap(text: str) -> None:
    numbers = [int(line) for line in text.splitlines()]
    assert len(numbers) > 15
    assert numbers == list(range(len(numbers)))


def test_a_container_that_ended_while_the_daemon_was_down_has_its_exit_code_and_its_whole_log(
    restarted: Daemon, client: Client, busybox: str
) -> None:
    pod = client.run_pod("ended")
    command = ["sh", "-c", "sleep 0.5; seq 1 50000; exit 42"]
    container_id = client.run(pod, busybox, command)
    started = time.time_ns()

    restarted.kill()
    time.sleep(2)
    restarted.start()

    ended = client.status(container_id)
    assert (ended.state, ended.exit_code, ended.reason) == (pb.CONTAINER_EXITED, 42, "Error")
    assert 0.2e9 < ended.finished_at - started < 1.9e9
    assert client.log(pod) == "".join(f"{number}\n" for number in range(1, 50001))


def test_a_container_that_the_runtime_had_started_when_the_daemon_died_is_running(
    restarted: Daemon, client: Client, busybox: str
) -> None:
    pod = client.run_pod("half-started")
    before_restart = client.create(pod, client.container_config(busybox, FOR_EVER, "first"))
    behind_its_back = client.create(pod, client.container_config(busybox, FOR_EVER, "second"))

    restarted.kill()
    start_by_hand(restarted, before_restart)
    restarted.start()
    start_by_hand(restarted, behind_its_back)
    client.start(behind_its_back)

    assert client.status(before_restart).state == pb.CONTAINER_RUNNING
    assert client.status(behind_its_back).state == pb.CONTAINER_RUNNING
    client.stop(before_restart)


def start_by_hand(daemon: Daemon, container_id: str) -> None:
    """What a daemon had done that died before it could write it down."""
    root = next((daemon.run_dir / "runtimes").glob(f"*/{container_id}")).parent
    program = shutil.which(root.name)
    assert program is not None
    subprocess.run([program, "--root", str(root), "start", container_id], check=True, stdin=subprocess.DEVNULL)


def test_a_pod_can_be_stopped_and_removed_by_the_next_daemon(restarted: Daemon, client: Client, busybox: str) -> None:
    pod = client.run_pod("next")
    client.run(pod, busybox, FOR_EVER)

    restarted.kill()
    restarted.start()

    client.remove_pod(pod.id)
    assert not client.pods()


def test_the_daemon_ends_when_it_is_asked_to_and_leaves_the_pods_alone(
    restarted: Daemon, client: Client, busybox: str
) -> None:
    pod = client.run_pod("alone")
    container_id = client.run(pod, busybox, FOR_EVER)
    started_at = client.status(container_id).started_at

    assert restarted.stop(10) == 0
    restarted.start()

    assert client.status(container_id).state == pb.CONTAINER_RUNNING
    assert client.status(container_id).started_at == started_at


def test_after_a_reboot_all_is_dead_and_can_be_cleaned_up(restarted: Daemon, client: Client, busybox: str) -> None:
    pod = client.run_pod("rebooted")
    container_id = client.run(pod, busybox, FOR_EVER)
    created = client.create(pod, client.container_config(busybox, FOR_EVER, "created"))
    assert restarted.network.leased()

    simulate_reboot(restarted)

    assert client.pod_status(pod.id).state == pb.SANDBOX_NOTREADY
    for dead in (container_id, created):
        assert client.status(dead).state == pb.CONTAINER_EXITED
    assert restarted.network.leased() == []
    another = client.run_pod("after")
    client.run(another, busybox, FOR_EVER)
    client.remove_pod(pod.id)
    assert [each.id for each in client.pods()] == [another.id]


def simulate_reboot(daemon: Daemon) -> None:
    """Everything in memory ends (processes, mounts, network, tmpfs); what is on disk stays; the boot id is another."""
    daemon.kill()
    daemon.lose_memory()
    daemon.start()


def test_ten_kills_in_a_loop_of_fifty_pods_leave_nothing(restarted: Daemon, busybox: str) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")  # shown by pytest when it fails
    choose = random.Random(seed)
    done = threading.Event()
    codes: dict[int, int] = {}
    before = restarted.traces()

    def run_pods() -> None:
        try:
            numbers = iter(range(50))
            lock = threading.Lock()

            def take() -> None:
                client = restarted.client()
                while True:
                    with lock:
                        number = next(numbers, None)
                    if number is None:
                        return
                    codes[number] = one_pod(client, number, busybox)

            workers = [threading.Thread(target=take) for _ in range(4)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            done.set()

    loop = threading.Thread(target=run_pods)
    loop.start()
    for _ in range(10):
        done.wait(choose.uniform(0.0, 1.0))
        restarted.kill()
        time.sleep(choose.uniform(0.0, 0.3))
        restarted.start()
    loop.join(240)

    assert done.is_set(), restarted.log_tail()
    assert codes == {number: number % 7 for number in range(50)}
    client = restarted.client()
    assert not client.pods()
    assert not client.containers()
    restarted.nothing_added(before, 45)  # a monitor whose daemon died before it was told anything waits for 30 s


def one_pod(client: Client, number: int, image: str) -> int:
    """The exit code of a container in a pod that is run and removed, with every call made again as kubelet does."""
    config = client.pod_config(f"loop-{number}")
    pod = stubborn(lambda: client.run_pod(config=config))
    wanted = client.container_config(image, ["sh", "-c", f"echo {number}; exit {number % 7}"])
    container_id = stubborn(lambda: create_once(client, pod, wanted))
    stubborn(lambda: start_once(client, container_id))
    ended = stubborn(lambda: client.wait_exited(container_id))
    text = log_text(Path(ended.log_path))
    assert text == f"{number}\n", (number, text)
    stubborn(lambda: client.remove(container_id))
    stubborn(lambda: client.remove_pod(pod.id))
    return ended.exit_code


def create_once(client: Client, pod: Pod, config: pb.ContainerConfig) -> str:
    """The container, whether this call makes it or one whose answer was lost did."""
    for each in client.containers():
        if each.pod_sandbox_id == pod.id and each.metadata == config.metadata:
            client.ids.add(each.id)
            return each.id
    return client.create(pod, config)


def start_once(client: Client, container_id: str) -> None:
    if client.status(container_id).state == pb.CONTAINER_CREATED:
        client.start(container_id)


def stubborn(call: Callable[[], T], timeout_s: float = 60) -> T:
    """The result of `call`, tried again for as long as the daemon is not there."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_a_second_daemon_does_not_take_the_first_one_s_place(restarted: Daemon, client: Client) -> None:
    config = restarted.directory / "crito.toml"
    command = [str(restarted.program), "serve", "--config", str(config)]

    second = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False, env=dict(os.environ)
    )

    assert second.returncode != 0
    assert second.stderr
    assert client.runtime.Version(pb.VersionRequest(), timeout=5).runtime_name == "crito"
