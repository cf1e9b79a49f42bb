"""What end-to-end tests share: a registry with a test image, and daemons of their own."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import crictl as crictl_module
from tests.e2e.harness import network, registry
from tests.e2e.harness.client import Client
from tests.e2e.harness.crictl import Crictl
from tests.e2e.harness.daemon import CRITO, Daemon
from tests.e2e.harness.images import busybox_image
from tests.e2e.harness.registry import Registry, running_registry


def _missing() -> str:
    if os.geteuid() != 0:
        return "needs root"
    if not CRITO.exists():
        return f"{CRITO} is not installed"
    if not registry.PROGRAM:
        return "docker-registry is not installed"
    if missing := network.missing_plugins():
        return f"CNI plugins are not installed: {', '.join(missing)}"
    return ""


@pytest.fixture(scope="session")
def directory() -> Iterator[Path]:
    """Short, because the path of a UNIX socket has 107 bytes at most."""
    if missing := _missing():
        pytest.skip(missing)
    with tempfile.TemporaryDirectory(prefix="crito-e2e-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o711)  # as /run and /var/lib: roots of user namespaces pass through
        yield Path(name)


@pytest.fixture(scope="session")
def image_registry(directory: Path) -> Iterator[Registry]:
    with running_registry(directory / "registry") as running:
        yield running


@pytest.fixture(scope="session")
def busybox(image_registry: Registry) -> str:
    """The reference of an image with busybox, as it can be pulled."""
    return image_registry.push(busybox_image(), "test/busybox", "1")


MakeDaemon = Callable[..., Daemon]


@pytest.fixture(scope="module")
def make_daemon(directory: Path, image_registry: Registry, busybox: str) -> Iterator[MakeDaemon]:
    """Daemons that run, have pulled the test image and have made their first pod; all end with the module."""
    made: list[Daemon] = []

    def make(settings: Mapping[str, Any] | None = None) -> Daemon:
        home = Path(tempfile.mkdtemp(prefix="d", dir=directory))
        home.chmod(0o711)
        daemon = Daemon(home, settings)
        made.append(daemon)
        daemon.registries_conf.write_text(f'[[registry]]\nlocation = "{image_registry.host}"\ninsecure = true\n')
        daemon.start()
        warm_up(daemon, busybox)
        return daemon

    yield make
    for daemon in made:
        daemon.destroy()


def warm_up(daemon: Daemon, image: str) -> None:
    """Whatever is made once and stays (bridge, cgroup parents, the firewall's chains) is there after this."""
    client = daemon.client()
    client.pull(image)
    pod = client.run_pod("warm-up")
    client.run(pod, image, ["true"])
    client.remove_pod(pod.id)
    client.close()


@pytest.fixture(scope="module")
def shared_daemon(make_daemon: MakeDaemon) -> Daemon:
    return make_daemon()


@pytest.fixture
def daemon(shared_daemon: Daemon) -> Iterator[Daemon]:
    """The module's daemon; what a test has made of it must be gone when the test ends."""
    before = shared_daemon.traces()
    yield shared_daemon
    client = shared_daemon.client()
    client.remove_everything()
    client.close()
    shared_daemon.nothing_added(before)


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    made = daemon.client()
    yield made
    made.close()


@pytest.fixture
def crictl(daemon: Daemon) -> Crictl:
    if not crictl_module.PROGRAM:
        pytest.skip("crictl is not installed")
    return Crictl(daemon.socket, daemon.directory)
