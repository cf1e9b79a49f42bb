"""Memory of processes, by /proc/PID/smaps_rollup: shared pages count by their share (PSS)."""

from collections.abc import Iterable
from pathlib import Path

from tests.e2e.harness import leftovers
from tests.e2e.harness.leftovers import Owned


def pss_kib(pid: int) -> int:
    return _field(pid, "Pss:")


def rss_kib(pid: int) -> int:
    return _field(pid, "Rss:")


def _field(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise LookupError(f"no {name} in smaps_rollup of {pid}")


def support_of(owned: Owned, spared: Iterable[int] = (), payload: str = "sleep 100000") -> list[int]:
    """Everything that runs for the pods of `owned` but the containers' own processes, which are `payload`."""
    found = leftovers.owned_processes(owned, spared)
    return [each.pid for each in found if each.command != payload]
