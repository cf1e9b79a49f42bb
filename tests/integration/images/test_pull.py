"""Images are pulled from a registry over real sockets, and a registry that misbehaves ends in a clear error."""

import asyncio
import base64
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from cri.image_service.auth import Credentials
from cri.image_service.catalog import Image
from cri.image_service.images import Images, ImageSettings
from cri.image_service.progress import Progress
from oci.errors import (
    DeadlineExceeded,
    Error,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from tests.fakes import layers
from tests.fakes.image_store import run, settings
from tests.fakes.layers import OCI_INDEX, directory, file, tar
from tests.fakes.registry import (
    Answer,
    FakeRegistry,
    Handler,
    after,
    cut_after,
    status,
    times,
    token_server,
    wants,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="layers hold owners and device nodes")

BASE = tar([directory("etc"), file("etc/base", b"base"), directory("data")])
TOP = tar(
    [
        directory("etc"),
        file("etc/top", b"top"),
        directory("data"),
        file("data/.wh..wh..opq"),
        file("big", bytes(300_000) + os.urandom(300_000)),
    ]
)
NAME = "example.test/team/app"
DENIED = b'{"errors": [{"code": "DENIED", "message": "no\\nway"}]}'


@pytest.fixture(autouse=True)
def _nothing_stays(tmp_path: Path) -> Iterator[None]:
    """No worker outlives its test, and the store holds only what is on record."""
    yield
    root = str(tmp_path)
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                command = (process / "cmdline").read_bytes()
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            assert not (b"image_service.worker" in command and parent == str(os.getpid())), root


def pull(with_settings: ImageSettings, reference: str = f"{NAME}:1", credentials: Credentials | None = None) -> Image:
    image: Image = run(with_settings, lambda images: images.pull(reference, credentials))
    return image


def layer_names(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "images/layers").iterdir())


def app(**changes: Any) -> layers.Built:
    return layers.image([BASE, TOP], {"User": "1000:5"}, **changes)


# ---- what a pull gives


def test_a_pulled_image_has_its_names_size_config_and_unpacked_layers(tmp_path: Path, registry: FakeRegistry) -> None:
    built = registry.add("team/app", "1", app())

    async def story(images: Images) -> None:
        image = await images.pull(f"{NAME}:1")

        assert image.id == built.id
        assert image.repo_tags == (f"{NAME}:1",)
        assert image.repo_digests == (f"{NAME}@{built.digest}",)
        assert image.size_bytes == sum(len(layer) for layer in built.layers) + len(built.config)
        assert (image.uid, image.username, image.pinned) == (1000, "", False)
        lower, upper = images.layer_paths(image.id)
        assert (lower / "etc/base").read_text() == "base"
        assert (upper / "etc/top").read_text() == "top"
        assert os.getxattr(upper / "data", "trusted.overlay.opaque") == b"y"
        config, manifest = await images.raw_documents(image.id)
        assert (config.encode(), manifest.encode()) == (built.config, built.manifest)
        usage = await images.fs_usage()
        assert usage.path == tmp_path / "images"
        assert usage.used_bytes > 600_000
        assert usage.inodes_used == 9
        assert usage.timestamp > 1.7e18

    run(settings(tmp_path, registry), story)


def test_an_image_is_found_by_id_prefix_tag_and_digest_alike(tmp_path: Path, registry: FakeRegistry) -> None:
    built = registry.add("team/app", "latest", app())

    async def story(images: Images) -> None:
        image = await images.pull(NAME)

        for reference in (
            image.id,
            image.id.removeprefix("sha256:"),
            image.id[:19],
            image.id.removeprefix("sha256:")[:12],
            NAME,
            f"{NAME}:latest",
            f"{NAME}@{built.digest}",
            f"{NAME}:whatever@{built.digest}",
        ):
            assert images.find(reference) == image, reference
            assert images.list(reference) == (image,)
        for reference in ("other.test/team/app", f"{NAME}:2", "sha256:" + "0" * 64, "0" * 12, "???", ""):
            assert images.find(reference) is None
        with pytest.raises(NotFound, match=f"image {NAME}:2 is not on this node"):
            images.resolve(f"{NAME}:2")
        assert images.list() == (image,)

    run(settings(tmp_path, registry), story)


def test_a_pull_by_digest_gives_a_digest_and_no_tag(tmp_path: Path, registry: FakeRegistry) -> None:
    built = registry.add("team/app", "1", app())

    image = pull(settings(tmp_path, registry), f"{NAME}@{built.digest}")

    assert image.repo_tags == ()
    assert image.repo_digests == (f"{NAME}@{built.digest}",)


