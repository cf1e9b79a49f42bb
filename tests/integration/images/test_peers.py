"""What Crito, umoci and containerd make of the same images, by everything there is to say about each path.

Where one of them does something else, or refuses, it is recorded here with the reason; a record that is no longer true
fails as well. Sources: OCI image-spec, layer.md; POSIX pax(1).
"""

import asyncio
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cri.image_service.images import Images, ImageSettings
from oci.errors import Error
from tests.e2e.harness import containerd as peer
from tests.e2e.harness.containerd import ImageContainerd, Refused, running_containerd
from tests.fakes import layers
from tests.fakes.archives import ARCHIVES
from tests.fakes.registry import FakeRegistry
from tests.trees import Described, Tree, described, mounted_overlay

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts overlays and makes device nodes")


@dataclass(frozen=True, slots=True)
class Refuses:
    """The tool takes no such image, and says so."""

    saying: str  # a regular expression
    why: str


@dataclass(frozen=True, slots=True)
class Differs:
    """The tool's tree differs at exactly these paths."""

    paths: frozenset[str]
    why: str


@dataclass(frozen=True, slots=True)
class Takes:
    """The tool takes what we refuse."""

    why: str


def differs(*paths: str, why: str) -> Differs:
    return Differs(frozenset(paths), why)


SYSTEM_PATHS = (
    *("bin", "bin/sh", "etc", "etc/conf.d", "etc/conf.d/a", "etc/passwd"),
    *("lib", "usr", "usr/lib", "usr/lib/libc"),
)
NO_FILE = Refuses(
    "no such file or directory", "as we do: a layer's links lead to files of the image, never to the node's"
)
NO_NAME = Refuses("file name too long", "as we do: Linux has no such names")
ITSELF = Refuses(
    "a: (link: )?no such file", "it first removes what the link replaces, its own target; we keep the file"
)
LATER_WINS = Refuses("not a directory", "a later entry wins over an earlier one: we replace the file")
ZERO = (
    "a device 0/0 is overlayfs' own whiteout, and there is no driver that it could open; containerd shows none either"
)
EACH_BY_ITSELF = (
    "umoci unpacks all layers into one tree. We have each by itself, to be shared by images, as CRI-O and containerd's "
    "overlayfs have"
)
LINKS_HEADER = (
    "it applies a hard link's own header to the file; we and umoci take the file's: a link is but a name of it"
)

WE_REFUSE = {
    "a hard link out of the tree": "is not in this layer",
    "a hard link through a link out of the tree": "is not in this layer",
    "a hard link to nothing": "is not in this layer",
    "a hard link to a file of the layer below": "is not in this layer",
    "names of 256 bytes": "File name too long",
}

UMOCI: Mapping[str, Refuses | Differs | Takes] = {
    "a hard link out of the tree": NO_FILE,
    "a hard link through a link out of the tree": NO_FILE,
    "a hard link to nothing": NO_FILE,
    "a hard link to a file of the layer below": Takes(f"{EACH_BY_ITSELF}, where the link has no target: all refuse it"),
    "names of 256 bytes": NO_NAME,
    "a hard link to itself and twice": ITSELF,
    "whiteouts of nothing": differs(
        "none2",
        "none2/none",
        why="a whiteout in a directory that no layer has: ours is made, and overlayfs lists the whiteout in it, though "
        "nothing can be opened there; containerd shows the same",
    ),
    "a device node 0:0": differs("f", "zero", why=ZERO),
    "GNU numbers": differs("f", why="its time of the year 2514 overflows; ours is as the file system keeps it"),
    "a sparse file, GNU's old format": Refuses("unknown typeflag", "it does not know the type S, which GNU tar writes"),
    "a file as a parent": LATER_WINS,
    "a file as a parent between layers": Refuses("not a directory", "the upper layer wins: we hide the file"),
    "a link as a parent between layers": differs(
        "lib",
        "lib/new",
        "usr/lib/new",
        why=f"it follows the lower layer's link. {EACH_BY_ITSELF}: lib is a directory of the upper layer there",
    ),
}

CONTAINERD: Mapping[str, Refuses | Differs | Takes] = {
    "everything in three layers": differs("usr/lib/lib.so.1", "usr/lib/same", why=LINKS_HEADER),
    "hard links to links": differs("f", "h1", "h2", "s", "hs", "hs2", why=LINKS_HEADER),
    "duplicate entries": differs("f", "p", why=LINKS_HEADER),
    "a hard link out of the tree": NO_FILE,
    "a hard link through a link out of the tree": NO_FILE,
    "a hard link to nothing": NO_FILE,
    "a hard link to a file of the layer below": NO_FILE,
    "names of 256 bytes": NO_NAME,
    "a hard link to itself and twice": ITSELF,
    "a link in place of a directory that is in use": differs(
        "etc", why="it gives the replaced directory's time to what the link leads to, of which no entry says anything"
    ),
    "an opaque root": differs(
        *SYSTEM_PATHS,
        why="overlayfs merges the roots of all layers, opaque or not. 'All siblings are hidden in the lower layer' "
        "(layer.md, Opaque Whiteout): we mount no layer that is hidden",
    ),
    "an opaque directory that is implied": differs(
        "a/b", why="it gives the new directory the mode of the one that is hidden; umoci and we do not"
    ),
    "whiteouts and what comes in their place": differs(
        "usr/lib",
        "usr/lib/libc",
        why="a directory in the place of a whiteout lets the lower one shine through; to umoci and us it is a new one",
    ),
    "a directory whited out and implied": Refuses("not a directory", "its whiteout is in the way of the new directory"),
    "what comes and a whiteout after it": Refuses(
        "failed to convert whiteout",
        "the order says nothing: 'files that are present in the same layer as a whiteout file can only be hidden by "
        "whiteout files in subsequent layers' (layer.md, Whiteouts)",
    ),
    "PAX headers": differs("f", "d", why="it leaves out xattrs of the kind trusted; umoci and we set them"),
    "GNU numbers": differs(
        "f", "old", why="it makes 1970 of times that nanoseconds in 64 bits cannot tell, or before it"
    ),
    "a sparse file, GNU's old format": Refuses("header type 83", "it does not know the type S, which GNU tar writes"),
    "a file as a parent": LATER_WINS,
    "a root with attributes": differs(".", why="it ignores what is said of the root; umoci and we do not"),
}

