"""`crito check` on this host: real mounts and real runtimes, of which nothing stays."""

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def checked(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "cri", "check", "--json", "--crito-root", str(tmp_path / "root")]
    command += ["--crito-run-dir", str(tmp_path / "run"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    return done.returncode, {finding["name"]: finding for finding in json.loads(done.stdout)}


def runtime(tmp_path: Path, script: str) -> Path:
    path = tmp_path / "runtime"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def left(tmp_path: Path) -> list[str]:
    """What is left of a check; a canary of somebody else's daemon, seen by chance, gets time to go."""
    deadline = time.monotonic() + 5
    while cgroups := [str(path) for path in Path("/sys/fs/cgroup").rglob("crito-canary-*")]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    files = [str(path) for path in tmp_path.rglob("*") if path.name != "runtime"]
    return [line for line in mounts if str(tmp_path) in line] + cgroups + files


def test_what_was_tried_leaves_nothing(tmp_path: Path) -> None:
    _, findings = checked(tmp_path)

    assert findings["overlayfs"]["ok"]
    assert left(tmp_path) == []


def test_a_runtime_that_cannot_run_anything_says_why(tmp_path: Path) -> None:
    path = runtime(tmp_path, "echo 'no kernel today' >&2; exit 1")

    status, findings = checked(
        tmp_path, "--runtime-handler", f"broken.path={path}", "--runtime-default-handler", "broken"
    )

    assert status == 1
    assert "no kernel today" in findings["runtime broken"]["seen"]
    assert not findings["default runtime"]["ok"]
    assert left(tmp_path) == []


def test_cni_is_described_with_what_it_lacks(tmp_path: Path) -> None:
    conf = tmp_path / "cni"
    conf.mkdir()
    (conf / "10-a.conflist").write_text('{"cniVersion": "1.0.0", "name": "a", "plugins": [{"type": "no-such"}]}')

    _, findings = checked(tmp_path, "--network-conf-dir", str(conf), "--network-plugin-dirs", str(tmp_path))

    assert findings["CNI configuration"]["seen"] == "a"
    assert findings["CNI plugins of a"]["seen"] == f"no-such not in {tmp_path}"
