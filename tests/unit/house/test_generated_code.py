"""The generated code of the CRI and of NRI is what their api.proto files say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PLAIN, GRPC = ("--python_out", "--mypy_out"), ("--python_out", "--mypy_out", "--grpc_python_out")
MADE = {"--python_out": "api_pb2.py", "--mypy_out": "api_pb2.pyi", "--grpc_python_out": "api_pb2_grpc.py"}
PROTOS = {
    "cri/api/runtime/v1/api.proto": GRPC,
    "cri/api/nri/v1alpha1/api.proto": PLAIN,
    "cri/api/ttrpc/api.proto": PLAIN,
}


@pytest.mark.parametrize("name", sorted(PROTOS))
def test_the_generated_code_is_what_the_compiler_makes_of_the_proto(name: str, tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    proto, out = Path(name), PROTOS[name]
    # The compiler finds its mypy plugin on the PATH, beside this interpreter.
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *(f"{each}={tmp_path}" for each in out), str(proto)]
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, timeout=120)

    for each in out:
        file = proto.with_name(MADE[each])
        assert (tmp_path / file).read_text() == (ROOT / file).read_text(), f"{file} differs: run `make proto`"
