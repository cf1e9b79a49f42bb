"""Layers become trees that overlayfs understands, whatever their archives try."""

import gc
import os
import stat
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cri.image_service.layer_files import find_damage
from cri.image_service.tar import Stream
from cri.image_service.unpack import Unpacked, clean_path, remove_tree, unpack
from oci.errors import Error
from tests.fakes.layers import directory, entry, file, hard_link, symlink, tar

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes device nodes and changes owners")

Entries = Iterable[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture(autouse=True)
def _nothing_else_changes(tmp_path: Path) -> Iterator[None]:
    """What lies beside the layer's directory stays untouched, and no fd stays open."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("untouched")
    (tmp_path / "outside/secret").chmod(0o640)
    gc.collect()
    before = names("/proc/self/fd")

    yield

    assert (tmp_path / "outside/secret").read_text() == "untouched"
    assert stat.S_IMODE((tmp_path / "outside/secret").stat().st_mode) == 0o640
    assert names(tmp_path / "outside") == ["secret"]
    assert names("/proc/self/fd") == before
    for path in tmp_path.iterdir():
        remove_tree(path)  # pytest cannot remove what is deeper than Python's stack


def names(directory: str | Path) -> list[str]:
    return sorted(path.name for path in Path(directory).iterdir())


def unpacked(tmp_path: Path, entries: Entries, tar_format: int = tarfile.PAX_FORMAT) -> tuple[Path, Unpacked]:
    made = tmp_path / "layer"
    made.mkdir()
    umask = os.umask(0o077)
    try:
        result = unpack(Stream([tar(entries, tar_format)]), made)
    finally:
        os.umask(umask)
    assert names(made) == ["diff", "files"]
    assert find_damage(made, lambda _: None) == ""
    return made / "diff", result


def tree(root: Path) -> dict[str, str]:
    """Every path below `root` with its content, link target or kind."""
    found = {}
    for parent, directories, files in os.walk(root):
        for name in directories + files:
            path = Path(parent, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                found[str(path.relative_to(root))] = f"-> {path.readlink()}"
            elif stat.S_ISREG(mode):
                found[str(path.relative_to(root))] = path.read_text()
            else:
                found[str(path.relative_to(root))] = {stat.S_IFDIR: "dir", stat.S_IFCHR: "chr", stat.S_IFIFO: "fifo"}[
                    stat.S_IFMT(mode)
                ]
    return found


def is_whiteout(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def is_opaque(path: Path) -> bool:
    try:
        return os.getxattr(path, "trusted.overlay.opaque") == b"y"
    except OSError:
        return False


def test_owners_modes_times_and_links_are_as_the_archive_says(tmp_path: Path) -> None:
    root, result = unpacked(
        tmp_path,
        [
            directory("./", 0o1755, uid=3, mtime=111),
            directory("d", 0o2770, uid=1000, gid=1001, mtime=222),
            file("d/suid", b"x", 0o6755, uid=5, gid=6, mtime=333),
            file("d/plain", b"y", 0o600),
            hard_link("d/same", "d/suid"),
            symlink("s", "d/suid", uid=7, gid=8, mtime=444),
            entry("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
            entry("disk", type=tarfile.BLKTYPE, devmajor=8, devminor=1, mode=0o660, gid=6),
            entry("fifo", type=tarfile.FIFOTYPE, mode=0o622),
        ],
    )

    found = {
        path: os.lstat(root / path) for path in ("", "d", "d/suid", "d/plain", "d/same", "s", "null", "disk", "fifo")
    }
    assert (stat.S_IMODE(found[""].st_mode), found[""].st_uid, found[""].st_mtime) == (0o1755, 3, 111)
    assert (stat.S_IMODE(found["d"].st_mode), found["d"].st_gid, found["d"].st_mtime) == (0o2770, 1001, 222)
    assert (stat.S_IMODE(found["d/suid"].st_mode), found["d/suid"].st_uid, found["d/suid"].st_mtime) == (0o6755, 5, 333)
    assert found["d/plain"].st_gid == 0  # not the directory's, which is set-group-id
    assert found["d/same"].st_ino == found["d/suid"].st_ino
    assert (found["s"].st_uid, found["s"].st_gid, found["s"].st_mtime) == (7, 8, 444)
    assert found["null"].st_rdev == os.makedev(1, 3)
    assert stat.S_IMODE(found["null"].st_mode) == 0o666
    assert stat.S_ISBLK(found["disk"].st_mode)
    assert stat.S_ISFIFO(found["fifo"].st_mode)
    assert result.inodes == 8
    assert result.implied == ()  # the root is described


def test_whiteouts_and_opaque_directories_become_those_of_overlayfs(tmp_path: Path) -> None:
    root, _ = unpacked(
        tmp_path, [directory("d"), file("d/.wh.gone"), directory("o"), file("o/.wh..wh..opq"), file("o/new")]
    )

    assert is_whiteout(root / "d/gone")
    assert is_opaque(root / "o")
    assert not is_opaque(root / "d")
    assert set(tree(root)) == {"d", "d/gone", "o", "o/new"}


def test_a_whiteout_hides_what_lies_below_never_what_its_own_layer_has(tmp_path: Path) -> None:
    root, _ = unpacked(
        tmp_path,
        [
            file("a", b"kept"),
            file(".wh.a"),
            file(".wh.b"),
            file("b", b"new"),
            file(".wh.c"),
            directory("c"),
            file("c/new", b"c"),
            directory("e"),
            file("e/new", b"e"),
            file(".wh.e"),
            file(".wh.f"),
            file("f/new", b"f"),
        ],
    )

    assert tree(root) == {
        "a": "kept", "b": "new", "c": "dir", "c/new": "c", "e": "dir", "e/new": "e", "f": "dir", "f/new": "f",
    }  # fmt: skip
    assert is_opaque(root / "c")
    assert is_opaque(root / "e")
    assert is_opaque(root / "f")


def test_everything_can_be_whited_out(tmp_path: Path) -> None:
    root, _ = unpacked(tmp_path, [file(".wh..wh..opq"), *(file(f".wh.{name}") for name in ("bin", "etc", "usr"))])

    assert is_opaque(root)
    assert all(is_whiteout(root / name) for name in ("bin", "etc", "usr"))


def test_aufs_leftovers_are_left_out(tmp_path: Path) -> None:
    root, _ = unpacked(tmp_path, [file(".wh..wh.plnk"), directory(".wh..wh.orph"), file("kept")])

    assert set(tree(root)) == {"kept"}


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "d/.wh."])
def test_a_whiteout_of_no_name_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(Error, match="names no file"):
        unpacked(tmp_path, [file(name)])


@pytest.mark.parametrize(
    "name", ["/abs", "../up", "../../../../up", "d/../../up", "/../up", "./../up", "a/b/../../../up"]
)
def test_names_that_lead_out_stay_below_the_root(tmp_path: Path, name: str) -> None:
    root, _ = unpacked(tmp_path, [file(name, b"in")])

    assert tree(root) == {"abs" if "abs" in name else "up": "in"}


def test_links_that_lead_out_are_kept_but_never_followed_out(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    root, _ = unpacked(
        tmp_path,
        [
            symlink("abs", str(outside)),
            symlink("up", "../../outside"),
            symlink("file", str(outside / "secret")),
            file("abs/secret", b"inside"),
            file("up/secret", b"inside"),
            file("file", b"replaced"),
            symlink("loop", "loop2"),
            symlink("loop2", "loop"),
        ],
    )

    found = tree(root)
    assert found["abs"] == f"-> {outside}"
    assert found["up"] == "-> ../../outside"
    assert found["file"] == "replaced"
    assert found[f"{str(outside).lstrip('/')}/secret"] == "inside"
    assert found["outside/secret"] == "inside"


def test_a_loop_of_links_as_a_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Error, match="cannot unpack regular file 'loop/x'"):
        unpacked(tmp_path, [symlink("loop", "loop2"), symlink("loop2", "loop"), file("loop/x")])


def test_hard_links_reach_only_files_of_the_layer(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    for target in ("../../outside/secret", str(outside / "secret"), "missing", "missing/file"):
        with pytest.raises(Error, match="is not in this layer"):
            unpacked(tmp_path, [hard_link("h", target)])
        remove_tree(tmp_path / "layer")


def test_a_hard_link_through_a_link_that_leads_out_stays_inside(tmp_path: Path) -> None:
    with pytest.raises(Error, match="is not in this layer"):
        unpacked(tmp_path, [symlink("d", str(tmp_path / "outside")), hard_link("h", "d/secret")])


def test_a_hard_link_to_a_symbolic_link_does_not_follow_it(tmp_path: Path) -> None:
    root, _ = unpacked(tmp_path, [symlink("s", "/etc/passwd"), hard_link("h", "s"), hard_link("again", "h")])

    assert tree(root) == {"s": "-> /etc/passwd", "h": "-> /etc/passwd", "again": "-> /etc/passwd"}


def test_a_hard_link_to_itself_changes_nothing(tmp_path: Path) -> None:
    root, _ = unpacked(tmp_path, [file("a", b"x"), hard_link("a", "a"), hard_link("b", "./a"), hard_link("b", "a")])

    assert tree(root) == {"a": "x", "b": "x"}


def test_an_attack_by_a_link_in_place_of_a_known_directory_stays_inside(tmp_path: Path) -> None:
    """The directory's fd may be cached when a later entry swaps it for a link."""
    outside = tmp_path / "outside"
    root, _ = unpacked(
        tmp_path,
        [
            directory("d"),
            file("d/one", b"1"),
            directory("d/sub"),
            file("d/sub/two", b"2"),
            symlink("d", str(outside)),
            file("d/secret", b"inside"),
            file("d/sub/three", b"3"),
        ],
    )

    found = tree(root)
    below = str(outside).lstrip("/")
    assert found["d"] == f"-> {outside}"
    assert found[f"{below}/secret"] == "inside"
    assert found[f"{below}/sub/three"] == "3"
    assert "d/one" not in found


def test_later_entries_replace_earlier_ones_of_any_kind(tmp_path: Path) -> None:
    root, result = unpacked(
        tmp_path,
        [
            file("a", b"old"),
            file("a", b"new"),
            directory("b"),
            file("b/in", b"gone"),
            file("b", b"file now"),
            file("c", b"file"),
            directory("c", 0o700),
            file("c/in", b"in"),
            directory("d", 0o700),
            file("d/kept", b"kept"),
            directory("d", 0o711, mtime=5),
            file("e", b"file"),
            file("e/in", b"needs a directory"),
            symlink("f", "x"),
            symlink("f", "y"),
            entry("g", type=tarfile.FIFOTYPE),
            hard_link("g", "a"),
        ],
    )

    assert tree(root) == {
        "a": "new", "b": "file now", "c": "dir", "c/in": "in", "d": "dir", "d/kept": "kept", "e": "dir",
        "e/in": "needs a directory", "f": "-> y", "g": "new",
    }  # fmt: skip
    assert stat.S_IMODE((root / "d").stat().st_mode) == 0o711
    assert (root / "d").stat().st_mtime == 5
    assert result.inodes == len(tree(root)) - 1 + 1  # without the hard link, with the root


def test_directories_without_an_entry_are_made_and_told(tmp_path: Path) -> None:
    root, result = unpacked(tmp_path, [file("a/b/c", b"x"), directory("a/d"), directory("a")])

    assert tree(root) == {"a": "dir", "a/b": "dir", "a/b/c": "x", "a/d": "dir"}
    assert set(result.implied) == {"", "a/b"}


def test_parents_are_made_through_links_whose_target_comes_later(tmp_path: Path) -> None:
    root, result = unpacked(
        tmp_path, [symlink("lib", "usr/lib"), file("lib/x", b"x"), symlink("v", "/run"), file("v/y", b"y")]
    )

    assert tree(root) == {"lib": "-> usr/lib", "usr": "dir", "usr/lib": "dir", "usr/lib/x": "x", "v": "-> /run", "run": "dir", "run/y": "y"}  # fmt: skip # noqa: E501
    assert set(result.implied) == {"", "usr", "usr/lib", "run"}


def test_names_of_255_bytes_and_of_any_bytes_are_kept_and_longer_ones_are_errors(tmp_path: Path) -> None:
    longest = "n" * 255
    root, _ = unpacked(tmp_path, [file(f"d/{longest}"), file("d/\udcff\udc80 \n\x01")])
    assert set(names(root / "d")) == {longest, "\udcff\udc80 \n\x01"}
    remove_tree(tmp_path / "layer")

    with pytest.raises(Error, match="File name too long"):
        unpacked(tmp_path, [file("n" * 256)])


def test_xattrs_are_set_except_those_that_steer_overlayfs_or_label_the_node(tmp_path: Path) -> None:
    capability = b"\x01\0\0\x02\0\4\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    headers = {
        "SCHILY.xattr.security.capability": capability.decode("latin-1"),
        "SCHILY.xattr.user.mine": "value",
        "SCHILY.xattr.trusted.overlay.redirect": "/etc",
        "SCHILY.xattr.trusted.overlay.opaque": "y",
        "SCHILY.xattr.security.selinux": "label",
    }
    root, _ = unpacked(
        tmp_path,
        [file("f", b"x", uid=5, pax_headers=headers), directory("d", pax_headers={"SCHILY.xattr.user.dir": "d"})],
    )

    assert sorted(os.listxattr(root / "f")) == ["security.capability", "user.mine"]
    assert os.getxattr(root / "f", "security.capability") == capability
    assert os.getxattr(root / "d", "user.dir") == b"d"


