"""Has the layers of images as they were unpacked: one that was found damaged is fetched again for the images with it.

What is damaged is layers.py's to find; an image that cannot be made whole is given up.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from cri.image_service import documents
from cri.image_service import reference as references
from cri.image_service.catalog import Catalog
from cri.image_service.layer_request import LayerRequests, WantedLayer
from cri.image_service.layers import Layers
from cri.image_service.progress import Progress
from cri.image_service.reference import Reference
from cri.image_service.snapshots import References
from cri.image_service.sources import Sources
from cri.image_service.stores import Stores
from oci.errors import Error, NotFound, Unavailable


@dataclass(frozen=True, slots=True)
class Damage:
    """A layer that is not as it was unpacked."""

    diff_id: str
    images: tuple[str, ...]
    found: str
    outcome: str = ""  # of the repair, where one was asked for


class Repair:
    """`give_up` takes away one of our images; its layers wait for a next pull."""

    def __init__(
        self,
        catalog: Catalog,
        layers: Layers,
        references: References,
        stores: Stores,
        sources: Sources,
        requests: LayerRequests,
        give_up: Callable[[str], Awaitable[None]],
    ) -> None:
        self._catalog = catalog
        self._layers = layers
        self._references = references
        self._stores = stores
        self._sources = sources
        self._requests = requests
        self._give_up = give_up

    async def ensure(self, layer_id: str) -> None:
        """Has the layer as it was unpacked, if that is in doubt.

        Raises Unavailable where it is damaged and could not be fetched again: images with it are not listed then.
        """
        if not self._layers.is_suspect(layer_id):
            return
        await self._layers.check(layer_id)
        if not self._layers.has(layer_id):
            await self._heal(layer_id)

    async def verify(self, repair: bool) -> AsyncIterator[Damage]:
        """Verifies every layer: tells those found damaged, and with `repair` whether they were healed."""
        for layer_id in self._layers.all():
            if not self._layers.has(layer_id) or layer_id.startswith("implied:"):
                continue
            names = self._names_with(layer_id)
            damage = await self._layers.damage(layer_id)
            if not damage:
                if self._layers.is_suspect(layer_id):
                    await self._layers.clear(layer_id)
                continue
            outcome = await self._repaired(layer_id, damage) if repair else ""
            yield Damage(layer_id, names, damage, outcome)

    async def _repaired(self, layer_id: str, damage: str) -> str:
        """What came of it."""
        if not self._layers.is_ours(layer_id):
            return f"not repaired: it is in an additional store, {self._layers.tree(layer_id).parents[2]}"
        if any(self._references.is_held(image_id) for image_id in self._catalog.images_with(layer_id)):
            return "not repaired: containers run from it"
        try:
            await self._layers.lose(layer_id, damage)
            await self._heal(layer_id)
        except Error as error:
            return f"not repaired: {error}; no longer listed, to be pulled again"
        return "repaired"

    async def _heal(self, layer_id: str) -> None:
        """Fetches a lost layer for the images that have it; those of which nobody has it any more go."""
        troubles = []
        for image_id in self._catalog.images_with(layer_id):
            for name in self._catalog.names(image_id):
                try:
                    layer = await self._wanted(image_id, layer_id, references.parse(name))
                    await self._layers.have_one(layer, Progress(f"repair of {name}"))
                    if self._references.layers_of(image_id) is None:
                        self._references.claim([layer_id])  # an additional store's image needs it from now on
                    return
                except Error as error:
                    troubles.append(str(error))
        for image_id in self._catalog.images_with(layer_id):
            if self._catalog.is_ours(image_id):
                await self._give_up(image_id)
        reason = troubles[0] if troubles else "none of its images has a name to fetch it by"
        raise Unavailable(
            f"layer {layer_id} was damaged by an unclean shutdown and could not be fetched again: {reason}"
        )

    async def _wanted(self, image_id: str, layer_id: str, name: Reference) -> WantedLayer:
        """How to fetch one layer of an image that is here, from where `name` points to."""
        record = await self._stores.image(image_id)
        if record is None or not record.manifest:
            raise NotFound(f"image {image_id} has no manifest that tells its layers' digests")
        content = await documents.content(record, layer_id)
        return self._requests.remote(content, await self._sources.of(name), {})

    def _names_with(self, layer_id: str) -> tuple[str, ...]:
        """The images that have the layer, by name, else by id."""
        return tuple((*self._catalog.names(each), each)[0] for each in self._catalog.images_with(layer_id))
