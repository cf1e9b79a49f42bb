"""policy.json decides which images are taken, and fails closed."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from cri.image_service import policy
from cri.image_service.demands import Demands, Fulcio, Pki
from cri.image_service.policy import demanded, file_scopes, of_namespace, registry_scopes
from cri.image_service.reference import parse
from cri.image_service.signed_identity import Match
from oci.errors import PermissionDenied

ACCEPT = [{"type": "insecureAcceptAnything"}]
REJECT = [{"type": "reject"}]
KEY = base64.b64encode(b"key").decode()


def asked(tmp_path: Path, content: Any, reference: str = "a.io/x:1") -> Demands:
    path = tmp_path / "policy.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return demanded(path, "docker", registry_scopes(parse(reference)), f"image {reference}")


def accepted(tmp_path: Path, content: Any, reference: str) -> bool:
    try:
        assert not asked(tmp_path, content, reference)
    except PermissionDenied as error:
        assert str(error).startswith("SignatureValidationFailed")
        assert "policy.json" in str(error)
        return False
    return True


def test_without_a_policy_every_image_is_accepted() -> None:
    assert not demanded(None, "docker", registry_scopes(parse("a.io/x:1")), "image")


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


def test_keys_are_read_from_files_or_stand_in_the_policy(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "two").write_bytes(b"2")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    gpg = {"type": "signedBy", "keyType": "GPGKeys"}
    sigstore = {"type": "sigstoreSigned"}

    found = asked(
        tmp_path,
        {
            "default": [
                {**gpg, "keyPath": one},
                {**gpg, "keyPaths": [one, two]},
                {**gpg, "keyData": KEY, "signedIdentity": {"type": "matchRepository"}},
                {**sigstore, "keyPath": one},
                {**sigstore, "keyPaths": [one, two]},
                {**sigstore, "keyData": KEY},
                {**sigstore, "keyDatas": [KEY, KEY], "rekorPublicKeyPaths": [two]},
            ]
        },
    )

    assert [each.keyrings for each in found.signed_by] == [(b"1",), (b"1", b"2"), (b"key",)]
    assert [each.identity.match for each in found.signed_by] == [Match.REPO_DIGEST_OR_EXACT] * 2 + [Match.REPOSITORY]
    assert [each.keys for each in found.sigstore_signed] == [(b"1",), (b"1", b"2"), (b"key",), (b"key", b"key")]
    assert found.sigstore_signed[3].rekor_keys == (b"2",)


def test_certificates_are_demanded_of_fulcio_or_of_an_authority_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "ca").write_bytes(b"ca")
    ca = str(tmp_path / "ca")
    fulcio = {"caPath": ca, "oidcIssuer": "https://i", "subjectEmail": "a@b"}
    pki = {"caRootsData": KEY, "caIntermediatesPath": ca, "subjectHostname": "h"}

    found = asked(
        tmp_path,
        {
            "default": [
                {"type": "sigstoreSigned", "fulcio": fulcio, "rekorPublicKeyData": KEY},
                {"type": "sigstoreSigned", "pki": pki},
            ]
        },
    ).sigstore_signed

    assert found[0].fulcio == Fulcio(b"ca", "https://i", "a@b")
    assert found[0].rekor_keys == (b"key",)
    assert found[1].pki == Pki(b"key", b"ca", "", "h")


def test_a_key_that_cannot_be_read_refuses_and_only_where_it_counts(tmp_path: Path) -> None:
    lost = [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": str(tmp_path / "lost")}]
    content = {"default": ACCEPT, "transports": {"docker": {"b.io": lost}}}

    assert not asked(tmp_path, content, "a.io/x:1")
    with pytest.raises(PermissionDenied, match=r"^SignatureValidationFailed: .*/lost: No such file"):
        asked(tmp_path, content, "b.io/x:1")


@pytest.mark.parametrize(
    ("requirement", "complaint"),
    [
        (
            {"type": "signedBy", "keyType": "X509Certificates", "keyData": KEY},
            "keyType X509Certificates, which nothing implements",
        ),
        ({"type": "signedBaseLayer", "baseLayerIdentity": {"type": "matchExact"}}, "signedBaseLayer, which nothing"),
    ],
)
def test_what_nothing_implements_refuses(tmp_path: Path, requirement: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PermissionDenied, match=f"^SignatureValidationFailed: .*{complaint}.* for image a.io/x:1"):
        asked(tmp_path, {"default": [requirement]})


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        b"\xff".decode("latin-1"),
        [],
        {},
        {"default": []},
        {"default": ACCEPT, "unknown": 1},
        {"default": ["x"]},
        {"default": [{"type": "new"}]},
        {"default": [{"type": 1}]},
        {"default": [{}]},
        {"default": [{"type": "reject", "why": "x"}]},
        {"default": ACCEPT, "transports": []},
        {"default": ACCEPT, "transports": {"docker": []}},
        {"default": ACCEPT, "transports": {"docker": {"b.io": []}}},
        {"default": ACCEPT, "transports": {"other": {"": [{"type": "new"}]}}},
        '{"default": [{"type": "reject"}], "default": [{"type": "insecureAcceptAnything"}]}',
        '{"default": [{"type": "reject", "type": "insecureAcceptAnything"}]}',
    ],
)
def test_a_wrong_policy_refuses_everything(tmp_path: Path, content: Any) -> None:
    assert not accepted(tmp_path, content, "a.io/x:1")


GPG = {"type": "signedBy", "keyType": "GPGKeys"}
FULCIO = {"caData": KEY, "oidcIssuer": "i", "subjectEmail": "e"}
SIGSTORE = {"type": "sigstoreSigned"}


@pytest.mark.parametrize(
    "requirement",
    [
        GPG,
        {"type": "signedBy", "keyData": KEY},
        {**GPG, "keyType": "PGP", "keyData": KEY},
        {**GPG, "keyPath": "/k", "keyData": KEY},
        {**GPG, "keyPath": ""},
        {**GPG, "keyPaths": []},
        {**GPG, "keyPaths": "/k"},
        {**GPG, "keyData": "not base64!"},
        {**GPG, "keyDatas": [KEY]},
        {**GPG, "keyData": KEY, "signedIdentity": {}},
        {**GPG, "keyData": KEY, "signedIdentity": {"type": "new"}},
        {**GPG, "keyData": KEY, "signedIdentity": {"type": "matchExact", "more": 1}},
        {**GPG, "keyData": KEY, "signedIdentity": {"type": "exactReference", "dockerReference": "a.io/x"}},
        {**GPG, "keyData": KEY, "signedIdentity": {"type": "exactRepository", "dockerRepository": "A b"}},
        {**GPG, "keyData": KEY, "signedIdentity": {"type": "exactRepository", "dockerRepository": ""}},
        {**GPG, "keyData": KEY, "signedIdentity": {"type": "remapIdentity", "prefix": "a.io"}},
        {**GPG, "keyData": KEY, "signedIdentity": {"type": "remapIdentity", "prefix": "a.io:x", "signedPrefix": "b"}},
        SIGSTORE,
        {**SIGSTORE, "keyData": KEY, "keyPath": "/k"},
        {**SIGSTORE, "keyData": KEY, "fulcio": FULCIO, "rekorPublicKeyData": KEY},
        {**SIGSTORE, "keyDatas": []},
        {**SIGSTORE, "keyData": KEY, "rekorPublicKeyData": KEY, "rekorPublicKeyPath": "/k"},
        {**SIGSTORE, "fulcio": FULCIO},
        {**SIGSTORE, "fulcio": {**FULCIO, "caPath": "/k"}, "rekorPublicKeyData": KEY},
        {**SIGSTORE, "fulcio": {**FULCIO, "subjectEmail": ""}, "rekorPublicKeyData": KEY},
        {**SIGSTORE, "fulcio": {"caData": KEY, "oidcIssuer": "i"}, "rekorPublicKeyData": KEY},
        {**SIGSTORE, "pki": {"caRootsData": KEY}},
        {**SIGSTORE, "pki": {"subjectEmail": "e"}},
        {**SIGSTORE, "pki": {"caRootsData": KEY, "subjectEmail": "e"}, "rekorPublicKeyData": KEY},
    ],
)
def test_a_wrong_requirement_anywhere_refuses_everything(tmp_path: Path, requirement: dict[str, Any]) -> None:
    content = {"default": ACCEPT, "transports": {"docker": {"other.io": [requirement]}}}

    with pytest.raises(PermissionDenied, match=r"^SignatureValidationFailed: policy .*scope 'other.io', requirement 1"):
        asked(tmp_path, content)


def test_a_missing_policy_file_refuses_everything(tmp_path: Path) -> None:
    with pytest.raises(PermissionDenied, match=r"^SignatureValidationFailed: cannot read policy"):
        demanded(tmp_path / "none", "docker", [], "image")


def test_a_node_without_the_systems_policy_file_requires_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "SYSTEM_POLICY", tmp_path / "system.json")
    assert not demanded(tmp_path / "system.json", "docker", [], "image")

    (tmp_path / "system.json").symlink_to("dangling")
    with pytest.raises(PermissionDenied):
        demanded(tmp_path / "system.json", "docker", [], "image")


def test_local_files_have_their_directories_as_scopes(tmp_path: Path) -> None:
    scopes = file_scopes(tmp_path / "x" / ".." / "image.tar")

    assert scopes[0] == str(tmp_path / "image.tar")
    assert str(tmp_path) in scopes
    assert "/" not in scopes


def test_a_namespace_has_its_own_file_or_the_default(tmp_path: Path) -> None:
    default, own = tmp_path / "policy.json", tmp_path / "policies"

    assert of_namespace(default, None, "prod") == default
    assert of_namespace(default, own, "prod") == default
    own.mkdir()
    (own / "prod.json").symlink_to("nowhere")  # is there, and will refuse
    assert of_namespace(default, own, "prod") == own / "prod.json"
    assert of_namespace(default, own, "other") == default
    assert of_namespace(default, own, "") == default


@pytest.mark.parametrize("namespace", ["../prod", "a/b", "..", "."])
def test_a_namespace_that_is_a_path_is_refused(tmp_path: Path, namespace: str) -> None:
    with pytest.raises(PermissionDenied, match="is not the name of a namespace"):
        of_namespace(None, tmp_path, namespace)
