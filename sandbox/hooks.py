"""Where others take part in a pod sandbox's life without its story knowing them: when they are called."""

from typing import Protocol

from oci.container_spec import Resources
from sandbox.sandbox import Sandbox


class SandboxHooks(Protocol):
    """What is called around each step. `running` and `updating` may raise an Error, which refuses the step."""

    async def running(self, sandbox: Sandbox) -> None:
        """All of the pod is made, its network too; it is not shown yet."""

    async def discarded(self, sandbox: Sandbox) -> None:
        """Its making has failed, with or without `running`; nothing of it is left but its record."""

    async def updating(self, sandbox: Sandbox, overhead: Resources, resources: Resources) -> None: ...

    async def updated(self, sandbox: Sandbox) -> None: ...

    async def stopping(self, sandbox: Sandbox) -> None:
        """Its containers have ended; its network and namespaces are still there. May come again after a failed stop."""

    async def removing(self, sandbox: Sandbox) -> None:
        """It was stopped and its containers are gone; its files and its record go next."""


class NoSandboxHooks:
    """Nobody takes part."""

    async def running(self, sandbox: Sandbox) -> None: ...

    async def discarded(self, sandbox: Sandbox) -> None: ...

    async def updating(self, sandbox: Sandbox, overhead: Resources, resources: Resources) -> None: ...

    async def updated(self, sandbox: Sandbox) -> None: ...

    async def stopping(self, sandbox: Sandbox) -> None: ...

    async def removing(self, sandbox: Sandbox) -> None: ...
