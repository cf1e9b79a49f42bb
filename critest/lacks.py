"""Which of the suite's specs may be skipped on this host, from `skips.toml` and from what the host really lacks."""

import json
import subprocess
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SKIPS = Path(__file__).with_name("skips.toml")
APPARMOR = Path("/sys/module/apparmor/parameters/enabled")
SELINUX = Path("/sys/fs/selinux/enforce")


@dataclass(frozen=True, slots=True)
class Skip:
    spec: str  # part of the specs' names
    lacks: str  # one of LACKS
    reason: str


def skips(path: Path = SKIPS) -> tuple[Skip, ...]:
    return tuple(Skip(**each) for each in tomllib.loads(path.read_text()).get("skip", []))


def features(runtime: Path) -> Mapping[str, Any]:
    """What `RUNTIME features` tells; nothing where it does not know the command. Source: runtime-spec, features.md."""
    done = subprocess.run([runtime, "features"], stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=30)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and done.returncode == 0 else {}


def _has_no_id_maps(runtime: Mapping[str, Any]) -> bool:
    mounts = runtime.get("linux", {}).get("mountExtensions", {})
    return not mounts.get("idmap", {}).get("enabled")


LACKS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "apparmor": lambda _: not APPARMOR.exists() or APPARMOR.read_text().strip() != "Y",
    "selinux": lambda _: not SELINUX.exists(),
    "recursive read-only mounts": lambda runtime: "rro" not in runtime.get("mountOptions", ()),
    "id-mapped mounts": _has_no_id_maps,
    "benchmarks": lambda _: True,
}


def reason_to_skip(spec: str, runtime: Mapping[str, Any]) -> str:
    """Why `spec` may be skipped here; "" where it may not. `runtime` is what the OCI runtime's `features` told."""
    for skip in skips():
        if skip.spec in spec and LACKS[skip.lacks](runtime):
            return skip.reason
    return ""
