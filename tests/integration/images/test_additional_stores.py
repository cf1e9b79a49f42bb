"""Stores that are there to be used and not to be changed: their images are listed, their layers need no fetching."""

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cri.daemon import locked
from cri.image_service.images import Images, ImageSettings
from oci.errors import FailedPrecondition, NotFound, PermissionDenied, Unavailable
from tests.fakes import layers
from tests.fakes.layers import directory, file, tar
from tests.fakes.registry import FakeRegistry

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="layers hold owners and device nodes")

NAME = "example.test/team/app"
BASE = tar([directory("etc"), file("etc/base", b"base"), file("etc/big", bytes(100_000))])
TOP = tar([file("etc/top", b"top")])  # etc is implied
APP = layers.image([BASE, TOP])
NEWER = layers.image([BASE, TOP, tar([file("newer")])])


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as served:
        served.add("team/app", "1", APP)
        served.add("team/app", "2", NEWER)
        yield served


def settings(tmp_path: Path, registry: FakeRegistry, root: str, *stores: Path, **changes: Any) -> ImageSettings:
    conf = tmp_path / "registries.conf"
    conf.write_text(f'[[registry]]\nprefix = "example.test"\nlocation = "{registry.address}"\ninsecure = true\n')
    (tmp_path / root).mkdir(exist_ok=True)
    return ImageSettings(
        root=tmp_path / root / "images", registries_conf=conf, read_timeout_s=5, additional_stores=stores, **changes
    )


def run(with_settings: ImageSettings, story: Callable[[Images], Awaitable[Any]]) -> Any:
    async def whole() -> Any:
        images = await Images.open(with_settings)
        try:
            await images.sweep()
            return await story(images)
        finally:
            await images.close()

    return asyncio.run(whole())


@pytest.fixture
def baked(tmp_path: Path, registry: FakeRegistry) -> Path:
    """A store with APP as example.test/team/app:1."""
    run(settings(tmp_path, registry, "baked"), lambda images: images.pull(f"{NAME}:1"))
    registry.asked.clear()
    return tmp_path / "baked/images"


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    subprocess.run(["mount", "--bind", str(path), str(path)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(path)], check=True)
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def everything(store: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns, path.lstat().st_size) for path in store.rglob("*"))


def blobs_asked(registry: FakeRegistry) -> int:
    return sum(count for path, count in registry.asked.items() if "/blobs/" in path and APP.id not in path)


def test_its_images_are_listed_and_used_from_a_read_only_mount_and_never_removed_or_changed(
    tmp_path: Path, registry: FakeRegistry, baked: Path
) -> None:
    before = everything(baked)

    async def story(images: Images) -> None:
        [image] = images.list()
        assert (image.id, image.repo_tags, image.pinned, image.store) == (APP.id, (f"{NAME}:1",), True, baked)
        assert image.config.diff_ids == (layers.digest(BASE), layers.digest(TOP))
        for reference in (APP.id, APP.id[7:19], f"{NAME}:1", f"{NAME}@{APP.digest}"):
            assert images.find(reference) == image
        trees = images.layer_paths(image.id)
        assert len(trees) == 3  # with the one of implied directories
        assert all(tree.is_relative_to(baked) for tree in trees)
        assert (await images.raw_documents(image.id))[0].encode() == APP.config
        images.hold(image.id, "container")
        images.release("container")
        for change in (images.remove(f"{NAME}:1"), images.pin(APP.id, False)):
            with pytest.raises(FailedPrecondition, match=rf"is in the additional store {baked}, which is read-only"):
                await change
        assert images.list() == (image,)
        assert (await images.fs_usage()).used_bytes == 0
        await images.save([f"{NAME}:1"], tmp_path / "saved.tar", "oci-archive")
        assert [(each.images, each.trouble) for each in images.additional_stores] == [(1, "")]

    with read_only(tmp_path / "baked"):
        run(settings(tmp_path, registry, "own", baked), story)
        run(settings(tmp_path, registry, "own", baked), story)
    assert everything(baked) == before


