"""A policy that demands signatures: verified before any layer is fetched, and again whenever a container is made."""

import asyncio
import base64
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cri.image_service import openpgp
from cri.image_service.images import Image, Images, ImageSettings
from cri.image_service.signature import SIGSTORE_MEDIA_TYPE, Signature
from cri.image_service.workers import Progressed
from oci.errors import Error, NotFound, PermissionDenied, Unavailable
from tests.fakes import layers
from tests.fakes.layers import OCI_INDEX, file, tar
from tests.fakes.registry import FakeRegistry, Handler, status
from tests.fakes.signing import (
    COSIGN,
    EMAIL,
    ISSUER,
    Authority,
    Log,
    OpenPgp,
    attach,
    certified,
    new_key,
    payload,
    public_pem,
    signature,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="layers hold owners")

REPOSITORY = "team/app"
NAME = f"example.test/{REPOSITORY}"
ACCEPT = [{"type": "insecureAcceptAnything"}]
REJECT = [{"type": "reject"}]
KEY = new_key()


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


needs_gpg = needs("gpg", "gpgconf", "gpgv")


@pytest.fixture(scope="module")
def gpg() -> Iterator[OpenPgp]:
    with OpenPgp("alice", "bob") as home:
        yield home


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as served:
        yield served


class Node:
    """The files that decide, and a store."""

    def __init__(self, directory: Path, registry: FakeRegistry) -> None:
        self.directory = directory
        self.registry = registry
        (directory / "policies").mkdir()
        (directory / "registries.d").mkdir()
        self.find_at(f'[[registry]]\nprefix = "example.test"\nlocation = "{registry.address}"\ninsecure = true\n')
        self.look_at("use-sigstore-attachments: true")
        self.policy(REJECT)

    def find_at(self, registries_conf: str) -> None:
        (self.directory / "registries.conf").write_text(registries_conf)

    def look_at(self, *lines: str) -> None:
        """Where signatures lie: beside the image, or in files below `lookaside`."""
        text = "".join(f"  {line}\n" for line in (f"lookaside: file://{self.directory}/lookaside", *lines))
        (self.directory / "registries.d/default.yaml").write_text(f"default-docker:\n{text}")

    def policy(self, requirements: list[dict[str, Any]] | str, namespace: str = "") -> None:
        name = f"policies/{namespace}.json" if namespace else "policy.json"
        text = requirements if isinstance(requirements, str) else json.dumps({"default": requirements})
        (self.directory / name).write_text(text)

    def put_aside(self, manifest_digest: str, number: int, signature: bytes, repository: str = REPOSITORY) -> Path:
        path = self.directory / f"lookaside/{repository}@{manifest_digest.replace(':', '=')}/signature-{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(signature)
        return path

    def run(self, story: Callable[[Images], Awaitable[Any]]) -> Any:
        settings = ImageSettings(
            root=self.directory / "images",
            registries_conf=self.directory / "registries.conf",
            policy=self.directory / "policy.json",
            policy_dir=self.directory / "policies",
            registries_d=self.directory / "registries.d",
            read_timeout_s=5,
        )

        async def whole() -> Any:
            images = await Images.open(settings)
            try:
                return await story(images)
            finally:
                await images.close()

        return asyncio.run(whole())

    def pull(self, reference: str = f"{NAME}:1", namespace: str = "") -> Image:
        image: Image = self.run(lambda images: images.pull(reference, namespace=namespace))
        return image

    def allow(self, reference: str = f"{NAME}:1", namespace: str = "") -> None:
        """What a creation of a container asks."""
        self.run(lambda images: images.allow(images.resolve(reference), reference, namespace))

    def refusal_of_pull(self, reference: str = f"{NAME}:1", namespace: str = "") -> str:
        """Why, after nothing of the image was fetched, and nothing kept."""
        with pytest.raises(PermissionDenied, match=r"^SignatureValidationFailed: ") as refused:
            self.pull(reference, namespace)
        assert self.layers_fetched() == []
        assert list((self.directory / "images/layers").iterdir()) == []
        assert self.run(self.listed) == ()
        return str(refused.value)

    def refusal_of_run(self, reference: str = f"{NAME}:1", namespace: str = "") -> str:
        with pytest.raises(PermissionDenied, match=r"^SignatureValidationFailed: ") as refused:
            self.allow(reference, namespace)
        return str(refused.value)

    def layers_fetched(self) -> list[str]:
        blobs = {layers.digest(blob) for each in (app(), other_app()) for blob in each.layers}
        return [path for path in self.registry.asked if path.rpartition("/")[2] in blobs]

    @staticmethod
    async def listed(images: Images) -> tuple[Image, ...]:
        return images.list()