def test_the_hosts_platform_is_taken_from_an_index_and_the_indexs_digest_is_the_images(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    built = {f"linux/{name}": registry.add("team/app", name, app(architecture=name)) for name in ("amd64", "arm64")}
    digest = registry.add_index("team/app", "1", layers.index(built), OCI_INDEX)

    async def story(images: Images) -> None:
        native = await images.pull(f"{NAME}:1", platform="linux/amd64")
        assert native.id == built["linux/amd64"].id
        assert native.repo_digests == (f"{NAME}@{digest}",)
        assert images.find(f"{NAME}@{built['linux/amd64'].digest}") == native

        other = await images.pull(f"{NAME}:1", platform="linux/arm64/v8")
        assert other.id == built["linux/arm64"].id

        with pytest.raises(NotFound, match="has no image for linux/s390x; it has linux/amd64, linux/arm64"):
            await images.pull(f"{NAME}:1", platform="linux/s390x")
        with pytest.raises(InvalidArgument, match="invalid platform"):
            await images.pull(f"{NAME}:1", platform="linux")

    run(settings(tmp_path, registry), story)


@pytest.mark.parametrize(
    "compress", [bytes, gzip.compress, zstandard.ZstdCompressor().compress], ids=["plain", "gzip", "zstd"]
)
def test_layers_of_every_compression_are_unpacked(tmp_path: Path, registry: FakeRegistry, compress: Any) -> None:
    registry.add("team/app", "1", app(compress=compress))

    async def story(images: Images) -> None:
        image = await images.pull(f"{NAME}:1")
        assert (images.layer_paths(image.id)[1] / "etc/top").read_text() == "top"

    run(settings(tmp_path, registry), story)


def test_a_tag_that_moved_leaves_the_old_image_with_its_digest(tmp_path: Path, registry: FakeRegistry) -> None:
    old = registry.add("team/app", "1", app())

    async def story(images: Images) -> None:
        await images.pull(f"{NAME}:1")
        new = registry.add("team/app", "1", layers.image([BASE]))
        moved = await images.pull(f"{NAME}:1")

        assert moved.id == new.id
        left = images.resolve(old.id)
        assert left.repo_tags == ()
        assert left.repo_digests == (f"{NAME}@{old.digest}",)

    run(settings(tmp_path, registry), story)


def test_an_image_without_layers_or_with_the_same_layer_twice_can_be_pulled(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    registry.add("team/app", "none", layers.image([]))
    twice = registry.add("team/app", "twice", layers.image([BASE, TOP, BASE]))

    async def story(images: Images) -> None:
        none = await images.pull(f"{NAME}:none")
        assert images.layer_paths(none.id) == ()
        assert none.size_bytes > 0

        image = await images.pull(f"{NAME}:twice")
        assert [path.parent.name for path in images.layer_paths(image.id)] == [
            layers.digest(each).removeprefix("sha256:") for each in (TOP, BASE)
        ]
        assert image.config.diff_ids == tuple(layers.digest(each) for each in (BASE, TOP, BASE))

    run(settings(tmp_path, registry), story)
    assert registry.asked[f"/v2/team/app/blobs/{layers.digest(twice.layers[0])}"] == 1


def test_layers_below_one_that_hides_all_of_them_are_no_part_of_the_image_and_go(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    """overlayfs would merge its root with theirs, whatever it says itself."""
    opaque = tar([file(".wh..wh..opq"), file("only")])
    registry.add("team/app", "1", layers.image([BASE, opaque, TOP]))
    shown = [layers.digest(each).removeprefix("sha256:") for each in (opaque, TOP)]

    async def story(images: Images) -> None:
        for _ in range(2):
            image = await images.pull(f"{NAME}:1")
            await images.sweep()
            assert [path.parent.name for path in images.layer_paths(image.id)][:2] == shown
            await eventually(lambda: layers.digest(BASE).removeprefix("sha256:") not in layer_names(tmp_path))
        assert images.find(f"{NAME}:1") == image

    run(settings(tmp_path, registry, keep_partial_s=0), story)


def test_progress_is_told_while_a_pull_runs(tmp_path: Path, registry: FakeRegistry) -> None:
    built = registry.add("team/app", "1", app())
    seen: list[tuple[str, int, int]] = []

    def note(progress: Progress) -> None:
        seen.append((progress.phase, progress.layers_done, progress.bytes_total))

    async def story(images: Images) -> None:
        pulling = asyncio.create_task(images.pull(f"{NAME}:1", on_progress=note))
        await asyncio.sleep(0)
        assert [each.reference for each in images.pulls()] == [f"{NAME}:1"]
        await pulling
        assert images.pulls() == ()

    run(settings(tmp_path, registry), story)
    assert seen[0] == ("fetching", 0, sum(len(layer) for layer in built.layers))
    assert seen[-1][:2] == ("done", 2)


def test_pinned_images_are_marked_by_name_glob_or_keyword(tmp_path: Path, registry: FakeRegistry) -> None:
    for tag in ("exact", "glob-1", "with-word-in", "plain"):
        registry.add("team/app", tag, layers.image([BASE], {"Labels": {"tag": tag}}))

    async def story(images: Images) -> dict[str, bool]:
        return {
            tag: (await images.pull(f"{NAME}:{tag}")).pinned for tag in ("exact", "glob-1", "with-word-in", "plain")
        }

    pinned = (f"{NAME}:exact", f"{NAME}:glob*", "*word*")
    assert run(settings(tmp_path, registry, pinned_images=pinned), story) == {
        "exact": True,
        "glob-1": True,
        "with-word-in": True,
        "plain": False,
    }


# ---- at once, again, and cut short


def test_the_same_pull_at_once_is_one_and_shared_layers_are_fetched_once(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    one = registry.add("team/app", "1", app())
    registry.add("team/app", "2", layers.image([BASE, tar([file("other")])]))

    async def story(images: Images) -> None:
        pulled = await asyncio.gather(*(images.pull(f"{NAME}:{tag}") for tag in (1, 1, 1, 2, 2)))
        assert len({image.id for image in pulled}) == 2
        await images.pull(f"{NAME}:1")

    run(settings(tmp_path, registry), story)
    assert registry.asked["/v2/team/app/manifests/1"] == 2
    for layer in one.layers:
        assert registry.asked[f"/v2/team/app/blobs/{layers.digest(layer)}"] == 1


def test_a_cancelled_pull_leaves_nothing_visible_and_no_temporary_directory(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    built = registry.add("team/app", "1", app())
    registry.trouble[layers.digest(built.layers[1])] = lambda handler: time.sleep(3)

    async def story(images: Images) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await images.pull(f"{NAME}:1")
        assert images.list() == ()
        assert images.pulls() == ()

        registry.trouble.clear()
        await images.pull(f"{NAME}:1")

    run(settings(tmp_path, registry), story)
    assert len(layer_names(tmp_path)) == 2
    assert registry.asked[f"/v2/team/app/blobs/{layers.digest(built.layers[0])}"] == 1  # kept for the next try


def test_one_caller_that_gives_up_does_not_end_the_pull_of_another(tmp_path: Path, registry: FakeRegistry) -> None:
    built = registry.add("team/app", "1", app())
    registry.trouble[layers.digest(built.layers[1])] = times(1, after(0.5))

    async def story(images: Images) -> None:
        patient = asyncio.create_task(images.pull(f"{NAME}:1"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await images.pull(f"{NAME}:1")
        assert (await patient).id == built.id

    run(settings(tmp_path, registry), story)
    assert registry.asked["/v2/team/app/manifests/1"] == 1


def test_layers_of_a_failed_pull_are_freed_when_no_try_follows(tmp_path: Path, registry: FakeRegistry) -> None:
    built = registry.add("team/app", "1", app())
    registry.trouble[layers.digest(built.layers[1])] = status(404)

    async def story(images: Images) -> None:
        with pytest.raises(NotFound):
            await images.pull(f"{NAME}:1")
        await eventually(lambda: layer_names(tmp_path) == [])

    run(settings(tmp_path, registry, keep_partial_s=0.3), story)


async def eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


# ---- a registry that misbehaves


def test_an_unreachable_registry_is_unavailable_in_the_cris_words(tmp_path: Path, registry: FakeRegistry) -> None:
    with pytest.raises(Unavailable, match=r"^RegistryUnavailable: .*Connection refused") as caught:
        pull(settings(tmp_path, None), "127.0.0.1:1/x:1")
    assert "127.0.0.1:1/v2/x/manifests/1" in str(caught.value)


@pytest.mark.parametrize(
    ("trouble", "kind", "complaint"),
    [
        (status(404), NotFound, "manifests/1: status 404"),
        (status(403, body=DENIED), PermissionDenied, "DENIED no way"),
        (status(418), Error, "status 418"),
        (status(500), Unavailable, "^RegistryUnavailable: .*status 500"),
        (status(429, {"Retry-After": "3600"}), Unavailable, "^RegistryUnavailable: .*status 429"),
        (status(200, body=b"<html>welcome</html>"), Error, "is not JSON: b'<html>welcome"),
        (status(200, body=b"{}"), Error, "neither a manifest nor an index"),
        (status(200, body=bytes(5 << 20)), Error, "longer than 4194304 bytes"),
        (status(302, {"Location": "/v2/team/app/manifests/1"}), Error, "more than 5 redirects"),
        (status(302, {"Location": "file:///etc/passwd"}), Error, "which is not https"),
        (status(302, {"Location": "http://u:hidden@[x/?hidden"}), Unavailable, r"app sends to 'http://\[x/', which"),
        (status(302, {"Location": "http://x:99999/"}), Unavailable, "app sends to 'http://x:99999/', which is no URL"),
        (status(401, {"WWW-Authenticate": 'Bearer realm="http://[x/"'}), Unavailable, r"sends to 'http://\[x/', which"),
        (status(503, {"Retry-After": "\xb2"}), Unavailable, "status 503"),
        (status(200, {"Docker-Content-Digest": "sha256:" + "0" * 64}, b"{}"), Error, "has the digest sha256:"),
    ],
)  # fmt: skip
def test_a_manifest_that_makes_no_sense_is_told_as_seen(
    tmp_path: Path, registry: FakeRegistry, trouble: Answer, kind: type[Error], complaint: str
) -> None:
    registry.add("team/app", "1", app())
    registry.trouble["manifests/1"] = trouble

    with pytest.raises(kind, match=complaint) as caught:
        pull(settings(tmp_path, registry))
    assert type(caught.value) is kind


def test_a_busy_registry_is_asked_again_after_the_time_it_tells(tmp_path: Path, registry: FakeRegistry) -> None:
    built = registry.add("team/app", "1", app())
    registry.trouble["manifests/1"] = times(1, status(429, {"Retry-After": "1"}))
    registry.trouble["blobs/"] = times(2, status(503))

    started = time.monotonic()

    assert pull(settings(tmp_path, registry)).id == built.id
    assert time.monotonic() - started >= 1


def test_a_manifest_of_another_digest_than_asked_for_is_refused(tmp_path: Path, registry: FakeRegistry) -> None:
    built = registry.add("team/app", "1", app())
    other = layers.image([BASE])
    registry.manifests[f"team/app@{built.digest}"] = (other.manifest, other.media_type)

    with pytest.raises(Error, match=f"has the digest {other.digest}, expected {built.digest}"):
        pull(settings(tmp_path, registry), f"{NAME}@{built.digest}")


def with_layer(served: bytes) -> Callable[[FakeRegistry, layers.Built], None]:
    def change(registry: FakeRegistry, built: layers.Built) -> None:
        registry.blobs[layers.digest(built.layers[1])] = served

    return change


def endless(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.close_connection = True
    try:
        while True:
            handler.wfile.write(bytes(1 << 16))
    except OSError:
        pass


def with_trouble(answer: Answer) -> Callable[[FakeRegistry, layers.Built], None]:
    def change(registry: FakeRegistry, built: layers.Built) -> None:
        registry.trouble[layers.digest(built.layers[1])] = answer

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (with_layer(b"short"), "ends after 5 of [0-9]+ bytes"),
        (with_layer(bytes(10 << 20)), "is longer than its [0-9]+ bytes"),
        (with_trouble(endless), "is longer than its [0-9]+ bytes"),
        (with_trouble(status(404)), "status 404"),
        (with_trouble(status(302, {"Location": "ftp://x/?secret=hidden"})), "redirected to ftp://x/.*not https"),
    ],
)
def test_a_layer_of_another_size_or_none_ends_the_pull_with_nothing_half_visible(
    tmp_path: Path, registry: FakeRegistry, change: Callable[[FakeRegistry, layers.Built], None], complaint: str
) -> None:
    built = registry.add("team/app", "1", app())
    change(registry, built)

    async def story(images: Images) -> None:
        with pytest.raises(Error, match=complaint) as caught:
            await images.pull(f"{NAME}:1")
        assert "hidden" not in str(caught.value)
        assert images.list() == ()
        await eventually(lambda: not any(".tmp-" in name for name in layer_names(tmp_path)))
        await eventually(lambda: list((tmp_path / "images/trash").iterdir()) == [])

    run(settings(tmp_path, registry), story)


def test_a_layer_of_the_right_size_but_the_wrong_digest_is_refused(tmp_path: Path, registry: FakeRegistry) -> None:
    built = registry.add("team/app", "1", app())
    for wrong in (bytes(len(built.layers[1])), built.layers[1][:-9] + bytes(9)):
        registry.blobs[layers.digest(built.layers[1])] = wrong
        with pytest.raises(Error, match=f"expected {layers.digest(built.layers[1])}"):
            pull(settings(tmp_path, registry))


def test_a_layer_that_unpacks_to_another_diff_id_is_refused(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/app", "1", app(diff_ids=[layers.digest(BASE), "sha256:" + "0" * 64]))

    with pytest.raises(Error, match=f"unpacked layer .* has the digest {layers.digest(TOP)}, expected sha256:0000"):
        pull(settings(tmp_path, registry))


@pytest.mark.parametrize(
    ("tars", "diff_ids", "complaint"),
    [
        ([b"no tar at all" * 100], None, "not a tar archive|octal number"),
        ([BASE], ["sha256:../../escape"], "not a digest"),
        ([BASE], [layers.digest(BASE)] * 2, "has 1 layers, but its config tells 2 diff IDs"),
        ([tar([file("a" * 300)])], None, "File name too long"),
    ],
)
def test_an_image_that_makes_no_sense_is_refused(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes], diff_ids: list[str] | None, complaint: str
) -> None:
    registry.add("team/app", "1", layers.image(tars, diff_ids=diff_ids))

    with pytest.raises(Error, match=complaint):
        pull(settings(tmp_path, registry))


def test_a_broken_connection_is_taken_up_where_it_broke(tmp_path: Path, registry: FakeRegistry) -> None:
    built = registry.add("team/app", "1", app())
    blob = layers.digest(built.layers[1])
    registry.trouble[blob] = times(3, cut_after(90_000))

    assert pull(settings(tmp_path, registry)).id == built.id
    ranges = [seen.get("range") for seen in registry.headers_seen if "range" in seen]
    assert ranges == ["bytes=90000-", "bytes=180000-", "bytes=270000-"]


def test_a_registry_that_ignores_ranges_is_read_from_the_start_again(tmp_path: Path, registry: FakeRegistry) -> None:
    built = registry.add("team/app", "1", app())
    blob = layers.digest(built.layers[1])
    broken = [True]

    def answer(handler: Handler) -> None:
        if broken.pop() if broken else False:
            cut_after(100_000)(handler)
        else:
            handler.send(200, built.layers[1])

    registry.trouble[blob] = answer

    assert pull(settings(tmp_path, registry)).id == built.id


def test_a_connection_that_breaks_for_ever_is_unavailable(tmp_path: Path, registry: FakeRegistry) -> None:
    built = registry.add("team/app", "1", app())
    registry.trouble[layers.digest(built.layers[1])] = cut_after(0)

    with pytest.raises(Unavailable, match=r"^RegistryUnavailable: .*at byte 0 of [0-9]+"):
        pull(settings(tmp_path, registry))


def test_a_registry_that_says_nothing_ends_at_the_progress_timeout(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/app", "1", app())
    registry.trouble["blobs/"] = lambda handler: time.sleep(3)

    with pytest.raises(DeadlineExceeded, match=r"no progress in 1 s while asking for example.test/team/app:1"):
        pull(settings(tmp_path, registry, progress_timeout_s=1.0))


# ---- mirrors, policy, credentials, TLS


def test_mirrors_are_tried_in_order_and_the_name_stays_the_users(tmp_path: Path, registry: FakeRegistry) -> None:
    built = registry.add("hub/app", "1", app())
    conf = f"""
    [[registry]]
    location = "user.test"
    [[registry.mirror]]
    location = "127.0.0.1:1"
    insecure = true
    [[registry.mirror]]
    location = "{registry.address}/empty"
    insecure = true
    [[registry.mirror]]
    location = "{registry.address}/hub"
    insecure = true
    """

    image = pull(settings(tmp_path, registry, conf), "user.test/app:1")

    assert image.repo_tags == ("user.test/app:1",)
    assert image.repo_digests == (f"user.test/app@{built.digest}",)


def mirrored(registry: FakeRegistry, mirror: FakeRegistry) -> str:
    """registries.conf, by which user.test is `registry` with a mirror that is asked first."""
    return (
        f'[[registry]]\nprefix = "user.test"\nlocation = "{registry.address}/hub"\ninsecure = true\n'
        f'[[registry.mirror]]\nlocation = "{mirror.address}/hub"\ninsecure = true\n'
    )


def test_a_mirror_that_sends_to_what_is_no_url_is_passed_over_for_the_next(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    with FakeRegistry() as mirror:
        built = registry.add("hub/app", "1", app())
        mirror.add("hub/app", "1", built)
        mirror.trouble[layers.digest(built.layers[1])] = status(302, {"Location": "http://[x/"})

        assert pull(settings(tmp_path, extra=mirrored(registry, mirror)), "user.test/app:1").id == built.id

    assert registry.asked[f"/v2/hub/app/blobs/{layers.digest(built.layers[1])}"] == 1


def test_a_mirror_whose_layer_is_wrong_is_passed_over_for_the_next(tmp_path: Path, registry: FakeRegistry) -> None:
    with FakeRegistry() as mirror:
        built = registry.add("hub/app", "1", app())
        mirror.add("hub/app", "1", built)
        mirror.blobs[layers.digest(built.layers[0])] = bytes(len(built.layers[0]))

        assert pull(settings(tmp_path, extra=mirrored(registry, mirror)), "user.test/app:1").id == built.id

    assert registry.asked[f"/v2/hub/app/blobs/{layers.digest(built.layers[0])}"] == 1
    assert registry.asked[f"/v2/hub/app/blobs/{layers.digest(built.layers[1])}"] == 0


def test_the_error_of_the_primary_comes_first_and_the_mirrors_follow(tmp_path: Path, registry: FakeRegistry) -> None:
    conf = (
        f'[[registry]]\nprefix = "user.test"\nlocation = "{registry.address}/hub"\ninsecure = true\n'
        '[[registry.mirror]]\nlocation = "127.0.0.1:1"\ninsecure = true\n'
    )

    with pytest.raises(
        NotFound, match=r"hub/app/manifests/1: status 404.* \(before that, 127.0.0.1:1/app: .*refused\)"
    ):
        pull(settings(tmp_path, registry, conf), "user.test/app:1")


def test_a_short_name_is_looked_for_in_each_search_registry(tmp_path: Path, registry: FakeRegistry) -> None:
    built = registry.add("library/app", "1", app())
    where = settings(tmp_path, registry)
    assert where.registries_conf is not None
    where.registries_conf.write_text(
        'unqualified-search-registries = ["none.test", "docker.io"]\n'
        + "".join(
            f'[[registry]]\nprefix = "{name}"\nlocation = "{registry.address}{path}"\ninsecure = true\n'
            for name, path in (("none.test", "/none"), ("docker.io", ""))
        )
    )

    async def story(images: Images) -> None:
        image = await images.pull("app:1")
        assert image.id == built.id
        assert image.repo_tags == ("docker.io/library/app:1",)
        assert images.find("app:1") == image

    run(where, story)


def test_a_registry_is_only_asked_in_plain_http_where_it_is_insecure(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("app", "1", app())

    with pytest.raises(Unavailable, match=r"^RegistryUnavailable: GET https://"):
        pull(settings(tmp_path, None), f"{registry.address}/app:1")
    assert registry.asked.total() == 0


def test_the_policy_refuses_before_anything_is_asked_for(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/app", "1", app())
    policy = tmp_path / "policy.json"
    policy.write_text('{"default": [{"type": "reject"}]}')

    with pytest.raises(PermissionDenied, match=r"^SignatureValidationFailed: .*rejects image example.test/team/app:1"):
        pull(settings(tmp_path, registry, policy=policy))
    assert registry.asked.total() == 0


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


def test_basic_credentials_are_shown_when_asked_for(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/app", "1", app())
    registry.trouble["^/v2/"] = wants(basic("me:pa:ss"), 'Basic realm="r"')
    where = settings(tmp_path, registry)

    with pytest.raises(PermissionDenied, match="wants credentials for team/app"):
        pull(where)
    with pytest.raises(PermissionDenied, match="status 401"):
        pull(where, credentials=Credentials("me", "wrong", server_address=registry.address))
    assert pull(where, credentials=Credentials("me", "pa:ss", server_address=registry.address))
    assert "authorization" not in registry.headers_seen[0]


def test_a_token_is_fetched_with_the_credentials_and_once_for_all_layers(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    registry.add("team/app", "1", app())
    challenge = f'Bearer realm="http://{registry.address}/token?a=b",service="s",scope="repository:team/app:pull"'
    registry.trouble["^/token"] = token_server({basic("me:pw"): "mine", "": "anonymous"})
    registry.trouble["^/v2/"] = wants("Bearer mine", challenge)
    where = settings(tmp_path, registry)

    with pytest.raises(PermissionDenied, match="status 401"):
        pull(where)
    with pytest.raises(PermissionDenied, match=r"token server .* refuses .*wrong password") as caught:
        pull(where, credentials=Credentials("me", "hunter2", server_address=registry.address))
    assert "hunter2" not in str(caught.value)
    assert "a=b" not in str(caught.value)

    registry.asked.clear()
    assert pull(where, credentials=Credentials("me", "pw", server_address=registry.address))
    tokens = [path for path in registry.asked if path.startswith("/token")]
    assert tokens == ["/token?a=b&service=s&scope=repository%3Ateam%2Fapp%3Apull"]
    assert registry.asked[tokens[0]] == 1


def test_an_anonymous_token_an_identity_token_and_a_registry_token_open_a_registry(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    registry.add("team/app", "1", app())
    challenge = f'Bearer realm="http://{registry.address}/token",service="s"'
    registry.trouble["^/token"] = token_server({"": "t"})
    registry.trouble["^/v2/"] = wants("Bearer t", challenge)

    assert pull(settings(tmp_path, registry))
    assert pull(
        settings(tmp_path, registry), credentials=Credentials(identity_token="i", server_address=registry.address)
    )
    assert registry.asked["/token"] == 1  # the POST with the refresh token

    registry.asked.clear()
    assert pull(
        settings(tmp_path, registry), credentials=Credentials(registry_token="t", server_address=registry.address)
    )
    assert not any(path.startswith("/token") for path in registry.asked)


def test_the_auth_file_serves_a_mirror(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/app", "1", app())
    registry.trouble["^/v2/"] = wants(basic("file:secret"), 'Basic realm="r"')
    auth_file = tmp_path / "auth.json"
    auth_file.write_text(json.dumps({"auths": {f"{registry.address}/team": {"auth": basic("file:secret")[6:]}}}))

    assert pull(settings(tmp_path, registry, auth_file=auth_file))


def test_credentials_do_not_follow_a_redirect_to_another_host(tmp_path: Path, registry: FakeRegistry) -> None:
    built = registry.add("team/app", "1", app())
    with FakeRegistry() as storage:
        storage.blobs.update(built.blobs)

        def answer(handler: Handler) -> None:
            handler.send(307, b"", {"Location": f"http://{storage.address}{handler.path}?signature=secret"})

        storage.trouble["^/v2/"] = lambda handler: handler.send(
            200, storage.blobs[handler.path.partition("?")[0].rpartition("/")[2]]
        )
        registry.trouble["blobs/"] = answer
        registry.trouble["manifests/"] = wants(basic("me:pw"), 'Basic realm="r"')

        assert pull(settings(tmp_path, registry), credentials=Credentials("me", "pw", server_address=registry.address))
        assert storage.asked.total() == 3
        assert not any("authorization" in seen for seen in storage.headers_seen)

        storage.trouble["^/v2/"] = status(403)
        run(settings(tmp_path, registry), lambda images: images.remove(f"{NAME}:1"))
        with pytest.raises(PermissionDenied) as caught:
            pull(settings(tmp_path, registry), credentials=Credentials("me", "pw", server_address=registry.address))
        assert "secret" not in str(caught.value)


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A directory with a certificate for 127.0.0.1 that is its own authority."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    made = tmp_path / "tls"
    made.mkdir()
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    extension = "-addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        [*command.split(), *extension.split(), "-keyout", str(made / "key"), "-out", str(made / "crt")],
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    return made


def test_tls_is_trusted_by_the_registrys_certificate_directory_alone(tmp_path: Path, authority: Path) -> None:
    with FakeRegistry(certificate=authority / "crt", key=authority / "key") as secure:
        built = secure.add("app", "1", app())
        certs = tmp_path / "certs.d"
        where = settings(tmp_path, None, certs_dir=certs)

        with pytest.raises(Unavailable, match=r"^RegistryUnavailable: .*certificate not trusted: self.signed"):
            pull(where, f"{secure.address}/app:1")

        (certs / secure.address).mkdir(parents=True)
        shutil.copy(authority / "crt", certs / secure.address / "ca.crt")
        shutil.copy(authority / "crt", certs / secure.address / "client.cert")
        shutil.copy(authority / "key", certs / secure.address / "client.key")
        assert pull(where, f"{secure.address}/app:1").id == built.id

        (certs / secure.address / "client.key").write_text("broken")
        with pytest.raises(Error, match="cannot use the certificates in"):
            pull(where, f"{secure.address}/app:1")


def test_an_insecure_registry_may_have_any_certificate(tmp_path: Path, authority: Path) -> None:
    with FakeRegistry(certificate=authority / "crt", key=authority / "key") as secure:
        built = secure.add("team/app", "1", app())

        assert pull(settings(tmp_path, secure)).id == built.id


# ---- removal and holders


def test_removing_by_one_tag_takes_all_names_and_the_layers_nobody_else_has(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    for tag in ("1", "2"):
        registry.add("team/app", tag, app())
    registry.add("team/base", "1", layers.image([BASE]))

    async def story(images: Images) -> None:
        await asyncio.gather(*(images.pull(f"example.test/team/{name}") for name in ("app:1", "app:2", "base:1")))

        await asyncio.gather(*(images.remove(f"{NAME}:1") for _ in range(5)))

        assert images.find(f"{NAME}:2") is None
        assert [image.repo_tags for image in images.list()] == [("example.test/team/base:1",)]
        await images.remove(f"{NAME}:1")
        await images.remove("never.test/was:here")
        base = layers.digest(BASE).removeprefix("sha256:")
        await eventually(lambda: layer_names(tmp_path) == [base])
        await eventually(lambda: list((tmp_path / "images/trash").iterdir()) == [])

    run(settings(tmp_path, registry), story)


def test_a_held_image_keeps_its_layers_until_the_last_holder_is_gone(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/app", "1", app())

    async def story(images: Images) -> None:
        image = await images.pull(f"{NAME}:1")
        images.hold(image.id, "one")
        images.hold(image.id, "two")
        await images.remove(image.id)

        assert images.list() == ()
        paths = images.layer_paths(image.id)
        images.release("one")
        await asyncio.sleep(0.05)
        assert all(path.is_dir() for path in paths)

        images.release("two")
        images.release("two")
        await eventually(lambda: layer_names(tmp_path) == [])
        with pytest.raises(NotFound):
            images.layer_paths(image.id)
        with pytest.raises(NotFound):
            images.hold(image.id, "three")

    run(settings(tmp_path, registry), story)


def test_a_held_image_that_was_removed_survives_a_restart_and_goes_when_nobody_claims_it(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    registry.add("team/app", "1", app())
    where = settings(tmp_path, registry)

    async def remove_while_held(images: Images) -> str:
        image = await images.pull(f"{NAME}:1")
        images.hold(image.id, "one")
        await images.remove(image.id)
        return image.id

    async def still_held(images: Images) -> None:
        images.hold(image_id, "one")
        await images.sweep()
        assert images.list() == ()
        assert all(path.is_dir() for path in images.layer_paths(image_id))

    async def nobody_claims(images: Images) -> None:
        await images.sweep()
        await eventually(lambda: layer_names(tmp_path) == [])

    image_id = run(where, remove_while_held)
    run(where, still_held)
    run(where, nobody_claims)


def test_a_pull_during_a_removal_ends_with_a_whole_image(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/app", "1", app())

    async def story(images: Images) -> None:
        for _ in range(15):
            image = await images.pull(f"{NAME}:1")
            removing = asyncio.create_task(images.remove(f"{NAME}:1"))
            for _ in range(3):
                await asyncio.sleep(0)
            image = await images.pull(f"{NAME}:1")
            await removing
            if images.find(image.id) is not None:
                assert all((path.parent / "diff").is_dir() for path in images.layer_paths(image.id))
        await images.remove(f"{NAME}:1")
        await eventually(lambda: layer_names(tmp_path) == [])

    run(settings(tmp_path, registry), story)


# ---- restart and crashes


def test_everything_is_there_after_a_restart(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/app", "1", app())
    registry.add("team/app", "2", layers.image([BASE]))
    where = settings(tmp_path, registry)

    async def pull_both(images: Images) -> Any:
        await images.pull(f"{NAME}:1")
        await images.pull(f"{NAME}:2")
        return images.list(), (await images.fs_usage()).used_bytes

    async def look(images: Images) -> Any:
        return images.list(), (await images.fs_usage()).used_bytes

    assert run(where, pull_both) == run(where, look)


def test_an_image_whose_layer_is_lost_is_not_listed_and_only_that_layer_is_fetched_again(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    built = registry.add("team/app", "1", app())
    where = settings(tmp_path, registry)
    pull(where)
    (tmp_path / "images/layers/garbage.tmp-1").mkdir()
    shutil.rmtree(tmp_path / "images/layers" / layers.digest(TOP).removeprefix("sha256:"))
    registry.asked.clear()

    async def story(images: Images) -> None:
        assert images.list() == ()
        assert not (tmp_path / "images/layers/garbage.tmp-1").exists()
        await images.pull(f"{NAME}:1")

    run(where, story)
    blobs = [layers.digest(blob) for blob in built.layers]
    assert [registry.asked[f"/v2/team/app/blobs/{blob}"] for blob in blobs] == [0, 1]


def has_open(pid: int, path: Path) -> bool:
    return path in [each.readlink() for each in Path(f"/proc/{pid}/fd").glob("*") if each.is_symlink()]


def test_a_killed_worker_is_an_error_that_says_so_and_leaves_nothing(tmp_path: Path, registry: FakeRegistry) -> None:
    built = registry.add("team/app", "1", app())
    held = layers.digest(built.layers[1])

    def slow(handler: Handler) -> None:
        blob = handler.served.blobs[held]
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(blob)))
        handler.end_headers()
        handler.wfile.write(blob[:200_000])
        handler.wfile.flush()
        time.sleep(3)

    registry.trouble[held] = slow

    async def story(images: Images) -> None:
        pulling = asyncio.create_task(images.pull(f"{NAME}:1"))
        fetched = tmp_path / "images/partial" / held.replace(":", "-")
        await eventually(lambda: any(has_open(pid, fetched) for pid in images.worker_pids))
        for pid in images.worker_pids:
            if has_open(pid, fetched):
                os.kill(pid, signal.SIGKILL)

        with pytest.raises(Unavailable, match=f"image worker was killed by signal 9 while .*{held}"):
            await pulling
        await eventually(lambda: not any(".tmp-" in name for name in layer_names(tmp_path)))
        registry.trouble.clear()
        assert (await images.pull(f"{NAME}:1")).id == built.id

    run(settings(tmp_path, registry), story)


def test_a_daemon_killed_amid_a_pull_leaves_no_worker_and_a_store_that_goes_on(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    built = registry.add("team/app", "1", app())
    held = layers.digest(built.layers[1])
    registry.trouble[held] = times(1, lambda handler: time.sleep(3))
    where = settings(tmp_path, registry)
    program = (
        "import asyncio, sys; from pathlib import Path; from cri.image_service.images import Images, ImageSettings\n"
        "async def main():\n"
        "    images = await Images.open(ImageSettings(Path(sys.argv[1]), Path(sys.argv[2])))\n"
        "    await images.pull(sys.argv[3])\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", program, str(where.root), str(where.registries_conf), f"{NAME}:1"]
    with subprocess.Popen(command, cwd=Path(__file__).parents[3]) as daemon:
        first = layers.digest(BASE).removeprefix("sha256:")
        unpacked = f"images/layers/{first}.tmp-*/unpacked.json"
        wait_until(lambda: registry.asked[f"/v2/team/app/blobs/{held}"] > 0 and any(tmp_path.glob(unpacked)))
        workers = [int(pid) for pid in Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()]
        daemon.kill()

    assert workers
    wait_until(lambda: not any(Path(f"/proc/{pid}/fd").exists() and is_alive(pid) for pid in workers))

    async def story(images: Images) -> None:
        assert images.list() == ()
        assert not any(".tmp-" in name for name in layer_names(tmp_path))
        assert (await images.pull(f"{NAME}:1")).id == built.id

    run(where, story)
    assert registry.asked[f"/v2/team/app/blobs/{layers.digest(built.layers[0])}"] == 1


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_full_disk_is_told_as_such_and_freed_again(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/app", "1", app())
    registry.add("team/app", "small", layers.image([BASE]))
    where = settings(tmp_path, registry)
    where.root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "none", str(where.root)], check=True)
    try:

        async def story(images: Images) -> None:
            with pytest.raises(
                ResourceExhausted, match=r"^no room on the file system of the image store while fetching"
            ):
                await images.pull(f"{NAME}:1")
            await eventually(lambda: not any(".tmp-" in name for name in layer_names(tmp_path)))
            await eventually(lambda: list((tmp_path / "images/trash").iterdir()) == [])
            await images.pull(f"{NAME}:small")

        run(where, story)
    finally:
        subprocess.run(["umount", str(where.root)], check=True)


def test_no_step_of_a_pull_holds_up_the_loop(
    tmp_path: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the processor's time: whatever else the machine does at that moment is not the pull's doing."""
    contents = [[file(f"{at}/{number}", bytes(number)) for number in range(3000)] for at in range(6)]
    registry.add("team/app", "1", layers.image([tar(content) for content in contents]))
    longest_s = 0.0
    run_handle = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        nonlocal longest_s
        began = time.thread_time()
        run_handle(handle)
        longest_s = max(longest_s, time.thread_time() - began)

    async def story(images: Images) -> None:
        monkeypatch.setattr(asyncio.Handle, "_run", timed)
        await images.pull(f"{NAME}:1")
        monkeypatch.undo()

    run(settings(tmp_path, registry), story)

    assert 0 < longest_s < 0.010
