"""Manifests and indexes are read strictly, and the right platform is chosen."""

import json
from typing import Any

import pytest

from cri.image_service.manifest import (
    DOCKER_LIST,
    OCI_INDEX,
    OCI_MANIFEST,
    Index,
    Manifest,
    Platform,
    check_digest,
    choose,
    host_platform,
    image_id,
    parse,
    parse_platform,
)
from oci.errors import Error, InvalidArgument, NotFound, Unimplemented
from tests.fakes import layers

DIGEST = "sha256:" + "a" * 64
CONFIG = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": DIGEST, "size": 3}


def manifest(**changes: Any) -> bytes:
    return json.dumps(
        {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": CONFIG, "layers": [], **changes}
    ).encode()


def index(*platforms: str) -> Index:
    images = {platform: layers.image([], {"Labels": {"p": platform}}) for platform in platforms}
    found = parse(layers.index(images), OCI_INDEX, "index")
    assert isinstance(found, Index)
    return found


def chosen(found: Index, wanted: str) -> str:
    descriptor = choose(found, parse_platform(wanted), "index")
    return next(str(platform) for each, platform in found.manifests if each == descriptor)


def test_a_manifest_has_its_config_and_layers_in_order() -> None:
    built = layers.image([b"one", b"two"])

    found = parse(built.manifest, OCI_MANIFEST, "image")

    assert isinstance(found, Manifest)
    assert found.config.digest == built.id
    assert [layer.digest for layer in found.layers] == [layers.digest(blob) for blob in built.layers]


def test_the_best_variant_that_runs_is_chosen() -> None:
    arm = index("linux/arm/v5", "linux/arm/v7", "linux/arm/v6", "linux/amd64")

    assert chosen(arm, "linux/arm/v7") == "linux/arm/v7"
    assert chosen(arm, "linux/arm/v6") == "linux/arm/v6"
    assert chosen(index("linux/arm64"), "linux/arm64/v8") == "linux/arm64"
    assert chosen(index("linux/amd64/v3", "linux/amd64"), "linux/amd64") == "linux/amd64"


def test_a_platform_that_is_not_offered_is_not_found_with_those_that_are() -> None:
    with pytest.raises(NotFound, match=r"index has no image for linux/s390x; it has linux/amd64, windows/amd64"):
        choose(index("linux/amd64", "windows/amd64"), Platform("linux", "s390x"), "index")


def test_entries_without_a_platform_such_as_attestations_are_passed_over() -> None:
    content = json.loads(layers.index({"linux/amd64": layers.image([])}))
    content["manifests"].insert(0, {"mediaType": OCI_MANIFEST, "digest": DIGEST, "size": 1})
    found = parse(json.dumps(content).encode(), OCI_INDEX, "index")
    assert isinstance(found, Index)

    assert chosen(found, "linux/amd64") == "linux/amd64"


def test_where_no_platform_fits_the_first_entry_that_names_none_is_taken() -> None:
    built = [layers.image([], {"Labels": {"n": str(at)}}) for at in range(2)]
    content = json.loads(layers.index({"linux/s390x": built[0], "": built[1]}))
    content["manifests"].append({"mediaType": OCI_MANIFEST, "digest": DIGEST, "size": 1})
    found = parse(json.dumps(content).encode(), OCI_INDEX, "index")
    assert isinstance(found, Index)

    assert choose(found, Platform("linux", "amd64"), "index").digest == built[1].digest


@pytest.mark.parametrize(
    ("text", "kind", "complaint"),
    [
        (b"<html>", Error, "is not JSON: b'<html>'"),
        (b"[]", Error, "is not a JSON object"),
        (b"{}", Error, "neither a manifest nor an index"),
        (b"[" * 100_000, Error, "is not JSON"),
        (manifest(manifests=[]), Error, "neither a manifest nor an index"),
        (manifest(mediaType=DOCKER_LIST), Error, "not what its media type"),
        (manifest(schemaVersion=1), Unimplemented, "schema 1"),
        (manifest(schemaVersion=3), Error, "neither"),
        (manifest(layers={}), Error, "layers must be a list"),
        (manifest(layers=[{"digest": "sha256:../../x", "size": 1}]), Error, "layer 0 has no sha256"),
        (manifest(layers=[{"digest": DIGEST, "size": -1}]), Error, "layer 0 has the size -1"),
        (manifest(layers=[{"digest": DIGEST, "size": True}]), Error, "layer 0 has the size True"),
        (manifest(config=None), Error, "config has no sha256"),
    ],
)
def test_what_makes_no_sense_is_an_error_that_names_what_was_seen(text: bytes, kind: type, complaint: str) -> None:
    with pytest.raises(kind, match=complaint) as caught:
        parse(text, OCI_MANIFEST, "image x")
    assert "image x" in str(caught.value)


IMAGE_LAYER = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": DIGEST, "size": 1}
DOCKER_LAYER = {**IMAGE_LAYER, "mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip"}
OTHER_LAYER = {**IMAGE_LAYER, "mediaType": "application/vnd.example.weights"}


@pytest.mark.parametrize(
    ("config_type", "artifact_type", "layer", "is_called"),
    [
        ("application/vnd.oci.image.config.v1+json", None, IMAGE_LAYER, ""),
        ("application/vnd.oci.image.config.v1+json", None, OTHER_LAYER, ""),  # says that it is an image: let it fail
        ("application/vnd.oci.image.config.v1+json", "application/x", IMAGE_LAYER, ""),  # runs, so it may
        ("application/vnd.oci.image.config.v1+json", "application/x", OTHER_LAYER, "application/x"),
        ("application/vnd.docker.container.image.v1+json", None, DOCKER_LAYER, ""),
        ("application/octet-stream", None, DOCKER_LAYER, ""),
        ("application/octet-stream", None, OTHER_LAYER, "application/octet-stream"),
        (None, None, DOCKER_LAYER, ""),
        (None, None, OTHER_LAYER, "unknown"),
        ("application/vnd.oci.empty.v1+json", "application/x", OTHER_LAYER, "application/x"),
        ("application/vnd.oci.empty.v1+json", "application/x", IMAGE_LAYER, "application/x"),
        ("application/vnd.cncf.helm.config.v1+json", None, IMAGE_LAYER, "application/vnd.cncf.helm.config.v1+json"),
        ("application/vnd.cncf.helm.config.v1+json", 7, OTHER_LAYER, "application/vnd.cncf.helm.config.v1+json"),
    ],
)
def test_an_artifact_is_what_has_no_config_of_an_image_or_says_so_and_has_other_layers(
    config_type: str | None, artifact_type: object, layer: dict[str, Any], is_called: str
) -> None:
    text = manifest(config={**CONFIG, "mediaType": config_type}, artifactType=artifact_type, layers=[layer])

    found = parse(text, OCI_MANIFEST, "it")

    assert isinstance(found, Manifest)
    assert found.artifact_type == is_called


def test_an_image_is_known_by_its_config_an_artifact_and_an_encrypted_image_by_their_manifests() -> None:
    encrypted = {**IMAGE_LAYER, "mediaType": f"{IMAGE_LAYER['mediaType']}+encrypted"}
    ids = []
    for text in (manifest(layers=[IMAGE_LAYER]), manifest(layers=[IMAGE_LAYER, encrypted]), manifest(artifactType="x")):
        found = parse(text, OCI_MANIFEST, "it")
        assert isinstance(found, Manifest)
        ids.append((image_id(found, text), layers.digest(text)))

    assert ids[0][0] == DIGEST
    assert ids[1][0] == ids[1][1]
    assert ids[2][0] == DIGEST  # without a layer, nothing contradicts its config


def test_annotations_that_are_no_texts_are_passed_over() -> None:
    odd = parse(manifest(layers=[{**IMAGE_LAYER, "annotations": {"a": "b", "c": 1, "d": None}}]), OCI_MANIFEST, "it")
    wrong = parse(manifest(layers=[{**IMAGE_LAYER, "annotations": ["a"]}]), OCI_MANIFEST, "it")

    assert isinstance(odd, Manifest) and isinstance(wrong, Manifest)
    assert (odd.layers[0].annotations, wrong.layers[0].annotations) == ({"a": "b"}, {})


def test_a_platform_is_two_or_three_words() -> None:
    assert str(parse_platform("linux/arm/v7")) == "linux/arm/v7"
    assert str(parse_platform("linux/arm")) == "linux/arm"
    assert str(parse_platform("linux/other/foo")) == "linux/other/foo"
    for wrong in ("linux", "linux/", "a/b/c/d", "", "linux/arm/foo", "linux/arm/v999999999"):
        with pytest.raises(InvalidArgument, match="invalid platform"):
            parse_platform(wrong)


def test_the_hosts_platform_is_linux() -> None:
    assert host_platform().os == "linux"
    assert host_platform().architecture


def test_a_digest_is_verified() -> None:
    check_digest(b"x", layers.digest(b"x"), "blob")
    with pytest.raises(Error, match="blob has the digest sha256:"):
        check_digest(b"y", layers.digest(b"x"), "blob")
