"""What is known of images and their names, in memory: ours, else an additional store's.

Answers look-ups and takes in changes that are on record already; without I/O, and without knowing where layers lie.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from cri.image_service import reference as references
from cri.image_service.additional import AdditionalImage, AdditionalStores
from cri.image_service.contents import Artifact, Described, described_by
from cri.image_service.reference import Reference
from cri.image_service.snapshots import References
from cri.image_service.store import Contents, ImageRecord, Name
from oci.errors import FailedPrecondition, InvalidArgument, NotFound
from oci.image import ImageConfig

_ID_PREFIX_LENGTH = 4


@dataclass(frozen=True, slots=True)
class Image:
    id: str  # "sha256:<digest of the config>"; of the manifest, for artifacts and encrypted images
    repo_tags: tuple[str, ...]
    repo_digests: tuple[str, ...]
    size_bytes: int
    config: ImageConfig
    pinned: bool = False
    manifest_digest: str = ""
    pulled_at: int = 0  # ns since the epoch
    artifact: Artifact | None = None  # None: it is a container image
    store: Path | None = None  # the additional store that alone has it; None: ours

    @property
    def uid(self) -> int | None:
        """The numeric user of the config; None where it is a name or not set."""
        user = self.config.user.partition(":")[0]
        return int(user) if user.isdecimal() and user.isascii() else None

    @property
    def username(self) -> str:
        user = self.config.user.partition(":")[0]
        return "" if self.uid is not None else user


class Catalog:
    """`references` hears of every change of what images need; `has_layer` tells whether a layer is here;
    `meanings` the full names that a short one may stand for.
    """

    def __init__(
        self,
        additional: AdditionalStores,
        references: References,
        pinned_images: Sequence[str],
        has_layer: Callable[[str], bool],
        meanings: Callable[[Reference], tuple[Reference, ...]],
    ) -> None:
        self._additional = additional
        self._references = references
        self._pinned_images = pinned_images
        self._has_layer = has_layer
        self._meanings = meanings
        self._images: dict[str, Image] = {}
        self._names: dict[str, Name] = {}
        self._pins: dict[str, bool] = {}

    # ---- by a reference

    def list(self) -> tuple[Image, ...]:
        """All images that are whole."""
        return tuple(image for image in self._all() if self._is_whole(image))

    def find(self, reference: str) -> Image | None:
        """The image with this id (or a unique prefix of it), tag or digest; None also for what is no reference."""
        found = self.find_any(reference)
        return found if found is not None and self._is_whole(found) else None

    def resolve(self, reference: str) -> Image:
        """As `find`; raises NotFound."""
        found = self.find(reference)
        if found is None:
            raise NotFound(f"image {reference} is not on this node")
        return found

    def find_any(self, reference: str) -> Image | None:
        """As `find`, also of an image that lacks a layer."""
        if references.is_image_id(reference):
            return self.image(f"sha256:{reference.removeprefix('sha256:')}")
        if (known := self.image(reference)) is not None:
            return known
        try:
            parsed = references.with_default_tag(references.parse(reference))
        except InvalidArgument:
            return self._by_id_prefix(reference)
        for candidate in self._meanings(parsed):
            name = self._name(f"{candidate.name}@{candidate.digest}" if candidate.digest else candidate.tagged)
            if name is not None:
                return self.image(name.image_id)
            if candidate.digest and (found := self._by_manifest(candidate)) is not None:
                return found
        return self._by_id_prefix(reference)

    def names_asked_for(self, reference: str, image: Image) -> tuple[str, ...]:
        """The name that `reference` is, in full; where it is an id, all tags, or digests where there is no tag."""
        with contextlib.suppress(InvalidArgument):
            for candidate in self._meanings(references.with_default_tag(references.parse(reference))):
                if candidate.tagged in image.repo_tags and not candidate.digest:
                    return (candidate.tagged,)
                if candidate.digest and (name := f"{candidate.name}@{candidate.digest}") in image.repo_digests:
                    return (name,)
        return image.repo_tags or image.repo_digests

    # ---- by an id

    def image(self, image_id: str) -> Image | None:
        """Also one that lacks a layer."""
        if image_id in self._images:
            return self._images[image_id]
        return self._shared(image_id) if image_id in self._additional.images else None

    def is_ours(self, image_id: str) -> bool:
        """Whether our store has the image, under a name or not, and nobody has removed it."""
        return image_id in self._images

    def stack(self, image_id: str) -> tuple[str, ...]:
        """The image's layers, lowest first, also of one that was removed while a container held it.

        Raises NotFound.
        """
        found = self.find_stack(image_id)
        if found is None:
            raise NotFound(f"image {image_id} is not on this node")
        return found

    def find_stack(self, image_id: str) -> tuple[str, ...] | None:
        """As `stack`; None where there is no such image."""
        layers = self._references.layers_of(image_id)
        if layers is not None:
            return layers
        found = self._additional.images.get(image_id)
        return None if found is None else found.layers

    def names(self, image_id: str) -> tuple[str, ...]:
        """By digest, then by tag."""
        image = self.image(image_id)
        return () if image is None else (*image.repo_digests, *image.repo_tags)

    def removed(self) -> tuple[str, ...]:
        """Images that were removed and have not been forgotten."""
        return tuple(image_id for image_id in self._references.images() if image_id not in self._images)

    def images_with(self, layer_id: str) -> tuple[str, ...]:
        """The images that have the layer, also removed ones."""
        known = dict.fromkeys((*self._references.images(), *self._additional.images))
        return tuple(image_id for image_id in known if layer_id in (self.find_stack(image_id) or ()))

    # ---- changes, which are on record

    def take(self, contents: Contents) -> None:
        """What the store has at the start."""
        self._pins = dict(contents.pins)
        self._names = {name.name: name for name in contents.names}
        for record in contents.images:
            self._references.set_image(record.id, record.layers)
            if not record.removed:
                self._images[record.id] = self._own(record, described_by(record))

    def publish(self, record: ImageRecord, described: Described, names: Sequence[Name]) -> Image:
        """The image is here, and has `names`, whatever they pointed to before."""
        moved_from = {known.image_id for name in names if (known := self._name(name.name)) is not None}
        for name in names:
            self._names[name.name] = name
        self._references.set_image(record.id, record.layers)
        self._images[record.id] = self._own(record, described)
        for image_id in moved_from - {record.id}:
            self._rename(image_id)
        return self._images[record.id]

    def pin(self, image_id: str, pinned: bool) -> Image:
        """Our image is pinned, or not, whatever its names say."""
        self._pins[image_id] = pinned
        self._images[image_id] = self._renamed(self._images[image_id])
        return self._images[image_id]

    def remove(self, image_id: str) -> None:
        """Our image is not found any more; its layers are known until it is forgotten."""
        del self._images[image_id]
        for name in [name for name in self._names.values() if name.image_id == image_id]:
            del self._names[name.name]
            if (shared := self._name(name.name)) is not None:
                self._rename(shared.image_id)

    def forget(self, image_id: str) -> tuple[str, ...]:
        """A removed image is no more; the layers that it has needed."""
        return self._references.drop_image(image_id)

    # ---- ours, else an additional store's

    def _all(self) -> Iterator[Image]:
        yield from self._images.values()
        for image_id in self._additional.images:
            if image_id not in self._images:
                yield self._shared(image_id)

    def _own(self, record: ImageRecord, described: Described) -> Image:
        return self._renamed(_unnamed(record, described.config, described.artifact))

    def _shared(self, image_id: str) -> Image:
        """An additional store's image, with the names that no image of ours has; pinned, so that kubelet leaves it."""
        found = self._additional.images[image_id]
        return self._renamed(_unnamed(found, found.config, found.artifact, found.store))

    def _rename(self, image_id: str) -> None:
        """Our image is called as the names say that point to it now."""
        if image_id in self._images:
            self._images[image_id] = self._renamed(self._images[image_id])

    def _renamed(self, image: Image) -> Image:
        """`image` with the names that point to it now."""
        names = [name for name in self._names.values() if name.image_id == image.id]
        shared = [name for name in self._additional.names.values() if name.image_id == image.id]
        names += [name for name in shared if name.name not in self._names]
        tags = tuple(name.name for name in names if not name.is_digest)
        digests = tuple(name.name for name in names if name.is_digest)
        return replace(
            image,
            repo_tags=tags,
            repo_digests=digests,
            pinned=image.store is not None or self._pins.get(image.id, self._is_pinned((*tags, *digests))),
        )

    def _is_pinned(self, names: tuple[str, ...]) -> bool:
        return any(fnmatchcase(name, pattern) for name in names for pattern in self._pinned_images)

    def _is_whole(self, image: Image) -> bool:
        """Whether all its layers are here: one that was found damaged is not until it has been fetched again."""
        return all(self._has_layer(layer_id) for layer_id in self.find_stack(image.id) or ())

    def _name(self, name: str) -> Name | None:
        return self._names.get(name) or self._additional.names.get(name)

    def _by_id_prefix(self, text: str) -> Image | None:
        prefix = "sha256:" + text.removeprefix("sha256:")
        if len(prefix) < len("sha256:") + _ID_PREFIX_LENGTH:
            return None
        found = [image for image in self._all() if image.id.startswith(prefix)]
        return found[0] if len(found) == 1 else None

    def _by_manifest(self, wanted: Reference) -> Image | None:
        """The image whose own manifest has the digest, where it was pulled through an index of the same repository."""
        for image in self._all():
            if image.manifest_digest == wanted.digest:
                names = (*image.repo_tags, *image.repo_digests)
                if any(name.startswith((f"{wanted.name}:", f"{wanted.name}@")) for name in names):
                    return image
        return None


def our_own(image: Image) -> Image:
    """`image`, which is to be changed. Raises FailedPrecondition where only an additional store has it."""
    if image.store is not None:
        raise FailedPrecondition(f"image {image.id} is in the additional store {image.store}, which is read-only")
    return image


def _unnamed(
    found: ImageRecord | AdditionalImage, config: ImageConfig, artifact: Artifact | None, store: Path | None = None
) -> Image:
    return Image(
        id=found.id,
        repo_tags=(),
        repo_digests=(),
        size_bytes=found.size_bytes,
        config=config,
        manifest_digest=found.manifest_digest,
        pulled_at=found.pulled_at,
        artifact=artifact,
        store=store,
    )
