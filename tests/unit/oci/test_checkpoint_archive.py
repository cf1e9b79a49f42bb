"""What a checkpoint asks of the container that it shall go on in, and how its worker's troubles are told."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from oci import checkpoint_archive
from oci.checkpoint_archive import Checkpoint
from oci.criu import Criu
from oci.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound


def spec(*mounted: str, tty: bool = False, **process: Any) -> dict[str, Any]:
    mounts = [{"destination": path, "type": "bind", "source": f"/host{path}"} for path in mounted]
    proc = {"destination": "/proc", "type": "proc", "source": "proc"}
    return {"process": {"args": ["a"], "cwd": "/", "terminal": tty, **process}, "mounts": [proc, *mounts]}


def checkpoint(of: dict[str, Any], **more: Any) -> Checkpoint:
    return Checkpoint(Path("/a.tar"), {}, of, **more)


def test_the_process_is_the_checkpoints_and_the_rest_the_new_containers() -> None:
    new = spec("/etc/hosts", args=["b"], oomScoreAdj=5)

    applied = checkpoint(spec("/etc/hosts", env=["A=1"], oomScoreAdj=7)).applied_to(new)

    assert applied["process"] == {"args": ["a"], "cwd": "/", "terminal": False, "env": ["A=1"], "oomScoreAdj": 5}
    assert applied["mounts"] == new["mounts"]


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (spec(), "nothing for /data"),
        (spec("/data", "/more"), "/more is not mounted"),
        (spec("/data", tty=True), "config.tty"),
    ],
)
def test_other_mounts_or_another_terminal_are_refused(new: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        checkpoint(spec("/data")).applied_to(new)


def test_other_arguments_are_refused_where_they_must_match() -> None:
    with pytest.raises(InvalidArgument, match=r"process\.args"):
        checkpoint(spec(), must_match=True).applied_to(spec(args=["b"]))


def test_the_nodes_own_shared_memory_is_not_the_pods() -> None:
    node = {"mounts": [{"destination": "/dev/shm", "type": "bind", "source": "/dev/shm"}]}

    assert checkpoint_archive.shared_memory(spec("/dev/shm")) == {"/dev/shm": "/host/dev/shm"}
    assert checkpoint_archive.shared_memory(node) == {}


def test_the_container_and_its_image_are_named_as_well_as_possible() -> None:
    annotations = {checkpoint_archive.METADATA: '{"name": "web", "attempt": 2}'}
    config = {"rootfsImageName": "web:1", "rootfsImageRef": "web@sha256:1", "rootfsImage": "sha256:2"}
    found = Checkpoint(Path("/a"), config, {"annotations": annotations})

    assert found.container_name == "web"
    assert found.image_names == ("web@sha256:1", "sha256:2", "web:1")
    assert Checkpoint(Path("/a"), {}, {"annotations": {checkpoint_archive.METADATA: "?"}}).container_name == ""


def test_the_workers_errors_come_as_their_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_text("no")

    with pytest.raises(NotFound, match=r"none\.tar"):
        asyncio.run(checkpoint_archive.read(tmp_path / "none.tar"))
    with pytest.raises(InvalidArgument, match="no tar archive"):
        asyncio.run(checkpoint_archive.read(tmp_path / "a.tar"))


def test_a_worker_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(DeadlineExceeded):
        asyncio.run(checkpoint_archive.call("read", 0.001, "checkpoint", source=str(tmp_path)))


def test_a_criu_that_does_not_know_the_kernel_is_quoted(tmp_path: Path) -> None:
    criu = tmp_path / "criu"
    criu.write_text("#!/bin/sh\necho 'Error (criu/vdso.c:381): vdso: bad' >&2\nexit 1\n")
    criu.chmod(0o755)

    with pytest.raises(FailedPrecondition, match="vdso: bad"):
        asyncio.run(require(criu))
    with pytest.raises(FailedPrecondition, match="cannot be run"):
        asyncio.run(require(tmp_path / "none"))


async def require(path: Path) -> None:
    await Criu(path).require()
