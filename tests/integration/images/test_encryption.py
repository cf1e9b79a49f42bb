"""Images that skopeo has encrypted are decrypted with the node's keys, and nothing of them is seen without."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from cri.image_service.catalog import Image
from cri.image_service.images import Images, ImageSettings
from oci.errors import Error, FailedPrecondition, NotFound, Unimplemented
from tests.fakes import image_store, layers
from tests.fakes.image_store import run
from tests.fakes.layers import Built, directory, file, tar
from tests.fakes.registry import FakeRegistry, cut_after, status

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="layers hold owners and device nodes"),
    pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo not installed"),
]

BASE = tar([directory("etc"), file("etc/base", b"base")])
SECRET = tar([directory("etc"), file("etc/secret", b"top secret"), file("big", os.urandom(600_000))])
PLAIN = layers.image([BASE, SECRET])
NAME = "example.test/team/app"
KEYS = "org.opencontainers.image.enc.keys"
PUBLIC_OPTIONS = "org.opencontainers.image.enc.pubopts"

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())


def settings(tmp_path: Path, registry: FakeRegistry, **changes: Any) -> ImageSettings:
    return image_store.settings(tmp_path, registry, **{"decryption_keys_path": tmp_path / "keys", **changes})


def layer_names(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "images/layers").iterdir())


def pem(key: PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_pem(key: PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def jwk(key: PrivateKey) -> bytes:
    def number(value: int, size: int = 0) -> str:
        content = value.to_bytes(size or -(-value.bit_length() // 8), "big")
        return base64.urlsafe_b64encode(content).rstrip(b"=").decode()

    if isinstance(key, rsa.RSAPrivateKey):
        of_rsa = key.private_numbers()
        named = {"n": of_rsa.public_numbers.n, "e": of_rsa.public_numbers.e, "d": of_rsa.d, "p": of_rsa.p}
        named |= {"q": of_rsa.q, "dp": of_rsa.dmp1, "dq": of_rsa.dmq1, "qi": of_rsa.iqmp}
        return json.dumps({"kty": "RSA", **{name: number(value) for name, value in named.items()}}).encode()
    of_ec, size = key.private_numbers(), -(-key.curve.key_size // 8)
    named = {"x": of_ec.public_numbers.x, "y": of_ec.public_numbers.y, "d": of_ec.private_value}
    point = {name: number(value, size) for name, value in named.items()}
    return json.dumps({"kty": "EC", "crv": f"P-{key.curve.key_size}", **point}).encode()


def give(tmp_path: Path, content: bytes, name: str = "node.key") -> Path:
    """A file in the node's directory of keys."""
    path = tmp_path / "keys" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def encrypted(tmp_path: Path, *recipients: bytes, plain: Built = PLAIN, options: tuple[str, ...] = ()) -> Path:
    """The layout that skopeo makes of an image, encrypted for these public keys."""
    work = tmp_path / f"encrypting-{len(list(tmp_path.glob('encrypting-*')))}"
    work.mkdir()
    layers.write_oci_layout(work / "plain", plain, "test")
    keys = []
    for at, recipient in enumerate(recipients):
        (work / f"{at}.pub").write_bytes(recipient)
        keys += ["--encryption-key", f"jwe:{work}/{at}.pub"]
    command = ["skopeo", "--insecure-policy", "copy", "-q", *options, *keys, f"oci:{work}/plain:test"]
    subprocess.run([*command, f"oci:{work}/layout:test"], check=True)
    return work / "layout"


def blob_path(layout: Path, digest: str) -> Path:
    return layout / "blobs/sha256" / digest.removeprefix("sha256:")


def manifest_of(layout: Path) -> dict[str, Any]:
    index = json.loads((layout / "index.json").read_text())
    manifest: dict[str, Any] = json.loads(blob_path(layout, index["manifests"][0]["digest"]).read_text())
    return manifest


def serve(registry: FakeRegistry, layout: Path, manifest: dict[str, Any] | None = None, tag: str = "1") -> Built:
    """Has the registry serve what lies in `layout`, with another manifest where one is given."""
    manifest = manifest_of(layout) if manifest is None else manifest
    blobs = [blob_path(layout, each["digest"]).read_bytes() for each in manifest["layers"]]
    config = blob_path(layout, manifest["config"]["digest"]).read_bytes()
    return registry.add("team/app", tag, Built(config, json.dumps(manifest).encode(), tuple(blobs)))


