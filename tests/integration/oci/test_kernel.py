"""Mounts, cgroups and root filesystems with the real kernel."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from oci.container_spec import ContainerId
from oci.errors import FailedPrecondition, InvalidArgument
from oci.linux import cgroup, mount, syscalls
from oci.rootfs import Rootfs

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

ID = ContainerId("c1")


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="crito-") as directory:
        path = Path(directory)
        mount.make_private_mountpoint(path)
        try:
            yield path
        finally:
            left = mount.mounts_below(path)
            mount.unmount_below(path)
            assert left == []
            assert not mount.is_mountpoint(path)


def layers(place: Path, names: list[str]) -> list[Path]:
    made = []
    for number, name in enumerate(names):
        layer = place / name
        layer.mkdir(parents=True)
        (layer / f"only-{number}").touch()
        (layer / "top").write_text(str(number))
        made.append(layer)
    return made


def directories(place: Path) -> tuple[Path, Path, Path]:
    made = (place / "upper", place / "work", place / "merged")
    for directory in made:
        directory.mkdir()
    return made


@pytest.mark.parametrize("by", ["fsconfig", "classic"])
def test_two_hundred_layers_with_long_names_make_one_tree(
    place: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upper, work, merged = directories(place)
    if by == "classic":

        def too_old(*_: object) -> int:
            raise OSError(38, "Function not implemented", "fsopen")

        monkeypatch.setattr(syscalls, "fsopen", too_old)
    names = [f"{'n' * 150}-{number}" for number in range(200)]

    mount.overlay(merged, layers(place, names), upper, work)

    assert (merged / "top").read_text() == "199"
    assert len(list(merged.glob("only-*"))) == 200
    (merged / "new").touch()
    assert (upper / "new").exists()
    mount.unmount(merged)


def test_names_with_every_odd_character_and_of_any_length_work(place: Path) -> None:
    upper, work, merged = directories(place)
    lowers = layers(place, ["a:b", "c,d", "e\\f", "g h", "/".join(["x" * 200] * 3)])

    mount.overlay(merged, lowers, upper, work)

    assert (merged / "top").read_text() == "4"
    mount.unmount(merged)


def test_an_overlay_without_an_upper_directory_is_read_only(place: Path) -> None:
    _, _, merged = directories(place)
    mount.overlay(merged, layers(place, ["a", "b"]))

    with pytest.raises(OSError, match="Read-only"):
        (merged / "new").touch()
    mount.unmount(merged)


def test_a_bad_overlay_says_what_the_kernel_said(place: Path) -> None:
    upper, work, merged = directories(place)

    with pytest.raises(OSError, match=r"No such file|resolve"):
        mount.overlay(merged, [place / "missing"], upper, work)
    with pytest.raises(OSError, match="nonsense"):
        mount.overlay(merged, layers(place, ["a"]), upper, work, ["nonsense=1"])


def test_a_busy_mount_is_taken_away_and_a_missing_one_is_success(place: Path) -> None:
    target = place / "t"
    target.mkdir()
    mount.tmpfs(target, 4096)
    mount.tmpfs(target, 4096)

    with (target / "open").open("w"):
        mount.unmount(target)

    assert not mount.is_mountpoint(target)
    mount.unmount(target)
    mount.unmount(place / "missing")


def test_a_read_only_bind_of_a_tree_covers_what_is_mounted_below(place: Path) -> None:
    source, target = place / "source", place / "target"
    (source / "below").mkdir(parents=True)
    target.mkdir()
    mount.tmpfs(source / "below")
    mount.bind(source, target, readonly=True, recursive=True)

    assert mount.is_mountpoint(target / "below")
    with pytest.raises(OSError, match="Read-only"):
        (target / "below/x").touch()
    (source / "below/x").touch()
    mount.unmount_below(target)
    mount.unmount(source / "below")


def test_a_file_can_be_a_mount_point(place: Path) -> None:
    (place / "a").write_text("a")
    (place / "b").touch()

    mount.bind(place / "a", place / "b")

    assert mount.is_mountpoint(place / "b")
    assert [point.target for point in mount.mounts_below(place)] == [str(place / "b")]
    mount.unmount(place / "b")


def test_a_cgroup_is_made_joined_killed_and_removed_everywhere() -> None:
    cgroups = cgroup.detect()
    top = f"/crito-test-{os.getpid()}"
    path = f"{top}/pod/crito-x"
    cgroups.make(path)
    try:
        with subprocess.Popen(["sleep", "60"]) as sleeper:
            cgroups.add(path, sleeper.pid)

            assert cgroups.processes(top) == {sleeper.pid}
            assert set(cgroup.of_process(sleeper.pid).values()) == {path}
            with pytest.raises(FailedPrecondition, match=f"processes \\[{sleeper.pid}\\] are in it"):
                cgroups.remove(top, timeout_s=0.05)

            cgroups.kill(top)
            assert sleeper.wait(10) == -9
    finally:
        cgroups.kill(top)
        cgroups.remove(top)

    assert not cgroups.exists(top)


@pytest.fixture
def rootfs(place: Path) -> Iterator[Rootfs]:
    made = Rootfs(place / "containers", place / "run")
    made.prepare()
    try:
        yield made
    finally:
        made.remove(ID)
        made.release()
        assert list((place / "containers").iterdir()) == []


def test_a_root_is_mounted_once_and_keeps_what_was_written(rootfs: Rootfs, place: Path) -> None:
    lowers = layers(place, ["a", "b"])
    lowers[-1].chmod(0o701)

    path = rootfs.mount(ID, lowers)
    (path / "written").write_text("x" * 10000)
    again = rootfs.mount(ID, lowers)
    rootfs.unmount(ID)
    rootfs.unmount(ID)
    before = list(path.iterdir())
    rootfs.mount(ID, lowers)

    assert again == path == rootfs.path(ID)
    assert before == []
    assert (path / "written").stat().st_size == 10000
    assert path.stat().st_mode & 0o777 == 0o701
    assert rootfs.usage(ID).bytes >= 10000
    assert (rootfs.writable_layer(ID) / "written").exists()


def test_a_failed_mount_is_undone_by_remove(rootfs: Rootfs, place: Path) -> None:
    good = layers(place, ["a"])

    with pytest.raises(OSError, match=r"No such file|resolve"):
        rootfs.mount(ID, [place / "missing", *good])
    rootfs.remove(ID)

    assert mount.mounts_below(place / "run") == []
    with pytest.raises(FailedPrecondition, match="no layers"):
        rootfs.mount(ID, [])


def test_volumes_are_filled_from_the_image_through_its_own_links(rootfs: Rootfs, place: Path) -> None:
    (lower,) = layers(place, ["a"])
    (lower / "real").mkdir(mode=0o1777)
    (lower / "real/file").write_text("text")
    (lower / "link").symlink_to("/real")
    (lower / "out").symlink_to("/../../../etc")
    rootfs.mount(ID, [lower])

    made = rootfs.make_volumes(ID, ["/link/", "out", "/mounted", "/file/below", "/only-0"], ["/mounted"])

    assert set(made) == {"/link", "/out", "/file/below", "/only-0"}
    assert (made["/link"] / "file").read_text() == "text"
    assert list(made["/out"].iterdir()) == []
    assert made["/link"].parent == place / "containers" / ID / "volumes"


def test_a_working_directory_is_made_and_a_file_is_none(rootfs: Rootfs, place: Path) -> None:
    rootfs.mount(ID, layers(place, ["a"]))

    rootfs.make_working_directory(ID, "/new/directory")

    assert (rootfs.path(ID) / "new/directory").is_dir()
    with pytest.raises(InvalidArgument, match="working_dir '/top'"):
        rootfs.make_working_directory(ID, "/top")
