"""What Debian's registry serves and skopeo writes is taken; so are archives that tar makes of real files."""

import gzip
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cri.image_service.images import Images, ImageSettings
from oci.errors import Error, InvalidArgument, NotFound, PermissionDenied
from tests.fakes import image_store, layers
from tests.fakes.archives import LOWER, TREES
from tests.fakes.layers import file, tar
from tests.trees import described

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts overlays and makes device nodes")


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


def run(root: Path, story: Callable[[Images], Awaitable[Any]], **changes: Any) -> Any:
    return image_store.run(ImageSettings(root=root, **changes), story)


@needs("umoci", "tar")
def test_a_part_of_this_machines_own_files_unpacks_as_umoci_does(tmp_path: Path) -> None:
    made = subprocess.run(
        [
            "tar",
            "-C",
            "/",
            "--xattrs",
            "--xattrs-include=*",
            "--format=pax",
            "-cf",
            "-",
            "etc",
            "usr/sbin",
            "usr/share/doc/bash",
        ],
        capture_output=True,
        check=False,  # files change while they are read, on some machines
    ).stdout
    layers.write_oci_layout(
        tmp_path / "layout", layers.image([made], compress=lambda plain: gzip.compress(plain, 1)), "test"
    )
    subprocess.run(["umoci", "unpack", "--image", f"{tmp_path}/layout:test", str(tmp_path / "umoci")], check=True)

    async def story(images: Images) -> Any:
        [image] = await images.load(tmp_path / "layout")
        [layer] = images.layer_paths(image.id)
        ours, theirs = described(layer, False), described(tmp_path / "umoci/rootfs", False)
        for implied in ("usr", "usr/share", "usr/share/doc"):
            ours.pop(implied, None), theirs.pop(implied, None)
        assert ours == theirs
        return layer, await images.fs_usage()

    layer, usage = run(tmp_path / "images", story)
    used = subprocess.run(["du", "-s", "-B1", str(layer)], capture_output=True, check=True).stdout.split()[0]
    inodes = subprocess.run(["du", "-s", "--inodes", str(layer)], capture_output=True, check=True).stdout.split()[0]
    assert usage.inodes_used == int(inodes)
    assert abs(usage.used_bytes - int(used)) < int(used) * 0.05


@needs("docker-registry", "skopeo")
@pytest.mark.parametrize(
    "options", [["--format=oci"], ["--format=v2s2"], ["--dest-compress-format=zstd", "--format=oci"]]
)
def test_an_image_from_debians_registry_is_pulled(tmp_path: Path, debian_registry: str, options: list[str]) -> None:
    built = layers.image(TREES)
    layers.write_oci_layout(tmp_path / "layout", built, "test")
    copy = ["skopeo", "--insecure-policy", "copy", "-q", "--dest-tls-verify=false", *options]
    subprocess.run([*copy, f"oci:{tmp_path}/layout:test", f"docker://{debian_registry}/team/app:1"], check=True)
    conf = tmp_path / "registries.conf"
    conf.write_text(f'[[registry]]\nprefix = "user.test"\nlocation = "{debian_registry}"\ninsecure = true\n')

    async def story(images: Images) -> None:
        image = await images.pull("user.test/team/app:1")
        [loaded] = await images.load(tmp_path / "layout", "local.test/app:2")

        assert image.config.diff_ids == loaded.config.diff_ids == tuple(map(layers.digest, TREES))
        assert images.layer_paths(image.id)[:3] == images.layer_paths(loaded.id)[:3]
        with pytest.raises(NotFound, match=r"MANIFEST_UNKNOWN|NAME_UNKNOWN"):
            await images.pull("user.test/team/none:1")

    run(tmp_path / "images", story, registries_conf=conf)


