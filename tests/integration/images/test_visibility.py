"""Pulls can be watched, bounded and ended, images pinned at run time, and the daemon's loop never waits for them."""

import asyncio
import gc
import io
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cri.image_service import worker
from cri.image_service.images import Images
from cri.image_service.limits import RegistryLimit
from cri.image_service.progress import LayerPhase, Progress
from oci.errors import DeadlineExceeded, InvalidArgument, Unavailable
from tests.fakes import layers
from tests.fakes.image_store import run, settings
from tests.fakes.layers import directory, file, tar
from tests.fakes.registry import FakeRegistry, after, status

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="layers hold owners and device nodes")

NAME = "example.test/team/app"


def three_layers() -> layers.Built:
    return layers.image([tar([directory("d"), file(f"d/{at}", os.urandom(100_000))]) for at in range(3)])


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_so():  # noqa: ASYNC110 (what changes has no event)
            await asyncio.sleep(0.01)


def test_layers_show_their_phase_and_their_place_in_the_queue_of_a_busy_registry(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    registry.add("team/app", "1", three_layers())
    registry.trouble["blobs/.*"] = after(0.3)
    limits = {registry.address: RegistryLimit(parallel_layers=1)}

    async def story(images: Images) -> None:
        last: list[Progress] = []
        pull = asyncio.create_task(images.pull(f"{NAME}:1", on_progress=last.append))
        await until(lambda: images.waiting == 2)
        (progress,) = images.pulls()
        assert sorted(layer.queue_position for layer in progress.layers) == [0, 1, 2]
        assert [layer.phase for layer in progress.layers].count(LayerPhase.QUEUED) == 2
        await pull
        assert last[-1].bytes_fetched == last[-1].bytes_total
        assert {layer.phase for layer in last[-1].layers} == {LayerPhase.DONE}

    run(settings(tmp_path, registry, registry_limits=limits), story)


def test_a_registrys_rate_bounds_all_its_layers_together(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/app", "1", three_layers())
    limits = {registry.address: RegistryLimit(bytes_per_s=150_000)}

    async def story(images: Images) -> float:
        began = time.monotonic()
        await images.pull(f"{NAME}:1")
        return time.monotonic() - began

    assert run(settings(tmp_path, registry, registry_limits=limits), story) > 300_000 / 150_000 - 0.5


def test_the_rate_is_that_of_the_source_that_sends_the_bytes(tmp_path: Path, registry: FakeRegistry) -> None:
    built = registry.add("team/app", "1", three_layers())
    with FakeRegistry() as mirror:
        mirror.add("team/app", "1", built)
        mirror.trouble |= {layers.digest(blob): status(404) for blob in built.layers}
        mirrors = (
            f'[[registry]]\nprefix = "user.test"\nlocation = "{registry.address}"\ninsecure = true\n'
            f'[[registry.mirror]]\nlocation = "{mirror.address}"\ninsecure = true\n'
        )

        async def story(images: Images) -> float:
            began = time.monotonic()
            await images.pull("user.test/team/app:1")
            taken_s = time.monotonic() - began
            await images.remove("user.test/team/app:1")
            return taken_s

        held = {registry.address: RegistryLimit(bytes_per_s=150_000)}
        not_held = {mirror.address: RegistryLimit(bytes_per_s=1000)}
        assert run(settings(tmp_path, extra=mirrors, registry_limits=held), story) > 300_000 / 150_000 - 0.5
        assert run(settings(tmp_path, extra=mirrors, registry_limits=not_held), story) < 20


def test_the_rate_bounds_also_what_is_fetched_to_be_saved(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/app", "1", three_layers())

    async def pull(images: Images) -> None:
        await images.pull(f"{NAME}:1")

    async def save(images: Images) -> float:
        began = time.monotonic()
        [saved] = await images.save([f"{NAME}:1"], tmp_path / "app.tar", "oci-archive")
        assert saved.regenerated == ""
        return time.monotonic() - began

    run(settings(tmp_path, registry), pull)
    limits = {registry.address: RegistryLimit(bytes_per_s=150_000)}
    assert run(settings(tmp_path, registry, registry_limits=limits), save) > 300_000 / 150_000 - 0.5


def test_a_pull_can_be_ended_by_its_name_whoever_waits_for_it(tmp_path: Path, registry: FakeRegistry) -> None:
    built = registry.add("team/app", "1", three_layers())
    registry.trouble[layers.digest(built.layers[1])] = after(3)

    async def story(images: Images) -> None:
        pull = asyncio.create_task(images.pull(f"{NAME}:1"))
        await until(lambda: any(each.layers for each in images.pulls()))
        assert await images.cancel(f"{NAME}:2") == 0
        assert await images.cancel(f"{NAME}:1") == 1
        with pytest.raises(Unavailable, match="was cancelled by the node's administrator"):
            await pull
        assert images.pulls() == ()
        registry.trouble.clear()
        assert (await images.pull(f"{NAME}:1")).id == built.id

    run(settings(tmp_path, registry), story)


def test_a_pull_that_is_asked_for_again_while_it_is_cancelled_is_a_new_one_that_shows(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    built = registry.add("team/app", "1", three_layers())
    registry.trouble[layers.digest(built.layers[1])] = after(1)

    async def story(images: Images) -> None:
        first = asyncio.create_task(images.pull(f"{NAME}:1"))
        await until(lambda: any(each.layers for each in images.pulls()))
        cancelling = asyncio.create_task(images.cancel(f"{NAME}:1"))
        await asyncio.sleep(0)
        second = asyncio.create_task(images.pull(f"{NAME}:1"))
        with pytest.raises(Unavailable, match="was cancelled"):
            await first
        await cancelling
        assert [each.reference for each in images.pulls()] == [f"{NAME}:1"]
        assert images.pulls()[0].bytes_fetched <= images.pulls()[0].bytes_total
        assert (await second).id == built.id
        assert images.pulls() == ()

    run(settings(tmp_path, registry), story)


def test_a_pull_whose_caller_is_gone_before_it_begins_shows_nowhere(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/app", "1", three_layers())

    async def story(images: Images) -> None:
        for steps in range(12):
            pull = asyncio.create_task(images.pull(f"{NAME}:1"))
            for _ in range(steps):
                await asyncio.sleep(0)
            pull.cancel()
            await asyncio.wait([pull])
            assert images.pulls() == ()

    run(settings(tmp_path, registry), story)


def test_unpacking_an_archive_and_removing_layers_are_progress(tmp_path: Path) -> None:
    archive = tmp_path / "app.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar_file:
        noise = tarfile.TarInfo("noise")
        noise.size = 1 << 20
        tar_file.addfile(noise, io.BytesIO(os.urandom(noise.size)))
    (tmp_path / "gone").mkdir()
    for at in range(300):
        (tmp_path / "gone" / str(at)).touch()

    unpacking, removing = worker.Progress(lambda _: None), worker.Progress(lambda _: None)
    with pytest.raises(InvalidArgument, match="neither an OCI layout"):
        where = {"path": str(archive), "scratch": str(tmp_path / "scratch"), "platform": "linux/amd64"}
        worker.inspect(where, unpacking)
    worker.remove({"paths": [str(tmp_path / "gone")]}, removing)
    for each in (unpacking, removing):
        each.stop()

    assert unpacking.unpacked > noise.size
    assert removing.measure() == 301
    assert not (tmp_path / "gone").exists()


def test_a_removal_that_failed_is_tried_again(
    tmp_path: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry.add("team/app", "1", three_layers())
    failures = [DeadlineExceeded("no progress"), Unavailable("the worker died")]

    async def story(images: Images) -> None:
        call = images._workers.call

        async def failing(request: dict[str, Any], *arguments: Any) -> dict[str, Any]:
            if request["verb"] == "remove" and failures:
                raise failures.pop()
            return await call(request, *arguments)

        monkeypatch.setattr(images._workers, "call", failing)
        await images.pull(f"{NAME}:1")
        await images.remove(f"{NAME}:1")
        await until(lambda: not any((tmp_path / "images/trash").iterdir()) and not failures)

    run(settings(tmp_path, registry), story)
    assert caplog.text.count("not removed yet") == 2


def test_pins_made_at_run_time_survive_a_restart_and_go_with_the_image(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("team/app", "1", three_layers())
    where = settings(tmp_path, registry, pinned_images=(f"{NAME}*",))

    async def unpin(images: Images) -> None:
        assert (await images.pull(f"{NAME}:1")).pinned
        assert not (await images.pin(f"{NAME}:1", False)).pinned

    async def again(images: Images) -> None:
        assert not images.resolve(f"{NAME}:1").pinned
        assert (await images.pin(f"{NAME}:1", True)).pinned
        await images.remove(f"{NAME}:1")
        assert (await images.pull(f"{NAME}:1")).pinned

    run(where, unpin)
    run(where, again)


def test_a_bundle_directory_is_loaded_and_pinned_and_what_is_no_image_is_passed_over(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    bundle = tmp_path / "bundle"
    layers.write_oci_layout(bundle / "one", three_layers(), "example.test/bundled:1")
    (bundle / "README").write_text("not an image")

    async def story(images: Images) -> None:
        await images.load_bundle(bundle)
        assert [image.pinned for image in images.list("example.test/bundled:1")] == [True]
        await images.load_bundle(tmp_path / "missing")

    run(settings(tmp_path, registry), story)


def image_of_many_files() -> layers.Built:
    plain = tar([file(f"f{at}", os.urandom(200)) for at in range(3000)])
    return layers.image([plain, *(tar([file(str(at), b"x" * 9000)]) for at in range(5))])


def artifact_of_many_files() -> layers.Built:
    return layers.artifact((f"directory/file-{at}", b"%d" % at) for at in range(300))


@pytest.mark.parametrize("make", [image_of_many_files, artifact_of_many_files])
def test_the_daemons_loop_is_never_busy_for_10_ms_with_a_pull(
    tmp_path: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch, make: Callable[[], layers.Built]
) -> None:
    """Processor time of each step of the loop: waiting for the processor is not of our making.

    Neither is what other tests have left in memory, which a garbage collection would look through: the daemon freezes
    what is there before it serves.
    """
    registry.add("team/app", "1", make())
    steps: list[float] = []
    step = asyncio.events.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        step(handle)
        steps.append(time.thread_time() - began)

    async def story(images: Images) -> None:
        await images.pull(f"{NAME}:1")  # what is imported and warmed up at the first pull is not of the pull
        await images.remove(f"{NAME}:1")
        monkeypatch.setattr(asyncio.events.Handle, "_run", timed)
        gc.collect()
        gc.freeze()
        await images.pull(f"{NAME}:1")
        gc.unfreeze()
        monkeypatch.undo()

    run(settings(tmp_path, registry), story)
    assert len(steps) > 20
    assert max(steps) < 0.010
