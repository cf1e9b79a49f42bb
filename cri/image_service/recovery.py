"""What a start makes of the store that the last daemon has left: what is whole is taken over, the rest goes."""

import logging

from cri.image_service.additional import AdditionalStores
from cri.image_service.contents import described_by
from cri.image_service.snapshots import LayerDirectory
from cri.image_service.store import Contents, ImageRecord, Store
from cri.image_service.unpack import sync_filesystem
from oci.errors import Error

log = logging.getLogger(__name__)


def recover(store: Store, directory: LayerDirectory, additional: AdditionalStores, boot_id: str) -> Contents:
    """What is whole: layers with record and directory, images with all their layers. Synchronous.

    An image whose layers may be in an additional store that cannot be used now stays on record, unlisted.
    """
    unended = directory.unended()
    if unended is not None and unended != boot_id:
        log.warning("the last daemon ended with the machine: image layers are verified before they are used")
        store.suspect_all()
    directory.begin(boot_id)  # not before the suspects are on record: a start that is cut short here must not lose them
    if unended == boot_id:
        for temporary, unpacked in directory.unpacked():  # whole in memory: a killed daemon takes nothing of that along
            sync_filesystem(temporary)
            directory.commit(temporary, unpacked.diff_id)
            store.add_layer(unpacked)
    contents = store.load()
    layers = [layer for layer in contents.layers if directory.path(layer.diff_id).is_dir()]
    known = {layer.diff_id for layer in layers}
    if lost := [layer.diff_id for layer in contents.layers if layer.diff_id not in known]:
        store.remove_layers(lost)
    images = []
    for image in contents.images:
        missing = [diff_id for diff_id in image.layers if diff_id not in known and additional.layer(diff_id) is None]
        may_return = additional.troubles and not set(missing).intersection(lost)
        if (not missing or may_return) and _is_readable(image):
            images.append(image)
        else:
            log.error("image %s lacks a layer or has a broken config; it must be pulled again", image.id)
            store.remove_image(image.id)
    directory.sweep(known)
    ids = {image.id for image in images}
    names = tuple(name for name in contents.names if name.image_id in ids)
    return Contents(tuple(layers), tuple(images), names, contents.suspects & known, contents.pins)


def _is_readable(image: ImageRecord) -> bool:
    try:
        described_by(image)
    except Error:
        return False
    return True
