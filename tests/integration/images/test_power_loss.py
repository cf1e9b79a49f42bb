"""Power losses at many moments of pulls, a removal and a repair, on a real ext4 whose every write was recorded.

What survives is never half: an image that is listed can be had as it was pulled, and one whose pull had succeeded is.
"""

import asyncio
import random
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from cri.image_service.images import Images, ImageSettings
from oci.errors import Unavailable
from oci.linux import proc
from tests.fakes import layers
from tests.fakes import recorded_disk as disk
from tests.fakes.image_store import run
from tests.fakes.layers import directory, entry, file, hard_link, symlink, tar
from tests.fakes.recorded_disk import Recording, Write, mounted_ext4, recorded_disk
from tests.fakes.registry import FakeRegistry, after, status
from tests.trees import Described, Tree, described

pytestmark = pytest.mark.skipif(bool(disk.why_not()), reason=disk.why_not() or "-")

DISK_BYTES = 96 << 20
LOSSES = 24  # at any moment, beside those right after what was answered
NAME = "example.test/team/app"
BASE = tar(
    [
        directory("etc", 0o750, uid=3, mtime=1000),
        file("etc/base", b"base" * 50_000, 0o640, uid=1, gid=2),
        hard_link("etc/same", "etc/base"),
        symlink("etc/link", "base"),
        directory("opaque"),
        file("opaque/hidden", b"h"),
        directory("many"),
        *(file(f"many/{at}", str(at).encode() * at) for at in range(300)),
        entry("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
    ]
)
LARGE = tar([file("etc/large", random.Random(1).randbytes(3_000_000))])  # implies etc: its image has a layer for that
OTHER = tar([directory("opaque"), file("opaque/.wh..wh..opq"), file(".wh.null"), file("other", b"other" * 9000)])
LAST = tar([file(f"last/{at}", random.Random(at).randbytes(2000)) for at in range(200)])
IMAGES = {"1": [BASE, LARGE], "2": [BASE, OTHER], "3": [LAST], "4": [BASE, LARGE, OTHER, LAST]}

# What a daemon does until the power goes; each line says how much the disk had been told by then.
STORY = """
import asyncio, os, sys
from pathlib import Path
from cri.image_service.images import Images, ImageSettings

ROOT, CONF, LOG = map(Path, sys.argv[1:4])
NAME = sys.argv[4]

def say(*words):
    print(LOG.stat().st_size, *words, flush=True)

async def pull(images, tag):
    await images.pull(f"{NAME}:{tag}")
    say("whole", tag)

async def repaired(images, tag):
    damaged = images.layer_paths(images.find(f"{NAME}:{tag}").id)[0] / "etc/base"
    say("doubtful", "1"), say("doubtful", "2"), say("doubtful", "4")
    damaged.write_bytes(b"damage")
    assert [each.outcome async for each in images.verify(repair=True)] == ["repaired"]
    for each in "14":
        say("whole", each)

async def main():
    images = await Images.open(ImageSettings(ROOT, CONF))
    say("begun")
    await asyncio.gather(pull(images, "1"), pull(images, "2"))
    await asyncio.sleep(1.2)
    await pull(images, "3")
    say("doubtful", "2")
    await images.remove(f"{NAME}:2")
    say("removed", "2")
    await pull(images, "4")
    await repaired(images, "1")
    say("doubtful", "3")
    await images.remove(f"{NAME}:3")
    say("removed", "3")
    await pull(images, "3")
    await asyncio.sleep(1.2)
    os._exit(0)  # nothing is closed: the power is gone

asyncio.run(main())
"""


@dataclass(frozen=True, slots=True)
class Event:
    position: int  # in the recording, at the latest
    what: str
    tag: str = ""


@dataclass(frozen=True, slots=True)
class Lived:
    """A store's life on a recorded disk, and what its images look like."""

    recording: Recording
    writes: Sequence[Write]
    events: Sequence[Event]
    trees: Mapping[str, Sequence[Tree]]  # of an image's layers, by tag

    def last(self, position: int) -> dict[str, str]:
        """What had happened last to each image, by tag, when so much had been written."""
        return {event.tag: event.what for event in self.events if event.tag and event.position <= position}


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs: the disks that lie here need wait for no real one."""
    at = tmp_path / "memory"
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "power-loss", str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


@pytest.fixture
def registry(registry: FakeRegistry) -> FakeRegistry:
    for tag, plain in IMAGES.items():
        registry.add("team/app", tag, layers.image(plain))
    return registry


@pytest.fixture
def conf(tmp_path: Path, registry: FakeRegistry) -> Path:
    path = tmp_path / "registries.conf"
    path.write_text(f'[[registry]]\nprefix = "example.test"\nlocation = "{registry.address}"\ninsecure = true\n')
    return path


@pytest.fixture
def lived(memory: Path, registry: FakeRegistry, conf: Path) -> Lived:
    with recorded_disk(memory, DISK_BYTES) as (mounted, recording):
        registry.trouble["blobs"] = after(0.1)  # layers end one after the other
        command = [sys.executable, "-c", STORY, str(mounted / "images"), str(conf), str(recording.log), NAME]
        told = subprocess.run(
            command, cwd=Path(__file__).parents[3], check=True, capture_output=True, text=True, timeout=60
        ).stdout
        registry.trouble.clear()
    events = [Event(int(words[0]), *words[1:]) for words in map(str.split, told.splitlines())]
    return Lived(recording, recording.writes(), events, expected_trees(memory / "expected", conf))


def expected_trees(root: Path, conf: Path) -> dict[str, Sequence[Tree]]:
    async def story(images: Images) -> dict[str, Sequence[Tree]]:
        pulled = {tag: await images.pull(f"{NAME}:{tag}") for tag in IMAGES}
        return {tag: [layer_tree(path) for path in images.layer_paths(image.id)] for tag, image in pulled.items()}

    found: dict[str, Sequence[Tree]] = run(ImageSettings(root, conf), story)
    return found


def layer_tree(path: Path) -> Tree:
    """Whiteouts have no time of their own."""
    found = described(path)
    return {path: each.without_time() if is_whiteout(each) else each for path, each in found.items()}


def is_whiteout(found: Described) -> bool:
    return found.device == 0 and stat.S_ISCHR(int(found.mode, 8))


def test_after_a_power_loss_at_any_moment_what_is_listed_is_whole_and_what_was_pulled_is_there(
    memory: Path, registry: FakeRegistry, conf: Path, lived: Lived, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proc, "boot_id", lambda: "the boot after")
    seed = random.randrange(1 << 32)
    moments = random.Random(seed)
    positions = [event.position for event in lived.events]
    positions += [moments.choice(lived.writes).end for _ in range(LOSSES)]

    for number, position in enumerate(sorted(positions)):
        chance = random.Random(moments.random()) if number % 2 else None
        lived.recording.after_power_loss(lived.writes, position, chance, memory / "left")
        found = Found(lived, position, f"power loss {number} at {position}, seed {seed}")
        with mounted_ext4(memory / "left", memory / "rebooted") as rebooted:
            settings = ImageSettings(rebooted / "images", conf, keep_partial_s=0)
            if number % 3:
                registry.trouble["."] = status(403)
                run(settings, found.expect_no_half)
                registry.trouble.clear()
            run(settings, found.expect_all_can_be_had)
        (memory / "left").unlink()


@dataclass(frozen=True, slots=True)
class Found:
    """What must be true of the store that is found after one power loss."""

    lived: Lived
    position: int
    loss: str

    async def expect_no_half(self, images: Images) -> None:
        """With no registry: an image is whole, or on first use no longer listed."""
        last = self.lived.last(self.position)
        for tag in IMAGES:
            image = images.find(f"{NAME}:{tag}")
            if last.get(tag) == "whole":
                assert image is not None, f"image {tag} is not listed after {self.loss}"
            if last.get(tag) == "removed":
                assert image is None, f"image {tag} is listed after {self.loss}"
            if image is None:
                continue
            try:
                await images.ensure(image.id)
            except Unavailable:
                assert last.get(tag) != "whole", f"image {tag} is damaged after {self.loss}"
                assert images.find(f"{NAME}:{tag}") is None, f"image {tag} is damaged and listed after {self.loss}"
            else:
                self.assert_is_whole(images, tag)
        await images.sweep()
        await self.expect_no_leftovers(images)

    async def expect_all_can_be_had(self, images: Images) -> None:
        """With the registry: what is listed heals on first use, the rest can be pulled."""
        for tag in IMAGES:
            image = images.find(f"{NAME}:{tag}")
            if image is None:
                image = await images.pull(f"{NAME}:{tag}")
            await images.ensure(image.id)
            self.assert_is_whole(images, tag)
        assert [damage async for damage in images.verify()] == [], self.loss
        await images.sweep()
        await self.expect_no_leftovers(images)

    def assert_is_whole(self, images: Images, tag: str) -> None:
        paths = images.layer_paths(images.resolve(f"{NAME}:{tag}").id)
        for path, expected in zip(paths, self.lived.trees[tag], strict=True):
            assert layer_tree(path) == expected, f"{path} of image {tag} after {self.loss}"

    async def expect_no_leftovers(self, images: Images) -> None:
        root = (await images.fs_usage()).path
        needed = {path.parent.name for image in images.list() for path in images.layer_paths(image.id)}
        deadline = time.monotonic() + 20
        while left := [*names(root / "trash"), *names(root / "partial"), *(set(names(root / "layers")) - needed)]:
            assert time.monotonic() < deadline, f"{left} is left over after {self.loss}"
            await asyncio.sleep(0.02)


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]
