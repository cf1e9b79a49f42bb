from pathlib import Path

from oci.linux import mount

TEXT = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
40 27 0:40 / /mnt/with\\040blank rw,nosuid shared:5 master:1 - nfs4 server:/export/a\\134b rw,vers=4.2
41 40 0:41 /sub /mnt/with\\040blank/inner ro master:1 propagate_from:2 - tmpfs tmpfs rw
broken line
"""


def points() -> list[mount.MountPoint]:
    return list(mount.parse_mountinfo(TEXT))


def test_a_line_of_mountinfo_is_taken_apart() -> None:
    found = points()[2]

    assert found == mount.MountPoint(
        id=40,
        parent_id=27,
        device="0:40",
        root="/",
        target="/mnt/with blank",
        options=("rw", "nosuid"),
        is_shared=True,
        is_slave=True,
        fstype="nfs4",
        source="server:/export/a\\b",
        super_options=("rw", "vers=4.2"),
    )


def test_a_broken_line_is_skipped_and_a_slave_is_not_shared() -> None:
    assert [point.id for point in points()] == [22, 27, 40, 41]
    assert (points()[3].is_shared, points()[3].is_slave) == (False, True)


def test_the_mount_of_a_path_is_the_deepest_one_and_the_last() -> None:
    over = list(mount.parse_mountinfo(TEXT + "50 40 0:50 / /mnt/with\\040blank rw - fuse.x x rw\n"))

    def where(path: str) -> int:
        found = mount.mount_of(Path(path), over)
        assert found is not None
        return found.id

    assert where("/mnt/with blank/inner/x") == 41
    assert where("/mnt/with blank") == 50
    assert where("/mnt/with blankets") == 27
    assert where("/") == 27


def test_a_plain_directory_is_no_mount_point_and_neither_is_what_does_not_exist(tmp_path: Path) -> None:
    assert not mount.is_mountpoint(tmp_path)
    assert not mount.is_mountpoint(tmp_path / "missing")
    assert mount.is_mountpoint(Path("/"))
    assert mount.is_mountpoint(Path("/proc"))


def test_mounts_below_a_directory_without_any_are_none(tmp_path: Path) -> None:
    assert mount.mounts_below(tmp_path) == []
