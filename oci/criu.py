"""Whether CRIU works on this host, and where it is: asked once, when the first checkpoint or restore needs it."""

import asyncio
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from oci.errors import FailedPrecondition
from oci.runtime import find

CHECK_TIMEOUT_S = 20.0
LOG_LINES = 3  # of CRIU's own, in an error
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Criu:
    """`path` None looks where programs are."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or find(("criu",)).get("criu")
        self._works = False

    @property
    def environment(self) -> Mapping[str, str]:
        """For the OCI runtime, which runs the first `criu` on its PATH."""
        first = f"{self.path.parent}:" if self.path is not None else ""
        return {"PATH": f"{first}{_PATH}", "LC_ALL": "C"}

    async def require(self) -> None:
        """Raises FailedPrecondition, with CRIU's own words, where it is missing or this kernel is not for it."""
        if self._works:
            return
        if self.path is None:
            raise FailedPrecondition("checkpoint and restore need CRIU, which is not installed on this node")
        if words := await self._complaint():
            raise FailedPrecondition(f"checkpoint and restore need CRIU; `{self.path} check` says: {words}")
        self._works = True

    async def _complaint(self) -> str:
        try:
            process = await asyncio.create_subprocess_exec(
                *(str(self.path), "check"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=self.environment,
                cwd="/",
            )
        except OSError as error:
            return f"cannot be run: {error.strerror}"
        try:
            output, _ = await asyncio.wait_for(process.communicate(), CHECK_TIMEOUT_S)
        except TimeoutError:
            return f"nothing within {CHECK_TIMEOUT_S:g} s"
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, 9)
                await process.wait()
        lines = [line.strip() for line in output.decode(errors="replace").splitlines() if "Error" in line]
        return "" if process.returncode == 0 else "; ".join(lines) or f"exit status {process.returncode}"


def complaints(log: Path) -> str:
    """The last complaints in a log of CRIU's."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return "nothing"
    errors = [line.partition(" ")[2] for line in lines if "Error (" in line]
    return "; ".join(errors[-LOG_LINES:]) or "nothing"
