"""Saved images are the same ones where a registry has their layers, and unpack to the same trees where none has."""

import asyncio
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cri.image_service.images import Images, ImageSettings
from cri.image_service.progress import Progress
from oci.errors import AlreadyExists, Error, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from tests.fakes import layers
from tests.fakes.archives import TREES
from tests.fakes.image_store import run, settings
from tests.fakes.layers import directory, file, tar
from tests.fakes.registry import FakeRegistry, after, status
from tests.trees import described, mounted_overlay

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts overlays and makes device nodes")

FORMATS = ["oci-archive", "oci-layout", "docker-archive"]
NAME = "example.test/team/app"
EVERYTHING = layers.image(TREES, {"User": "5"})


@pytest.fixture
def registry(registry: FakeRegistry) -> FakeRegistry:
    registry.add("team/app", "1", EVERYTHING)
    return registry


def other_node(tmp_path: Path) -> ImageSettings:
    return ImageSettings(root=tmp_path / "other")


def here(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "out").iterdir())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    made = tmp_path / "out"
    made.mkdir()
    return made


# ---- exact copies


@pytest.mark.parametrize("form", FORMATS)
def test_what_a_registry_has_is_saved_as_an_exact_copy(
    tmp_path: Path, out: Path, registry: FakeRegistry, form: str
) -> None:
    async def save(images: Images) -> None:
        await images.pull(f"{NAME}:1")
        told: list[Progress] = []
        [saved] = await images.save([f"{NAME}:1"], out / "app", form, on_progress=lambda now: told.append(replace(now)))
        assert (saved.id, saved.source_id, saved.regenerated) == (EVERYTHING.id, EVERYTHING.id, "")
        assert saved.names == (f"{NAME}:1",)
        last = told[-1]
        assert (last.phase, last.layers_done, last.layers_total) == ("done", 3, 3)
        assert last.bytes_fetched == last.bytes_total == sum(map(len, EVERYTHING.layers))
        assert images.pulls() == ()

    async def load(images: Images) -> None:
        [image] = await images.load(out / "app")
        assert (image.id, image.repo_tags) == (EVERYTHING.id, (f"{NAME}:1",))
        assert image.repo_digests == ((f"{NAME}@{EVERYTHING.digest}",) if form.startswith("oci") else ())
        assert image.config.diff_ids == tuple(map(layers.digest, TREES))

    run(settings(tmp_path, registry), save)
    assert here(tmp_path) == ["app"]
    run(other_node(tmp_path), load)


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
@pytest.mark.parametrize(
    ("form", "source"),
    [
        ("oci-archive", f"oci-archive:{{}}:{NAME}:1"),
        ("oci-layout", f"oci:{{}}:{NAME}:1"),
        ("docker-archive", f"docker-archive:{{}}:{NAME}:1"),
    ],
)
@pytest.mark.parametrize("is_exact", [True, False])
def test_skopeo_takes_what_was_saved(
    tmp_path: Path, out: Path, registry: FakeRegistry, form: str, source: str, is_exact: bool
) -> None:
    async def save(images: Images) -> str:
        await images.pull(f"{NAME}:1")
        if not is_exact:
            registry.trouble["blobs/"] = status(404)
        [saved] = await images.save([f"{NAME}:1"], out / "app", form)
        assert bool(saved.regenerated) is not is_exact
        return saved.id

    saved_id = run(settings(tmp_path, registry), save)
    copy = ["skopeo", "--insecure-policy", "copy", "-q", source.format(out / "app"), f"dir:{tmp_path}/copied"]
    subprocess.run(copy, check=True)
    assert json.loads((tmp_path / "copied/manifest.json").read_text())["config"]["digest"] == saved_id