@needs("skopeo")
@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("oci-archive:{}:user.test/app:1", "user.test/app:1"),
        ("docker-archive:{}:user.test/app:1", "user.test/app:1"),
        ("docker-archive:{}:docker.io/library/app:1", "docker.io/library/app:1"),
    ],
)
def test_archives_that_skopeo_writes_are_loaded(tmp_path: Path, target: str, name: str) -> None:
    built = layers.image(TREES, {"User": "5"})
    layers.write_oci_layout(tmp_path / "layout", built, "test")
    archive = tmp_path / "archive.tar"
    copy = ["skopeo", "--insecure-policy", "copy", "-q"]
    subprocess.run([*copy, f"oci:{tmp_path}/layout:test", target.format(archive)], check=True)
    packed = tmp_path / "archive.tar.gz"
    packed.write_bytes(gzip.compress(archive.read_bytes()))

    async def story(images: Images) -> None:
        [image] = await images.load(archive)
        assert image.repo_tags == (name,)
        assert bool(image.repo_digests) == target.startswith("oci")
        assert image.config.user == "5"
        assert image.config.diff_ids == built_ids
        assert (images.layer_paths(image.id)[0] / "etc/passwd").read_text() == "root"
        assert images.find(name) == image
        assert image.size_bytes > 0
        if target.startswith("docker"):
            assert images.find(name.rpartition("/")[2]) == (image if "docker.io" in name else None)

        [again] = await images.load(packed, "renamed.test/x")
        assert again.id == image.id
        assert again.repo_tags == (name, "renamed.test/x:latest")
        assert not any(".tmp-" in path.name for path in (tmp_path / "images/layers").iterdir())

    built_ids = tuple(map(layers.digest, TREES))
    run(tmp_path / "images", story)


def test_an_archive_of_several_images_gives_all_of_them_their_names(tmp_path: Path) -> None:
    built = [layers.image([LOWER], {"Labels": {"n": str(number)}}, compress=bytes) for number in range(2)]
    archives = [layers.docker_archive(each, [LOWER], [f"user.test/app:{at}"]) for at, each in enumerate(built)]
    (tmp_path / "one.tar").write_bytes(archives[0])
    (tmp_path / "two.tar").write_bytes(archives[1])

    async def story(images: Images) -> None:
        await images.load(tmp_path / "one.tar")
        await images.load(tmp_path / "two.tar")
        assert [image.repo_tags for image in images.list()] == [("user.test/app:0",), ("user.test/app:1",)]
        assert len(list((tmp_path / "images/layers").iterdir())) == 1

    run(tmp_path / "images", story)


def test_what_is_no_image_is_refused_with_what_was_seen(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.tar").write_bytes(LOWER)
    (tmp_path / "broken.tar").write_bytes(tar([file("manifest.json", b"[1]")]))
    (tmp_path / "lacking.tar").write_bytes(
        tar([file("manifest.json", b'[{"Config": "c", "Layers": ["l"]}]'), file("c", b"{}")])
    )
    (tmp_path / "policy.json").write_text('{"default": [{"type": "reject"}]}')

    async def story(images: Images) -> None:
        for name, kind, complaint in (
            ("none", NotFound, "there is no"),
            ("text", InvalidArgument, "is not a tar archive"),
            ("empty", InvalidArgument, "neither an OCI layout"),
            ("other.tar", InvalidArgument, "neither an OCI layout"),
            ("broken.tar", Error, "not as docker save writes it"),
            ("lacking.tar", NotFound, "has no l"),
        ):
            with pytest.raises(kind, match=complaint):
                await images.load(tmp_path / name)
        assert images.list() == ()

    run(tmp_path / "images", story)

    layers.write_oci_layout(tmp_path / "layout", layers.image([LOWER]))

    async def refused(images: Images) -> None:
        with pytest.raises(PermissionDenied, match=r"^SignatureValidationFailed"):
            await images.load(tmp_path / "layout")

    run(tmp_path / "images", refused, policy=tmp_path / "policy.json")


def test_a_layout_whose_blob_was_changed_is_refused(tmp_path: Path) -> None:
    built = layers.image([LOWER])
    layers.write_oci_layout(tmp_path / "layout", built)
    blob = tmp_path / "layout/blobs/sha256" / layers.digest(built.layers[0]).removeprefix("sha256:")
    content = bytearray(blob.read_bytes())
    content[-20] ^= 1
    blob.write_bytes(bytes(content))

    async def story(images: Images) -> None:
        with pytest.raises(Error, match=f"expected {layers.digest(built.layers[0])}"):
            await images.load(tmp_path / "layout")
        assert images.list() == ()

    run(tmp_path / "images", story)
