"""Where a real daemon gets images besides a registry that is open to all, and where it puts them."""

import hashlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.harness.daemon import Daemon, crito
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


def test_images_are_saved_by_a_command_and_run_after_a_load_on_a_node_that_reaches_no_registry(
    make_daemon: Callable[..., Daemon], busybox: str, tmp_path: Path
) -> None:
    daemon = make_daemon()
    client = daemon.client()
    image_id = next(each.id for each in client.images.ListImages(pb.ListImagesRequest(), timeout=30).images)

    exact = crito(daemon, "images", "save", busybox, "-o", str(tmp_path / "exact.tar"), "--json")
    *progress, saved = [json.loads(line) for line in exact.stdout.splitlines()]
    assert saved["image"] == {"id": image_id, "source_id": image_id, "names": [busybox], "regenerated": ""}
    assert progress[-1]["progress"]["phase"] == "done"

    daemon.registries_conf.write_text(f'[[registry]]\nlocation = "{busybox.partition("/")[0]}"\nblocked = true\n')
    anew = crito(daemon, "images", "save", busybox, "-o", str(tmp_path / "anew"), "--format", "docker-archive")
    first, note = anew.stdout.splitlines()
    assert first.endswith(f" {busybox}")
    assert note.startswith("  regenerated: ")
    assert note.endswith(f"; here its id is {image_id.removeprefix('sha256:')[:12]}")
    assert crito(daemon, "images", "save", "none.test/x:1", "-o", str(tmp_path / "x")).returncode == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anew", "exact.tar"]

    for archive in ("exact.tar", "anew"):
        assert crito(daemon, "images", "remove", busybox, "--json").stdout == f'{{"removed": "{busybox}"}}\n'
        loaded = crito(daemon, "images", "load", str(tmp_path / archive))
        assert busybox in loaded.stdout, loaded
        pod = client.run_pod("air-gapped")
        assert client.wait_exited(client.run(pod, busybox, ["true"])).exit_code == 0
        client.remove_pod(pod.id)
    [image] = client.images.ListImages(pb.ListImagesRequest(), timeout=30).images
    assert image.id != image_id


def test_an_image_baked_into_the_node_runs_from_a_read_only_store_and_is_left_alone(
    make_daemon: Callable[..., Daemon], busybox: str, tmp_path: Path
) -> None:
    baker = make_daemon()
    baker.stop()
    subprocess.run(["cp", "-a", str(baker.root / "images"), str(tmp_path / "baked")], check=True)
    nothing = tmp_path / "nothing"
    daemon = make_daemon({"image": {"additional_image_stores": [str(tmp_path / "baked"), str(nothing)]}})
    client = daemon.client()
    # The daemon's first pod has pulled the image: its record is ours then, and goes; its layers were never fetched.
    assert [path for path in (daemon.root / "images/layers").iterdir() if "implied" not in path.name] == []
    crito(daemon, "images", "remove", busybox)

    [image] = client.images.ListImages(pb.ListImagesRequest(), timeout=30).images
    assert (busybox in image.repo_tags, image.pinned) == (True, True)
    with pytest.raises(grpc.RpcError, match="is in the additional store") as refused:
        client.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=busybox)), timeout=30)
    assert isinstance(refused.value, grpc.Call)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    pod = client.run_pod("baked")
    assert client.wait_exited(client.run(pod, busybox, ["touch", "/written"])).exit_code == 0
    client.remove_pod(pod.id)

    told = json.loads(client.runtime.Status(pb.StatusRequest(verbose=True), timeout=30).info["config"])
    trouble = f"there is no {nothing}/images.db"
    assert told["additionalImageStores"] == {str(tmp_path / "baked"): "1 images", str(nothing): trouble}
    checked = json.loads(crito(daemon, "check", "--json").stdout)
    seen = {each["seen"]: each["ok"] for each in checked if each["name"] == "image store"}
    assert seen == {f"{tmp_path / 'baked'}: 1 images": True, f"{nothing}: {trouble}": False}
    inspected = json.loads(crito(daemon, "images", "inspect", busybox).stdout)
    assert inspected["additionalStore"] == str(tmp_path / "baked")
    assert crito(daemon, "wipe").stdout == "removed 0 pods and 0 images\n"