def test_several_images_share_what_they_have_in_common_and_each_keeps_all_names_that_were_asked_for(
    tmp_path: Path, out: Path, registry: FakeRegistry
) -> None:
    registry.add("team/app", "2", EVERYTHING)
    base = registry.add("team/base", "1", layers.image([TREES[0]]))

    async def save(images: Images) -> None:
        for name in (f"{NAME}:1", f"{NAME}:2", "example.test/team/base:1"):
            await images.pull(name)
        saved = await images.save(
            [EVERYTHING.id, "example.test/team/base:1", f"{NAME}:1"], out / "all.tar", "oci-archive"
        )
        assert [each.id for each in saved] == [EVERYTHING.id, base.id]
        assert saved[0].names == (f"{NAME}:1", f"{NAME}:2")

    async def load(images: Images) -> None:
        await images.load(out / "all.tar")
        assert {name for image in images.list() for name in image.repo_tags} == {
            f"{NAME}:1",
            f"{NAME}:2",
            "example.test/team/base:1",
        }

    run(settings(tmp_path, registry), save)
    with tarfile.open(out / "all.tar") as archive:
        names = archive.getnames()
    assert len(names) == len(set(names)) == 3 + 2 * 2 + 2  # layers, a config and a manifest each, index and marker
    run(other_node(tmp_path), load)


def test_an_image_without_a_tag_keeps_its_digest(tmp_path: Path, out: Path, registry: FakeRegistry) -> None:
    async def save(images: Images) -> None:
        await images.pull(f"{NAME}@{EVERYTHING.digest}")
        [saved] = await images.save([EVERYTHING.id[:19]], out / "app", "oci-layout")
        assert saved.names == (f"{NAME}@{EVERYTHING.digest}",)

    async def load(images: Images) -> None:
        await images.load(out / "app")
        assert images.resolve(f"{NAME}@{EVERYTHING.digest}").id == EVERYTHING.id

    run(settings(tmp_path, registry), save)
    run(other_node(tmp_path), load)


# ---- layers made anew


@pytest.mark.parametrize("form", FORMATS)
def test_what_no_registry_has_is_made_anew_and_looks_the_same_in_a_container(
    tmp_path: Path, out: Path, form: str
) -> None:
    sparse = tmp_path / "sparse"
    sparse.mkdir()
    with (sparse / "big").open("wb") as big:
        big.seek(5 << 20)
        big.write(b"data")
        big.truncate(10 << 20)
    archive = tmp_path / "sparse.tar"
    subprocess.run(["tar", "-S", "-C", str(sparse), "-cf", str(archive), "big"], check=True)
    built = layers.image([*TREES, archive.read_bytes(), TREES[2]], {"User": "5"})
    layers.write_oci_layout(tmp_path / "layout", built, f"{NAME}:1")
    seen = {}

    async def save(images: Images) -> None:
        [image] = await images.load(tmp_path / "layout")
        with mounted_overlay(images.layer_paths(image.id), tmp_path / "merged") as merged:
            seen["here"] = described(merged)
        [saved] = await images.save([f"{NAME}:1"], out / "app", form)
        [again] = await images.save([f"{NAME}:1"], out / "again", form)
        assert saved.source_id == image.id != saved.id == again.id
        assert "its layers could not be fetched: " in saved.regenerated

    async def load(images: Images) -> None:
        [image] = await images.load(out / "app")
        assert (image.repo_tags, image.config.user) == ((f"{NAME}:1",), "5")
        assert len(image.config.diff_ids) == 5
        with mounted_overlay(images.layer_paths(image.id), tmp_path / "merged2") as merged:
            assert (merged / "big").stat().st_blocks * 512 < 1 << 20
            seen["there"] = described(merged)

    run(settings(tmp_path, None, connect_timeout_s=0.5), save)
    run(other_node(tmp_path), load)
    assert seen["there"] == seen["here"]


@pytest.mark.skipif(shutil.which("umoci") is None, reason="umoci is not installed")
def test_umoci_unpacks_layers_that_were_made_anew_to_the_same_tree(
    tmp_path: Path, out: Path, registry: FakeRegistry
) -> None:
    async def save(images: Images) -> dict[str, Any]:
        image = await images.pull(f"{NAME}:1")
        registry.trouble["blobs/"] = status(404)
        await images.save([image.id], out / "app", "oci-layout")
        with mounted_overlay(images.layer_paths(image.id), tmp_path / "merged") as merged:
            return described(merged, with_root=False)

    ours = run(settings(tmp_path, registry), save)
    subprocess.run(["umoci", "unpack", "--image", f"{out}/app:{NAME}:1", str(tmp_path / "umoci")], check=True)
    assert described(tmp_path / "umoci/rootfs", with_root=False) == ours


