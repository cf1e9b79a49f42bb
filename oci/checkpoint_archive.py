"""Checkpoint archives as the daemon sees them: what one says of its container, and the worker that moves the bytes."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oci import checkpoint_worker as worker
from oci.errors import DeadlineExceeded, Error, InvalidArgument, NotFound, ResourceExhausted, Unavailable

READ_TIMEOUT_S = 60.0
METADATA = "io.kubernetes.cri-o.Metadata"  # in spec.dump's annotations: {"name": …, "attempt": …}
SHM = "/dev/shm"
_PROGRAM = Path(worker.__file__)
_KINDS: Mapping[str, type[Error]] = {"bad": InvalidArgument, "missing": NotFound, "full": ResourceExhausted}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One container's checkpoint: an archive, or the directory of an image's layer that holds the same."""

    source: Path
    config: Mapping[str, Any]  # config.dump
    spec: Mapping[str, Any]  # spec.dump: the runtime-spec that the container ran with
    must_match: bool = False  # whoever asks for other arguments than the checkpoint's is refused

    @property
    def container_name(self) -> str:
        """As the CRI's metadata had it; "" where another program wrote the archive."""
        try:
            metadata = json.loads((self.spec.get("annotations") or {}).get(METADATA, "{}"))
        except ValueError:
            return ""
        return str(metadata.get("name", "")) if isinstance(metadata, dict) else ""

    @property
    def image_names(self) -> tuple[str, ...]:
        """What the container's image can be called here, the surest first."""
        names = (self.config.get(key) for key in ("rootfsImageRef", "rootfsImage", "rootfsImageName"))
        return tuple(dict.fromkeys(str(name) for name in names if name))

    def applied_to(self, config: dict[str, Any]) -> dict[str, Any]:
        """The runtime-spec of a new container whose process is the checkpoint's.

        Raises InvalidArgument where both do not have the same things mounted, or a terminal.
        """
        process = self.spec.get("process")
        if not isinstance(process, dict):
            raise InvalidArgument(f"checkpoint {self.source}: its spec.dump has no process")
        had, has = _bound(self.spec), _bound(config)
        if missing := sorted(had - has):
            raise InvalidArgument(f"config.mounts: nothing for {', '.join(missing)}, which the checkpoint has mounted")
        if added := sorted(has - had):
            raise InvalidArgument(f"config.mounts: {', '.join(added)} is not mounted in the checkpoint")
        if bool(process.get("terminal")) != bool(config["process"].get("terminal")):
            raise InvalidArgument(f"config.tty: the checkpoint's process has {_terminal(process)}")
        for key in ("args", "cwd", "user") if self.must_match else ():
            if process.get(key) != config["process"].get(key):
                asked = config["process"].get(key)
                raise InvalidArgument(f"process.{key}: asked for {asked!r}, the checkpoint has {process.get(key)!r}")
        score = config["process"].get("oomScoreAdj")
        return {**config, "process": {**process, **({} if score is None else {"oomScoreAdj": score})}}


def _bound(spec: Mapping[str, Any]) -> set[str]:
    return {str(mount.get("destination")) for mount in spec.get("mounts") or () if mount.get("type") == "bind"}


def shared_memory(spec: Mapping[str, Any]) -> dict[str, str]:
    """The pod's /dev/shm, which CRIU leaves out as it comes from outside; the node's own is not the pod's."""
    for mount in spec.get("mounts") or ():
        if mount.get("destination") == SHM and mount.get("type") == "bind" and mount.get("source") != SHM:
            return {SHM: str(mount["source"])}
    return {}


def _terminal(process: Mapping[str, Any]) -> str:
    return "a terminal" if process.get("terminal") else "no terminal"


async def read(source: Path) -> Checkpoint:
    """Raises NotFound where there is nothing, InvalidArgument for what is no checkpoint."""
    found = await call("read", READ_TIMEOUT_S, f"checkpoint {source}", source=str(source))
    return Checkpoint(source, found[worker.CONFIG], found[worker.SPEC])


async def call(verb: str, timeout_s: float, subject: str, **request: Any) -> Any:
    """Let a worker process do it; it is killed when its time is over. Raises the kind of error that it names."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", str(_PROGRAM)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
        cwd="/",
        start_new_session=True,
    )
    given = json.dumps({"verb": verb, **request}).encode()
    try:
        output, errors = await asyncio.wait_for(process.communicate(given), timeout_s)
    except TimeoutError:
        raise DeadlineExceeded(f"{subject}: {verb} did not end within {timeout_s:.1f} s and was ended") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            await process.wait()
    if process.returncode != 0 or not output:
        last = errors.decode(errors="replace").strip().splitlines()[-1:]
        raise Unavailable(f"{subject}: {verb}: the worker ended with {process.returncode}: {' '.join(last)}")
    answer = json.loads(output)
    if "error" in answer:
        raise _KINDS.get(answer["kind"], Error)(f"{subject}: {verb}: {answer['error']}")
    return answer["done"]
