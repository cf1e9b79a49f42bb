"""`crito images …`: what the running daemon has of images, for people and for scripts."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from cri.api.runtime.v1 import api_pb2 as api
from cri.node_client import SHORT_TIMEOUT_S, connected
from cri.node_messages import (
    ImageEvent,
    ImageSummary,
    LoadImage,
    Progress,
    PullImage,
    PullStatus,
    SavedImage,
    SaveImages,
)
from oci.errors import Error, InvalidArgument, NotFound

Arguments = argparse.Namespace

WATCH_INTERVAL_S = 0.5


def list_images(socket: Path, arguments: Arguments) -> int:
    with connected(socket) as daemon:
        images = daemon.images.ListImages(api.ListImagesRequest(), timeout=SHORT_TIMEOUT_S).images
    if arguments.json:
        print(json.dumps([_as_json(image) for image in images], indent=2))
        return 0
    rows = [("IMAGE", "ID", "SIZE", "")]
    for image in images:
        pinned = "pinned" if image.pinned else ""
        rows += [(name, short_id(image.id), size(image.size), pinned) for name in _names(image)]
    print_table(rows)
    return 0


def pull(socket: Path, arguments: Arguments) -> int:
    request = PullImage(arguments.reference, *_credentials(arguments))
    with connected(socket) as daemon:
        return follow(daemon.pull(request), arguments.json)


def load(socket: Path, arguments: Arguments) -> int:
    path = arguments.path.absolute()
    with connected(socket) as daemon:
        return follow(daemon.load(LoadImage(str(path), arguments.reference)), arguments.json)


def save(socket: Path, arguments: Arguments) -> int:
    """The images in a file or directory; says of each whose id is another there, and why."""
    path = arguments.output.absolute()
    request = SaveImages(tuple(arguments.references), str(path), arguments.format, *_credentials(arguments))
    with connected(socket) as daemon:
        return follow(daemon.save(request), arguments.json)


def _credentials(arguments: Arguments) -> tuple[str, str]:
    username, colon, password = arguments.creds.partition(":")
    if arguments.creds and not colon:
        raise InvalidArgument("--creds: expected USER:PASSWORD")
    return username, password


def pulls(socket: Path, arguments: Arguments) -> int:
    """Shows the pulls under way, once or until there are none."""
    with connected(socket) as daemon:
        while True:
            found = daemon.pulls()
            if arguments.json:
                print(json.dumps([asdict(each) for each in found]), flush=True)
            else:
                if arguments.watch and sys.stdout.isatty():
                    print("\033[H\033[J", end="")
                print(pulls_text(found), flush=True)
            if not arguments.watch or not found:
                return 0
            time.sleep(WATCH_INTERVAL_S)


def pulls_text(found: Sequence[PullStatus]) -> str:
    """A line for each pull, and one for each of its layers."""
    lines = []
    for pull in found:
        progress = pull.progress
        eta = "" if pull.eta_seconds is None else f", {pull.eta_seconds:.0f} s left"
        rate = f"{size(int(pull.rate_bytes_per_s))}/s{eta}"
        lines.append(
            f"{pull.reference}  {progress.phase}, {progress.layers_done}/{progress.layers_total} layers,"
            f" {size(progress.fetched_bytes)} of {size(progress.total_bytes)}, {rate}"
        )
        for layer in pull.layers:
            waits = f" (number {layer.queue_position})" if layer.queue_position else ""
            lines.append(
                f"  {short_id(layer.digest)}  {layer.phase}{waits}  {size(layer.fetched_bytes)} of"
                f" {size(layer.total_bytes)}, {size(layer.unpacked_bytes)} unpacked"
            )
    return "\n".join(lines) if lines else "nothing is being pulled"


def cancel(socket: Path, arguments: Arguments) -> int:
    with connected(socket) as daemon:
        if not daemon.cancel_pull(arguments.reference):
            raise NotFound(f"no pull of {arguments.reference} is under way")
    print(arguments.reference)
    return 0


def pin(socket: Path, arguments: Arguments) -> int:
    return _pin(socket, arguments, pinned=True)


def unpin(socket: Path, arguments: Arguments) -> int:
    return _pin(socket, arguments, pinned=False)


def _pin(socket: Path, arguments: Arguments, *, pinned: bool) -> int:
    with connected(socket) as daemon:
        for reference in arguments.references:
            image = daemon.pin(reference, pinned)
            print(json.dumps({"image": asdict(image), "pinned": pinned}) if arguments.json else short_id(image.id))
    return 0


def inspect(socket: Path, arguments: Arguments) -> int:
    request = api.ImageStatusRequest(image=api.ImageSpec(image=arguments.reference), verbose=True)
    with connected(socket) as daemon:
        answer = daemon.images.ImageStatus(request, timeout=SHORT_TIMEOUT_S)
    if not answer.image.id:
        raise NotFound(f"no image {arguments.reference} here")
    print(json.dumps({**_as_json(answer.image), **json.loads(answer.info.get("info", "{}"))}, indent=2))
    return 0


def remove(socket: Path, arguments: Arguments) -> int:
    """Removes all that can be removed; says of each other why not."""
    failed = 0
    with connected(socket) as daemon:
        for reference in arguments.references:
            spec = api.ImageSpec(image=reference)
            if not daemon.images.ImageStatus(api.ImageStatusRequest(image=spec), timeout=SHORT_TIMEOUT_S).image.id:
                print(f"crito: no image {reference} here", file=sys.stderr)
                failed = 1
                continue
            daemon.images.RemoveImage(api.RemoveImageRequest(image=spec), timeout=60)
            print(json.dumps({"removed": reference}) if arguments.json else reference)
    return failed


def follow(events: Iterator[ImageEvent], as_json: bool, out: TextIO = sys.stdout) -> int:
    """Shows a pull, load or save as it goes: a bar on a terminal, else nothing but its result."""
    bar = Bar(sys.stderr) if sys.stderr.isatty() and not as_json else None
    images: tuple[ImageSummary | SavedImage, ...] = ()
    try:
        for event in events:
            images = event.images or event.saved or images
            if event.progress and as_json:
                print(json.dumps({"progress": asdict(event.progress)}), file=out, flush=True)
            elif event.progress and bar:
                bar.show(event.progress)
    finally:
        if bar:
            bar.close()
    if not images:
        raise Error("the daemon ended the stream without naming an image")
    for image in images:
        if as_json:
            print(json.dumps({"image": asdict(image)}), file=out)
        elif isinstance(image, SavedImage):
            print(saved_text(image), file=out)
        else:
            names = image.repo_tags or image.repo_digests
            print(" ".join([short_id(image.id), size(image.size_bytes), *names]), file=out)
    return 0


def saved_text(image: SavedImage) -> str:
    line = " ".join([short_id(image.id), *image.names])
    if not image.regenerated:
        return line
    return f"{line}\n  regenerated: {image.regenerated}; here its id is {short_id(image.source_id)}"


class Bar:
    """One line on a terminal that says how far a pull or load is."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal
        self._started = time.monotonic()
        self._shown = False

    def show(self, progress: Progress) -> None:
        width = shutil.get_terminal_size().columns - 1
        self._terminal.write("\r" + bar_line(progress, width, time.monotonic() - self._started).ljust(width))
        self._terminal.flush()
        self._shown = True

    def close(self) -> None:
        if self._shown:
            self._terminal.write("\n")
            self._terminal.flush()