@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        (status(404), "status 404"),
        (lambda handler: handler.send(200, bytes(len(EVERYTHING.layers[2]))), "has the digest sha256:.*expected"),
    ],
)
@pytest.mark.parametrize("form", FORMATS)
def test_one_layer_that_cannot_be_fetched_makes_the_whole_image_anew_and_nothing_of_the_try_stays(
    tmp_path: Path, out: Path, registry: FakeRegistry, trouble: Any, why: str, form: str
) -> None:
    async def save(images: Images) -> None:
        await images.pull(f"{NAME}:1")
        registry.trouble[layers.digest(EVERYTHING.layers[2])] = trouble
        [saved] = await images.save([f"{NAME}:1"], out / "app", form)
        assert re.search(why, saved.regenerated)

    run(settings(tmp_path, registry), save)
    if form == "oci-layout":
        names = [str(path.relative_to(out / "app")) for path in (out / "app").rglob("*") if path.is_file()]
    else:
        with tarfile.open(out / "app") as archive:
            names = archive.getnames()
    assert not any(layers.digest(blob).removeprefix("sha256:") in name for blob in EVERYTHING.layers for name in names)
    assert len(names) == (5 if form == "docker-archive" else 7)


# ---- what goes wrong


def test_what_cannot_be_saved_is_told_and_leaves_nothing(tmp_path: Path, out: Path, registry: FakeRegistry) -> None:
    (out / "there").mkdir()
    (out / "link").symlink_to(out / "elsewhere")

    async def story(images: Images) -> None:
        await images.pull(f"{NAME}:1")
        for references, path, form, kind, complaint in (
            ([f"{NAME}:2"], out / "x", "oci-archive", NotFound, "image example.test/team/app:2 is not on this node"),
            ([f"{NAME}:1"], out / "x", "zip", InvalidArgument, "format 'zip': expected one of oci-archive"),
            ([], out / "x", "oci-archive", InvalidArgument, "no image to save is named"),
            ([f"{NAME}:1"], out / "no/x", "oci-archive", NotFound, "there is no directory .*/no"),
            ([f"{NAME}:1"], out / "there", "oci-archive", AlreadyExists, "it is there already"),
            ([f"{NAME}:1"], out / "there", "oci-layout", AlreadyExists, "it is there already"),
            ([f"{NAME}:1"], out / "link", "oci-archive", AlreadyExists, "it is there already"),
        ):
            with pytest.raises(kind, match=complaint):
                await images.save(references, path, form)
        assert images.pulls() == ()

    run(settings(tmp_path, registry), story)
    assert here(tmp_path) == ["link", "there"]


def test_an_archive_replaces_an_older_file_only_when_it_is_whole(
    tmp_path: Path, out: Path, registry: FakeRegistry
) -> None:
    registry.add("team/app", "big", layers.image([tar([file("big", os.urandom(100_000))])]))

    async def full(images: Images) -> None:
        await images.pull(f"{NAME}:big")
        for form in FORMATS:
            with pytest.raises(ResourceExhausted, match=r"^no room on the file system of .*/out/app"):
                await images.save([f"{NAME}:big"], out / ("app" if form != "oci-layout" else "app2"), form)
            assert here(tmp_path) == ["app"]

    async def enough(images: Images) -> None:
        await images.save([f"{NAME}:big"], out / "app", "docker-archive")

    where = settings(tmp_path, registry)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20k", "none", str(out)], check=True)
    try:
        (out / "app").write_text("older")
        run(where, full)
        assert (out / "app").read_text() == "older"
        subprocess.run(["mount", "-o", "remount,size=1m", str(out)], check=True)
        run(where, enough)
        assert tarfile.is_tarfile(out / "app")
        assert (out / "app").stat().st_mode & 0o777 == 0o600
        assert here(tmp_path) == ["app"]
    finally:
        subprocess.run(["umount", str(out)], check=True)


@pytest.mark.parametrize("form", FORMATS)
def test_a_caller_that_gives_up_leaves_nothing(tmp_path: Path, out: Path, registry: FakeRegistry, form: str) -> None:
    async def story(images: Images) -> None:
        await images.pull(f"{NAME}:1")
        registry.trouble[layers.digest(EVERYTHING.layers[2])] = after(3)
        saving = asyncio.create_task(images.save([f"{NAME}:1"], out / "app", form))
        await asyncio.to_thread(until, lambda: here(tmp_path) != [])
        saving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await saving
        assert here(tmp_path) == []

    run(settings(tmp_path, registry), story)


