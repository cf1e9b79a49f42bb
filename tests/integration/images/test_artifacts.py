"""OCI artifacts are pulled as images are, and shown as volumes: each blob a file of the name that its title says."""

import asyncio
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cri.image_service.catalog import Image
from cri.image_service.images import Images
from oci.container_spec import ContainerId
from oci.errors import Error, InvalidArgument, NotFound
from oci.image_volumes import ImageMount, ImageVolumes
from tests.fakes import layers
from tests.fakes.image_store import run, settings
from tests.fakes.layers import OCI_INDEX, artifact, file, tar
from tests.fakes.registry import FakeRegistry, cut_after, status

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts")

NAME = "example.test/team/model"
HOST = {"x86_64": "linux/amd64", "aarch64": "linux/arm64"}.get(os.uname().machine, f"linux/{os.uname().machine}")


def layer_names(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "images/layers").iterdir())


@contextmanager
def volume(tmp_path: Path, images: Images, image: Image, sub_path: str = "") -> Iterator[Path]:
    """What a container would see of the image at /v."""
    volumes = ImageVolumes(tmp_path / "run")
    id = ContainerId("c1")
    try:
        wanted = ImageMount("/v", image.id, images.layer_paths(image.id), sub_path)
        yield volumes.mount(id, (wanted,))["/v"]
    finally:
        volumes.unmount(id)
    assert not (tmp_path / "run/c1/images").exists()


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def pulled_files(tmp_path: Path, registry: FakeRegistry) -> dict[str, bytes]:
    async def story(images: Images) -> dict[str, bytes]:
        with volume(tmp_path, images, await images.pull(f"{NAME}:1")) as shown:
            return contents(shown)

    found: dict[str, bytes] = run(settings(tmp_path, registry), story)
    return found