def test_a_pull_fetches_only_the_layers_that_no_store_has(tmp_path: Path, registry: FakeRegistry, baked: Path) -> None:
    async def story(images: Images) -> None:
        newer = await images.pull(f"{NAME}:2")
        assert blobs_asked(registry) == 2  # the config, and the layer on top
        assert [tree.is_relative_to(baked) for tree in images.layer_paths(newer.id)][:3] == [True, True, False]
        assert (newer.pinned, newer.store) == (False, None)
        await images.remove(f"{NAME}:2")
        assert [image.id for image in images.list()] == [APP.id]

    run(settings(tmp_path, registry, "own", baked), story)
    assert (baked / "layers" / layers.digest(BASE).removeprefix("sha256:") / "diff/etc/base").exists()


def test_an_image_that_both_have_is_one_with_the_names_of_both_and_falls_back_when_ours_is_removed(
    tmp_path: Path, registry: FakeRegistry, baked: Path
) -> None:
    registry.add("team/other", "1", APP)

    async def story(images: Images) -> None:
        await images.pull("example.test/team/other:1")
        [image] = images.list()
        assert sorted(image.repo_tags) == [f"{NAME}:1", "example.test/team/other:1"]
        assert (image.pinned, image.store) == (False, None)

        await images.remove(APP.id)
        [image] = images.list()
        assert (image.repo_tags, image.store) == ((f"{NAME}:1",), baked)

    run(settings(tmp_path, registry, "own", baked), story)


def test_a_tag_that_we_pulled_anew_is_ours_until_we_remove_it(
    tmp_path: Path, registry: FakeRegistry, baked: Path
) -> None:
    registry.add("team/app", "1", NEWER)
    where = settings(tmp_path, registry, "own", baked)

    async def pull(images: Images) -> None:
        assert (await images.pull(f"{NAME}:1")).id == NEWER.id
        assert images.resolve(APP.id).repo_tags == ()

    async def remove(images: Images) -> None:
        assert images.resolve(f"{NAME}:1").id == NEWER.id
        await images.remove(f"{NAME}:1")
        assert images.resolve(f"{NAME}:1").id == APP.id

    run(where, pull)
    run(where, remove)


