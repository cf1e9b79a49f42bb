"""Crito as a service of systemd: started, watched, restarted, killed and stopped, with pods that do not notice."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.harness.client import Client
from tests.e2e.harness.images import busybox_image
from tests.e2e.harness.ports import wait_until
from tests.e2e.harness.registry import running_registry
from tests.vm import node

pytestmark = node.only_in_the_machine

TICKS = ["sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done"]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The unit runs, and an image is there to be pulled."""
    with running_registry(tmp_path_factory.mktemp("registry")) as registry:
        node.install(registry.host)
        node.systemctl("start", "crito.service")
        yield registry.push(busybox_image(), "test/busybox", "1")
        node.systemctl("stop", "crito.service")


@pytest.fixture
def client(image: str) -> Iterator[Client]:
    client = node.connected()
    client.pull(image)
    yield client
    client.remove_everything()
    node.wait_until_nothing_is_left(sorted(client.ids))
    client.close()


def numbers(client: Client, container_id: str) -> list[int]:
    """What a container that counts has logged."""
    lines = Path(client.status(container_id).log_path).read_text().splitlines()
    return [int(line.split(" ", 3)[3]) for line in lines]


def goes_on(client: Client, container_id: str, pid: int, exec_works: bool = True) -> None:
    """The container is the same process, and has lost no line of its log."""
    assert client.status(container_id).state == pb.CONTAINER_RUNNING
    assert node.is_alive(pid)
    assert node.pid_of(client, container_id) == pid
    if exec_works:
        assert client.exec_sync(container_id, ["echo", "hello"]).stdout == b"hello\n"
    seen = numbers(client, container_id)
    assert seen == list(range(1, len(seen) + 1))
    wait_until(lambda: len(numbers(client, container_id)) > len(seen), "its log grows", 5)


def test_the_unit_is_active_once_the_daemon_answers(client: Client) -> None:
    assert node.show("ActiveState") == "active"
    assert node.show("StatusText").startswith("serving on")
    assert node.is_ready(client), node.journal()
    driver = client.runtime.RuntimeConfig(pb.RuntimeConfigRequest(), timeout=10).linux.cgroup_driver
    assert driver == pb.SYSTEMD


def test_pods_and_containers_are_scopes_in_the_slice_that_kubelet_names(client: Client, image: str) -> None:
    pod = client.run_pod("scopes", linux=pb.LinuxPodSandboxConfig(cgroup_parent="/kubepods.slice/kubepods-podx.slice"))
    container_id = client.run(pod, image, TICKS)

    pod_cgroup = Path("/sys/fs/cgroup/kubepods.slice/kubepods-podx.slice")
    assert {each.name for each in pod_cgroup.iterdir() if each.is_dir()} == {
        f"crito-{pod.id}.scope",
        f"crito-{container_id}.scope",
    }


def test_a_pod_without_a_parent_goes_to_the_system_slice(client: Client) -> None:
    config = client.pod_config("no-parent")
    config.linux.cgroup_parent = ""
    pod = client.run_pod(config=config)
    assert Path(f"/sys/fs/cgroup/system.slice/crito-{pod.id}.scope").is_dir()


def test_pods_do_not_notice_a_restart_of_the_service(client: Client, image: str) -> None:
    container_id = client.run(client.run_pod("restart"), image, TICKS)
    pid = node.pid_of(client, container_id)

    node.systemctl("restart", "crito.service")

    goes_on(client, container_id, pid)


def test_what_ends_while_the_service_is_stopped_has_its_exit_code_and_log(client: Client, image: str) -> None:
    pod = client.run_pod("stopped")
    going_on = client.run(pod, image, TICKS, "going-on")
    ending = client.run(pod, image, ["sh", "-c", "sleep 2; echo the last words; exit 7"], "ending")
    pid = node.pid_of(client, going_on)

    node.systemctl("stop", "crito.service")
    assert node.show("ActiveState") == "inactive"
    time.sleep(3)
    assert node.is_alive(pid)
    node.systemctl("start", "crito.service")

    goes_on(client, going_on, pid)
    status = client.wait_exited(ending, 5)
    assert status.exit_code == 7
    assert "the last words" in Path(status.log_path).read_text()


def test_systemd_starts_a_killed_daemon_again(client: Client, image: str) -> None:
    container_id = client.run(client.run_pod("killed"), image, TICKS)
    pid, daemon = node.pid_of(client, container_id), node.main_pid()

    os.kill(daemon, signal.SIGKILL)
    node.wait_for_another_daemon(daemon)

    goes_on(client, container_id, pid)


def test_a_daemon_that_stands_still_is_started_anew_by_the_watchdog(client: Client, image: str) -> None:
    container_id = client.run(client.run_pod("watchdog"), image, TICKS)
    pid = node.pid_of(client, container_id)
    node.configure_unit("[Service]\nWatchdogSec=2\nTimeoutAbortSec=1\n")
    node.systemctl("restart", "crito.service")
    daemon = node.main_pid()
    time.sleep(4)
    assert node.main_pid() == daemon, "one that is well is left alone"

    os.kill(daemon, signal.SIGSTOP)
    node.wait_for_another_daemon(daemon)
    node.configure_unit("")

    assert "atchdog" in node.journal()
    goes_on(client, container_id, pid)


def test_with_no_pods_a_stopped_service_leaves_no_process(client: Client) -> None:
    client.remove_everything()
    cgroup = Path("/sys/fs/cgroup/system.slice/crito.service/cgroup.procs")

    node.systemctl("stop", "crito.service")

    wait_until(lambda: not cgroup.exists() or not cgroup.read_text().split(), "no process is left", 5)
    node.systemctl("start", "crito.service")


def test_memory_that_one_container_lacks_ends_neither_service_nor_monitors(client: Client, image: str) -> None:
    pod = client.run_pod("oom")
    going_on = client.run(pod, image, TICKS, "going-on")
    pid, daemon = node.pid_of(client, going_on), node.main_pid()
    limits = pb.LinuxContainerConfig(resources=pb.LinuxContainerResources(memory_limit_in_bytes=16 << 20))
    hungry = client.run(pod, image, ["sh", "-c", "dd if=/dev/zero of=/dev/null bs=64M"], "hungry", linux=limits)

    status = client.wait_exited(hungry)

    assert (status.reason, status.exit_code) == ("OOMKilled", 137)
    assert node.main_pid() == daemon
    goes_on(client, going_on, pid)


def test_without_the_message_bus_the_error_says_so_and_nothing_is_left(client: Client, image: str) -> None:
    container_id = client.run(client.run_pod("before"), image, TICKS)
    pid = node.pid_of(client, container_id)
    before = {each.id for each in client.pods()}
    bus = Path("/run/dbus/system_bus_socket")
    hidden = bus.rename(bus.with_name("hidden"))
    try:
        with pytest.raises(Exception, match="D-Bus"):
            client.run_pod("no-bus", timeout_s=30)
        assert {each.id for each in client.pods()} == before
        goes_on(client, container_id, pid, exec_works=False)
    finally:
        hidden.rename(bus)
    goes_on(client, container_id, pid)
