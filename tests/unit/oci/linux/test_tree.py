import os
import stat
from pathlib import Path

import pytest

from oci.linux import tree


def owner() -> tuple[int, int]:
    return os.getuid(), os.getgid()


def make(root: Path, path: str) -> None:
    uid, gid = owner()
    tree.make_directory(root, path, uid=uid, gid=gid)


def test_a_directory_is_made_with_all_that_leads_to_it(tmp_path: Path) -> None:
    make(tmp_path, "/a/b/c")
    make(tmp_path, "/a/b/c")

    assert (tmp_path / "a/b/c").is_dir()
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o755


def test_links_are_followed_within_the_root_alone(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "absolute").symlink_to("/target")
    (root / "up").symlink_to("../../../outside")
    (root / "real").mkdir()
    (root / "good").symlink_to("real")

    make(root, "/absolute/x")
    make(root, "/up/y")
    make(root, "/good/z")

    assert (root / "target/x").is_dir()
    assert (root / "outside/y").is_dir()
    assert (root / "real/z").is_dir()
    assert list(outside.iterdir()) == []


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(NotADirectoryError):
        make(tmp_path, "/file/x")
    with pytest.raises(NotADirectoryError):
        make(tmp_path, "/file")


def test_a_loop_of_links_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")

    with pytest.raises(OSError, match="symbolic links"):
        make(tmp_path, "/a/x")


def test_a_copy_keeps_modes_times_and_links(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "dir").mkdir(parents=True)
    target.mkdir()
    (source / "dir/file").write_text("text")
    (source / "dir/file").chmod(0o640)
    os.utime(source / "dir/file", ns=(5, 7_000_000_000))
    os.link(source / "dir/file", source / "hard")
    (source / "link").symlink_to("/etc/passwd")
    os.mkfifo(source / "fifo")
    (source / "dir").chmod(0o1711)
    os.setxattr(source / "dir/file", "user.a", b"1")

    tree.copy(source, target)

    assert (target / "dir/file").read_text() == "text"
    assert stat.S_IMODE((target / "dir/file").stat().st_mode) == 0o640
    assert (target / "dir/file").stat().st_mtime_ns == 7_000_000_000
    assert (target / "hard").stat().st_ino == (target / "dir/file").stat().st_ino
    assert (target / "link").readlink() == Path("/etc/passwd")
    assert stat.S_ISFIFO((target / "fifo").stat().st_mode)
    assert stat.S_IMODE((target / "dir").stat().st_mode) == 0o1711
    assert os.getxattr(target / "dir/file", "user.a") == b"1"


def test_usage_counts_blocks_and_hard_links_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 8192)
    os.link(tmp_path / "file", tmp_path / "hard")
    (tmp_path / "dir").mkdir()

    found = tree.usage(tmp_path)

    assert found.inodes == 2
    assert found.bytes >= 8192
    assert tree.usage(tmp_path / "missing") == tree.Usage(0, 0)


def test_what_is_removed_is_gone_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/link").symlink_to(tmp_path / "kept")
    (tmp_path / "file").write_text("")

    for name in ("a", "a", "file", "missing"):
        tree.remove(tmp_path / name)

    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]


def test_a_tree_deeper_than_any_path_is_removed(tmp_path: Path) -> None:
    top = tmp_path / "deep"
    top.mkdir()
    fd = os.open(top, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d" * 20, dir_fd=fd)
        below = os.open("d" * 20, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)

    tree.remove(top)

    assert not top.exists()
