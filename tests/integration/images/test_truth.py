"""What the disk holds is what the records say: after kills, after a power loss, and when a pull goes on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EIO
from pathlib import Path
from typing import Any

import pytest

from cri.image_service.images import Images, ImageSettings
from cri.image_service.repair import Damage
from cri.image_service.store import Store
from oci.container_spec import ContainerId
from oci.errors import Unavailable
from oci.rootfs import Rootfs
from tests.fakes import layers
from tests.fakes.image_store import run, settings
from tests.fakes.layers import Built, directory, file, symlink, tar
from tests.fakes.registry import FakeRegistry, cut_after, status

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="layers hold owners and device nodes")

BASE = tar([directory("etc"), file("etc/base", b"base" * 1000), symlink("etc/link", "base"), directory("empty")])
TOP = tar([directory("etc"), file("etc/top", os.urandom(600_000))])
OTHER = tar([directory("etc"), file("etc/other", b"other")])
NAME = "example.test/team/app"


def asked(registry: FakeRegistry, blob: bytes) -> int:
    return registry.asked[f"/v2/team/app/blobs/{layers.digest(blob)}"]


def lose_power(where: ImageSettings) -> None:
    """As a daemon finds it that starts after the machine went down under another."""
    (where.root / "running").write_text("the boot before")


def tree(where: ImageSettings, plain: bytes) -> Path:
    return where.root / "layers" / layers.digest(plain).removeprefix("sha256:") / "diff"


def truncate(path: Path) -> None:
    os.truncate(path / "etc/base", 10)


def zero(path: Path) -> None:
    (path / "etc/base").write_bytes(bytes(4000))


def lose_file(path: Path) -> None:
    (path / "etc/base").unlink()


def lose_directory(path: Path) -> None:
    (path / "empty").rmdir()


def turn_link(path: Path) -> None:
    (path / "etc/link").unlink()
    (path / "etc/link").symlink_to("elsewhere")


def add_file(path: Path) -> None:
    (path / "etc/more").touch()


def zero_list(path: Path) -> None:
    listed = path.parent / "files"
    listed.write_bytes(bytes(listed.stat().st_size))


def lose_list(path: Path) -> None:
    (path.parent / "files").unlink()


DAMAGE = [truncate, zero, lose_file, lose_directory, turn_link, add_file, zero_list, lose_list]


def two_images(registry: FakeRegistry) -> tuple[Built, Built]:
    one = registry.add("team/app", "1", layers.image([BASE, TOP]))
    return one, registry.add("team/app", "2", layers.image([BASE, OTHER]))


def pull_both(where: ImageSettings) -> None:
    async def story(images: Images) -> None:
        await images.pull(f"{NAME}:1")
        await images.pull(f"{NAME}:2")

    run(where, story)


@pytest.mark.parametrize("damage", DAMAGE)
def test_after_a_power_loss_a_damaged_layer_is_fetched_again_alone_before_it_is_used(
    tmp_path: Path, registry: FakeRegistry, damage: Callable[[Path], None]
) -> None:
    one, two = two_images(registry)
    where = settings(tmp_path, registry)
    pull_both(where)
    lose_power(where)
    damage(tree(where, BASE))

    async def story(images: Images) -> None:
        assert images.suspects == 3
        await images.ensure(one.id)

        assert (tree(where, BASE) / "etc/base").read_bytes() == b"base" * 1000
        assert {image.id for image in images.list()} == {one.id, two.id}
        await images.ensure(two.id)
        assert images.suspects == 0

    run(where, story)
    assert [asked(registry, blob) for blob in (*one.layers, two.layers[1])] == [2, 1, 1]
    assert not any((where.root / "trash").iterdir())


def test_what_is_verified_stays_so_and_after_a_clean_end_nothing_is_verified(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    one, _ = two_images(registry)
    where = settings(tmp_path, registry)
    pull_both(where)
    run(where, lambda images: expect_suspects(images, 0))
    lose_power(where)

    async def story(images: Images) -> None:
        await images.ensure(one.id)
        assert images.suspects == 1

    run(where, story)
    run(where, lambda images: expect_suspects(images, 1))
    assert asked(registry, one.layers[0]) == 1


def test_a_start_that_is_cut_short_does_not_forget_that_the_power_was_lost(
    tmp_path: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_images(registry)
    where = settings(tmp_path, registry)
    pull_both(where)
    lose_power(where)

    def cut_short(_: Store) -> None:
        raise OSError(EIO, "the disk is gone again")

    with monkeypatch.context() as broken:
        broken.setattr(Store, "suspect_all", cut_short)
        with pytest.raises(OSError, match="gone again"):
            run(where, lambda images: expect_suspects(images, 0))

    run(where, lambda images: expect_suspects(images, 3))


async def expect_suspects(images: Images, count: int) -> None:
    assert images.suspects == count


def test_a_damaged_image_that_cannot_be_fetched_again_is_not_listed_and_a_pull_heals_all_that_have_the_layer(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    one, two = two_images(registry)
    where = settings(tmp_path, registry)
    pull_both(where)
    lose_power(where)
    truncate(tree(where, BASE))
    registry.trouble["blobs"] = status(403)

    async def story(images: Images) -> None:
        with pytest.raises(
            Unavailable, match=r"was damaged by an unclean shutdown and could not be fetched again: .*403"
        ):
            await images.ensure(one.id)
        assert images.list() == ()
        assert images.find(f"{NAME}:1") is None

        registry.trouble.clear()
        await images.pull(f"{NAME}:1")
        await images.pull(f"{NAME}:2")
        assert {image.id for image in images.list()} == {one.id, two.id}

    run(where, story)
    assert (tree(where, BASE) / "etc/base").read_bytes() == b"base" * 1000
    assert [asked(registry, blob) for blob in (one.layers[1], two.layers[1])] == [1, 1]


def test_a_pull_after_a_power_loss_verifies_what_it_finds(tmp_path: Path, registry: FakeRegistry) -> None:
    one, two = two_images(registry)
    where = settings(tmp_path, registry)
    pull_both(where)
    lose_power(where)
    zero(tree(where, BASE))

    async def story(images: Images) -> None:
        await images.pull(f"{NAME}:2")
        assert {image.id for image in images.list()} == {one.id, two.id}

    run(where, story)
    assert (tree(where, BASE) / "etc/base").read_bytes() == b"base" * 1000


def test_the_store_is_verified_on_demand_and_healed_where_asked_to_but_not_under_containers(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    one, _ = two_images(registry)
    where = settings(tmp_path, registry)
    pull_both(where)
    zero(tree(where, BASE))
    truncate_top = tree(where, TOP) / "etc/top"
    os.truncate(truncate_top, 5)

    async def found(images: Images, repair: bool) -> list[Damage]:
        return [damage async for damage in images.verify(repair)]

    async def story(images: Images) -> None:
        seen = {damage.diff_id: damage for damage in await found(images, False)}
        assert set(seen) == {layers.digest(BASE), layers.digest(TOP)}
        assert seen[layers.digest(TOP)].found == "etc/top: 5 bytes, 600000 were unpacked"
        assert seen[layers.digest(TOP)].images == (f"{NAME}@{one.digest}",)

        images.hold(one.id, "container")
        assert {damage.outcome for damage in await found(images, True)} == {"not repaired: containers run from it"}
        images.release("container")
        assert {damage.outcome for damage in await found(images, True)} == {"repaired"}
        assert await found(images, True) == []

    run(where, story)


PULLER = (
    "import asyncio, sys; from pathlib import Path; from cri.image_service.images import Images, ImageSettings\n"
    "async def main():\n"
    "    images = await Images.open(ImageSettings(Path(sys.argv[1]), Path(sys.argv[2])))\n"
    "    try:\n"
    "        await images.pull(sys.argv[3])\n"
    "    finally:\n"  # as the daemon does: a loop that ends amid a worker's start waits for that for ever
    "        await images.close()\n"
    "asyncio.run(main())\n"
)


@contextmanager
def puller(where: ImageSettings) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that pulls; it does not outlive the block, whatever becomes of it there."""
    command = [sys.executable, "-c", PULLER, str(where.root), str(where.registries_conf), f"{NAME}:1"]
    daemon = subprocess.Popen(command, cwd=Path(__file__).parents[3], stderr=subprocess.DEVNULL)
    try:
        yield daemon
    finally:
        daemon.kill()
        daemon.wait()