@pytest.fixture
def node(tmp_path: Path, registry: FakeRegistry) -> Node:
    return Node(tmp_path, registry)


def app() -> layers.Built:
    return layers.image([tar([file("etc/app", b"app")])])


def other_app() -> layers.Built:
    return layers.image([tar([file("etc/other", b"other")])], architecture="arm64")


def signed_by(key: bytes, **fields: Any) -> dict[str, Any]:
    return {"type": "signedBy", "keyType": "GPGKeys", "keyData": base64.b64encode(key).decode(), **fields}


def sigstore_signed(**fields: Any) -> dict[str, Any]:
    return {"type": "sigstoreSigned", **(fields or {"keyData": data(public_pem(KEY))})}


def data(content: bytes) -> str:
    return base64.b64encode(content).decode()


def cosigned(manifest_digest: str, reference: str = f"{NAME}:1") -> Signature:
    return signature(KEY, payload(manifest_digest, reference, COSIGN))


def make_signed(registry: FakeRegistry, *signatures: Signature) -> layers.Built:
    """The app, at its registry, with signatures beside it: without any given, a good one."""
    built = registry.add(REPOSITORY, "1", app())
    attach(registry, REPOSITORY, built.digest, signatures or [cosigned(built.digest)])
    return built


# ---- OpenPGP, lookaside


@needs_gpg
@pytest.mark.parametrize("armored", [False, True])
def test_an_image_signed_by_gpg_is_taken_and_may_run(node: Node, gpg: OpenPgp, armored: bool) -> None:
    built = node.registry.add(REPOSITORY, "1", app())
    node.put_aside(built.digest, 1, gpg.simple_signature(built.digest, f"{NAME}:1", "bob"))
    node.put_aside(built.digest, 2, gpg.simple_signature(built.digest, f"{NAME}:1", "alice"))
    node.policy([signed_by(gpg.key("alice", armored=armored))])

    assert node.pull().id == built.id
    shutil.rmtree(node.directory / "lookaside")
    node.allow()


@needs_gpg
def test_keys_may_lie_in_several_files(node: Node, gpg: OpenPgp) -> None:
    built = node.registry.add(REPOSITORY, "1", app())
    node.put_aside(built.digest, 1, gpg.simple_signature(built.digest, f"{NAME}:1", "bob"))
    paths = []
    for name in ("alice", "bob"):
        (node.directory / name).write_bytes(gpg.key(name, armored=name == "bob"))
        paths.append(str(node.directory / name))
    node.policy([{"type": "signedBy", "keyType": "GPGKeys", "keyPaths": paths}])

    node.pull()
    Path(paths[0]).unlink()
    assert f"a key or certificate that cannot be read: {paths[0]}: No such file" in node.refusal_of_run()


@needs_gpg
def test_what_is_not_signed_as_demanded_is_not_taken(node: Node, gpg: OpenPgp) -> None:
    built = node.registry.add(REPOSITORY, "1", app())
    node.policy([signed_by(gpg.key("alice"))])
    for made, complaint in (
        (None, "a signature is required, but there is none"),
        (gpg.simple_signature(built.digest, f"{NAME}:1", "bob"), r"no key of the policy made it \(key "),
        (gpg.simple_signature(built.digest, f"{NAME}:2", "alice"), "is for 'example.test/team/app:2'"),
        (gpg.simple_signature("sha256:" + "0" * 64, f"{NAME}:1", "alice"), "is for the manifest sha256:000"),
        (gpg.sign(payload(built.digest, f"{NAME}:1", COSIGN), "alice"), "is of type 'cosign"),
        (b"-----BEGIN PGP SIGNED MESSAGE-----", "is no signature in a known format"),
        (b"\0new-format\nx", "is no signature in a known format"),
    ):
        if made is not None:
            node.put_aside(built.digest, 1, made)
        with pytest.raises(PermissionDenied, match=f"^SignatureValidationFailed: .*{complaint}"):
            node.pull()
    assert node.layers_fetched() == []


