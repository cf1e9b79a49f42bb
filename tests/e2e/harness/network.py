"""A CNI network of one daemon's own: a bridge whose name and subnet nothing else on the machine uses."""

import json
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLUGIN_DIRS = (Path("/opt/cni/bin"), Path("/usr/lib/cni"), Path("/usr/libexec/cni"))


def missing_plugins() -> list[str]:
    wanted = ("bridge", "host-local", "portmap")
    return [name for name in wanted if not any((folder / name).exists() for folder in PLUGIN_DIRS)]


@dataclass(frozen=True, slots=True)
class BridgeNetwork:
    """`bridge` is made by the first pod; `leases` holds one file for each address in use."""

    bridge: str
    subnet: str
    leases: Path

    @classmethod
    def choose(cls, directory: Path) -> "BridgeNetwork":
        routes = subprocess.run(["ip", "-4", "route"], check=True, capture_output=True, text=True).stdout
        while True:
            second, third = random.randint(200, 253), random.randint(0, 255)
            prefix = f"10.{second}.{third}."
            if prefix not in routes:
                return cls(f"ce{second:02x}{third:02x}{random.randrange(1 << 16):04x}", f"{prefix}0/24", directory)

    @property
    def gateway(self) -> str:
        """The host's address on the bridge."""
        return self.subnet.removesuffix("0/24") + "1"

    def conflist(self) -> dict[str, Any]:
        ipam = {
            "type": "host-local",
            "dataDir": str(self.leases),
            "ranges": [[{"subnet": self.subnet}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        return {
            "cniVersion": "1.0.0",
            "name": self.bridge,
            "plugins": [
                {"type": "bridge", "bridge": self.bridge, "isGateway": True, "hairpinMode": True, "ipam": ipam},
                {"type": "portmap", "capabilities": {"portMappings": True}},
            ],
        }

    def write(self, conf_dir: Path) -> None:
        conf_dir.mkdir(parents=True, exist_ok=True)
        (conf_dir / "10-bridge.conflist").write_text(json.dumps(self.conflist(), indent=1))

    def leased(self) -> list[str]:
        """The addresses that are in use by host-local's books."""
        folder = self.leases / self.bridge
        return sorted(each.name for each in folder.glob("*.*.*.*")) if folder.is_dir() else []

    def ports(self) -> list[str]:
        """The links that are plugged into the bridge."""
        folder = Path("/sys/class/net") / self.bridge / "brif"
        return sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []

    def remove(self) -> None:
        if (Path("/sys/class/net") / self.bridge).exists():
            subprocess.run(["ip", "link", "delete", self.bridge], check=True)
