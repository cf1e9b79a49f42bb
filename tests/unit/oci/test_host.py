import asyncio
import json
import os
from pathlib import Path

import pytest

from oci import host
from oci.container_spec import ContainerSpec, Device, Mount, Profile, ProfileKind, SecurityContext
from oci.errors import DeadlineExceeded, Error, InvalidArgument
from oci.linux import mount, proc


def mounted(path: Path, fstype: str) -> list[mount.MountPoint]:
    """The real mount table with one more line: what lies there counts as another file system."""
    line = f"999 1 0:99 / {path} rw - {fstype} server:/export rw\n"
    return [*mount.mountinfo(), *mount.parse_mountinfo(line)]


def resolve(path: Path, points: list[mount.MountPoint], timeout_s: float = 10) -> str:
    return asyncio.run(host.real_path(str(path), points, timeout_s))


def test_links_are_followed_to_the_real_path(tmp_path: Path) -> None:
    real = tmp_path / "real"
    (real / "dir").mkdir(parents=True)
    (tmp_path / "relative").symlink_to("real/./dir")
    (tmp_path / "absolute").symlink_to(tmp_path / "relative" / ".." / "dir")

    assert resolve(tmp_path / "absolute", mount.mountinfo()) == str((real / "dir").resolve())


def test_a_loop_and_a_missing_path_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")

    with pytest.raises(OSError, match="symbolic links"):
        resolve(tmp_path / "a", mount.mountinfo())
    with pytest.raises(FileNotFoundError):
        resolve(tmp_path / "missing", mount.mountinfo())


def test_what_lies_on_a_server_is_looked_up_by_another_process(tmp_path: Path) -> None:
    server = tmp_path / "server"
    server.mkdir()
    (server / "volume").mkdir()
    (server / "link").symlink_to("volume")
    (tmp_path / "to-server").symlink_to(server / "link")
    points = mounted(server, "nfs4")

    assert host.is_remote(str(server / "volume"), points)
    assert not host.is_remote(str(tmp_path), points)
    assert resolve(tmp_path / "to-server", points) == str(server / "volume")
    with pytest.raises(FileNotFoundError):
        resolve(server / "missing", points)


def test_a_server_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_RESOLVER", "import time; time.sleep(60)")

    with pytest.raises(DeadlineExceeded, match=r"server:/export \(nfs4\) mounted at .* within 0.2 s"):
        resolve(tmp_path, mounted(tmp_path, "nfs4"), 0.2)


@pytest.mark.parametrize("path", ["", "relative", "/no/such/path"])
def test_a_bad_host_path_is_named_with_its_mount(path: str) -> None:
    wanted = ContainerSpec("c", mounts=(Mount("/v", path),))

    with pytest.raises(InvalidArgument, match=r"at '/v'.*host_path"):
        asyncio.run(host.look_up(wanted))


def test_devices_are_looked_up_alone_or_by_directory(tmp_path: Path) -> None:
    wanted = ContainerSpec("c", devices=(Device("/dev/x", "/dev/null", "rw"), Device("/dev/pts2", "/dev/pts", "")))

    found = asyncio.run(host.look_up(wanted)).devices

    assert (found[0].path, found[0].type, found[0].major, found[0].minor, found[0].permissions) == (
        "/dev/x",
        "c",
        1,
        3,
        "rw",
    )
    assert all(node.path.startswith("/dev/pts2/") for node in found[1:])
    for path, permissions in ((str(tmp_path / "missing"), "rw"), ("/etc/passwd", "rw"), ("/dev/null", "x")):
        with pytest.raises(InvalidArgument, match="device"):
            asyncio.run(host.look_up(ContainerSpec("c", devices=(Device("", path, permissions),))))


def test_a_privileged_container_gets_the_nodes_devices_unless_its_handler_says_no() -> None:
    wanted = ContainerSpec("c", security=SecurityContext(privileged=True))

    paths = {node.path for node in asyncio.run(host.look_up(wanted)).devices}

    assert {"/dev/null", "/dev/zero"} <= paths
    assert not [path for path in paths if path.startswith(("/dev/pts/", "/dev/shm/"))]
    assert asyncio.run(host.look_up(wanted, privileged_devices=False)).devices == ()


def test_a_seccomp_profile_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"

    def look_up(localhost: str) -> host.HostObjects:
        profile = Profile(ProfileKind.LOCALHOST, localhost)
        return asyncio.run(host.look_up(ContainerSpec("c", security=SecurityContext(seccomp=profile))))

    path.write_text(json.dumps({"defaultAction": "SCMP_ACT_LOG"}))
    assert look_up(str(path)).seccomp == {"defaultAction": "SCMP_ACT_LOG"}

    path.write_text("[]")
    for bad in (str(path), str(tmp_path / "missing"), "relative.json"):
        with pytest.raises(Error, match="seccomp profile"):
            look_up(bad)
    path.write_text("{")
    with pytest.raises(InvalidArgument, match="not JSON"):
        look_up(str(path))


def test_a_look_up_leaves_no_process(tmp_path: Path) -> None:
    async def story() -> None:
        await host.real_path(str(tmp_path), mounted(tmp_path, "fuse.sshfs"), 10)

    before = proc.children(os.getpid())  # another test's servers may run in this process's care

    asyncio.run(story())

    assert proc.children(os.getpid()) == before