@needs_gpg
def test_a_message_counts_with_one_good_signature_on_all_of_it(gpg: OpenPgp) -> None:
    keys = [gpg.key("alice")]
    plain = ("-z", "0", "--sign")  # not compressed: what is changed is in the message itself
    made = gpg.sign(b"text", "alice", options=plain)

    assert openpgp.verified(made, keys) == b"text"
    assert openpgp.verified(gpg.sign(b"text", "alice"), keys) == b"text"
    for message, complaint in (
        (made.replace(b"text", b"tEXt"), "the signature is wrong"),
        (made[:-10] + bytes(10), "the signature is wrong"),
        (made + made, "gpgv: "),
        (made + b"more", "no single signed text"),
        (b"\xcb\x0ab\x00\x00\x00\x00\x00evil" + made, "this is no signed message"),
        (gpg.sign(b"text", "alice", options=("--detach-sign",)), "this is no signed message"),
        (gpg.sign(b"text", "alice", "bob"), "there are 2 OpenPGP signatures in one"),
        (gpg.sign(b"text", "bob"), "no key of the policy made it"),
        (gpg.sign(bytes(5_000_000), "alice"), "the signed text is longer than 1048576 bytes"),
    ):
        with pytest.raises(Error, match=complaint):
            openpgp.verified(message, keys)


@needs_gpg
@pytest.mark.parametrize("line_end", ["\n", "\r", "\x0b", "\x1c", "\x85", "\u2028"])
def test_what_a_signer_writes_is_not_taken_for_gpgvs_word(gpg: OpenPgp, line_end: str) -> None:
    name = f"x{line_end}[GNUPG:] GOODSIG 0123456789ABCDEF alice"
    message = gpg.sign(b"text", "bob", options=("--set-filename", name, "--sign"))

    with pytest.raises(Error, match="no key of the policy made it"):
        openpgp.verified(message, [gpg.key("alice")])


@needs_gpg
def test_a_policys_key_that_is_none_is_told(node: Node, gpg: OpenPgp) -> None:
    built = node.registry.add(REPOSITORY, "1", app())
    node.put_aside(built.digest, 1, gpg.simple_signature(built.digest, f"{NAME}:1", "alice"))
    node.policy([signed_by(b"no key")])

    assert "neither an armored nor a binary OpenPGP key: it begins with b'no key'" in node.refusal_of_pull()


@needs_gpg
def test_an_expired_and_a_revoked_key_do_not_count(gpg: OpenPgp) -> None:
    with OpenPgp("carol") as home:
        message = home.sign(b"x", "carol")
        [revocation] = (home.home / "openpgp-revocs.d").glob("*.rev")
        assert openpgp.verified(message, [home.key("carol")]) == b"x"
        home.run("--import", given=revocation.read_bytes().replace(b":-----", b"-----"))  # a colon guards it
        with pytest.raises(Error, match="the key was revoked"):
            openpgp.verified(message, [home.key("carol")])
    with OpenPgp() as home:
        past = "--faked-system-time=20200101T000000!"
        home.run(past, "--passphrase", "", "--quick-gen-key", "dave", "ed25519", "sign", "1d")
        message = home.run(past, "--local-user=dave", "--sign", given=b"x")
        with pytest.raises(Error, match="the key has expired"):
            openpgp.verified(message, [home.key("dave")])


def test_without_gpgv_it_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)

    with pytest.raises(Error, match=r"^gpgv, .* is not installed \(Debian: package gpgv\)"):
        openpgp.verified(b"", [])


@needs_gpg
def test_a_web_server_may_hold_the_signatures(node: Node, gpg: OpenPgp) -> None:
    built = node.registry.add(REPOSITORY, "1", app())
    url = f"http://{node.registry.address}/sigs"
    path = f"/sigs/{REPOSITORY}@{built.digest.replace(':', '=')}/signature-"
    made = gpg.simple_signature(built.digest, f"{NAME}:1", "alice")
    (node.directory / "registries.d/default.yaml").write_text(f"default-docker: {{lookaside: '{url}'}}")
    node.policy([signed_by(gpg.key("alice"))])

    node.registry.trouble = {f"^{path}1$": status(200, body=made)}
    node.pull()
    assert node.registry.asked[f"{path}2"] == 1

    node.registry.trouble = {f"^{path}1$": status(403)}
    with pytest.raises(PermissionDenied, match=r"^SignatureValidationFailed: cannot read the signatures .*status 403"):
        node.pull()
    node.registry.trouble = {f"^{path}1$": status(500)}
    with pytest.raises(Unavailable, match=r"^RegistryUnavailable: GET http://.*/sigs/.*status 500"):
        node.pull()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    (node.directory / "registries.d/default.yaml").write_text(
        f"default-docker: {{lookaside: 'http://127.0.0.1:{port}'}}"
    )
    with pytest.raises(Unavailable, match=r"^RegistryUnavailable: GET http://127.0.0.1.*refused"):
        node.pull()


