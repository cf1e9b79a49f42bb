"""Where others take part in a container's life without its story knowing them: when they are called, and why."""

from dataclasses import dataclass
from typing import Any, Protocol

from oci.container import Container
from oci.container_spec import Resources


@dataclass(frozen=True, slots=True)
class Adjusted:
    """A runtime-spec as the hooks leave it, and the limits in it that they have set."""

    config: dict[str, Any]
    limits: Resources = Resources()


class ContainerHooks(Protocol):
    """What is called around each step; nothing here is held while a container's lock is, and nothing may hang.

    `creating`, `starting` and `updating` may raise an Error, which refuses the step; the others never raise.
    """

    async def creating(self, container: Container, config: dict[str, Any]) -> Adjusted:
        """Before the OCI runtime sees the bundle; the container is not shown yet."""

    async def created(self, container: Container) -> None: ...

    async def discarded(self, container: Container) -> None:
        """Its creation has failed, with or without `creating`; nothing of it is left but its record."""

    async def starting(self, container: Container) -> None: ...

    async def started(self, container: Container) -> None: ...

    async def updating(self, container: Container, changes: Resources) -> Resources:
        """Before limits change; those that come back are set instead."""

    async def updated(self, container: Container) -> None: ...

    async def stopped(self, container: Container) -> None:
        """It has ended, by itself or not; once for each container."""

    async def removing(self, container: Container) -> None:
        """It has ended and been released; its files and its record go next."""


class NoContainerHooks:
    """Nobody takes part."""

    async def creating(self, container: Container, config: dict[str, Any]) -> Adjusted:
        return Adjusted(config)

    async def created(self, container: Container) -> None: ...

    async def discarded(self, container: Container) -> None: ...

    async def starting(self, container: Container) -> None: ...

    async def started(self, container: Container) -> None: ...

    async def updating(self, container: Container, changes: Resources) -> Resources:
        return changes

    async def updated(self, container: Container) -> None: ...

    async def stopped(self, container: Container) -> None: ...

    async def removing(self, container: Container) -> None: ...
