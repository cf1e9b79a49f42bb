"""Runs the upstream conformance suite (critest from PATH) against daemons of its own, and tells how it went.

A round is one OCI runtime and one protocol of streams; without options there is a round for each runtime that is
installed and each protocol. The suite's images come, by mirror rules, from a registry that has them under upstream's
names: one that runs (`--registry HOST:PORT`), or one that is started here on a directory of its data (`--images DIR`).
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from critest.lacks import features, reason_to_skip
from tests.e2e.harness.daemon import Daemon
from tests.e2e.harness.ports import listens
from tests.e2e.harness.registry import PROGRAM as REGISTRY
from tests.e2e.harness.registry import Registry, running_registry
from tests.hugetlb import hugetlb_hierarchy

RUNTIMES = ("crun", "runc")
STREAMS = {"spdy": (), "websocket": ("-websocket-exec", "-websocket-attach", "-websocket-portforward")}
NEWER = Path(__file__).parent.parent / "tools" / "newer-runtimes"
IMAGES = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "critest-images"
UPSTREAM = ("registry.k8s.io", "k8s.gcr.io", "gcr.io", "docker.io", "quay.io")
DIGEST_IMAGE = "k8s-staging-cri-tools/test-image-digest"
DIGEST_IN_SUITE = re.compile(rb"(?<=test-image-digest@sha256:)[0-9a-f]{64}")
GOOD = ("passed", "skipped")
NOT_RUN = 2


@dataclass(frozen=True, slots=True)
class Spec:
    name: str
    state: str  # ginkgo's: passed, failed, skipped, pending, panicked, interrupted, timedout
    seconds: float
    message: str


@dataclass(frozen=True, slots=True)
class Round:
    handler: str
    runtime: Path
    streams: str  # a key of STREAMS

    @property
    def name(self) -> str:
        return f"{self.handler}-{self.streams}"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    rounds = _rounds(arguments)
    if missing := _missing(arguments, rounds):
        print(f"critest: not run: {missing}", file=sys.stderr)
        return NOT_RUN
    status = 0
    with tempfile.TemporaryDirectory(prefix="critest-", ignore_cleanup_errors=True) as folder, hugetlb_hierarchy():
        home = Path(folder)
        home.chmod(0o711)  # as /run and /var/lib: roots of user namespaces pass through
        with _registry(arguments, home) as registry:
            suite = _suite_for(registry, home)
            for each in rounds:
                specs = _judged(_run(each, suite, registry, home, arguments), features(each.runtime))
                status |= _report(each, specs, arguments.out)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="critest", description=__doc__)
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--registry", default=os.environ.get("CRITEST_REGISTRY", ""), help="HOST:PORT of the images")
    images.add_argument(
        "--images",
        type=Path,
        default=Path(os.environ.get("CRITEST_IMAGES") or IMAGES),
        help="data directory of a docker-registry with the images (default: %(default)s)",
    )
    parser.add_argument("--handler", choices=RUNTIMES, action="append", help="run the suite with this OCI runtime")
    parser.add_argument("--newer", action="store_true", help="take runtimes of a newer suite of Debian")
    parser.add_argument("--streams", choices=STREAMS, action="append", help="protocol of exec, attach, port-forward")
    parser.add_argument("--parallel", type=int, default=2, help="processes of the suite (needs ginkgo in PATH)")
    parser.add_argument("--focus", default="", help="run only the specs whose name matches")
    parser.add_argument("--out", type=Path, help="also write each round's result and the daemon's log there")
    parser.add_argument("--verbose", action="store_true", help="show what the suite prints")
    return parser


def _rounds(arguments: argparse.Namespace) -> list[Round]:
    found = {name: shutil.which(name) for name in arguments.handler or RUNTIMES}
    if arguments.newer:
        newer = subprocess.run([NEWER, "--unpack"], stdout=subprocess.PIPE, check=True, text=True).stdout.strip()
        found = {name: str(Path(newer) / name) for name in found}
    return [
        Round(name, Path(path), streams)
        for name, path in found.items()
        if path
        for streams in arguments.streams or STREAMS
    ]


def _missing(arguments: argparse.Namespace, rounds: Sequence[Round]) -> str:
    if os.geteuid() != 0:
        return "needs root"
    if not shutil.which("critest"):
        return "critest is not in PATH"
    if not rounds:
        return f"no OCI runtime in PATH: {', '.join(arguments.handler or RUNTIMES)}"
    if arguments.registry:
        host, _, port = arguments.registry.rpartition(":")
        is_there = host == "127.0.0.1" and port.isdigit() and listens(int(port))
        return "" if is_there else f"no registry with the suite's images at {arguments.registry}"
    if not (arguments.images / "docker/registry").is_dir():
        return f"{arguments.images} has no images of a docker-registry"
    return "" if REGISTRY else "docker-registry is not in PATH"


@contextmanager
def _registry(arguments: argparse.Namespace, home: Path) -> Iterator[Registry]:
    if arguments.registry:
        yield Registry(int(arguments.registry.rpartition(":")[2]))
        return
    with running_registry(home / "registry", arguments.images) as registry:
        yield registry


def _suite_for(registry: Registry, home: Path) -> Path:
    """A copy of critest that asks for the digest which `registry` has: upstream's is written into the program."""
    program = Path(shutil.which("critest") or "")
    digest = registry.digest_of(DIGEST_IMAGE, "latest").removeprefix("sha256:")
    copy = home / "critest"
    copy.write_bytes(DIGEST_IN_SUITE.sub(digest.encode(), program.read_bytes()))
    copy.chmod(0o755)
    return copy