def bar_line(progress: Progress, width: int, seconds: float) -> str:
    """What the bar shows after so many seconds, in at most `width` characters."""
    total = max(progress.total_bytes, progress.fetched_bytes)
    done = total if progress.phase == "done" else progress.fetched_bytes
    share = done / total if total else 0.0
    speed = size(int(done / max(seconds, 0.001)))
    layers = f"{progress.layers_done}/{progress.layers_total} layers"
    words = f" {size(done)} of {size(total)}, {speed}/s, {layers}"
    room = max(10, width - len(words) - 7)
    full = round(room * share)
    return f"{share:4.0%} [{'#' * full}{'.' * (room - full)}]{words}"[:width]


def size(count: int) -> str:
    """Bytes in the unit that leaves three digits: "1.23 MB"."""
    if count < 1000:
        return f"{count} B"
    amount = float(count)
    for unit in ("kB", "MB", "GB"):
        amount /= 1000
        if amount < 1000:
            return f"{amount:.3g} {unit}"
    return f"{amount / 1000:.3g} TB"


def short_id(image_id: str) -> str:
    return image_id.removeprefix("sha256:")[:12]


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _names(image: Any) -> list[str]:
    return list(image.repo_tags) or list(image.repo_digests) or ["<none>"]


def _as_json(image: Any) -> dict[str, Any]:
    return {
        "id": image.id,
        "repo_tags": list(image.repo_tags),
        "repo_digests": list(image.repo_digests),
        "size_bytes": image.size,
        "uid": image.uid.value if image.HasField("uid") else None,
        "username": image.username,
        "pinned": image.pinned,
    }