def test_an_interrupted_pull_goes_on_at_the_byte_it_had_reached_also_after_a_restart(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    built = registry.add("team/app", "1", layers.image([BASE, TOP]))
    held = layers.digest(built.layers[1])

    def some_then_nothing(handler: Any) -> None:
        cut = handler.served.blobs[held][:400_000]
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(handler.served.blobs[held])))
        handler.end_headers()
        handler.wfile.write(cut)
        handler.wfile.flush()
        time.sleep(3)

    registry.trouble[held] = some_then_nothing
    where = settings(tmp_path, registry)
    partial = where.root / "partial" / held.replace(":", "-")
    with puller(where) as daemon:
        wait_until(lambda: partial.exists() and partial.stat().st_size > 0)
        daemon.kill()
    reached = partial.stat().st_size
    registry.trouble.clear()

    async def story(images: Images) -> None:
        image = await images.pull(f"{NAME}:1")
        assert image.id == built.id

    run(where, story)
    assert f"bytes={reached}-" in [headers.get("range") for headers in registry.headers_seen]
    assert not any((where.root / "partial").iterdir())


def test_what_is_left_of_a_blob_and_is_wrong_is_fetched_anew(tmp_path: Path, registry: FakeRegistry) -> None:
    built = registry.add("team/app", "1", layers.image([BASE]))
    where = settings(tmp_path, registry)
    partial = where.root / "partial" / layers.digest(built.layers[0]).replace(":", "-")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(100))

    async def story(images: Images) -> None:
        assert (await images.pull(f"{NAME}:1")).id == built.id

    run(where, story)
    assert not any((where.root / "partial").iterdir())


