"""The OCI runtime of a configured handler, as both the daemon and `crito check` run it."""

from pathlib import Path

from cri.config import RuntimeHandler
from oci.linux import cgroup
from oci.runtime import Runtime


def runtime_of(name: str, settings: RuntimeHandler, root: Path, driver: cgroup.Driver) -> Runtime:
    create_options = ("--no-pivot",) if settings.no_pivot else ()
    return Runtime(
        name,
        settings.path,
        root,
        driver,
        arguments=settings.runtime_args,
        create_options=create_options,
        makes_sandboxes=settings.sandbox_by_runtime,
    )
