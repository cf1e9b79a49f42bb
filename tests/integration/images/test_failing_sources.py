"""A source that hardly sends, breaks off or lies is asked again or passed over; what has come of a blob is kept."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cri.image_service import registry as client
from cri.image_service import worker
from cri.image_service.contents import Content
from cri.image_service.layer_request import LayerRequests
from cri.image_service.manifest import Descriptor
from cri.image_service.registry import Registry, Session, Source, Timeouts
from cri.image_service.snapshots import LayerDirectory
from oci.errors import Error, NotFound, Unavailable
from tests.fakes import layers
from tests.fakes.layers import file, tar
from tests.fakes.registry import Answer, FakeRegistry, Handler, cut_after, drip, in_turn, status, times

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="layers hold owners")

CONTENT = os.urandom(600_000)
APP = layers.image([tar([file("big", CONTENT)])])
BLOB = APP.layers[0]
DIGEST = layers.digest(BLOB)


FLIPPED = BLOB[:1000] + bytes([BLOB[1000] ^ 1]) + BLOB[1001:]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is given a minute has half a second here."""
    monkeypatch.setattr(client, "_STALL_WINDOW_S", 0.5)
    monkeypatch.setattr(client, "_DOCUMENT_DEADLINE_S", 0.5)
    monkeypatch.setattr(client, "_ERROR_DEADLINE_S", 0.5)
    umask = os.umask(0o022)
    yield
    os.umask(umask)


@pytest.fixture
def registry(registry: FakeRegistry) -> FakeRegistry:
    registry.add("app", "1", APP)
    return registry


@pytest.fixture
def mirror(registry: FakeRegistry) -> Iterator[FakeRegistry]:
    with FakeRegistry() as served:
        served.add("app", "1", APP)
        yield served


def client_of(served: FakeRegistry, read_s: float = 5) -> Registry:
    source = Source(served.address, "app", insecure=True)
    return Registry(source, Session(schemes={served.address: "http"}), Timeouts(read_s=read_s))


def ranges(served: FakeRegistry) -> list[str]:
    return [seen["range"] for seen in served.headers_seen if "range" in seen]


def asked_from(served: FakeRegistry) -> list[int]:
    """At which byte each request for the blob began."""
    asked = [seen.get("range", "bytes=0-") for seen in served.headers_seen]
    return [int(each.removeprefix("bytes=").removesuffix("-")) for each in asked]


def fetch(tmp_path: Path, *sources: FakeRegistry) -> dict[str, Any]:
    """What the worker answers who is asked for the blob; its tree is tmp_path/layer/diff then."""
    directory = LayerDirectory(tmp_path / "images")
    directory.prepare()
    content = Content("layer", Descriptor("", DIGEST, len(BLOB)))
    wanted = LayerRequests(directory, {}, "", {}).remote(
        content, [{"host": each.address, "repository": "app", "insecure": True} for each in sources], {}
    )
    progress = worker.Progress(lambda _: None)
    try:
        return worker.layer({**wanted.request, "directory": str(tmp_path / "layer")}, progress)
    finally:
        progress.stop()


def some_then_silence(size: int) -> Answer:
    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(BLOB)))
        handler.end_headers()
        handler.wfile.write(BLOB[:size])
        handler.wfile.flush()
        time.sleep(2)
        handler.close_connection = True

    return answer


def test_a_source_that_hardly_sends_is_passed_over_for_one_that_goes_on_from_there(
    tmp_path: Path, registry: FakeRegistry, mirror: FakeRegistry
) -> None:
    mirror.trouble[DIGEST] = drip(1, 0.05, first=100)

    fetch(tmp_path, mirror, registry)

    assert (tmp_path / "layer/diff/big").stat().st_size == 600_000
    assert mirror.asked[f"/v2/app/blobs/{DIGEST}"] == 2
    [resumed] = ranges(registry)
    assert 100 < int(resumed.removeprefix("bytes=").removesuffix("-")) < 1000


def test_a_source_that_hardly_sends_says_so_where_there_is_no_other(registry: FakeRegistry) -> None:
    registry.trouble[DIGEST] = drip(1, 0.05)

    with pytest.raises(Unavailable, match=r"^RegistryUnavailable: .*only [0-9]+ bytes came in .* at byte [0-9]+ of"):
        list(client_of(registry).blob(DIGEST, len(BLOB)))


