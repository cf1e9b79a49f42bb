"""The canary: a container of one tiny program, of which nothing stays."""

import asyncio
from pathlib import Path

import pytest

from oci import runtime as runtimes
from oci.linux.cgroup import Driver
from oci.runtime import Runtime


@pytest.mark.parametrize("name", ["crun", "runc"])
def test_a_canary_takes_away_what_a_killed_daemon_has_left_of_one(name: str, tmp_path: Path) -> None:
    found = runtimes.find()
    if name not in found:
        pytest.skip(f"{name} is not installed")
    runtime = Runtime(name, found[name], tmp_path / "runtime", Driver.CGROUPFS)
    (tmp_path / "root" / "canary-0123" / "rootfs").mkdir(parents=True)
    other = tmp_path / "root" / "state.db"
    other.touch()

    result = asyncio.run(runtime.canary(tmp_path / "root", "/"))

    assert result.ok, result.reason
    assert list((tmp_path / "root").iterdir()) == [other]