@pytest.mark.parametrize("lookaside", ["ftp://example.test/x", "file://example.test/x"])
def test_a_lookaside_storage_of_another_kind_is_refused(node: Node, lookaside: str) -> None:
    node.registry.add(REPOSITORY, "1", app())
    node.policy([sigstore_signed()])
    (node.directory / "registries.d/default.yaml").write_text(f"default-docker: {{lookaside: '{lookaside}'}}")

    assert "only file, http and https are known" in node.refusal_of_pull()


# ---- bounds


def endless(handler: Handler) -> None:
    """A body without an end; until the other side has enough."""
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(bytes(1 << 16))
    except OSError:
        handler.close_connection = True


def test_an_endless_signature_is_given_up(node: Node) -> None:
    built = make_signed(node.registry)
    node.policy([sigstore_signed()])
    blob = layers.digest(payload(built.digest, f"{NAME}:1", COSIGN))

    node.registry.trouble = {f"/blobs/{blob}": endless}
    assert "the answer is longer than" in node.refusal_of_pull()
    url = f"http://{node.registry.address}/sigs"
    (node.directory / "registries.d/default.yaml").write_text(f"default-docker: {{lookaside: '{url}'}}")
    node.registry.trouble = {"/sigs/": endless}
    assert "the answer is longer than 1048576 bytes" in node.refusal_of_pull()
    assert threading.active_count() < 20


def test_too_many_signatures_are_given_up(node: Node) -> None:
    built = node.registry.add(REPOSITORY, "1", app())
    node.policy([sigstore_signed()])

    for number in range(1, 130):
        node.put_aside(built.digest, number, b"\x88" + bytes(1000))
    assert "there are more than 128 signatures" in node.refusal_of_pull()
    for number in range(1, 5):
        node.put_aside(built.digest, number, b"\x88" + bytes(300_000))
    assert "the signatures have more than 1048576 bytes" in node.refusal_of_pull()
    shutil.rmtree(node.directory / "lookaside")
    attach(node.registry, REPOSITORY, built.digest, [cosigned(built.digest, f"{NAME}:{at}") for at in range(129)])
    node.registry.trouble = {"/blobs/": endless}  # they are counted before they are fetched
    assert "there are more than 128 signatures" in node.refusal_of_pull()


@pytest.mark.parametrize(
    ("manifest", "complaint"),
    [
        ([], "must be an object"),
        ({}, "lacks layers"),
        ({"layers": 1}, "layers must be a list"),
        ({"layers": [{"mediaType": SIGSTORE_MEDIA_TYPE, "digest": "x", "size": 1}]}, "no digest"),
        ({"layers": [{"mediaType": SIGSTORE_MEDIA_TYPE, "digest": layers.digest(b""), "size": 1 << 30}]}, "more than"),
    ],
)
def test_a_broken_list_of_signatures_is_told(node: Node, manifest: Any, complaint: str) -> None:
    built = make_signed(node.registry)
    node.policy([sigstore_signed()])
    tag = f"{built.digest.replace(':', '-')}.sig"
    node.registry.manifests[f"{REPOSITORY}:{tag}"] = (json.dumps(manifest).encode(), layers.OCI_MANIFEST)

    assert complaint in node.refusal_of_pull()


# ---- sigstore, beside the image


def test_an_image_signed_by_a_key_is_taken_and_may_run_without_its_registry(node: Node) -> None:
    built = make_signed(node.registry)
    node.policy([sigstore_signed()])

    assert node.pull().id == built.id
    node.registry.trouble = {".": status(500)}
    node.registry.asked.clear()
    for reference in (f"{NAME}:1", f"{NAME}@{built.digest}", built.id):
        node.allow(reference)
    assert not node.registry.asked


def test_a_signature_beside_the_image_counts_only_where_registries_d_says_so(node: Node) -> None:
    make_signed(node.registry)
    node.policy([sigstore_signed()])
    node.look_at()

    assert "a signature is required, but there is none" in node.refusal_of_pull()
    assert not any(path.endswith(".sig") for path in node.registry.asked)


def test_another_key_another_identity_and_another_image_are_refused(node: Node) -> None:
    node.policy([sigstore_signed()])
    digest = app().digest
    other_key = signature(new_key(), payload(digest, f"{NAME}:1", COSIGN))
    for made, complaint in (
        (other_key, "no key of the policy made the signature"),
        (cosigned(digest, f"{NAME}:2"), "is for 'example.test/team/app:2', which matchRepoDigestOrExact"),
        (cosigned("sha256:" + "1" * 64), "is for the manifest sha256:111"),
    ):
        make_signed(node.registry, made)
        assert complaint in node.refusal_of_pull()

    make_signed(node.registry, other_key, cosigned(digest, f"{NAME}:2"))
    refused = node.refusal_of_pull()
    assert "none of 2 signatures counts: no key of the policy made the signature; it is for" in refused
    make_signed(node.registry, other_key, cosigned(digest))
    node.pull()