def asked_blobs(registry: FakeRegistry, built: Built) -> list[int]:
    return [registry.asked[f"/v2/team/app/blobs/{layers.digest(blob)}"] for blob in built.layers]


def is_readable(images: Images, image: Image) -> bool:
    lower, upper = images.layer_paths(image.id)
    return ((lower / "etc/base").read_bytes(), (upper / "etc/secret").read_bytes()) == (b"base", b"top secret")


def refused(tmp_path: Path, registry: FakeRegistry, kind: type[Error], complaint: str, **changes: Any) -> None:
    """A pull ends in this error, and leaves nothing but, for the next try, a lower layer that is whole."""

    async def story(images: Images) -> None:
        with pytest.raises(kind, match=complaint):
            await images.pull(f"{NAME}:1")
        assert images.list() == ()

    run(settings(tmp_path, registry, **changes), story)
    assert len(layer_names(tmp_path)) <= 1
    assert not [
        path for path in (tmp_path / "images/layers").rglob("*") if path.name == "secret" or ".tmp-" in path.name
    ]


def accepted(tmp_path: Path, registry: FakeRegistry) -> None:
    async def story(images: Images) -> None:
        assert is_readable(images, await images.pull(f"{NAME}:1"))

    run(settings(tmp_path, registry), story)


# ---- keys that fit


def other_forms() -> list[Any]:
    traditional = PrivateFormat.TraditionalOpenSSL
    p384, p521 = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP521R1())
    made: dict[str, tuple[bytes, bytes]] = {
        "rsa-pkcs8-pem": (public_pem(RSA_KEY), pem(RSA_KEY)),
        "rsa-pkcs1-pem": (public_pem(RSA_KEY), RSA_KEY.private_bytes(Encoding.PEM, traditional, NoEncryption())),
        "rsa-der": (public_pem(RSA_KEY), RSA_KEY.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())),
        "rsa-jwk": (public_pem(RSA_KEY), jwk(RSA_KEY)),
        "ec-pem": (public_pem(EC_KEY), EC_KEY.private_bytes(Encoding.PEM, traditional, NoEncryption())),
        "ec-der": (public_pem(EC_KEY), EC_KEY.private_bytes(Encoding.DER, traditional, NoEncryption())),
        "ec-jwk": (public_pem(EC_KEY), jwk(EC_KEY)),
        "ec-384": (public_pem(p384), pem(p384)),
        "ec-521": (public_pem(p521), jwk(p521)),
    }
    return [pytest.param(*keys, id=name) for name, keys in made.items()]


@pytest.mark.parametrize(("public", "private"), other_forms())
def test_an_encrypted_image_is_unpacked_with_a_key_of_any_form(
    tmp_path: Path, registry: FakeRegistry, public: bytes, private: bytes
) -> None:
    built = serve(registry, encrypted(tmp_path, public))
    give(tmp_path, private)

    async def story(images: Images) -> None:
        image = await images.pull(f"{NAME}:1")
        assert image.id == built.digest
        assert image.config.diff_ids == (layers.digest(BASE), layers.digest(SECRET))
        assert is_readable(images, image)
        assert all(name.startswith("encrypted-") for name in layer_names(tmp_path))

    run(settings(tmp_path, registry), story)


def test_one_of_several_recipients_is_enough_and_one_of_several_keys(tmp_path: Path, registry: FakeRegistry) -> None:
    strangers: list[PrivateKey] = [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP256R1())]
    serve(registry, encrypted(tmp_path, *map(public_pem, [*strangers, EC_KEY, RSA_KEY])))
    give(tmp_path, pem(ec.generate_private_key(ec.SECP256R1())), "a")
    give(tmp_path, pem(rsa.generate_private_key(65537, 2048)), "b")
    give(tmp_path, pem(EC_KEY), "deeper/c")

    accepted(tmp_path, registry)