def test_a_pulled_artifact_has_its_manifests_digest_as_id_names_size_type_and_files(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    files = [("weights/one.bin", b"1" * 5000), ("config.json", b"{}"), ("weights/two.bin", b"")]
    built = registry.add("team/model", "1", artifact(files))
    where = settings(tmp_path, registry, pinned_images=("*/model:1",))

    async def story(images: Images) -> None:
        pulled = await images.pull(f"{NAME}:1")

        assert pulled.id == built.digest
        assert pulled.repo_tags == (f"{NAME}:1",)
        assert pulled.repo_digests == (f"{NAME}@{built.digest}",)
        assert pulled.size_bytes == 5002 + len(built.manifest)
        assert (pulled.uid, pulled.username, pulled.pinned) == (None, "", True)
        assert pulled.artifact is not None
        assert pulled.artifact.type == "application/vnd.example.model"
        assert [(each.file, each.blob.size_bytes) for each in pulled.artifact.files] == [
            (name, len(content)) for name, content in files
        ]
        assert await images.raw_documents(pulled.id) == ("", built.manifest.decode())
        assert "/v2/team/model/blobs/" + layers.digest(b"{}") in registry.asked  # a file; the config is not asked for
        assert registry.asked["/v2/team/model/blobs/" + layers.digest(b"{}")] == 1

    async def again(images: Images) -> None:
        [found] = images.list()
        for name in (built.digest, built.digest[7:20], f"{NAME}:1", f"{NAME}@{built.digest}"):
            assert images.find(name) == found
        assert found.artifact is not None and len(found.artifact.files) == 3
        with volume(tmp_path, images, found) as shown:
            assert contents(shown) == dict(files)

    run(where, story)
    run(where, again)  # all is there after a restart


def test_files_are_for_all_to_read_and_none_to_run_or_change(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/model", "1", artifact([("bin/tool", b"#!/bin/sh\n"), ("data", b"d")]))

    async def story(images: Images) -> None:
        with volume(tmp_path, images, await images.pull(f"{NAME}:1")) as shown:
            found = (shown / "bin/tool").stat()
            assert (oct(found.st_mode), found.st_uid, found.st_gid) == ("0o100644", 0, 0)
            for directory in (shown, shown / "bin"):
                assert oct(directory.stat().st_mode) == "0o40755"
            with pytest.raises(OSError, match="Read-only file system"):
                (shown / "data").write_bytes(b"x")

    run(settings(tmp_path, registry), story)


@pytest.mark.parametrize("files", [[], [("only", b"one")], [("a/one", b"1"), ("a/b/two", b"2"), ("three", b"3")]])
def test_an_artifact_of_any_number_of_files_is_a_read_only_volume(
    tmp_path: Path, registry: FakeRegistry, files: list[tuple[str, bytes]]
) -> None:
    registry.add("team/model", "1", artifact(files))

    async def story(images: Images) -> None:
        image = await images.pull(f"{NAME}:1")
        assert image.size_bytes > 0
        with volume(tmp_path, images, image) as shown:
            assert contents(shown) == dict(files)
            with pytest.raises(OSError, match="Read-only file system"):
                (shown / "more").touch()

    run(settings(tmp_path, registry), story)


def test_the_placeholder_of_an_artifact_without_layers_is_no_file(tmp_path: Path, registry: FakeRegistry) -> None:
    built = registry.add("team/model", "1", artifact([(None, b"{}")], media_type=layers.EMPTY))
    layers.write_oci_layout(tmp_path / "layout", built)

    async def story(images: Images) -> None:
        [loaded] = await images.load(tmp_path / "layout")
        pulled = await images.pull(f"{NAME}:1")
        assert loaded.id == pulled.id == built.digest
        with volume(tmp_path, images, pulled) as shown:
            assert contents(shown) == {}

    run(settings(tmp_path, registry), story)


def test_a_sub_path_shows_a_directory_or_a_file_of_an_artifact(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/model", "1", artifact([("sub/1", b"one"), ("sub/2", b"two"), ("top", b"top")]))

    async def story(images: Images) -> None:
        image = await images.pull(f"{NAME}:1")
        with volume(tmp_path, images, image, "sub") as shown:
            assert contents(shown) == {"1": b"one", "2": b"two"}
        with volume(tmp_path, images, image, "sub/1") as shown:
            assert shown.read_bytes() == b"one"
        for wrong in ("nowhere", "../.."):
            with (
                pytest.raises(InvalidArgument, match=r"^ImageVolumeMountFailed: image_sub_path"),
                volume(tmp_path, images, image, wrong),
            ):
                pass

    run(settings(tmp_path, registry), story)


@pytest.mark.parametrize(
    ("title", "path"),
    [
        ("../../../etc/passwd", "etc/passwd"),
        ("/abs/olute", "abs/olute"),
        ("a/./b//../c", "a/c"),
        ("x/../../../../y", "y"),
        (".wh.name", ".wh.name"),
        ("with space\nand line", "with space\nand line"),
        ("n" * 255, "n" * 255),
    ],
)
def test_a_title_is_a_path_that_cannot_leave_the_volume(
    tmp_path: Path, registry: FakeRegistry, title: str, path: str
) -> None:
    registry.add("team/model", "1", artifact([(title, b"content"), ("other", b"o")]))

    assert pulled_files(tmp_path, registry) == {path: b"content", "other": b"o"}
    assert not list(tmp_path.rglob("passwd")) or "passwd" in title


@pytest.mark.parametrize("title", [None, "", "..", "/"])
def test_a_file_without_a_usable_title_is_named_by_its_digest(
    tmp_path: Path, registry: FakeRegistry, title: str | None
) -> None:
    registry.add("team/model", "1", artifact([(title, b"content")]))

    assert pulled_files(tmp_path, registry) == {layers.digest(b"content").replace(":", "-"): b"content"}


def test_the_model_specifications_path_is_a_title_too(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/model", "1", artifact([("a/model.gguf", b"m")], annotation="org.cncf.model.filepath"))

    assert pulled_files(tmp_path, registry) == {"a/model.gguf": b"m"}


def test_of_files_with_the_same_title_the_last_is_shown(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/model", "1", artifact([("a", b"first"), ("b", b"b"), ("a", b"last"), ("b", b"b")]))

    assert pulled_files(tmp_path, registry) == {"a": b"last", "b": b"b"}


def test_one_blob_under_several_names_is_every_one_of_them(tmp_path: Path, registry: FakeRegistry) -> None:
    content = os.urandom(3_000_000)
    registry.add("team/model", "1", artifact([(f"copy-{at}", content) for at in range(6)]))

    assert pulled_files(tmp_path, registry) == {f"copy-{at}": content for at in range(6)}
    assert list((tmp_path / "images/partial").iterdir()) == []


@pytest.mark.parametrize("kind", ["application/vnd.oci.image.layer.v1.tar", "application/vnd.example.tar"])
def test_archives_are_files_and_not_unpacked(tmp_path: Path, registry: FakeRegistry, kind: str) -> None:
    archive = tar([file("inside", b"x")])
    registry.add("team/model", "1", artifact([("files.tar", archive)], media_type=kind))

    assert pulled_files(tmp_path, registry) == {"files.tar": archive}


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ([("n" * 256, b"x")], r"layer sha256:.* is a file of the name 'nnn.* too long"),
        ([("a\0b", b"x")], r"which no file can have"),
        ([("d/" * 2100 + "f", b"x")], r"which no file can have"),
        ([(f"{at}", b"x") for at in range(501)], r"is an artifact of 501 files; at most 500 can be mounted"),
    ],
)
def test_an_artifact_that_cannot_be_mounted_is_refused_before_anything_of_it_is_fetched(
    tmp_path: Path, registry: FakeRegistry, files: list[tuple[str, bytes]], complaint: str
) -> None:
    registry.add("team/model", "1", artifact(files))

    async def story(images: Images) -> None:
        with pytest.raises(Error, match=complaint):
            await images.pull(f"{NAME}:1")
        assert images.list() == ()

    run(settings(tmp_path, registry), story)
    assert not [path for path in registry.asked if "/blobs/" in path]
    assert layer_names(tmp_path) == []


def test_the_most_files_that_are_accepted_can_be_mounted(tmp_path: Path, registry: FakeRegistry) -> None:
    files = [(f"file-{at}", b"same") for at in range(3)]
    many = [(f"empty-{at}", b"") for at in range(497)]
    registry.add("team/model", "1", artifact([*files, *many]))

    assert pulled_files(tmp_path, registry) == dict(files + many)


def test_an_index_of_artifacts_gives_the_one_for_this_machine(tmp_path: Path, registry: FakeRegistry) -> None:
    mine, other = artifact([("tool", b"mine")]), artifact([("tool", b"other")])
    for built in (mine, other):
        registry.add("team/model", "x", built)
    top = registry.add_index("team/model", "1", layers.index({"linux/s390x": other, HOST: mine}), OCI_INDEX)

    async def story(images: Images) -> None:
        image = await images.pull(f"{NAME}:1")
        assert (image.id, image.repo_digests) == (mine.digest, (f"{NAME}@{top}",))
        with volume(tmp_path, images, image) as shown:
            assert contents(shown) == {"tool": b"mine"}

    run(settings(tmp_path, registry), story)


def test_an_index_that_names_no_platforms_gives_its_first_artifact(tmp_path: Path, registry: FakeRegistry) -> None:
    built = registry.add("team/model", "x", artifact([("tool", b"any")]))
    registry.add_index("team/model", "1", layers.index({"": built}), OCI_INDEX)

    assert pulled_files(tmp_path, registry) == {"tool": b"any"}


def test_artifacts_share_files_and_removing_one_frees_what_it_alone_had(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/model", "1", artifact([("base", b"base"), ("tune", b"one")]))
    registry.add("team/model", "2", artifact([("base", b"base"), ("tune", b"two")]))

    async def story(images: Images) -> None:
        first, second = await images.pull(f"{NAME}:1"), await images.pull(f"{NAME}:2")
        assert len(layer_names(tmp_path)) == 3
        assert registry.asked["/v2/team/model/blobs/" + layers.digest(b"base")] == 1
        images.hold(second.id, "container:/v")
        await images.remove(f"{NAME}:1")
        await images.remove(second.id)
        assert images.list() == ()
        assert images.find(first.id) is None
        with volume(tmp_path, images, second) as shown:  # as long as a container has it
            assert contents(shown) == {"base": b"base", "tune": b"two"}
        images.release("container:/v")
        deadline = time.monotonic() + 10
        while layer_names(tmp_path):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)

    run(settings(tmp_path, registry), story)


def test_an_interrupted_pull_of_an_artifact_goes_on_at_the_byte_it_had_reached(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    content = os.urandom(600_000)
    registry.add("team/model", "1", artifact([("weights", content)]))
    where = settings(tmp_path, registry)
    blob = f"/v2/team/model/blobs/{layers.digest(content)}"
    cut, gone = cut_after(50_000), status(404)
    registry.trouble[blob] = lambda handler: (gone if "Range" in handler.headers else cut)(handler)

    async def broken(images: Images) -> None:
        with pytest.raises(NotFound):
            await images.pull(f"{NAME}:1")
        assert images.list() == ()

    run(where, broken)
    [partial] = (tmp_path / "images/partial").iterdir()
    had = partial.stat().st_size
    assert 0 < had < len(content)
    registry.trouble.clear()
    registry.headers_seen.clear()

    assert pulled_files(tmp_path, registry) == {"weights": content}
    assert [seen["range"] for seen in registry.headers_seen if "range" in seen] == [f"bytes={had}-"]


def test_a_blob_of_the_wrong_digest_leaves_nothing_behind(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/model", "1", artifact([("weights", b"right")]))
    registry.blobs[layers.digest(b"right")] = b"wrong"

    async def story(images: Images) -> None:
        with pytest.raises(Error, match=f"has the digest sha256:.*, expected {layers.digest(b'right')}"):
            await images.pull(f"{NAME}:1")
        assert images.list() == ()

    run(settings(tmp_path, registry), story)
    assert layer_names(tmp_path) == []


def damaged(path: Path) -> None:
    path.write_bytes(b"wrong")


@pytest.mark.parametrize("damage", [damaged, Path.unlink, lambda path: shutil.rmtree(path.parent)])
def test_a_damaged_file_is_found_and_fetched_again(
    tmp_path: Path, registry: FakeRegistry, damage: Callable[[Path], None]
) -> None:
    registry.add("team/model", "1", artifact([("d/weights", b"right"), ("other", b"o")]))

    async def story(images: Images) -> None:
        image = await images.pull(f"{NAME}:1")
        assert [each async for each in images.verify()] == []
        damage(next(path / "d/weights" for path in images.layer_paths(image.id) if (path / "d").exists()))

        [found] = [each async for each in images.verify(repair=True)]

        assert (found.images, found.outcome) == ((f"{NAME}@{image.manifest_digest}",), "repaired")
        with volume(tmp_path, images, image) as shown:
            assert contents(shown) == {"d/weights": b"right", "other": b"o"}

    run(settings(tmp_path, registry), story)


def test_after_a_power_loss_a_file_is_verified_before_it_is_mounted(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/model", "1", artifact([("weights", b"right")]))
    where = settings(tmp_path, registry)
    image_id = run(where, lambda images: images.pull(f"{NAME}:1")).id
    (where.root / "running").write_text("the boot before")
    [layer] = (where.root / "layers").iterdir()
    damaged(layer / "diff/weights")

    async def story(images: Images) -> None:
        assert images.suspects == 1
        await images.ensure(image_id)
        assert (images.layer_paths(image_id)[0] / "weights").read_bytes() == b"right"

    run(where, story)


def test_an_artifact_is_loaded_from_a_layout(tmp_path: Path, registry: FakeRegistry) -> None:
    built = artifact([("a", b"one"), (None, b"two")])
    layers.write_oci_layout(tmp_path / "layout", built)

    async def story(images: Images) -> None:
        [image] = await images.load(tmp_path / "layout", "local.test/model:1")
        assert (image.id, image.repo_tags) == (built.digest, ("local.test/model:1",))
        with volume(tmp_path, images, image) as shown:
            assert contents(shown) == {"a": b"one", layers.digest(b"two").replace(":", "-"): b"two"}

    run(settings(tmp_path, registry), story)


def test_an_artifact_whose_blob_a_layout_lacks_is_not_loaded(tmp_path: Path, registry: FakeRegistry) -> None:
    layers.write_oci_layout(tmp_path / "layout", artifact([("a", b"one")]))
    (tmp_path / "layout/blobs/sha256" / layers.digest(b"one")[7:]).unlink()

    async def story(images: Images) -> None:
        with pytest.raises(NotFound, match="has no blobs/sha256/"):
            await images.load(tmp_path / "layout")
        assert images.list() == ()

    run(settings(tmp_path, registry), story)


def test_a_blob_of_another_size_than_a_layout_says_is_not_loaded(tmp_path: Path, registry: FakeRegistry) -> None:
    layers.write_oci_layout(tmp_path / "layout", artifact([("a", b"one")]))
    (tmp_path / "layout/blobs/sha256" / layers.digest(b"one")[7:]).write_bytes(b"more")

    async def story(images: Images) -> None:
        with pytest.raises(Error, match=r"blob sha256:\w+ in .*/layout has 4 bytes, its manifest says 3"):
            await images.load(tmp_path / "layout")
        assert images.list() == ()

    run(settings(tmp_path, registry), story)


def test_an_image_with_an_empty_config_is_not_taken_for_an_artifact(tmp_path: Path, registry: FakeRegistry) -> None:
    manifest = json.loads(layers.image([tar([file("f")])]).manifest)
    manifest["config"] |= {"digest": layers.digest(b""), "size": 0}
    registry.add("team/model", "1", layers.Built(b"", json.dumps(manifest).encode(), ()))

    async def story(images: Images) -> None:
        with pytest.raises(Error, match=f"image {NAME}:1: its config is empty"):
            await images.pull(f"{NAME}:1")

    run(settings(tmp_path, registry), story)


def test_a_chart_with_a_config_of_its_own_is_an_artifact_too(tmp_path: Path, registry: FakeRegistry) -> None:
    built = layers.image([tar([file("chart/values.yaml")])])
    manifest = json.loads(built.manifest)
    manifest["config"]["mediaType"] = "application/vnd.cncf.helm.config.v1+json"
    manifest["layers"][0]["mediaType"] = "application/vnd.cncf.helm.chart.content.v1.tar+gzip"
    registry.add("team/model", "1", layers.Built(built.config, json.dumps(manifest).encode(), built.layers))

    async def story(images: Images) -> None:
        image = await images.pull(f"{NAME}:1")
        assert image.artifact is not None
        assert image.artifact.type == "application/vnd.cncf.helm.config.v1+json"
        with volume(tmp_path, images, image) as shown:
            assert list(contents(shown).values()) == [built.layers[0]]

    run(settings(tmp_path, registry), story)


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo not installed")
def test_an_artifact_that_skopeo_copied_into_an_archive_is_loaded(tmp_path: Path, registry: FakeRegistry) -> None:
    layers.write_oci_layout(tmp_path / "layout", artifact([("a", b"one")]), "test")
    copy = ["skopeo", "--insecure-policy", "copy", "-q", f"oci:{tmp_path}/layout:test", f"oci-archive:{tmp_path}/a.tar"]
    subprocess.run(copy, check=True)

    async def story(images: Images) -> None:
        [image] = await images.load(tmp_path / "a.tar", "local.test/model:1")
        with volume(tmp_path, images, image) as shown:
            assert contents(shown) == {"a": b"one"}

    run(settings(tmp_path, registry), story)
