import os
from pathlib import Path

import pytest

from oci.container_spec import Profile, ProfileKind, SELinuxLabel
from oci.errors import FailedPrecondition, InvalidArgument
from oci.linux import lsm

LOCAL = Profile(ProfileKind.LOCALHOST, "mine")


@pytest.mark.parametrize(
    ("wanted", "has", "expected"),
    [
        (None, True, "default"),
        (None, False, ""),
        (Profile(ProfileKind.RUNTIME_DEFAULT), True, "default"),
        (Profile(ProfileKind.RUNTIME_DEFAULT), False, ""),
        (Profile(ProfileKind.UNCONFINED), True, "unconfined"),
        (Profile(ProfileKind.UNCONFINED), False, ""),
        (LOCAL, True, "mine"),
    ],
)
def test_the_apparmor_profile_of_a_process(wanted: Profile | None, has: bool, expected: str) -> None:
    assert lsm.apparmor_profile(wanted, has, "default") == expected


def test_a_profile_by_name_needs_apparmor_and_must_be_loaded() -> None:
    with pytest.raises(FailedPrecondition, match="no AppArmor"):
        lsm.apparmor_profile(LOCAL, False, "default")
    with pytest.raises(FailedPrecondition, match="not loaded"):
        lsm.apparmor_profile(LOCAL, True, "default", frozenset({"other"}))
    with pytest.raises(InvalidArgument):
        lsm.apparmor_profile(Profile(ProfileKind.LOCALHOST), True, "default")


def test_the_modules_are_found_by_their_files(tmp_path: Path) -> None:
    assert not lsm.has_apparmor(tmp_path)
    assert not lsm.has_selinux(tmp_path)
    (tmp_path / "module/apparmor/parameters").mkdir(parents=True)
    (tmp_path / "module/apparmor/parameters/enabled").write_text("Y\n")
    (tmp_path / "kernel/security/apparmor").mkdir(parents=True)
    (tmp_path / "kernel/security/apparmor/profiles").write_text("crito-default (enforce)\na b (complain)\n")
    (tmp_path / "fs/selinux").mkdir(parents=True)
    (tmp_path / "fs/selinux/enforce").write_text("1")

    assert lsm.has_apparmor(tmp_path)
    assert lsm.has_selinux(tmp_path)
    assert lsm.apparmor_profiles(tmp_path) == {"crito-default", "a b"}


def test_labels_are_filled_up_with_a_pods_own_categories() -> None:
    assert lsm.process_label(None, "s1") == f"system_u:system_r:container_t:{lsm.pod_level('s1')}"
    assert lsm.process_label(SELinuxLabel(type="spc_t", level="s0"), "s1") == "system_u:system_r:spc_t:s0"
    assert lsm.mount_label(SELinuxLabel(level="s0:c1"), "s1") == "system_u:object_r:container_file_t:s0:c1"


def test_categories_are_two_and_ordered_and_stay_with_the_pod() -> None:
    for number in range(2000):
        level = lsm.pod_level(str(number))
        first, second = (int(part[1:]) for part in level.removeprefix("s0:").split(","))
        assert 0 <= first < second < 1024
        assert level == lsm.pod_level(str(number))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to set security.* attributes")
def test_a_tree_is_relabelled_once(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/file").write_text("")
    (tmp_path / "a/link").symlink_to("/no/such")
    label = "system_u:object_r:container_file_t:s0:c1,c2"
    try:
        os.setxattr(tmp_path, "security.selinux", b"probe")
    except OSError as error:
        pytest.skip(f"no security attributes here: {error}")

    assert lsm.relabel(tmp_path / "a", label) == 4
    assert lsm.relabel(tmp_path / "a", label) == 0
    assert os.getxattr(tmp_path / "a/file", "security.selinux") == label.encode() + b"\0"