def test_a_worker_that_is_killed_leaves_nothing(tmp_path: Path, out: Path, registry: FakeRegistry) -> None:
    async def story(images: Images) -> None:
        await images.pull(f"{NAME}:1")
        registry.trouble[layers.digest(EVERYTHING.layers[2])] = after(3)
        saving = asyncio.create_task(images.save([f"{NAME}:1"], out / "app", "oci-archive"))
        await asyncio.to_thread(until, lambda: here(tmp_path) != [])
        for pid in images.worker_pids:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(Unavailable, match=f"killed by signal 9 while saving {NAME}:1"):
            await saving

    run(settings(tmp_path, registry), story)
    assert here(tmp_path) == []


def test_a_daemon_that_is_killed_leaves_nothing(tmp_path: Path, out: Path, registry: FakeRegistry) -> None:
    where = settings(tmp_path, registry)
    run(where, lambda images: images.pull(f"{NAME}:1"))
    registry.trouble[layers.digest(EVERYTHING.layers[2])] = after(5)
    program = (
        "import asyncio, sys; from pathlib import Path; from cri.image_service.images import Images, ImageSettings\n"
        "async def main():\n"
        "    images = await Images.open(ImageSettings(Path(sys.argv[1]), Path(sys.argv[2])))\n"
        "    await images.save([sys.argv[3]], Path(sys.argv[4]), 'oci-layout')\n"
        "asyncio.run(main())\n"
    )
    words = [str(where.root), str(where.registries_conf), f"{NAME}:1", str(out / "app")]
    with subprocess.Popen([sys.executable, "-c", program, *words], cwd=Path(__file__).parents[3]) as daemon:
        until(lambda: here(tmp_path) != [])
        daemon.kill()
    until(lambda: here(tmp_path) == [])


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_image_that_is_removed_while_it_is_saved_is_saved_whole_and_then_gone(
    tmp_path: Path, out: Path, registry: FakeRegistry
) -> None:
    async def story(images: Images) -> None:
        await images.pull(f"{NAME}:1")
        registry.trouble["blobs/"] = after(0.5, status(404))
        saving = asyncio.create_task(images.save([f"{NAME}:1"], out / "app", "oci-archive"))
        await asyncio.to_thread(until, lambda: here(tmp_path) != [])
        await images.remove(f"{NAME}:1")
        [saved] = await saving
        assert saved.regenerated

    async def load(images: Images) -> None:
        [image] = await images.load(out / "app")
        assert (images.layer_paths(image.id)[0] / "etc/passwd").read_text() == "root"

    run(settings(tmp_path, registry, keep_partial_s=0.1), story)
    run(other_node(tmp_path), load)


def test_a_file_that_a_layer_cannot_hold_is_named(tmp_path: Path, out: Path) -> None:
    layers.write_oci_layout(tmp_path / "layout", layers.image([tar([directory("d"), file("d/f")])]), "local.test/x:1")

    async def story(images: Images) -> None:
        [image] = await images.load(tmp_path / "layout")
        [tree] = images.layer_paths(image.id)
        os.mknod(tree / "d/s", stat.S_IFSOCK | 0o600)
        with pytest.raises(Error, match="d/s is of a kind that no layer can hold"):
            await images.save(["local.test/x:1"], out / "app", "oci-archive")

    run(settings(tmp_path, None, connect_timeout_s=0.5), story)
    assert here(tmp_path) == []


def test_an_artifact_is_not_saved(tmp_path: Path, registry: FakeRegistry, out: Path) -> None:
    registry.add("team/model", "1", layers.artifact([("weights.bin", b"1")]))

    async def story(images: Images) -> None:
        await images.pull("example.test/team/model:1")
        with pytest.raises(InvalidArgument, match="model:1 is an artifact"):
            await images.save(["example.test/team/model:1"], out / "saved.tar", "oci-archive")

    run(settings(tmp_path, registry), story)

    assert here(tmp_path) == []
