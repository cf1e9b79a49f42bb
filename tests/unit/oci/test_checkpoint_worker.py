"""What checkpoint archives are made of, and what unpacking one may do; whiteouts and chroot need root."""

import contextlib
import io
import json
import os
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from oci import checkpoint_worker as worker

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mknod, chroot")


def staged(directory: Path, upper: Path, layers: list[Path] | None = None, log: str = "") -> Path:
    staging = directory / "staging"
    (staging / "checkpoint").mkdir(parents=True)
    (staging / "checkpoint" / "inventory.img").write_bytes(b"criu")
    worker.capture(
        {
            "staging": str(staging),
            "upper": str(upper),
            "layers": [str(layer) for layer in layers or []],
            "volumes": {},
            "log": log,
        }
    )
    return staging


def archived(staging: Path, location: Path) -> Path:
    documents = {worker.CONFIG: {"id": "c"}, worker.SPEC: {"process": {}}, worker.BIND_MOUNTS: []}
    worker.archive({"staging": str(staging), "location": str(location), "documents": documents})
    return location


def unpacked(source: Path, directory: Path, log: str = "", volumes: Mapping[str, str] | None = None) -> Path:
    rootfs = directory / "rootfs"
    rootfs.mkdir(exist_ok=True)
    request: dict[str, Any] = {
        "source": str(source),
        "staging": str(directory / "restore"),
        "hostname": "new",
        "rootfs": str(rootfs),
        "volumes": volumes or {},
        "log": log,
    }
    worker.unpack(request)
    return rootfs


@needs_root
def test_what_a_container_wrote_linked_and_removed_is_the_same_after_the_way_back(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    (upper / "dir").mkdir(parents=True)
    (upper / "dir" / "file").write_text("text")
    os.chown(upper / "dir" / "file", 1000, 2000)
    (upper / "dir" / "file").chmod(0o4755)
    os.setxattr(upper / "dir" / "file", "user.note", b"\xff\x00x")
    (upper / "hard").hardlink_to(upper / "dir" / "file")
    (upper / "link").symlink_to("/etc/passwd")
    os.mknod(upper / "gone", 0o020000, 0)
    rootfs = tmp_path / "rootfs"
    rootfs.mkdir()
    (rootfs / "gone").mkdir()
    (rootfs / "gone" / "deep").write_text("x")

    archive = archived(staged(tmp_path, upper), tmp_path / "a.tar")
    unpacked(archive, tmp_path)

    found = (rootfs / "dir" / "file").stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777, found.st_nlink) == (1000, 2000, 0o4755, 2)
    assert os.getxattr(rootfs / "dir" / "file", "user.note") == b"\xff\x00x"
    assert (rootfs / "hard").read_text() == "text"
    assert (rootfs / "link").readlink() == Path("/etc/passwd")
    assert not (rootfs / "gone").exists()
    assert sorted(each.name for each in (tmp_path / "restore").iterdir()) == ["checkpoint"]


@needs_root
def test_a_directory_made_anew_hides_what_the_layers_have_in_it(tmp_path: Path) -> None:
    layer, upper = tmp_path / "layer", tmp_path / "upper"
    for top in (layer, upper):
        (top / "dir").mkdir(parents=True)
    (layer / "dir" / "old").write_text("")
    (layer / "dir" / "both").write_text("")
    (upper / "dir" / "both").write_text("")
    os.setxattr(upper / "dir", worker.OPAQUE, b"y")

    staging = staged(tmp_path, upper, [layer])

    assert json.loads((staging / worker.DELETED).read_text()) == ["/dir/old"]