@pytest.mark.parametrize("kind", ["image", "artifact"])
@pytest.mark.parametrize("victim", ["daemon", "worker"])
def test_kills_at_any_moment_of_a_pull_leave_a_store_in_which_every_listed_image_is_whole(
    tmp_path: Path, registry: FakeRegistry, victim: str, kind: str
) -> None:
    contents = [BASE, TOP, OTHER]
    artifact = layers.artifact((f"dir/{at}", content) for at, content in enumerate(contents))
    built = registry.add("team/app", "1", layers.image(contents) if kind == "image" else artifact)
    where = settings(tmp_path, registry)
    for moment in range(8):
        with puller(where) as daemon:
            time.sleep(0.25 + 0.09 * moment)
            if victim == "daemon":
                daemon.kill()
            else:
                for pid in children(daemon.pid):
                    with suppress(ProcessLookupError):  # ended by itself in between
                        os.kill(pid, signal.SIGKILL)
                daemon.wait(30)

        run(where, expect_whole)
    assert run(where, lambda images: images.pull(f"{NAME}:1")).manifest_digest == built.digest


async def expect_whole(images: Images) -> None:
    """Whatever is listed can run; then it is removed, for the next pull to do it all again."""
    for image in images.list():
        assert [path.is_dir() for path in images.layer_paths(image.id)] == [True] * 3
        assert not list(images.layer_paths(image.id)[0].parents[1].glob("*.tmp-*"))
    assert [damage async for damage in images.verify()] == []
    await images.remove(f"{NAME}:1")


def children(pid: int) -> list[int]:
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_layer_is_kept_when_the_pull_that_unpacked_it_fails(tmp_path: Path, registry: FakeRegistry) -> None:
    built = registry.add("team/app", "1", layers.image([BASE, TOP]))
    registry.trouble[layers.digest(built.layers[1])] = cut_after(0)

    async def story(images: Images) -> None:
        with pytest.raises(Unavailable):
            await images.pull(f"{NAME}:1")
        registry.trouble.clear()
        await images.pull(f"{NAME}:1")

    run(settings(tmp_path, registry), story)
    assert asked(registry, built.layers[0]) == 1


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
def test_an_image_of_200_layers_is_pulled_and_mounted(tmp_path: Path, registry: FakeRegistry) -> None:
    plain = [tar([directory("d"), file(f"d/{at}", str(at).encode())]) for at in range(200)]
    registry.add("team/app", "1", layers.image(plain))

    async def story(images: Images) -> tuple[Path, ...]:
        image = await images.pull(f"{NAME}:1")
        return images.layer_paths(image.id)

    paths = run(settings(tmp_path, registry), story)
    assert len(paths) == 200
    mount_and_look(Rootfs(tmp_path / "containers", tmp_path / "run"), paths)


def mount_and_look(rootfs: Rootfs, paths: tuple[Path, ...]) -> None:
    rootfs.prepare()
    try:
        mounted = rootfs.mount(ContainerId("c1"), paths)
        assert len(list((mounted / "d").iterdir())) == 200
    finally:
        rootfs.remove(ContainerId("c1"))
        rootfs.release()
