"""Records survive a restart; one that cannot be read blocks no other."""

import asyncio
import sqlite3
from pathlib import Path

import pytest

from oci.container import ContainerRecord
from oci.container_spec import ContainerId, ContainerSpec, Mount, Propagation, Resources, SandboxId
from oci.linux.passwd import User
from oci.state import Database, Records, Unreadable
from oci.status import with_creation, with_exit


def record(name: str = "c1") -> ContainerRecord:
    spec = ContainerSpec(
        name=name,
        image="docker.io/library/busybox",
        envs=(("A", "ä"),),
        mounts=(Mount("/data", "/srv/data", propagation=Propagation.BIDIRECTIONAL),),
        resources=Resources(memory_limit_bytes=1 << 20, hugepage_limits=(("2MB", 0),), unified={"memory.high": "1"}),
    )
    return ContainerRecord(
        id=ContainerId("ab" * 32),
        sandbox_id=SandboxId("cd" * 32),
        spec=spec,
        image_id="sha256:1",
        image_ref="docker.io/library/busybox@sha256:2",
        image_mounts=(("/models", "sha256:3"),),
        runtime_handler="crun",
        log_path="/var/log/c1.log",
        cgroup_parent="/kubepods",
        stop_signal="SIGTERM",
        rootfs="/run/rootfs",
        requested_at=5,
        user=User(1000, 1000, (10,), "/home/a"),
    )


def test_a_record_comes_back_equal_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    ended = record()
    status = with_exit(with_creation(ended.status, 6, 42, 99), 7, 137, oom_killed=True)
    database = Database(path)
    asyncio.run(Records(database, "containers", ContainerRecord).put(ended.id, ended))
    database.close()

    again = Database(path)
    loaded = dict(Records(again, "containers", ContainerRecord).load())
    again.close()

    assert loaded == {ended.id: ended}
    assert status.finished_at == 7


def test_a_deleted_record_is_gone(tmp_path: Path) -> None:
    async def scenario() -> list[object]:
        database = Database(tmp_path / "state.db")
        records = Records(database, "containers", ContainerRecord)
        await records.put("a", record())
        await records.delete("a")
        await database.run(lambda connection: None)
        found: list[object] = list(records.load())
        database.close()
        return found

    assert asyncio.run(scenario()) == []


def test_an_unreadable_record_is_told_and_blocks_no_other(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    database = Database(path)
    records = Records(database, "containers", ContainerRecord)
    asyncio.run(records.put("good", record()))
    database.close()
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO containers VALUES ('bad', '{\"id\": 1}')")

    again = Database(path)
    loaded = dict(Records(again, "containers", ContainerRecord).load())
    again.close()

    assert loaded["good"] == record()
    bad = loaded["bad"]
    assert isinstance(bad, Unreadable) and "Expected `str`" in bad.reason


def test_a_database_of_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version=99")

    with pytest.raises(RuntimeError, match="newer Crito"):
        Database(path)


def test_facts_are_kept(tmp_path: Path) -> None:
    async def scenario() -> tuple[str | None, str | None]:
        database = Database(tmp_path / "state.db")
        before = database.fact("boot_id")
        await database.set_fact("boot_id", "x")
        after = database.fact("boot_id")
        database.close()
        return before, after

    assert asyncio.run(scenario()) == (None, "x")