def test_an_image_may_be_encrypted_in_part(tmp_path: Path, registry: FakeRegistry) -> None:
    built = serve(registry, encrypted(tmp_path, public_pem(RSA_KEY), options=("--encrypt-layer=1",)))
    give(tmp_path, pem(RSA_KEY))
    assert layers.digest(PLAIN.layers[0]) in built.blobs

    accepted(tmp_path, registry)

    base, secret = layer_names(tmp_path)
    assert base == layers.digest(BASE).removeprefix("sha256:")
    assert secret.startswith("encrypted-")


def test_a_layer_may_be_uncompressed_below_its_encryption(tmp_path: Path, registry: FakeRegistry) -> None:
    plain = layers.image([BASE, SECRET], compress=lambda content: content)
    manifest = json.loads(plain.manifest)
    for layer in manifest["layers"]:
        layer["mediaType"] = "application/vnd.oci.image.layer.v1.tar"
    plain = Built(plain.config, json.dumps(manifest).encode(), plain.layers)
    serve(registry, encrypted(tmp_path, public_pem(RSA_KEY), plain=plain))
    give(tmp_path, pem(RSA_KEY))

    accepted(tmp_path, registry)


def test_an_encrypted_image_is_loaded_from_a_layout_and_from_an_archive(tmp_path: Path, registry: FakeRegistry) -> None:
    layout = encrypted(tmp_path, public_pem(EC_KEY))
    subprocess.run(["tar", "-C", str(layout), "-cf", str(tmp_path / "image.tar"), "."], check=True)

    async def story(images: Images) -> None:
        for path in (layout, tmp_path / "image.tar"):
            with pytest.raises(FailedPrecondition, match=r"is encrypted \(jwe\), and there is no private key in"):
                await images.load(path, "local.test/app:1")
            assert images.list() == ()
        give(tmp_path, pem(EC_KEY))
        for path in (layout, tmp_path / "image.tar"):
            [image] = await images.load(path, "local.test/app:1")
            assert is_readable(images, image)
            await images.remove(image.id)

    run(settings(tmp_path, registry), story)


def test_an_encrypted_image_is_not_saved_in_the_clear(tmp_path: Path, registry: FakeRegistry) -> None:
    serve(registry, encrypted(tmp_path, public_pem(EC_KEY)))
    give(tmp_path, pem(EC_KEY))

    async def story(images: Images) -> None:
        await images.pull(f"{NAME}:1")
        with pytest.raises(FailedPrecondition, match="has encrypted layers"):
            await images.save([f"{NAME}:1"], tmp_path / "saved.tar", "oci-archive")

    run(settings(tmp_path, registry), story)

    assert not (tmp_path / "saved.tar").exists()


def test_an_encrypted_file_of_an_artifact_is_decrypted(tmp_path: Path, registry: FakeRegistry) -> None:
    layout = encrypted(tmp_path, public_pem(RSA_KEY))
    give(tmp_path, pem(RSA_KEY))
    manifest = manifest_of(layout)
    [secret] = manifest["layers"][1:]
    secret["annotations"][layers.TITLE] = "secret.tar.gz"
    secret["mediaType"] = "application/vnd.example.weights+encrypted"
    serve(registry, layout, {**manifest, "artifactType": "application/vnd.example", "layers": [secret]})

    async def story(images: Images) -> None:
        image = await images.pull(f"{NAME}:1")
        [layer] = images.layer_paths(image.id)
        assert (layer / "secret.tar.gz").read_bytes() == PLAIN.layers[1]

    run(settings(tmp_path, registry), story)


# ---- keys that do not