def test_all_requirements_must_be_met(node: Node) -> None:
    other = new_key()
    built = make_signed(node.registry)
    node.policy([sigstore_signed(), sigstore_signed(keyData=data(public_pem(other)))])

    assert "no key of the policy made the signature" in node.refusal_of_pull()
    theirs = signature(other, payload(built.digest, f"{NAME}:1", COSIGN))
    make_signed(node.registry, cosigned(built.digest), theirs)
    node.pull()


@needs_gpg
def test_both_kinds_of_signature_may_be_demanded(node: Node, gpg: OpenPgp) -> None:
    built = make_signed(node.registry)
    node.policy([sigstore_signed(), signed_by(gpg.key("alice"))])

    assert "signedBy: a signature is required, but there is none (1 of another format)" in node.refusal_of_pull()
    node.put_aside(built.digest, 1, gpg.simple_signature(built.digest, f"{NAME}:1", "alice"))
    node.pull()
    node.allow()


def test_a_lookaside_file_may_hold_a_sigstore_signature(node: Node) -> None:
    built = node.registry.add(REPOSITORY, "1", app())
    made = cosigned(built.digest)
    content = {
        "mimeType": "application/vnd.dev.cosign.simplesigning.v1+json",
        "payload": data(made.content),
        "annotations": dict(made.annotations),
    }
    node.put_aside(built.digest, 1, b"\0sigstore-json\n" + json.dumps(content).encode())
    node.policy([sigstore_signed()])

    node.pull()


def test_a_signature_of_fulcio_and_rekor_counts_long_after_its_certificate(node: Node) -> None:
    authority, log, key = Authority(), Log(), new_key()
    built = app()
    certificate = authority.certificate(key)
    made = certified(authority, key, payload(built.digest, f"{NAME}:1", COSIGN), certificate)
    make_signed(node.registry, log.recorded(made, certificate))
    fulcio = {"caData": data(authority.root), "oidcIssuer": ISSUER, "subjectEmail": EMAIL}
    ours, theirs = data(public_pem(log.key)), data(public_pem(Log().key))

    node.policy([sigstore_signed(fulcio=fulcio, rekorPublicKeyDatas=[theirs, ours])])
    node.pull()
    node.policy([sigstore_signed(fulcio={**fulcio, "subjectEmail": "x@y"}, rekorPublicKeyData=ours)])
    assert "the certificate is for dev@example.test, expected x@y" in node.refusal_of_run()
    node.policy([sigstore_signed(fulcio=fulcio, rekorPublicKeyData=theirs)])
    assert "the Rekor bundle is not signed by the log's key" in node.refusal_of_run()


# ---- names, mirrors, indexes


def test_an_identity_may_be_remapped(node: Node) -> None:
    make_signed(node.registry, cosigned(app().digest, "origin.test/prod/app:1"))
    remap = {"type": "remapIdentity", "prefix": NAME.rpartition("/")[0], "signedPrefix": "origin.test/prod"}
    key = data(public_pem(KEY))

    node.policy([sigstore_signed(keyData=key, signedIdentity={**remap, "signedPrefix": "origin.test/other"})])
    assert "remapIdentity does not accept" in node.refusal_of_pull()
    node.policy([sigstore_signed(keyData=key, signedIdentity=remap)])
    node.pull()
    node.allow()


def test_the_instance_of_an_index_is_what_must_be_signed(node: Node) -> None:
    """As containers/image has it: a signature of the index does not count."""
    built, other = app(), other_app()
    node.registry.add(REPOSITORY, "unused", built)
    index = layers.index({"linux/amd64": built, "linux/arm64": other})
    index_digest = node.registry.add_index(REPOSITORY, "1", index, OCI_INDEX)
    node.policy([sigstore_signed()])

    attach(node.registry, REPOSITORY, index_digest, [cosigned(index_digest)])
    assert "a signature is required, but there is none" in node.refusal_of_pull()
    attach(node.registry, REPOSITORY, built.digest, [cosigned(built.digest)])
    node.pull()
    node.pull(f"{NAME}@{index_digest}")
    node.registry.trouble = {".": status(500)}
    for reference in (f"{NAME}:1", f"{NAME}@{index_digest}", f"{NAME}@{built.digest}"):
        node.allow(reference)


