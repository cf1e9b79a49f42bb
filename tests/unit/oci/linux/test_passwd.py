import os
from pathlib import Path
from typing import Any

import pytest

from oci.container_spec import SecurityContext
from oci.errors import InvalidArgument
from oci.linux.passwd import User, resolve

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
# a comment
web:x:1000:1001:Web:/home/web:/bin/sh
1234:x:77:78::/numeric:
broken
half:x:notanumber:1::/:
"""
GROUP = """\
root:x:0:
web:x:1001:
shared:x:5000:web,other
own:x:4000:other
"""


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(PASSWD)
    (tmp_path / "etc/group").write_text(GROUP)
    return tmp_path


@pytest.mark.parametrize(
    ("image_user", "asked", "expected"),
    [
        ("", {}, User(0, 0, (0,), "/root")),
        ("web", {}, User(1000, 1001, (1001, 5000), "/home/web")),
        ("1000", {}, User(1000, 1001, (1001, 5000), "/home/web")),
        ("1000:0", {}, User(1000, 0, (0, 5000), "/home/web")),
        ("web:own", {}, User(1000, 4000, (4000, 5000), "/home/web")),
        ("web:99", {}, User(1000, 99, (99, 5000), "/home/web")),
        ("4711", {}, User(4711, 0, (0,), "/")),
        ("4711:4712", {}, User(4711, 4712, (4712,), "/")),
        ("1234", {}, User(77, 78, (78,), "/numeric")),
        ("web", {"run_as_user": 0}, User(0, 0, (0,), "/root")),
        ("web", {"run_as_user": 4711}, User(4711, 0, (0,), "/")),
        ("", {"run_as_user": 1000, "run_as_group": 7}, User(1000, 7, (7, 5000), "/home/web")),
        ("", {"run_as_username": "web"}, User(1000, 1001, (1001, 5000), "/home/web")),
        (
            "",
            {"run_as_username": "web", "supplemental_groups": (9, 5000, 3)},
            User(1000, 1001, (3, 9, 1001, 5000), "/home/web"),
        ),
        (
            "web",
            {"supplemental_groups": (9,), "strict_supplemental_groups": True},
            User(1000, 1001, (9, 1001), "/home/web"),
        ),
    ],
)
def test_who_a_process_runs_as(rootfs: Path, image_user: str, asked: dict[str, Any], expected: User) -> None:
    assert resolve(rootfs, image_user, SecurityContext(**asked)) == expected


@pytest.mark.parametrize(
    ("image_user", "asked", "said"),
    [
        ("nobody-knows", {}, "'nobody-knows'"),
        ("web:nogroup", {}, "no group 'nogroup'"),
        ("", {"run_as_username": "1000"}, "run_as_username '1000'"),
        ("", {"run_as_group": 5}, "without run_as_user"),
        ("web", {"run_as_group": 5}, "without run_as_user"),
        ("", {"run_as_user": -1}, "run_as_user -1"),
        ("", {"run_as_user": 1 << 32}, "run_as_user"),
        ("", {"supplemental_groups": (-5,)}, "supplemental_groups -5"),
        ("99999999999", {}, "the image's user"),
    ],
)
def test_who_cannot_be_resolved(rootfs: Path, image_user: str, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        resolve(rootfs, image_user, SecurityContext(**asked))


def test_an_image_without_accounts_takes_ids(tmp_path: Path) -> None:
    assert resolve(tmp_path, "5:6", SecurityContext()) == User(5, 6, (6,), "/")


def test_links_do_not_lead_out_of_the_image(tmp_path: Path) -> None:
    outside, rootfs = tmp_path / "outside", tmp_path / "rootfs"
    outside.mkdir()
    (outside / "passwd").write_text("evil:x:666:666::/:\n")
    (rootfs / "etc").mkdir(parents=True)
    (rootfs / "etc/passwd").symlink_to(outside / "passwd")
    (rootfs / "etc/group").symlink_to("../../outside/passwd")

    with pytest.raises(InvalidArgument, match="evil"):
        resolve(rootfs, "evil", SecurityContext())

    (rootfs / "real").write_text("ok:x:5:6::/:\n")
    (rootfs / "etc/passwd").unlink()
    (rootfs / "etc/passwd").symlink_to("/real")
    assert resolve(rootfs, "ok", SecurityContext()).uid == 5


def test_a_fifo_in_place_of_the_file_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    os.mkfifo(tmp_path / "etc/passwd")

    assert resolve(tmp_path, "", SecurityContext()).uid == 0