def test_without_the_key_nothing_is_fetched_and_with_it_the_next_pull_works(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    built = serve(registry, encrypted(tmp_path, public_pem(RSA_KEY)))
    directory = tmp_path / "keys"
    layer = rf"^layer sha256:\w{{64}} of image {NAME}:1 is encrypted \(jwe\), and "

    async def story(images: Images) -> None:
        with pytest.raises(FailedPrecondition, match=f"{layer}there is no private key in {directory}:"):
            await images.pull(f"{NAME}:1")
        give(tmp_path, pem(rsa.generate_private_key(65537, 2048)), "other")
        give(tmp_path, pem(EC_KEY), "ec")
        with pytest.raises(FailedPrecondition, match=f"{layer}none of the 2 private keys in {directory} opens it:"):
            await images.pull(f"{NAME}:1")
        assert asked_blobs(registry, built) == [0, 0]
        assert images.list() == ()
        assert layer_names(tmp_path) == []

        give(tmp_path, pem(RSA_KEY), "mine")
        assert is_readable(images, await images.pull(f"{NAME}:1"))

    run(settings(tmp_path, registry), story)


def test_a_node_without_a_directory_of_keys_says_which_setting_names_it(tmp_path: Path, registry: FakeRegistry) -> None:
    serve(registry, encrypted(tmp_path, public_pem(RSA_KEY)))

    refused(tmp_path, registry, FailedPrecondition, "image.decryption_keys_path is not set", decryption_keys_path=None)


def test_files_that_hold_no_usable_key_are_told_and_do_not_keep_others_from_working(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    serve(registry, encrypted(tmp_path, public_pem(RSA_KEY)))
    locked = RSA_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"pass"))
    give(tmp_path, locked, "locked")
    give(tmp_path, public_pem(RSA_KEY), "public")
    give(tmp_path, b"\0garbage", "garbage")
    give(tmp_path, b"{}", "jwk")
    give(tmp_path, bytes(1 << 17), "large")
    os.mkfifo(tmp_path / "keys/pipe")
    (tmp_path / "keys/dangling").symlink_to("nowhere")
    expected = [
        "dangling: not a file",
        "garbage: no private key in PEM, DER or JWK form",
        "jwk: no private key in PEM, DER or JWK form",
        "large: too large for a key",
        "locked: a private key with a passphrase",
        "pipe: not a file",
        "public: no private key",
    ]

    refused(tmp_path, registry, FailedPrecondition, ".*".join(f"{tmp_path}/keys/{each}" for each in expected))

    (tmp_path / "elsewhere").write_bytes(pem(RSA_KEY))
    (tmp_path / "keys/linked").symlink_to(tmp_path / "elsewhere")
    accepted(tmp_path, registry)


# ---- layers that are not what was encrypted