def test_a_mirrors_image_is_signed_by_the_name_that_was_asked_for(node: Node) -> None:
    with FakeRegistry() as mirror:
        node.find_at(
            f'[[registry]]\nprefix = "example.test"\nlocation = "{node.registry.address}"\ninsecure = true\n'
            f'[[registry.mirror]]\nlocation = "{mirror.address}/copy"\ninsecure = true\n'
        )
        node.policy([sigstore_signed()])
        built = mirror.add(f"copy/{REPOSITORY}", "1", app())

        refused = node.refusal_of_pull()  # which tells more than that the primary has no such image
        assert "a signature is required, but there is none (before that, " in refused
        assert "status 404" in refused
        attach(mirror, f"copy/{REPOSITORY}", built.digest, [cosigned(built.digest)])
        node.pull()
        assert not node.layers_fetched()
        node.allow()


def test_a_mirror_without_signatures_leaves_the_primary_to_be_asked(node: Node) -> None:
    with FakeRegistry() as mirror:
        node.find_at(
            f'[[registry]]\nprefix = "example.test"\nlocation = "{node.registry.address}"\ninsecure = true\n'
            f'[[registry.mirror]]\nlocation = "{mirror.address}"\ninsecure = true\n'
        )
        node.policy([sigstore_signed()])
        mirror.add(REPOSITORY, "1", other_app())
        built = make_signed(node.registry)

        assert node.pull().id == built.id


# ---- namespaces


def test_a_namespaces_policy_may_be_stricter_than_the_nodes(node: Node) -> None:
    make_signed(node.registry, cosigned(app().digest, f"{NAME}:2"))
    node.policy(ACCEPT)
    node.policy([sigstore_signed()], "prod")
    node.policy("not json", "broken")

    assert "which matchRepoDigestOrExact does not accept" in node.refusal_of_pull(namespace="prod")
    assert "is not JSON" in node.refusal_of_pull(namespace="broken")
    node.pull(namespace="dev")
    node.allow(namespace="dev")
    assert "which matchRepoDigestOrExact does not accept" in node.refusal_of_run(namespace="prod")
    assert "is not JSON" in node.refusal_of_run(namespace="broken")


def test_a_namespaces_policy_may_be_looser_than_the_nodes(node: Node) -> None:
    node.registry.add(REPOSITORY, "1", app())
    node.policy(REJECT)
    node.policy(ACCEPT, "dev")

    assert "policy.json rejects image" in node.refusal_of_pull()
    node.pull(namespace="dev")
    node.allow(namespace="dev")
    assert "policy.json rejects image" in node.refusal_of_run()


def test_a_pull_keeps_the_signatures_that_another_namespace_will_demand(node: Node) -> None:
    make_signed(node.registry)
    node.policy(ACCEPT)
    node.policy([sigstore_signed()], "prod")

    node.pull(namespace="dev")
    node.registry.trouble = {".": status(500)}
    node.allow(namespace="prod")


def test_signatures_that_nobody_demands_yet_do_not_fail_a_pull(node: Node) -> None:
    make_signed(node.registry)
    node.policy(ACCEPT)
    node.policy([sigstore_signed()], "prod")
    node.registry.trouble = {r"\.sig$": status(403)}

    node.pull(namespace="dev")
    node.registry.trouble = {}
    node.allow(namespace="prod")


def test_where_nobody_demands_signatures_nobody_looks_for_them(node: Node) -> None:
    make_signed(node.registry)
    node.policy(ACCEPT)

    node.pull()
    node.allow()
    assert not any(path.endswith(".sig") for path in node.registry.asked)


# ---- between pull and creation


def test_a_policy_that_changes_after_the_pull_counts_for_the_next_container(node: Node) -> None:
    built = make_signed(node.registry)
    node.policy(ACCEPT)
    node.pull()

    node.policy(REJECT)
    assert "policy.json rejects image example.test/team/app:1" in node.refusal_of_run()
    node.policy([sigstore_signed(keyData=data(public_pem(new_key())))])
    assert "no key of the policy" in node.refusal_of_run()
    node.policy("{")
    assert "is not JSON" in node.refusal_of_run(built.id)
    node.policy([sigstore_signed()])
    node.allow()  # signatures are fetched, which nobody has asked for before, and kept
    node.registry.trouble = {".": status(500)}
    node.allow()


