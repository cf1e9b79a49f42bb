"""The generated CRI code is what its api.proto says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROTO = Path("cri/api/runtime/v1/api.proto")
MADE = ("api_pb2.py", "api_pb2.pyi", "api_pb2_grpc.py")


def test_the_generated_code_is_what_the_compiler_makes_of_the_proto(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    out = ("--python_out", "--mypy_out", "--grpc_python_out")
    # The compiler finds its mypy plugin on the PATH, beside this interpreter.
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *(f"{each}={tmp_path}" for each in out), str(PROTO)]
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, timeout=120)

    for name in MADE:
        made = (tmp_path / PROTO.with_name(name)).read_text()
        assert made == (ROOT / PROTO.with_name(name)).read_text(), f"{name} differs: run `make proto`"
