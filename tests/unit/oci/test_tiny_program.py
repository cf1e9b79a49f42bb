import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from oci import tiny_program
from oci.errors import Unimplemented
from oci.linux import proc


def executable(path: Path, program: bytes) -> Path:
    path.write_bytes(program)
    path.chmod(0o755)
    return path


def test_the_program_that_exits_exits_with_0(tmp_path: Path) -> None:
    program = tiny_program.that_exits()

    assert subprocess.run([executable(tmp_path / "exit", program)], check=False).returncode == 0
    assert len(program) < 150


def test_the_program_that_pauses_sleeps_without_zombies_until_it_is_killed(tmp_path: Path) -> None:
    process = subprocess.Popen([executable(tmp_path / "pause", tiny_program.that_pauses())])
    try:
        deadline = time.monotonic() + 10
        while (stat := proc.stat(process.pid)) is None or stat.state != "S" or not ignores_children(process.pid):
            assert time.monotonic() < deadline, "it does not sleep"
        os.kill(process.pid, signal.SIGCHLD)
        time.sleep(0.05)
        assert process.poll() is None
    finally:
        process.kill()
        assert process.wait(10) == -signal.SIGKILL


def ignores_children(pid: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    ignored = next(int(line.split()[1], 16) for line in lines if line.startswith("SigIgn:"))
    return bool(ignored >> (signal.SIGCHLD - 1) & 1)


def test_a_machine_that_no_program_is_written_for_is_named() -> None:
    with pytest.raises(Unimplemented, match="vax"):
        tiny_program.that_pauses("vax")
