"""Artifacts as volumes of real containers, and containers of encrypted images."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness.client import Client
from tests.e2e.harness.crictl import Crictl
from tests.e2e.harness.daemon import CRITO, Daemon
from tests.e2e.harness.images import artifact, busybox_image
from tests.e2e.harness.registry import Registry

FOR_EVER = ["sleep", "1000"]
FILES = {"model.bin": os.urandom(200_000), "sub/readme": b"read me", "sub/more/deep": b"deep"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The node's private keys."""
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def shared_daemon(make_daemon: MakeDaemon, keys: Path) -> Daemon:
    settings = {"decryption_keys_path": str(keys), "pinned_images": ["*/test/pinned-model*"]}
    return make_daemon({"image": settings})


def crito(daemon: Daemon, *words: str) -> str:
    command = [str(CRITO), *words, "--config", str(daemon.directory / "crito.toml")]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def image_of(client: Client, reference: str) -> pb.Image:
    request = pb.ImageStatusRequest(image=pb.ImageSpec(image=reference))
    image: pb.Image = client.images.ImageStatus(request, timeout=30).image
    return image


def remove(client: Client, reference: str) -> None:
    client.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=reference)), timeout=30)


def mount(path: str, reference: str, sub_path: str = "") -> pb.Mount:
    spec = pb.ImageSpec(image=reference)
    return pb.Mount(container_path=path, image=spec, readonly=True, image_sub_path=sub_path)


def output(client: Client, container_id: str, script: str) -> str:
    return client.exec_sync(container_id, ["sh", "-c", script]).stdout.decode()


def artifact_layers(daemon: Daemon) -> list[str]:
    return [path.name for path in (daemon.root / "images/layers").glob("artifact-*")]


def test_an_artifact_is_told_like_an_image_and_by_its_files(
    client: Client, daemon: Daemon, image_registry: Registry
) -> None:
    made = artifact(FILES)
    reference = image_registry.push(made, "test/pinned-model", "1")
    digest = f"{image_registry.host}/test/pinned-model@{made.manifest.digest}"

    assert client.pull(reference) == made.manifest.digest

    found = image_of(client, reference)
    assert (found.id, list(found.repo_tags), list(found.repo_digests)) == (made.manifest.digest, [reference], [digest])
    assert found.size == sum(map(len, FILES.values())) + len(made.manifest.data)
    assert (found.pinned, found.HasField("uid"), found.username) == (True, False, "")
    for name in (reference, digest, found.id):
        assert image_of(client, name) == found
    assert found in client.images.ListImages(pb.ListImagesRequest(), timeout=30).images
    assert reference in crito(daemon, "images", "list")
    told = json.loads(crito(daemon, "images", "inspect", reference))
    assert told["artifact"]["type"] == "application/vnd.example.model"
    assert [(each["path"], each["size"]) for each in told["artifact"]["files"]] == [
        (name, len(content)) for name, content in FILES.items()
    ]
    assert crito(daemon, "images", "remove", reference) == f"{reference}\n"
    assert not image_of(client, reference).id


def test_crictl_shows_an_artifact(client: Client, crictl: Crictl, image_registry: Registry) -> None:
    reference = image_registry.push(artifact(FILES), "test/model-for-crictl", "1")
    client.pull(reference)

    told = json.loads(crictl("inspecti", reference))

    assert told["status"]["repoTags"] == [reference]
    assert told["info"]["artifact"]["type"] == "application/vnd.example.model"
    remove(client, reference)


def test_an_artifact_is_a_volume_across_a_crash_and_stays_until_its_last_container_is_gone(
    client: Client, daemon: Daemon, image_registry: Registry, busybox: str
) -> None:
    made = artifact(FILES)
    reference = image_registry.push(made, "test/model", "1")
    client.pull(reference)
    mounts = [
        mount("/model", reference),
        mount("/sub", made.manifest.digest, "sub"),
        mount("/file", reference, "sub/readme"),
    ]
    pod = client.run_pod("reader")
    first = client.run(pod, busybox, FOR_EVER, "first", mounts=mounts)
    checks = "sha256sum < /model/model.bin; cat /model/sub/readme /sub/more/deep /file"
    expected = f"{made.layers[0].digest.removeprefix('sha256:')}  -\nread medeepread me"

    assert output(client, first, checks) == expected
    assert "Read-only" in output(client, first, "touch /model/x 2>&1")
    assert output(client, first, "stat -c %a:%u:%g /model/model.bin /model/sub") == "644:0:0\n755:0:0\n"
    assert [each.image.image_ref for each in client.status(first).mounts] == [made.manifest.digest] * 3

    client.close()
    daemon.kill()
    daemon.start()
    again = daemon.client()
    assert output(again, first, checks) == expected
    assert image_of(again, reference).id == made.manifest.digest
    second = again.run(pod, busybox, FOR_EVER, "second", mounts=mounts)
    assert output(again, second, checks) == expected

    remove(again, reference)
    assert not image_of(again, reference).id
    again.remove(first)
    assert output(again, second, checks) == expected
    assert len(artifact_layers(daemon)) == len(FILES)
    again.remove_pod(pod.id)
    deadline = time.monotonic() + 20
    while artifact_layers(daemon):
        assert time.monotonic() < deadline, artifact_layers(daemon)
        time.sleep(0.1)
    again.close()


def test_a_sub_path_that_an_artifact_lacks_is_an_error(client: Client, image_registry: Registry, busybox: str) -> None:
    reference = image_registry.push(artifact(FILES), "test/model-without", "1")
    client.pull(reference)
    pod = client.run_pod("lacking")

    with pytest.raises(grpc.RpcError) as refused:
        client.run(pod, busybox, FOR_EVER, mounts=[mount("/v", reference, "nowhere")])

    assert str(refused.value.details()).startswith("ImageVolumeMountFailed: image_sub_path 'nowhere'")
    remove(client, reference)


def test_an_artifact_is_not_run(client: Client, image_registry: Registry) -> None:
    reference = image_registry.push(artifact(FILES), "test/model-to-run", "1")
    client.pull(reference)
    pod = client.run_pod("runner")

    with pytest.raises(grpc.RpcError) as refused:
        client.run(pod, reference, ["sh"])

    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "is an artifact of type 'application/vnd.example.model', not a container image" in str(
        refused.value.details()
    )
    assert list(client.containers()) == []
    remove(client, reference)


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo not installed")
def test_a_container_of_an_encrypted_image_runs_once_the_node_has_the_key(
    client: Client, image_registry: Registry, keys: Path, tmp_path: Path
) -> None:
    source = image_registry.push(busybox_image("to be encrypted"), "test/encrypted", "plain")
    target = f"{image_registry.host}/test/encrypted:1"
    key, public = ec.generate_private_key(ec.SECP256R1()), tmp_path / "node.pub"
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    copy = ["skopeo", "--insecure-policy", "copy", "-q", "--src-tls-verify=false", "--dest-tls-verify=false"]
    subprocess.run([*copy, "--encryption-key", f"jwe:{public}", f"docker://{source}", f"docker://{target}"], check=True)

    with pytest.raises(grpc.RpcError) as refused:
        client.pull(target)
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert f"is encrypted (jwe), and there is no private key in {keys}" in str(refused.value.details())
    assert not image_of(client, target).id

    (keys / "node.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    client.pull(target)
    pod = client.run_pod("secret")
    container_id = client.run(pod, target, ["sh", "-c", "echo decrypted"])
    assert client.wait_exited(container_id).exit_code == 0
    assert "decrypted" in client.log(pod)
    client.remove_pod(pod.id)
    remove(client, target)