@needs_root
def test_an_archive_that_reaches_out_by_links_or_names_stays_in_the_root_filesystem(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    staging = staged(tmp_path, tmp_path / "nothing")
    with tarfile.open(staging / worker.ROOTFS_DIFF, "w") as tar:
        link = tarfile.TarInfo("out")
        link.type, link.linkname = tarfile.SYMTYPE, str(outside)
        tar.addfile(link)
        for name in ("out/evil", f"{outside}/evil", f"../../../../../../../..{outside}/evil"):
            tar.addfile(tarfile.TarInfo(name))
    (staging / worker.DELETED).write_text(json.dumps([f"../../../../../../../../..{tmp_path}/keep"]))
    (tmp_path / "keep").write_text("")

    with contextlib.suppress(worker.BadArchiveError):
        unpacked(archived(staging, tmp_path / "a.tar"), tmp_path)

    assert list(outside.iterdir()) == []
    assert (tmp_path / "keep").exists()
    assert Path("/proc/self/root").stat().st_ino == Path("/").stat().st_ino
    assert tmp_path.exists()


@needs_root
def test_only_members_with_known_names_are_unpacked(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as tar:
        for name in ("checkpoint/inventory.img", "checkpoint/../evil", "checkpoint/deep/evil", "evil", "/evil"):
            tar.addfile(tarfile.TarInfo(name))

    unpacked(archive, tmp_path)

    assert [str(each.relative_to(tmp_path / "restore")) for each in (tmp_path / "restore").rglob("*")] == [
        "checkpoint",
        "checkpoint/inventory.img",
    ]


@needs_root
def test_a_restored_log_begins_with_the_old_one_unless_there_is_one_already(tmp_path: Path) -> None:
    (tmp_path / "old.log").write_text("old\n")
    (tmp_path / "busy.log").write_text("mine\n")
    archive = archived(staged(tmp_path, tmp_path / "nothing", log=str(tmp_path / "old.log")), tmp_path / "a.tar")
    again = tmp_path / "again"
    again.mkdir()

    unpacked(archive, tmp_path, log=str(tmp_path / "main" / "0.log"))
    unpacked(archive, again, log=str(tmp_path / "busy.log"))

    assert (tmp_path / "main" / "0.log").read_text() == "old\n"
    assert (tmp_path / "busy.log").read_text() == "mine\n"


def test_an_archive_takes_the_place_of_another_only_when_it_is_whole(tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    staging.mkdir()
    location = tmp_path / "archives" / "a.tar"
    location.parent.mkdir()
    location.write_text("old")

    with pytest.raises(TypeError):
        worker.archive({"staging": str(staging), "location": str(location), "documents": {"a": object()}})
    assert [each.read_text() for each in location.parent.iterdir()] == ["old"]

    archived(staging, location)
    assert [each.name for each in location.parent.iterdir()] == ["a.tar"]
    assert tarfile.is_tarfile(location)


@pytest.mark.parametrize("data", [b"", b"no tar", b"\0" * 4096])
def test_what_is_no_checkpoint_is_told_so(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)

    with pytest.raises(worker.BadArchiveError):
        worker.read({"source": str(tmp_path / "a.tar")})


def test_a_document_larger_than_any_runtime_spec_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "DOCUMENT_BYTES", 100)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo(worker.CONFIG)
        info.size = 101
        tar.addfile(info, io.BytesIO(b" " * 101))

    with pytest.raises(worker.BadArchiveError, match="larger"):
        worker.read({"source": str(tmp_path / "a.tar")})


def test_a_directory_with_the_same_names_is_a_checkpoint_too(tmp_path: Path) -> None:
    (tmp_path / worker.CONFIG).write_text('{"id": "c"}')
    (tmp_path / worker.SPEC).write_text('{"process": {}}')

    assert worker.read({"source": str(tmp_path)})[worker.CONFIG] == {"id": "c"}


def test_the_uts_image_gets_the_new_pods_hostname() -> None:
    message = b"\x0a\x03old\x12\x06(none)"
    image = b"MAGICMAG" + struct.pack("<I", len(message)) + message

    changed = worker.with_hostname(image, "new-name")

    assert changed == b"MAGICMAG" + struct.pack("<I", 18) + b"\x0a\x08new-name\x12\x06(none)"
    with pytest.raises(worker.BadArchiveError):
        worker.with_hostname(image + b"?", "x")
