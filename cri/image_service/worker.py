"""The worker process: fetches, verifies and unpacks for the daemon, so that bulk bytes never pass through that.

A program of its own: one JSON request a line on stdin, answered by lines on stdout: any number of {"progress": …}, then
one {"done": …} or {"error": …}. It ends with stdin, also amid work: what is unfinished has a temporary name.
"""

import contextlib
import hashlib
import json
import os
import queue
import resource
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cri.image_service.decompress import ahead, decompressed
from cri.image_service.digest import Digest
from cri.image_service.file_layer import write_file
from cri.image_service.layer_files import find_damage
from cri.image_service.local_archive import Extent, read
from cri.image_service.manifest import (
    CONFIG_LIMIT_BYTES,
    Descriptor,
    Index,
    Manifest,
    Platform,
    choose,
    image_id,
    parse,
    parse_platform,
)
from cri.image_service.pace import Pace
from cri.image_service.refusal import is_refusal, refusal
from cri.image_service.save import Layer, Wanted, Written, save
from cri.image_service.save import remove as remove_unfinished
from cri.image_service.snapshots import unpacked_path
from cri.image_service.tar import Stream
from cri.image_service.unpack import Unpacked, Usage, remove_tree, sync_filesystem, unpack
from oci.errors import Error, NotFound, PermissionDenied, Unavailable

if TYPE_CHECKING:
    from cri.image_service.decryption import Decryption
    from cri.image_service.registry import Registry, Session

_TICK_S = 0.25
Request = dict[str, Any]


