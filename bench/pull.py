"""Measures cold pulls from a registry on loopback, beside the containerd and the CRI-O in PATH, and where time goes.

All pull the same image of this machine's own files, in one run, in turn (A B A B), each time into a file system made
for it: on one whose files have just been removed ext4 takes ten times as long to make new ones (it passes over inodes
that were freed in the last minutes). containerd does not wait for unpacked data to be on the disk; we do.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import urllib3

from bench.__main__ import print_header, print_row
from bench.peers import MAKERS, Bed, started
from bench.pull_image import BYTES, FILES, Plain, compressed, plain_layers
from cri.image_service.decompress import decompressed
from tests.e2e.harness.client import Client
from tests.e2e.harness.registry import Registry, running_registry
from tests.hugetlb import hugetlb_hierarchy

KINDS = ("gzip", "zstd")
CHUNK_BYTES = 1 << 18
PULL_TIMEOUT_S = 600
DISK_BYTES = 8 << 30


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if os.geteuid() != 0 or len(MAKERS) == 1:
        print("bench.pull: not run: needs root, and containerd or CRI-O", file=sys.stderr)
        return 2
    with (
        tempfile.TemporaryDirectory(prefix="crito-b-", ignore_cleanup_errors=True) as name,
        hugetlb_hierarchy(),
        running_registry(Path(name) / "registry") as registry,
    ):
        folder = Path(name)
        print(f"making an image of {arguments.files} files, {arguments.bytes / 1e6:.0f} MB …", file=sys.stderr)
        layers = plain_layers(folder, arguments.files, arguments.bytes)
        references = {kind: registry.push(compressed(layers, kind), "bench/pull", kind) for kind in arguments.kinds}
        bed = Bed(registry.host, Path("/usr/bin/runc"), "unused")
        seconds: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in MAKERS} for kind in references}
        for _ in range(arguments.rounds):
            for kind, reference in references.items():
                for peer, taken in seconds[kind].items():
                    with fresh_filesystem(folder / "fresh") as fresh, started(peer, fresh / "d", bed) as daemon:
                        taken.append(_cold_pull(daemon.client(), reference))
        limits = _limits(folder, layers, registry, references)
    _print(seconds, limits, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps({"seconds": seconds, "limits": limits}, indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.pull", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--files", type=int, default=FILES)
    parser.add_argument("--bytes", type=int, default=BYTES)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--json", type=Path, help="also write all figures there")
    return parser


@contextmanager
def fresh_filesystem(at: Path) -> Iterator[Path]:
    """An ext4 of its own, mounted at `at`, in a file beside it; gone at the end."""
    disk = at.with_suffix(".ext4")
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    options = ["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-i", "8192"]
    subprocess.run(["mkfs.ext4", *options, str(disk)], check=True)
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", str(disk), str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)
        disk.unlink()


def _cold_pull(client: Client, reference: str) -> float:
    os.sync()
    began = time.perf_counter()
    client.pull(reference, PULL_TIMEOUT_S)
    seconds = time.perf_counter() - began
    client.close()
    return seconds


def _limits(
    folder: Path, layers: Sequence[Plain], registry: Registry, references: dict[str, str]
) -> dict[str, dict[str, float]]:
    """Seconds that each phase takes alone, with nothing else to do, on all cores."""
    limits: dict[str, dict[str, float]] = {}
    for kind in references:
        blobs = _blobs(registry, kind)
        began = time.perf_counter()
        with ThreadPoolExecutor(4) as pool:
            contents = list(pool.map(lambda digest: _fetch(registry, digest), blobs))
        network = time.perf_counter() - began
        limits[kind] = {"network": network, "decompress": _decompress_all(contents)}
    with fresh_filesystem(folder / "fresh") as fresh:
        limits["both"] = {"unpack (tar -x), synced": _tar_all(fresh / "tar", layers)}
    return limits


def _blobs(registry: Registry, kind: str) -> list[str]:
    headers = {"Accept": "application/vnd.oci.image.manifest.v1+json"}
    answer = urllib3.request("GET", f"http://{registry.host}/v2/bench/pull/manifests/{kind}", headers=headers)
    return [layer["digest"] for layer in answer.json()["layers"]]


def _fetch(registry: Registry, digest: str) -> bytes:
    return urllib3.request("GET", f"http://{registry.host}/v2/bench/pull/blobs/{digest}").data


def _decompress_all(contents: Sequence[bytes]) -> float:
    """In threads: the decompressors let go of the interpreter's lock."""

    def expand(content: bytes) -> None:
        chunks = (content[at : at + CHUNK_BYTES] for at in range(0, len(content), CHUNK_BYTES))
        for _ in decompressed(chunks):
            pass

    began = time.perf_counter()
    threads = [threading.Thread(target=expand, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def _tar_all(folder: Path, layers: Sequence[Plain]) -> float:
    os.sync()
    began = time.perf_counter()
    processes = []
    for at, layer in enumerate(layers):
        target = folder / str(at)
        target.mkdir(parents=True)
        processes.append(subprocess.Popen(["tar", "-xf", str(layer.path), "-C", str(target)]))
    for process in processes:
        process.wait()
    os.sync()
    return time.perf_counter() - began


def _print(
    seconds: dict[str, dict[str, list[float]]], limits: dict[str, dict[str, float]], arguments: argparse.Namespace
) -> None:
    print(f"cold pull, {arguments.rounds} rounds in turn; medians, s")
    print_header(list(MAKERS))
    for kind, taken in seconds.items():
        print_row(kind, [statistics.median(taken[name]) for name in MAKERS], 2)
    print("each phase alone, on all cores, s")
    for kind, phases in limits.items():
        for phase, alone in phases.items():
            print(f"{kind + ': ' + phase:44}{alone:12.2f}")


if __name__ == "__main__":
    sys.exit(main())
