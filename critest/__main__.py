"""Runs the upstream conformance suite (critest from PATH) against a daemon of its own, and tells how it went.

The suite's images come, by mirror rules, from a registry that has them under upstream's names (`--registry HOST:PORT`).
Which specs are left out, and why, is in `skips.toml` beside this file.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.harness.daemon import Daemon
from tests.e2e.harness.ports import listens
from tests.e2e.harness.registry import Registry
from tests.hugetlb import hugetlb_hierarchy

SKIPS = Path(__file__).with_name("skips.toml")
UPSTREAM = ("registry.k8s.io", "k8s.gcr.io", "gcr.io", "docker.io", "quay.io")
DIGEST_IMAGE = "k8s-staging-cri-tools/test-image-digest"
DIGEST_IN_SUITE = re.compile(rb"(?<=test-image-digest@sha256:)[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Spec:
    name: str
    state: str  # ginkgo's: passed, failed, skipped, pending, panicked, interrupted, timedout
    seconds: float
    message: str


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if missing := _missing(arguments.registry):
        print(f"critest: not run: {missing}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="critest-", ignore_cleanup_errors=True) as folder, hugetlb_hierarchy():
        home = Path(folder)
        home.chmod(0o711)  # as /run and /var/lib: roots of user namespaces pass through
        daemon = Daemon(home / "d", _settings(arguments.handler, home))
        try:
            daemon.registries_conf.write_text(_mirrors(arguments.registry))
            daemon.start()
            specs = _run(daemon, home, arguments)
        finally:
            if arguments.keep_log:
                shutil.copy(daemon.log, arguments.keep_log)
            daemon.destroy()
    return _report(specs, arguments.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="critest", description=__doc__)
    parser.add_argument(
        "--registry", default=os.environ.get("CRITEST_REGISTRY", "127.0.0.1:5000"), help="HOST:PORT of the images"
    )
    parser.add_argument("--handler", default="", help="runtime handler; empty takes the daemon's default")
    parser.add_argument("--parallel", type=int, default=4, help="processes of the suite (needs ginkgo in PATH)")
    parser.add_argument("--focus", default="", help="run only the specs whose name matches")
    parser.add_argument("--json", type=Path, help="also write the result there")
    parser.add_argument("--keep-log", type=Path, help="copy the daemon's log there")
    parser.add_argument("--verbose", action="store_true", help="show what the suite prints")
    return parser


def _missing(registry: str) -> str:
    if os.geteuid() != 0:
        return "needs root"
    for program in ("critest", "crun") if shutil.which("crun") else ("critest", "runc"):
        if not shutil.which(program):
            return f"{program} is not in PATH"
    host, _, port = registry.rpartition(":")
    if host != "127.0.0.1" or not port.isdigit() or not listens(int(port)):
        return f"no registry with the suite's images at {registry}"
    return ""


def _settings(handler: str, home: Path) -> dict[str, Any]:
    nri = {"nri": {"enable": True, "plugin_path": home / "no-plugins"}}
    return {"runtime": {"default_handler": handler}, **nri} if handler else nri


def _mirrors(registry: str) -> str:
    return "\n".join(
        f'[[registry]]\nlocation = "{name}"\ninsecure = true\n'
        f'[[registry.mirror]]\nlocation = "{registry}"\ninsecure = true\n'
        for name in UPSTREAM
    )


def _run(daemon: Daemon, home: Path, arguments: argparse.Namespace) -> list[Spec]:
    report = home / "report.json"
    endpoint = f"unix://{daemon.socket}"
    parallel = arguments.parallel if shutil.which("ginkgo") else 1
    command = [
        str(_suite_for(arguments.registry, home)),
        f"--runtime-endpoint={endpoint}",
        f"--image-endpoint={endpoint}",
        f"--nri-socket={daemon.run_dir / 'nri.sock'}",
        *([f"--parallel={parallel}"] if parallel > 1 else []),  # ginkgo refuses 1
        f"--ginkgo.json-report={report}",
        "--ginkgo.no-color",
        *(f"--ginkgo.skip={re.escape(each['spec'])}" for each in skips()),
    ]
    if arguments.focus:
        command.append(f"--ginkgo.focus={arguments.focus}")
    output = None if arguments.verbose else (home / "output").open("wb")
    subprocess.run(command, cwd=home, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False)
    if not report.exists():
        raise RuntimeError(f"critest wrote no report:\n{(home / 'output').read_text()[-3000:]}")
    return [spec for suite in json.loads(report.read_text()) for spec in _specs(suite)]


def skips() -> list[dict[str, str]]:
    found: list[dict[str, str]] = tomllib.loads(SKIPS.read_text()).get("skip", [])
    return found


def _suite_for(registry: str, home: Path) -> Path:
    """A copy of critest that asks for the digest which `registry` has: upstream's is written into the program."""
    program = Path(shutil.which("critest") or "")
    digest = Registry(int(registry.rpartition(":")[2])).digest_of(DIGEST_IMAGE, "latest").removeprefix("sha256:")
    copy = home / "critest"
    copy.write_bytes(DIGEST_IN_SUITE.sub(digest.encode(), program.read_bytes()))
    copy.chmod(0o755)
    return copy


def _specs(suite: dict[str, Any]) -> list[Spec]:
    return [
        Spec(
            " ".join([*(each["ContainerHierarchyTexts"] or []), each["LeafNodeText"]]),
            each["State"],
            each["RunTime"] / 1e9,
            (each.get("Failure") or {}).get("Message", ""),
        )
        for each in suite["SpecReports"] or []
        if each["LeafNodeType"] == "It"
    ]


def _report(specs: list[Spec], target: Path | None) -> int:
    failed = [spec for spec in specs if spec.state not in ("passed", "skipped", "pending")]
    for spec in sorted(specs, key=lambda spec: (spec.state, spec.name)):
        if spec.state == "passed" or spec in failed or spec.message:
            print(f"{spec.state:8} {spec.seconds:6.1f} s  {spec.name}")
        if spec.message:
            print("\n".join(f"           {line}" for line in spec.message.strip().splitlines()[:8]))
    for each in skips():
        print(f"left out            {each['spec']}: {each['reason']}")
    counted = Counter(spec.state for spec in specs)
    print(", ".join(f"{number} {state}" for state, number in sorted(counted.items())))
    if target is not None:
        target.write_text(
            json.dumps([{"name": s.name, "state": s.state, "seconds": s.seconds} for s in specs], indent=1)
        )
    return 1 if failed or not counted["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