def test_signatures_that_are_not_here_and_cannot_be_fetched_are_the_registrys_fault(node: Node) -> None:
    make_signed(node.registry)
    node.policy(ACCEPT)
    node.pull()
    node.policy([sigstore_signed()])
    node.registry.trouble = {".": status(503)}

    with pytest.raises(Unavailable, match=r"^RegistryUnavailable: GET .*\.sig: status 503"):
        node.allow()


def test_an_image_that_was_signed_after_its_pull_may_run(node: Node) -> None:
    built = make_signed(node.registry, cosigned(app().digest, f"{NAME}:2"))
    node.policy(ACCEPT)
    node.policy([sigstore_signed()], "prod")
    node.pull()

    assert "does not accept" in node.refusal_of_run(namespace="prod")
    attach(node.registry, REPOSITORY, built.digest, [cosigned(built.digest)])
    node.allow(namespace="prod")


def test_a_registry_that_was_blocked_meanwhile_changes_no_verdict(node: Node) -> None:
    make_signed(node.registry)
    node.policy([sigstore_signed()])
    node.pull()
    node.find_at('[[registry]]\nlocation = "example.test"\nblocked = true\n')

    node.allow()
    node.policy([sigstore_signed(keyData=data(public_pem(new_key())))])
    assert "no key of the policy made the signature" in node.refusal_of_run()


