"""Project ids of writable layers, by which the file system itself keeps account of what containers have written.

An id is kept where it counts, on the layer's directories: it outlives the daemon, needs no record, and goes with them.
It follows from the container's id, between 2^30 and 2^31. kubelet counts from 1048577, administrators from 1: these do
not meet. One that another layer has, or that has files on the file system already, is passed over.
"""

import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from threading import Lock

from oci.container_spec import ContainerId
from oci.linux import project_quota
from oci.linux.tree import Usage

_log = logging.getLogger(__name__)

FIRST = 1 << 30
COUNT = 1 << 30
_TRIES = 1000


class Projects:
    """Synchronous, from any thread. Nothing happens where the file system keeps no account of projects."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = Lock()
        self._taken: dict[ContainerId, int] = {}
        self.is_accounted = False

    def prepare(self) -> None:
        """Find out whether there is an account, and which ids are taken. Once, before the first layer."""
        self.is_accounted = project_quota.usage(self._root, 0) is not None
        if not self.is_accounted:
            return
        for directory in self._root.iterdir():
            with suppress(OSError):
                if project := project_quota.project_of(directory / "upper"):
                    self._taken[ContainerId(directory.name)] = project

    def give(self, id: ContainerId, directories: Iterable[Path]) -> None:
        """Give a container's directories, which are empty, an id of their own.

        All of them have the same: the kernel moves no file from one project to another, as overlayfs does from its work
        directory. Where that fails the layer goes without, and a line is logged.
        """
        if not self.is_accounted:
            return
        try:
            project = self._allocate(id)
            for directory in directories:
                project_quota.give(directory, project)
        except OSError as error:
            self.release(id)
            _log.warning("what container %s writes is counted by walking: no project id: %s", id, error)

    def release(self, id: ContainerId) -> None:
        """The layer is gone: its id may be another's."""
        with self._lock:
            self._taken.pop(id, None)

    def usage(self, id: ContainerId) -> Usage | None:
        """What the layer takes, asked of the file system; None where that does not know."""
        project = self._taken.get(id)
        return None if project is None else project_quota.usage(self._root, project)

    def _allocate(self, id: ContainerId) -> int:
        with self._lock:
            taken = set(self._taken.values())
            for offset in range(_TRIES):
                project = FIRST + (int(id[:8], 16) + offset) % COUNT
                if project not in taken and project_quota.usage(self._root, project) == Usage(0, 0):
                    self._taken[id] = project
                    return project
        raise OSError(0, f"{_TRIES} ids from {FIRST + int(id[:8], 16) % COUNT} on are all in use", str(self._root))
