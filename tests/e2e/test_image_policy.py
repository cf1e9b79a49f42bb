"""Which images may be pulled and run is for the policy of the pod's namespace to say, whenever it is asked."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from cri.image_service.signature import SIGSTORE_MEDIA_TYPE
from tests.e2e.harness.client import Client, Pod
from tests.e2e.harness.daemon import Daemon
from tests.e2e.harness.images import CONFIG, MANIFEST, Blob, TestImage, busybox_image
from tests.e2e.harness.registry import Registry
from tests.fakes.signing import COSIGN, new_key, payload, public_pem, signature

ACCEPT = [{"type": "insecureAcceptAnything"}]
REJECT = [{"type": "reject"}]
KEY = new_key()
SIGNED = [{"type": "sigstoreSigned", "keyData": base64.b64encode(public_pem(KEY)).decode()}]


@pytest.fixture
def policies(daemon: Daemon) -> Iterator[Path]:
    """A directory of policies by namespace; signatures lie beside the images."""
    folder = daemon.directory / "policies"
    folder.mkdir()
    (daemon.directory / "registries.d").mkdir()
    (daemon.directory / "registries.d/all.yaml").write_text("default-docker: {use-sigstore-attachments: true}")
    yield folder
    for path in (*folder.iterdir(), daemon.directory / "registries.d/all.yaml"):
        path.unlink()
    folder.rmdir()
    (daemon.directory / "registries.d").rmdir()


def put(policies: Path, namespace: str, default: list[Any], **docker: list[Any]) -> None:
    content = {"default": default, "transports": {"docker": docker}}
    (policies / f"{namespace}.json").write_text(json.dumps(content))


def sign(registry: Registry, repository: str, tag: str, made: TestImage) -> None:
    """As cosign does, with the image's name by tag in it."""
    signed = signature(KEY, payload(made.manifest.digest, f"{registry.host}/{repository}:{tag}", COSIGN))
    blob, config = Blob(SIGSTORE_MEDIA_TYPE, signed.content), Blob(CONFIG, b"{}")
    layer = {**blob.descriptor(), "annotations": dict(signed.annotations)}
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config.descriptor(), "layers": [layer]}
    beside = TestImage(Blob(MANIFEST, json.dumps(manifest).encode()), config, (blob,))
    registry.push(beside, repository, f"{made.manifest.digest.replace(':', '-')}.sig")


def remove(client: Client, reference: str) -> None:
    client.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=reference)), timeout=30)


def refusal_of_create(client: Client, pod: Pod, config: pb.ContainerConfig) -> str:
    with pytest.raises(grpc.RpcError) as refused:
        client.create(pod, config)
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    details = str(refused.value.details())
    assert details.startswith("SignatureValidationFailed: ")
    return details


def refusal_of_pull(client: Client, reference: str, pod: pb.PodSandboxConfig) -> str:
    with pytest.raises(grpc.RpcError) as refused:
        client.pull(reference, pod=pod)
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    details = str(refused.value.details())
    assert details.startswith("SignatureValidationFailed: ")
    return details


def test_a_pull_is_judged_by_the_policy_of_the_pods_namespace(
    client: Client, policies: Path, image_registry: Registry
) -> None:
    made = busybox_image("signed")
    reference = image_registry.push(made, "test/signed", "1")
    put(policies, "signed", SIGNED)
    put(policies, "none", REJECT)

    none, signed = client.pod_config(namespace="none"), client.pod_config(namespace="signed")
    assert "none.json rejects image" in refusal_of_pull(client, reference, none)
    assert "a signature is required, but there is none" in refusal_of_pull(client, reference, signed)
    sign(image_registry, "test/signed", "1", made)
    assert client.pull(reference, pod=signed) == made.id
    pod = client.run_pod("signed", namespace="signed")
    assert client.wait_exited(client.run(pod, reference, ["true"])).exit_code == 0
    remove(client, reference)


def test_a_container_is_judged_again_by_the_policy_of_then(client: Client, policies: Path, busybox: str) -> None:
    pod = client.run_pod("judged", namespace="judged")
    config = client.container_config(busybox, ["true"])

    put(policies, "judged", REJECT)
    assert "judged.json rejects image" in refusal_of_create(client, pod, config)
    put(policies, "judged", SIGNED)
    assert "a signature is required, but there is none" in refusal_of_create(client, pod, config)
    (policies / "judged.json").write_text("{")
    assert "is not JSON" in refusal_of_create(client, pod, config)
    assert list(client.containers()) == []
    put(policies, "judged", ACCEPT)
    client.start(client.create(pod, config))


def test_the_name_that_the_author_of_the_pod_wrote_counts(
    client: Client, policies: Path, image_registry: Registry
) -> None:
    made = busybox_image("twice named")
    good, bad = (image_registry.push(made, f"test/{name}", "1") for name in ("good", "bad"))
    for reference in (good, bad):
        client.pull(reference)
    put(policies, "named", REJECT, **{good.rpartition(":")[0]: ACCEPT})
    pod = client.run_pod("named", namespace="named")

    config = client.container_config(made.id, ["true"])
    config.image.user_specified_image = bad
    assert f"rejects image {bad}" in refusal_of_create(client, pod, config)
    config.image.user_specified_image = good
    client.start(client.create(pod, config))
    remove(client, made.id)


def test_an_image_volume_is_judged_too(client: Client, policies: Path, image_registry: Registry, busybox: str) -> None:
    made = busybox_image("a volume")
    volume = image_registry.push(made, "test/volume", "1")
    client.pull(volume)
    put(policies, "volumes", REJECT, **{busybox.rpartition(":")[0]: ACCEPT})
    pod = client.run_pod("volumes", namespace="volumes")
    spec = pb.ImageSpec(image=made.id, user_specified_image=volume)
    mount = pb.Mount(container_path="/volume", image=spec, readonly=True)

    config = client.container_config(busybox, ["test", "-x", "/volume/bin/busybox"], mounts=[mount])
    assert f"rejects image {volume}" in refusal_of_create(client, pod, config)
    put(policies, "volumes", ACCEPT)
    container_id = client.create(pod, config)
    client.start(container_id)
    assert client.wait_exited(container_id).exit_code == 0
    assert client.status(container_id).mounts[0].image.user_specified_image == volume
    remove(client, volume)


def test_a_checkpoints_archive_is_judged_by_its_path(client: Client, policies: Path, tmp_path: Path) -> None:
    put(policies, "restored", REJECT)
    pod = client.run_pod("restored", namespace="restored")
    archive = tmp_path / "checkpoint.tar"

    config = client.container_config(str(archive))
    assert f"rejects tarball:{archive}" in refusal_of_create(client, pod, config)
    (policies / "restored.json").write_text(
        json.dumps({"default": REJECT, "transports": {"tarball": {str(tmp_path): ACCEPT}}})
    )
    with pytest.raises(grpc.RpcError) as missing:
        client.create(pod, config)
    assert missing.value.code() is grpc.StatusCode.NOT_FOUND