def test_a_tree_deeper_than_a_path_can_be_long_is_refused_and_what_there_is_can_be_removed(tmp_path: Path) -> None:
    """Links shorten what entries spell, so names alone do not bound the depth."""
    step = "/".join(["d" * 100] * 20)
    entries = [directory(step), symlink("s", step), symlink(f"{step}/s", step), file(f"s/s/{step}/x")]

    with pytest.raises(Error, match="File name too long"):
        unpacked(tmp_path, entries)

    removed = remove_tree(tmp_path / "layer")
    assert removed.inodes > 20
    assert names(tmp_path) == ["outside"]


def test_a_name_with_a_nul_byte_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Error, match="cannot unpack"):
        unpacked(tmp_path, [file("f", pax_headers={"path": "a\0b"})])


@pytest.mark.parametrize(
    "fields",
    [
        {"pax_headers": {"uid": str(1 << 32)}},
        {"pax_headers": {"gid": "9" * 20}},
        {"pax_headers": {"mtime": "9" * 20}},
        {"pax_headers": {"mtime": "-" + "9" * 20}},
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [file, directory, lambda name, **fields: symlink(name, "x", **fields)])
def test_numbers_that_the_kernel_has_no_room_for_are_errors(tmp_path: Path, make: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(Error, match=r"cannot unpack .* 'odd': "):
        unpacked(tmp_path, [make("odd", **fields)])


def test_the_root_cannot_be_replaced(tmp_path: Path) -> None:
    root, _ = unpacked(tmp_path, [file("a", b"x"), symlink(".", "/etc"), file("/", b"x"), symlink("..", "/etc")])

    assert root.is_dir()
    assert not root.is_symlink()
    assert tree(root) == {"a": "x"}


@pytest.mark.parametrize(
    ("name", "clean"),
    [(b"a/b", b"a/b"), (b"/a//b/.", b"a/b"), (b"../../a", b"a"), (b"a/../..", b""), (b"./", b""), (b"a/../b", b"b")],
)
def test_names_are_cleaned_as_chdir_would_go(name: bytes, clean: bytes) -> None:
    assert clean_path(name) == clean
