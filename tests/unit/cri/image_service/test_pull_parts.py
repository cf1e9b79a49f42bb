"""The small parts of a pull: slots, one sync for many, a shared rate, and what is shown of it all."""

import asyncio
import time
from pathlib import Path

import pytest

from cri.cli_images import pulls_text
from cri.config_kinds import REGISTRY_LIMITS, RegistryLimit
from cri.image_service.group_sync import GroupSync
from cri.image_service.layer_files import FileList, find_damage
from cri.image_service.limits import Slots
from cri.image_service.pace import Pace
from cri.image_service.progress import LayerProgress
from cri.node_messages import LayerStatus, Progress, PullStatus


def test_layers_that_are_unpacked_together_are_synced_once() -> None:
    syncs = []

    async def sync() -> None:
        syncs.append(1)

    async def story() -> None:
        group = GroupSync(sync)
        async with group.unpacking():
            first = asyncio.create_task(group.synced())
            second = asyncio.create_task(group.synced())
            await asyncio.sleep(0.05)
            assert syncs == []
        await asyncio.gather(first, second)
        assert len(syncs) == 1
        await group.synced()  # what came later needs a sync of its own
        assert len(syncs) == 2

    asyncio.run(story())


def test_a_failed_sync_fails_all_that_waited_for_it_and_no_later_one() -> None:
    results = [OSError("disk"), None]

    async def sync() -> None:
        if error := results.pop(0):
            raise error

    async def story() -> None:
        group = GroupSync(sync)
        failed = await asyncio.gather(group.synced(), group.synced(), return_exceptions=True)
        assert [type(each) for each in failed] == [OSError, OSError]
        await group.synced()

    asyncio.run(story())


def test_a_waiter_that_gives_up_leaves_its_slot_to_the_next() -> None:
    async def story() -> None:
        slots = Slots(1, {})
        layers = [LayerProgress(str(at), "", 1) for at in range(3)]
        async with slots.taken("a", layers[0]):
            waiters = [asyncio.create_task(take(slots, layer)) for layer in layers[1:]]
            await asyncio.sleep(0)
            assert [layer.queue_position for layer in layers] == [0, 1, 2]
            waiters[0].cancel()
            await asyncio.wait([waiters[0]])
            assert layers[2].queue_position == 1
        await waiters[1]
        assert slots.waiting == 0

    asyncio.run(story())


async def take(slots: Slots, layer: LayerProgress) -> None:
    async with slots.taken("a", layer):
        pass


def test_all_who_share_a_pace_are_held_to_it_together(tmp_path: Path) -> None:
    paces = [Pace(tmp_path / "pace", 100_000), Pace(tmp_path / "pace", 100_000)]
    began = time.monotonic()
    for _ in range(5):
        for pace in paces:
            pace.wait(10_000)

    assert 0.5 < time.monotonic() - began < 5


def test_a_list_that_was_not_finished_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "diff").mkdir()
    with pytest.raises(KeyError), FileList(tmp_path) as files:
        files.directory(b"d")
        raise KeyError

    assert find_damage(tmp_path, lambda _: None) == "the list of its files is damaged"


def test_limits_of_registries_are_read_and_written_alike() -> None:
    limits = REGISTRY_LIMITS.parse(["a.test:5000 layers=2 rate=10MiB", "b.test rate=5B"])

    assert limits == (RegistryLimit("a.test:5000", 2, 10 << 20), RegistryLimit("b.test", 0, 5))
    assert REGISTRY_LIMITS.parse([str(each) for each in limits]) == limits
    for wrong in ("a.test", "a.test layers=x", "", "a.test rate=5 layers=2"):
        with pytest.raises(ValueError):
            REGISTRY_LIMITS.parse([wrong])


def test_pulls_are_shown_with_their_layers_and_the_time_left() -> None:
    layer = LayerStatus("sha256:0123456789abcdef", "queued", 2, 0, 5_000_000, 0)
    pull = PullStatus("a.test/b:1", 2.0, Progress("fetching", 1, 3, 10**6, 10**7, 0), 500_000.0, 18.0, (layer,))

    assert pulls_text([pull]).splitlines() == [
        "a.test/b:1  fetching, 1/3 layers, 1 MB of 10 MB, 500 kB/s, 18 s left",
        "  0123456789ab  queued (number 2)  0 B of 5 MB, 0 B unpacked",
    ]
    assert pulls_text([]) == "nothing is being pulled"
