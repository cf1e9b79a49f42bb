"""What containers have written is told by the file system itself, where it keeps account of projects."""

import asyncio
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from oci.container_spec import ContainerId
from oci.linux import project_quota, tree
from oci.rootfs import Rootfs
from oci.writable_layers import WritableLayers
from tests.fakes.accounted_disk import MAKE, accounted_disk

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

MIB = 1 << 20
SLACK = 64 << 10  # the overlay's work directory, and blocks for directories
ONE, TWO, SAME = (ContainerId(each * 32) for each in ("1a", "2b", "1a"))
LIKE_ONE = ContainerId("1a" * 4 + "ff" * 28)


@pytest.fixture(params=MAKE)
def disk(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of its own that keeps account of projects."""
    with tempfile.TemporaryDirectory(prefix="crito-") as name:
        at = Path(name, "disk")
        at.mkdir()
        with accounted_disk(request.param, Path(name, "image"), at):
            yield at


def prepared(disk: Path) -> Rootfs:
    rootfs = Rootfs(disk / "containers", disk / "run")
    rootfs.prepare()
    return rootfs


def layer(disk: Path) -> Path:
    path = disk / "layer"
    if not path.exists():
        (path / "dir").mkdir(parents=True)
        (path / "file").write_bytes(os.urandom(MIB))
        (path / "dir/inner").write_text("inner")
    return path


def bytes_of(rootfs: Rootfs, id: ContainerId) -> int:
    found = rootfs.accounted_usage(id)
    assert found is not None
    return found.bytes


def test_what_is_written_copied_up_moved_and_removed_is_accounted_for_at_once(disk: Path) -> None:
    rootfs = prepared(disk)
    assert rootfs.is_accounted
    root = rootfs.mount(ONE, [layer(disk)])
    assert bytes_of(rootfs, ONE) <= SLACK

    (root / "new").write_bytes(os.urandom(3 * MIB))
    with (root / "file").open("ab") as file:
        file.write(b"copied up")
    (root / "new").rename(root / "dir/moved")
    (root / "dir/link").hardlink_to(root / "dir/moved")
    (root / "dir/inner").unlink()
    (root / "made").mkdir()

    walked = tree.usage(rootfs.writable_layer(ONE))
    found = rootfs.accounted_usage(ONE)
    assert found is not None
    assert 4 * MIB <= walked.bytes <= found.bytes <= walked.bytes + SLACK
    assert walked.inodes <= found.inodes <= walked.inodes + 3
    assert rootfs.usage(ONE) == found

    (root / "dir/moved").unlink()
    (root / "dir/link").unlink()
    deadline = time.monotonic() + 20
    while bytes_of(rootfs, ONE) >= 2 * MIB:  # xfs frees what nobody has open a moment later
        assert time.monotonic() < deadline
        time.sleep(0.1)
    rootfs.remove(ONE)
    assert rootfs.accounted_usage(ONE) is None


def test_containers_are_told_apart_also_after_a_restart_and_where_their_ids_begin_alike(disk: Path) -> None:
    rootfs = prepared(disk)
    for id, size in ((ONE, 1), (LIKE_ONE, 2)):
        (rootfs.mount(id, [layer(disk)]) / "data").write_bytes(os.urandom(size * MIB))

    again = Rootfs(disk / "containers", disk / "run")
    again.prepare()
    for each in (rootfs, again):
        assert [bytes_of(each, id) // MIB for id in (ONE, LIKE_ONE)] == [1, 2]
    (again.mount(TWO, [layer(disk)]) / "data").write_bytes(os.urandom(5 * MIB))
    ids = {project_quota.project_of(again.writable_layer(id)) for id in (ONE, LIKE_ONE, TWO)}
    assert len(ids) == 3
    assert all(1 << 30 <= each < 1 << 31 for each in ids)

    again.remove(ONE)
    (again.mount(SAME, [layer(disk)]) / "data").write_bytes(os.urandom(7 * MIB))
    assert [bytes_of(again, id) // MIB for id in (SAME, LIKE_ONE, TWO)] == [7, 2, 5]
    for id in (SAME, LIKE_ONE, TWO):
        again.remove(id)


def test_an_id_that_others_use_on_the_file_system_is_passed_over(disk: Path) -> None:
    others = disk / "others"
    others.mkdir()
    wanted = (1 << 30) + int(ONE[:8], 16) % (1 << 30)
    project_quota.give(others, wanted)
    (others / "data").write_bytes(os.urandom(9 * MIB))

    rootfs = prepared(disk)
    rootfs.mount(ONE, [layer(disk)])

    assert project_quota.project_of(rootfs.writable_layer(ONE)) == wanted + 1
    assert bytes_of(rootfs, ONE) <= SLACK
    rootfs.remove(ONE)


def test_a_layer_from_before_there_was_an_account_is_walked(disk: Path) -> None:
    before = Rootfs(disk / "containers", disk / "run")
    (disk / "containers").mkdir()
    (before.mount(ONE, [layer(disk)]) / "data").write_bytes(os.urandom(2 * MIB))

    rootfs = prepared(disk)

    assert rootfs.is_accounted
    assert rootfs.accounted_usage(ONE) is None
    assert rootfs.usage(ONE).bytes // MIB == 2
    rootfs.remove(ONE)


def test_stats_tell_what_is_there_now_and_not_what_was_counted_last(disk: Path) -> None:
    rootfs = prepared(disk)
    root = rootfs.mount(ONE, [layer(disk)])

    async def story() -> None:
        layers = WritableLayers(disk / "containers", rootfs, lambda: [ONE])
        assert (await layers.usage(ONE)).used_bytes <= SLACK
        (root / "data").write_bytes(os.urandom(2 * MIB))
        assert (await layers.usage(ONE)).used_bytes // MIB == 2
        assert layers.total().used_bytes // MIB == 2
        await layers.close()

    asyncio.run(story())
    rootfs.remove(ONE)


def test_a_file_system_without_an_account_is_walked_as_ever() -> None:
    with tempfile.TemporaryDirectory(prefix="crito-", dir="/dev/shm") as name:  # a tmpfs has none
        place = Path(name)
        rootfs = Rootfs(place / "containers", place / "run")
        rootfs.prepare()
        try:
            (rootfs.mount(ONE, [layer(place)]) / "data").write_bytes(os.urandom(2 * MIB))
            assert not rootfs.is_accounted
            assert rootfs.accounted_usage(ONE) is None
            assert rootfs.usage(ONE).bytes // MIB == 2
            rootfs.remove(ONE)
        finally:
            rootfs.release()
