"""Runtime handlers: the OCI runtimes by the names that RuntimeClasses give them, with what each can and may do."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from oci.errors import InvalidArgument, Unavailable
from oci.runtime import Runtime
from oci.spec import RuntimeFeatures


@dataclass(frozen=True, slots=True)
class Handler:
    """One configured handler; its name is never ""."""

    name: str
    runtime: Runtime
    features: RuntimeFeatures
    allowed_annotations: tuple[str, ...] = ()  # names, or prefixes that end in *
    privileged_without_host_devices: bool = False
    monitor_cgroup_procs: tuple[str, ...] = ()  # files that a monitor writes its pid into
    default_annotations: Mapping[str, str] = field(default_factory=dict)
    create_timeout_s: float = 0.0  # of the runtime's create and start; 0 is what holds for all handlers
    seccomp: Mapping[str, Any] | None = None  # the profile RuntimeDefault; None is what holds for all handlers

    def annotations(self, asked: Mapping[str, str]) -> dict[str, str]:
        """What the OCI runtime sees: the handler's own, over them those of pod and container that it may see."""
        return {**self.default_annotations, **{name: value for name, value in asked.items() if self._allows(name)}}

    def _allows(self, name: str) -> bool:
        return any(
            name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
            for pattern in self.allowed_annotations
        )


class Handlers:
    """`unusable` are those that are configured but did not answer, with what was seen."""

    def __init__(self, handlers: Iterable[Handler], default: str, unusable: Mapping[str, str] | None = None) -> None:
        self._by_name = {handler.name: handler for handler in handlers}
        self._unusable = unusable or {}
        self.default = default

    def all(self) -> list[Handler]:
        return sorted(self._by_name.values(), key=lambda handler: handler.name)

    def find(self, name: str) -> Handler | None:
        return self._by_name.get(name or self.default)

    def resolve(self, name: str) -> Handler:
        """The handler of this name; "" is the default one.

        Raises InvalidArgument for one that is not configured, Unavailable for one that did not answer at the start.
        """
        handler = self.find(name)
        if handler is None:
            if why := self._unusable.get(name):
                raise Unavailable(f"runtime_handler: {name!r} did not answer when the daemon started: {why}")
            known = ", ".join(sorted(self._by_name)) or "none"
            raise InvalidArgument(f"runtime_handler: {name or self.default!r} is not configured (configured: {known})")
        return handler
