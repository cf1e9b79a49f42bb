"""Image references are read as the distribution project's grammar says."""

import pytest

from cri.image_service.reference import Reference, is_image_id, parse, with_default_tag, with_registry
from oci.errors import InvalidArgument

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("busybox", Reference("", "busybox")),
        ("busybox:1.36", Reference("", "busybox", "1.36")),
        ("library/busybox", Reference("", "library/busybox")),
        ("docker.io/busybox", Reference("docker.io", "library/busybox")),
        ("index.docker.io/a/b", Reference("docker.io", "a/b")),
        ("localhost/a", Reference("localhost", "a")),
        ("host:5000/a/b-c__d:T_1.2", Reference("host:5000", "a/b-c__d", "T_1.2")),
        ("Host/a", Reference("Host", "a")),
        ("[::1]:5000/a", Reference("[::1]:5000", "a")),
        (f"quay.io/a@{DIGEST}", Reference("quay.io", "a", "", DIGEST)),
        (f"quay.io/a:t@{DIGEST}", Reference("quay.io", "a", "t", DIGEST)),
    ],
)
def test_a_reference_is_split_into_its_parts_and_spelled_back(text: str, expected: Reference) -> None:
    assert parse(text) == expected
    assert parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "UPPER",
        "a//b",
        "/a",
        "a/",
        "a:",
        "a:-x",
        "a b",
        "a:" + "t" * 129,
        "quay.io/" + "a" * 256,
        "-host.io/a",
        "host:port/a",
        "a@sha256:abc",
        "a@md5:" + "a" * 32,
        "a@",
        "a@" + DIGEST.upper(),
        "a\n",
        "a:b\n",
    ],
)
def test_a_malformed_reference_is_named_in_the_error(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(text)
    assert repr(text) in str(caught.value) or not text


def test_the_tag_is_latest_only_where_neither_tag_nor_digest_is_given() -> None:
    assert with_default_tag(parse("a")).tag == "latest"
    assert with_default_tag(parse("a:b")).tag == "b"
    assert with_default_tag(parse(f"a@{DIGEST}")).tag == ""


def test_only_docker_hub_puts_short_names_below_library() -> None:
    assert str(with_registry(parse("busybox:1"), "docker.io")) == "docker.io/library/busybox:1"
    assert str(with_registry(parse("busybox:1"), "quay.io")) == "quay.io/busybox:1"
    assert str(with_registry(parse("a/busybox"), "docker.io")) == "docker.io/a/busybox"


def test_an_id_is_64_hex_digits_with_or_without_the_algorithm() -> None:
    assert is_image_id("a" * 64)
    assert is_image_id(DIGEST)
    assert not is_image_id("a" * 63)
    assert not is_image_id("z" * 64)