CLOCK_TICK_NS = 20_000_000  # of the clock that files are stamped by
Mounted = Callable[[str, Path], AbstractContextManager[Path]]


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as served:
        for at, tars in enumerate(ARCHIVES.values()):
            served.add("team/app", str(at), layers.image(tars))
        yield served


@pytest.fixture(scope="module")
def containerd() -> Iterator[ImageContainerd]:
    if not peer.PROGRAM or not peer.CTR:
        pytest.skip("containerd is not installed (tools/setup --peers)")
    with tempfile.TemporaryDirectory(prefix="crito-peer-") as directory, running_containerd(Path(directory)) as running:
        yield running


@pytest.mark.skipif(shutil.which("umoci") is None, reason="umoci is not installed")
@pytest.mark.parametrize("case", ARCHIVES)
def test_an_image_is_what_umoci_makes_of_it(tmp_path: Path, registry: FakeRegistry, case: str) -> None:
    compare(case, UMOCI.get(case), tmp_path, registry, lambda _, at: unpacked_by_umoci(case, at))


@pytest.mark.parametrize("case", ARCHIVES)
def test_an_image_is_what_containerd_makes_of_it(
    tmp_path: Path, registry: FakeRegistry, containerd: ImageContainerd, case: str
) -> None:
    compare(case, CONTAINERD.get(case), tmp_path, registry, containerd.mounted)


def test_what_is_recorded_of_others_names_cases_that_there_are() -> None:
    assert {*WE_REFUSE, *UMOCI, *CONTAINERD} <= set(ARCHIVES)


def compare(
    case: str, recorded: Refuses | Differs | Takes | None, directory: Path, registry: FakeRegistry, theirs: Mounted
) -> None:
    began_ns = time.time_ns() - CLOCK_TICK_NS
    reference = f"{registry.address}/team/app:{list(ARCHIVES).index(case)}"
    ours = our_tree(reference, directory, registry.address, WE_REFUSE.get(case, ""))
    try:
        with theirs(reference, directory / "theirs") as mounted:
            tree = described(mounted)
    except Refused as refused:
        assert isinstance(recorded, Refuses), f"refused: {refused}"
        assert re.search(recorded.saying, str(refused))
        return

    assert not isinstance(recorded, Refuses), "it is taken by now"
    if isinstance(recorded, Takes):
        assert ours is None
        return
    assert ours is not None
    found = {path for path in {*ours, *tree} if not alike(path, ours.get(path), tree.get(path), began_ns)}
    expected = recorded.paths if recorded is not None else frozenset()
    assert found == expected, {path: (ours.get(path), tree.get(path)) for path in found ^ expected}


def alike(at: str, ours: Described | None, theirs: Described | None, began_ns: int) -> bool:
    """Without the time of a directory to which no entry gives one: others have that of their unpacking there.

    Nor is that of the root compared: see cri/image_service/implied.py.
    """
    if ours is not None and theirs is not None and (at == "." or (theirs.is_directory and theirs.mtime_ns >= began_ns)):
        return ours.without_time() == theirs.without_time()
    return ours == theirs


def our_tree(reference: str, directory: Path, registry: str, refusal: str) -> Tree | None:
    """None where the image is refused, as it has to be."""
    conf = directory / "registries.conf"
    conf.write_text(f'[[registry]]\nlocation = "{registry}"\ninsecure = true\n')

    async def story() -> Tree | None:
        images = await Images.open(ImageSettings(directory / "images", conf))
        try:
            if refusal:
                with pytest.raises(Error, match=refusal):
                    await images.pull(reference)
                return None
            image = await images.pull(reference)
            with mounted_overlay(images.layer_paths(image.id), directory / "ours") as mounted:
                return described(mounted)
        finally:
            await images.close()

    return asyncio.run(story())


@contextmanager
def unpacked_by_umoci(case: str, at: Path) -> Iterator[Path]:
    layout = at.with_name("layout")
    layers.write_oci_layout(layout, layers.image(ARCHIVES[case]), "test")
    command = ["umoci", "unpack", "--image", f"{layout}:test", str(at)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(done.stderr)
    yield at / "rootfs"
