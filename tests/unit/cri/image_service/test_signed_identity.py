"""A signature counts for the names that signedIdentity says, as containers-policy.json(5) has it."""

import pytest

from cri.image_service.signed_identity import SignedIdentity, parse

DIGEST = "sha256:" + "a" * 64
OTHER_DIGEST = "sha256:" + "b" * 64


@pytest.mark.parametrize(
    ("match", "image", "signed", "counts"),
    [
        ("matchExact", "a.io/x:1", "a.io/x:1", True),
        ("matchExact", "a.io/x:1", "a.io/x:2", False),
        ("matchExact", "a.io/x:1", "b.io/x:1", False),
        ("matchExact", "a.io/x:1", "a.io/x", False),
        ("matchExact", f"a.io/x@{DIGEST}", f"a.io/x@{DIGEST}", True),
        ("matchExact", f"a.io/x@{DIGEST}", "a.io/x:1", False),
        ("matchExact", "docker.io/library/x:1", "x:1", True),
        ("matchExact", "", "a.io/x:1", False),
        ("matchExact", "a.io/x:1", "a.io/X:1", False),
        ("matchExact", "a.io/x:1", "a" * 64, False),
        ("matchRepoDigestOrExact", "a.io/x:1", "a.io/x:1", True),
        ("matchRepoDigestOrExact", "a.io/x:1", "a.io/x:2", False),
        ("matchRepoDigestOrExact", f"a.io/x@{DIGEST}", "a.io/x:2", True),
        ("matchRepoDigestOrExact", f"a.io/x@{DIGEST}", f"a.io/x@{OTHER_DIGEST}", True),
        ("matchRepoDigestOrExact", f"a.io/x@{DIGEST}", "a.io/y:2", False),
        ("matchRepoDigestOrExact", f"a.io/x@{DIGEST}", "a.io/x", False),
        ("matchRepoDigestOrExact", "a.io/x:1", f"a.io/x@{DIGEST}", False),
        ("matchRepoDigestOrExact", "", "a.io/x:1", False),
        ("matchRepository", "a.io/x:1", "a.io/x:2", True),
        ("matchRepository", "a.io/x:1", "a.io/x", True),
        ("matchRepository", "a.io/x:1", "a.io/x/y:1", False),
    ],
)
def test_the_images_own_name_is_matched(match: str, image: str, signed: str, counts: bool) -> None:
    assert parse({"type": match}, "p").accepts(image, signed) == counts


@pytest.mark.parametrize(
    ("signed", "counts"), [("a.io/x:1", True), ("a.io/x:2", False), ("a.io/x", False), ("no name!", False)]
)
def test_an_exact_reference_is_matched_whatever_the_image_is_called(signed: str, counts: bool) -> None:
    identity = parse({"type": "exactReference", "dockerReference": "a.io/x:1"}, "p")

    assert identity.accepts("mirror.io/y:7", signed) == counts
    assert identity.accepts("", signed) == counts


@pytest.mark.parametrize(("signed", "counts"), [("a.io/x:1", True), (f"a.io/x@{DIGEST}", True), ("a.io/y:1", False)])
def test_an_exact_repository_is_matched_whatever_the_image_is_called(signed: str, counts: bool) -> None:
    identity = parse({"type": "exactRepository", "dockerRepository": "a.io/x"}, "p")

    assert identity.accepts("mirror.io/y:7", signed) == counts


@pytest.mark.parametrize(
    ("prefix", "signed_prefix", "image", "signed", "counts"),
    [
        ("mirror.io", "a.io", "mirror.io/x:1", "a.io/x:1", True),
        ("mirror.io", "a.io", "mirror.io/x:1", "a.io/x:2", False),
        ("mirror.io", "a.io", f"mirror.io/x@{DIGEST}", "a.io/x:2", True),
        ("mirror.io", "a.io", "mirror.io/x:1", "mirror.io/x:1", False),
        ("mirror.io", "a.io", "mirror.io.evil/x:1", "mirror.io.evil/x:1", True),
        ("mirror.io/team", "a.io/ns", "mirror.io/team/x:1", "a.io/ns/x:1", True),
        ("mirror.io/team", "a.io/ns", "mirror.io/teams/x:1", "a.io/nss/x:1", False),
        ("mirror.io/team/x", "a.io/y", "mirror.io/team/x:1", "a.io/y:1", True),
        ("mirror.io:5000", "docker.io", "mirror.io:5000/library/x:1", "docker.io/library/x:1", True),
        ("mirror.io", "a.io", "", "a.io/x:1", False),
    ],
)
def test_a_prefix_is_remapped_before_it_is_matched(
    prefix: str, signed_prefix: str, image: str, signed: str, counts: bool
) -> None:
    identity = parse({"type": "remapIdentity", "prefix": prefix, "signedPrefix": signed_prefix}, "p")

    assert identity.accepts(image, signed) == counts


def test_without_a_word_a_name_by_tag_must_be_the_signed_one() -> None:
    assert SignedIdentity().accepts("a.io/x:1", "a.io/x:1")
    assert not SignedIdentity().accepts("a.io/x:1", "a.io/x:2")