def changed(registry: FakeRegistry, layout: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Serves the image with its upper layer's descriptor changed."""
    manifest = manifest_of(layout)
    change(manifest["layers"][1])
    serve(registry, layout, manifest)


def options(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(layer: dict[str, Any]) -> None:
        found = json.loads(base64.b64decode(layer["annotations"][PUBLIC_OPTIONS]))
        layer["annotations"][PUBLIC_OPTIONS] = base64.b64encode(json.dumps({**found, **changes}).encode()).decode()

    return change


def annotations(**changes: str | None) -> Callable[[dict[str, Any]], None]:
    def change(layer: dict[str, Any]) -> None:
        found = {**layer["annotations"], **{f"{KEYS}.{name}": value for name, value in changes.items()}}
        layer["annotations"] = {name: value for name, value in found.items() if value is not None}

    return change


def jwe(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(layer: dict[str, Any]) -> None:
        found = {**json.loads(base64.b64decode(layer["annotations"][f"{KEYS}.jwe"])), **changes}
        layer["annotations"][f"{KEYS}.jwe"] = base64.b64encode(json.dumps(found).encode()).decode()

    return change


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


@pytest.mark.parametrize(
    ("change", "kind", "complaint"),
    [
        (options(hmac=encoded(bytes(32))), Error, "the ciphertext is not what was encrypted: its HMAC is"),
        (options(hmac=None), Error, "do not say how"),
        (options(hmac=encoded(b"short")), Error, "HMAC of "),
        (options(cipher="ROT13"), Unimplemented, r"with the cipher 'ROT13'; only AES_256_CTR_HMAC_SHA256"),
        (annotations(jwe=None), Error, rf"no annotation {KEYS}\.\* says for whom"),
        (
            annotations(jwe=None, pgp="eA==", pkcs7="eA=="),
            Unimplemented,
            "encrypted by pgp, pkcs7; only jwe is supported",
        ),
        (annotations(jwe="?"), Error, "base64"),
        (annotations(jwe=encoded(b"text")), Error, "not a JSON Web Encryption"),
        (annotations(jwe=encoded(b"[" * 100_000)), Error, "not a JSON Web Encryption"),
        (jwe(ciphertext="AAAA"), FailedPrecondition, "none of the 1 private keys"),
        (jwe(tag="AAAA"), Error, "its tag has 3 bytes"),
        (jwe(iv=None), Error, "not a JSON Web Encryption"),
        (jwe(recipients="all"), Error, "not a JSON Web Encryption"),
        (jwe(header={"zip": "DEF"}), Unimplemented, "with zip is not supported"),
        (jwe(header={"alg": "RSA1_5"}), Unimplemented, "a key wrapped by 'RSA1_5' is not supported"),
        (jwe(header={"enc": "A256CBC-HS512"}), Unimplemented, "a key encrypted by 'A256CBC-HS512' is not supported"),
    ],
)
def test_a_layer_whose_annotations_are_not_its_own_is_refused_with_nothing_half_visible(
    tmp_path: Path, registry: FakeRegistry, change: Callable[[dict[str, Any]], None], kind: type[Error], complaint: str
) -> None:
    give(tmp_path, pem(RSA_KEY))
    changed(registry, encrypted(tmp_path, public_pem(RSA_KEY)), change)

    refused(tmp_path, registry, kind, complaint)


def test_the_first_of_several_wrapped_keys_may_be_for_somebody_else_and_any_may_be_compact(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    """ocicrypt adds recipients later by appending another JWE to the annotation."""
    give(tmp_path, pem(RSA_KEY))
    layout = encrypted(tmp_path, public_pem(RSA_KEY))
    other = manifest_of(encrypted(tmp_path, public_pem(EC_KEY)))["layers"][1]["annotations"][f"{KEYS}.jwe"]

    def change(layer: dict[str, Any]) -> None:
        mine = json.loads(base64.b64decode(layer["annotations"][f"{KEYS}.jwe"]))
        compact = ".".join(mine[name] for name in ("protected", "encrypted_key", "iv", "ciphertext", "tag"))
        layer["annotations"][f"{KEYS}.jwe"] = f"{other},{encoded(compact.encode())}"

    changed(registry, layout, change)

    accepted(tmp_path, registry)


def test_a_nonce_in_the_open_does_not_replace_the_one_that_was_encrypted(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    give(tmp_path, pem(RSA_KEY))
    changed(registry, encrypted(tmp_path, public_pem(RSA_KEY)), options(cipheroptions={"nonce": encoded(bytes(16))}))

    accepted(tmp_path, registry)


@pytest.mark.parametrize("at", [0, 1000, -1])
def test_ciphertext_that_was_changed_under_a_right_digest_fails_its_hmac(
    tmp_path: Path, registry: FakeRegistry, at: int
) -> None:
    """Counter mode alone would let anyone flip bits of the content."""
    give(tmp_path, pem(RSA_KEY))
    layout = encrypted(tmp_path, public_pem(RSA_KEY))
    manifest = manifest_of(layout)
    layer = manifest["layers"][1]
    content = bytearray(blob_path(layout, layer["digest"]).read_bytes())
    content[at] ^= 1
    layer["digest"] = layers.digest(bytes(content))
    blob_path(layout, layer["digest"]).write_bytes(content)
    serve(registry, layout, manifest)

    refused(tmp_path, registry, Error, f"layer {layer['digest']}: the ciphertext is not what was encrypted")


@pytest.mark.parametrize("size", [0, 1000, -1])
def test_ciphertext_that_was_cut_under_a_right_digest_fails_its_hmac(
    tmp_path: Path, registry: FakeRegistry, size: int
) -> None:
    give(tmp_path, pem(RSA_KEY))
    layout = encrypted(tmp_path, public_pem(RSA_KEY))
    manifest = manifest_of(layout)
    layer = manifest["layers"][1]
    content = blob_path(layout, layer["digest"]).read_bytes()[:size]
    layer["digest"], layer["size"] = layers.digest(content), len(content)
    blob_path(layout, layer["digest"]).write_bytes(content)
    serve(registry, layout, manifest)

    refused(tmp_path, registry, Error, "the ciphertext is not what was encrypted")


def test_ciphertext_that_was_broken_on_the_way_is_told_by_its_digest(tmp_path: Path, registry: FakeRegistry) -> None:
    give(tmp_path, pem(RSA_KEY))
    built = serve(registry, encrypted(tmp_path, public_pem(RSA_KEY)))
    digest = layers.digest(built.layers[1])
    registry.blobs[digest] = bytes(len(built.layers[1]))

    refused(tmp_path, registry, Error, f"has the digest sha256:.*, expected {digest}")


# ---- what is on the node already


def test_an_interrupted_pull_goes_on_at_its_byte_and_keeps_ciphertext_alone(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    give(tmp_path, pem(RSA_KEY))
    built = serve(registry, encrypted(tmp_path, public_pem(RSA_KEY)))
    digest = layers.digest(built.layers[1])
    cut, gone = cut_after(200_000), status(404)
    registry.trouble[digest] = lambda handler: (gone if "Range" in handler.headers else cut)(handler)

    refused(tmp_path, registry, NotFound, "status 404")

    partial = max((tmp_path / "images/partial").iterdir(), key=lambda path: path.stat().st_size)
    had = partial.read_bytes()
    assert 0 < len(had) < len(built.layers[1])
    assert built.layers[1].startswith(had)
    registry.trouble.clear()
    registry.headers_seen.clear()
    accepted(tmp_path, registry)
    assert [seen["range"] for seen in registry.headers_seen if "range" in seen] == [f"bytes={len(had)}-"]
    assert list((tmp_path / "images/partial").iterdir()) == []


def test_a_pull_asks_for_the_key_also_where_the_layers_are_here_already(tmp_path: Path, registry: FakeRegistry) -> None:
    built = serve(registry, encrypted(tmp_path, public_pem(RSA_KEY)))
    key = give(tmp_path, pem(RSA_KEY))

    async def story(images: Images) -> None:
        image = await images.pull(f"{NAME}:1")
        key.unlink()

        with pytest.raises(FailedPrecondition, match="there is no private key in"):
            await images.pull(f"{NAME}:1")

        assert images.find(f"{NAME}:1") == image  # and whoever needs no pull goes on
        assert is_readable(images, image)
        give(tmp_path, pem(RSA_KEY))
        await images.pull(f"{NAME}:1")
        assert asked_blobs(registry, built) == [1, 1]

    run(settings(tmp_path, registry), story)


def test_the_diff_ids_of_a_decrypted_image_give_its_layers_to_nobody(tmp_path: Path, registry: FakeRegistry) -> None:
    """They stand in the config, which is not encrypted: knowing them proves nothing."""
    serve(registry, encrypted(tmp_path, public_pem(RSA_KEY)))
    give(tmp_path, pem(RSA_KEY))
    lie = layers.image([BASE, BASE], diff_ids=[layers.digest(BASE), layers.digest(SECRET)])
    registry.add("team/app", "thief", lie)

    async def story(images: Images) -> None:
        await images.pull(f"{NAME}:1")
        with pytest.raises(Error, match=f"digest .* expected {layers.digest(SECRET)}"):
            await images.pull(f"{NAME}:thief")
        assert images.find(f"{NAME}:thief") is None

    run(settings(tmp_path, registry), story)


def test_an_image_and_its_encrypted_self_live_side_by_side(tmp_path: Path, registry: FakeRegistry) -> None:
    serve(registry, encrypted(tmp_path, public_pem(RSA_KEY)))
    serve(registry, encrypted(tmp_path, public_pem(RSA_KEY)), tag="again")
    registry.add("team/app", "plain", PLAIN)
    give(tmp_path, pem(RSA_KEY))

    async def story(images: Images) -> None:
        made = [await images.pull(f"{NAME}:{tag}") for tag in ("1", "again", "plain")]
        assert len({image.id for image in made}) == 3
        for gone, left in ((0, [1, 2]), (1, [2])):
            await images.remove(made[gone].id)
            for at in left:
                assert is_readable(images, made[at])

    run(settings(tmp_path, registry), story)


def test_a_damaged_layer_is_fetched_and_decrypted_again(tmp_path: Path, registry: FakeRegistry) -> None:
    serve(registry, encrypted(tmp_path, public_pem(RSA_KEY)))
    give(tmp_path, pem(RSA_KEY))

    async def story(images: Images) -> None:
        image = await images.pull(f"{NAME}:1")
        (images.layer_paths(image.id)[1] / "etc/secret").write_bytes(b"wrong")

        [found] = [each async for each in images.verify(repair=True)]

        assert found.outcome == "repaired"
        assert is_readable(images, image)

    run(settings(tmp_path, registry), story)
