"""policy.json decides which images are taken, and fails closed."""

import json
from pathlib import Path
from typing import Any

import pytest

from cri.image_service import policy
from cri.image_service.policy import check, file_scopes, registry_scopes
from cri.image_service.reference import parse
from oci.errors import PermissionDenied

ACCEPT = [{"type": "insecureAcceptAnything"}]
REJECT = [{"type": "reject"}]


def accepted(tmp_path: Path, content: Any, reference: str) -> bool:
    path = tmp_path / "policy.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    try:
        check(path, "docker", registry_scopes(parse(reference)), f"image {reference}")
    except PermissionDenied as error:
        assert str(error).startswith("SignatureValidationFailed")
        assert "policy.json" in str(error)
        return False
    return True


def test_without_a_policy_every_image_is_accepted() -> None:
    check(None, "docker", registry_scopes(parse("a.io/x:1")), "image")


def test_the_most_specific_scope_decides_alone(tmp_path: Path) -> None:
    content = {
        "default": REJECT,
        "transports": {
            "docker": {
                "a.io": ACCEPT,
                "a.io/bad": REJECT,
                "a.io/bad/good:1": ACCEPT,
                "*.wild.io": ACCEPT,
                "docker.io/library/busybox": ACCEPT,
            }
        },
    }

    assert accepted(tmp_path, content, "a.io/x:1")
    assert not accepted(tmp_path, content, "a.io/bad/x:1")
    assert accepted(tmp_path, content, "a.io/bad/good:1")
    assert not accepted(tmp_path, content, "a.io/bad/good:2")
    assert accepted(tmp_path, content, "deep.sub.wild.io/x:1")
    assert not accepted(tmp_path, content, "wild.io/x:1")
    assert accepted(tmp_path, content, "docker.io/busybox:1")
    assert not accepted(tmp_path, content, "b.io/x:1")


def test_a_transports_own_default_comes_before_the_global_one(tmp_path: Path) -> None:
    assert accepted(tmp_path, {"default": REJECT, "transports": {"docker": {"": ACCEPT}}}, "b.io/x:1")


def test_all_requirements_must_hold(tmp_path: Path) -> None:
    assert not accepted(tmp_path, {"default": ACCEPT + REJECT}, "a.io/x:1")


@pytest.mark.parametrize("kind", ["signedBy", "sigstoreSigned"])
def test_signatures_are_refused_as_not_supported(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({"default": [{"type": kind, "keyPath": "/k"}]}))

    with pytest.raises(PermissionDenied, match=f"^SignatureValidationFailed: .*{kind}.*not supported by this build"):
        check(path, "docker", registry_scopes(parse("a.io/x:1")), "image a.io/x:1")


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        [],
        {},
        {"default": []},
        {"default": ACCEPT, "unknown": 1},
        {"default": ["x"]},
        {"default": [{"type": "new"}]},
        {"default": ACCEPT, "transports": []},
        {"default": ACCEPT, "transports": {"docker": []}},
        '{"default": [{"type": "reject"}], "default": [{"type": "insecureAcceptAnything"}]}',
    ],
)
def test_a_wrong_policy_refuses_everything(tmp_path: Path, content: Any) -> None:
    assert not accepted(tmp_path, content, "a.io/x:1")


def test_a_missing_policy_file_refuses_everything(tmp_path: Path) -> None:
    with pytest.raises(PermissionDenied, match=r"^SignatureValidationFailed: cannot read policy"):
        check(tmp_path / "none", "docker", [], "image")


def test_a_node_without_the_systems_policy_file_requires_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "SYSTEM_POLICY", tmp_path / "system.json")
    check(tmp_path / "system.json", "docker", [], "image")

    (tmp_path / "system.json").symlink_to("dangling")
    with pytest.raises(PermissionDenied):
        check(tmp_path / "system.json", "docker", [], "image")


def test_local_files_have_their_directories_as_scopes(tmp_path: Path) -> None:
    scopes = file_scopes(tmp_path / "x" / ".." / "image.tar")

    assert scopes[0] == str(tmp_path / "image.tar")
    assert str(tmp_path) in scopes
    assert "/" not in scopes
