"""Runs crictl against a daemon."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("crictl") or ""


class Crictl:
    def __init__(self, socket: Path, directory: Path) -> None:
        self._endpoint = f"unix://{socket}"
        self._config = directory / "crictl.yaml"
        self._config.write_text(f"runtime-endpoint: {self._endpoint}\nimage-endpoint: {self._endpoint}\ntimeout: 60\n")

    def __call__(self, *arguments: str, check: bool = True, timeout_s: float = 120) -> str:
        """What it printed; an error holds what it said on both streams."""
        done = self.run(*arguments, timeout_s=timeout_s)
        if check and done.returncode != 0:
            raise RuntimeError(f"crictl {' '.join(arguments)}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout.strip()

    def run(self, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments))

    def command(self, *arguments: str) -> list[str]:
        return [PROGRAM, "--config", str(self._config), *arguments]