def test_what_a_killed_daemon_left_in_its_write_ahead_log_counts_and_stays_there(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    where = settings(tmp_path, registry, "baked")
    program = (
        "import asyncio, os, sys; from pathlib import Path\n"
        "from cri.image_service.images import Images, ImageSettings\n"
        "async def main():\n"
        "    images = await Images.open(ImageSettings(Path(sys.argv[1]), Path(sys.argv[2])))\n"
        "    await images.pull(sys.argv[3])\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    words = [str(where.root), str(where.registries_conf), f"{NAME}:1"]
    subprocess.run([sys.executable, "-c", program, *words], cwd=Path(__file__).parents[3], check=False)
    assert (where.root / "images.db-wal").stat().st_size > 0
    before = everything(where.root)

    async def story(images: Images) -> None:
        assert [image.id for image in images.list()] == [APP.id]
        assert images.suspects == 0  # in the same boot its data is in memory
        assert (await images.raw_documents(APP.id))[1].encode() == APP.manifest

    with read_only(tmp_path / "baked"):
        run(settings(tmp_path, registry, "own", where.root), story)
    assert everything(where.root) == before
    assert [path.name for path in (tmp_path / "own/images").glob("images-*")] == []


def test_a_store_that_vanishes_takes_its_images_along_and_ours_come_back_with_it_or_by_a_pull(
    tmp_path: Path, registry: FakeRegistry, baked: Path
) -> None:
    where = settings(tmp_path, registry, "own", baked)
    run(where, lambda images: images.pull(f"{NAME}:2"))
    aside = baked.rename(tmp_path / "aside")

    async def without(images: Images) -> None:
        assert images.list() == ()
        [state] = images.additional_stores
        assert state.trouble == f"there is no {baked}/images.db"
        with pytest.raises(NotFound):
            images.resolve(f"{NAME}:2")

    async def again(images: Images) -> None:
        assert {image.id for image in images.list()} == {APP.id, NEWER.id}
        assert blobs_asked(registry) == 0

    async def pull(images: Images) -> None:
        newer = await images.pull(f"{NAME}:2")
        assert not any(tree.is_relative_to(baked) for tree in images.layer_paths(newer.id))
        assert all(tree.is_dir() for tree in images.layer_paths(newer.id))

    run(where, without)
    registry.asked.clear()
    aside.rename(baked)
    run(where, again)
    baked.rename(aside)
    run(where, pull)


def test_what_is_wrong_with_a_store_is_told_and_the_others_are_used(
    tmp_path: Path, registry: FakeRegistry, baked: Path
) -> None:
    broken = {}
    for name in ("garbage", "older", "newer", "empty", "nobody", "lossy", "config", "rows"):
        broken[name] = tmp_path / name / "images"
        subprocess.run(["cp", "-a", str(tmp_path / "baked"), str(tmp_path / name)], check=True)
    (broken["garbage"] / "images.db").write_text("no database" * 100)
    for name, version in (("older", 1), ("newer", 99)):
        with closing(sqlite3.connect(broken[name] / "images.db")) as database, database:
            database.execute(f"PRAGMA user_version={version}")
    for name, change in (("config", "images SET config = 'x'"), ("rows", "layers SET implied = 'x'")):
        with closing(sqlite3.connect(broken[name] / "images.db")) as database, database:
            database.execute(f"UPDATE {change}")
    (broken["empty"] / "images.db").write_bytes(b"")
    (broken["nobody"] / "images.db").unlink()
    subprocess.run(["rm", "-r", *map(str, broken["lossy"].glob("layers/*"))], check=True)
    stores = [*broken.values(), tmp_path / "baked", baked]

    async def story(images: Images) -> None:
        assert [image.store for image in images.list()] == [baked]
        troubles = {str(each.path.relative_to(tmp_path)): each.trouble for each in images.additional_stores}
        assert "file is not a database" in troubles["garbage/images"]
        assert "has the schema 1; this version reads 3" in troubles["older/images"]
        assert "has the schema 99; this version reads 3" in troubles["newer/images"]
        assert "has the schema 0" in troubles["empty/images"]
        assert troubles["nobody/images"] == f"there is no {broken['nobody']}/images.db"
        assert troubles["lossy/images"] == "1 of its images lack layers or have a broken config"
        assert troubles["config/images"] == troubles["lossy/images"]
        assert troubles["rows/images"].startswith("cannot be read: Expecting value")
        assert troubles["baked"].endswith(f"; is {baked} meant?")
        assert troubles["baked/images"] == ""

    run(settings(tmp_path, registry, "own", *stores), story)


def test_a_store_on_which_a_daemon_works_is_not_used_and_no_daemon_begins_to_while_we_do(
    tmp_path: Path, registry: FakeRegistry, baked: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "baked/crito.lock").touch()
    where = settings(tmp_path, registry, "own", baked)

    async def at_work() -> None:
        async with locked(tmp_path / "baked", tmp_path / "run"):
            images = await Images.open(where)
            assert images.list() == ()
            assert images.additional_stores[0].trouble == f"a daemon is at work in {tmp_path}/baked"
            await images.close()

    async def story(images: Images) -> None:
        assert len(images.list()) == 1
        with pytest.raises(FailedPrecondition, match="is in use by another crito daemon"):
            async with locked(tmp_path / "baked", tmp_path / "run"):
                pass

    asyncio.run(at_work())
    run(where, story)


# ---- damage


def damage(store: Path) -> None:
    [path] = store.glob("layers/*/diff/etc/big")
    path.write_bytes(b"x" * 100_000)


def test_an_unclean_end_of_our_machine_casts_no_doubt_on_layers_that_nobody_writes(
    tmp_path: Path, registry: FakeRegistry, baked: Path
) -> None:
    where = settings(tmp_path, registry, "own", baked)
    run(where, lambda images: images.pull(f"{NAME}:2"))
    (where.root / "running").write_text("the boot before")

    async def story(images: Images) -> None:
        assert images.suspects == 2  # the layer that we fetched, and the one that we made of implied directories
        await images.ensure(NEWER.id)
        assert images.suspects == 0

    run(where, story)


def test_a_store_that_was_copied_from_a_running_machine_is_verified_on_use_and_healed_in_our_own(
    tmp_path: Path, registry: FakeRegistry, baked: Path
) -> None:
    (baked / "running").write_text("the boot of another machine")
    damage(baked)
    before = everything(baked)
    where = settings(tmp_path, registry, "own", baked)

    async def healed(images: Images) -> None:
        assert images.suspects >= 2
        await images.ensure(APP.id)
        assert images.suspects == 0
        lower, upper = images.layer_paths(APP.id)[:2]
        assert lower.is_relative_to(where.root)
        assert upper.is_relative_to(baked)
        assert (lower / "etc/big").read_bytes() == bytes(100_000)

    async def lost(images: Images) -> None:
        with pytest.raises(Unavailable, match="was damaged by an unclean shutdown and could not be fetched again"):
            await images.ensure(APP.id)
        assert images.list() == ()
        registry.trouble.clear()
        await images.pull(f"{NAME}:1")
        assert (images.layer_paths(APP.id)[0] / "etc/big").read_bytes() == bytes(100_000)

    run(where, healed)
    registry.trouble["blobs/"] = lambda handler: handler.send(503, b"")
    run(settings(tmp_path, registry, "second", baked), lost)
    assert everything(baked) == before


def test_verification_on_demand_tells_of_damage_that_it_cannot_repair(
    tmp_path: Path, registry: FakeRegistry, baked: Path
) -> None:
    damage(baked)

    async def story(images: Images) -> None:
        [found] = [each async for each in images.verify(repair=True)]
        assert found.images == (f"{NAME}@{APP.digest}",)
        assert found.found == "etc/big: other content than was unpacked"
        assert found.outcome == f"not repaired: it is in an additional store, {baked}"

    run(settings(tmp_path, registry, "own", baked), story)


def test_an_artifact_of_a_store_is_one_and_an_image_s_origin_there_counts(
    tmp_path: Path, registry: FakeRegistry, baked: Path
) -> None:
    built = registry.add("team/model", "1", layers.artifact([("weights.bin", b"1" * 100)]))
    run(settings(tmp_path, registry, "baked"), lambda images: images.pull("example.test/team/model:1"))

    async def story(images: Images) -> None:
        found = images.resolve("example.test/team/model:1")
        app = images.resolve(f"{NAME}:1")

        assert (found.id, found.store, found.pinned) == (built.digest, baked, True)
        assert found.artifact is not None and [each.file for each in found.artifact.files] == ["weights.bin"]
        assert [path.parents[2] for path in images.layer_paths(found.id)] == [baked]
        for each, name in ((app, f"{NAME}:1"), (found, "example.test/team/model:1")):
            await images.allow(each, name, "default")
            with pytest.raises(PermissionDenied, match="SignatureValidationFailed"):
                await images.allow(each, name, "strict")

    policies = tmp_path / "policies"
    policies.mkdir()
    (policies / "strict.json").write_text(
        '{"default": [{"type": "insecureAcceptAnything"}],'
        ' "transports": {"docker": {"example.test/team": [{"type": "reject"}]}}}'
    )
    run(settings(tmp_path, registry, "ours", baked, policy_dir=policies), story)
