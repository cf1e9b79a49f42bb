"""What is known of images answers by every name they have, and by none that they lost."""

from pathlib import Path

import pytest

from cri.image_service.additional import AdditionalImage, AdditionalStores
from cri.image_service.catalog import Catalog, our_own
from cri.image_service.contents import Described
from cri.image_service.reference import with_registry
from cri.image_service.snapshots import References
from cri.image_service.store import Contents, ImageRecord, Name
from oci.errors import FailedPrecondition, NotFound
from oci.image import ImageConfig

NAME = "example.test/team/app"
ONE, TWO = "sha256:aaaa1" + "0" * 59, "sha256:aaaa2" + "0" * 59
STORE = Path("/baked/images")


class Known:
    """A catalog with the layers "base" and "top" here, and what an image store would do to it."""

    def __init__(self, additional: AdditionalStores | None = None, pinned: tuple[str, ...] = ()) -> None:
        self.layers = {"base", "top"}
        self.references = References()
        self.catalog = Catalog(
            additional or AdditionalStores(),
            self.references,
            pinned,
            lambda layer_id: layer_id in self.layers,
            lambda wanted: (with_registry(wanted, "example.test/team") if wanted.is_short else wanted,),
        )

    def publish(self, image_id: str, *names: str) -> None:
        named = [Name(name, image_id, "@" in name) for name in names]
        self.catalog.publish(record(image_id), Described(ImageConfig(), None), named)


def record(image_id: str, *, removed: bool = False) -> ImageRecord:
    return ImageRecord(image_id, "{}", "", "sha256:" + "d" * 64, "", 100, ("base", "top"), 1, removed)


def baked(image_id: str, *names: str) -> AdditionalStores:
    image = AdditionalImage(STORE, image_id, ImageConfig(), None, "", 100, ("base",), 1)
    return AdditionalStores(images={image_id: image}, names={name: Name(name, image_id, False) for name in names})


def test_an_image_is_found_by_id_prefix_tag_digest_and_short_name() -> None:
    known = Known()
    digest = "sha256:" + "e" * 64
    known.publish(ONE, f"{NAME}:1", f"{NAME}@{digest}")
    spelled = [ONE, ONE.removeprefix("sha256:"), "aaaa1", f"{NAME}:1", f"{NAME}@{digest}", "app:1"]

    assert [image.id if (image := known.catalog.find(each)) else None for each in spelled] == [ONE] * len(spelled)


def test_the_manifest_of_an_index_names_the_image_in_its_own_repository_alone() -> None:
    known = Known()
    known.publish(ONE, f"{NAME}:1")

    assert known.catalog.resolve(f"{NAME}@{record(ONE).manifest_digest}").id == ONE
    assert known.catalog.find(f"example.test/other@{record(ONE).manifest_digest}") is None


@pytest.mark.parametrize("text", ["aaaa", "aaa", "bbbbb", f"{NAME}:2", "no reference"])
def test_what_names_two_images_or_none_finds_none(text: str) -> None:
    known = Known()
    known.publish(ONE, f"{NAME}:1")
    known.publish(TWO)

    assert known.catalog.find(text) is None
    with pytest.raises(NotFound, match=f"image {text} is not on this node"):
        known.catalog.resolve(text)


def test_a_name_that_moves_on_is_taken_from_the_image_that_had_it() -> None:
    known = Known()
    known.publish(ONE, f"{NAME}:1")

    known.publish(TWO, f"{NAME}:1")

    assert known.catalog.resolve(f"{NAME}:1").id == TWO
    assert known.catalog.resolve(ONE).repo_tags == ()


def test_a_removed_image_is_found_by_nothing_but_its_layers_are_known_until_it_is_forgotten() -> None:
    known = Known()
    known.publish(ONE, f"{NAME}:1")

    known.catalog.remove(ONE)

    assert (known.catalog.find(ONE), known.catalog.find(f"{NAME}:1"), known.catalog.list()) == (None, None, ())
    assert known.catalog.removed() == (ONE,)
    assert known.catalog.stack(ONE) == ("base", "top")
    assert known.catalog.images_with("top") == (ONE,)
    assert known.catalog.forget(ONE) == ("base", "top")
    with pytest.raises(NotFound):
        known.catalog.stack(ONE)
    assert known.references.unneeded(["base", "top"]) == ["base", "top"]


def test_an_image_that_lacks_a_layer_is_not_listed_but_can_be_removed() -> None:
    known = Known()
    known.publish(ONE, f"{NAME}:1")

    known.layers.remove("base")

    assert (known.catalog.find(ONE), known.catalog.list()) == (None, ())
    found = known.catalog.find_any(f"{NAME}:1")
    assert found is not None and found.id == ONE


def test_a_pin_counts_more_than_what_the_names_say() -> None:
    known = Known(pinned=("example.test/*",))
    known.publish(ONE, f"{NAME}:1")
    known.publish(TWO)
    assert [image.pinned for image in known.catalog.list()] == [True, False]

    assert known.catalog.pin(ONE, False).pinned is False
    assert known.catalog.pin(TWO, True).pinned is True
    known.publish(ONE, f"{NAME}:2")
    assert known.catalog.resolve(ONE).pinned is False


def test_an_additional_stores_name_is_back_when_the_image_that_had_it_is_removed() -> None:
    known = Known(baked(TWO, f"{NAME}:1"))
    known.publish(ONE, f"{NAME}:1")
    assert (known.catalog.resolve(f"{NAME}:1").id, known.catalog.resolve(TWO).repo_tags) == (ONE, ())

    known.catalog.remove(ONE)

    found = known.catalog.resolve(f"{NAME}:1")
    assert (found.id, found.repo_tags, found.store, found.pinned) == (TWO, (f"{NAME}:1",), STORE, True)
    with pytest.raises(FailedPrecondition, match="is in the additional store /baked/images, which is read-only"):
        our_own(found)


def test_what_the_store_has_at_the_start_is_known_with_its_names_and_pins() -> None:
    known = Known()
    names = (Name(f"{NAME}:1", ONE, False),)

    known.catalog.take(Contents((), (record(ONE), record(TWO, removed=True)), names, pins={ONE: True}))

    image = known.catalog.resolve(f"{NAME}:1")
    assert (image.id, image.repo_tags, image.pinned) == (ONE, (f"{NAME}:1",), True)
    assert known.catalog.removed() == (TWO,)
    assert known.references.unneeded(["base"]) == []
