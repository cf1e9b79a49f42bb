"""CNI plugins as shell scripts: they record how they were called and answer as told."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULT = {
    "cniVersion": "1.0.0",
    "interfaces": [{"name": "br0"}, {"name": "eth0", "mac": "0a:00:00:00:00:01", "sandbox": "/run/netns/x"}],
    "ips": [{"address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 1}],
}
ANSWER_RESULT = f"echo '{json.dumps(RESULT)}'"


@dataclass(frozen=True)
class Recorded:
    """One call that a fake plugin got."""

    verb: str
    plugin: str
    container_id: str
    netns: str
    ifname: str
    args: str
    path: str
    config: Mapping[str, Any]


def _recorded(line: str) -> Recorded:
    values: dict[str, Any] = dict(zip(Recorded.__dataclass_fields__, line.split("\t"), strict=True))
    return Recorded(**{**values, "config": json.loads(values["config"])})


class FakePlugins:
    """A plugin directory and the record of all calls into it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._log = directory.parent / f"{directory.name}.log"
        directory.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, add: str = ANSWER_RESULT, **verbs: str) -> Path:
        """A plugin whose verbs (lower case) run shell commands after the call is recorded; the default is silence."""
        verbs.setdefault("version", 'echo \'{"supportedVersions": ["0.4.0", "1.0.0"]}\'')
        cases = "".join(f"{verb.upper()})\n{script}\n;;\n" for verb, script in {"add": add, **verbs}.items())
        fields = '"$CNI_COMMAND" "${0##*/}" "$CNI_CONTAINERID" "$CNI_NETNS" "$CNI_IFNAME" "$CNI_ARGS" "$CNI_PATH"'
        return self.write_script(
            name,
            f"stdin=$(cat)\n"
            f"printf '%s\\t%s\\t%s\\t%s\\t%s\\t%s\\t%s\\t%s\\n' {fields} \"$stdin\" >> '{self._log}'\n"
            f'case "$CNI_COMMAND" in\n{cases}esac\n',
        )

    def write_script(self, name: str, script: str) -> Path:
        path = self.directory / name
        new = self.directory.parent / f"{name}.new"
        new.write_text(f"#!/bin/sh\n{script}")
        new.chmod(0o755)
        new.replace(path)
        return path

    @property
    def calls(self) -> list[Recorded]:
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return [_recorded(line) for line in lines]

    @property
    def story(self) -> list[str]:
        """The calls as "VERB plugin"."""
        return [f"{call.verb} {call.plugin}" for call in self.calls]


def write_conflist(conf_dir: Path, *plugins: Mapping[str, Any], name: str = "pods", **keys: Any) -> Path:
    conf_dir.mkdir(parents=True, exist_ok=True)
    path = conf_dir / f"10-{name}.conflist"
    path.write_text(json.dumps({"cniVersion": "1.0.0", "name": name, "plugins": plugins, **keys}))
    return path
