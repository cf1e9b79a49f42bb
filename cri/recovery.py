"""What a start does with what it finds: records of an earlier daemon, and directories that no record knows."""

import logging
from collections.abc import Iterable
from pathlib import Path

from oci.bundle import Bundles
from oci.container_spec import ContainerId
from oci.containers import Containers
from oci.linux import proc
from oci.pause import remove_pins
from oci.rootfs import Rootfs
from oci.state import Database
from sandbox import files
from sandbox.sandboxes import Sandboxes

_log = logging.getLogger(__name__)

BOOT_ID = "boot_id"  # the fact that tells whether the processes of the records can still be there


async def restore(database: Database, containers: Containers, sandboxes: Sandboxes) -> None:
    """Take over the pods and containers of an earlier daemon. Their states are known on return.

    What was half made or half removed is undone or finished in the background.
    """
    boot_id = proc.boot_id()
    same_boot = database.fact(BOOT_ID) in (None, boot_id)
    if not same_boot:
        _log.warning("the node was rebooted since the last daemon ran: its pods and containers have ended")
    await containers.restore(same_boot)
    await sandboxes.restore(same_boot)
    await database.set_fact(BOOT_ID, boot_id)


def sweep(
    known_containers: Iterable[str],
    known_sandboxes: Iterable[str],
    bundles: Bundles,
    rootfs: Rootfs,
    container_root: Path,
    sandbox_dir: Path,
) -> None:
    """Remove the directories of containers and pods that no record knows.

    A power loss may cost the last records, and with them what they tell; in a pool, before anything new is made.
    """
    known = set(known_containers)
    for id in {*bundles.ids(), *(ContainerId(name) for name in _names(container_root))} - known:
        _log.warning("container %s has no record: removing its directories", id)
        rootfs.remove(id)
        bundles.remove(id)
    for name in set(_names(sandbox_dir)) - set(known_sandboxes):
        _log.warning("pod sandbox %s has no record: removing its directory", name)
        remove_pins(sandbox_dir / name / "ns")
        files.remove(sandbox_dir / name)


def _names(directory: Path) -> list[str]:
    return [entry.name for entry in directory.iterdir() if entry.is_dir()] if directory.is_dir() else []