def _run(wanted: Round, suite: Path, registry: Registry, home: Path, arguments: argparse.Namespace) -> list[Spec]:
    folder = home / wanted.name
    folder.mkdir(mode=0o711)
    daemon = Daemon(folder / "d", _settings(wanted, folder))
    try:
        daemon.registries_conf.write_text(_mirrors(registry))
        daemon.start()
        return _specs(_report_of(daemon, wanted, suite, folder, arguments))
    finally:
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            shutil.copy(daemon.log, arguments.out / f"{wanted.name}-daemon.log")
        daemon.destroy()


def _settings(wanted: Round, folder: Path) -> dict[str, Any]:
    return {
        "runtime": {"default_handler": wanted.handler, "handlers": {wanted.handler: {"path": str(wanted.runtime)}}},
        "nri": {"enable": True, "plugin_path": folder / "no-plugins"},
    }


def _mirrors(registry: Registry) -> str:
    return "\n".join(
        f'[[registry]]\nlocation = "{name}"\ninsecure = true\n'
        f'[[registry.mirror]]\nlocation = "{registry.host}"\ninsecure = true\n'
        for name in UPSTREAM
    )


def _report_of(
    daemon: Daemon, wanted: Round, suite: Path, folder: Path, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Ginkgo's own report of a whole run."""
    report, endpoint = folder / "report.json", f"unix://{daemon.socket}"
    parallel = arguments.parallel if shutil.which("ginkgo") else 1
    command = [
        str(suite),
        f"--runtime-endpoint={endpoint}",
        f"--image-endpoint={endpoint}",
        f"--nri-socket={daemon.run_dir / 'nri.sock'}",
        *STREAMS[wanted.streams],
        *([f"--parallel={parallel}"] if parallel > 1 else []),  # ginkgo refuses 1
        f"--ginkgo.json-report={report}",
        "--ginkgo.no-color",
        *([f"--ginkgo.focus={arguments.focus}"] if arguments.focus else []),
    ]
    output = None if arguments.verbose else (folder / "output").open("wb")
    environment = {**os.environ, "TMPDIR": str(folder)}  # it takes nothing away of what it makes there
    subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, check=False
    )
    if not report.exists():
        raise RuntimeError(f"critest wrote no report:\n{(folder / 'output').read_text()[-3000:]}")
    found: list[dict[str, Any]] = json.loads(report.read_text())
    return found


def _specs(report: list[dict[str, Any]]) -> list[Spec]:
    return [
        Spec(
            " ".join([*(each["ContainerHierarchyTexts"] or []), each["LeafNodeText"]]),
            each["State"],
            each["RunTime"] / 1e9,
            (each.get("Failure") or {}).get("Message", ""),
        )
        for suite in report
        for each in suite["SpecReports"] or []
        if each["LeafNodeType"] == "It"
    ]


def _judged(specs: Sequence[Spec], runtime: Any) -> list[Spec]:
    """Without those that a focus left out; skipped specs with the reason, and failed where there is none."""
    judged = []
    for spec in specs:
        reason = reason_to_skip(spec.name, runtime) if spec.state == "skipped" else ""
        if spec.state != "skipped" or reason:
            judged.append(replace(spec, message=reason or spec.message))
        elif spec.message:
            why = f"skipped itself, which nothing in skips.toml allows here: {spec.message}"
            judged.append(replace(spec, state="failed", message=why))
    return judged


def _report(wanted: Round, specs: Sequence[Spec], out: Path | None) -> int:
    print(f"critest with {wanted.runtime}, streams over {wanted.streams}:")
    for spec in sorted(specs, key=lambda spec: (spec.state, spec.name)):
        if spec.state not in GOOD:
            print(f"{spec.state:8} {spec.seconds:6.1f} s  {spec.name}")
            print("\n".join(f"           {line}" for line in spec.message.strip().splitlines()[:8]))
    for reason, number in Counter(spec.message for spec in specs if spec.state == "skipped").items():
        print(f"skipped  {number:6}    {reason}")
    counted = Counter(spec.state for spec in specs)
    others = "".join(f", {number} {state}" for state, number in counted.items() if state not in (*GOOD, "failed"))
    print(f"{counted['passed']} passed, {counted['failed']} failed, {counted['skipped']} skipped{others}", flush=True)
    if out is not None:
        (out / f"{wanted.name}.json").write_text(json.dumps([asdict(spec) for spec in specs], indent=1))
    return 0 if counted["passed"] and set(counted) <= {*GOOD} else 1


if __name__ == "__main__":
    sys.exit(main())