def test_who_is_slow_to_take_what_comes_does_not_make_the_source_a_slow_one(
    registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_STALL_BYTES_PER_S", 1 << 20)
    taken = []
    for chunk in client_of(registry).blob(DIGEST, len(BLOB)):
        taken.append(chunk)
        time.sleep(0.6)

    assert b"".join(taken) == BLOB
    assert ranges(registry) == []


def test_what_has_come_before_a_silence_is_not_asked_for_again(registry: FakeRegistry) -> None:
    registry.trouble[DIGEST] = times(1, some_then_silence(100_000))

    assert b"".join(client_of(registry, read_s=0.5).blob(DIGEST, len(BLOB))) == BLOB

    assert ranges(registry) == ["bytes=100000-"]


def test_a_blob_that_comes_in_small_parts_is_handed_on_as_it_comes(registry: FakeRegistry) -> None:
    registry.trouble[DIGEST] = drip(5000, 0.15)
    began = time.monotonic()

    first = next(client_of(registry).blob(DIGEST, len(BLOB)))

    assert len(first) < 20_000
    assert time.monotonic() - began < 2


def test_a_document_that_hardly_comes_is_given_up(registry: FakeRegistry) -> None:
    registry.trouble["manifests/"] = drip(1, 0.05)

    with pytest.raises(Unavailable, match="no whole answer after"):
        client_of(registry).manifest("1")


def test_the_text_of_an_error_is_not_waited_for_for_long(registry: FakeRegistry) -> None:
    def slow_error(handler: Handler) -> None:
        handler.answer = lambda: status(404, body=bytes(1000))(handler)  # type: ignore[method-assign]
        drip(1, 0.05)(handler)

    registry.trouble["manifests/"] = slow_error
    began = time.monotonic()

    with pytest.raises(NotFound):
        client_of(registry).manifest("1")
    assert time.monotonic() - began < 5


# ---- a registry that restarts


def test_a_registry_that_is_gone_for_a_moment_amid_a_blob_is_waited_for() -> None:
    with FakeRegistry({DIGEST: BLOB}, trouble={DIGEST: cut_after(200_000)}) as registry:
        blob = client_of(registry).blob(DIGEST, len(BLOB))
        taken = [next(blob)]
    again = FakeRegistry({DIGEST: BLOB}, port=int(registry.address.rpartition(":")[2]))
    with contextlib.ExitStack() as stack:
        starting = threading.Timer(0.5, lambda: stack.enter_context(again))
        starting.start()
        taken += blob
        starting.join()

    assert b"".join(taken) == BLOB
    assert ranges(again) == ["bytes=200000-"]


def test_a_registry_that_refuses_for_a_moment_amid_a_blob_is_waited_for(registry: FakeRegistry) -> None:
    registry.trouble[DIGEST] = in_turn(cut_after(200_000), *[status(503, {"Retry-After": "0"})] * 5)

    assert b"".join(client_of(registry).blob(DIGEST, len(BLOB))) == BLOB


def test_a_registry_that_is_gone_for_good_amid_a_blob_is_given_up_at_the_byte_it_had_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "_RESUMES", 2)
    with FakeRegistry({DIGEST: BLOB}, trouble={DIGEST: cut_after(200_000)}) as mirror:
        blob = client_of(mirror).blob(DIGEST, len(BLOB))
        taken = [next(blob)]

    with pytest.raises(Unavailable, match=rf"^RegistryUnavailable: .*refused at byte 200000 of {len(BLOB)}$"):
        taken += blob
    assert b"".join(taken) == BLOB[:200_000]


def test_a_registry_that_does_not_answer_at_first_is_not_waited_for() -> None:
    with FakeRegistry() as registry:
        pass
    began = time.monotonic()

    with pytest.raises(Unavailable, match=r"Connection refused$"):
        next(client_of(registry).blob(DIGEST, len(BLOB)))
    assert time.monotonic() - began < 0.5


# ---- wrong bytes


def partial_of(tmp_path: Path) -> Path:
    directory = LayerDirectory(tmp_path / "images")
    directory.prepare()
    return directory.partial("layer")


def test_wrong_bytes_of_a_mirror_that_broke_off_are_not_the_next_sources_fault(
    tmp_path: Path, registry: FakeRegistry, mirror: FakeRegistry
) -> None:
    mirror.blobs[DIGEST] = FLIPPED
    mirror.trouble[DIGEST] = in_turn(cut_after(300_000), status(404))

    fetch(tmp_path, mirror, registry)

    assert (tmp_path / "layer/diff/big").read_bytes() == CONTENT
    assert asked_from(registry) == [300_000, 0]
    assert not partial_of(tmp_path).exists()


@pytest.mark.parametrize("left", [bytes(100_000), FLIPPED, FLIPPED + b"more"], ids=["some", "all", "too much"])
def test_wrong_bytes_on_the_disk_are_fetched_anew(tmp_path: Path, registry: FakeRegistry, left: bytes) -> None:
    partial_of(tmp_path).write_bytes(left)

    fetch(tmp_path, registry)

    assert (tmp_path / "layer/diff/big").read_bytes() == CONTENT
    assert not partial_of(tmp_path).exists()


def test_a_source_that_lies_from_the_first_byte_on_is_asked_once_more_only_where_others_may_have_lied(
    tmp_path: Path, registry: FakeRegistry, mirror: FakeRegistry
) -> None:
    mirror.blobs[DIGEST] = registry.blobs[DIGEST] = FLIPPED
    partial_of(tmp_path).write_bytes(bytes(1000))

    with pytest.raises(Error, match=f"has the digest {layers.digest(FLIPPED)}, expected {DIGEST}"):
        fetch(tmp_path, mirror, registry)

    assert (asked_from(mirror), asked_from(registry)) == ([1000, 0], [0])
    assert not partial_of(tmp_path).exists()
