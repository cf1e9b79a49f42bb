"""Where a real daemon gets images besides a registry that is open to all, and where it puts them."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.harness.daemon import Daemon
from tests.e2e.harness.images import TestImage, busybox_image
from tests.fakes.registry import FakeRegistry, wants

BASIC = "Basic dGVhbS1hOnNlY3JldA=="  # team-a:secret


@pytest.fixture
def private() -> Iterator[FakeRegistry]:
    """A registry that lets team-a in, and nobody else."""
    with FakeRegistry() as served:
        offer(served, busybox_image("private"))
        served.trouble["^/v2/"] = wants(BASIC, 'Basic realm="r"')
        yield served


def offer(registry: FakeRegistry, image: TestImage) -> None:
    registry.blobs.update({blob.digest: blob.data for blob in (image.config, *image.layers)})
    for reference in (":1", f"@{image.manifest.digest}"):
        registry.manifests[f"team/app{reference}"] = (image.manifest.data, image.manifest.media_type)


def test_a_pod_s_namespace_has_credentials_of_its_own_for_one_pull(
    make_daemon: Callable[..., Daemon], private: FakeRegistry, tmp_path: Path
) -> None:
    auth = tmp_path / "auth"
    auth.mkdir()
    daemon = make_daemon({"image": {"namespaced_auth_dir": str(auth)}})
    with daemon.registries_conf.open("a") as file:
        file.write(f'[[registry]]\nlocation = "{private.address}"\ninsecure = true\n')
    client = daemon.client()
    name = f"{private.address}/team/app"

    def pull(namespace: str) -> str:
        config = client.pod_config()
        config.metadata.namespace = namespace
        request = pb.PullImageRequest(image=pb.ImageSpec(image=f"{name}:1"), sandbox_config=config)
        return str(client.images.PullImage(request, timeout=60).image_ref)

    mine = auth / f"team-a-{hashlib.sha256(name.encode()).hexdigest()}.json"
    mine.write_text(json.dumps({"auths": {private.address: {"auth": BASIC.removeprefix("Basic ")}}}))
    with pytest.raises(grpc.RpcError, match="wants credentials for team/app"):
        pull("team-b")

    assert pull("team-a") == busybox_image("private").id
    assert [path.name for path in auth.rglob("*")] == ["in-use"]
    with pytest.raises(grpc.RpcError, match="wants credentials for team/app"):
        pull("team-a")
