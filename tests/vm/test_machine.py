"""On the host: runs the other tests of this directory in virtual machines of their own, where one can be had."""

import os
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run")
NO_MACHINE = 77  # of tests/vm/run

pytestmark = pytest.mark.skipif("V2VM" in os.environ, reason="starts virtual machines, and this is one")


def run(tests: str, **environment: str) -> None:
    """Run `tests` in a machine. Skips with the reason where there is none."""
    names = [word for name in environment for word in ("--env", name)]
    command = [str(RUN), "--timeout", "600", *names, "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == NO_MACHINE:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_as_a_service_of_systemd() -> None:
    run("tests/vm/test_service.py")


def test_on_a_node_with_systemd_cgroup_v2_and_apparmor() -> None:
    run("tests/vm/test_node.py")


@pytest.mark.parametrize("how", ["clean", "power-cut"])
def test_over_a_reboot(how: str) -> None:
    run("tests/vm/test_reboot.py", CRITO_TEST_REBOOT=how)