def test_a_verdict_holds_while_nothing_changes(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second container costs no worker; a policy of other content, or a key file of other content, does."""
    make_signed(node.registry)
    (node.directory / "key.pem").write_bytes(public_pem(KEY))
    node.policy([sigstore_signed(keyPath=str(node.directory / "key.pem"))])

    async def story(images: Images) -> None:
        image = await images.pull(f"{NAME}:1")
        await images.allow(image, f"{NAME}:1", "")
        calls: list[dict[str, Any]] = []
        call = images._workers.call

        async def counting(request: dict[str, Any], progressed: Progressed | None = None) -> dict[str, Any]:
            calls.append(request)
            return await call(request, progressed)

        monkeypatch.setattr(images._workers, "call", counting)
        await images.allow(image, f"{NAME}:1", "")
        assert calls == []
        (node.directory / "key.pem").write_bytes(public_pem(new_key()))
        with pytest.raises(PermissionDenied):
            await images.allow(image, f"{NAME}:1", "")
        assert [each["verb"] for each in calls] == ["verify_signatures", "newer_signatures"]

    node.run(story)


# ---- which name counts


def by_scope(scopes: Mapping[str, Any], default: Any = REJECT) -> str:
    return json.dumps({"default": default, "transports": {"docker": scopes}})


def test_an_image_is_judged_by_the_name_that_the_pod_gives_it(node: Node) -> None:
    node.find_at(
        "".join(
            f'[[registry]]\nprefix = "{host}"\nlocation = "{node.registry.address}"\ninsecure = true\n'
            for host in ("example.test", "other.test")
        )
    )
    node.registry.add(REPOSITORY, "1", app())
    node.policy(ACCEPT)
    image = node.pull()
    node.pull(f"other.test/{REPOSITORY}:1")

    node.policy(by_scope({"example.test": ACCEPT}))
    node.allow()
    assert "rejects image other.test/team/app:1" in node.refusal_of_run(f"other.test/{REPOSITORY}:1")
    node.allow(image.id)  # has a name that is accepted


def test_an_id_or_a_foreign_name_does_not_hide_where_an_image_came_from(node: Node) -> None:
    node.registry.add(REPOSITORY, "1", app())
    node.policy(ACCEPT)
    image = node.pull()
    node.policy(by_scope({"docker.io": ACCEPT, "accepted.test": ACCEPT}))

    async def story(images: Images) -> None:
        for name in (image.id, image.id.removeprefix("sha256:"), "accepted.test/x:1", "app", "/no/image", ""):
            with pytest.raises(PermissionDenied, match=r"rejects image example\.test/team/app:1"):
                await images.allow(image, name, "")

    node.run(story)


def test_a_digest_that_the_image_does_not_have_is_no_name_of_it(node: Node) -> None:
    make_signed(node.registry)
    node.policy([sigstore_signed()])
    image = node.pull()
    node.policy(by_scope({f"{NAME}@sha256:{'0' * 64}": ACCEPT}))

    with pytest.raises(PermissionDenied, match=r"rejects image example\.test/team/app:1"):
        node.run(lambda images: images.allow(images.resolve(image.id), f"{NAME}@sha256:{'0' * 64}", ""))


def test_a_name_that_moved_on_still_tells_the_repository(node: Node) -> None:
    make_signed(node.registry)
    node.policy([sigstore_signed()])
    first = node.pull()
    moved = node.registry.add(REPOSITORY, "1", layers.image([tar([file("new")])]))
    attach(node.registry, REPOSITORY, moved.digest, [cosigned(moved.digest)])

    assert node.pull().id == moved.id
    node.run(lambda images: images.allow(images.resolve(first.id), f"{NAME}:1", ""))


def test_an_image_of_a_local_file_is_judged_by_its_path(node: Node) -> None:
    layers.write_oci_layout(node.directory / "layout", app(), f"{NAME}:1")
    archive = node.directory / "app.tar"
    subprocess.run(["tar", "-C", str(node.directory / "layout"), "-cf", str(archive), "."], check=True)

    def only(transport: str, path: Path) -> str:
        return json.dumps({"default": REJECT, "transports": {transport: {str(path): ACCEPT}}})

    async def load(images: Images) -> None:
        await images.load(node.directory / "layout")

    async def load_archive(images: Images) -> None:
        await images.load(archive)

    node.policy(only("oci-archive", archive))
    with pytest.raises(PermissionDenied, match=r"^SignatureValidationFailed: .*rejects oci:"):
        node.run(load)
    node.run(load_archive)
    node.allow()
    node.policy(only("oci", node.directory / "layout"))
    assert "of oci-archive:" in node.refusal_of_run()
    node.run(load)
    node.allow()
    node.policy([sigstore_signed()])
    with pytest.raises(PermissionDenied, match=r"demands a signature for oci:.*, and a local file has none"):
        node.run(load)
    assert "a signature is demanded for image sha256:" in node.refusal_of_run()


# ---- the store


def test_a_store_of_an_earlier_version_learns_where_images_came_from(node: Node) -> None:
    make_signed(node.registry)
    node.policy(ACCEPT)
    node.pull()
    with closing(sqlite3.connect(node.directory / "images/images.db")) as database:
        database.executescript("DROP TABLE origins; PRAGMA user_version = 2;")
    node.policy([sigstore_signed()])

    node.allow()
    node.registry.trouble = {".": status(500)}
    node.allow()


def test_an_archive_that_an_earlier_version_took_in_has_no_signatures(node: Node) -> None:
    plain = tar([file("etc/app", b"app")])
    (node.directory / "app.tar").write_bytes(layers.docker_archive(app(), [plain], [f"{NAME}:1"]))
    node.policy(ACCEPT)
    node.run(lambda images: images.load(node.directory / "app.tar"))
    with closing(sqlite3.connect(node.directory / "images/images.db")) as database:
        database.executescript("DROP TABLE origins; PRAGMA user_version = 2;")

    node.allow()
    node.policy([sigstore_signed()])
    assert "a signature is required, but there is none" in node.refusal_of_run()
    assert not node.registry.asked


def test_what_was_known_of_a_removed_image_is_forgotten(node: Node) -> None:
    make_signed(node.registry)
    node.policy([sigstore_signed()])
    image = node.pull()

    async def story(images: Images) -> None:
        images.hold(image.id, "container")
        await images.remove(image.id)
        with pytest.raises(NotFound):
            images.resolve(image.id)
        assert images._store.origins(image.id) == ()

    node.run(story)


# ---- signed by another program


@needs("docker-registry", "skopeo", "gpg", "gpgv")
def test_what_skopeo_signs_counts(node: Node, gpg: OpenPgp, debian_registry: str) -> None:
    """By gpg alone: Debian's skopeo is built without signing by keys of cosign's kind."""
    layers.write_oci_layout(node.directory / "layout", app(), "test")
    node.find_at(f'[[registry]]\nprefix = "example.test"\nlocation = "{debian_registry}"\ninsecure = true\n')
    command = ["skopeo", "--insecure-policy", "--registries.d", str(node.directory / "registries.d"), "copy", "-q"]
    sign = ["--sign-by", gpg.fingerprint("alice"), "--sign-identity", f"{NAME}:1"]
    places = [f"oci:{node.directory}/layout:test", f"docker://{debian_registry}/{REPOSITORY}:1"]
    subprocess.run(
        [*command, *sign, "--dest-tls-verify=false", "--format=oci", *places],
        check=True,
        env={**os.environ, "GNUPGHOME": str(gpg.home)},
    )

    node.policy([signed_by(gpg.key("bob"))])
    with pytest.raises(PermissionDenied, match="no key of the policy made it"):
        node.pull()
    node.policy([signed_by(gpg.key("alice"))])
    assert node.pull().id == app().id
    node.allow()