class Progress:
    """Counts bytes; a thread of its own reports them while they change."""

    def __init__(self, say: Callable[[dict[str, Any]], None]) -> None:
        self.fetched = 0
        self.unpacked = 0
        self.measure: Callable[[], int] = lambda: 0  # what else moves while work goes on
        self.written = Written()  # by a save
        self._say = say
        self._over = threading.Event()
        threading.Thread(target=self._report, daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def reset(self) -> None:
        self.fetched = self.unpacked = 0

    def count_unpacked(self, size: int) -> None:
        self.unpacked += size

    def counting_fetched(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self.fetched += len(chunk)
            yield chunk

    def counting_unpacked(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self.unpacked += len(chunk)
            yield chunk

    def _report(self) -> None:
        said: tuple[object, ...] = ()
        while not self._over.wait(_TICK_S):
            told = {"fetched": self.fetched, "unpacked": self.unpacked, **asdict(self.written)}
            now = (*told.values(), self.measure())
            if now != said:
                said = now
                self._say({"progress": told})


def resolve(request: Request, progress: Progress) -> dict[str, Any]:
    """Asks each source in turn for manifest and config; the last one's error is the answer when all fail."""
    session = _session(request)
    platform = parse_platform(request["platform"])
    failed: list[tuple[str, Error]] = []
    for source_number, source in enumerate(request["sources"]):
        registry = _registry(source, session, request)
        try:
            resolved = _resolved(registry, source, request, platform)
            return {"source": source_number, **resolved, "session": session.to_json()}
        except Error as error:
            failed.append((f"{source['host']}/{source['repository']}", error))
        finally:
            registry.close()
    if not failed:
        raise NotFound(f"{request['name']} has no place to be asked for")
    # A source that has the image but whose signatures are refused tells more than another one that has it not.
    told = next((error for _, error in failed if is_refusal(error)), failed[-1][1])
    earlier = [f"{place}: {error}" for place, error in failed if error is not told]
    raise type(told)(_with_earlier(told, earlier)) from told


def _resolved(registry: "Registry", source: Request, request: Request, platform: Platform) -> dict[str, Any]:
    name, reference = request["name"], request["reference"]
    subject = f"image {name}"
    text, media_type = registry.manifest(reference)
    digest = reference if ":" in reference else f"sha256:{hashlib.sha256(text).hexdigest()}"
    found = parse(text, media_type, subject)
    manifest_digest = digest
    if isinstance(found, Index):
        chosen = choose(found, platform, subject)
        manifest_digest = chosen.digest
        text, media_type = registry.manifest(chosen.digest)
        found = parse(text, media_type, subject)
    if not isinstance(found, Manifest):
        raise Error(f"{subject}: its index leads to another index")
    manifest_sha256 = f"sha256:{hashlib.sha256(text).hexdigest()}"
    signatures = _signatures(registry, source, request, manifest_sha256) if "signatures" in request else None
    _authorize(found.layers, request, subject)
    config = b""
    if not found.artifact_type:
        if found.config.size_bytes > CONFIG_LIMIT_BYTES:
            raise Error(f"{subject}: its config has {found.config.size_bytes} bytes, more than {CONFIG_LIMIT_BYTES}")
        config = registry.document(found.config.digest, found.config.size_bytes)
    return {
        "digest": digest,
        "manifest": text.decode(),
        "manifest_digest": manifest_digest,
        "manifest_sha256": manifest_sha256,
        "media_type": media_type,
        "config": _text(config, subject),
        "id": image_id(found, text),
        "layers": [asdict(layer) for layer in found.layers],
        "signatures": signatures,
    }


def _authorize(layers: Iterable[Descriptor], request: Request, subject: str) -> None:
    """Raises unless a key of this node opens each encrypted layer, whether or not that is here decrypted already."""
    for each in layers:
        if each.is_encrypted:
            _decryption(request["keys_path"], each.annotations, f"layer {each.digest} of {subject}")


def _decryption(keys_path: str, annotations: Mapping[str, str], subject: str) -> "Decryption":
    from cri.image_service.decryption import open_layer  # noqa: PLC0415 (a worker that meets no encryption saves time)

    return open_layer(annotations, keys_path, subject).decryption()


def _signatures(registry: "Registry", source: Request, request: Request, digest: str) -> list[Any] | None:
    """The manifest's signatures, which meet what the policy demands; None where none are demanded nor to be had."""
    from cri.image_service import signature_work  # noqa: PLC0415 (most nodes ask for none)

    found = signature_work.of_pull(registry, source, request["reference"], request["signatures"], digest)
    return None if found is None else signature_work.encoded(found)


def verify_signatures(request: Request, progress: Progress) -> dict[str, Any]:
    """Raises PermissionDenied unless what is on the node of one manifest's signatures meets what is demanded."""
    from cri.image_service import signature_work  # noqa: PLC0415

    refused = refusal(f"image {request['signatures']['identity']}: no manifest of it is known")
    for digest, signatures in request["signed"].items():
        try:
            signature_work.verify(request["signatures"], digest, signatures)
            return {}
        except PermissionDenied as error:
            refused = error
    raise refused


def newer_signatures(request: Request, progress: Progress) -> dict[str, Any]:
    """The signatures of one of the manifests, from the first source where they meet what is demanded."""
    from cri.image_service import signature_work  # noqa: PLC0415

    session = _session(request)
    failed: list[Error] = []
    for source in request["sources"]:
        registry = _registry(source, session, request)
        try:
            for digest in request["digests"]:
                try:
                    found = signature_work.newer(registry, source, request["signatures"], digest)
                    return {"digest": digest, "signatures": signature_work.encoded(found)}
                except Error as error:
                    failed.append(error)
        finally:
            registry.close()
    told = next((each for each in failed if is_refusal(each)), failed[0])
    raise type(told)(_with_earlier(told, [str(each) for each in failed if each is not told])) from told


def layer(request: Request, progress: Progress) -> dict[str, Any]:
    """Unpacks one layer into request["directory"], from the first source whose bytes are what they should be."""
    if "extent" in request:
        where = request["extent"]
        extent = Extent(Path(where["path"]), where["offset"], where["size_bytes"])
        return _unpacked(request, extent.chunks(), Digest(request["digest"]), progress)
    session = _session(request)
    failed: list[str] = []
    for at, source in enumerate(request["sources"]):
        registry = _registry(source, session, request)
        try:
            return _layer_of(source["host"], registry, request, progress)
        except Error as error:
            if at == len(request["sources"]) - 1:
                raise type(error)(_with_earlier(error, failed)) from error
            failed.append(f"{source['host']}/{source['repository']}: {error}")
            progress.reset()
        finally:
            registry.close()
    raise NotFound(f"layer {request['digest']} has no place to be asked for")


def _layer_of(host: str, registry: "Registry", request: Request, progress: Progress) -> dict[str, Any]:
    """The layer from one source, which is blamed for no other bytes than its own: with what another one sent, or an
    earlier try left, a wrong digest says nothing about it. Then it is asked for all."""
    resumes = _had_bytes(request) > 0
    digest = Digest(request["digest"])
    try:
        return _unpacked(request, _blob(host, registry, request), digest, progress)
    except Error:
        if not (resumes and digest.is_wrong):
            raise
    progress.reset()
    return _unpacked(request, _blob(host, registry, request), Digest(request["digest"]), progress)


def _had_bytes(request: Request) -> int:
    """How much of the blob is on the disk; 0 where that is of no use."""
    try:
        size: int = Path(request["partial"]).stat().st_size
    except FileNotFoundError:
        return 0
    return size if size <= request["size_bytes"] else 0


def _paced(chunks: Iterator[bytes], host: str, request: Request) -> Iterator[bytes]:
    """The same chunks, no faster than the rate of the registry at `host`."""
    pace = request["paces"].get(host)
    return chunks if pace is None else Pace(Path(pace["path"]), pace["bytes_per_s"]).of(chunks)


def _blob(host: str, registry: "Registry", request: Request) -> Iterator[bytes]:
    """The blob; what an interrupted pull had of it comes from the disk, and what comes from the registry goes there."""
    with Path(request["partial"]).open("ab") as partial:
        partial.truncate(start := _had_bytes(request))
        yield from Extent(Path(partial.name), 0, start).chunks()
        for chunk in _paced(registry.blob(request["digest"], request["size_bytes"], start), host, request):
            partial.write(chunk)
            yield chunk


def _unpacked(request: Request, chunks: Iterable[bytes], compressed: Digest, progress: Progress) -> dict[str, Any]:
    """fetch → count, hash | decrypt, decompress → hash | unpack: three threads, each a few chunks ahead of the next.

    `compressed` has the blob's digest then, as far as it came.
    """
    subject = f"layer {request['digest'] or request['diff_id']}"
    encryption = request["encryption"]
    decryption = _decryption(encryption["keys_path"], encryption["annotations"], subject) if encryption else None
    directory = Path(request["directory"])
    remove_tree(directory)
    directory.mkdir(mode=0o700)
    plain = Digest(request["diff_id"])
    counted = progress.counting_fetched(chunks)
    fetched = ahead(compressed.of(counted) if request["digest"] else counted)
    clear = fetched if decryption is None else decryption.of(fetched)
    content = clear if request["file"] else decompressed(clear)
    expanded = ahead(plain.of(content) if request["diff_id"] else content)
    try:
        made: Unpacked | None = _made(request, progress.counting_unpacked(expanded), directory)
        trouble = None
    except Error as error:  # more often than not wrong bytes: then the digest says so better
        made, trouble = None, error
        _drain(expanded, clear)
    if compressed.is_whole:
        if request.get("partial"):  # used up, or wrong: no try after this one shall begin with it
            Path(request["partial"]).unlink(missing_ok=True)
        compressed.check(subject)
        if decryption is not None:
            decryption.check(subject)
    if trouble is not None and type(trouble) is not Error:
        raise trouble  # the registry's fault, and it says so
    if trouble is not None:
        raise Error(f"{subject}: {trouble}") from trouble
    assert made is not None
    plain.check(f"unpacked {subject}")
    facts = {"size_bytes": made.size_bytes, "inodes": made.inodes, "implied": made.implied}
    unpacked = unpacked_path(directory)
    new = unpacked.with_suffix(".new")
    new.write_text(json.dumps({"diff_id": request["id"], **facts}))
    new.rename(unpacked)
    return {**facts, "unpacked_bytes": progress.unpacked}


def _made(request: Request, plain: Iterable[bytes], directory: Path) -> Unpacked:
    if request["file"]:
        return write_file(plain, request["file"], directory)
    return unpack(Stream(plain), directory)


def sync(request: Request, progress: Progress) -> dict[str, Any]:
    """Has everything on the disk that was unpacked before."""
    progress.measure = _unwritten_bytes
    sync_filesystem(Path(request["path"]))
    return {}


def _unwritten_bytes() -> int:
    """What the whole machine has in memory that is not on its disks yet: while that changes, a sync moves on."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(fields[name].split()[0]) << 10 for name in ("Dirty", "Writeback"))


def verify(request: Request, progress: Progress) -> dict[str, Any]:
    """What is wrong with a committed layer; "" where it is as it was unpacked."""
    return {"damage": find_damage(Path(request["directory"]), progress.count_unpacked)}


def _drain(*iterators: Iterator[bytes]) -> None:
    for iterator in iterators:
        try:
            for _ in iterator:
                pass
        except Error:
            pass  # the first error is the one that counts


def inspect(request: Request, progress: Progress) -> dict[str, Any]:
    """What images a local archive or layout holds."""
    scratch = Path(request["scratch"])
    scratch.mkdir(mode=0o700)
    path = Path(request["path"])
    subject = f"image in {path}"
    images = read(path, scratch, parse_platform(request["platform"]), progress.count_unpacked)
    for image in images:
        _authorize((layer for _, layer in image.layers), request, subject)
    return {
        "format": _transport(path, has_manifests=any(image.manifest for image in images)),
        "images": [
            {
                "names": image.names,
                "manifest": image.manifest.decode(),
                "manifest_digest": image.manifest_digest,
                "media_type": image.media_type,
                "config": _text(image.config, subject),
                "id": image.id,
                "layers": [asdict(layer) for _, layer in image.layers],
                "extents": [
                    {"path": str(extent.path), "offset": extent.offset, "size_bytes": extent.size_bytes}
                    for extent, _ in image.layers
                ],
            }
            for image in images
        ],
    }


def _transport(path: Path, *, has_manifests: bool) -> str:
    """What containers-policy.json(5) calls this kind of place."""
    if not has_manifests:
        return "docker-archive"
    return "oci" if path.is_dir() else "oci-archive"


def save_images(request: Request, progress: Progress) -> dict[str, Any]:
    """Writes images to a file or directory, each as an exact copy where its blobs can be fetched again."""
    temporary = Path(request["temporary"])
    progress.measure = _unwritten_bytes  # at the end it is synced
    images = [
        Wanted(
            **{key: image[key] for key in ("id", "config", "manifest", "media_type")},
            names=tuple(image["names"]),
            layers=tuple(Layer(**{**layer, "tree": Path(layer["tree"])}) for layer in image["layers"]),
        )
        for image in request["images"]
    ]
    with contextlib.ExitStack() as stack:
        blobs = {
            image["id"]: _Fetching(image["sources"], request, stack).blob
            for image in request["images"]
            if image["sources"]
        }
        _unfinished.append(temporary)
        try:
            saved = save(images, Path(request["path"]), temporary, request["format"], blobs, progress.written)
        finally:
            _unfinished.remove(temporary)
    return {"images": [asdict(image) for image in saved], **asdict(progress.written)}


class _Fetching:
    """Blobs of one image from the first of its sources that has them; one that does not answer is not asked again."""

    def __init__(self, sources: list[dict[str, Any]], request: Request, stack: contextlib.ExitStack) -> None:
        session = _session(request)
        self._request = request
        self._registries = [(source["host"], _registry(source, session, request)) for source in sources]
        for _, registry in self._registries:
            stack.callback(registry.close)

    def blob(self, wanted: Descriptor) -> Iterator[bytes]:
        failed = []
        for host, registry in tuple(self._registries):
            chunks = _paced(registry.blob(wanted.digest, wanted.size_bytes), host, self._request)
            try:
                first = next(chunks, b"")
            except Error as error:
                failed.append(str(error))
                if isinstance(error, Unavailable):
                    self._registries.remove((host, registry))
                continue
            yield first
            yield from chunks
            return
        raise NotFound("; ".join(failed) or "no registry answers")


def remove(request: Request, progress: Progress) -> dict[str, Any]:
    removed = Usage()
    progress.measure = lambda: removed.inodes
    for path in request["paths"]:
        remove_tree(Path(path), removed)
    return {}


_VERBS = {
    "resolve": resolve,
    "layer": layer,
    "sync": sync,
    "verify": verify,
    "inspect": inspect,
    "verify_signatures": verify_signatures,
    "newer_signatures": newer_signatures,
    "remove": remove,
    "save": save_images,
}
_unfinished: list[Path] = []  # what is being saved outside of the store: nobody would sweep it


def _session(request: Request) -> "Session":
    from cri.image_service.registry import Session  # noqa: PLC0415 (local work needs no HTTP)

    return Session(**request.get("session", {}))


def _registry(source: dict[str, Any], session: "Session", request: Request) -> "Registry":
    from cri.image_service.registry import Registry, Source, Timeouts  # noqa: PLC0415

    return Registry(Source(**source), session, Timeouts(**request.get("timeouts", {})))


def _with_earlier(error: Error, failed: list[str]) -> str:
    return f"{error} (before that, {'; '.join(failed)})" if failed else str(error)


def _text(content: bytes, subject: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise Error(f"{subject}: its config is not UTF-8: {content[:60]!r}") from error


def main() -> None:
    # Wakes no later, but takes the processor from nobody: what the daemon has to answer comes first.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    requests: queue.Queue[Request] = queue.Queue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    speaking = threading.Lock()

    def say(message: dict[str, Any]) -> None:
        with speaking:
            sys.stdout.write(json.dumps(message) + "\n")
            sys.stdout.flush()

    while True:
        say(_answer(requests.get(), say))


def _read_requests(requests: "queue.Queue[Request]") -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    for path in _unfinished:
        with contextlib.suppress(OSError):
            remove_unfinished(path)
    os._exit(0)  # the daemon is gone, or done with us


def _answer(request: Request, say: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    progress = Progress(say)
    try:
        return {"done": _VERBS[request["verb"]](request, progress)}
    except Error as error:
        return {"error": {"kind": type(error).__name__, "message": str(error)}}
    except OSError as error:
        return {
            "error": {"kind": "OSError", "errno": error.errno, "message": str(error.strerror), "path": error.filename}
        }
    except Exception as error:
        traceback.print_exc()
        return {"error": {"kind": "Error", "message": f"image worker failed: {error!r}"}}
    finally:
        progress.stop()


if __name__ == "__main__":
    main()
