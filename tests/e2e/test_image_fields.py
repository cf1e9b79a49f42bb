"""What the CRI tells of images, field by field, and of the room that they take."""

import json
import time
from pathlib import Path

import pytest

from cri.api.runtime.v1 import api_pb2 as pb
from tests.e2e.conftest import MakeDaemon
from tests.e2e.harness.client import Client
from tests.e2e.harness.daemon import Daemon
from tests.e2e.harness.images import busybox_image
from tests.e2e.harness.registry import Registry


@pytest.fixture(scope="module")
def shared_daemon(make_daemon: MakeDaemon) -> Daemon:
    return make_daemon({"image": {"pinned_images": ["*/test/pinned*"]}})


def status_of(client: Client, reference: str) -> pb.Image:
    request = pb.ImageStatusRequest(image=pb.ImageSpec(image=reference))
    image: pb.Image = client.images.ImageStatus(request, timeout=30).image
    return image


def remove(client: Client, reference: str) -> None:
    client.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=reference)), timeout=30)


def test_an_image_is_told_with_names_size_and_user(client: Client, image_registry: Registry) -> None:
    made = busybox_image("number", {"User": "1000:5"})
    reference = image_registry.push(made, "test/number", "1")
    digest = f"{image_registry.host}/test/number@{made.manifest.digest}"

    pulled = client.pull(reference)

    found = status_of(client, reference)
    assert pulled == found.id == made.id
    assert (list(found.repo_tags), list(found.repo_digests)) == ([reference], [digest])
    assert found.size > 100_000
    assert (found.uid.value, found.username) == (1000, "")
    assert found.spec.image == reference
    for name in (reference, digest, made.id):
        assert status_of(client, name) == found
        listed = client.images.ListImages(
            pb.ListImagesRequest(filter=pb.ImageFilter(image=pb.ImageSpec(image=name))), timeout=30
        )
        assert list(listed.images) == [found]
    remove(client, reference)


def test_an_image_s_user_may_be_a_name(client: Client, image_registry: Registry) -> None:
    reference = image_registry.push(busybox_image("name", {"User": "web"}), "test/name", "1")
    client.pull(reference)

    found = status_of(client, reference)

    assert (found.HasField("uid"), found.username) == (False, "web")
    remove(client, reference)


def test_the_verbose_status_of_an_image_has_its_configuration(client: Client, busybox: str) -> None:
    request = pb.ImageStatusRequest(image=pb.ImageSpec(image=busybox), verbose=True)

    info = client.images.ImageStatus(request, timeout=30).info

    assert json.loads(info["info"])["imageSpec"]["config"]["Cmd"] == ["sh"]


def test_pinned_images_are_told(client: Client, image_registry: Registry, busybox: str) -> None:
    reference = image_registry.push(busybox_image("pinned"), "test/pinned", "1")
    client.pull(reference)

    assert status_of(client, reference).pinned
    assert not status_of(client, busybox).pinned
    remove(client, reference)


def test_streamed_images_are_the_listed_ones(client: Client, busybox: str, image_registry: Registry) -> None:
    client.pull(image_registry.push(busybox_image("another"), "test/another", "1"))

    def streamed(**wanted: pb.ImageFilter) -> list[pb.Image]:
        parts = client.images.StreamImages(pb.StreamImagesRequest(**wanted), timeout=30)
        return [image for part in parts for image in part.images]

    listed = client.images.ListImages(pb.ListImagesRequest(), timeout=30).images

    assert streamed() == list(listed)
    named = [image for image in listed if busybox in image.repo_tags]
    assert streamed(filter=pb.ImageFilter(image=pb.ImageSpec(image=busybox))) == named
    assert len(named) == 1 < len(listed)


def test_removing_an_image_by_one_name_takes_all_of_them(client: Client, image_registry: Registry) -> None:
    made = busybox_image("twice")
    names = [image_registry.push(made, "test/twice", tag) for tag in ("1", "2")]
    for name in names:
        client.pull(name)
    assert sorted(status_of(client, made.id).repo_tags) == names

    remove(client, names[0])

    assert not status_of(client, names[1]).id


def test_the_room_of_images_and_of_containers_is_told_apart(client: Client, daemon: Daemon, busybox: str) -> None:
    pod = client.run_pod("room")
    client.wait_exited(client.run(pod, busybox, ["dd", "if=/dev/zero", "of=/file", "bs=1M", "count=8"]))

    def usage() -> tuple[pb.FilesystemUsage, pb.FilesystemUsage]:
        answer = client.images.ImageFsInfo(pb.ImageFsInfoRequest(), timeout=30)
        (images,), (containers,) = answer.image_filesystems, answer.container_filesystems
        return images, containers

    deadline = time.monotonic() + 30
    while (found := usage())[1].used_bytes.value < 8 << 20:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)

    for each in found:
        assert each.timestamp > 0
        assert Path(each.fs_id.mountpoint).is_relative_to(daemon.root)
        assert each.inodes_used.value > 0
    assert found[0].used_bytes.value > 100_000
    assert found[0].fs_id.mountpoint != found[1].fs_id.mountpoint
